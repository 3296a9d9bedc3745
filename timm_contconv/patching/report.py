"""tcc.report: counting what a patch changed, layer by layer."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..layers import ConvReplacement
from ..layers.core.arguments import check_counts, check_module
from ..layers.core.replacement import undecayed_names
from .copies import copy_without_hooks
from .damage import measure_damage
from .folding import folding_blocks
from .originals import first_images
from .record import PatchRecord, patched_inside, require_record
from .report_table import PatchReport, PatchRow
from .restore import merge, original_architecture
from .stem_pool import Rewired

__all__ = ["count_multiply_adds", "report"]


def report(
    model: nn.Module,
    input_size: Sequence[int] | None = None,
    *,
    original: nn.Module | None = None,
    images: Tensor | None = None,
) -> PatchReport:
    """What the patch on a model changed.

    Args:
        model: a patched model, or a module around one (compiled, of Lightning, of your own); it is not changed. Neither
            it nor its hooks run, unless there are images. Names are those in the patched model.
        input_size: (channels, *size) of one sample, for multiply-adds. They are counted without scales that were set
            on layers later. Default: the size in the model's `pretrained_cfg`; without one, no multiply-adds.
        original: the model before its patch, with `images`.
        images: (N, C, H, W), a few that the model was trained for: the report then says what the exchange of each layer
            alone does to the outputs, and what all do together. Both models run on them, once per layer.

    Raises:
        TypeError: model is not a module; original or images is of a wrong type.
        ValueError: the model is not patched, or its layers were exchanged since; it can't take this input size; one of
            original and images is missing; original is another architecture, or images are not what the models take;
            the model holds several patched models.
    """
    check_module(model)
    no_weight_decay = tuple(undecayed_names(model))
    model = patched_inside(model)
    record = require_record(model)
    if (original is None) != (images is None):
        missing = "original" if original is None else "images"
        raise ValueError(f"{missing}=None: expected it too; what a patch does to outputs takes original and images")
    input_size = _input_size(model, input_size)
    shadow = original_architecture(model)
    before, old_outputs = _count_original(shadow, input_size, record.replaced)
    damage = None
    if original is not None and images is not None:
        damage = measure_damage(model, original, first_images(images, len(images), next(model.parameters()), "images"))
    merged = merge(_as_built(copy_without_hooks(model).to("meta")), inplace=True)
    after, outputs = count_multiply_adds(merged, input_size, record.replaced)
    existed = dict(shadow.named_modules())
    rows = [_row(model, record, n, existed.get(n), old_outputs.get(n), outputs.get(n)) for n in record.replaced]
    if damage is not None:
        rows.sort(key=lambda row: -damage.layers.get(row.name, 0.0))
    rows += [_home_row(model, record, home, attribute) for home, attribute in record.homes]
    rows += [_module_row(model, change) for change in record.rewired if change.is_module]
    layers = {name: _layer(model, name) for name in outputs}
    spared = sum(layers[n].published_multiply_adds(size) - layers[n].multiply_adds(size) for n, size in outputs.items())
    return PatchReport(
        patch=record.spec.to_dict(),
        rows=tuple(rows),
        refused=dict(record.refused),
        notes=(*_notes(model, record.replaced), *_note_of_settings(record)),
        parameters_before=sum(p.numel() for p in shadow.parameters()),
        no_weight_decay=no_weight_decay,
        parameters_after=sum(p.numel() for p in model.parameters()),
        multiply_adds_before=before,
        multiply_adds_after=after,
        multiply_adds_published=None if after is None else after + spared,
        input_size=input_size,
        damage=damage,
    )


def _input_size(model: nn.Module, input_size: Sequence[int] | None) -> tuple[int, ...] | None:
    """The size that was given, or that of the model's `pretrained_cfg`, as `report` documents it."""
    config = getattr(model, "pretrained_cfg", None)
    if input_size is None and isinstance(config, Mapping):
        channels, *size = config["input_size"]
        return getattr(model, "in_chans", channels), *size
    if input_size is None:
        return None
    if isinstance(input_size, str) or not isinstance(input_size, Sequence) or len(input_size) < 2:
        raise ValueError(f"input_size={input_size!r}: expected (channels, *size) of one sample, as (3, 224, 224)")
    check_counts(**{f"input_size[{i}]": size for i, size in enumerate(input_size)})
    return tuple(input_size)


def _count_original(
    shadow: nn.Module, input_size: tuple[int, ...] | None, names: Container[str]
) -> tuple[int | None, dict[str, tuple[int, ...]]]:
    try:
        return count_multiply_adds(shadow, input_size, names)
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"input_size={input_size}: the model can't take it: {reason}; try another size") from None


def _as_built(shadow: nn.Module) -> nn.Module:
    """Give the layers the settings that they were built with. Their sizes fit; later ones may not."""
    for module in shadow.modules():
        if isinstance(module, ConvReplacement):
            module.reset_setting()
    return shadow


