"""Compiling, inspecting, measuring and executing kernels, with or without a GPU."""
