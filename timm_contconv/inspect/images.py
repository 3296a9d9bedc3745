"""The images that a report is made with: given ones, those of a folder, or scikit-image's photographs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

__all__ = ["Images", "ImagesGiven", "load_images"]

#: what `tcc.inspect` takes as images
ImagesGiven = str | Path | Tensor | Sequence[Image.Image]

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
MOST_IMAGES = 8  # each costs a forward and a backward pass


@dataclasses.dataclass(frozen=True)
class Images:
    """Images for a model.

    Attributes:
        batch: (N, C, H, W), normalised as the model takes them.
        names: of each.
        source: where they come from, in a few words.
    """

    batch: Tensor
    names: tuple[str, ...]
    source: str

    def pictures(self) -> list[Image.Image]:
        """The images for the eye: brightness from the smallest to the largest value, in each channel."""
        low, high = self.batch.amin((2, 3), keepdim=True), self.batch.amax((2, 3), keepdim=True)
        scaled = ((self.batch - low) / (high - low).clamp_min(1e-12) * 255).byte().cpu()
        colours = scaled[:, :3] if scaled.shape[1] >= 3 else scaled[:, :1].expand(-1, 3, -1, -1)
        return [Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()) for picture in colours]


def load_images(model: nn.Module, images: ImagesGiven | None) -> Images:
    """The images as the model takes them.

    Args:
        model: its `pretrained_cfg` says how images are resized and normalised.
        images: (N, C, H, W) as the model takes them; or PIL images, or a folder of image files, of which the first 8
            are used. Default: four photographs of scikit-image.

    Raises:
        ValueError: a folder holds no image or a broken one, a tensor has another number of dimensions, or the model
            does not say what images it takes.
    """
    if isinstance(images, Tensor):
        return _given(images)
    if images is None:
        return _prepared(model, _photographs(), "photographs of scikit-image")
    if isinstance(images, str | Path):
        return _prepared(model, _of_folder(Path(images)), f"images of {Path(images).name}")
    pictures = {f"image {number}": picture for number, picture in enumerate(images[:MOST_IMAGES], start=1)}
    if not pictures:
        raise ValueError("images=[]: expected at least one image, or None for scikit-image's photographs")
    return _prepared(model, pictures, "given images")


def _given(images: Tensor) -> Images:
    if images.ndim != 4 or not len(images) or not images.is_floating_point():
        raise ValueError(
            f"images: a tensor of shape {tuple(images.shape)} and {images.dtype}, expected (N, C, H, W) of floats,"
            " normalised as the model takes them"
        )
    batch = images[:MOST_IMAGES].detach()
    return Images(batch, tuple(f"image {number + 1}" for number in range(len(batch))), "given images")


def _photographs() -> dict[str, Image.Image]:
    if find_spec("skimage") is None:
        raise ValueError(
            "images=None: scikit-image's photographs need it: pip install timm_contconv[viz]; or give some"
        )
    from skimage import data

    return {name: Image.fromarray(getattr(data, name)()) for name in PHOTOGRAPHS}


def _of_folder(folder: Path) -> dict[str, Image.Image]:
    if not folder.is_dir():
        raise ValueError(f"images={str(folder)!r}: no such folder; expected a folder with image files")
    suffixes = Image.registered_extensions()
    files = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in suffixes]
    if not files:
        raise ValueError(f"images={str(folder)!r}: holds no image file, such as a .png or .jpg; expected at least one")
    return {path.name: _opened(path) for path in files[:MOST_IMAGES]}


def _opened(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"images: {path} can't be read as an image ({error}); repair it or take it out") from None


def _prepared(model: nn.Module, pictures: dict[str, Image.Image], source: str) -> Images:
    """Resized, cropped and normalised as timm does for the model."""
    config = getattr(model, "pretrained_cfg", None)
    if not config:
        raise ValueError(
            f"images: this {type(model).__name__} has no pretrained_cfg that says what images it takes; give images as"
            " a tensor (N, C, H, W)"
        )
    settings = resolve_model_data_config(model)
    channels = getattr(model, "in_chans", settings["input_size"][0])
    if len(settings["input_size"]) != 3 or channels not in (1, 3):
        raise ValueError(
            f"images: the model takes an input of {channels} channels and size {settings['input_size']}; pictures have"
            " 1 or 3 channels; give images as a tensor (N, C, H, W)"
        )
    mean, std = ((*settings[key], *settings[key], *settings[key])[:3] for key in ("mean", "std"))
    keys = ("interpolation", "crop_pct", "crop_mode")
    transform = create_transform(
        (3, *settings["input_size"][1:]), mean=mean, std=std, **{key: settings[key] for key in keys}
    )
    batch = torch.stack([transform(picture.convert("RGB")) for picture in pictures.values()])
    parameter = next(model.parameters())
    batch = batch.mean(1, keepdim=True) if channels == 1 else batch
    return Images(batch.to(parameter.device, parameter.dtype), tuple(pictures), source)
