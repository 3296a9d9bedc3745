"""The command line."""

import subprocess
import sys

import pytest
from click.testing import Result
from typer.testing import CliRunner

from timm_contconv.cli import app


def contconv(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def test_the_module_runs_as_a_command():
    command = [sys.executable, "-m", "timm_contconv", "list"]
    assert "dcls_gauss" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_list_names_recipes_and_models():
    result = contconv("list")
    assert result.exit_code == 0
    assert "dcls_triangle" in result.output
    assert "convnext_tiny_dcls_gauss" in result.output


def test_show_prints_a_recipe_as_toml():
    result = contconv("show", "dcls_gauss")
    assert '[layer]\nmethod = "dcls"\nkernel_size = 23\ninterpolation = "gauss"' in result.output


def test_show_prints_what_a_model_changes():
    result = contconv("show", "convnext_tiny_dcls")
    assert "DclsConv2d 17×17 / 34" in result.output
    assert "4.97G" in result.output


def test_patch_prints_the_report():
    result = contconv("patch", "mobilenetv3_small_050", "dcls", "--select", "blocks.2.*.conv_dw")
    assert result.exit_code == 0
    assert "blocks.2.0.conv_dw" in result.output
    assert "DclsConv2d 17×17" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "dcls_gaus"), "did you mean dcls_gauss"),
        (("patch", "no_such_model", "dcls"), "timm has no such model"),
        (("patch", "resnet18", "dcls"), "matches no convolution"),
        (("patch", "resnet18", "missing.toml"), "missing.toml"),
    ],
)
def test_mistakes_are_explained_without_a_traceback(arguments, message):
    result = contconv(*arguments)
    assert result.exit_code == 2
    assert message in result.output.replace("\n", " ")
    assert "Traceback" not in result.output


def test_demo_runs_to_a_saved_model_and_a_picture(tmp_path):
    result = contconv("demo", "--epochs", "1", "--output", str(tmp_path / "demo_output"))
    assert result.exit_code == 0, result.output
    assert "test accuracy" in result.output
    assert (tmp_path / "demo_output" / "test_convnext_dcls_gauss" / "model.safetensors").is_file()
    assert (tmp_path / "demo_output" / "kernels.png").read_bytes().startswith(b"\x89PNG")
