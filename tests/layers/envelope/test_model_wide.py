"""All Gaussian envelopes of a model: their widths, and smaller filters."""

import pytest
import torch
from scipy import special
from torch import nn

from timm_contconv.layers.envelope import GaussianEnvelopeConv2d, shrink_envelopes, sigma_per_layer


def small(**settings) -> nn.Module:
    layers = [GaussianEnvelopeConv2d(3, 8, 3, 2, 1, **settings), nn.ReLU(), GaussianEnvelopeConv2d(8, 4, 1, **settings)]
    return nn.Sequential(*layers).eval()


def test_sigma_is_reported_by_layer() -> None:
    model = small()
    with torch.no_grad():
        model[0].raw_sigma.copy_(torch.tensor([-1.0, 0.0, 1.0]))
    expected = special.softplus([-1, 0, 1]) ** 0.5
    summary = sigma_per_layer(model)
    assert list(summary) == ["0", "2"]
    measures = {"min": expected.min(), "mean": expected.mean(), "max": expected.max(), "std": expected.std()}
    assert summary["0"] == pytest.approx(measures, rel=1e-6)


def test_shrinking_a_model_is_its_inference_size_and_for_evaluation_only() -> None:
    model, other, x = small(), small(inference_size=3), torch.randn(2, 3, 16, 16)
    other.load_state_dict(model.state_dict())
    full = model(x)
    torch.testing.assert_close(shrink_envelopes(model, 3)(x), other(x))
    assert torch.equal(model.train()(x), full)
    assert torch.equal(shrink_envelopes(model.eval(), 9)(x), full)


def test_shrinking_too_far_changes_nothing() -> None:
    model = nn.Sequential(small(), GaussianEnvelopeConv2d(4, 4, 3, envelope_size=5))
    with pytest.raises(ValueError, match="inference_size=7: expected an odd int from 3 to 5"):
        shrink_envelopes(model, 7)
    assert [model[0][0].spec, model[1].spec] == [small()[0].spec, GaussianEnvelopeConv2d(4, 4, 3, envelope_size=5).spec]


def test_a_model_without_envelopes_is_named() -> None:
    for function in (sigma_per_layer, lambda model: shrink_envelopes(model, 3)):
        with pytest.raises(ValueError, match="this ReLU holds no GaussianEnvelopeConv2d"):
            function(nn.ReLU())
