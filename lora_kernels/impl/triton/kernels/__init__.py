"""What runs on the GPU: forward, backward and shrink, and their device functions."""
