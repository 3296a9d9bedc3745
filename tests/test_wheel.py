"""The wheel carries the data folders, the command line, and a README whose links lead somewhere."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import timm_contconv as tcc

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_wheel_contains_recipes_and_weights_folders(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "timm_contconv/data/patches/dcls_gauss.toml" in names
    assert "timm_contconv/data/hub/convnext_tiny_dcls.zenodo_in1k/weight.toml" in names
    assert "timm_contconv/data/hub/test_convnext_dcls_gauss.digits/model.safetensors" in names
    assert {"timm_contconv/py.typed", "contconv/py.typed", "contconv/app.py"} <= set(names)
    assert not [name for name in names if name.startswith(("tests/", "docs/", "benchmarks/"))]


def test_its_readme_has_no_links_to_files_of_the_repository(wheel):
    archive = zipfile.ZipFile(wheel)
    metadata = next(archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA"))
    links = re.findall(r"\]\(([^)]+)\)", metadata)
    assert links
    assert [link for link in links if not link.startswith("https://")] == []
    assert "```python" in metadata
    assert f"\nVersion: {tcc.__version__}\n" in metadata


@pytest.mark.slow
def test_an_unpacked_wheel_lists_its_recipes_and_loads_its_weights(wheel, tmp_path):
    """Away from the repository; the other packages are those of this environment."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import timm, timm_contconv as t; print(t.__file__); print(*t.list_patches())\n"
        "print(timm.create_model('test_convnext_dcls_gauss.digits', pretrained=True).pretrained_cfg['file'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=tmp_path)
    location, recipes, weights = output.stdout.splitlines()[-3:]
    assert location.startswith(str(tmp_path))
    assert weights.startswith(str(tmp_path))
    assert {"dcls", "dcls_triangle", "dcls_gauss"} <= set(recipes.split())
