"""Train a small model of every method on scikit-learn's digits and store it in hub/, where the wheel takes it from.

    python -m benchmarks.digits_weights [NAME ...] [--epochs N] [--seeds N] [--threads N]

A model is trained from every seed; the first seed's weights are stored, in 8 and 16 bits, and read back. Prints the
accuracy of what was stored, on the 450 images that training does not see, and that of the other seeds.
"""

import argparse
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

from timm_contconv.cli.digits import Digits, accuracy, load_digits, train_on_digits
from timm_contconv.hub.card import CardFacts, write_card
from timm_contconv.patching.record import require_record

HUB = Path(__file__).parent.parent / "hub"
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


def stored(key: str, value: Tensor) -> Tensor:
    """A tensor as it is stored: large weights in 8 bits, small ones in 16, positions and statistics as they are."""
    if not value.is_floating_point() or "geometry" in key or "running_" in key:
        return value.contiguous()
    return value.to(torch.float8_e4m3fn if value.ndim > 1 and value.numel() >= LARGE else torch.float16).contiguous()


def train(name: str, digits: Digits, epochs: int, seed: int) -> tuple[nn.Module, float]:
    """A trained model and its accuracy with the weights as they are stored."""
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=10)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"{name}, seed {seed}", total=epochs * (len(digits.train_labels) // BATCH_SIZE))
        train_on_digits(model, digits, epochs, batch_size=BATCH_SIZE, seed=seed, advance=lambda: progress.advance(task))
    before = accuracy(model, digits)
    state = {key: stored(key, value).to(value.dtype) for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    after = accuracy(model, digits)
    print(f"{name}, seed {seed}: {100 * before:.2f} % as trained, {100 * after:.2f} % as stored", flush=True)
    return model, after


def store(name: str, model: nn.Module, accuracies: list[float], digits: Digits, epochs: int) -> Path:
    """Write weights, weight.toml and the card to hub/NAME.digits."""
    folder = HUB / f"{name}.{TAG}"
    folder.mkdir(exist_ok=True)
    weights = {key: stored(key, value) for key, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    value, spread = round(100 * accuracies[0], 2), [round(100 * a, 2) for a in accuracies]
    text = (
        f"Trained on scikit-learn's handwritten digits, 32×32 pixels, for {epochs} epochs by"
        f" benchmarks/digits_weights.py. It gets {value} % of the {len(digits.test_labels)} held-out images right"
        f" (seed 0, which is stored). Over {len(spread)} seeds: mean {statistics.mean(spread):.2f} %, from"
        f" {min(spread):.2f} to {max(spread):.2f} %. It comes with timm_contconv and needs no network."
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
            "description": "Trained on scikit-learn's digits by benchmarks/digits_weights.py",
        },
        "training": {"epochs": epochs, "batch_size": BATCH_SIZE, "seed": 0, "day": date.today()},
        "results": [
            {
                "dataset": "scikit-learn digits",
                "split": "450 held-out images",
                "metric": "top1",
                "value": value,
                "seeds": spread,
                "by": "benchmarks/digits_weights.py",
            }
        ],
    }
    (folder / "weight.toml").write_text(tomli_w.dumps(values), encoding="utf-8")
    result = EvalResult(
        "image-classification", "digits", "scikit-learn digits", "accuracy", value,
        dataset_split="450 held-out images",
    )  # fmt: skip
    facts = CardFacts(f"{name}.{TAG}", f"{name}.{TAG}", license="apache-2.0", eval_results=[result], text=text)
    write_card(model, require_record(model), facts, folder)
    return folder


def pixel_statistics(digits: Digits) -> tuple[float, float]:
    """Mean and standard deviation of the training pixels, as shares of the brightest: what timm's transforms take."""
    lowest, highest = float(digits.train_images.min()), float(digits.train_images.max())  # of black and white
    return round(-lowest / (highest - lowest), 6), round(1 / (highest - lowest), 6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES, help="registered models")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="more only help where nothing else runs")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    digits = load_digits()
    for name in arguments.names:
        trained = [train(name, digits, arguments.epochs, seed) for seed in range(arguments.seeds)]
        accuracies = [value for _, value in trained]
        folder = store(name, trained[0][0], accuracies, digits, arguments.epochs)
        size = (folder / "model.safetensors").stat().st_size
        print(f"{folder.name}: {[round(100 * a, 2) for a in accuracies]} % over seeds, {size:,} bytes", flush=True)


if __name__ == "__main__":
    main()
