"""The released SMPConv networks for CIFAR-10 and for sequences, written from their checkpoints' format.

Names of modules, parameters and buffers are those of the released checkpoints. Kernels are evaluated densely: all
points of a filter at all pixels, then the mean over the neighbours.
"""

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ReleasedSmpNet", "ReleasedSmpTCN", "randomize_"]


class Points(nn.Module):
    """A kernel (C_out, C_in, *size) of points per filter; two-dimensional ones are transposed and flipped."""

    def __init__(self, c_in: int, c_out: int, size: tuple[int, ...], count: int) -> None:
        super().__init__()
        self.weight_coord = nn.Parameter(torch.empty(c_out, count, len(size)))
        self.radius = nn.Parameter(torch.empty(c_out, count))
        self.weights = nn.Parameter(torch.empty(c_out, c_in, count))
        self.size = size

    def forward(self) -> Tensor:
        axes = [torch.linspace(-1, 1, n) for n in self.size]
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)  # (K, D)
        distance = (self.weight_coord[:, :, None] - grid).abs().sum(-1)  # (C_out, m, K)
        influence = F.relu(1 - distance / self.radius[..., None])
        neighbours = (influence > 0).sum(1, keepdim=True) + 1e-6
        kernel = (torch.einsum("oim,omk->oik", self.weights, influence) / neighbours).unflatten(-1, self.size)
        return kernel.transpose(2, 3).flip(2) if len(self.size) == 2 else kernel


class SmpConv(nn.Module):
    def __init__(self, c_in: int, c_out: int, size: tuple[int, ...], count: int) -> None:
        super().__init__()
        self.Kernel = Points(c_in, c_out, size, count)
        self.register_buffer("train_length", torch.full((1,), size[0], dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.Kernel()
        if kernel.ndim == 3:
            return F.conv1d(F.pad(x, (kernel.shape[2] - 1, 0)), kernel)
        return F.conv2d(x, kernel, padding=kernel.shape[2] // 2)


class CausalSmall(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (self.kernel_size[0] - 1, 0)))


class ImageBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, size: int, count: int) -> None:
        super().__init__()
        for number, channels in ((1, c_in), (2, c_out)):
            self.add_module(f"cconv{number}", SmpConv(channels, c_out, (size, size), count))
            self.add_module(f"cconv{number}s", nn.Conv2d(channels, c_out, 3, padding=1, bias=False))
            self.add_module(f"norm{number}", nn.BatchNorm2d(c_out))
            self.add_module(f"norm{number}s", nn.BatchNorm2d(c_out))
        self.dp = nn.Dropout(0.1)
        self.shortcut = nn.Sequential(*([nn.Conv2d(c_in, c_out, 1)] if c_in != c_out else []))

    def forward(self, x: Tensor) -> Tensor:
        y = self.dp(F.relu(self.norm1(self.cconv1(x)) + self.norm1s(self.cconv1s(x))))
        return F.relu(self.norm2(self.cconv2(y)) + self.norm2s(self.cconv2s(y)) + self.shortcut(x))


class ReleasedSmpNet(nn.Module):
    def __init__(
        self,
        width: int = 24,
        factors: tuple[float, ...] = (1, 1, 1.5, 1.5, 1.5, 2, 2),
        size: int = 33,
        count: int = 16,
        classes: int = 10,
    ) -> None:
        super().__init__()
        widths = [width, *(int(width * factor) for factor in factors)]
        self.cconv1 = SmpConv(3, width, (size, size), count)
        self.cconv1s = nn.Conv2d(3, width, 3, padding=1)
        self.norm1, self.norm1s = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(*(ImageBlock(i, o, size, count) for i, o in itertools.pairwise(widths)))
        self.out_layer = nn.Conv2d(widths[-1], classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks(F.relu(self.norm1(self.cconv1(x)) + self.norm1s(self.cconv1s(x))))
        return self.out_layer(F.adaptive_avg_pool2d(y, 1)).flatten(1)


class SequenceBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, length: int, count: int, bias: bool) -> None:
        super().__init__()
        for number, channels in ((1, c_in), (2, c_out)):
            self.add_module(f"cconv{number}", SmpConv(channels, c_out, (length,), count))
            self.add_module(f"cconv{number}s", CausalSmall(channels, c_out, 5, bias=bias))
            self.add_module(f"norm{number}", nn.BatchNorm1d(c_out))
            self.add_module(f"norm{number}s", nn.BatchNorm1d(c_out))
        self.dp = nn.Dropout(0.1)
        self.shortcut = nn.Sequential(*([nn.Conv1d(c_in, c_out, 1)] if c_in != c_out else []))

    def forward(self, x: Tensor) -> Tensor:
        y = self.dp(F.relu(self.norm1(self.cconv1(x)) + self.norm1s(self.cconv1s(x))))
        y = self.dp(F.relu(self.norm2(self.cconv2(y)) + self.norm2s(self.cconv2s(y))))
        return F.relu(y + self.shortcut(x))


class ReleasedSmpTCN(nn.Module):
    def __init__(
        self,
        channels: int,
        classes: int,
        length: int,
        width: int = 30,
        blocks: int = 6,
        count: int = 30,
        bias: bool = True,
    ) -> None:
        super().__init__()
        widths = [channels] + [width] * blocks
        self.blocks = nn.Sequential(*(SequenceBlock(i, o, length, count, bias) for i, o in itertools.pairwise(widths)))
        self.out_layer = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(self.blocks(x)[..., -1])


@torch.no_grad()
def randomize_(net: nn.Module) -> nn.Module:
    """Points all over the kernels, statistics away from 0 and 1: nothing that a wrong conversion could hide in."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.1)
        elif isinstance(module, Points):
            module.weight_coord.uniform_(-1.1, 1.1)
            module.radius.uniform_(0.05, 0.5)
            module.weights.normal_(0, 0.1)
    return net
