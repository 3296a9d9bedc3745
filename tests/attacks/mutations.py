"""Saved folders with random damage. Each is refused, or gives exactly what its files say."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ..hub.helpers import LOADERS
from ..hub.watch import load_watched

__all__ = ["COUNTS", "KINDS", "attack"]

#: how each kind of damage ended: {"body bytes: loaded as the file says": 12}
COUNTS: Counter[str] = Counter()
VALUES = (
    None, True, -1, 0, 1, 3, 10**6, 2**63, -(2**70), 0.5, 1e308, float("nan"), float("inf"), "", "0", "os.system",
    "../../etc/passwd", "http://127.0.0.1:9/x", "é" * 2000, [], [0], [-1, -1], [10**5] * 4, {}, {"a": {"b": 1}},
)  # fmt: skip
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "C64", "F8_E4M3", "XX")
Random = random.Random


def attack(saved: Path, scratch: Path, seed: int) -> str:
    """Damage a copy of a saved folder and load it in one of the two ways.

    Returns:
        The kind of damage and how loading ended, as counted.

    Raises:
        AssertionError: what was loaded is not what the files say; or loading ran or opened something, took much
            memory, or failed with an error that is no refusal.
    """
    chance = Random(seed)
    kind = sorted(KINDS)[seed % len(KINDS)]
    way = sorted(LOADERS)[seed // len(KINDS) % len(LOADERS)]
    folder = Path(shutil.copytree(saved, scratch / "model"))
    try:
        KINDS[kind](folder, chance)
        models: list[Any] = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            error = load_watched(lambda path: models.append(LOADERS[way](path)), folder)
        if error is None:
            _require_what_the_file_says(models[0], folder, [str(item.message) for item in caught])
        elif way == "from_pretrained":
            assert isinstance(error, ValueError | FileNotFoundError), (kind, seed, repr(error))
    finally:
        shutil.rmtree(folder)
    ending = f"{kind}: {'refused' if error else 'loaded as the files say'}"
    COUNTS[ending] += 1
    return ending


def _require_what_the_file_says(model: Any, folder: Path, warned: list[str]) -> None:
    state, stored = model.state_dict(), load_file(folder / "model.safetensors")
    assert state.keys() == stored.keys()
    for name, value in state.items():
        assert value.device.type == "cpu"
        torch.testing.assert_close(value, stored[name].to(value.dtype), rtol=0, atol=0, equal_nan=True)
    is_finite = all(value.isfinite().all() for value in state.values())
    assert is_finite or any("NaN or infinity" in text for text in warned)
    with torch.no_grad():
        logits = model.eval()(torch.zeros(1, *_image_size(model)))
    assert logits.shape[-1] == model.num_classes or model.num_classes == 0


def _image_size(model: Any) -> tuple[int, int, int]:
    return (getattr(model, "in_chans", 3), 64, 64)


# ---- kinds of damage


def _body_bytes(folder: Path, chance: Random) -> None:
    _, start, data = _weights(folder)
    for _ in range(chance.randint(1, 8)):
        data[chance.randrange(start, len(data))] ^= 1 << chance.randrange(8)
    (folder / "model.safetensors").write_bytes(data)


def _header_bytes(folder: Path, chance: Random) -> None:
    _, start, data = _weights(folder)
    for _ in range(chance.randint(1, 4)):
        data[chance.randrange(start)] = chance.randrange(256)
    (folder / "model.safetensors").write_bytes(data)


def _length(folder: Path, chance: Random) -> None:
    _, _, data = _weights(folder)
    cut = chance.randrange(len(data))
    data = data[:cut] if chance.random() < 0.7 else data + bytes(chance.randrange(1, 100))
    (folder / "model.safetensors").write_bytes(data)


def _shapes(folder: Path, chance: Random) -> None:
    """Another shape, dtype, name or place of one tensor."""
    header, start, data = _weights(folder)
    names = [name for name in header if name != "__metadata__"]
    entry = header[name := chance.choice(names)]
    match chance.randrange(5):
        case 0:
            entry["shape"] = [*entry["shape"][::-1]] if chance.random() < 0.5 else [chance.choice((0, 1, 2**31, 2**62))]
        case 1:
            entry["dtype"] = chance.choice(DTYPES)
        case 2:
            header[chance.choice(names)] = header.pop(name)
        case 3:
            other = header[chance.choice(names)]
            entry["data_offsets"], other["data_offsets"] = other["data_offsets"], entry["data_offsets"]
        case _:
            entry["data_offsets"] = [chance.randrange(len(data)), chance.randrange(len(data))]
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[start:])


def _config_fields(folder: Path, chance: Random) -> None:
    """One field is changed, removed or added, at any depth."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    table = chance.choice(list(_tables(config)))
    key = chance.choice([*table] or ["x"])
    match chance.randrange(4):
        case 0:
            table.pop(key, None)
        case 1:
            table[chance.choice(("pretrained", "device", "file", "checkpoint_path", "x", "__class__", ""))] = (
                chance.choice(VALUES)
            )
        case _:
            table[key] = chance.choice(VALUES)
    path.write_text(json.dumps(config))


def _config_bytes(folder: Path, chance: Random) -> None:
    data = bytearray((folder / "config.json").read_bytes())
    for _ in range(chance.randint(1, 3)):
        data[chance.randrange(len(data))] = chance.randrange(256)
    (folder / "config.json").write_bytes(data)


KINDS: dict[str, Callable[[Path, Random], None]] = {
    "bytes of weights": _body_bytes,
    "bytes of the header": _header_bytes,
    "length of the file": _length,
    "shapes, dtypes and places of tensors": _shapes,
    "fields of the configuration": _config_fields,
    "bytes of the configuration": _config_bytes,
}


def _weights(folder: Path) -> tuple[dict[str, Any], int, bytearray]:
    """The header, where the values start, and all bytes."""
    data = bytearray((folder / "model.safetensors").read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:start]), start, data


def _tables(value: Any) -> Any:
    if isinstance(value, dict):
        yield value
        for item in value.values():
            yield from _tables(item)
