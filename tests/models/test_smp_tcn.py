"""SmpTCN: it is causal, and reads sequences."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

import timm_contconv as tcc
from timm_contconv.models.smp_tcn import SmpTCN


@pytest.mark.usefixtures("one_thread")
def test_it_reads_digits_pixel_by_pixel():
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(labels)
    train, test = torch.randperm(len(y)).split([1437, 360])
    model = SmpTCN(1, 10, length=64, channels=16, initial_radius=0.1)
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
