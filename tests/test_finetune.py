"""examples/finetune.py: resuming, logging, folders of images."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest
import timm
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchvision.utils import save_image

from timm_contconv.cli.digits import Digits, load_digits

SCRIPT = Path(__file__).parent.parent / "examples" / "finetune.py"


@pytest.fixture(scope="module")
def finetune():
    spec = importlib.util.spec_from_file_location("finetune", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["finetune"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["finetune"]


def run(finetune, folder, *arguments):
    return finetune.main(finetune.parse_arguments(["--device", "cpu", "--output", str(folder), *arguments]))


def interrupt_before_epoch(finetune, monkeypatch, epoch):
    train_epoch = finetune.train_epoch

    def interrupted(training, *arguments):
        if training.epoch == epoch:
            raise KeyboardInterrupt
        return train_epoch(training, *arguments)

    monkeypatch.setattr(finetune, "train_epoch", interrupted)


@pytest.mark.slow
def test_a_resumed_training_is_bitwise_the_one_that_was_not_interrupted(finetune, tmp_path, monkeypatch):
    digits = load_digits()
    few = {field.name: getattr(digits, field.name)[:64] for field in dataclasses.fields(digits)}
    monkeypatch.setattr(finetune, "load_digits", lambda: Digits(**few))
    arguments = ("--epochs", "2", "--model", "test_convnext_dcls", "--penalty", "0.1", "--batch-size", "32")
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    run(finetune, whole, *arguments)
    with monkeypatch.context() as patch:
        interrupt_before_epoch(finetune, patch, 1)
        with pytest.raises(KeyboardInterrupt):
            run(finetune, halves, *arguments)
    torch.manual_seed(123)  # a new process would start from another state
    run(finetune, halves, *arguments, "--resume")
    expected, resumed = (torch.load(folder / "checkpoint.pt") for folder in (whole, halves))
    for checkpoint in (expected, resumed):
        checkpoint["optimizer"] = checkpoint["optimizer"]["state"]  # the groups hold strings
    torch.testing.assert_close(resumed, expected, atol=0, rtol=0)


def test_an_image_folder_trains_a_patched_model_and_logs_its_envelopes(finetune, tmp_path):
    write_image_folder(tmp_path / "data", images=16)
    arguments = ("--model", "test_resnet", "--patch", "genv", "--epochs", "1", "--batch-size", "8", "--amp", "bfloat16")
    training = run(finetune, tmp_path / "out", "--data", str(tmp_path / "data"), *arguments)
    saved = timm.create_model(f"local-dir:{tmp_path / 'out' / 'model'}", pretrained=True).eval()
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(saved(images), training.ema.module(images))
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
    tags = events.Tags()
    assert {"kernels", "σ of envelopes"} <= set(tags["images"])
    assert "geometry/conv1.0.raw_sigma" in tags["histograms"]
    assert {"loss", "lr", "accuracy/model", "accuracy/ema", "spread/conv1.0.raw_sigma"} <= set(tags["scalars"])


def test_resuming_where_nothing_is_says_so(finetune, tmp_path):
    with pytest.raises(FileNotFoundError, match="start without it"):
        run(finetune, tmp_path, "--resume")


def write_image_folder(folder, images):
    """The first digits, as --data takes them."""
    digits = load_digits()
    for split, values, labels in (
        ("train", digits.train_images, digits.train_labels),
        ("validation", digits.test_images, digits.test_labels),
    ):
        for index in range(images):
            path = folder / split / str(labels[index].item())
            path.mkdir(parents=True, exist_ok=True)
            save_image(values[index] / 4 + 0.5, path / f"{index}.png")
