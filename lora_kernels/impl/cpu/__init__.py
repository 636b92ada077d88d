"""impl="cpu": compiled C++, in csrc/cpu, beside the library's GEMMs."""
