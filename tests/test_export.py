"""tcc.export: files that run without this package and give the model's output; what can't be written is refused."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import timm_contconv as tcc
from timm_contconv.export import load_exported

from .helpers import LAYERS, spread_

SIZE = (3, 16, 16)
SIDES = ("batch", "height", "width")


class Net(nn.Module):
    """A layer of each method, side by side; the output of each."""

    def __init__(self, *methods):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.layers = nn.ModuleDict({method: spread_(LAYERS[method]()) for method in methods})

    def forward(self, x):
        x = self.stem(x)
        return [layer(x).mean((2, 3)) for layer in self.layers.values()]


def close(found, model, images):
    with torch.no_grad():
        torch.testing.assert_close(found, model.eval()(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("merge", "methods", "dynamic"),
    [
        pytest.param(True, ("dcls", "smp", "flex", "genv", "cc"), SIDES, marks=pytest.mark.slow),
        (False, ("dcls", "smp", "flex", "genv"), SIDES),
        pytest.param(False, ("cc",), ("batch",), marks=pytest.mark.slow),
    ],
    ids=["merged", "patched", "patched by CC"],
)
def test_onnx_runtime_gives_the_models_output_at_three_sizes(merge, methods, dynamic, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    net, path = Net(*methods), tmp_path / "net.onnx"
    exported = tcc.export(net, path, dynamic=dynamic, merge=merge, input_size=SIZE)
    assert exported.bytes == path.stat().st_size
    assert [check.shape[0] for check in exported.checks] == [2, 3]
    run = load_exported(path, "onnx")
    for shape in ((1, *SIZE), (4, *SIZE), (1, 3, 24, 32) if "height" in dynamic else (3, *SIZE)):
        images = torch.randn(shape)
        close(run(images), net, images)


@pytest.mark.slow
def test_a_torch_file_runs_without_this_package(tmp_path):
    net, images = Net("dcls", "smp", "flex", "genv", "cc"), torch.randn(3, *SIZE)
    tcc.export(net, tmp_path / "net.pt2", "torch", merge=False, input_size=SIZE)
    torch.save(images, tmp_path / "images.pt")
    code = """
import sys, torch
program = torch.export.load("net.pt2").module()
torch.save(program(torch.load("images.pt")), "output.pt")
assert "timm_contconv" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    close(torch.load(tmp_path / "output.pt"), net, images)


@pytest.mark.slow  # compiles C++
def test_a_compiled_file_gives_the_models_output(tmp_path):
    net, images = Net("dcls"), torch.randn(3, *SIZE)
    exported = tcc.export(net, tmp_path / "net.pt2", "aoti", input_size=SIZE)
    assert exported.seconds > 0
    close(load_exported(tmp_path / "net.pt2", "aoti")(images), net, images)


@pytest.mark.parametrize(
    ("path", "arguments", "error", "message"),
    [
        ("net.pt", {}, ValueError, r"path='net.pt': expected a name that ends in .pt2"),
        ("no/net.pt2", {}, FileNotFoundError, "there is no folder 'no'; make it first"),
        ("folder.pt2", {}, IsADirectoryError, "is a folder; expected a file in it"),
        ("net.pt2", {"format": "tflite"}, ValueError, "format='tflite': expected one of onnx, torch, aoti"),
        ("net.pt2", {"dynamic": "batch"}, ValueError, "dynamic='batch': expected some of batch, height, width"),
        ("net.pt2", {"dynamic": ("depth",)}, ValueError, "expected some of batch, height, width"),
        ("net.pt2", {"input_size": (3, 16)}, ValueError, r"input_size=\(3, 16\): expected \(channels, height, width\)"),
        ("net.pt2", {"input_size": None}, ValueError, "input_size=None: expected"),
    ],
)
def test_bad_arguments_are_refused_and_nothing_is_written(path, arguments, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(error, match=message):
        tcc.export(Net("dcls"), path, **{"format": "torch", "input_size": SIZE, **arguments})
    assert [p.name for p in tmp_path.iterdir()] == ["folder.pt2"]


class Fixed(nn.Sequential):
    """It takes one size of images."""

    def __init__(self):
        super().__init__(LAYERS["dcls"](), nn.Flatten(), nn.Linear(8 * 16 * 16, 2))


def test_sizes_that_a_method_or_a_model_fixes_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"layers.cc is a CC layer, whose kernels .*: use merge=True"):
        tcc.export(Net("cc"), tmp_path / "net.pt2", "torch", dynamic=SIDES, merge=False, input_size=SIZE)
    with pytest.raises(ValueError, match=r"does not run for images of \(3, 8, 48, 80\); try fewer dynamic sizes"):
        tcc.export(Fixed(), tmp_path / "net.pt2", "torch", dynamic=SIDES, input_size=(8, 16, 16))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs .*onnxruntime, which is not installed: pip install"):
        tcc.export(Net("dcls"), tmp_path / "net.onnx", input_size=SIZE)


def test_scripting_is_refused_in_a_sentence():
    with pytest.raises(NotImplementedError, match=r"torch.jit.script can't compile .* script tcc.merge\(model\)"):
        torch.jit.script(Net("dcls"))
    traced = torch.jit.trace(Net("dcls", "genv").train(), torch.randn(2, *SIZE))
    assert all(y.requires_grad for y in traced(torch.randn(2, *SIZE)))
