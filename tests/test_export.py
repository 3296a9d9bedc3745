"""tcc.export: files that run without this package and give the model's output; what can't be written is refused."""

import subprocess
import sys

import pytest
import timm
import torch
from torch import nn

import timm_contconv as tcc
from timm_contconv.export import load_exported

from .helpers import LAYERS, spread_

METHODS = ("dcls", "smp", "flex", "genv", "cc")
SIZE = (3, 16, 16)


class Net(nn.Module):
    def __init__(self, method="dcls"):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.layer = spread_(LAYERS[method]())

    def forward(self, x):
        return self.layer(self.stem(x)).mean((2, 3))


def close(found, model, images):
    with torch.no_grad():
        torch.testing.assert_close(found, model.eval()(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("merge", [True, False], ids=["merged", "patched"])
@pytest.mark.parametrize("method", METHODS)
def test_onnx_runtime_gives_the_models_output_at_three_sizes(method, merge, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    net, path = Net(method), tmp_path / "net.onnx"
    whole = ("batch",) if method == "cc" and not merge else ("batch", "height", "width")
    exported = tcc.export(net, path, dynamic=whole, merge=merge, input_size=SIZE)
    assert exported.bytes == path.stat().st_size
    assert len(exported.checks) == 2
    run = load_exported(path, "onnx")
    for shape in ((1, *SIZE), (4, *SIZE), (1, 3, 16, 16) if whole == ("batch",) else (1, 3, 24, 32)):
        images = torch.randn(shape)
        close(run(images)[0], net, images)


@pytest.mark.parametrize("method", METHODS)
def test_a_torch_file_runs_without_this_package(method, tmp_path):
    net, images = Net(method), torch.randn(3, *SIZE)
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


def test_a_compiled_file_gives_the_models_output(tmp_path):
    net, images = Net(), torch.randn(3, *SIZE)
    exported = tcc.export(net, tmp_path / "net.pt2", "aoti", input_size=SIZE)
    assert exported.seconds > 0
    close(load_exported(tmp_path / "net.pt2", "aoti")(images)[0], net, images)


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
        tcc.export(Net(), path, **{"format": "torch", "input_size": SIZE, **arguments})
    assert [p.name for p in tmp_path.iterdir()] == ["folder.pt2"]


def test_sizes_that_a_method_or_a_model_fixes_are_refused(tmp_path):
    sides = ("batch", "height", "width")
    with pytest.raises(
        ValueError, match="layer is a CC layer, whose kernels depend on the image's size: use merge=True"
    ):
        tcc.export(Net("cc"), tmp_path / "net.pt2", "torch", dynamic=sides, merge=False, input_size=SIZE)
    with pytest.raises(
        ValueError, match="torch.export can't export this VisionTransformer so; try fewer dynamic sizes"
    ):
        tcc.export(timm.create_model("test_vit"), tmp_path / "net.pt2", "torch", dynamic=sides)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises((ModuleNotFoundError, ValueError), match="onnx"):
        tcc.export(Net(), tmp_path / "net.onnx", input_size=SIZE)


def test_scripting_is_refused_in_a_sentence():
    with pytest.raises(NotImplementedError, match=r"torch.jit.script can't compile .* script tcc.merge\(model\)"):
        torch.jit.script(Net())
    traced = torch.jit.trace(Net().train(), torch.randn(2, *SIZE))
    assert traced(torch.randn(2, *SIZE)).requires_grad
