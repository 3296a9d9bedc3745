"""What the Triton kernels are compiled to for NVIDIA cards, of which there need be none here.

The algorithms run as on a card, but for the launch of their kernels: so these are the very specialisations, options and
types that a card would get.
"""

import functools
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from timm_contconv.ops.algorithms.triton import TILES, Triton
from timm_contconv.ops.problem import Problem

triton = pytest.importorskip("triton")

#: Shared memory of a program on cards of consumers (compute capability 8.6 and 8.9), in bytes.
SMALL_CARD = 99 * 1024
#: Channels, size of the image, size of the kernel: products of 64, 32 and 16 pixels of 2 bytes.
SHAPES = [(96, 56, 23), (192, 28, 13), (768, 7, 7)]
#: Instructions of tensor cores that multiply blocks of a dtype.
PRODUCTS = {
    (torch.bfloat16, 80): r"mma\.sync\S*\.bf16\.bf16",
    (torch.float16, 80): r"mma\.sync\S*\.f16\.f16",
    (torch.float32, 80): r"mma\.sync\S*\.tf32\.tf32",
    (torch.bfloat16, 90): r"wgmma\.mma_async\S*\.bf16\.bf16",
    (torch.float16, 90): r"wgmma\.mma_async\S*\.f16\.f16",
    (torch.float32, 90): r"wgmma\.mma_async\S*\.tf32\.tf32",
}
QUICK = [(torch.bfloat16, 90, (4, 32))]
ALL = [(*card, tile, shape) for card in PRODUCTS for tile in TILES for shape in SHAPES if tile[1] < 2 * shape[1]]


class Card:
    """What Triton asks its driver before it compiles; the device's number is the compute capability."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", self.arch, 32)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Runs a call as on a card, launching nothing; gives the compiled kernels by name."""

    def compile_(arch: int, call) -> dict[str, Any]:
        kernels = {}

        @functools.wraps(run)
        def run_without_launch(self, *args, warmup, **options):
            kernel = run(self, *args, warmup=True, **options)
            kernels[kernel.metadata.name] = kernel
            return kernel

        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(triton.runtime.driver, "_active", Card(arch))
        monkeypatch.setattr(triton.JITFunction, "run", run_without_launch)
        call()
        return kernels

    run = triton.JITFunction.run
    return compile_


def check(compiled, dtype: torch.dtype, arch: int, tile: tuple[int, int], shape: tuple[int, int, int]) -> None:
    channels, size, kernel = shape
    x, weight = torch.empty(2, channels, size, size, dtype=dtype), torch.empty(channels, 1, kernel, kernel, dtype=dtype)
    problem = Problem.of(x.shape, weight.shape, (1, 1), (kernel // 2, kernel // 2), channels, x)

    def passes() -> None:
        algorithm = Triton(*tile)
        algorithm.output(problem, x, weight, None)
        algorithm.weight(problem, x, x)

    kernels = compiled(arch, passes)
    assert kernels.keys() == {"band_kernel", "output_kernel", "weight_kernel", "diagonal_kernel"}
    for name, kernel in kernels.items():
        assert spilled(kernel.asm["ptx"], arch) == 0, name
        assert kernel.metadata.shared <= SMALL_CARD, name
    for name in ("output_kernel", "weight_kernel"):
        ptx = kernels[name].asm["ptx"]
        assert re.search(PRODUCTS[dtype, arch], ptx), name
        assert "fma.rn.f32" not in ptx, name
        if name == "output_kernel" or dtype != torch.float32:  # whose transposed blocks Triton loads number by number
            narrow = [width for width in loads(ptx) if width < 8]
            assert len(narrow) == (name == "output_kernel"), (name, narrow)  # the bias


def spilled(ptx: str, arch: int) -> int:
    """Bytes that registers are spilled to, by the assembler that comes with Triton."""
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.search(r"\.target (\w+)", ptx).group(1)
    command = [get_ptxas(arch).path, "-v", f"--gpu-name={target}", "--output-file=/dev/null", "-"]
    run = subprocess.run(command, input=ptx, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return sum(map(int, re.findall(r"(\d+) bytes spill", run.stderr)))


def loads(ptx: str) -> list[int]:
    """Bytes of each load from the card's memory that stands in the code."""
    copies = re.findall(r"cp\.async\.\w+\.shared\.global \[[^]]*\], \[[^]]*\], (\w+)", ptx)
    direct = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.[busf](\d+) ", ptx)
    return [int(c, 0) for c in copies] + [int(n or 1) * int(bits) // 8 for n, bits in direct]


@pytest.mark.parametrize(("dtype", "arch", "tile"), QUICK)
def test_kernels_use_tensor_cores_load_vectors_and_spill_nothing(compiled, dtype, arch, tile):
    check(compiled, dtype, arch, tile, SHAPES[0])


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "arch", "tile", "shape"), ALL)
def test_so_do_all_of_them_for_kernels_and_images_of_any_size(compiled, dtype, arch, tile, shape):
    check(compiled, dtype, arch, tile, shape)
