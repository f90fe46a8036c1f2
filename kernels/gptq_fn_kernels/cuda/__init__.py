"""The tier for NVIDIA GPUs: kernels in CUDA C++, compiled when they are first needed."""
