"""How the programs of a run are compiled."""

from functools import partial

import jax

program = partial(jax.jit, compiler_options={"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False})
"""`jax.jit` for the outermost programs of a run, whose matrix products GPUs then choose by rule and not by trial.

Trials may end differently each time, and then two runs of the same input would not give the same bytes; and they take ten
seconds for one product in float32. JAX allows such options for outermost programs only, so what users may call inside
programs of their own is compiled plainly.
"""
