"""Train a small model of every method on scikit-learn's digits and store it in hub/, where the wheel takes it from.

    python -m benchmarks.papers.digits_weights [NAME ...] [--epochs N] [--seeds N] [--threads N]

A model is trained from every seed; the first seed's weights are stored, in 8 and 16 bits, and read back. Prints the
accuracy of what was stored, on the 450 images that training does not see, and that of the other seeds.
"""

import statistics
from datetime import date
from pathlib import Path

import timm
import tomli_w
import torch
from huggingface_hub import EvalResult
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.common import ROOT, arguments, new_parser
from timm_contconv.cli.digits import Digits, accuracy, load_digits, train_on_digits
from timm_contconv.hub.card import write_card
from timm_contconv.layers import ConvReplacement

HUB = ROOT / "hub"
SCRIPT = "benchmarks/papers/digits_weights.py"
TAG = "digits"
NAMES = (
    "test_convnext_dcls_gauss",
    "test_convnext_smp",
    "test_convnext_flex",
    "test_resnet_genv",
    "test_resnet_cc",
)
#: matrices from so many values on are stored in 8 bits
LARGE = 1024
BATCH_SIZE = 64


def stored(model: nn.Module) -> dict[str, Tensor]:
    """The state as it is stored: large weights in 8 bits, small ones in 16, geometry and statistics as they are."""
    layers = [module for module in model.modules() if isinstance(module, ConvReplacement)]
    geometry = {value.data_ptr() for layer in layers for value in layer.geometry.values()}
    state = {}
    for key, value in model.state_dict().items():
        exact = not value.is_floating_point() or value.data_ptr() in geometry or "running_" in key
        small = torch.float8_e4m3fn if value.ndim > 1 and value.numel() >= LARGE else torch.float16
        state[key] = (value if exact else value.to(small)).contiguous()
    return state


def train(name: str, digits: Digits, epochs: int, seed: int) -> tuple[nn.Module, float]:
    """A trained model and its accuracy with the weights as they are stored."""
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=10)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"{name}, seed {seed}", total=epochs * (len(digits.train_labels) // BATCH_SIZE))
        train_on_digits(model, digits, epochs, batch_size=BATCH_SIZE, seed=seed, advance=lambda: progress.advance(task))
    before = accuracy(model, digits)
    model.load_state_dict(stored(model))
    after = accuracy(model, digits)
    print(f"{name}, seed {seed}: {100 * before:.2f} % as trained, {100 * after:.2f} % as stored", flush=True)
    return model, after


def store(name: str, model: nn.Module, accuracies: list[float], digits: Digits, epochs: int) -> Path:
    """Write weights, weight.toml and the card to hub/NAME.digits."""
    folder = HUB / f"{name}.{TAG}"
    folder.mkdir(exist_ok=True)
    save_file(stored(model), folder / "model.safetensors", {"format": "pt"})
    value, spread = round(100 * accuracies[0], 2), [round(100 * a, 2) for a in accuracies]
    text = (
        f"Trained on scikit-learn's handwritten digits, 32×32 pixels, for {epochs} epochs by {SCRIPT}. It gets"
        f" {value} % of the {len(digits.test_labels)} held-out images right (seed 0, which is stored). Over"
        f" {len(spread)} seeds: mean {statistics.mean(spread):.2f} %, from {min(spread):.2f} to {max(spread):.2f} %. It"
        " comes with timm_contconv and needs no network."
    )
    mean, std = pixel_statistics(digits)
    values = {
        "architecture": name,
        "tag": TAG,
        "pretrained_cfg": {
            "num_classes": 10,
            "input_size": [3, 32, 32],
            "pool_size": [1, 1],
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "mean": [mean] * 3,
            "std": [std] * 3,
            "license": "apache-2.0",
            "description": f"Trained on scikit-learn's digits by {SCRIPT}",
        },
        "training": {"epochs": epochs, "batch_size": BATCH_SIZE, "seed": 0, "day": date.today()},
        "results": [
            {
                "dataset": "scikit-learn digits",
                "split": "450 held-out images",
                "metric": "top1",
                "value": value,
                "seeds": spread,
                "by": SCRIPT,
            }
        ],
    }
    (folder / "weight.toml").write_text(tomli_w.dumps(values), encoding="utf-8")
    result = EvalResult(
        "image-classification", "digits", "scikit-learn digits", "accuracy", value,
        dataset_split="450 held-out images",
    )  # fmt: skip
    write_card(model, folder, f"{name}.{TAG}", f"{name}.{TAG}", license="apache-2.0", eval_results=[result], text=text)
    return folder


def pixel_statistics(digits: Digits) -> tuple[float, float]:
    """Mean and standard deviation of the training pixels, as shares of the brightest: what timm's transforms take."""
    lowest, highest = float(digits.train_images.min()), float(digits.train_images.max())  # of black and white
    return round(-lowest / (highest - lowest), 6), round(1 / (highest - lowest), 6)


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("names", nargs="*", default=NAMES, help="registered models")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    options = arguments(parser)
    digits = load_digits()
    for name in options.names:
        trained = [train(name, digits, options.epochs, seed) for seed in range(options.seeds)]
        accuracies = [value for _, value in trained]
        folder = store(name, trained[0][0], accuracies, digits, options.epochs)
        size = (folder / "model.safetensors").stat().st_size
        print(f"{folder.name}: {[round(100 * a, 2) for a in accuracies]} % over seeds, {size:,} bytes", flush=True)


if __name__ == "__main__":
    main()
