"""What looks at the compiled CUDA part: a machine that executes it, a report of its kernels."""
