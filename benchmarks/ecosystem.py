"""Which libraries patched models work with: a row per library, a column per method, each cell a few real steps.

    make ecosystem

Needs the packages of `ROWS` (the Makefile installs them in an environment of their own). Writes docs/works_with.md.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import platform
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import timm_contconv as tcc
from tests.models_for_tests import awake, layers_of, scatter
from timm_contconv.hub.names import PATCHED

RESULTS = Path(__file__).parent / "results" / "ecosystem.json"
PAGE = Path(__file__).parent.parent / "docs" / "works_with.md"
MODELS = {
    "dcls": "test_convnext_dcls_gauss",
    "smp": "test_convnext_smp",
    "flex": "test_convnext_flex",
    "genv": "test_resnet_genv",
    "cc": "test_resnet_cc",
}
SIZE = 64
Cell = Callable[[str], None]
#: what each row needs, what it does, and the function that does it
ROWS: list[tuple[str, str, Cell]] = []


class Expected(Exception):
    """A cell that is red for a reason that is known and said."""


def row(packages: str, does: str) -> Callable[[Cell], Cell]:
    def add(cell: Cell) -> Cell:
        ROWS.append((packages, does, cell))
        return cell

    return add


# ---- what the cells share


@torch.no_grad()
def classifier(name: str) -> nn.Module:
    """A model whose layers all matter; FlexConv's masks are centred, as they start."""
    model = scatter(awake(timm.create_model(name, num_classes=10)))
    for layer in layers_of(model):
        if layer.method == "flex":
            layer.geometry["mask_mean"].zero_()
    return model


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE)


def train(module: nn.Module, loss: Callable[[], Tensor], steps: int = 2) -> None:
    """Steps with the groups and constraints of this package; then the geometry is checked."""
    optimizer = torch.optim.AdamW(tcc.param_groups(module, 1e-3, 0.05, apply_lr_scale=True))
    module.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        tcc.constrain_(module)
    check_geometry(module, optimizer)


