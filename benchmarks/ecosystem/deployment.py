"""Rows of runtimes, compilers and quantisers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import timm_contconv as tcc
from timm_contconv.export import load_exported

from .rows import SIZE, Expected, classifier, close, images, woken

__all__ = ["ROWS"]


def onnx_merged(name: str) -> None:
    """tcc.export of the merged model with open sizes, at three sizes, to 1e-5 of the largest output"""
    compare_onnx(name, merge=True)


def onnx_patched(name: str) -> None:
    """tcc.export with merge=False, the same; CC at three fixed sizes"""
    compare_onnx(name, merge=False)


def compare_onnx(name: str, merge: bool) -> None:
    model, sides = classifier(name).eval(), [(SIZE, SIZE), (96, 128), (160, 96)]
    fixed = name.endswith("cc") and not merge
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        for height, width in sides:
            if fixed or not path.exists():
                dynamic = ("batch",) if fixed else ("batch", "height", "width")
                tcc.export(model, path, dynamic=dynamic, merge=merge, input_size=(3, height, width))
            x = torch.randn(3, 3, height, width)
            close(load_exported(path, "onnx")(x)[0], model(x), 1e-5)


def openvino_run(name: str) -> None:
    """The ONNX file of the merged model"""
    import openvino

    model, x = classifier(name).eval(), images()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        tcc.export(model, path, input_size=(3, SIZE, SIZE))
        settings = {"INFERENCE_PRECISION_HINT": "f32"}
        compiled = openvino.Core().compile_model(str(path), "CPU", settings)
        close(torch.from_numpy(compiled(x.numpy())[0]), model(x), 1e-3)


def aoti(name: str) -> None:
    """tcc.export for AOTInductor, merged"""
    with tempfile.TemporaryDirectory() as folder:
        tcc.export(classifier(name), Path(folder) / "m.pt2", "aoti", input_size=(3, SIZE, SIZE))


def strict_export(name: str) -> None:
    """torch.export of the patched model, strict, with open sizes (CC: open batch); of SMPConv smpconv_tiny, too"""
    models = [classifier(name).eval()]
    if name.endswith("smp"):
        models.append(woken(timm.create_model("smpconv_tiny", depths=(1, 1, 1, 1), dims=(16, 24, 32, 48))).eval())
    fixed = name.endswith("cc")
    sizes = dict.fromkeys((0,) if fixed else (0, 2, 3), torch.export.Dim.AUTO)
    x = torch.randn(4, 3, SIZE, SIZE) if fixed else torch.randn(4, 3, 96, 128)
    for model in models:
        program = torch.export.export(model, (images(3),), dynamic_shapes=(sizes,), strict=True)
        with torch.no_grad():
            close(program.module()(x), model(x))


def quantised(model: nn.Module, x: Tensor) -> nn.Module:
    """In int8 by torchao's PT2E, calibrated on x."""
    from torchao.quantization.pt2e import quantize_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    with torch.no_grad():
        prepared = quantize_pt2e.prepare_pt2e(torch.export.export(model, (x,)).module(), quantizer)
        prepared(x)
        return quantize_pt2e.convert_pt2e(prepared)


def pt2e_merged(name: str) -> None:
    """PT2E int8 quantisation of the merged model"""
    model, x = classifier(name).eval(), images(8)
    close(quantised(tcc.merge(model), x)(x), model(x), 0.25)


def pt2e_patched(name: str) -> None:
    """PT2E int8 quantisation of the patched model"""
    model, x = classifier(name).eval(), images(8)
    try:
        close(quantised(model, x)(x), model(x), 0.25)
    except ValueError as error:
        if "Expected get_attr node" not in str(error):
            raise
        raise Expected("torchao folds the norm into a kernel that must be a parameter: merge first") from error


def fx_quantisation(name: str) -> None:
    """FX int8 quantisation (deprecated in PyTorch), merged and patched"""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    model, x = classifier(name).eval(), images(8)
    with torch.no_grad():
        expected = model(x)
        for each in (tcc.merge(model), model):
            prepared = prepare_fx(each, get_default_qconfig_mapping(), (x,))
            prepared(x)
            close(convert_fx(prepared)(x), expected, 0.25)


def executorch_merged(name: str) -> None:
    """XNNPACK, merged"""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    model = classifier(name).eval()
    compare_executorch(tcc.merge(model), model, [XnnpackPartitioner()])


def executorch_patched(name: str) -> None:
    """portable kernels, patched (XNNPACK asks for kernels that are constants: merge first)"""
    model = classifier(name).eval()
    compare_executorch(model, model, [])


def compare_executorch(lowered: nn.Module, model: nn.Module, partitioners: list[Any]) -> None:
    """The first module, lowered and run by ExecuTorch, against the second."""
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    x = images(1)
    program = to_edge_transform_and_lower(torch.export.export(lowered, (x,)), partitioner=partitioners)
    method = Runtime.get().load_program(program.to_executorch().buffer).load_method("forward")
    close(method.execute([x])[0], model(x), 1e-3)


ROWS = (
    ("onnxruntime", onnx_merged),
    ("onnxruntime", onnx_patched),
    ("openvino", openvino_run),
    ("torch", aoti),
    ("torch", strict_export),
    ("torch", fx_quantisation),
    ("torchao", pt2e_merged),
    ("torchao", pt2e_patched),
    ("executorch", executorch_merged),
    ("executorch", executorch_patched),
)
