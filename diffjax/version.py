"""The version, read by the build and written into checkpoints and configs."""

__version__ = "0.1.0"
