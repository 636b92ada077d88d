"""impl="cuda": compiled CUDA C++, in csrc/cuda; a machine that executes it, what it takes."""
