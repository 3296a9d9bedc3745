"""Arrays of a report as compact bytes: whole numbers of 8 or 16 bits times a scale, each array once, compressed."""

from __future__ import annotations

import base64
import gzip
import hashlib
from typing import Any

import torch
from torch import Tensor

__all__ = ["Packer"]

TYPES = {8: torch.int8, 16: torch.int16}


class Packer:
    """Collects arrays into one buffer."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._places: dict[bytes, int] = {}

    def add(self, values: Tensor, bits: int, rowwise: bool = False) -> dict[str, Any]:
        """Append an array, unless an equal one is there.

        Args:
            values: floats.
            bits: 8 or 16 per number.
            rowwise: one scale for each index of the first dimension instead of one for all.

        Returns:
            {"at": first byte, "shape": [...], "bits": bits, "scales": [...]}: a value is its number times its scale.
        """
        largest = 2 ** (bits - 1) - 1
        rows = values.float().reshape(len(values) if rowwise else 1, -1)
        scales = rows.abs().amax(1).clamp_min(1e-30) / largest
        numbers = (rows / scales[:, None]).round().to(TYPES[bits]).contiguous().numpy().tobytes()
        return {
            "at": self._place(numbers),
            "shape": list(values.shape),
            "bits": bits,
            "scales": [float(f"{s:.4g}") for s in scales.tolist()],
        }

    def _place(self, numbers: bytes) -> int:
        digest = hashlib.sha256(numbers).digest()
        if digest not in self._places:
            self._buffer.extend(b"\0" * (len(self._buffer) % 2))  # 16-bit numbers begin at even bytes
            self._places[digest] = len(self._buffer)
            self._buffer.extend(numbers)
        return self._places[digest]

    def packed(self) -> str:
        """All arrays, as gzip in base64."""
        return base64.b64encode(gzip.compress(bytes(self._buffer), 6, mtime=0)).decode()
