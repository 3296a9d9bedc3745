"""The command line."""

import inspect
import io
import json
import re
from pathlib import Path

import pytest
import timm
from click.testing import Result
from rich.console import Console
from typer.testing import CliRunner

import timm_contconv as tcc
from contconv import app
from timm_contconv.cli import commands, demo

HUB = Path(__file__).parents[2] / "hub"


def contconv(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


# `run` passes the script's arguments on, and is called by hand
DECLARATIONS = [c.callback for c in app.registered_commands if c.callback.__name__ != "run"]


@pytest.mark.parametrize("declaration", DECLARATIONS, ids=lambda declaration: declaration.__name__)
def test_a_command_takes_what_its_declaration_gives(declaration):
    """They meet by name, which mypy does not check."""
    given = inspect.signature(declaration).parameters
    inspect.signature(getattr(commands, declaration.__name__)).bind(**dict.fromkeys(given))


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


@pytest.mark.parametrize("model", ["test_convnext_dcls_gauss", "test_convnext"])
def test_tune_prints_what_was_chosen_for_each_convolution(model):
    result = contconv("tune", model, "--batch-size", "2", "--input-size", "3", "64", "64", "--train")
    assert result.exit_code == 0
    assert ("patched with the recipe 'engine'" in result.output) == (model == "test_convnext")
    for text in ("training step, batch of 2", "output", "weight", "algorithm", "gain", "the whole model"):
        assert text in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tune", "no_such_model"), "timm has no such model"),
        (("tune", "resnet18"), "matches no convolution"),
        (("tune", "test_convnext", "--input-size", "1", "64", "64"), "expected 3 channels"),
        (("tune", "test_convnext", "--batch-size", "0"), "--batch-size"),
        (("show", "dcls_gaus"), "did you mean dcls_gauss"),
        (("patch", "no_such_model", "dcls"), "timm has no such model"),
        (("patch", "resnet18", "dcls"), "matches no convolution"),
        (("patch", "resnet18", "missing.toml"), "missing.toml"),
        (("patch", "resnet18", "genv", "--min-kernel-size", "-1"), "--min-kernel-size"),
        (("patch", "test_convnext.no_such_tag", "dcls", "--pretrained"), "MODEL='test_convnext.no_such_tag': "),
        (("patch", "flexnet3", "dcls", "--pretrained"), "MODEL='flexnet3': No pretrained weights"),
        (("show", "missing.toml"), "missing.toml"),
    ],
)
def test_mistakes_are_explained_without_a_traceback(arguments, message):
    result = contconv(*arguments)
    assert result.exit_code == 2
    assert message in result.output.replace("\n", " ")
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("name", "near"),
    [("convnext_atto_dcl", "convnext_atto_dcls"), ("resnet50_gen", "resnet50_genv"), ("dcls_triangl", "dcls_triangle")],
)
def test_show_suggests_models_and_recipes_of_similar_names(name, near):
    result = contconv("show", name)
    assert result.exit_code == 2
    assert f"NAME='{name}': no such recipe or registered model; did you mean {near}" in result.output


def test_show_suggests_nothing_where_nothing_is_similar():
    result = contconv("show", "zzzzzz")
    assert result.exit_code == 2
    assert "did you mean" not in result.output
    assert "contconv list lists all" in result.output


@pytest.mark.parametrize("size", [("4", "64", "64"), ("3", "0", "64"), ("3", "64", "-5")])
def test_an_impossible_input_size_is_refused_before_anything_is_written(size, tmp_path):
    result = contconv("patch", "test_convnext", "dcls", "--input-size", *size, "--save", str(tmp_path / "saved"))
    assert result.exit_code == 2
    assert result.output.strip() == (
        f"--input-size {' '.join(size)}: expected 3 channels, as test_convnext takes,"
        " and a height and a width of at least 1"
    )
    assert list(tmp_path.iterdir()) == []


def test_an_input_size_that_the_model_cannot_take_is_refused_before_anything_is_written(tmp_path):
    result = contconv(
        "patch", "test_convnext", "dcls", "--input-size", "3", "2", "2", "--save", str(tmp_path / "saved")
    )
    assert result.exit_code == 2
    assert result.output.strip().startswith("--input-size 3 2 2: the model can't take it: ")
    assert list(tmp_path.iterdir()) == []


def test_input_size_is_what_multiply_adds_are_counted_for(tmp_path):
    options = ("--input-size", "3", "32", "32", "--json", "--save", str(tmp_path / "saved"))
    result = contconv("patch", "test_convnext", "dcls", "--init", "random", *options)
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["input_size"] == [3, 32, 32]
    assert timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).stages[0].blocks[0].conv_dw.method


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_an_unknown_init_is_refused(more):
    result = contconv("patch", "test_convnext", "dcls", "--init", "zzz", *more)
    assert result.exit_code == 2
    for said in ("--init", "'fit'", "'random'"):
        assert said in result.output


