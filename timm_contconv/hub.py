"""Saving patched models to a folder that timm loads, and loading them again."""

from __future__ import annotations

import json
import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import safetensors
import timm
from safetensors.torch import save_file
from timm.models._hub import load_cfg_from_json, save_config_for_hf
from timm.models._input import get_model_args
from torch import nn

from .layers import ConvReplacement
from .models.patched import HAND_PATCHED, PATCHED
from .patching import PatchSpec, report
from .patching.record import PatchRecord, get_record, require_record

__all__ = ["from_pretrained", "save_pretrained"]

WEIGHTS, CONFIG, CARD, PICTURE = "model.safetensors", "config.json", "README.md", "kernels.png"


def save_pretrained(model: nn.Module, folder: str | Path) -> Path:
    """Write a patched timm model to a folder: weights, configuration, model card.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` and `from_pretrained` load it. A model of a named
    architecture is saved under its name; one patched by hand under "contconv", which rebuilds it from its base and
    its patch. The folder appears when it is whole; one that is there is replaced by the new one.

    Args:
        model: a named model or a timm model patched by hand.
        folder: where to; its parent is made if need be.

    Returns:
        The folder.

    Raises:
        ValueError: the model is not patched (merged models too), or is not a timm model.
        FileExistsError: the folder holds something other than a saved model.
    """
    record = None if _is_own_architecture(model) else require_record(model)
    if not hasattr(model, "pretrained_cfg"):
        raise ValueError(
            f"model: this {type(model).__name__} was not made by timm, which could not rebuild it; save its"
            " state_dict() with safetensors and its patch with tcc.report(model).patch"
        )
    folder = Path(folder)
    _check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        staged = Path(temporary) / "model"
        staged.mkdir()
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, staged / WEIGHTS, {"format": "pt"})
        _write_config(model, record, staged / CONFIG)
        _write_card(model, record, folder.name, staged)
        if folder.exists():
            folder.rename(Path(temporary) / "replaced")
        staged.rename(folder)
    return folder


def from_pretrained(folder: str | Path, **kwargs: Any) -> nn.Module:
    """Load a model that `save_pretrained` wrote.

    Args:
        folder: path of the folder, or the name of a repository on the Hugging Face Hub ("user/name").
        **kwargs: arguments of `timm.create_model`, as num_classes.

    Raises:
        FileNotFoundError: the folder has no config.json or no model.safetensors.
        ValueError: the configuration asks for something unknown or out of range, or the weights are damaged.
    """
    path = Path(folder)
    if not path.is_dir():
        if path.is_absolute() or len(path.parts) != 2:
            raise FileNotFoundError(f"folder={str(folder)!r}: no such folder, and not a Hub repository (user/name)")
        return timm.create_model(f"hf-hub:{folder}", pretrained=True, **kwargs)
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            raise FileNotFoundError(f"folder={str(folder)!r}: has no {name}; tcc.save_pretrained writes one")
    _check_config(path / CONFIG)
    try:
        with safetensors.safe_open(path / WEIGHTS, framework="pt"):
            pass
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path / WEIGHTS}: damaged or cut short ({error}); copy or download it again") from None
    return timm.create_model(f"local-dir:{path}", pretrained=True, **kwargs)


def _check_replaceable(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()) and not (folder / CONFIG).is_file():
        raise FileExistsError(f"folder={str(folder)!r}: holds something other than a saved model; choose another")
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"folder={str(folder)!r}: is a file; choose another")


def _is_own_architecture(model: nn.Module) -> bool:
    """Whether the model is one of the papers' own networks: built of our layers, rather than patched."""
    name = getattr(model, "pretrained_cfg", {}).get("architecture")
    ours = isinstance(name, str) and timm.is_model(name) and name not in PATCHED and name != HAND_PATCHED
    layers = any(isinstance(module, ConvReplacement) for module in model.modules())
    return ours and layers and get_record(model) is None


def _write_config(model: nn.Module, record: PatchRecord | None, path: Path) -> None:
    """timm's configuration; for a model patched by hand with {base, base_args, patch} as its arguments."""
    if record is None or (record.architecture is not None and record.architecture != HAND_PATCHED):
        save_config_for_hf(model, str(path))
        return
    save_config_for_hf(model, str(path), model_config={"pretrained_cfg": {"architecture": HAND_PATCHED}})
    config = load_cfg_from_json(path)
    config["model_args"] = _hand_patched_args(model, record)
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def _hand_patched_args(model: nn.Module, record: PatchRecord) -> dict[str, Any]:
    arguments = get_model_args(model)
    base: str = model.__dict__["pretrained_cfg"]["architecture"]
    if base in PATCHED:  # a named model whose patch was taken off and another put on
        base = PATCHED[base].base
        arguments.pop("patch_args", None)
    elif base == HAND_PATCHED:
        saved = {key: arguments.pop(key) for key in ("base", "base_args", "patch")}
        base, arguments = saved["base"], {**saved["base_args"], **arguments}
    return {"base": base, "base_args": arguments, "patch": record.spec.to_dict()}


def _check_config(path: Path) -> None:
    """Refuse a configuration that names an unknown architecture or patch, before anything is built."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from None
    architecture = config.get("architecture") if isinstance(config, dict) else None
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise ValueError(f"{path}: architecture={architecture!r}: expected the name of a registered model")
    if architecture == HAND_PATCHED:
        PatchSpec.from_dict(config.get("model_args", {}).get("patch", {}), source=f"{path.name}: model_args.patch")


def _write_card(model: nn.Module, record: PatchRecord | None, name: str, folder: Path) -> None:
    """A model card with what the patch changed and, with matplotlib, a picture of kernels."""
    picture = ""
    if find_spec("matplotlib") is None:
        warnings.warn("the model card has no picture of kernels: install timm_contconv[viz]", stacklevel=3)
    else:
        from .viz import save_kernel_figure

        save_kernel_figure(model, folder / PICTURE)
        picture = f"\n![Learned kernels]({PICTURE})\n"
    method = next(module.method for module in model.modules() if isinstance(module, ConvReplacement))
    (folder / CARD).write_text(
        f"""---
library_name: timm
pipeline_tag: image-classification
tags:
- timm
- timm_contconv
- {method}
---
# {name}

{_summary(model, record)}

```python
import timm, timm_contconv

model = timm.create_model("local-dir:{name}", pretrained=True)
```
{picture}{_table(model, record)}""",
        encoding="utf-8",
    )


def _summary(model: nn.Module, record: PatchRecord | None) -> str:
    if record is None:
        name = model.__dict__["pretrained_cfg"]["architecture"]
        return f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters."
    changes = report(model)
    what = record.spec.description or record.spec.layer.method
    return f"{what}: {changes.parameters_before:,} parameters before the patch,\n{changes.parameters_after:,} after."


def _table(model: nn.Module, record: PatchRecord | None) -> str:
    if record is None:
        return ""
    rows = "\n".join(f"| {r.name} | {r.before} | {r.after} | {r.parameters_after} |" for r in report(model).rows)
    return f"\n| layer | before | after | parameters |\n|---|---|---|---|\n{rows}\n"
