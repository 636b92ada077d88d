"""impl="triton": linear.py launches by a plan, through launch.py, the kernels."""