def test_a_dry_run_prints_the_plan():
    arguments = ("patch", "resnet18", "genv5", "--select", "layer[12].0.*", "--select", "maxpool", "--dry-run")
    result = contconv(*arguments)
    assert result.exit_code == 0, result.output
    for said in ("layer1.0.conv1", "MaxPool2d", "genv: 6 layers", "envelope_size=9"):
        assert said in result.output
    plan = json.loads(contconv(*arguments, "--json").output)
    assert plan["rewired"] == ["maxpool", "layer1.0.conv1.stride", "layer1.0.downsample"]
    assert set(plan["replaced"]) > {"layer1.0.conv1", "layer1.0.downsample.0"}
    assert plan["refused"] == {}


def test_a_dry_run_names_what_can_not_be_replaced():
    plan = json.loads(contconv("patch", "test_convnext", "dcls", "--select", "all", "--dry-run", "--json").output)
    assert plan["refused"]["stem.0"].startswith("kernel_size=(17, 17) can't be centred on a (4, 4) kernel")
    assert "stages.0.blocks.0.conv_dw" in plan["replaced"]
    assert len(plan["groups"]) == 3


def test_a_dry_run_saves_nothing(tmp_path):
    result = contconv("patch", "test_convnext", "dcls", "--dry-run", "--save", str(tmp_path / "saved"))
    assert result.exit_code == 2
    assert "expected no --save with --dry-run" in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [("patch", "test_convnext", "dcls", "--init", "random", "--save"), ("demo", "--epochs", "1", "--output")],
)
def test_a_folder_that_cannot_be_written_is_named_with_its_option(arguments, tmp_path):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "saved"
    result = contconv(*arguments, str(folder))
    assert result.exit_code == 2
    assert " ".join(result.output.split()).startswith(f"{arguments[-1]} {folder}: can't be written: ")


def test_a_folder_that_holds_something_else_is_named_with_its_option(tmp_path):
    (tmp_path / "notes").touch()
    result = contconv("patch", "test_convnext", "dcls", "--init", "random", "--save", str(tmp_path))
    assert result.exit_code == 2
    assert " ".join(result.output.split()).startswith(f"--save {tmp_path}: holds something other than a saved model")
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


@pytest.mark.parametrize(("name", "content"), [("a.pth", b""), ("a.pth", b"abc"), ("a.safetensors", b"\xff" * 100)])
def test_publish_names_a_file_without_weights(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    folder, file = str(HUB / "convnext_tiny_dcls.zenodo_in1k"), str(tmp_path / name)
    result = contconv("publish", folder, "--file", file, "--repo-id", "me/x")
    assert result.exit_code == 2, result.output
    assert f"{file}: holds no weights of convnext_tiny_dcls" in " ".join(result.output.split())


@pytest.mark.slow
def test_demo_compares_tunes_saves_and_draws(tmp_path):
    text = io.StringIO()
    demo.run(Console(file=text, width=140), tmp_path, epochs=1, recipes=("genv",))
    assert re.search(r"genv +[│|] +\d+ +[│|] +100%", text.getvalue()), text.getvalue()
    assert (tmp_path / "tf_efficientnet_lite0_genv" / "model.safetensors").is_file()
    assert "</html>" in (tmp_path / "inspection.html").read_text(encoding="utf-8")


def test_inspect_writes_a_report_of_a_name_and_of_a_folder(tmp_path):
    saved = tcc.save_pretrained(timm.create_model("test_resnet_genv", num_classes=10), tmp_path / "model")
    report = tmp_path / "report.html"
    result = contconv("inspect", str(saved), "--start", "test_resnet", "-o", str(report))
    assert result.exit_code == 0, result.output
    assert f"{report}: 1." in result.output.replace("\n", "")
    text = report.read_text(encoding="utf-8")
    assert "Effective receptive field, before" in text
    assert "Effective receptive field, now" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("test_resnet",), "holds no layer of timm_contconv"),
        (("no_such_model",), "timm has no such model"),
        (("test_resnet_genv", "--images", "."), "holds no image file"),
        (("test_resnet_genv", "--images", "nowhere"), "no such folder"),
        (("test_resnet_genv", "-o", "nowhere/report.html"), "--output nowhere/report.html: can't be written"),
        (("test_resnet_genv", "-o", "."), "--output .: can't be written: it is a folder"),
        (("model",), "no model can be loaded from this folder"),
    ],
)
def test_inspect_explains_mistakes_and_writes_nothing(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    result = contconv("inspect", *arguments)
    assert result.exit_code == 2
    assert message in result.output.replace("\n", " ")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
