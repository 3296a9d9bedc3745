"""Loading saved models: what the caller may change, and what is wrong with a folder."""

import re
import shutil
import warnings
from pathlib import Path

import pytest
import safetensors
import timm
import torch
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import timm_contconv as tcc
from timm_contconv.hub.build import check_folder

from .helpers import LOADERS, change_config, small

NEEDS_COMPLEX = pytest.mark.skipif(
    Version(safetensors.__version__) < Version("0.7"), reason="safetensors before 0.7 can't save complex numbers"
)


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory):
    return tcc.save_pretrained(small(), tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def saved(saved_once, tmp_path):
    return Path(shutil.copytree(saved_once, tmp_path / "model"))


def change_tensor(folder, key, change):
    tensors = load_file(folder / "model.safetensors")
    tensors[key] = change(tensors[key])
    save_file(tensors, folder / "model.safetensors")


def test_other_classes_and_channels(saved):
    arguments = {"num_classes": 5, "in_chans": 1}
    for model in (
        tcc.from_pretrained(saved, **arguments),
        timm.create_model(f"local-dir:{saved}", pretrained=True, **arguments),
    ):
        assert model(torch.randn(1, 1, 64, 64)).shape == (1, 5)


class WritesWithoutMemory(TorchDispatchMode):
    """Operators that write to a tensor of the meta device."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.is_mutable and args[0].is_meta:
            self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


def test_the_trial_without_memory_initialises_nothing(saved):
    with WritesWithoutMemory() as writes:
        check_folder(saved)
    assert writes.seen == []


def test_features_of_a_saved_model_are_those_of_the_model(saved, x):
    features = timm.create_model(f"local-dir:{saved}", pretrained=True, features_only=True).eval()(x)
    expected = tcc.from_pretrained(saved).eval().forward_intermediates(x, intermediates_only=True)
    for ours, theirs in zip(features[1:], expected[1:], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"foo": 1}, "^foo=1: timm can't build"),
        ({"in_chans": -1, "num_classes": 3}, "^in_chans=-1, num_classes=3: timm can't build"),
        ({"num_classes": "3"}, "^num_classes='3': expected an int of at least 0"),
        ({"num_classes": -1}, "^num_classes=-1: expected an int of at least 0"),
        ({"pretrained": False}, "^pretrained=False: not an argument of from_pretrained"),
    ],
)
def test_an_argument_that_does_not_fit_is_named(saved, arguments, message):
    with pytest.raises(ValueError, match=message):
        tcc.from_pretrained(saved, **arguments)


def test_a_configuration_that_does_not_fit_is_named_whatever_the_arguments(saved):
    change_config(saved, lambda config: config["model_args"]["base_args"].__setitem__("foo", 1))
    with pytest.raises(ValueError, match=r"config\.json: timm can't build"):
        tcc.from_pretrained(saved, num_classes=3)


def test_missing_files_are_named(saved):
    (saved / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        tcc.from_pretrained(saved)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        tcc.from_pretrained(saved / "nothing" / "here")


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("keep", [0.5, 0.99])
def test_weights_that_are_cut_short_are_refused(saved, keep, load):
    data = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(data[: int(keep * len(data))])
    with pytest.raises(ValueError, match="damaged or cut short"):
        LOADERS[load](saved)


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[:-1].contiguous(), "fc.weight is (2, 96), and (3, 96) where timm rebuilds"),
        (lambda t: t.long(), "fc.weight is of dtype I64, and torch.float32"),
        (lambda t: t.bool(), "fc.weight is of dtype BOOL, and torch.float32"),
        pytest.param(
            lambda t: t.to(torch.complex64), "fc.weight is of dtype C64, and torch.float32", marks=NEEDS_COMPLEX
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(saved, load, change, message):
    change_tensor(saved, "fc.weight", change)
    with pytest.raises(ValueError, match=re.escape(message)):
        LOADERS[load](saved)


def test_names_that_do_not_fit_are_named(saved):
    tensors = load_file(saved / "model.safetensors")
    tensors["surplus"] = tensors.pop("fc.weight")
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(ValueError, match=r"surplus is \(3, 96\), and missing .*; fc\.weight is missing, and"):
        tcc.from_pretrained(saved)


@pytest.mark.parametrize("load", LOADERS)
def test_weights_that_are_not_finite_are_told_once(saved, load):
    change_tensor(saved, "fc.bias", lambda t: t.index_fill(0, torch.tensor(1), float("nan")))
    change_tensor(saved, "bn1.running_var", lambda t: t.fill_(float("inf")))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        LOADERS[load](saved)
    (message,) = [str(w.message) for w in caught if "NaN or infinity" in str(w.message)]
    assert message.endswith("NaN or infinity in bn1.running_var, fc.bias")
