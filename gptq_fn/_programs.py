"""How the programs of a run are compiled."""

from functools import partial

import jax

_OPTIONS = {
    "xla_gpu_autotune_level": 0,
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_graph_min_graph_size": 2**30,
    "xla_cpu_experimental_ynn_fusion_type": "",
}

program = partial(jax.jit, compiler_options=_OPTIONS)
"""`jax.jit` for the outermost programs of a run, whose matrix products GPUs then choose by rule and not by trial.

Trials may end differently each time, and then two runs of the same input would not give the same bytes; and they take ten
seconds for one product in float32. Nor are parts of programs recorded as CUDA graphs: those of the factor, which hold calls
of cuSOLVER, ended the second run of a process with a launch failure (jaxlib 0.11.2), and making them anew for each call
takes longer than launching. CPUs multiply by Eigen and not by YNNPACK: on two cores, 2,048 tokens by weights of 576 to 1,536
features at 159 GFLOP/s instead of 117 to 149 (jaxlib 0.10.2). JAX allows such options for outermost programs only, so what users
may call inside programs of their own is compiled plainly.
"""
