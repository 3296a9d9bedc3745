"""Fashion-MNIST from its four IDX files (Xiao et al. 2017; MIT licence)."""

from __future__ import annotations

import gzip
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["FOLDER", "TRAINING_PICTURES", "Fashion", "load_fashion", "read_idx"]

#: where Debian's package dataset-fashion-mnist puts the files
FOLDER = Path("/usr/share/datasets/fashion-mnist")
SIZES = {"train": 60_000, "t10k": 10_000}
HELD_OUT = 6_000
TRAINING_PICTURES = SIZES["train"] - HELD_OUT
UNSIGNED_BYTE = 8


class Fashion(NamedTuple):
    """The pictures, normalised with the mean and the deviation of the training pictures; labels are 0 to 9.

    Attributes:
        train, train_labels: (54000, 1, 28, 28) and (54000,), in an order drawn once.
        held_out, held_out_labels: 6,000 of the training pictures, for choices.
        test, test_labels: 10,000; no choice is made on them.
    """

    train: Tensor
    train_labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor
    test: Tensor
    test_labels: Tensor


def load_fashion(folder: Path = FOLDER) -> Fashion:
    """Read the data set.

    Args:
        folder: with the four files, compressed or not.

    Raises:
        FileNotFoundError: a file is missing; the message says how to get it.
        ValueError: a file is damaged or not of this data set.
    """
    parts = {}
    for part, count in SIZES.items():
        images = read_idx(_find(folder, f"{part}-images-idx3-ubyte"), (count, 28, 28))
        labels = read_idx(_find(folder, f"{part}-labels-idx1-ubyte"), (count,))
        if labels.max() > 9:
            raise ValueError(f"{folder}: a label of {part} is {labels.max()}: expected 0 to 9")
        parts[part] = torch.from_numpy(images).float().div(255).unsqueeze(1), torch.from_numpy(labels).long()
    images, labels = parts["train"]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, held_out = order[HELD_OUT:], order[:HELD_OUT]
    mean, std = images[train].mean(), images[train].std()
    test, test_labels = parts["t10k"]
    normal = (images - mean) / std
    return Fashion(
        normal[train], labels[train], normal[held_out], labels[held_out], (test - mean) / std, test_labels
    )  # fmt: skip


def read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The bytes of an IDX file: two zeros, the type, the number of dimensions, the sizes, the values.

    Args:
        path: compressed if it ends in ".gz".
        shape: that is expected.

    Raises:
        ValueError: the file is damaged, or has another shape.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise ValueError(f"{path}: damaged ({error}); install the package again, or copy the file again") from None
    header = 4 + 4 * len(shape)
    magic = bytes((0, 0, UNSIGNED_BYTE, len(shape)))
    sizes = tuple(int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(len(shape)))
    if content[:4] != magic or sizes != shape or len(content) != header + math.prod(shape):
        raise ValueError(f"{path}: expected an IDX file of {shape} bytes; it is damaged or of another data set")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy()


def _find(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"{folder}: has no {name}[.gz]; `apt-get install dataset-fashion-mnist` brings Fashion-MNIST on Debian,"
        " elsewhere pass --data FOLDER with its four IDX files"
    )
