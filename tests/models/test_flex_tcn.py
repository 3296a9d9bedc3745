"""FlexTCN: the paper's sizes; it is causal, and reads sequences."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import timm_contconv as tcc
from timm_contconv.layers.flex import FlexConv1d
from timm_contconv.models.flex_tcn import FlexTCN, checkpoint_filter_fn

from ..helpers import relative
from ..models_for_tests import output
from ..peers.flexnet import ReleasedFlexTCN, randomize_


# Table 2: 105 k, 239 k and 373 k for one channel in and ten classes
@pytest.mark.parametrize(("blocks", "thousands"), [(2, 105), (4, 239), (6, 373)])
def test_parameter_counts_are_those_of_the_paper(blocks, thousands):
    model = FlexTCN(1, 10, length=64, blocks=blocks, device="meta")
    assert sum(p.numel() for p in model.parameters()) // 1000 == thousands


# Table 1 gives the sizes for three channels (sCIFAR10); 375 k for six blocks
@pytest.mark.parametrize(("blocks", "thousands"), [(2, 108), (4, 241), (6, 375)])
def test_parameter_counts_for_three_channels_are_those_of_table_1(blocks, thousands):
    model = FlexTCN(3, 10, length=64, blocks=blocks, device="meta")
    assert round(sum(p.numel() for p in model.parameters()) / 1000) == thousands


def test_a_released_checkpoint_gives_the_released_output(tmp_path):
    net = randomize_(ReleasedFlexTCN(2, 5, length=33, width=4, blocks=2)).eval()
    torch.save(net.state_dict(), tmp_path / "tcn.pt")
    model = FlexTCN(2, 5, length=33, channels=4, blocks=2).eval()
    model.load_state_dict(checkpoint_filter_fn(torch.load(tmp_path / "tcn.pt"), model))
    x = torch.randn(3, 2, 33)
    assert relative(output(model, x), output(net, x)) < 1e-4
    assert relative(output(tcc.merge(model), x), output(net, x)) < 1e-4
    with pytest.raises(ValueError, match="the model's 32; create the model with length=33"):
        checkpoint_filter_fn(net.state_dict(), FlexTCN(2, 5, length=32, channels=4, blocks=2))


@pytest.mark.slow
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
