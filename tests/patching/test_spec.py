"""Recipes as files, dicts and objects."""

import re

import pytest
from torch import nn

import timm_contconv as tcc


@pytest.mark.parametrize("name", tcc.list_patches())
def test_recipes_survive_toml_and_dict(name, tmp_path):
    spec = tcc.load_patch(name)
    path = tmp_path / "recipe.toml"
    path.write_text(spec.to_toml())
    assert tcc.load_patch(path) == spec
    assert tcc.PatchSpec.from_dict(spec.to_dict()) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('select = ["all"]\n\n[layer]\nmethod = "dcls"\ninterpolation = "gauss"\nkernelsize = 3\n', "recipe.toml:6: "),
        ('select = ["all"]\n\n[layer]\nmethod = "dcls"\ninterpolation = "gauss"\n', "layer.kernel_size is missing"),
        ('select = ["all"]\nselct = 3\n[layer]\nmethod = "dcls"\n', "recipe.toml:2: selct is not a field"),
        ('select = ["all"]\n[layer]\nmethod = "dcls"\nkernel_size = 3\n[[by_stage]]\nkernel_size = 0\n', "stage 1: "),
        ('select = ["all"]\n[layer]\nmethod = "dcls"\nkernel_size = 3\n[[by_stage]]\nmethod = "smp"\n', "the same in"),
        ('select = ["all"\n', "recipe.toml: not a TOML file"),
    ],
)
def test_a_wrong_recipe_file_is_explained_with_its_line(text, message, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        tcc.load_patch(path)


def test_a_name_or_a_type_that_is_no_patch_is_refused():
    with pytest.raises(ValueError, match="patch='dcls_gaus': no such recipe; did you mean dcls_gauss"):
        tcc.load_patch("dcls_gaus")
    with pytest.raises(FileNotFoundError):
        tcc.load_patch("missing.toml")
    with pytest.raises(TypeError, match="patch=3: expected a recipe's name"):
        tcc.patch(nn.Identity(), 3)


def test_other_settings_hold_in_all_stages():
    spec = tcc.load_patch("smp").with_layer(kernel_size=9)
    assert {spec.layer_at(stage).kernel_size for stage in range(5)} == {9}
    recipe = tcc.load_patch("smp")
    assert recipe.with_layer(kernel_count=5).layer_at(3).kernel_size == recipe.by_stage[3]["kernel_size"]
    with pytest.raises(ValueError, match="layer.kernel_count=0: expected at least 1"):
        spec.with_layer(kernel_count=0)
