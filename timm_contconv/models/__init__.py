"""Named architectures, registered with timm when this package is imported."""

from . import patched, smpconv

__all__ = ["patched", "smpconv"]
