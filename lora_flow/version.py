"""The version that is installed."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("lora-flow")
except PackageNotFoundError:  # imported from a folder of sources
    __version__ = "unknown"
