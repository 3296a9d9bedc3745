"""Wrong arguments of the public verbs get an error that names the argument and the way out; nothing is changed."""

import pytest
import timm
import torch

import timm_contconv as tcc

from .models_for_tests import Snapshot


@pytest.fixture
def model():
    return tcc.patch(timm.create_model("test_resnet", num_classes=3), "genv", init="random")


VERBS = {
    "patch": lambda model: tcc.patch(model, "genv"),
    "merge": tcc.merge,
    "unpatch": tcc.unpatch,
    "report": tcc.report,
    "param_groups": lambda model: tcc.param_groups(model, lr=0.1, weight_decay=0.0),
    "penalty": tcc.penalty,
    "constrain_": tcc.constrain_,
    "save_pretrained": lambda model: tcc.save_pretrained(model, "folder"),
    "push_to_hub": lambda model: tcc.push_to_hub(model, "me/model"),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(("value", "shown"), [(None, "None"), ("resnet18", "'resnet18'"), ({"a": 1}, "a dict")])
def test_what_is_no_model_is_named(verb, value, shown):
    with pytest.raises(TypeError, match=f"^model={shown}: expected a module, as timm.create_model returns one"):
        VERBS[verb](value)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: tcc.report(m, 224), ValueError, r"input_size=224: expected \(channels, \*size\)"),
        (lambda m: tcc.report(m, "3,32,32"), ValueError, r"input_size='3,32,32': expected"),
        (lambda m: tcc.report(m, (3, 32.5, 32)), ValueError, r"input_size\[1\]=32.5: expected a positive int"),
        (lambda m: tcc.report(m, (1, 32, 32)), ValueError, r"input_size=\(1, 32, 32\): the model can't take it: .*try"),
        (lambda m: tcc.save_pretrained(m, None), TypeError, "folder=None: expected a path"),
        (lambda m: tcc.from_pretrained(3), TypeError, "id_or_folder=3: expected a path"),
        (lambda m: tcc.from_pretrained("resnet18_cc"), FileNotFoundError, r"timm.create_model\('resnet18_cc'\) builds"),
        (lambda m: tcc.from_pretrained(__file__), FileNotFoundError, "is a file; give its folder, '.*tests'"),
        (lambda m: tcc.load_patch(3), TypeError, "name_or_path=3: expected a recipe's name"),
        (lambda m: tcc.push_to_hub(m, None), TypeError, "repo_id=None: expected a text"),
        (
            lambda m: timm.create_model("test_resnet_genv", patch_args="envelope_size=9"),
            TypeError, "patch_args='envelope_size=9': expected a dict",
        ),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named_and_change_nothing(model, call, error, message):
    before = Snapshot(model)
    with pytest.raises(error, match=message):
        call(model)
    assert before.differences() == []


def test_a_compiled_model_is_not_saved_but_the_model_in_it(model, tmp_path):
    with pytest.raises(ValueError, match=r"a compiled ResNet: .*model\._orig_mod"):
        tcc.save_pretrained(torch.compile(model), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
