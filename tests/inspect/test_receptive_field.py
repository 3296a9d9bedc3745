"""The effective receptive field, against differences in float64, and the squares that hold parts of it."""

import pytest
import torch
from torch import nn

from timm_contconv.inspect.receptive_field import ReceptiveField, effective_receptive_field, last_feature_map
from timm_contconv.layers import DclsConv2d


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.GELU(),
        DclsConv2d(4, 4, 7, padding=3, groups=4, kernel_count=4),
        nn.Conv2d(4, 3, 3, 2, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ).double()


def centre(model: nn.Sequential, image: torch.Tensor) -> torch.Tensor:
    """The sum of the positive values at the centre of the last feature map, (6, 6) for an image of 11 pixels."""
    return model[:4](image)[:, :, 3, 3].relu().sum()


@torch.no_grad()
def test_it_is_the_change_of_the_centre_with_every_pixel():
    model = small().eval()
    images = torch.randn(3, 2, 11, 11, dtype=torch.float64)
    expected = torch.zeros(11, 11, dtype=torch.float64)
    step = 1e-6
    for image in images.unsqueeze(1):
        slopes = torch.zeros(2, 11, 11, dtype=torch.float64)
        for index in range(slopes.numel()):
            shift = torch.zeros(slopes.numel(), dtype=torch.float64)
            shift[index] = step
            shift = shift.view_as(image)
            slopes.view(-1)[index] = (centre(model, image + shift) - centre(model, image - shift)) / (2 * step)
        expected += slopes.relu().sum(0)
    found = effective_receptive_field(model, images)
    torch.testing.assert_close(found.contributions, expected / expected.sum(), atol=1e-8, rtol=1e-6)
    assert found.images == 3


def test_the_last_feature_map_is_the_last_one_with_pixels():
    model = small()
    assert last_feature_map(model, torch.randn(1, 2, 11, 11, dtype=torch.float64)) is model[3]


@pytest.mark.parametrize(("share", "side"), [(0.2, 5), (0.5, 7), (0.99, 9)])
def test_squares_of_even_contributions_have_the_smallest_odd_side(share, side):
    field = ReceptiveField(torch.full((9, 9), 1 / 81, dtype=torch.float64), 1)
    assert field.square(share) == side
    assert (side - 2) ** 2 / 81 < share <= side**2 / 81
    assert field.area(share) == pytest.approx(side**2 / 81)


def test_a_model_without_feature_maps_is_named():
    with pytest.raises(ValueError, match="Sequential computes no feature map"):
        effective_receptive_field(nn.Sequential(nn.Flatten(), nn.Linear(4, 4)), torch.randn(1, 1, 2, 2))
