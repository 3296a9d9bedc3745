"""What layers show: kernels as they are, and elements where the kernels are."""

import pytest
import torch

from tests.helpers import KERNEL_LAYERS, every_layer, spread_
from timm_contconv.inspect.figures.kernels import outline_rows
from timm_contconv.layers import ContinuousConv2d, DclsConv2d, FlexConv2d, GaussianEnvelopeConv2d, SmpConv2d
from timm_contconv.layers.core.shown import one_per_output


def centre_of_mass(kernel: torch.Tensor) -> torch.Tensor:
    """(row, column) of a positive kernel (H, W), in pixels."""
    rows, columns = (torch.arange(n) for n in kernel.shape)
    return torch.stack([(kernel.sum(1) * rows).sum(), (kernel.sum(0) * columns).sum()]) / kernel.sum()


@pytest.mark.parametrize("make", KERNEL_LAYERS.values(), ids=KERNEL_LAYERS.keys())
def test_kernels_are_the_dense_ones(make):
    layer = spread_(make())
    shown = layer.shown_kernels()
    channels = range(layer.out_channels)
    expected = torch.stack([layer.weight[c, c % layer.weight.shape[1]] for c in channels])
    torch.testing.assert_close(shown.values, expected.detach())
    assert not shown.values.requires_grad


@every_layer
def test_elements_and_quantities_fit_the_kernels(make):
    layer = spread_(make())
    shown = layer.shown_kernels()
    assert len(shown.values) == layer.out_channels
    if shown.elements is not None:
        assert len(shown.elements.position) in (1, layer.out_channels)
        assert shown.elements.position.shape[-1] == shown.values.ndim - 1
    for quantity in layer.shown_quantities():
        assert quantity.values.ndim == 2
        assert not quantity.values.requires_grad


@pytest.mark.parametrize(
    "layer",
    [
        DclsConv2d(4, 4, (13, 15), groups=4, kernel_count=1),
        DclsConv2d(4, 4, (13, 15), groups=4, kernel_count=1, interpolation="triangle"),
        DclsConv2d(4, 4, (13, 15), groups=4, kernel_count=1, interpolation="bilinear"),
        DclsConv2d(4, 4, (13, 15), groups=4, kernel_count=1, interpolation="normalized_bilinear"),
        SmpConv2d(4, 4, (13, 15), groups=4, kernel_count=1, initial_radius=0.4),
    ],
    ids=["gauss", "triangle", "bilinear", "normalized_bilinear", "smp"],
)
def test_an_element_is_where_its_kernel_has_its_mass(layer):
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in layer.geometry.items():
            if name in ("position", "coordinate"):
                value.uniform_(*((-2, 2) if name == "position" else (-0.25, 0.25)))
    shown = layer.shown_kernels()
    for kernel, position in zip(shown.values, shown.elements.position, strict=True):
        torch.testing.assert_close(centre_of_mass(kernel.abs()), position[0], atol=0.06, rtol=0)


@pytest.mark.parametrize("interpolation", ["bilinear", "normalized_bilinear"])
def test_elements_without_widths_show_their_positions_alone(interpolation):
    layer = DclsConv2d(2, 2, 5, kernel_count=3, interpolation=interpolation)
    (quantity,) = layer.shown_quantities()
    assert quantity.values.shape == (2 * 2 * 3, 2)
    assert (layer.shown_kernels().elements.reach == 1).all()


def test_a_mask_is_where_a_constant_kernel_has_its_mass():
    layer = FlexConv2d(1, 1, 33, hidden_channels=4)
    with torch.no_grad():
        layer.kernel.output_weight.zero_()
        layer.kernel.output_bias.fill_(1.0)
        layer.geometry["mask_mean"].copy_(torch.tensor([0.25, -0.125]))
    layer.eval()
    elements = layer.shown_kernels().elements
    torch.testing.assert_close(centre_of_mass(layer.weight.detach()[0, 0]), elements.position[0, 0], atol=0.05, rtol=0)
    torch.testing.assert_close(elements.reach[0, 0], torch.tensor([2.0, 2.0]))  # σ 0.125 of half 33 pixels


def test_a_turned_masks_outline_is_turned_with_it():
    layer = FlexConv2d(1, 1, 33, hidden_channels=4, steerable=True)
    with torch.no_grad():
        layer.kernel.output_weight.zero_()
        layer.kernel.output_bias.fill_(1.0)
        layer.geometry["mask_sigma"].copy_(torch.tensor([0.2, 0.08]))
        layer.geometry["mask_angle"].fill_(0.6)
    kernel = layer.eval().weight.detach()[0, 0]
    rows, columns = torch.meshgrid(torch.arange(33.0) - 16, torch.arange(33.0) - 16, indexing="ij")
    covariance = torch.stack([torch.stack([(kernel * a * b).sum() for a in (rows, columns)]) for b in (rows, columns)])
    longest = torch.linalg.eigh(covariance).eigenvectors[:, -1]  # (row, column)
    outline = outline_rows(layer.shown_kernels().elements, 0)
    tip = max(outline, key=lambda p: (p["x"] - 16) ** 2 + (p["y"] - 16) ** 2)
    direction = torch.nn.functional.normalize(torch.tensor([tip["y"] - 16, tip["x"] - 16]), dim=0)
    assert abs(float(direction @ longest)) > 0.99


def test_an_envelopes_sigma_is_the_width_of_its_kernel():
    layer = GaussianEnvelopeConv2d(3, 3, 1, 2, groups=3, envelope_size=15, initial_sigma=1.5)
    shown = layer.shown_kernels()
    kernel = shown.values[1].abs() / shown.values[1].abs().sum()
    offsets = torch.arange(15) - 7
    assert (kernel.sum(1) * offsets**2).sum().sqrt().item() == pytest.approx(1.5, abs=0.02)
    torch.testing.assert_close(shown.elements.reach[1, 0], torch.tensor([1.5, 1.5]))


def test_a_continuous_kernel_is_finely_sampled_around_the_weights():
    layer = ContinuousConv2d(2, 3, 4, 2)
    shown, weight = layer.shown_kernels(), one_per_output(layer.construct().detach())
    samples = shown.elements.position[0].view(4, 4, 2)
    nearest = ((samples + 0.5) / shown.spacing - 0.5).round().long().clamp(0, shown.values.shape[1] - 1)
    drawn = shown.values[:, nearest[..., 0], nearest[..., 1]]
    assert (drawn - weight).abs().max() < 0.35 * weight.abs().max()
