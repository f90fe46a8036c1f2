"""The portable GPU tier: kernels in Triton, for NVIDIA GPUs and, by construction, AMD's."""
