"""Named architectures, registered with timm when this package is imported."""

from . import ccnet, flexnet, patched, smpconv, smpnet

__all__ = ["ccnet", "flexnet", "patched", "smpconv", "smpnet"]
