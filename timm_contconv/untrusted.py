"""What a stranger's configuration may ask for: checked before anything is built from it.

Nothing in a configuration names code or a file: architectures are looked up in timm's registry, weights are the
`model.safetensors` beside it, numbers are bounded, and memory is bounded by the size of the weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import safetensors
import timm
import torch
from timm.models._pretrained import PretrainedCfg
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from .layers import ConstructedConv

__all__ = [
    "LARGEST_MODEL",
    "WEIGHTS",
    "MemoryBound",
    "Weights",
    "check_arguments",
    "check_config",
    "check_kernels",
    "check_pretrained_cfg",
    "check_weights",
    "memory_bound",
]

#: the only weights file that is ever loaded without the caller naming it
WEIGHTS = "model.safetensors"
#: arguments that say where weights come from, how a model is wrapped or where it is put: not part of an architecture
BUILD_ARGUMENTS = frozenset(
    (
        *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "pretrained_filter_fn"),
        *("pretrained_model_args", "checkpoint_path", "cache_dir", "features_only", "out_indices", "feature_cls"),
        *("feature_cfg", "pruned", "model_cls", "model_cfg", "variant", "kwargs_filter", "device", "dtype"),
        *("scriptable", "exportable", "no_jit", "model_name", "self", "cls"),
    )
)
#: fields of timm's PretrainedCfg that say where weights are
SOURCES = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "custom_load")
LARGEST_NUMBER = 1_000_000
LARGEST_IMAGE = 10_000
LONGEST_TEXT = 1000
LONGEST_LIST = 10_000
LARGEST_CONFIG = 16 * 2**20
#: bytes that building may allocate: so many times the weights file's values as float32, and so many besides
WEIGHTS_FACTOR, SPARE_BYTES = 8, 256 * 2**20
#: tensors that building may make: so many times those of the weights file, and so many besides
TENSORS_FACTOR, SPARE_TENSORS = 10, 1000
#: bytes and tensors without weights to compare with
UNTRAINED_BYTES, UNTRAINED_TENSORS = 2**30, 10_000
#: values of the dense kernel that one layer constructs
LARGEST_KERNEL = 2**28


def check_config(path: Path) -> dict[str, Any]:
    """Read a configuration in timm's format and refuse what no architecture needs.

    Raises:
        ValueError: names the file, the key, the value and what is allowed.
    """
    config = _read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(config).__name__}")
    architecture = config.get("architecture")
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise ValueError(f"{path}: architecture={_short(architecture)}: expected the name of a registered model")
    for key in ("num_classes", "num_features"):
        if key in config:
            _check_count(f"{path}: {key}", config[key])
    arguments = config.get("model_args", {})
    if not isinstance(arguments, dict):
        raise ValueError(f"{path}: model_args={_short(arguments)}: expected an object of arguments")
    check_arguments(arguments, f"{path}: model_args", tables=("base_args", "flex_args", "patch", "patch_args"))
    inner = config.get("pretrained_cfg", {})
    if not isinstance(inner, dict):
        raise ValueError(f"{path}: pretrained_cfg={_short(inner)}: expected an object")
    check_pretrained_cfg(inner, f"{path}: pretrained_cfg")
    return config


def check_pretrained_cfg(values: Mapping[str, Any], where: str, sources: bool = False) -> None:
    """Refuse a pretrained configuration that says where weights are, or holds what timm does not know.

    Args:
        values: fields of timm's PretrainedCfg.
        where: what the error starts with.
        sources: timm has filled in where weights are; only the file's name is checked.

    Raises:
        ValueError: names the field and what is allowed.
    """
    known = {field.name for field in dataclasses.fields(PretrainedCfg)} | {"global_pool", "num_features"}
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"{where}.{_shown(key)}: not a field of timm's PretrainedCfg")
        if key in SOURCES and not (sources and key in ("file", "hf_hub_id")):
            if value and not (key == "hf_hub_filename" and value == WEIGHTS):
                raise ValueError(f"{where}.{key}={_short(value)}: weights are the {WEIGHTS} beside it; leave it out")
        elif key not in ("label_names", "label_descriptions"):  # of the image's classes: text that is not interpreted
            _check_plain(f"{where}.{key}", value)
    for key in ("input_size", "test_input_size", "min_input_size"):
        size = values.get(key)
        if size is not None and not _is_image_size(size):
            raise ValueError(
                f"{where}.{key}={_short(size)}: expected [channels, height, width], at most {LARGEST_IMAGE} pixels wide"
            )


def check_arguments(arguments: Mapping[str, Any], where: str, tables: tuple[str, ...] = ()) -> dict[str, Any]:
    """Arguments of an architecture, if they describe no more than that.

    Args:
        arguments: as `timm.create_model` takes them.
        where: what the error starts with.
        tables: arguments that are mappings, of the same kinds of values.

    Raises:
        ValueError: names the argument, the value and what is allowed.
    """
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{where}={_short(arguments)}: expected an object of arguments")
    for key, value in arguments.items():
        if not isinstance(key, str) or not key.isidentifier() or key.startswith("_") or key in BUILD_ARGUMENTS:
            raise ValueError(f"{where}.{_shown(key)}: not an argument of an architecture")
        if key == "patch" and key in tables:
            continue  # PatchSpec has bounds of its own
        if key in tables:
            check_arguments(value, f"{where}.{key}")
        else:
            _check_plain(f"{where}.{key}", value)
    return dict(arguments)


@dataclasses.dataclass(frozen=True)
class Weights:
    """How much a weights file holds.

    Attributes:
        tensors: how many.
        values: numbers in all of them.
    """

    tensors: int
    values: int


_BOUND: ContextVar[bool] = ContextVar("_BOUND", default=False)
#: what no architecture exceeds; a bound for building on the meta device
LARGEST_MODEL = Weights(tensors=10_000, values=2**35)


def check_weights(path: Path) -> Weights:
    """The size of a safetensors file's content; none of it is read.

    Raises:
        ValueError: the file is damaged or cut short.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            sizes = [math.prod(file.get_slice(key).get_shape()) for key in file.keys()]  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: damaged or cut short ({error}); copy or download it again") from None
    return Weights(len(sizes), sum(sizes))


