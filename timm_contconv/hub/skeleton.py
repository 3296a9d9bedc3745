"""A model without memory: built on the meta device and compared with the header of its weights.

This bounds what a stranger's configuration can allocate, and finds weights that do not fit, in one step.
"""

from __future__ import annotations

import contextlib
import math
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.overrides import TorchFunctionMode

from ..layers import ConvReplacement
from .checks import BUILD_ERRORS, WEIGHTS

__all__ = ["LARGEST_ENTRIES", "build_checked", "check_skeleton", "counted", "without_memory"]

#: dtypes of a file that are cast to a floating-point parameter's
FLOATS = frozenset(("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"))
#: dtypes of a file that only a tensor of the same dtype takes
WHOLE = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64",
}  # fmt: skip
#: what building may register on modules: values and entries (modules, parameters, buffers), so many times those of the
#: weights, and so many besides. All of timm's families need at most 1.2 times the values and 4.3 times the entries.
VALUES_FACTOR, SPARE_VALUES = 8, 2**26
ENTRIES_FACTOR, SPARE_ENTRIES = 20, 2000
#: the same where there are no weights to compare with
LARGEST_VALUES, LARGEST_ENTRIES = 2**28, 30_000
#: values of the dense kernel that one layer constructs when it runs
LARGEST_KERNEL = 2**28
#: what initialisations call: it writes a tensor's values, and returns the tensor
WRITERS = frozenset((
    nn.init.constant_, nn.init.kaiming_normal_, nn.init.kaiming_uniform_, nn.init.normal_, nn.init.uniform_,
    Tensor.add_, Tensor.clamp_, Tensor.erfinv_, Tensor.fill_, Tensor.mul_, Tensor.normal_, Tensor.uniform_,
    Tensor.zero_,
))  # fmt: skip


#: tensors of a safetensors file by name: dtype, in safetensors' words, and shape
Header = Mapping[str, tuple[str, tuple[int, ...]]]


def _read_header(path: Path) -> Header:
    """Names, dtypes and shapes of a safetensors file's tensors; no values are read.

    Raises:
        ValueError: the file is damaged or cut short.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            return {key: (part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: damaged or cut short ({error}); copy or download it again") from None


def build_checked(
    skeleton: Callable[[], nn.Module], build: Callable[[], nn.Module], weights: Path | None, where: str
) -> nn.Module:
    """Build a model that a stranger's configuration describes, after a trial without memory.

    Args:
        skeleton: builds the model as it was saved, without weights; it is called on the meta device.
        build: builds the model that is wanted, and loads the weights if they are wanted.
        weights: the safetensors file beside the configuration; None without one.
        where: what errors start with.

    Raises:
        ValueError: the configuration describes no model, one that is too large, or one that the weights do not fit.
    """
    check_skeleton(skeleton, weights, where)
    model = build()
    if weights is not None:
        warn_of_nonfinite(model, where)
    return model


def check_skeleton(skeleton: Callable[[], nn.Module], weights: Path | None, where: str) -> None:
    """Build a model on the meta device and compare its tensors with those in a file.

    Random numbers are drawn as if it were not built, and its warnings are left to the build that follows.

    Raises:
        ValueError: as `build_checked`.
    """
    header = None if weights is None else _read_header(weights)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=()), without_memory(), _bound(header, where):
        warnings.simplefilter("ignore")
        try:
            model = skeleton()
        except BUILD_ERRORS as error:
            raise ValueError(f"{where}: timm can't build a model from it: {type(error).__name__}: {error}") from error
    _check_kernels(model, where)
    if header is not None:
        _check_tensors(model.state_dict(), header, where)


class _WithoutValues(TorchFunctionMode):
    """What would write a tensor's values is left out on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        values = (*args, *kwargs.values())
        if func in WRITERS and values[0].is_meta and not any(isinstance(value, Tensor) for value in values[1:]):
            return values[0]
        return func(*args, **kwargs)


@contextlib.contextmanager
def without_memory() -> Iterator[None]:
    """Modules are built on the meta device, and not initialised, which takes longer there than on the CPU."""
    with torch.device("meta"), _WithoutValues():
        yield


