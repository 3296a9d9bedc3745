"""The released FlexNet and FlexTCN, written from the format of checkpoints: 1×1 convolutions over positions, then conv.

Names of modules, parameters and buffers are those of the released checkpoints. Kernels are cropped with the mask at
every forward pass, which reads it, and convolved in the layout that they come in.
"""

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ReleasedFlexConv", "ReleasedFlexNet", "ReleasedFlexTCN", "randomize_"]

THRESHOLD = 0.1
CONV = {1: nn.Conv1d, 2: nn.Conv2d}


class Filter(nn.Module):
    def __init__(self, hidden: int, layers: int, number: int, ndim: int = 2) -> None:
        super().__init__()
        self.linear = CONV[ndim](ndim, hidden, 1)
        self.mu = nn.Parameter(2 * torch.rand(hidden, ndim) - 1)
        self.gamma = nn.Parameter(torch.distributions.Gamma(6.0 / number, 1.0).sample((hidden, ndim)))
        with torch.no_grad():
            self.linear.weight *= 25.6 / math.sqrt(layers + 1) * self.gamma.view_as(self.linear.weight)
            self.linear.bias.uniform_(-math.pi, math.pi)

    def forward(self, x: Tensor) -> Tensor:
        spatial = (1, *self.mu.shape, *(1,) * (x.ndim - 2))
        distance = self.gamma.view(spatial) * (x.unsqueeze(1) - self.mu.view(spatial))
        return torch.exp(-0.5 * distance.square().sum(2)) * torch.sin(self.linear(x))


