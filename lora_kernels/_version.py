"""The version, where modules below the package's face read it."""

__version__ = "0.2.0"
