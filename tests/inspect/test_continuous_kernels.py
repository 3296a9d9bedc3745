"""Pictures of continuous kernels."""

from pathlib import Path

import pytest
import torch
from torch import nn

from timm_contconv.inspect.figures import continuous_kernel_figure, save_kernel_figure
from timm_contconv.layers import ContinuousConv2d


def test_figure_samples_the_continuous_kernel(tmp_path: Path) -> None:
    layer = ContinuousConv2d(2, 3, 4, 2)
    axes = continuous_kernel_figure(nn.Sequential(layer), channels=2, samples=40).axes
    assert len(axes) == 2
    picture = torch.from_numpy(axes[0].images[0].get_array().data)
    columns, rows = axes[0].lines[0].get_data()
    assert len(columns) == 4
    nearest = torch.tensor(rows[:1]).round().long(), torch.tensor(columns[:1]).round().long()
    assert picture.shape == (40, 40)
    kernel = layer.construct().detach()[0, 0]
    assert abs(float(picture[nearest].flatten()[0]) - float(kernel[0, 0])) < 0.1 * float(kernel.abs().max())
    saved = save_kernel_figure(nn.Sequential(layer), tmp_path / "kernels.png")
    assert saved.read_bytes().startswith(b"\x89PNG")


def test_a_model_without_cc_layers_is_named() -> None:
    with pytest.raises(ValueError, match="this Sequential holds no ContinuousConv2d"):
        continuous_kernel_figure(nn.Sequential(nn.Conv2d(1, 1, 1)))
