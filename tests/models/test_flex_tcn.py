"""FlexTCN: the paper's sizes; it is causal, and reads sequences."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import timm_contconv as tcc
from timm_contconv.layers.flex import FlexConv1d
from timm_contconv.models.flex_tcn import FlexTCN


# Table 2: 105 k, 239 k and 373 k for one channel in and ten classes
@pytest.mark.parametrize(("blocks", "thousands"), [(2, 105), (4, 239), (6, 373)])
def test_parameter_counts_are_those_of_the_paper(blocks, thousands):
    model = FlexTCN(1, 10, length=64, blocks=blocks, device="meta")
    assert sum(p.numel() for p in model.parameters()) // 1000 == thousands


@pytest.mark.usefixtures("one_thread")
def test_tcn_reads_digits_pixel_by_pixel():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(labels)
    train, test = torch.randperm(len(y)).split([1437, 360])
    model = FlexTCN(1, 10, length=64, channels=16, dropout=0.0, flex_args={"initial_sigma": 0.5})
    optimizer = torch.optim.Adam(tcc.param_groups(model, lr=0.01, weight_decay=0.0))
    for group in optimizer.param_groups:
        group["lr"] *= group["lr_scale"]
    for _ in range(4):
        for index in train[torch.randperm(len(train))].split(64):
            loss = F.cross_entropy(model(x[index]), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            tcc.constrain_(model)
    with torch.no_grad():
        assert (model.eval()(x[test]).argmax(1) == y[test]).float().mean() > 0.85


@pytest.mark.parametrize("flex_args", [{}, {"mask": False}])
def test_tcn_is_causal_in_every_block_and_can_do_without_masks(flex_args):
    model = FlexTCN(2, 3, length=16, channels=8, flex_args=flex_args).eval()
    x = torch.randn(2, 2, 16)
    other = x.clone()
    other[..., 10:] += 1
    y, y_other = model.forward_features(x), model.forward_features(other)
    torch.testing.assert_close(y[..., :10], y_other[..., :10], atol=1e-4, rtol=1e-4)
    assert model(x).shape == (2, 3)
    assert not torch.allclose(model(x), model(other))


def test_tcn_runs_at_another_sampling_rate():
    model = FlexTCN(1, 4, length=33).eval()
    tcc.at_resolution(model, 32, 64)
    assert {m.kernel_size for m in model.modules() if isinstance(m, FlexConv1d)} == {(65,)}
    assert model(torch.randn(1, 1, 65)).shape == (1, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": 0}, "in_channels=0: expected a positive int"),
        ({"length": 8.0}, "length=8.0: expected a positive int"),
        ({"channels": 0}, "channels=0: expected a positive int"),
        ({"blocks": True}, "blocks=True: expected a positive int"),
        ({"dropout": float("nan")}, "dropout=nan: expected a probability, from 0 to 1"),
    ],
)
def test_tcn_names_bad_arguments(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        FlexTCN(**{"in_channels": 1, "num_classes": 10, "length": 8, **options})


def test_tcn_takes_the_ints_of_numpy():
    model = FlexTCN(np.int64(1), np.int64(3), length=np.int64(8), channels=np.int64(4), blocks=np.int64(2))
    assert model(torch.randn(2, 1, 8)).shape == (2, 3)
