"""What if it were not a Gaussian: the layers that Kobayashi 2023 (Table 1g) compares the envelope with.

Each stands in for a strided convolution and holds it as `conv`, with stride, groups and kernel unchanged.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_contconv.layers.envelope import envelope_filter, smooth

__all__ = ["METHODS", "Depthwise", "Ensemble", "MultiplicativeEnvelope", "ParametricAttention", "replace_strided"]

TAPS = 9  # k_g
SCALES = (0.3, 0.6, 1.0, 1.5, 2.0)  # of the ensemble, in pixels; Fig. 3 has five


class ParametricAttention(nn.Module):
    """conv(sum over 9 x 9 neighbours of softmax(G) X), G per channel and learned (Eq. 12)."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        offset = torch.arange(TAPS) - TAPS // 2
        start = -(offset.square()[:, None] + offset.square()) / 1.4  # a Gaussian of the envelope's first width
        self.logits = nn.Parameter(start.expand(conv.in_channels, 1, TAPS, TAPS).clone())

    def forward(self, x: Tensor) -> Tensor:
        attention = self.logits.flatten(2).softmax(-1).view_as(self.logits)
        return self.conv(F.conv2d(x, attention, padding=TAPS // 2, groups=len(attention)))


class MultiplicativeEnvelope(nn.Module):
    """A convolution whose kernel is a Gaussian times a free one, in the size of the kernel (Eq. 10)."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.raw_sigma = nn.Parameter(torch.zeros(conv.in_channels // conv.groups))

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (envelope_filter(F.softplus(self.raw_sigma), size) for size in self.conv.kernel_size)
        envelope = rows[:, :, None] * columns[:, None]
        envelope = envelope / envelope.amax((1, 2), keepdim=True)
        return self.conv._conv_forward(x, self.conv.weight * envelope, self.conv.bias)


class Ensemble(nn.Module):
    """conv(sum over five fixed widths of BN(smooth(X))): the BNs' scales weigh the widths (Eq. 11, Fig. 3)."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.norms = nn.ModuleList(nn.BatchNorm2d(conv.in_channels) for _ in SCALES)
        for norm in self.norms:
            nn.init.constant_(norm.weight, 1 / len(SCALES))

    def forward(self, x: Tensor) -> Tensor:
        variances = [x.new_full((x.shape[1],), sigma**2) for sigma in SCALES]
        smoothed = [norm(smooth(x, v, TAPS)) for norm, v in zip(self.norms, variances, strict=True)]
        return self.conv(torch.stack(smoothed).sum(0))


class Depthwise(nn.Module):
    """conv(depth-wise 1 x 9 and 9 x 1 convolutions of X), learned without a constraint."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv, channels = conv, conv.in_channels
        self.rows = nn.Conv2d(channels, channels, (TAPS, 1), padding=(TAPS // 2, 0), groups=channels, bias=False)
        self.columns = nn.Conv2d(channels, channels, (1, TAPS), padding=(0, TAPS // 2), groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.columns(self.rows(x)))


METHODS: dict[str, type[nn.Module]] = {
    "parametric attention": ParametricAttention,
    "multiplicative": MultiplicativeEnvelope,
    "ensemble": Ensemble,
    "depth-wise": Depthwise,
}


def replace_strided(model: nn.Module, method: type[nn.Module]) -> nn.Module:
    """Put a layer in place of every strided convolution of a model, which it keeps; in place."""
    strided = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and max(m.stride) > 1}
    for name, conv in strided.items():
        model.set_submodule(name, method(conv))
    return model
