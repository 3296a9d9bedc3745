"""contconv merge and contconv export."""

import timm
import torch
from click.testing import Result
from typer.testing import CliRunner

import timm_contconv as tcc
from contconv import app
from timm_contconv.export import load_exported

from ..models_for_tests import create, layers_of, output

SIZE = ("--input-size", "3", "32", "32")


def contconv(*arguments) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_saved_model_is_merged_and_exported(tmp_path):
    model, x = create("test_resnet_genv"), torch.randn(1, 3, 32, 32)
    tcc.save_pretrained(model, tmp_path / "model")
    result = contconv("merge", tmp_path / "model", "-o", tmp_path / "merged")
    assert result.exit_code == 0, result.output
    merged = timm.create_model(f"local-dir:{tmp_path / 'merged'}", pretrained=True).eval()
    assert layers_of(merged) == []
    torch.testing.assert_close(output(merged, x), output(model, x), atol=1e-5, rtol=1e-4)

    file = tmp_path / "model.pt2"
    result = contconv("export", f"local-dir:{tmp_path / 'model'}", "-o", file, "--format", "torch", *SIZE)
    assert result.exit_code == 0, result.output
    for said in ("torch, ", "equals the model at 2×3×32×32", "3×3×32×32", "ms an image", "before its patch"):
        assert said in result.output
    torch.testing.assert_close(load_exported(file, "torch")(x)[0], output(model, x), atol=1e-5, rtol=1e-4)


def test_what_can_not_be_written_is_refused_in_a_sentence(tmp_path):
    for arguments, said in (
        (("export", "test_convnext_dcls", "-o", tmp_path / "no" / "m.pt2", "--format", "torch"), "there is no folder"),
        (("export", "test_convnext_dcls", "-o", tmp_path / "m.pt2", "--dynamic", "depth"), "expected some of batch"),
        (("export", "no_such_model", "-o", tmp_path / "m.onnx"), "timm has no such model"),
        (("merge", "resnet18", "-o", tmp_path / "m"), "MODEL='resnet18': expected a folder"),
    ):
        result = contconv(*arguments)
        assert result.exit_code == 2
        assert said in result.output
    assert list(tmp_path.iterdir()) == []
