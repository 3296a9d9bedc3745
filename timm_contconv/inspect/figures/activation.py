"""Images with the regions that made a model decide for its class (Kobayashi 2023, Fig. 6)."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from .figure import Figure, data, number, text

__all__ = ["activation", "overlay"]

SIZE = 168


def activation(pictures: Sequence[Image.Image], heats: Sequence[Tensor], titles: Sequence[str]) -> Figure:
    """Images in a row with warm colours where the activation is high.

    Args:
        pictures: the images.
        heats: (H, W) each, from 0 to 1, in their sizes.
        titles: of each.
    """
    urls = [_url(overlay(picture, heat)) for picture, heat in zip(pictures, heats, strict=True)]
    rows = [{"title": title, "url": url, "at": 0.5} for title, url in zip(titles, urls, strict=True)]
    middle = number("at", axis=None, scale={"domain": [0, 1]})
    panel = {
        "mark": {"type": "image", "width": SIZE, "height": SIZE},
        "encoding": {"url": text("url"), "x": middle, "y": middle},
        "width": SIZE,
        "height": SIZE,
    }
    facet = text("title", sort=list(titles), title=None)
    return Figure({"data": data(rows), "facet": facet, "columns": 4, "spacing": 10, "spec": panel})


def overlay(picture: Image.Image, heat: Tensor) -> Image.Image:
    """A grey image with orange laid over it, as much as the heat says."""
    grey = torch.frombuffer(bytearray(picture.convert("L").tobytes()), dtype=torch.uint8)
    grey = grey.view(picture.height, picture.width, 1).float()
    warm = torch.tensor([255.0, 120.0, 20.0])
    part = 0.75 * heat.clamp(0, 1).unsqueeze(-1)
    mixed = grey * (1 - part) + warm * part
    return Image.fromarray(mixed.byte().numpy())


def _url(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.convert("RGB").resize((SIZE * 2, SIZE * 2)).save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
