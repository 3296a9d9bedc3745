"""SmpTCN: the paper's sizes, the authors' checkpoints; it is causal, and reads sequences."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

import timm_contconv as tcc
from timm_contconv.models.smp_tcn import SmpTCN, checkpoint_filter_fn

from ..helpers import relative
from ..models_for_tests import output
from ..peers.smpnet import ReleasedSmpTCN, randomize_


# channels and classes of sMNIST and pMNIST, sCIFAR10, CharacterTrajectories, SpeechCommands (MFCC and raw)
@pytest.mark.parametrize(
    ("channels", "classes", "thousands"), [(1, 10, 371), (3, 10, 373), (3, 20, 374), (20, 10, 392)]
)
def test_parameter_counts_are_those_of_the_paper(channels, classes, thousands):
    model = SmpTCN(channels, classes, length=784, device="meta")
    assert round(sum(p.numel() for p in model.parameters()) / 1000) == thousands


@pytest.mark.parametrize("bias", [True, False])
def test_a_released_checkpoint_gives_the_released_output(bias, tmp_path):
    net = randomize_(ReleasedSmpTCN(2, 5, 32, width=6, blocks=3, count=7, bias=bias)).eval()
    torch.save(net.state_dict(), tmp_path / "tcn.pt")
    model = SmpTCN(2, 5, 32, channels=6, blocks=3, kernel_count=7).eval()
    model.load_state_dict(checkpoint_filter_fn(torch.load(tmp_path / "tcn.pt"), model))
    x = torch.randn(3, 2, 32)
    assert relative(output(model, x), output(net, x)) < 1e-4
    assert relative(output(tcc.merge(model), x), output(net, x)) < 1e-4


def test_a_checkpoint_for_another_length_is_refused():
    model = SmpTCN(2, 5, 64, channels=6, blocks=1, kernel_count=7)
    state = ReleasedSmpTCN(2, 5, 32, width=6, blocks=1, count=7).state_dict()
    with pytest.raises(ValueError, match="kernels have 32 pixels, the model's 64; create the model with length=32"):
        checkpoint_filter_fn(state, model)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_it_reads_digits_pixel_by_pixel():
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(labels)
    train, test = torch.randperm(len(y)).split([1437, 360])
    model = SmpTCN(1, 10, length=64, channels=16, blocks=2, initial_radius=0.1)
    optimizer = torch.optim.AdamW(tcc.param_groups(model, lr=0.01, weight_decay=0.01))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, epochs=4, steps_per_epoch=23)
    for _ in range(4):
        for index in train[torch.randperm(len(train))].split(64):
            loss = F.cross_entropy(model(x[index]), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            tcc.constrain_(model)
    with torch.no_grad():
        assert (model.eval()(x[test]).argmax(1) == y[test]).float().mean() > 0.85


def test_it_is_causal_in_every_block():
    model = SmpTCN(2, 3, length=16, channels=8).eval()
    x = torch.randn(2, 2, 16)
    other = x.clone()
    other[..., 10:] += 1
    y, y_other = model.forward_features(x), model.forward_features(other)
    torch.testing.assert_close(y[..., :10], y_other[..., :10])
    assert model(x).shape == (2, 3)
    assert not torch.allclose(model(x), model(other))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": -1}, "num_classes=-1: expected a positive int"),
        ({"length": 0}, "length=0: expected a positive int"),
        ({"channels": 0}, "channels=0: expected a positive int"),
        ({"blocks": 0}, "blocks=0: expected a positive int"),
        ({"kernel_count": 0}, "kernel_count=0: expected at least 1"),
    ],
)
def test_it_names_bad_arguments(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        SmpTCN(**{"in_channels": 1, "num_classes": 10, "length": 8, "channels": 4, **options})
