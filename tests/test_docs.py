"""Every Python block of the README and of docs/ runs; blocks of one page share their names, in order."""

import re
from pathlib import Path

import pytest

from .helpers import slow_but

ROOT = Path(__file__).parent.parent
FOLDERS = [ROOT / "docs", ROOT / "docs" / "papers"]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
PAGES += [page for folder in FOLDERS for page in sorted(folder.glob("*.md"))]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


WITH_CODE = [page for page in PAGES if python_blocks(page)]
SLOW = {ROOT / "docs" / name for name in ("deploy.md", "warm_start.md", "distributed.md")}


@pytest.mark.parametrize("page", slow_but(WITH_CODE, *set(WITH_CODE) - SLOW), ids=name_of)
def test_code_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": page.stem}
    for number, block in enumerate(python_blocks(page), start=1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)
    assert names.keys() > {"__name__"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_to_files_of_the_repository_hold(page):
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []
