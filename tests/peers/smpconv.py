"""The released SMPConv ImageNet network, written from its checkpoints' format: dense evaluation, then `conv2d`.

Names of modules and parameters are those of the released checkpoints.
"""

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ReleasedNet", "ReleasedSmp", "randomize_"]


class ReleasedSmp(nn.Module):
    """Depthwise convolution whose kernel is evaluated at all pixels for all points, transposed and flipped."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        count = kernel_size**2 // 4
        self.weight_coord = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, count, 2), std=0.2, a=-1, b=1))
        self.radius = nn.Parameter(torch.full((1, count, 1, 1), 4 / kernel_size))
        self.weights = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, channels, count), std=0.02))
        line = torch.linspace(-1, 1, kernel_size)
        grid = torch.stack(torch.meshgrid(line, line, indexing="ij")).unsqueeze(0)
        self.kernel_coord = nn.Parameter(grid, requires_grad=False)

    def kernel(self) -> Tensor:
        """(C, K, K)."""
        difference = self.weight_coord[..., None, None] - self.kernel_coord.unsqueeze(1)  # (1, m, 2, K, K)
        influence = F.relu(1 - difference.abs().sum(2) / self.radius)
        size = influence.shape[-1]
        kernel = (self.weights @ influence.flatten(2)).reshape(-1, size, size)
        return kernel.permute(0, 2, 1).flip(1)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel().unsqueeze(1)
        return F.conv2d(x.contiguous(), kernel.contiguous(), padding=kernel.shape[-1] // 2, groups=x.shape[1])


class Block(nn.Module):
    """conv and bn, with or without a ReLU."""

    def __init__(self, conv: nn.Module, channels: int, relu: bool) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = conv, nn.BatchNorm2d(channels), relu

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return F.relu(y) if self.relu else y


def block(c_in: int, c_out: int, size: int, stride: int = 1, groups: int = 1, relu: bool = False) -> Block:
    return Block(nn.Conv2d(c_in, c_out, size, stride, size // 2, groups=groups, bias=False), c_out, relu)


class LargeKernel(nn.Module):
    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.smp = Block(ReleasedSmp(channels, kernel_size), channels, relu=False)
        self.small_conv = block(channels, channels, 5, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.smp(x) + self.small_conv(x)


class KernelBlock(nn.Module):
    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.prelkb_bn = nn.BatchNorm2d(channels)
        self.pw1 = block(channels, channels, 1, relu=True)
        self.large_kernel = LargeKernel(channels, kernel_size)
        self.pw2 = block(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pw2(F.relu(self.large_kernel(self.pw1(self.prelkb_bn(x)))))


class Ffn(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.preffn_bn = nn.BatchNorm2d(channels)
        self.pw1 = block(channels, 4 * channels, 1)
        self.pw2 = block(4 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pw2(F.gelu(self.pw1(self.preffn_bn(x))))


class Stage(nn.Module):
    def __init__(self, channels: int, kernel_size: int, depth: int) -> None:
        super().__init__()
        pairs = [(KernelBlock(channels, kernel_size), Ffn(channels)) for _ in range(depth)]
        self.blocks = nn.Sequential(*(module for pair in pairs for module in pair))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class ReleasedNet(nn.Module):
    """SMPConv-T unless told otherwise."""

    def __init__(
        self,
        depths: tuple[int, ...] = (2, 2, 8, 2),
        dims: tuple[int, ...] = (96, 192, 384, 768),
        kernel_sizes: tuple[int, ...] = (31, 29, 27, 13),
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        first = dims[0]
        self.stem = nn.Sequential(
            block(3, first, 3, stride=2, relu=True),
            block(first, first, 3, groups=first, relu=True),
            block(first, first, 1, relu=True),
            block(first, first, 3, stride=2, groups=first, relu=True),
        )
        self.stages = nn.ModuleList(Stage(*each) for each in zip(dims, kernel_sizes, depths, strict=True))
        self.transitions = nn.ModuleList(
            nn.Sequential(block(a, b, 1, relu=True), block(b, b, 3, stride=2, groups=b, relu=True))
            for a, b in itertools.pairwise(dims)
        )
        self.norm = nn.BatchNorm2d(dims[-1])
        self.head = nn.Linear(dims[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages[0](self.stem(x))
        for transition, stage in zip(self.transitions, list(self.stages)[1:], strict=True):
            x = stage(transition(x))
        return self.head(self.norm(x).mean((2, 3)))


@torch.no_grad()
def randomize_(net: ReleasedNet) -> ReleasedNet:
    """Points all over the kernels, statistics away from 0 and 1: nothing that a wrong conversion could hide in."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.1)
        elif isinstance(module, ReleasedSmp):
            module.weight_coord.uniform_(-1.1, 1.1)
            module.radius.uniform_(0.05, 0.5)
    return net
