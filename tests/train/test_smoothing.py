"""CBS: a fixed sigma that decays with the steps of the optimiser."""

import pytest
import timm
import torch

import timm_contconv as tcc
from timm_contconv.train import decaying_sigma

from ..models_for_tests import layers_of
from .shared import loss_of


def smoothed(**options):
    model = timm.create_model("test_resnet", num_classes=10)
    return tcc.patch(model, "genv", init="random", **{"learn_sigma": False, "order": "after", **options})


def widths(model) -> set[float]:
    return {round(value, 4) for layer in layers_of(model) for value in layer.sigma.tolist()}


def test_the_width_decays_with_the_models_own_steps():
    model, other = smoothed(), torch.nn.Linear(2, 2)
    optimizer, stranger = torch.optim.SGD(model.parameters(), 0.1), torch.optim.SGD(other.parameters(), 0.1)
    with decaying_sigma(model, start=1.0, decay=0.5, every=2) as same:
        assert same is model
        seen = [widths(model)]
        for _ in range(4):
            loss_of(model).backward()
            optimizer.step()
            stranger.step()
            seen.append(widths(model))
    optimizer.step()
    assert seen == [{1.0}, {1.0}, {0.5}, {0.5}, {0.25}]
    assert widths(model) == {0.25}


def test_the_widths_of_layers_are_those_of_the_gaussian_that_smooths():
    model = smoothed()
    x = torch.randn(1, 3, 32, 32)
    with decaying_sigma(model, start=2.0):
        wide = model.eval()(x)
    fixed = smoothed(initial_sigma=2.0)
    fixed.load_state_dict(model.state_dict())
    torch.testing.assert_close(wide, fixed.eval()(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": 0}, "start=0: expected a finite number of more than 0"),
        ({"decay": 1.1}, "decay=1.1: expected more than 0 and at most 1"),
        ({"every": 0}, "every=0: expected an int of at least 1"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message), decaying_sigma(smoothed(), **arguments):
        pass


def test_a_model_without_fixed_envelopes_is_refused():
    with (
        pytest.raises(ValueError, match=r"conv1\.0.*: sigma is learned there"),
        decaying_sigma(smoothed(learn_sigma=True)),
    ):
        pass
    with pytest.raises(ValueError, match="holds no Gaussian envelope"), decaying_sigma(torch.nn.Linear(2, 2)):
        pass
