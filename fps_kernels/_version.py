"""The version, where the build and every file that is written find it."""

__version__ = "0.1.0"
