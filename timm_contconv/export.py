"""A model made ready to deploy: ONNX, torch.export, AOTInductor; written, read back, and compared with the model."""

from __future__ import annotations

import copy
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch._inductor
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves

from .layers import ContinuousConv2d, ConvReplacement
from .patching import merge as merged

__all__ = ["Check", "Exported", "Format", "export", "load_exported"]

Format = Literal["onnx", "torch", "aoti"]
Run = Callable[[Tensor], list[Tensor]]

#: sizes that may stay open in the file, and the axis of each
AXES = {"batch": 0, "height": 2, "width": 3}
#: largest difference of outputs, relative to the largest output
TOLERANCE = 1e-4
SUFFIX: dict[Format, str] = {"onnx": ".onnx", "torch": ".pt2", "aoti": ".pt2"}
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
RUNS = 5


@dataclasses.dataclass(frozen=True)
class Check:
    """One comparison with the model.

    Attributes:
        shape: of the images.
        error: largest difference of outputs, relative to the largest output of the model.
    """

    shape: tuple[int, ...]
    error: float


@dataclasses.dataclass(frozen=True)
class Exported:
    """What `export` wrote, and what it checked.

    Attributes:
        path: the file.
        format: "onnx", "torch" or "aoti".
        bytes: size of the file.
        checks: comparisons with the model that was given.
        seconds: for one image, by the file, in this process.
        eager_seconds: the same by the model that was given.
    """

    path: Path
    format: Format
    bytes: int
    checks: tuple[Check, ...]
    seconds: float
    eager_seconds: float

    def __str__(self) -> str:
        checks = ", ".join(f"{'×'.join(map(str, c.shape))} to {c.error:.0e}" for c in self.checks)
        return (
            f"{self.path}: {self.format}, {self.bytes / 1e6:.1f} MB; equals the model at {checks};"
            f" {1e3 * self.seconds:.1f} ms an image, the model in eager mode {1e3 * self.eager_seconds:.1f} ms"
        )


def export(
    model: nn.Module,
    path: str | Path,
    format: Format = "onnx",
    *,
    dynamic: Sequence[str] = ("batch",),
    merge: bool = True,
    input_size: Sequence[int] | None = None,
) -> Exported:
    """Write a model to a file that runs without this package, read it back and compare it with the model.

    The file is for inference on the CPU. It holds only operators of PyTorch, or of ONNX.

    Args:
        model: any image model on the CPU, patched or not; it is not changed.
        path: the file, ending in .onnx, or in .pt2 for the other formats; it is replaced if everything succeeds.
        format: "onnx" (ONNX Runtime, OpenVINO, TensorRT), "torch" (`torch.export.load`) or "aoti" (compiled by
            AOTInductor for this machine; `torch._inductor.aoti_load_package`).
        dynamic: sizes that stay open: of "batch", "height" and "width".
        merge: write plain convolutions; False keeps the construction of kernels in the graph.
        input_size: (channels, height, width) of an image. Default: the size in the model's `pretrained_cfg`.

    Returns:
        What was written and checked: two batch sizes and, if they are dynamic, two image sizes.

    Raises:
        ValueError: an argument is out of range; the model can't be exported so; or the file's output differs from the
            model's by more than 1e-4 of the largest output. Nothing is written then.
        ModuleNotFoundError: an optional package is missing.
        OSError: the path can't be written.
    """
    path = Path(path)
    _check_arguments(path, format, dynamic)
    size = _input_size(model, input_size)
    _check_sides(model, dynamic, merge)
    original = copy.deepcopy(model).eval().requires_grad_(False)
    has_layers = any(isinstance(module, ConvReplacement) for module in model.modules())
    plain = merged(original) if merge and has_layers else original
    program = _program(plain, size, dynamic)
    with tempfile.TemporaryDirectory(prefix=f".{path.stem}-", dir=path.parent) as folder:
        new = Path(folder) / path.name
        _WRITERS[format](program, new)
        run = load_exported(new, format)
        checks = tuple(_check(run, original, shape) for shape in _shapes(size, dynamic))
        image = torch.randn(1 if "batch" in dynamic else 2, *size)
        seconds = [_seconds(f, image) for f in (run, _runner(original))]
        parts = sorted(Path(folder).iterdir())  # an ONNX model of more than 2 GB has a second file
        for part in parts:
            part.replace(path.parent / part.name)
        written = sum((path.parent / part.name).stat().st_size for part in parts)
    return Exported(path, format, written, checks, *seconds)


def load_exported(path: str | Path, format: Format) -> Run:
    """A function from images, (N, C, H, W), to the list of outputs of an exported file."""
    if format == "onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda images: [torch.from_numpy(y) for y in session.run(None, {name: images.numpy()})]
    if format == "torch":
        return _runner(torch.export.load(path).module())
    return _runner(torch._inductor.aoti_load_package(str(path)))


# ---- arguments


