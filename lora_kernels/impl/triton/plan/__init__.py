"""Which tiles a launch takes, in plain Python."""
