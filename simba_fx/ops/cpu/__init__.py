"""The C++ kernels, and how they are built on first use."""