def count_multiply_adds(
    shadow: nn.Module, input_size: Sequence[int] | None, names: Container[str]
) -> tuple[int | None, dict[str, tuple[int, ...]]]:
    """Multiply-adds of a model on the meta device, and output sizes of the named modules."""
    if input_size is None:
        return None, {}
    outputs: dict[str, tuple[int, ...]] = {}
    for name, module in shadow.named_modules():
        if name in names:
            module.register_forward_hook(lambda _, __, y, name=name: outputs.__setitem__(name, tuple(y.shape[2:])))
    sample = torch.empty(1, *input_size, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shadow.requires_grad_(False).eval().float()(sample)  # recorded convolutions may have another dtype
    return counter.get_total_flops() // 2, outputs


def _row(
    model: nn.Module,
    record: PatchRecord,
    name: str,
    conv: nn.Module | None,
    old_output: tuple[int, ...] | None,
    output: tuple[int, ...] | None,
) -> PatchRow:
    layer = _layer(model, name)
    homes = [getattr(model.get_submodule(home), attribute) for home, attribute in record.homes]
    shared = {id(parameter) for home in homes for parameter in home.parameters()}  # counted in their own rows
    weights = 0 if conv is None else sum(p.numel() for key, p in conv.named_parameters() if key == "weight")
    if isinstance(conv, nn.ConvTranspose2d):  # each pixel of its output sees a part of the kernel
        weights //= torch.Size(conv.stride).numel()
    pixels = None if old_output is None else torch.Size(old_output).numel()
    return PatchRow(
        name=name,
        before="" if conv is None else _describe(conv),
        after=_describe(layer),
        parameters_before=0 if conv is None else sum(p.numel() for p in conv.parameters()),
        parameters_after=sum(p.numel() for p in layer.parameters() if id(p) not in shared),
        multiply_adds_before=None if pixels is None else pixels * weights,
        multiply_adds_after=None if output is None else layer.multiply_adds(output),
        receptive_field_before=None if conv is None else _receptive_field(conv),
        receptive_field_after=layer.receptive_field(),
        max_frequency=layer.highest_frequency(),
        fit_error=record.fit_errors.get(name),
    )


def _layer(model: nn.Module, name: str) -> ConvReplacement:
    layer = model.get_submodule(name)
    assert isinstance(layer, ConvReplacement)
    return layer


def _receptive_field(conv: nn.Module) -> tuple[int, ...]:
    sizes = zip(conv.kernel_size, conv.dilation, strict=True)  # type: ignore[arg-type]
    return tuple((k - 1) * d + 1 for k, d in sizes)


def _home_row(model: nn.Module, record: PatchRecord, home: str, attribute: str) -> PatchRow:
    geometry = getattr(model.get_submodule(home), attribute)
    users = sum(_layer(model, name).geometry_owner.geometry_home is geometry for name in record.replaced)
    after = f"{', '.join(geometry)} of {users} layers"
    return PatchRow(f"{home}.{attribute}", "", after, 0, sum(p.numel() for p in geometry.parameters()))


def _module_row(model: nn.Module, change: Rewired) -> PatchRow:
    module = getattr(model.get_submodule(change.owner), change.attribute)
    before = "" if change.before is None else type(change.before).__name__
    inside = [layer for layer in module.modules() if isinstance(layer, ConvReplacement)]  # counted in their own rows
    own = sum(p.numel() for p in module.parameters()) - sum(p.numel() for m in inside for p in m.parameters())
    return PatchRow(change.name, before, type(module).__name__, 0, own)


def _describe(layer: nn.Module) -> str:
    if isinstance(layer, ConvReplacement):
        return layer.summary()
    return f"{type(layer).__name__} {'×'.join(map(str, layer.kernel_size))}"  # type: ignore[arg-type]


def _notes(model: nn.Module, names: Iterable[str]) -> tuple[str, ...]:
    """Warnings about the modules around the new layers."""
    folding = {type(block).__name__ for name in names for _, block in folding_blocks(model, name)}
    if not folding:
        return ()
    return (
        f"{', '.join(sorted(folding))}: these blocks fold their branches for inference"
        " (timm.utils.reparameterize_model), which may fail with the new layers: merge, or use the model unfolded",
    )


def _note_of_settings(record: PatchRecord) -> tuple[str, ...]:
    """How many elements a fit took, if nobody gave their number."""
    counts = [getattr(record.spec.layer, "kernel_count", None)]
    counts += [table.get("kernel_count") for table in record.spec.by_name.values()]
    found = sorted({count for count in counts if count is not None})
    if record.fit_tolerance is None or not found:
        return ()
    span = f"{found[0]}" if len(found) == 1 else f"{found[0]} to {found[-1]}"
    return (f"{span} elements per kernel; fit_tolerance={record.fit_tolerance:g}",)
