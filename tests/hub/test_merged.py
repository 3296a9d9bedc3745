"""Merged models, saved and loaded; saved models in transformers."""

import json

import pytest
import timm
import torch

import timm_contconv as tcc

from ..helpers import slow_but
from ..models_for_tests import create, layers_of, output, scatter

METHODS = {"dcls": "test_convnext_dcls_gauss", "flex": "test_convnext_flex", "genv": "test_resnet_genv"}
METHODS |= {"cc": "test_resnet_cc", "smp": "test_convnext_smp"}


@pytest.mark.parametrize("method", slow_but(METHODS, "smp", "genv"))
def test_a_merged_model_is_saved_and_loaded(method, tmp_path):
    model, x = scatter(create(METHODS[method])).eval(), torch.randn(2, 3, 64, 64)
    merged = tcc.merge(model)
    tcc.save_pretrained(merged, tmp_path / "merged")
    for loaded in (
        tcc.from_pretrained(tmp_path / "merged").eval(),
        timm.create_model(f"local-dir:{tmp_path / 'merged'}", pretrained=True).eval(),
    ):
        assert layers_of(loaded) == []
        torch.testing.assert_close(output(loaded, x), output(merged, x))
    assert output(tcc.from_pretrained(tmp_path / "merged", num_classes=3).eval(), x).shape == (2, 3)
    if method == "genv":  # its first convolution is merged
        with pytest.raises(ValueError, match="a merged model keeps the in_chans that it was saved with"):
            tcc.from_pretrained(tmp_path / "merged", in_chans=1)


def test_a_model_patched_by_hand_is_saved_merged(tmp_path):
    model = tcc.patch(create("resnet18"), "genv5", init="random").eval()
    merged, x = tcc.merge(model), torch.randn(1, 3, 64, 64)
    tcc.save_pretrained(merged, tmp_path / "merged")
    loaded = tcc.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(output(loaded, x), output(merged, x))
    tcc.save_pretrained(loaded, tmp_path / "again")
    torch.testing.assert_close(output(tcc.from_pretrained(tmp_path / "again").eval(), x), output(merged, x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.popitem(), "merged: describes .*; expected the patch's layers"),
        (lambda table: next(iter(table.values()))[0].update(kernel_size=[9999, 1]), "kernel_size"),
        (lambda table: next(iter(table.values()))[0].update(code="x"), "code is not a field"),
        (lambda table: next(iter(table.values()))[0].update(kernel_size=[25, 25]), "do not fit"),
    ],
)
def test_a_damaged_description_is_refused(change, message, tmp_path):
    tcc.save_pretrained(tcc.merge(create("test_convnext_dcls")), tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    change(config["model_args"]["merged"])
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        tcc.from_pretrained(tmp_path / "m")


def test_timms_own_way_to_save_a_merged_model_is_told_at_loading(tmp_path):
    timm.models.save_for_hf(tcc.merge(create("test_resnet_genv")), tmp_path, safe_serialization=True)
    with pytest.raises(ValueError, match=r"do not fit: .*; if the model was merged .*tcc.save_pretrained"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


@pytest.mark.parametrize(
    ("name", "kernel_sizes"), [("test_convnext_dcls_gauss", 23), ("test_convnext_smp", (31, 29, 27, 13))]
)
def test_a_merged_convnext_is_a_convnext_with_large_kernels(name, kernel_sizes):
    """Nothing of this package is needed to load its weights."""
    merged, x = tcc.merge(scatter(create(name))), torch.randn(1, 3, 64, 64)
    plain = timm.create_model("test_convnext", num_classes=10, kernel_sizes=kernel_sizes).eval()
    plain.load_state_dict(merged.state_dict())
    torch.testing.assert_close(output(plain, x), output(merged, x))


def test_an_unpatched_model_is_its_plain_architecture():
    """Without a large kernel nothing of this package is needed to load the weights."""
    x = torch.randn(1, 3, 64, 64)
    model = tcc.patch(create("test_resnet"), "cc").eval()
    expected = output(model, x)
    plain = timm.create_model("test_resnet", num_classes=10).eval()
    plain.load_state_dict(tcc.unpatch(model).state_dict())
    torch.testing.assert_close(output(plain, x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["test_convnext_dcls_gauss", "merged", "by hand"])
def test_saved_models_load_in_transformers(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = create("test_convnext_dcls_gauss" if name == "merged" else "test_convnext" if name == "by hand" else name)
    if name == "by hand":
        tcc.patch(model, "smp", kernel_size=9, init="random")
    model = tcc.merge(model) if name == "merged" else model
    tcc.save_pretrained(model.eval(), tmp_path / "model")
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "model").eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixel_values=x).logits, output(model, x))
