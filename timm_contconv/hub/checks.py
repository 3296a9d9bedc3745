"""What a stranger's configuration may say: checked before anything is built from it.

Everything that is allowed is listed: an architecture of timm's registry, plain values of bounded size as its
arguments, and the fields of timm's PretrainedCfg that do not say where weights are.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from timm.models import PretrainedCfg

__all__ = [
    "BUILD_ERRORS",
    "CONFIG",
    "RESERVED",
    "WEIGHTS",
    "check_arguments",
    "check_config",
    "check_foreign",
    "check_path",
]

CONFIG = "config.json"
#: the only weights file that is loaded without the caller naming it
WEIGHTS = "model.safetensors"
#: what timm's architectures raise for arguments that make no sense to them
BUILD_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError)
#: arguments of timm's factory and builder, which are not part of an architecture
RESERVED = frozenset(
    (
        *inspect.signature(timm.create_model).parameters,
        *inspect.signature(timm.models.build_model_with_cfg).parameters,
        *("features_only", "out_indices", "feature_cls", "pruned"),  # the builder takes these out of its **kwargs
        *("device", "dtype", "self", "cls"),
    )
)
#: arguments that are mappings of plain values; PatchSpec checks `patch`, merged.py checks `merged`
TABLES = ("base_args", "flex_args", "patch_args")
COUNTS = ("num_classes", "num_features")
IMAGE_SIZES = ("input_size", "test_input_size", "min_input_size")
#: text that is not interpreted
LABELS = ("labels", "label_names", "label_descriptions")
#: fields of timm's PretrainedCfg that say where weights are; timm fills in the last three
SOURCES = ("url", "state_dict", "custom_load", "file", "hf_hub_id", "source")
PRETRAINED_FIELDS = frozenset(
    (*(field.name for field in dataclasses.fields(PretrainedCfg)), "global_pool", "num_features", "labels")
)
LARGEST_NUMBER = 1_000_000
LARGEST_IMAGE = 10_000
LONGEST_TEXT = 1000
LONGEST_LIST = 10_000
LARGEST_CONFIG = 16 * 2**20


def check_path(argument: str, value: object) -> None:
    """Check that an argument is a path.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(value, str | Path):
        raise TypeError(f"{argument}={_short(value)}: expected a path, as a str or a pathlib.Path")


def check_config(path: Path) -> str:
    """Read a configuration in timm's format and refuse what is not allowed.

    Returns:
        The architecture's name.

    Raises:
        ValueError: names the file, the key, the value and what is allowed.
    """
    config = _read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(config).__name__}")
    architecture = config.pop("architecture", None)
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise ValueError(f"{path}: architecture={_short(architecture)}: expected the name of a registered model")
    arguments, inner = config.pop("model_args", {}), config.pop("pretrained_cfg", {})
    if not isinstance(inner, dict):
        raise ValueError(f"{path}: pretrained_cfg={_short(inner)}: expected an object")
    check_pretrained_cfg(config, f"{path}: ")
    check_foreign(inner, arguments, f"{path}: ")
    return architecture


def check_foreign(pretrained_cfg: Mapping[str, Any], model_args: Any, where: str) -> None:
    """The one check of a stranger's configuration.

    Args:
        pretrained_cfg: fields of timm's PretrainedCfg.
        model_args: arguments of the architecture.
        where: what the error starts with.

    Raises:
        ValueError: names the key, the value and what is allowed.
    """
    check_pretrained_cfg(pretrained_cfg, f"{where}pretrained_cfg.")
    check_arguments(model_args, f"{where}model_args", (*TABLES, "patch", "merged"))


def check_pretrained_cfg(values: Mapping[str, Any], where: str) -> None:
    """Refuse fields that say where weights are, that timm does not know, or whose values are out of range.

    Raises:
        ValueError: names the field and what is allowed.
    """
    for key, value in values.items():
        if key not in PRETRAINED_FIELDS:
            raise ValueError(f"{where}{_shown(key)}: not a field of timm's PretrainedCfg")
        if (key in SOURCES and value) or (key == "hf_hub_filename" and value not in (None, WEIGHTS)):
            raise ValueError(f"{where}{key}={_short(value)}: weights are the {WEIGHTS} beside it; leave it out")
        if key in COUNTS:
            _check_count(f"{where}{key}", value)
        elif key in IMAGE_SIZES:
            _check_image_size(f"{where}{key}", value)
        elif key not in (*SOURCES, *LABELS):
            _check_plain(f"{where}{key}", value)


def check_arguments(arguments: Any, where: str, tables: tuple[str, ...] = ()) -> dict[str, Any]:
    """Arguments of an architecture, if they are plain values and describe no more than that.

    Args:
        arguments: as `timm.create_model` takes them.
        where: what the error starts with.
        tables: arguments that may be mappings, of the same kinds of values.

    Raises:
        ValueError: names the argument, the value and what is allowed.
    """
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{where}={_short(arguments)}: expected an object of arguments")
    for key, value in arguments.items():
        if not isinstance(key, str) or not key.isidentifier() or key.startswith("_") or key in RESERVED:
            raise ValueError(f"{where}.{_shown(key)}: not an argument of an architecture")
        if key in COUNTS and value is not None:
            _check_count(f"{where}.{key}", value)
        elif key in TABLES and key in tables:
            check_arguments(value, f"{where}.{key}")
        elif key not in tables:
            _check_plain(f"{where}.{key}", value)
    return dict(arguments)


def _read_json(path: Path) -> Any:
    if path.stat().st_size > LARGEST_CONFIG:
        raise ValueError(f"{path}: {path.stat().st_size:,} bytes: expected at most {LARGEST_CONFIG:,}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from None
    except RecursionError:
        raise ValueError(f"{path}: not a configuration: its values are nested too deeply") from None


def _check_plain(key: str, value: Any, depth: int = 0) -> float:
    """A number, a text, a truth value, or a list of these whose numbers have a bounded sum; returns that sum."""
    if isinstance(value, list | tuple):
        if len(value) > LONGEST_LIST or depth > 8:
            raise ValueError(f"{key}: expected a list of at most {LONGEST_LIST} values, nested at most 8 times")
        size = sum(_check_plain(key, item, depth + 1) for item in value)
    elif isinstance(value, int | float):
        size = abs(value)
    elif isinstance(value, str) and len(value) > LONGEST_TEXT:
        raise ValueError(f"{key}={_short(value)}: expected at most {LONGEST_TEXT} characters")
    elif value is None or isinstance(value, str):
        size = 0
    else:
        raise ValueError(f"{key}={_short(value)}: expected a number, a string, true, false, or a list of these")
    if not size <= LARGEST_NUMBER:  # NaN too
        raise ValueError(f"{key}={_short(value)}: expected at most {LARGEST_NUMBER}, a list's numbers added up")
    return size


def _check_count(key: str, value: Any) -> None:
    if not _is_count(value):
        raise ValueError(f"{key}={_short(value)}: expected an int from 0 to {LARGEST_NUMBER}")


def _check_image_size(key: str, size: Any) -> None:
    whole = isinstance(size, list | tuple) and len(size) == 3 and all(map(_is_count, size))
    if size is not None and not (whole and max(size) <= LARGEST_IMAGE):
        raise ValueError(
            f"{key}={_short(size)}: expected [channels, height, width], at most {LARGEST_IMAGE} pixels wide"
        )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_NUMBER


def _shown(key: Any) -> str:
    return key if isinstance(key, str) and key.isidentifier() and len(key) < 80 else _short(key)


def _short(value: Any, longest: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= longest else f"{text[:longest]}..."
