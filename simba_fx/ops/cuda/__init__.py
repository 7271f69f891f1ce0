"""What runs on CUDA: ready-built packages, and our Triton kernels."""
