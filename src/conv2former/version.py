"""The version, apart from the package so that it can be read without importing torch."""

from conv2former_runtime import __version__

__all__ = ["__version__"]
