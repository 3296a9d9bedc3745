"""Lightning's Trainer with the callback: bounds, the penalty and precision."""

import pytest
import torch

import timm_contconv as tcc

from ..models_for_tests import layers_of
from ..train.shared import dcls_model, geometry_ids

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
FACTOR = 1000.0


@pytest.fixture
def run():
    pytest.importorskip("lightning.pytorch")
    from . import lightning_module

    return lightning_module


def callback(**options):
    from timm_contconv.integrations.lightning import ContinuousConvCallback

    return ContinuousConvCallback(**options)


def test_the_penalty_of_the_callback_is_that_of_the_loss(run):
    model, options = dcls_model(), {"accumulate_grad_batches": 2}
    by_callback = run.fitted(model, [callback(penalty_factor=FACTOR)], **options)
    in_loss = run.fitted(model, [callback()], penalty=FACTOR, **options)
    without = run.fitted(model, [callback()], **options)
    ours, expected, plain = (dict(m.named_parameters()) for m in (by_callback, in_loss, without))
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    moved = [name for name in ours if not torch.allclose(ours[name], plain[name], atol=1e-3)]
    assert moved
    assert all("position" in name for name in moved)


def test_geometry_stays_in_its_bounds_and_is_not_decayed(run):
    model = dcls_model()
    with torch.no_grad():
        for layer in layers_of(model):
            layer.geometry["position"].fill_(1000.0)
    module = run.fitted(model, [callback()], precision="bf16-mixed")
    assert all(layer.geometry["position"].abs().max() <= 8 for layer in layers_of(module))
    decayed = {id(p) for g in module.trainer.optimizers[0].param_groups if g["weight_decay"] for p in g["params"]}
    assert decayed
    assert not decayed & geometry_ids(module)
    assert len(tcc.report(module).rows) == len(tcc.report(module.model).rows)


def test_the_hooks_end_with_the_training_also_after_an_error(run):
    class Broken(run.Module):
        def training_step(self, batch, _):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        run.trainer([callback()]).fit(Broken(dcls_model()), torch.utils.data.DataLoader([(torch.zeros(3, 32, 32), 0)]))
    with tcc.training_hooks():
        pass