@contextlib.contextmanager
def counted(entries: int, values: float, refusal: str) -> Iterator[None]:
    """While it is entered, this thread may register only so much on modules; what is too many is refused.

    Args:
        entries: modules, parameters and buffers.
        values: of the parameters and buffers together.
        refusal: the error's text.

    Raises:
        ValueError: more was registered.
    """
    thread = threading.get_ident()

    def count(module: nn.Module, name: str, item: object) -> None:
        nonlocal entries, values
        if threading.get_ident() != thread:
            return
        entries -= 1
        values -= item.numel() if isinstance(item, Tensor) else 0
        if entries < 0 or values < 0:
            raise ValueError(refusal)

    with contextlib.ExitStack() as stack:
        stack.callback(register_module_module_registration_hook(count).remove)
        stack.callback(register_module_parameter_registration_hook(count).remove)
        stack.callback(register_module_buffer_registration_hook(count).remove)
        yield


def _bound(header: Header | None, where: str) -> contextlib.AbstractContextManager[None]:
    """Let a model of these weights be built, and none that is far larger."""
    if header is None:
        return counted(
            LARGEST_ENTRIES,
            LARGEST_VALUES,
            f"{where}: asks for more than {LARGEST_VALUES:,} values without weights to compare with: pass"
            " pretrained=True, or build the model from its base and patch it",
        )
    held = sum(math.prod(shape) for _, shape in header.values())
    return counted(
        ENTRIES_FACTOR * len(header) + SPARE_ENTRIES,
        VALUES_FACTOR * held + SPARE_VALUES,
        f"{where}: asks for a model far larger than its weights, which are {held:,} values in {len(header)} tensors: it"
        " is damaged or not to be trusted",
    )


def _check_kernels(model: nn.Module, where: str) -> None:
    """Refuse a layer that would construct an enormous dense kernel when it runs."""
    for name, layer in model.named_modules():
        if not isinstance(layer, ConvReplacement) or not hasattr(layer, "kernel_size"):  # the latter wrap a layer
            continue
        shape = (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
        if math.prod(shape) > LARGEST_KERNEL:
            raise ValueError(
                f"{where}: {name}: its kernel would be {shape}: expected at most {LARGEST_KERNEL:,} values"
            )


def _check_tensors(built: Mapping[str, Tensor], header: Header, where: str) -> None:
    """Compare names, shapes and dtypes of a model's tensors with those of a file."""
    misfits = []
    for key in dict.fromkeys((*header, *built)):
        dtype, stored = header.get(key, ("", "missing"))
        tensor = built.get(key)
        rebuilt = "missing" if tensor is None else tuple(tensor.shape)
        if stored != rebuilt:
            misfits.append(f"{key} is {stored}, and {rebuilt} where timm rebuilds the model")
        elif tensor is not None and not _is_castable(dtype, tensor.dtype):
            misfits.append(f"{key} is of dtype {dtype}, and {tensor.dtype} where timm rebuilds the model")
    if misfits:
        more = f"; and {len(misfits) - 3} more" if len(misfits) > 3 else ""
        exchanged = header.keys() - built.keys() and built.keys() - header.keys()
        hint = "; if the model was merged or patched, save it with tcc.save_pretrained" if exchanged else ""
        raise ValueError(f"{where}: the tensors of {WEIGHTS} do not fit: {'; '.join(misfits[:3])}{more}{hint}")


def _is_castable(stored: str, dtype: torch.dtype) -> bool:
    return stored in FLOATS if dtype.is_floating_point else stored == WHOLE.get(dtype)


def warn_of_nonfinite(model: nn.Module, where: str) -> None:
    """Warn, once, of tensors that hold NaN or infinity."""
    state = model.state_dict()
    floats = {key: value for key, value in state.items() if value.is_floating_point() and not value.is_meta}
    names = [key for key, value in floats.items() if not value.isfinite().all()]
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        warnings.warn(f"{where}: NaN or infinity in {', '.join(names[:5])}{more}", UserWarning, stacklevel=2)
