"""`contconv env`: what a bug report should say of the machine and of what is installed."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterator

import torch
from torch.backends.cpu import get_cpu_capability

from ..ops.algorithms.library import compiler, library_origin
from ..ops.record import cpu_name, record_of

__all__ = ["environment"]

PACKAGES = (
    *("timm_contconv", "torch", "torchvision", "timm", "triton", "numpy", "huggingface-hub", "safetensors", "pydantic"),
    *("typer", "rich", "transformers", "matplotlib", "pillow"),
)
VARIABLES = ("CXX", "OMP_NUM_THREADS", "TIMM_CONTCONV_CACHE", "TIMM_CONTCONV_MEASURE", "XDG_CACHE_HOME")


def environment() -> list[tuple[str, str]]:
    """Names and values, in the order to print. Builds the compiled convolution if need be."""
    return [
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        *((name, _version(name)) for name in PACKAGES),
        ("CPU", cpu_name()),
        ("cores, threads, instructions", f"{os.cpu_count()}, {torch.get_num_threads()}, {get_cpu_capability()}"),
        ("accelerator", _accelerator()),
        ("compiler", _compiler()),
        ("compiled convolution", library_origin()),
        *_measurements(),
        *((name, os.environ[name]) for name in VARIABLES if name in os.environ),
    ]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _accelerator() -> str:
    if not torch.cuda.is_available():
        return "none"
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"


def _compiler() -> str:
    try:
        command = compiler()
        result = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return f"none: {error}"
    return f"{' '.join(command)}, {result.stdout.partition(chr(10))[0]}"


def _measurements() -> Iterator[tuple[str, str]]:
    """How often each algorithm was the fastest, and what must not be used, for each device."""
    for device in ("cpu", *["cuda"] * torch.cuda.is_available()):
        record = record_of(torch.device(device))
        wins = ", ".join(f"{name} {count}" for name, count in record.winners().most_common()) or "nothing yet"
        yield f"measured on {device}", f"{wins} ({record.path})"
        for name, fault in record.dropped.items():
            yield f"not used on {device}", f"{name}: {fault}"
