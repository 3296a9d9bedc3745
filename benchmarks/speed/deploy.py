"""Times of plain, patched and merged models in the runtimes that they are deployed with; writes docs/deploy.md's table.

    python -m benchmarks.speed.deploy [--wait]

First everything is exported and compiled, which takes minutes; then the contenders of a runtime run in turns, so that
whatever else the machine does meets them alike. A cell is the median time for one image.
"""

from __future__ import annotations

import argparse
import copy
import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

import timm_contconv as tcc
from benchmarks.common import ROOT, in_turns, machine, medians, write_block
from tests.models_for_tests import awake, scatter
from timm_contconv.export import load_exported

PAGE = ROOT / "docs" / "deploy.md"
START, END = "<!-- times: benchmarks/speed/deploy.py writes this table -->", "<!-- end of times -->"
SIZE = (3, 224, 224)
Run = Callable[[Tensor], object]


def models(base: str, recipe: str) -> dict[str, nn.Module]:
    patched = scatter(awake(timm.create_model(f"{base}_{recipe}"))).eval()
    return {"plain": awake(timm.create_model(base)).eval(), "patched": patched, "merged": tcc.merge(patched)}


def eager(model: nn.Module, folder: Path) -> Run:
    return model


def channels_last(model: nn.Module, folder: Path) -> Run:
    model = model.to(memory_format=torch.channels_last)
    return lambda x: model(x.to(memory_format=torch.channels_last))


def bfloat16(model: nn.Module, folder: Path) -> Run:
    def run(x: Tensor) -> object:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    return run


def compiled(model: nn.Module, folder: Path) -> Run:
    return torch.compile(model)


def onnx_file(model: nn.Module, folder: Path) -> Path:
    path = folder / "model.onnx"
    if not path.exists():
        tcc.export(model, path, dynamic=(), merge=False, input_size=SIZE)
    return path


def onnx_session(path: Path) -> Run:
    run = load_exported(path, "onnx")
    return lambda x: run(x.expand(2, -1, -1, -1).contiguous())  # files of fixed sizes take two images


def onnx(model: nn.Module, folder: Path) -> Run:
    return onnx_session(onnx_file(model, folder))


def aoti(model: nn.Module, folder: Path) -> Run:
    tcc.export(model, folder / "model.pt2", "aoti", dynamic=(), merge=False, input_size=SIZE)
    run = load_exported(folder / "model.pt2", "aoti")
    return lambda x: run(x.expand(2, -1, -1, -1).contiguous())


def openvino_(precision: str) -> Callable[[nn.Module, Path], Run]:
    def prepare(model: nn.Module, folder: Path) -> Run:
        import openvino

        settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        run = openvino.Core().compile_model(str(onnx_file(model, folder)), "CPU", settings)
        return lambda x: run(x.expand(2, -1, -1, -1).numpy())

    return prepare


def int8(model: nn.Module, folder: Path) -> Run:
    """ONNX Runtime's static quantisation, calibrated on random images: for times only."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = 2

        def get_next(self) -> dict[str, object] | None:
            self.left -= 1
            return None if self.left < 0 else {"images": torch.randn(2, *SIZE).numpy()}

    quantize_static(onnx_file(model, folder), folder / "int8.onnx", Images(), quant_format=QuantFormat.QDQ)
    return onnx_session(folder / "int8.onnx")


RUNTIMES: dict[str, tuple[Callable[[nn.Module, Path], Run], int]] = {
    "eager": (eager, 1),
    "eager, channels last": (channels_last, 1),
    "eager, bfloat16 autocast": (bfloat16, 1),
    "torch.compile": (compiled, 1),
    "AOTInductor": (aoti, 2),
    "ONNX Runtime": (onnx, 2),
    "ONNX Runtime, int8": (int8, 2),
    "OpenVINO": (openvino_("f32"), 2),
    "OpenVINO, bfloat16": (openvino_("bf16"), 2),
}


@torch.no_grad()
def times(runs: dict[str, Run], images: int, rounds: int) -> dict[str, float]:
    """Median milliseconds for one image, in turns."""
    x = torch.randn(1, *SIZE)
    seconds = in_turns({name: functools.partial(run, x) for name, run in runs.items()}, rounds)
    return {name: 1e3 * median / images for name, median in medians(seconds).items()}


def prepared(runtime: str, contenders: dict[str, nn.Module], folder: Path) -> dict[str, Run | str]:
    """What to time of each contender, exported or compiled, and warm; or why there is nothing."""
    runs: dict[str, Run | str] = {}
    for name, model in contenders.items():
        place = folder / name
        place.mkdir(exist_ok=True)
        try:
            run = RUNTIMES[runtime][0](copy.deepcopy(model), place)
            with torch.no_grad():
                run(torch.randn(1, *SIZE))
        except Exception as error:
            runs[name] = f"no: {type(error).__name__}"
            print(runtime, name, error)
        else:
            runs[name] = run
    return runs


def row(runtime: str, runs: dict[str, Run | str], rounds: int) -> str:
    """A line of the table."""
    found = times({name: run for name, run in runs.items() if not isinstance(run, str)}, RUNTIMES[runtime][1], rounds)
    cells = [run if isinstance(run, str) else f"{found[name]:.1f} ms" for name, run in runs.items()]
    return f"| {runtime} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="convnext_atto")
    parser.add_argument("--recipe", default="dcls_gauss")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--runtimes", nargs="*", choices=list(RUNTIMES), default=list(RUNTIMES))
    parser.add_argument("--wait", action="store_true", help="export and compile, then wait for Enter before timing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    contenders = models(arguments.base, arguments.recipe)
    lines = ["| runtime | plain | patched | merged |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        runs = {runtime: prepared(runtime, contenders, Path(folder)) for runtime in arguments.runtimes}
        if arguments.wait:
            input("all is compiled; press Enter when the machine is idle")
        start = time.perf_counter()
        for runtime in arguments.runtimes:
            lines.append(row(runtime, runs[runtime], arguments.rounds))
            print(lines[-1], flush=True)
        print(f"timed in {time.perf_counter() - start:.0f} s")
    note = f"Median of {arguments.rounds} rounds, {machine()['processor']}, torch {torch.__version__}."
    write_block(PAGE, START, [note, "", *lines], END)


if __name__ == "__main__":
    main()
