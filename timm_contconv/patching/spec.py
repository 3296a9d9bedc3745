"""PatchSpec: what a patch does, as a recipe file, a dict or an object."""

from __future__ import annotations

import difflib
import fnmatch
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from ..layers import METHODS, LayerSpec
from ..layers.core.arguments import Int
from ..layers.core.spec import LARGEST_KERNEL, explain
from ..paths import data_folder

__all__ = ["PatchSpec", "Share", "as_patch_spec", "list_patches", "load_patch", "recipe_models"]

Share = Literal["stage"] | None
_Text = Annotated[str, Field(max_length=1000)]
_Names = Annotated[tuple[_Text, ...], Field(max_length=10_000)]


def _layer_spec(value: Any) -> Any:
    """The spec of the method that a mapping names."""
    if not isinstance(value, Mapping):
        return value
    method = value.get("method")
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"method={method!r}: expected one of {', '.join(METHODS)}")
    return METHODS[method].model_validate(value)


class PatchSpec(BaseModel):
    """What a patch does to a model: the convolutions that it replaces, the new layers, and what they share.

    Attributes:
        layer: settings of the method that `method` names.
        by_stage: settings of the layer that differ by stage of the model: one table per stage, in order; the last
            table holds for all later stages.
        by_name: settings of the layer that differ by module name: a table per glob; they come after those of
            by_stage, and a later glob after an earlier one.
        select: the convolutions to replace: "depthwise", "strided", "transposed", "all", or globs of module names; "!"
            excludes.
        min_kernel_size: in pixels; convolutions whose kernel is smaller along every dimension are left out.
        share: "stage" gives layers of a stage with the same parameter shapes, whose old kernels had the same size,
            one set of positions and widths.
        stem_pool: "to_stage" removes the max-pool of a ResNet's stem; the first stage strides instead.
        description: one line for users.
        models: timm architectures to register this recipe on, as `{architecture}_{recipe}`.

    Raises:
        ValueError: a field is unknown, missing or out of range; the message names it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    layer: Annotated[SerializeAsAny[LayerSpec], BeforeValidator(_layer_spec)]
    by_stage: Annotated[tuple[dict[str, Any], ...], Field(max_length=100)] = ()
    by_name: Annotated[dict[_Text, dict[str, Any]], Field(max_length=10_000)] = {}
    select: Annotated[tuple[_Text, ...], Field(min_length=1, max_length=10_000)]
    min_kernel_size: Annotated[Int, Field(ge=1, le=LARGEST_KERNEL)] = 1
    share: Share = None
    stem_pool: Literal["to_stage"] | None = None
    description: _Text = ""
    models: _Names = ()

    @field_validator("by_stage", "by_name")
    @classmethod
    def _check_tables(cls, tables: Any, info: ValidationInfo) -> Any:
        if "layer" in info.data:  # otherwise the layer's own error is reported
            for key in tables if isinstance(tables, dict) else range(len(tables)):
                place = f"by_name[{key!r}]" if isinstance(key, str) else f"stage {key + 1}"
                _with_settings(info.data["layer"], tables[key], place)
        return tables

    def layer_at(self, stage: int, name: str | None = None) -> LayerSpec:
        """The layer's settings in a stage, counted from 0, for the module `name`."""
        layer = self.layer
        if self.by_stage:
            layer = _with_settings(layer, self.by_stage[min(stage, len(self.by_stage) - 1)], f"stage {stage + 1}")
        for glob, table in self.by_name.items():
            if name is not None and fnmatch.fnmatchcase(name, glob):
                layer = _with_settings(layer, table, f"by_name[{glob!r}]")
        return layer

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "patch") -> Self:
        """Validate a mapping. Errors name its `source`.

        Raises:
            ValueError: names the key, the value and what is allowed.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ValueError(_explain(error, source)) from None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` is the inverse."""
        empty = {"models": (), "min_kernel_size": 1, "by_name": {}}
        unset = {key for key, value in empty.items() if getattr(self, key) == value}
        return self.model_dump(mode="json", exclude_none=True, exclude=unset)

    def to_toml(self) -> str:
        """The spec as a recipe file."""
        return tomli_w.dumps(self.to_dict())

    def with_layer(self, **changes: Any) -> Self:
        """The same patch with other settings of its layer, equal in all stages and for all names.

        Raises:
            ValueError: as `from_dict`.
        """
        values = self.to_dict()
        values["layer"] = {**values["layer"], **changes}
        kept = [{k: v for k, v in table.items() if k not in changes} for table in self.by_stage]
        values["by_stage"] = kept if any(kept) else []
        named = {name: {k: v for k, v in table.items() if k not in changes} for name, table in self.by_name.items()}
        values["by_name"] = {name: table for name, table in named.items() if table}
        return self.from_dict(values)


def list_patches() -> list[str]:
    """Names of the package's recipes."""
    return sorted(path.stem for path in data_folder("patches").glob("*.toml"))


def recipe_models() -> dict[str, list[str]]:
    """The `models` of each of the package's recipes; the rest of them is not read."""
    return {name: _toml(data_folder("patches") / f"{name}.toml").get("models", []) for name in list_patches()}


def load_patch(name_or_path: str | Path) -> PatchSpec:
    """Read a recipe of the package by name, or a .toml file by path.

    Raises:
        ValueError: the recipe does not exist (the message names similar ones), or its content is wrong (the message
            names file, line and key).
        FileNotFoundError: the file does not exist.
        TypeError: it is neither a text nor a path.
    """
    if not isinstance(name_or_path, str | Path):
        raise TypeError(f"name_or_path={name_or_path!r}: expected a recipe's name or the path of a .toml")
    if str(name_or_path) in list_patches():
        path = data_folder("patches") / f"{name_or_path}.toml"
    elif isinstance(name_or_path, Path) or name_or_path.endswith(".toml"):
        path = Path(name_or_path)
    else:
        near = difflib.get_close_matches(name_or_path, list_patches(), n=3, cutoff=0.3) or list_patches()
        raise ValueError(
            f"patch={name_or_path!r}: no such recipe; did you mean {' or '.join(near)}? tcc.list_patches() lists"
            " all; a path must end in .toml"
        )
    try:
        return PatchSpec.model_validate(_toml(path))
    except ValidationError as error:
        raise ValueError(_explain(error, path.name, path.read_text(encoding="utf-8"))) from None


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path.name}: not a TOML file: {error}") from None


def as_patch_spec(patch: str | Path | Mapping[str, Any] | PatchSpec) -> PatchSpec:
    """The spec of a recipe's name, a path, a mapping or a spec.

    Raises:
        TypeError: patch is none of these.
        ValueError: as `load_patch` and `PatchSpec.from_dict`.
    """
    if isinstance(patch, PatchSpec):
        return patch
    if isinstance(patch, str | Path):
        return load_patch(patch)
    if isinstance(patch, Mapping):
        return PatchSpec.from_dict(patch)
    raise TypeError(f"patch={patch!r}: expected a recipe's name, a path to a .toml, a dict or a PatchSpec")


def _with_settings(layer: LayerSpec, settings: Mapping[str, Any], place: str) -> LayerSpec:
    """`layer` with other settings; the method stays the same.

    Raises:
        ValueError: a setting is unknown or out of range; the message starts with `place`.
    """
    if "method" in settings:
        raise ValueError(f"{place}: method={settings['method']!r}: expected no method; it is the same in all stages")
    try:
        return type(layer).model_validate({**layer.model_dump(), **settings})
    except ValidationError as error:
        raise ValueError(_explain(error, place, whole="layer")) from None


def _explain(error: ValidationError, source: str, text: str | None = None, whole: str = "patch") -> str:
    """One line per mistake: source, line (of `text`, if given), key, value, what is allowed."""
    lines = []
    for item in error.errors():
        key = str(item["loc"][-1]) if item["loc"] else ""
        line = f":{_line_of(text, key)}" if text and key else ""
        lines.append(explain(item, f"{source}{line}: ", whole))
    return "\n".join(lines)


def _line_of(text: str, key: str) -> int:
    for number, line in enumerate(text.splitlines(), start=1):
        if re.match(rf"\s*\[?\s*[\"']?{re.escape(key)}\b", line):
            return number
    return 1
