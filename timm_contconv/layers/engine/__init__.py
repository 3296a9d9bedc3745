"""Depthwise convolutions on this package's engine: `nn.Conv2d` with the same results, computed in another way."""

from .conv import DepthwiseConv2d, EngineSpec

__all__ = ["DepthwiseConv2d", "EngineSpec"]
