"""Lightning's Trainer with the callback: bounds, the penalty and precision."""

import copy

import pytest
import torch
from torch.nn import functional as F

import timm_contconv as tcc

from ..models_for_tests import layers_of
from ..train.shared import dcls_model, geometry_ids

lightning = pytest.importorskip("lightning.pytorch")
pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
FACTOR = 1000.0


class Module(lightning.LightningModule):
    def __init__(self, model, penalty=0.0):
        super().__init__()
        self.model, self.penalty, self.norms = model, penalty, []

    def training_step(self, batch, _):
        images, labels = batch
        return F.cross_entropy(self.model(images), labels) + self.penalty * tcc.penalty(self.model)

    def configure_optimizers(self):
        return torch.optim.SGD(tcc.param_groups(self.model, 0.1, 0.05, apply_lr_scale=True))


def fitted(model, callbacks, *, penalty=0.0, **options):
    from torch.utils.data import DataLoader, TensorDataset

    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(8, 3, 32, 32, generator=generator), torch.arange(8))
    module = Module(copy.deepcopy(model), penalty)
    trainer = lightning.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=callbacks, **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, batch_size=4))
    return module


def callback(**options):
    from timm_contconv.integrations.lightning import ContinuousConvCallback

    return ContinuousConvCallback(**options)


def test_the_penalty_of_the_callback_is_that_of_the_loss():
    model, options = dcls_model(), {"accumulate_grad_batches": 2}
    by_callback = fitted(model, [callback(penalty_factor=FACTOR)], **options)
    in_loss = fitted(model, [callback()], penalty=FACTOR, **options)
    without = fitted(model, [callback()], **options)
    ours, expected, plain = (dict(m.named_parameters()) for m in (by_callback, in_loss, without))
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    moved = [name for name in ours if not torch.allclose(ours[name], plain[name], atol=1e-3)]
    assert moved
    assert all("position" in name for name in moved)


def test_geometry_stays_in_its_bounds_and_is_not_decayed():
    model = dcls_model()
    with torch.no_grad():
        for layer in layers_of(model):
            layer.geometry["position"].fill_(1000.0)
    module = fitted(model, [callback()], precision="bf16-mixed")
    assert all(layer.geometry["position"].abs().max() <= 8 for layer in layers_of(module))
    decayed = {id(p) for g in module.trainer.optimizers[0].param_groups if g["weight_decay"] for p in g["params"]}
    assert decayed
    assert not decayed & geometry_ids(module)
    assert len(tcc.report(module).rows) == len(tcc.report(module.model).rows)


def test_the_hooks_end_with_the_training_also_after_an_error():
    class Broken(Module):
        def training_step(self, batch, _):
            raise RuntimeError("broken")

    trainer = lightning.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[callback()],
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="broken"):
        trainer.fit(Broken(dcls_model()), torch.utils.data.DataLoader([(torch.zeros(3, 32, 32), 0)]))
    with tcc.training_hooks():
        pass
