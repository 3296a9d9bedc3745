"""Reports: what they count, and that they run nothing of the user's."""

import threading

import pytest
import timm
import torch
from torch import nn

import timm_contconv as tcc

from ..models_for_tests import Snapshot, layers_of, relative


def convnext(**options) -> nn.Module:
    return timm.create_model("test_convnext", num_classes=10, **options)


def test_report_counts_parameters_and_multiply_adds():
    plain = convnext()
    model = tcc.patch(convnext(), "dcls_gauss", init="random")
    before = Snapshot(model)
    report = tcc.report(model, input_size=(3, 64, 64))
    assert before.differences() == []
    assert report.parameters_before == sum(p.numel() for p in plain.parameters())
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    for value in ("before", "after"):
        rows = sum(getattr(row, f"parameters_{value}") for row in report.rows)
        whole = getattr(report, f"parameters_{value}")
        around = sum(p.numel() for n, p in plain.named_parameters() if "conv_dw" not in n)
        assert rows == whole - around
    row = report.rows[0]
    assert row.name == "stages.0.blocks.0.conv_dw"
    assert (row.multiply_adds_before, row.multiply_adds_after) == (16 * 16 * 24 * 7 * 7, 16 * 16 * 24 * 23 * 23)
    assert (row.receptive_field_before, row.receptive_field_after) == ((7, 7), (23, 23))
    growth = sum(row.multiply_adds_after - row.multiply_adds_before for row in report.rows if row.multiply_adds_after)
    assert report.multiply_adds_after - report.multiply_adds_before == growth
    assert "DclsConv2d 23×23" in str(report)
    assert report.to_dict()["rows"][0]["name"] == row.name


def test_fit_errors_are_those_of_each_kernel():
    model = convnext()
    kernels = {name: module.weight.detach().clone() for name, module in model.named_modules() if name.endswith("dw")}
    tcc.patch(model, "dcls", kernel_size=9, kernel_count=20, select="stages.1.*dw")
    errors = {row.name: row.fit_error for row in tcc.report(model).rows if row.fit_error is not None}
    assert errors.keys() == {name for name in kernels if name.startswith("stages.1")}
    for name, error in errors.items():
        wanted = nn.functional.pad(kernels[name], (1, 1, 1, 1))
        assert error == pytest.approx(relative(model.get_submodule(name).weight.detach(), wanted), rel=1e-3)


@pytest.mark.parametrize(
    "build",
    [lambda: tcc.patch(convnext(), "dcls", init="random"), lambda: timm.create_model("test_convnext_dcls")],
    ids=["random", "named"],
)
def test_a_random_start_has_no_error_to_tell(build):
    assert {row.fit_error for row in tcc.report(build()).rows} == {None}


class Watch:
    """A user's hook that holds its model, can't be copied and wants values."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.lock, self.seen = model, threading.Lock(), []

    def look(self, module, args, output):
        self.seen.append(output.mean().item())


def test_hooks_are_neither_recorded_nor_run_by_a_report():
    model = convnext()
    watch = Watch(model)
    for module in (model.stem, model.stages[0].blocks[0].conv_dw):
        module.register_forward_hook(watch.look)
    tcc.patch(model, "dcls_gauss", init="random")
    assert tcc.report(model, input_size=(3, 64, 64)).multiply_adds_before is not None
    assert watch.seen == []
    model(torch.randn(1, 3, 64, 64))
    assert len(watch.seen) == 2


def test_a_report_runs_the_hooks_that_compute_weights():
    model = convnext()
    model.head.fc = nn.utils.spectral_norm(model.head.fc)
    report = tcc.report(tcc.patch(model, "dcls", init="random"), input_size=(3, 64, 64))
    assert report.multiply_adds_after is not None


def test_a_model_that_is_not_patched_has_no_report():
    with pytest.raises(ValueError, match="is not patched"):
        tcc.report(convnext())
    assert layers_of(convnext()) == []