def _check_arguments(path: Path, format: Format, dynamic: Sequence[str]) -> None:
    if format not in get_args(Format):
        raise ValueError(f"format={format!r}: expected one of {', '.join(get_args(Format))}")
    if isinstance(dynamic, str) or not set(dynamic) <= AXES.keys():
        raise ValueError(f"dynamic={dynamic!r}: expected some of {', '.join(AXES)}, as ('batch',); () for fixed sizes")
    if path.suffix != SUFFIX[format]:
        raise ValueError(f"path={str(path)!r}: expected a name that ends in {SUFFIX[format]} for format={format!r}")
    if path.is_dir():
        raise IsADirectoryError(f"path={str(path)!r}: is a folder; expected a file in it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path={str(path)!r}: there is no folder {str(path.parent)!r}; make it first")
    missing = [name for name in PACKAGES if find_spec(name) is None] if format == "onnx" else []
    if missing:
        raise ModuleNotFoundError(
            f"format='onnx': needs {', '.join(missing)}, which is not installed: pip install 'timm_contconv[export]'"
        )


def _input_size(model: nn.Module, input_size: Sequence[int] | None) -> tuple[int, ...]:
    config = getattr(model, "pretrained_cfg", None)
    if input_size is None and isinstance(config, Mapping):
        channels, *sides = config["input_size"]
        input_size = (getattr(model, "in_chans", channels), *sides)
    if input_size is None or len(input_size) != 3 or min(input_size) < 1:
        raise ValueError(f"input_size={input_size!r}: expected (channels, height, width)")
    return tuple(int(pixels) for pixels in input_size)


def _check_sides(model: nn.Module, dynamic: Sequence[str], merge: bool) -> None:
    if not {"height", "width"} & set(dynamic) or merge:
        return
    names = [name for name, module in model.named_modules() if isinstance(module, ContinuousConv2d)]
    if names:
        raise ValueError(
            f"dynamic={tuple(dynamic)!r}: {names[0]} is a CC layer, whose kernels depend on the image's size: use"
            " merge=True, or leave height and width fixed"
        )


# ---- writing


def _program(model: nn.Module, size: Sequence[int], dynamic: Sequence[str]) -> ExportedProgram:
    axes = {AXES[name]: Dim.DYNAMIC for name in dynamic}
    try:
        with torch.no_grad():
            return torch.export.export(model, (torch.randn(2, *size),), dynamic_shapes=(axes,))
    except Exception as error:  # torch.export raises errors of many types
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"dynamic={tuple(dynamic)!r}: torch.export can't export this {type(model).__name__} so; try fewer dynamic"
            f" sizes: {type(error).__name__}: {reason}"
        ) from error


def _write_onnx(program: ExportedProgram, path: Path) -> None:
    onnx = torch.onnx.export(program, verbose=False, dynamo=True, input_names=["images"], output_names=["output"])
    assert onnx is not None
    onnx.save(path)


def _write_torch(program: ExportedProgram, path: Path) -> None:
    torch.export.save(program, path)


def _write_aoti(program: ExportedProgram, path: Path) -> None:
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))


_WRITERS: dict[Format, Callable[[ExportedProgram, Path], None]] = {
    "onnx": _write_onnx,
    "torch": _write_torch,
    "aoti": _write_aoti,
}

# ---- checks


def _shapes(size: Sequence[int], dynamic: Sequence[str]) -> list[tuple[int, ...]]:
    """Two batch sizes, and two image sizes, where these are dynamic. 32 is a multiple of most networks' strides."""
    channels, height, width = size
    other = (channels, height + 32 * ("height" in dynamic), width + 64 * ("width" in dynamic))
    shapes = [(2, *size), (3 if "batch" in dynamic else 2, *other)]
    return list(dict.fromkeys(shapes))


def _check(run: Run, model: nn.Module, shape: Sequence[int]) -> Check:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(shape, generator=generator)
    error = 0.0
    try:
        outputs = zip(run(images), _runner(model)(images), strict=True)
    except Exception as fault:  # of the runtime
        raise ValueError(
            f"the exported model does not run for images of {tuple(shape)}; try fewer dynamic sizes:"
            f" {type(fault).__name__}: {str(fault).strip().partition(chr(10))[0]}"
        ) from fault
    for found, expected in outputs:
        error = max(error, float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30)))
    if not error <= TOLERANCE:
        raise ValueError(
            f"the exported model differs from the model by {error:.1e} of the largest output, for images of"
            f" {tuple(shape)}; expected at most {TOLERANCE:.0e}: another size, or merge=False, may do"
        )
    return Check(tuple(shape), error)


def _runner(model: Callable[..., Any]) -> Run:
    def run(images: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return [y for y in tree_leaves(model(images)) if isinstance(y, Tensor)]

    return run


def _seconds(run: Run, images: Tensor) -> float:
    """Median time for one image, after one call to warm up."""
    times = []
    for _ in range(RUNS + 1):
        start = time.perf_counter()
        run(images)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]) / len(images)
