"""tcc.inspect: what a report says, and what it refuses."""

import copy
import io
import json
import re

import pytest
import timm
import torch
from PIL import Image
from torch import nn

import timm_contconv as tcc
from tests.models_for_tests import Snapshot, create
from timm_contconv.inspect import Inspection, figures, shown
from timm_contconv.layers import FlexConv1d


@pytest.fixture(scope="module")
def moved():
    """A model patched by hand, its positions a pixel away from where the fit put them; the model before; the report."""
    model = create("test_convnext")
    start = copy.deepcopy(model)
    tcc.patch(model, "dcls_gauss", kernel_size=11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("position"):
                parameter[0] += 1
    before = Snapshot(model)
    report = tcc.inspect(model, torch.randn(2, 3, 64, 64), start=start)
    assert before.differences() == []
    return model, start, report


def test_the_name_leads_to_the_verb_and_to_the_figures():
    assert tcc.inspect.figures is figures
    import timm_contconv.inspect.figures as same

    assert same is figures


def test_numbers_are_those_of_the_report(moved):
    model, _, report = moved
    expected = tcc.report(model, (3, 64, 64))
    numbers = json.loads(json.dumps(report.to_dict()))
    assert [row["name"] for row in numbers["layers"]] == [row.name for row in expected.rows]
    assert numbers["parameters_after"] == expected.parameters_after
    assert numbers["multiply_adds_after"] == expected.multiply_adds_after
    timed = [row for row in numbers["layers"] if row["seconds"] is not None]
    assert len(timed) == 9
    assert 0 < sum(row["share"] for row in timed) < 1
    assert sum(row["seconds"] for row in timed) < numbers["seconds"]
    assert set(numbers["receptive_field"]) == {"start", "now"}


def test_movements_are_those_since_the_patch(moved):
    model, _, _ = moved
    rows = figures.movements(model, "distance of elements from the centre").to_dict()["data"]["values"]
    assert [row["q50"] for row in rows] == pytest.approx([1.0] * 9)


def test_kernels_start_from_those_of_the_model_before(moved):
    model, start, report = moved
    given = shown.shown_layers(model, start)
    for layer, same in zip(report.layers, given, strict=True):
        expected = start.get_submodule(layer.name).weight.detach()[:, 0]
        torch.testing.assert_close(same.start.kernels, expected)
        recorded = next(found for found in shown.shown_layers(model) if found.name == layer.name)
        torch.testing.assert_close(recorded.start.kernels, expected)


def test_the_page_is_one_file(moved, tmp_path):
    _, _, report = moved
    path = report.save(tmp_path / "report.html")
    text = path.read_text(encoding="utf-8")
    assert path.stat().st_size < 3e6
    ours = re.sub(r"<script type=\"module\">.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"(src|href)=\"(?!#|data:)", ours)
    for heading in ("Layers", "Kernels", "Geometry by depth", "Effective receptive field", "Class activation"):
        assert f">{heading}</h2>" in text
    assert "<iframe" in report._repr_html_()
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_a_networks_own_layers_need_no_patch():
    report = tcc.inspect(timm.create_model("ccnet", dims=8), torch.randn(1, 3, 32, 32))
    assert isinstance(report, Inspection)
    assert report.parameters_before is None
    assert {row.after for row in report.rows} == {"ContinuousConv2d 3×3"}
    assert "can't be merged" in report.left_out["multiply-adds"]
    assert "scale=" in report.left_out["multiply-adds"]


def test_sequences_have_no_photographs_and_say_so():
    report = tcc.inspect(nn.Sequential(FlexConv1d(1, 4, 16)))
    assert "left out" in report.left_out["images"]
    assert report.to_html()


def test_a_model_without_layers_is_refused():
    with pytest.raises(ValueError, match="this ResNet holds no layer of timm_contconv"):
        tcc.inspect(timm.create_model("test_resnet"))
    with torch.device("meta"):
        model = timm.create_model("test_resnet_genv")
    with pytest.raises(ValueError, match="meta device"):
        tcc.inspect(model)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no image file"),
        ({"notes.txt": b"no image"}, "holds no image file"),
        ({"a.png": b"\x89PNG broken"}, r"a\.png can't be read as an image"),
    ],
)
def test_folders_without_good_images_are_refused(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        tcc.inspect(create("test_resnet_genv"), tmp_path)


def test_truncated_images_are_refused(tmp_path):
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(file, "PNG")
    (tmp_path / "half.png").write_bytes(file.getvalue()[: len(file.getvalue()) // 2])
    with pytest.raises(ValueError, match=r"half\.png can't be read as an image"):
        tcc.inspect(create("test_resnet_genv"), tmp_path)


def test_nothing_is_left_of_a_report_that_can_not_be_written(moved, tmp_path):
    _, _, report = moved
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        report.save(tmp_path / "nowhere" / "report.html")
    with pytest.raises(IsADirectoryError):
        report.save(tmp_path)
    assert list(tmp_path.iterdir()) == []
