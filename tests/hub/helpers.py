"""What the tests of saving, publishing and pulling build and compare."""

import json
import pickle

import timm
import torch

import timm_contconv as tcc

#: the two ways to load a folder
LOADERS = {
    "from_pretrained": tcc.from_pretrained,
    "create_model": lambda folder: timm.create_model(f"local-dir:{folder}", pretrained=True),
}
#: the two ways to load a repository
PULLERS = {
    "from_pretrained": tcc.from_pretrained,
    "create_model": lambda name: timm.create_model(f"hf-hub:{name}", pretrained=True),
}


def small(seed=0, num_classes=3) -> torch.nn.Module:
    """The quickest model to save: one layer patched by hand."""
    torch.manual_seed(seed)
    model = timm.create_model("test_resnet", num_classes=num_classes)
    return tcc.patch(model, "genv", select="layer4.0.downsample.*", init="random")


@torch.no_grad()
def assert_same_logits(model, other, x):
    assert torch.equal(model.eval()(x), other.eval()(x))


def change_config(folder, change):
    """Apply a function to a saved configuration."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")

    def dumps(self):
        return pickle.dumps(self)
