"""Images of a folder, as a timm model takes them."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn

__all__ = ["load_images"]


def load_images(folder: Path, model: nn.Module, count: int) -> Tensor:
    """Images of a folder and the folders in it, in the order of their paths, with the model's own transform.

    Args:
        folder: files that PIL can't read are left out.
        model: its configuration says size, crop and normalisation.
        count: how many at most; taken at equal distances from the whole list, so that all classes may be there.

    Returns:
        (N, C, H, W).

    Raises:
        ValueError: the folder does not exist, or holds no image.
    """
    if not folder.is_dir():
        raise ValueError(f"--images {folder}: no such folder")
    known = Image.registered_extensions()
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in known and path.is_file())
    config = resolve_data_config({}, model=model)
    transform = create_transform(**config, is_training=False)
    found: list[Tensor] = []
    for path in paths[:: max(1, len(paths) // count)][:count]:
        try:
            with Image.open(path) as image:
                found.append(transform(image.convert("RGB" if config["input_size"][0] == 3 else "L")))
        except (UnidentifiedImageError, OSError):
            continue
    if not found:
        raise ValueError(f"--images {folder}: expected images that PIL can read; there are none")
    return torch.stack(found)
