"""Configurations and weights by strangers: they run no code, read no other file, and make no large model.

Every one is loaded while the interpreter reports what is opened, executed and connected to (`sys.addaudithook`), and
while PyTorch reports what its allocator hands out.
"""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import timm

import timm_contconv as tcc

from ..helpers import slow_but
from .helpers import LOADERS, Bomb, change_config
from .server import running_hub, use_hub
from .watch import WATCH, load_watched


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model patched by hand, a named one, a paper's own, and one of timm's."""
    root = tmp_path_factory.mktemp("models")
    by_hand = tcc.patch(timm.create_model("test_convnext", num_classes=3), "dcls", kernel_size=9, init="random")
    tcc.save_pretrained(by_hand, root / "hand")
    tcc.save_pretrained(timm.create_model("test_resnet_genv", num_classes=3), root / "named")
    own = timm.create_model("smpconv_tiny", num_classes=2, depths=(1, 1, 1, 1), dims=(16, 32, 48, 64))
    tcc.save_pretrained(own, root / "own")
    plain = timm.create_model("test_vit", num_classes=3)
    timm.models.save_for_hf(plain, root / "timm", safe_serialization=True)
    return root


@pytest.fixture
def folder(folders, tmp_path):
    return lambda kind: Path(shutil.copytree(folders / kind, tmp_path / "stranger"))


def set_value(path, value):
    def change(config):
        *parents, last = path.split(".")
        for key in parents:
            config = config.setdefault(key, {})
        config[last] = value

    return change


def both(*changes):
    return lambda config: [change(config) for change in changes]


MILLION_CLASSES = both(set_value("num_classes", 10**6), set_value("pretrained_cfg.num_classes", 10**6))
MILLION_CHANNELS = both(
    set_value("model_args.base_args.in_chans", 10**6), set_value("pretrained_cfg.input_size", [10**4, 224, 224])
)


def deep(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


# which model, what is changed in its config.json, what the error says
HOSTILE = {
    "no architecture": ("hand", lambda c: c.pop("architecture"), "architecture=None"),
    "an unknown architecture": ("hand", set_value("architecture", "resnet9000"), "architecture='resnet9000'"),
    "an architecture that is a path": ("hand", set_value("architecture", "../../evil.py"), "architecture="),
    "an architecture that is a list": ("hand", set_value("architecture", ["os", "system"]), "architecture="),
    "arguments that are a list": ("hand", set_value("model_args", ["os.system"]), "model_args="),
    "a checkpoint path": ("hand", set_value("model_args.checkpoint_path", "/etc/passwd"), "checkpoint_path: not an"),
    "a checkpoint path inside": (
        "hand", set_value("model_args.base_args.checkpoint_path", "/etc/passwd"), "checkpoint_path: not an",
    ),
    "a pretrained configuration as an argument": (
        "hand", set_value("model_args.pretrained_cfg", {"file": "/etc/passwd"}), "pretrained_cfg: not an",
    ),
    "an overlay": ("hand", set_value("model_args.pretrained_cfg_overlay", {"url": "http://x"}), "overlay: not an"),
    "an overlay inside": (
        "hand", set_value("model_args.base_args.pretrained_cfg_overlay", {"file": "/etc/passwd"}), "overlay: not an",
    ),
    "weights inside": ("hand", set_value("model_args.base_args.pretrained", True), "pretrained: not an"),
    "a filter function": ("hand", set_value("model_args.pretrained_filter_fn", "os.system"), "filter_fn: not an"),
    "features only": ("named", set_value("model_args.features_only", True), "features_only: not an"),
    "a filter of arguments": ("named", set_value("model_args.kwargs_filter", ["num_classes"]), "kwargs_filter: not an"),
    "weights that need not fit": ("named", set_value("model_args.pretrained_strict", False), "strict: not an"),
    "the meta device": ("own", set_value("model_args.device", "meta"), "device: not an"),
    "a feature class": ("named", set_value("model_args.feature_cls", "os.system"), "feature_cls: not an"),
    "a pruned model": ("named", set_value("model_args.pruned", True), "pruned: not an"),
    "a cache folder": ("named", set_value("model_args.cache_dir", "/etc"), "cache_dir: not an"),
    "a model class": ("own", set_value("model_args.model_cls", "builtins.exec"), "model_cls: not an"),
    "a private name": ("hand", set_value("model_args.base_args.__class__", "x"), "__class__: not an"),
    "a name that is none": ("hand", set_value("model_args.base_args.a b(", "x"), "'a b(': not an"),
    "another device": ("hand", set_value("model_args.base_args.device", "cuda"), "device: not an"),
    "an object": (
        "hand", set_value("model_args.base_args.act_layer", {"__reduce__": ["os.system", "true"]}), "act_layer={",
    ),
    "an unknown base": ("hand", set_value("model_args.base", "evil"), "base='evil'"),
    "a base that is a list": ("hand", set_value("model_args.base", ["os"]), "base=['os']"),
    "a base that is itself": ("hand", set_value("model_args.base", "contconv"), "base='contconv'"),
    "base arguments that are a text": ("hand", set_value("model_args.base_args", "/etc/passwd"), "expected an object"),
    "a patch that is a path": ("hand", set_value("model_args.patch", "/etc/passwd"), "patch"),
    "a patch that is a recipe's name": ("hand", set_value("model_args.patch", "dcls"), "patch"),
    "an unknown method": ("hand", set_value("model_args.patch.layer.method", "os.system"), "expected one of"),
    "a field of code": ("hand", set_value("model_args.patch.layer.code", "import os"), "layer.code is not a field"),
    "a huge kernel": ("hand", set_value("model_args.patch.layer.kernel_size", 10**6), "kernel_size=1000000"),
    "a huge count": ("hand", set_value("model_args.patch.layer.kernel_count", 10**9), "kernel_count=1000000000"),
    "as many elements as are allowed": (
        "hand", set_value("model_args.patch.layer.kernel_count", 4096), "do not fit",
    ),
    "a method's other settings": ("hand", set_value("model_args.patch.layer.envelope_size", 9), "is not a field"),
    "too many selectors": ("hand", set_value("model_args.patch.select", ["a"] * 10**5), "select"),
    "a long selector": ("hand", set_value("model_args.patch.select", ["*a" * 10**5]), "select"),
    "a selector that is slow to match": ("hand", set_value("model_args.patch.select", ["*a" * 400 + "b"]), "no conv"),
    "as many selectors as are allowed": (
        "hand", set_value("model_args.patch.select", [f"*{i}*x" for i in range(10_000)]), "no conv",
    ),
    "a selector of the wrong kind": ("hand", set_value("model_args.patch.select", [{"x": 1}]), "select"),
    "a million stages": ("hand", set_value("model_args.patch.by_stage", [{}] * 10**5), "by_stage"),
    "a huge envelope for a named model": (
        "named", set_value("model_args.patch_args", {"envelope_size": 10**9}), "envelope_size=1000000000",
    ),
    "patch arguments that are none": ("named", set_value("model_args.patch_args", "os.system"), "expected an object"),
    "another method for a named model": (
        "named", set_value("model_args.patch_args", {"method": "evil"}), "expected one of",
    ),
    "a file": ("hand", set_value("pretrained_cfg.file", "/etc/passwd"), "file='/etc/passwd'"),
    "a URL": ("hand", set_value("pretrained_cfg.url", "http://127.0.0.1:9/x.pth"), "url="),
    "another repository": ("hand", set_value("pretrained_cfg.hf_hub_id", "evil/model"), "hf_hub_id="),
    "a file name that climbs": ("hand", set_value("pretrained_cfg.hf_hub_filename", "../../x.bin"), "hf_hub_filename="),
    "a pickle's name": ("named", set_value("pretrained_cfg.hf_hub_filename", "model.pth"), "hf_hub_filename="),
    "a custom loader": ("hand", set_value("pretrained_cfg.custom_load", True), "custom_load=True"),
    "a state dict": ("hand", set_value("pretrained_cfg.state_dict", {"a": 1}), "state_dict="),
    "an unknown field": ("hand", set_value("pretrained_cfg.__init__", "x"), "__init__: not a field"),
    "a configuration that is a list": ("hand", set_value("pretrained_cfg", [1]), "pretrained_cfg=[1]"),
    "huge images": ("hand", set_value("pretrained_cfg.input_size", [3, 10**6, 10**6]), "input_size="),
    "images without end": ("hand", set_value("pretrained_cfg.input_size", [3, -1, 224]), "input_size="),
    "images that are a text": ("hand", set_value("pretrained_cfg.input_size", "abc"), "input_size="),
    "a billion classes": ("hand", set_value("num_classes", 10**9), "num_classes=1000000000"),
    "less than no classes": ("hand", set_value("num_classes", -5), "num_classes=-5"),
    "less than no classes as an argument": ("named", set_value("model_args.num_classes", -5), "num_classes=-5"),
    "less than no classes inside": ("hand", set_value("model_args.base_args.num_classes", -5), "num_classes=-5"),
    "a million classes": ("hand", MILLION_CLASSES, "do not fit"),
    "a million classes, named": ("named", set_value("model_args.num_classes", 10**6), "far larger than its weights"),
    "a million channels": ("hand", MILLION_CHANNELS, "do not fit"),
    "a million features": ("hand", set_value("model_args.base_args.dims", [10**6] * 4), "numbers added up"),
    "many features": ("hand", set_value("model_args.base_args.dims", [10**5] * 4), "far larger than its weights"),
    "many blocks": ("hand", set_value("model_args.base_args.depths", [10**4] * 4), "far larger than its weights"),
    "a base kernel that the patch hides": (
        "hand", set_value("model_args.base_args.kernel_sizes", [9999] * 4), "far larger than its weights",
    ),
    "a paper's own network, wide": ("own", set_value("model_args.dims", [10**5] * 4), "far larger than its weights"),
    "a paper's own network, deep": ("own", set_value("model_args.depths", [10**4] * 4), "far larger than its weights"),
    "a plain timm model, wide": ("timm", set_value("model_args", {"embed_dim": 10**6}), "far larger than its weights"),
    "a plain timm model, deep": ("timm", set_value("model_args", {"depth": 10**4}), "far larger than its weights"),
    "a plain timm model for huge images": (
        "timm", set_value("model_args", {"img_size": 10**5}), "far larger than its weights",
    ),
    "a larger base": ("hand", set_value("model_args.base", "convnext_xxlarge"), "far larger than its weights"),
    "infinity": ("hand", set_value("model_args.base_args.drop_rate", math.inf), "drop_rate=inf"),
    "not a number": ("hand", set_value("model_args.base_args.drop_rate", math.nan), "drop_rate=nan"),
    "a long text": ("hand", set_value("model_args.base_args.act_layer", "x" * 10**6), "at most 1000 characters"),
    "a long list": ("hand", set_value("model_args.base_args.depths", [1] * 10**6), "a list of at most"),
    "a deep list": ("hand", set_value("model_args.base_args.depths", deep(50)), "nested at most 8"),
    "an activation that is none": ("hand", set_value("model_args.base_args.act_layer", "os.system"), "can't build"),
    "an argument that is none": ("hand", set_value("model_args.base_args.shell", "true"), "can't build"),
    "a kernel of no size": ("hand", set_value("model_args.base_args.kernel_sizes", [0, 0, 0, 0]), ""),
    "an argument of another type": ("hand", set_value("model_args.base_args.depths", "abcd"), "can't build"),
}  # fmt: skip

#: what timm puts right by itself: it says where weights are
PUT_RIGHT = {"a file", "another repository"}


@pytest.mark.parametrize("name", HOSTILE)
def test_from_pretrained_refuses(name, folder):
    kind, change, message = HOSTILE[name]
    path = folder(kind)
    change_config(path, change)
    error = load_watched(tcc.from_pretrained, path)
    assert isinstance(error, ValueError)
    assert message in str(error)


@pytest.mark.parametrize("name", [name for name, (kind, _, _) in HOSTILE.items() if kind != "timm"])
def test_timms_own_way_refuses(name, folder):
    """For architectures of ours, `timm.create_model` is as safe, if less eloquent."""
    kind, change, _ = HOSTILE[name]
    path = folder(kind)
    change_config(path, change)
    error = load_watched(lambda path: timm.create_model(f"local-dir:{path}", pretrained=True), path)
    assert (error is None) == (name in PUT_RIGHT)


@pytest.mark.parametrize("name", ["many blocks", "a paper's own network, deep", "a plain timm model, deep"])
def test_the_callers_arguments_do_not_loosen_the_bound(name, folder):
    kind, change, message = HOSTILE[name]
    path = folder(kind)
    change_config(path, change)
    assert message in str(load_watched(lambda path: tcc.from_pretrained(path, num_classes=2, drop_rate=0.1), path))


@pytest.mark.parametrize("name", slow_but(["many features", "a larger base", "many blocks"], "a larger base"))
def test_without_weights_there_is_a_bound_too(name, folder):
    path = folder("hand")
    (path / "model.safetensors").unlink()
    change_config(path, HOSTILE[name][1])
    error = load_watched(lambda path: timm.create_model(f"local-dir:{path}", pretrained=False), path)
    assert isinstance(error, ValueError)
    assert "without weights to compare with" in str(error)


NO_CONFIGURATION = {
    "cut short": ("{", "not a JSON file"),
    "a list": ("[]", "expected a JSON object"),
    "null": ("null", "expected a JSON object"),
    "a deep list": ("[" * 10**6, "nested too deeply"),
    "a deep object": ('{"a": ' * 10**5 + "1" + "}" * 10**5, "nested too deeply"),
    "a long int": ('{"architecture": "contconv", "num_classes": 1' + "0" * 5000 + "}", "not a JSON file"),
    "infinity": ('{"architecture": "contconv", "num_classes": 1e999}', "num_classes=inf"),
    "a truth value": ('{"architecture": "contconv", "num_classes": true}', "num_classes=True"),
    "no text": ("\udcff\udcfe{}", "not a JSON file"),
    "17 MiB": (" " * 17 * 2**20, "expected at most"),
    "YAML": ('!!python/object/apply:os.system ["true"]', "not a JSON file"),
}


@pytest.mark.parametrize("name", NO_CONFIGURATION)
def test_files_that_are_no_configuration(name, folder):
    text, message = NO_CONFIGURATION[name]
    path = folder("hand")
    (path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    error = load_watched(tcc.from_pretrained, path)
    assert isinstance(error, ValueError)
    assert message in str(error)


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.pth", "x.pth.tar"])
def test_a_pickle_in_place_of_the_weights_is_refused(load, name, folder, tmp_path):
    path = folder("named")
    (path / "model.safetensors").unlink()
    (path / name).write_bytes(Bomb(tmp_path / "bang").dumps())
    assert "model.safetensors" in str(load_watched(LOADERS[load], path))
    assert not (tmp_path / "bang").exists()


@pytest.mark.parametrize("load", LOADERS)
def test_a_pickle_beside_the_weights_is_not_touched(load, folder, tmp_path):
    path = folder("hand")
    (path / "pytorch_model.bin").write_bytes(Bomb(tmp_path / "bang").dumps())
    with WATCH:
        assert LOADERS[load](path).num_classes == 3
    assert path / "pytorch_model.bin" not in WATCH.opened
    assert not (tmp_path / "bang").exists()


@pytest.mark.parametrize(
    "header",
    [
        b"\xff" * 8,
        (2**40).to_bytes(8, "little"),
        (2).to_bytes(8, "little") + b"{}" + b"\0" * 100,
        (60).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4000000000]}}'[:60],
    ],
)
def test_weights_with_a_hostile_header_are_refused(header, folder):
    path = folder("hand")
    (path / "model.safetensors").write_bytes(header)
    error = load_watched(tcc.from_pretrained, path)
    assert isinstance(error, ValueError)
    assert "damaged or cut short" in str(error)


@pytest.mark.parametrize("load", LOADERS)
def test_a_dense_kernel_that_only_running_would_construct_is_refused(load, tmp_path):
    """Its parameters are as many as those of a small kernel."""
    model = timm.create_model("test_resnet", num_classes=3)
    tcc.patch(model, "dcls", select="layer4.*.conv2", kernel_size=3, kernel_count=1, init="random")
    path = tcc.save_pretrained(model, tmp_path / "stranger")
    change_config(path, set_value("model_args.patch.layer.kernel_size", 255))
    assert re.search(r"layer4\.0\.conv2: its kernel would be \(.*, 255, 255\)", str(load_watched(LOADERS[load], path)))


@pytest.mark.parametrize("load", LOADERS)
def test_from_a_repository_nothing_but_its_two_files_is_asked_for(load, folder, tmp_path, monkeypatch):
    """The configuration names another file, another repository and a URL; timm's way drops them, ours refuses them."""
    with running_hub() as hub:
        use_hub(monkeypatch, hub.url, tmp_path / "home")
        tcc.push_to_hub(timm.create_model("test_resnet_genv", num_classes=3), "me/model")
        repository = hub.repositories["me/model"]
        config = json.loads(repository.files()["config.json"])
        config["pretrained_cfg"] |= {"file": "/etc/passwd", "url": f"{hub.url}/x.pth", "hf_hub_filename": "x.pth"}
        repository.files()["config.json"] = json.dumps(config).encode()
        start = len(hub.requests)
        name = "me/model" if load == "from_pretrained" else "hf-hub:me/model"
        with WATCH, pytest.raises(ValueError, match=r"weights are the model.safetensors beside it"):
            tcc.from_pretrained(name) if load == "from_pretrained" else timm.create_model(name, pretrained=True)
        asked = {request.path.split("/")[-1] for request in hub.requests[start:]}
    assert asked <= {"config.json", "model.safetensors"} | {o for o in asked if len(o) == 64}
    assert Path("/etc/passwd") not in WATCH.opened