class Kernel(nn.Module):
    def __init__(self, out_channels: int, hidden: int = 32, layers: int = 3, ndim: int = 2) -> None:
        super().__init__()
        self.linear = nn.ModuleList(CONV[ndim](hidden, hidden, 1) for _ in range(layers))
        self.output_linear = CONV[ndim](hidden, out_channels, 1)
        self.filters = nn.ModuleList(Filter(hidden, layers, number, ndim) for number in range(1, layers + 2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.filters[0](x)
        for linear, filter_ in zip(self.linear, self.filters[1:], strict=True):
            y = filter_(x) * linear(y)
        return self.output_linear(y)


class ReleasedFlexConv(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, size: int = 33, sigma: float = 0.125) -> None:
        super().__init__()
        self.in_channels, self.size = in_channels, size
        self.Kernel = Kernel(in_channels * out_channels)
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.mask_params = nn.Parameter(torch.tensor([[0.0, sigma], [0.0, sigma]]))
        self.register_buffer("train_length", torch.full((1,), size, dtype=torch.int32))
        self.register_buffer("temperature", torch.full((1,), 15.0))
        self.register_buffer("mask_threshold", torch.full((1,), THRESHOLD))

    def axis(self, dimension: int) -> Tensor:
        """Positions along an axis, cut symmetrically where the mask is under the threshold."""
        positions = torch.linspace(-1, 1, self.size)
        with torch.no_grad():
            mean, sigma = self.mask_params[dimension]
            reach = sigma * torch.sqrt(-2 * torch.log(self.mask_threshold))
            root = torch.maximum((mean - reach).abs(), (mean + reach).abs()).item()
            if root >= 1:
                return positions
            first = int(torch.nonzero(-root < positions)[0])
        return positions[first : self.size - first]

    def kernel(self) -> Tensor:
        axes = [self.axis(0), self.axis(1)]
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij")).unsqueeze(0)
        kernel = self.Kernel(grid).view(-1, self.in_channels, *grid.shape[2:])
        (mean_y, sigma_y), (mean_x, sigma_x) = self.mask_params
        mask = torch.exp(-0.5 * ((grid[0, 0] - mean_y) / sigma_y).square())
        return kernel * (mask * torch.exp(-0.5 * ((grid[0, 1] - mean_x) / sigma_x).square()))

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel()
        return F.conv2d(x, kernel, self.bias, padding=(kernel.shape[2] // 2, kernel.shape[3] // 2))


class Block(nn.Module):
    def __init__(self, c_in: int, c_out: int, dropout: float, size: int) -> None:
        super().__init__()
        self.cconv1 = ReleasedFlexConv(c_in, c_out, size)
        self.cconv2 = ReleasedFlexConv(c_out, c_out, size)
        self.norm1, self.norm2 = nn.BatchNorm2d(c_out), nn.BatchNorm2d(c_out)
        self.dp = nn.Dropout(dropout)
        self.shortcut = nn.Sequential(*([nn.Conv2d(c_in, c_out, 1)] if c_in != c_out else []))

    def forward(self, x: Tensor) -> Tensor:
        y = self.dp(F.relu(self.norm1(self.cconv1(x))))
        return F.relu(self.norm2(self.cconv2(y)) + self.shortcut(x))


class ReleasedFlexNet(nn.Module):
    def __init__(
        self,
        width: int = 24,
        factors: tuple[float, ...] = (1, 1, 1.5, 1.5, 1.5, 2, 2),
        classes: int = 10,
        size: int = 33,
    ) -> None:
        super().__init__()
        widths = [width, *(int(width * factor) for factor in factors)]
        self.cconv1 = ReleasedFlexConv(3, width, size)
        self.norm1 = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(*(Block(i, o, 0.2, size) for i, o in itertools.pairwise(widths)))
        self.out_layer = nn.Conv2d(widths[-1], classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks(F.relu(self.norm1(self.cconv1(x))))
        return self.out_layer(F.adaptive_avg_pool2d(y, 1)).flatten(1)


class ReleasedCausalFlexConv(nn.Module):
    """One dimension: as long as the sequence, its newest sample last. Nothing is cropped but set to 0."""

    def __init__(self, in_channels: int, out_channels: int, length: int) -> None:
        super().__init__()
        self.in_channels, self.length = in_channels, length
        self.Kernel = Kernel(in_channels * out_channels, ndim=1)
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.mask_params = nn.Parameter(torch.tensor([[1.0, 0.125]]))
        self.register_buffer("train_length", torch.full((1,), length, dtype=torch.int32))
        self.register_buffer("temperature", torch.full((1,), 15.0))
        self.register_buffer("mask_threshold", torch.full((1,), THRESHOLD))

    def forward(self, x: Tensor) -> Tensor:
        grid = torch.linspace(-1, 1, self.length)
        mean, sigma = self.mask_params[0]
        mask = torch.exp(-0.5 * ((grid - mean) / sigma).square())
        kernel = self.Kernel(grid[None, None]).view(-1, self.in_channels, self.length) * mask * (mask >= THRESHOLD)
        return F.conv1d(F.pad(x, (self.length - 1, 0)), kernel, self.bias)


class CausalBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, length: int) -> None:
        super().__init__()
        self.cconv1, self.cconv2 = (ReleasedCausalFlexConv(c, c_out, length) for c in (c_in, c_out))
        self.norm1, self.norm2 = nn.BatchNorm1d(c_out), nn.BatchNorm1d(c_out)
        self.shortcut = nn.Sequential(*([nn.Conv1d(c_in, c_out, 1)] if c_in != c_out else []))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.cconv1(x)))
        return F.relu(F.relu(self.norm2(self.cconv2(y))) + self.shortcut(x))


class ReleasedFlexTCN(nn.Module):
    """In evaluation: without dropout."""

    def __init__(self, channels: int, classes: int, length: int, width: int = 30, blocks: int = 2) -> None:
        super().__init__()
        widths = [channels] + [width] * blocks
        self.blocks = nn.Sequential(*(CausalBlock(i, o, length) for i, o in itertools.pairwise(widths)))
        self.out_layer = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(self.blocks(x)[..., -1])


@torch.no_grad()
def randomize_(net: nn.Module) -> nn.Module:
    """Masks of all sizes in the middle of their kernels, and statistics as after training."""
    for module in net.modules():
        if isinstance(module, ReleasedFlexConv | ReleasedCausalFlexConv):
            module.mask_params[:, 1].uniform_(0.05, 0.6)
            module.bias.uniform_(-0.1, 0.1)
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(1, 20)
            module.weight.uniform_(0.5, 1.5)
    return net