def check_geometry(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Geometry has gradients, is finite and within its bounds, and is not decayed."""
    decayed = {id(p) for group in optimizer.param_groups if group.get("weight_decay") for p in group["params"]}
    assert layers_of(module)
    for layer in layers_of(module):
        for name, value in layer.geometry.items():
            assert id(value) not in decayed, f"{name} is decayed"
            assert value.isfinite().all(), f"{name} is not finite"
    before = copy.deepcopy(module.state_dict())
    tcc.constrain_(module)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} was out of its bounds"


@torch.no_grad()
def close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    error = float((found - expected).abs().max() / expected.abs().max())
    assert error <= tolerance, f"differs by {error:.1e}"


# ---- timm


@row("timm", "features_only, create_optimizer_v2 with weight decay, AdamW, Muon")
def timm_features(name: str) -> None:
    model = timm.create_model(name, features_only=True)
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05)
    model(images())[-1].mean().backward()
    optimizer.step()
    tcc.constrain_(model)
    check_geometry(model, optimizer)
    whole = classifier(name)
    muon = timm.optim.Muon(tcc.param_groups(whole, 1e-3, 0.05))
    whole(images()).square().mean().backward()
    muon.step()
    tcc.constrain_(whole)
    check_geometry(whole, muon)


@row("timm", "output_stride 8 and 16 with the classifier's weights")
def timm_output_stride(name: str) -> None:
    model = classifier(name)
    for stride in (8, 16):
        dilated = timm.create_model(name, num_classes=10, output_stride=stride)
        if dilated.state_dict().keys() != model.state_dict().keys():
            raise Expected("strides became dilations: fewer layers are strided, so fewer are replaced")
        dilated.load_state_dict(model.state_dict())
        dilated(images())


# ---- training


@row("lightning", "Trainer.fit with ContinuousConvCallback, accumulation, bf16-mixed")
def lightning_fit(name: str) -> None:
    import lightning.pytorch as pl

    from timm_contconv.integrations.lightning import ContinuousConvCallback

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = classifier(name)

        def training_step(self, batch: Any, _: int) -> Tensor:
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(tcc.param_groups(self, 1e-3, 0.05, apply_lr_scale=True))

    data = torch.utils.data.TensorDataset(images(8), torch.arange(8))
    module = Module()
    trainer = pl.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accumulate_grad_batches=2, precision="bf16-mixed",
        callbacks=[ContinuousConvCallback(penalty_factor=0.1 if name.endswith(("gauss", "flex")) else 0.0)],
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=2))
    check_geometry(module, trainer.optimizers[0])


@row("transformers", "Trainer with ContinuousConvCallback and optimizer_cls_and_kwargs")
def transformers_trainer(name: str) -> None:
    from transformers import Trainer, TrainingArguments

    from timm_contconv.integrations.transformers import ContinuousConvCallback, optimizer_cls_and_kwargs

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = classifier(name)

        def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.model(pixel_values)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    module = Module()
    data = [{"pixel_values": x, "labels": i} for i, x in enumerate(images(8))]
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=2, per_device_train_batch_size=4, learning_rate=1e-3, weight_decay=0.05, use_cpu=True,
            report_to="none", save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(
            module, args, train_dataset=data, callbacks=[ContinuousConvCallback()],
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(module, args),
        )  # fmt: skip
        trainer.train()
    check_geometry(module, trainer.optimizer)


@row("transformers", "AutoModelForImageClassification of a saved folder")
def transformers_auto(name: str) -> None:
    from transformers import AutoModelForImageClassification

    model, x = classifier(name).eval(), images()
    with tempfile.TemporaryDirectory() as folder:
        tcc.save_pretrained(model, Path(folder) / "model")
        loaded = AutoModelForImageClassification.from_pretrained(Path(folder) / "model").eval()
    close(loaded(pixel_values=x).logits, model(x))


@row("accelerate", "prepare, accumulation, clipping")
def accelerate_prepare(name: str) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = classifier(name)
    optimizer = torch.optim.AdamW(tcc.param_groups(model, 1e-3, 0.05, apply_lr_scale=True))
    model, optimizer = accelerator.prepare(model, optimizer)
    with tcc.training_hooks():
        for _ in range(4):
            with accelerator.accumulate(model):
                accelerator.backward(model(images()).square().mean())
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    check_geometry(model, optimizer.optimizer)


@row("accelerate", "cpu_offload with tcc.no_split_modules")
def accelerate_offload(name: str) -> None:
    from accelerate import cpu_offload

    model, x = classifier(name).eval(), images()
    with torch.no_grad():
        expected = model(x)
        cpu_offload(model, torch.device("cpu"), preload_module_classes=tcc.no_split_modules(model))
        close(model(x), expected)


@row("peft", "LoRA on convolutions, trained, merge_and_unload")
def peft_lora(name: str) -> None:
    from peft import LoraConfig, get_peft_model

    model, x = classifier(name), images()
    targets = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and m.weight.numel() > 64]
    targets = [n for n in targets if getattr(model.get_submodule(n), "groups", 1) == 1]
    lora = get_peft_model(model, LoraConfig(r=4, target_modules=targets))
    optimizer = torch.optim.SGD([p for p in lora.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        lora(x).square().mean().backward()
        optimizer.step()
    lora.eval()
    with torch.no_grad():
        expected = lora(x)
        close(lora.merge_and_unload()(x), expected)


@row("skorch", "NeuralNetClassifier.fit within tcc.training_hooks")
def skorch_fit(name: str) -> None:
    from skorch import NeuralNetClassifier

    model = classifier(name)
    net = NeuralNetClassifier(
        model, criterion=nn.CrossEntropyLoss, max_epochs=1, batch_size=4, train_split=None, verbose=0,
        optimizer=lambda params, lr: torch.optim.AdamW(tcc.param_groups(model, 1e-3, 0.05, apply_lr_scale=True)),
    )  # fmt: skip
    with tcc.training_hooks():
        net.fit(images(8).numpy(), torch.arange(8).numpy())
    check_geometry(model, net.optimizer_)


@row("fastai", "Learner.fit within tcc.training_hooks")
def fastai_fit(name: str) -> None:
    import fastai.callback.progress  # noqa: F401 - gives learners `no_bar`
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.optimizer import OptimWrapper

    model = classifier(name)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images(8), torch.arange(8)), batch_size=4)
    groups = tcc.param_groups(model, 1e-3, 0.05, apply_lr_scale=True)
    learner = Learner(
        DataLoaders(data, data), model, nn.CrossEntropyLoss(),
        opt_func=lambda *_, **__: OptimWrapper(opt=torch.optim.AdamW(groups)),
    )  # fmt: skip
    with tcc.training_hooks(), learner.no_bar(), learner.no_logging():
        learner.fit(1, lr=[group["lr"] for group in groups])
    check_geometry(model, learner.opt.opt)


# ---- segmentation, detection


@row("segmentation-models-pytorch", "Unet")
def unet(name: str) -> None:
    import segmentation_models_pytorch as smp

    model = awake(smp.Unet(f"tu-{name}", encoder_weights=None, encoder_depth=4, decoder_channels=(32, 16, 8, 8)))
    train(model, lambda: model(images()).square().mean())


@row("segmentation-models-pytorch", "DeepLabV3Plus, output stride 16")
def deeplab(name: str) -> None:
    import segmentation_models_pytorch as smp

    model = awake(smp.DeepLabV3Plus(f"tu-{name}", encoder_weights=None, encoder_output_stride=16))
    train(model, lambda: model(images(4)).square().mean())


@row("torchvision", "Faster R-CNN on the last feature map")
def faster_rcnn(name: str) -> None:
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.ops import MultiScaleRoIAlign

    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = timm.create_model(name, features_only=True)
            self.out_channels = self.body.feature_info.channels()[-1]

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)[-1]

    model = FasterRCNN(
        awake(Backbone()), 2, min_size=SIZE, max_size=2 * SIZE,
        rpn_anchor_generator=AnchorGenerator(((16, 32),), ((1.0,),)), box_roi_pool=MultiScaleRoIAlign(["0"], 3, 2),
    )  # fmt: skip
    target = {"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    train(model, lambda: sum(model(list(images()), [target, target]).values()))


# ---- explanation


@row("captum", "IntegratedGradients")
def captum_gradients(name: str) -> None:
    from captum.attr import IntegratedGradients

    model = classifier(name).eval()
    x = images(1)
    attribution = IntegratedGradients(model).attribute(x, target=3, n_steps=64)
    with torch.no_grad():  # completeness: attributions sum to the difference from the baseline
        change = (model(x) - model(torch.zeros_like(x)))[0, 3]
    assert abs(float(attribution.sum() - change)) < 0.05 * float(attribution.abs().sum())


@row("grad-cam", "GradCAM at the last stage")
def grad_cam(name: str) -> None:
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model = classifier(name).eval()
    target = model.stages[-1] if hasattr(model, "stages") else model.layer4
    heat = GradCAM(model, [target])(input_tensor=images(1), targets=[ClassifierOutputTarget(3)])
    assert heat.shape == (1, SIZE, SIZE)


@row("torchcam", "SmoothGradCAMpp at the last stage")
def torchcam_map(name: str) -> None:
    from torchcam.methods import SmoothGradCAMpp

    model = classifier(name).eval()
    target = model.stages[-1] if hasattr(model, "stages") else model.layer4
    with SmoothGradCAMpp(model, target_layer=target, num_samples=2) as extract:
        (heat,) = extract(3, model(images(1)))
    assert heat.isfinite().all()
    assert heat.shape[0] == 1


# ---- counters: multiply-adds of the merged model


def flops(model: nn.Module) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad():
        model(images(1))  # constructs and keeps the kernels
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images(1))
    return counter.get_total_flops() // 2


def check_count(name: str, count: Callable[[nn.Module], float], merge: bool = True) -> None:
    """The counter sees what the patch adds to the plain model. Counters differ on norms, biases and linear layers."""
    plain, model = timm.create_model(PATCHED[name].base, num_classes=10).eval(), classifier(name).eval()
    merged = tcc.merge(model)
    added = flops(merged) - flops(plain)
    found = count(merged if merge else model) - count(plain)
    assert abs(found - added) < 0.02 * flops(merged), (
        f"{found / 1e6:.1f} M more than the plain model; {added / 1e6:.1f} M"
    )


@row("torch", "torch.utils.flop_counter of the patched model")
def torch_flops(name: str) -> None:
    check_count(name, flops, merge=False)


@row("fvcore", "FlopCountAnalysis of the merged model")
def fvcore_flops(name: str) -> None:
    from fvcore.nn import FlopCountAnalysis

    check_count(name, lambda model: FlopCountAnalysis(model, images(1)).unsupported_ops_warnings(False).total())


@row("torchinfo", "summary of the merged model")
def torchinfo_macs(name: str) -> None:
    import torchinfo

    check_count(name, lambda model: torchinfo.summary(model, (1, 3, SIZE, SIZE), verbose=0).total_mult_adds)


@row("thop", "profile of the merged model")
def thop_macs(name: str) -> None:
    import thop

    check_count(name, lambda model: thop.profile(copy.deepcopy(model), (images(1),), verbose=False)[0])


@row("ptflops", "get_model_complexity_info of the merged model")
def ptflops_macs(name: str) -> None:
    import ptflops

    settings = {"as_strings": False, "print_per_layer_stat": False, "verbose": False}
    check_count(name, lambda model: ptflops.get_model_complexity_info(model, (3, SIZE, SIZE), **settings)[0])


@row("calflops", "calculate_flops of the merged model")
def calflops_macs(name: str) -> None:
    import calflops

    settings = {"output_as_string": False, "print_results": False, "print_detailed": False}
    check_count(name, lambda model: calflops.calculate_flops(model, (1, 3, SIZE, SIZE), **settings)[1])


# ---- deployment


@row("onnxruntime", "tcc.export, patched and merged, open sizes")
def onnx_runtime(name: str) -> None:
    model = classifier(name)
    with tempfile.TemporaryDirectory() as folder:
        for merge in (True, False):
            sizes = ("batch",) if name.endswith("cc") and not merge else ("batch", "height", "width")
            tcc.export(model, Path(folder) / "m.onnx", dynamic=sizes, merge=merge, input_size=(3, SIZE, SIZE))


@row("openvino", "the ONNX file of the merged model")
def openvino_run(name: str) -> None:
    import openvino

    model, x = classifier(name).eval(), images()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        tcc.export(model, path, input_size=(3, SIZE, SIZE))
        settings = {"INFERENCE_PRECISION_HINT": "f32"}
        compiled = openvino.Core().compile_model(str(path), "CPU", settings)
        close(torch.from_numpy(compiled(x.numpy())[0]), model(x), 1e-3)


@row("torch", "tcc.export for AOTInductor, merged; strict export of the patched model with open sizes")
def aoti(name: str) -> None:
    model = classifier(name).eval()
    with tempfile.TemporaryDirectory() as folder:
        tcc.export(model, Path(folder) / "m.pt2", "aoti", dynamic=("batch",), input_size=(3, SIZE, SIZE))
    sizes = dict.fromkeys((0,) if name.endswith("cc") else (0, 2, 3), torch.export.Dim.AUTO)
    program = torch.export.export(model, (images(3),), dynamic_shapes=(sizes,), strict=True)
    with torch.no_grad():
        x = torch.randn(4, 3, SIZE, SIZE) if name.endswith("cc") else torch.randn(4, 3, 96, 128)
        close(program.module()(x), model(x))


@row("torchao", "PT2E int8 quantisation, patched and merged")
def pt2e(name: str) -> None:
    from torchao.quantization.pt2e import quantize_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    model, x = classifier(name).eval(), images(8)
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    with torch.no_grad():
        for each in (model, tcc.merge(model)):
            prepared = quantize_pt2e.prepare_pt2e(torch.export.export(each, (x,)).module(), quantizer)
            prepared(x)
            close(quantize_pt2e.convert_pt2e(prepared)(x), model(x), 0.25)


@row("executorch", "XNNPACK, merged")
def executorch_run(name: str) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    model, x = classifier(name).eval(), images(1)
    program = torch.export.export(tcc.merge(model), (x,))
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    method = Runtime.get().load_program(lowered.buffer).load_method("forward")
    close(method.execute([x])[0], model(x), 1e-3)


# ---- the page


def run(cell: Cell, name: str) -> str:
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", message=".*weight_decay acts on")
            cell(name)
    except Expected as error:
        return f"no: {error}"
    except Exception as error:
        traceback.print_exc()
        return f"**no**: {type(error).__name__}: {str(error).strip().splitlines()[0][:120] if str(error) else ''}"
    return "yes"


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [
        "# What patched models work with",
        "",
        "`make ecosystem` (benchmarks/ecosystem.py) wrote this page. Each cell is a run with real steps on the CPU;",
        f"after training no geometry may be out of its bounds or decayed. Models: {', '.join(MODELS.values())}.",
        "",
        f"Python {platform.python_version()}, torch {version('torch')}, timm {version('timm')}.",
        "",
        f"| library | what | {' | '.join(MODELS)} |",
        "|---|---|" + "---|" * len(MODELS),
    ]
    for _, does, cell in ROWS:
        if found := results.get(cell.__name__):
            lines.append(f"| {found['library']} | {does} | {' | '.join(found['cells'])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help="names of cells' functions to run again; all without any")
    rows = parser.parse_args().rows
    for package, _, cell in ROWS:
        if rows and cell.__name__ not in rows:
            continue
        found = [run(cell, name) for name in MODELS.values()]
        print(package, cell.__name__, found, flush=True)
        results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
        results[cell.__name__] = {"library": f"{package} {version(package)}", "cells": found}
        RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        PAGE.write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
