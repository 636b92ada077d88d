"""The compiled CUDA kernels beside a GPU: a machine that executes their code, what they take."""
