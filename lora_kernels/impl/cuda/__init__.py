"""impl="cuda": compiled CUDA C++, in csrc/cuda; what it serves, who else runs its launches."""