def check_kernels(model: nn.Module) -> None:
    """Refuse a model with a layer whose dense kernel, which is constructed when it runs, would be enormous.

    Raises:
        ValueError: names the layer and its kernel's size.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, ConstructedConv):
            shape = (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
            if math.prod(shape) > LARGEST_KERNEL:
                raise ValueError(f"{name}: its kernel would be {shape}: expected at most {LARGEST_KERNEL:,} values")


class MemoryBound(TorchDispatchMode):
    """While it is entered, only so many tensors may be made, of so many bytes together; one too many is not made.

    Sizes are computed before memory is allocated, by the operator's own rule on the meta device.

    Args:
        weights: what the model is for; None without weights.
    """

    def __init__(self, weights: Weights | None) -> None:
        super().__init__()
        self.weights = weights
        if weights is None:
            self.bytes_left, self.tensors_left = UNTRAINED_BYTES, UNTRAINED_TENSORS
        else:
            self.bytes_left = WEIGHTS_FACTOR * 4 * weights.values + SPARE_BYTES
            self.tensors_left = TENSORS_FACTOR * weights.tensors + SPARE_TENSORS

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(result.alias_info is not None for result in func._schema.returns):  # neither view nor in place
            self.tensors_left -= 1
            self.bytes_left -= _bytes_of_result(func, args, kwargs)
            if self.bytes_left < 0 or self.tensors_left < 0:
                raise ValueError(self._refusal())
        return func(*args, **kwargs)

    def _refusal(self) -> str:
        if self.weights is None:
            return (
                f"the configuration asks for more than {UNTRAINED_BYTES >> 20} MiB without weights to compare with:"
                " pass pretrained=True, or build the model from its base and patch it"
            )
        return (
            f"the configuration asks for a model far larger than its weights, which are {self.weights.values:,} values"
            f" in {self.weights.tensors} tensors: it is damaged or not to be trusted"
        )


@contextlib.contextmanager
def memory_bound(weights: Weights | None) -> Iterator[None]:
    """Enter a `MemoryBound`, unless one is entered already, which then holds."""
    if _BOUND.get():
        yield
        return
    token = _BOUND.set(True)
    try:
        with MemoryBound(weights):
            yield
    finally:
        _BOUND.reset(token)


def _bytes_of_result(func: Any, args: Any, kwargs: Any) -> int:
    args, kwargs = tree_map_only(Tensor, _on_meta, (args, kwargs))
    if any(argument.name == "device" for argument in func._schema.arguments):
        kwargs = {**kwargs, "device": torch.device("meta")}
    try:
        result = func(*args, **kwargs)
    except (NotImplementedError, RuntimeError):  # depends on values, or is an error that the operator itself raises
        return 0
    results = result if isinstance(result, list | tuple) else [result]
    return sum(item.numel() * item.element_size() for item in results if isinstance(item, Tensor))


def _on_meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")


def _read_json(path: Path) -> Any:
    if path.stat().st_size > LARGEST_CONFIG:
        raise ValueError(f"{path}: {path.stat().st_size:,} bytes: expected at most {LARGEST_CONFIG:,}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from None
    except RecursionError:
        raise ValueError(f"{path}: not a configuration: its values are nested too deeply") from None


def _check_plain(key: str, value: Any, depth: int = 0) -> None:
    """A number, a text, a truth value or a list of these, none of them enormous."""
    if isinstance(value, list | tuple):
        if len(value) > LONGEST_LIST or depth > 8:
            raise ValueError(f"{key}: expected a list of at most {LONGEST_LIST} values, nested at most 8 times")
        for item in value:
            _check_plain(key, item, depth + 1)
    elif isinstance(value, str):
        if len(value) > LONGEST_TEXT:
            raise ValueError(f"{key}={_short(value)}: expected at most {LONGEST_TEXT} characters")
    elif isinstance(value, int | float):
        if not abs(value) <= LARGEST_NUMBER:  # NaN too
            raise ValueError(f"{key}={_short(value)}: expected at most {LARGEST_NUMBER}")
    elif value is not None:
        raise ValueError(f"{key}={_short(value)}: expected a number, a string, true, false, or a list of these")


def _check_count(key: str, value: Any) -> None:
    if not _is_count(value):
        raise ValueError(f"{key}={_short(value)}: expected an int from 0 to {LARGEST_NUMBER}")


def _is_image_size(size: Any) -> bool:
    whole = isinstance(size, list | tuple) and len(size) == 3 and all(map(_is_count, size))
    return whole and max(size) <= LARGEST_IMAGE


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_NUMBER


def _shown(key: Any) -> str:
    return key if isinstance(key, str) and key.isidentifier() and len(key) < 80 else _short(key)


def _short(value: Any, longest: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= longest else f"{text[:longest]}..."
