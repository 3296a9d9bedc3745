"""The versions of other packages that this one needs, compared with what is installed."""

import importlib.metadata

from packaging.requirements import Requirement

__all__ = ["check_versions", "own_requirements"]


def own_requirements() -> list[str]:
    """What pyproject.toml asks for; nothing if this package runs from a folder and is not installed."""
    try:
        return importlib.metadata.requires("timm_contconv") or []
    except importlib.metadata.PackageNotFoundError:
        return []


def check_versions(requirements: list[str]) -> None:
    """Check what is installed, so that a version that is too old is not met as an AttributeError.

    Args:
        requirements: as in pyproject.toml, "torch>=2.10"; those of extras are left out.

    Raises:
        ImportError: a version does not fit. The message says which, and what to do.
    """
    wrong = []
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        installed = importlib.metadata.version(requirement.name)
        if not requirement.specifier.contains(installed, prereleases=True):
            wrong.append((requirement, installed))
    if wrong:
        found = ", ".join(f"{requirement} (installed: {installed})" for requirement, installed in wrong)
        names = " ".join(f"'{requirement}'" for requirement, _ in wrong)
        raise ImportError(f"timm_contconv needs {found}: pip install --upgrade {names}")
