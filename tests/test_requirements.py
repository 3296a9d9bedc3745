"""What is installed is compared with the bounds of pyproject.toml."""

import importlib.metadata
import tomllib
from pathlib import Path

import pytest
import torch

from timm_contconv.requirements import check_versions

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_versions_of_this_environment_fit():
    check_versions(PROJECT["dependencies"])


def test_a_version_below_the_bound_is_one_sentence():
    with pytest.raises(ImportError) as caught:
        check_versions(["torch>=9.9", "timm>=1", "filelock>=99"])
    filelock = importlib.metadata.version("filelock")
    assert str(caught.value) == (
        f"timm_contconv needs torch>=9.9 (installed: {importlib.metadata.version('torch')}), filelock>=99 (installed:"
        f" {filelock}): pip install --upgrade 'torch>=9.9' 'filelock>=99'"
    )


def test_builds_of_a_version_and_extras_do_not_matter():
    version = torch.__version__.split("+")[0]
    check_versions([f"torch<={version}.post9", "matplotlib>=99; extra == 'viz'"])
