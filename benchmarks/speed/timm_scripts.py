"""timm's released train.py and validate.py under `contconv run`, on digits saved as images: what ran, and to what.

    python -m benchmarks.speed.timm_scripts PATH/TO/pytorch-image-models [--device cpu] [--output FILE]

The scripts are not in timm's wheel: PATH is a checkout of github.com/huggingface/pytorch-image-models. Prints, for
each set of flags, whether the script ran to its end, the last top-1 accuracy that it reports, and the seconds.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torchvision.utils import save_image

from benchmarks.common import arguments, new_parser, write_results
from timm_contconv.cli.digits import load_digits
from timm_contconv.paths import data_folder

MODEL = "test_convnext_dcls"
ALL = "--amp --amp-dtype bfloat16 --model-ema --model-ema-decay 0.99 --grad-accum-steps 2 --channels-last"
PLUGIN = ("--position-lr-scale", "5", "--penalty", "1", "--penalty-power", "2")
DATA = "--num-classes 10 --input-size 3 32 32 --mean 0.3 0.3 0.3 --std 0.35 0.35 0.35 --workers 1"
TRAINING = "--opt adamw --lr 4e-3 --weight-decay 0.05 --batch-size 64 --epochs 3 --warmup-epochs 1 --no-aug"
DEVICE_IDS = "device_ids=[device]"  # what train.py gives to DDP, which takes none on a CPU


def save_digits(folder: Path) -> None:
    """The digits as train.py reads images: folder/split/class/number.png."""
    digits = load_digits()
    splits = {
        "train": (digits.train_images, digits.train_labels),
        "validation": (digits.test_images, digits.test_labels),
    }
    for split, (images, labels) in splits.items():
        for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            path = folder / split / str(label)
            path.mkdir(parents=True, exist_ok=True)
            save_image(image / 4 + 0.5, path / f"{number}.png")


def run(name: str, command: Sequence[str], folder: Path) -> dict[str, object]:
    """Run one command, print and return what came of it."""
    start = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    output = done.stdout + done.stderr
    accuracies = re.findall(r'"top1": ([\d.]+)', output)
    result = {
        "flags": name,
        "ran": done.returncode == 0,
        "top1": float(accuracies[-1]) if accuracies else None,
        "seconds": round(time.perf_counter() - start, 1),
        "error": None if done.returncode == 0 else [line for line in output.splitlines() if "Error" in line][-1:],
    }
    print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in result.items() if key != "flags"), flush=True)
    return result


def commands(scripts: Path, folder: Path, device: str) -> dict[str, list[str]]:
    """What is run, by name, in order: later ones take up what earlier ones left."""
    contconv = ["-m", "timm_contconv", "run"]
    data = ["--data-dir", str(folder / "digits"), "--device", device, *DATA.split()]
    train = [str(scripts / "train.py"), *data, *TRAINING.split(), "--model", MODEL]

    def training(name: str, flags: str) -> list[str]:
        return [sys.executable, *contconv, *PLUGIN, *train, *flags.split(), "--output", "out", "--experiment", name]

    listed = {
        f"{ALL} --layer-decay 0.9 --clip-grad 1": training("all", f"{ALL} --layer-decay 0.9 --clip-grad 1"),
        "--resume": training("resumed", f"{ALL} --layer-decay 0.9 --clip-grad 1 --resume out/all/checkpoint-1.pth.tar"),
        "--torchcompile --grad-checkpointing": training("compiled", "--torchcompile --grad-checkpointing"),
        "--opt muon": training("muon", "--opt muon"),
    }
    checkpoint = ["--checkpoint", "out/all/model_best.pth.tar", "--use-ema", "--model", MODEL, "--crop-pct", "1"]
    listed["validate.py --use-ema"] = [
        sys.executable, *contconv, str(scripts / "validate.py"), *data, *checkpoint, "--results-file", "results.json",
    ]  # fmt: skip
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    distributed = [*train[1:], *ALL.split(), "--output", "out", "--experiment", "distributed"]
    listed["two processes"] = [*torchrun, *contconv, *PLUGIN, str(_distributed(scripts, folder, device)), *distributed]
    for path in sorted(data_folder("hub").glob("*/train.yaml")):
        short = "--batch-size 64 --grad-accum-steps 2 --epochs 1 --warmup-epochs 0 --cooldown-epochs 0 --output out"
        listed[f"--config {path.parent.name}/train.yaml"] = [
            sys.executable, *contconv, str(scripts / "train.py"), "--config", str(path), *data, "--model", MODEL,
            *short.split(), "--experiment", path.parent.name,
        ]  # fmt: skip
    return listed


def _distributed(scripts: Path, folder: Path, device: str) -> Path:
    """train.py as it is, or on a CPU a copy that gives DDP no device."""
    script = scripts / "train.py"
    if device != "cpu":
        return script
    text = script.read_text(encoding="utf-8")
    if text.count(DEVICE_IDS) != 1:
        raise ValueError(f"{script}: expected {DEVICE_IDS} once; this version of timm is new to this benchmark")
    copy = folder / "train_on_cpu.py"
    copy.write_text(text.replace(DEVICE_IDS, "device_ids=None"), encoding="utf-8")
    return copy


def main() -> None:
    parser = new_parser(__doc__, "timm_scripts.json")
    parser.add_argument("scripts", type=Path, metavar="PATH", help="a checkout of pytorch-image-models")
    parser.add_argument("--device", default="cpu")
    options = arguments(parser)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_digits(folder / "digits")
        listed = commands(options.scripts.resolve(), folder, options.device)
        results = [run(name, command, folder) for name, command in listed.items()]
    write_results(options.output, {"results": results})


if __name__ == "__main__":
    main()
