"""Triton kernels: plan (pure Python) -> linear.py (launcher) -> launch.py (seam) -> kernels."""
