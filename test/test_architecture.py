"""Holds the shape of the package: imports point downwards at public modules, doors name every file, names stay."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

import equipoise

PACKAGE = Path(equipoise.__file__).parent

# Lowest first: a file imports from its own room and from rooms before it. "" is the package's own folder.
ROOMS = (
    "",
    "jit",
    "placement",
    "formats",
    "formats/readers",
    "distributed",
    "load",
    "dispatch/solver",
    "dispatch",
    "algorithms/forecast",
    "algorithms/search",
    "algorithms",
    "transfer",
    "transfer/planning",
    "transfer/memory",
    "transfer/execution",
    "manager",
    "admin",
    "engine/demo_model",
    "engine/checkpoint",
    "engine/model",
    "engine",
    "hosts/sglang/launch",
    "hosts/sglang",
    "hosts",
    "server",
    "replay",
    "replay/views",
    "cli/offline",
    "cli",
)
CORE = ROOMS[: ROOMS.index("manager") + 1]  # belongs to any host: no environment, no global state, no print
MAX_ROOMS, MAX_TOP_FILES, MAX_FILES, MAX_LINES, MAX_FUNCTION_LINES = 15, 6, 16, 250, 60
ON_TOP = ("__init__.py", "__main__.py")  # files of the package's own folder that sit above every room

FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
every_file = pytest.mark.parametrize("file", FILES, ids=str)
every_room = pytest.mark.parametrize("room", [room for room in ROOMS if room and (PACKAGE / room).is_dir()])


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse((PACKAGE / file).read_text())


def room_of(file: Path) -> str:
    return file.parent.as_posix() if file.parent != Path(".") else ""


def file_of(module: str) -> Path | None:
    """The file that holds ``equipoise.a.b``; None if there is no such module."""
    path = Path(*module.split(".")[1:])
    for candidate in (path.with_suffix(".py") if path.name else None, path / "__init__.py"):
        if candidate is not None and (PACKAGE / candidate).is_file():
            return candidate
    return None


def imported_files(tree: ast.AST) -> set[Path]:
    """Every file of the package that a file imports, wherever in it; imports for type checkers alone are left out."""
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    found: set[Path | None] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found.update(file_of(alias.name) for alias in node.names if alias.name.split(".")[0] == "equipoise")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "equipoise":
            for alias in node.names:
                found.add(file_of(f"{node.module}.{alias.name}") or file_of(str(node.module)))
    return {file for file in found if file is not None}


def door(room: str) -> tuple[set[str], set[str]]:
    """The files that a room's ``__init__.py`` names: public ones, which other rooms may import, and private ones."""
    text = ast.get_docstring(tree_of(Path(room) / "__init__.py")) or ""
    public, _, private = text.partition("\nPrivate")
    return tuple(set(re.findall(r"^    (\w+\.py) ", part, re.MULTILINE)) for part in (public, private))  # type: ignore[return-value]


def complaints(file: Path, tree: ast.AST) -> list[str]:
    """What is wrong with the imports of a file: upwards, or past a room's public modules."""
    if file.as_posix() in ON_TOP:
        return []
    here, found = room_of(file), []
    for target in sorted(imported_files(tree)):
        there = room_of(target)
        if here == there or target.name == "__init__.py":
            continue
        if ROOMS.index(there) > ROOMS.index(here):
            found.append(f"{file} imports {target}, which lies above it")
        elif there and target.name not in door(there)[0]:
            found.append(f"{file} imports {target}, which is private to {there}/")
    return found


@every_file
def test_imports_point_downwards_and_at_public_modules(file: Path) -> None:
    assert not complaints(file, tree_of(file))


def test_no_import_cycle() -> None:
    graph = {file: imported_files(tree_of(file)) - {file} for file in FILES if file.as_posix() not in ON_TOP}
    assert not cycle_in(graph), f"files that import each other: {cycle_in(graph)}"


def cycle_in(graph: dict[Path, set[Path]]) -> set[Path]:
    """What is left once every file without imports has been taken away, again and again."""
    graph = {file: targets & set(graph) for file, targets in graph.items()}
    while leaves := {file for file, targets in graph.items() if not targets}:
        graph = {file: targets - leaves for file, targets in graph.items() if file not in leaves}
    return set(graph)


@every_room
def test_door_names_every_file_once(room: str) -> None:
    public, private = door(room)
    files = {path.name for path in (PACKAGE / room).glob("*.py")} - {"__init__.py"}
    assert public | private == files, f"{room}/__init__.py names {sorted(public | private)}"
    assert not public & private


@every_room
def test_door_imports_nothing(room: str) -> None:
    if room == "engine/demo_model":
        return  # a folder of data files: its door is what finds them
    assert not [node for node in tree_of(Path(room) / "__init__.py").body if not isinstance(node, ast.Expr)]


@every_room
def test_public_modules_are_imported_by_other_rooms(room: str) -> None:
    """What nobody outside imports is private: the list of public modules says what a change may break."""
    users = {target for file in FILES for target in imported_files(tree_of(file)) if room_of(file) != room}
    inside = {target.name for target in users if room_of(target) == room}
    entry_points = {"cli": {"main.py"}, "hosts/sglang": {"plugin.py"}}.get(room, set())
    assert door(room)[0] <= inside | entry_points


def test_rooms_and_files_stay_few() -> None:
    top = [path for path in PACKAGE.iterdir() if path.name != "__pycache__" and not path.name.startswith(".")]
    assert sum(path.is_dir() for path in top) <= MAX_ROOMS
    assert sum(path.is_file() for path in top) <= MAX_TOP_FILES
    for room in {room_of(file) for file in FILES}:
        assert room in ROOMS, f"{room}/ has no place in the order of rooms: add it to ROOMS"
        assert sum(room_of(file) == room for file in FILES) <= MAX_FILES, room


@every_file
def test_files_and_functions_stay_short(file: Path) -> None:
    assert (PACKAGE / file).read_text().count("\n") <= MAX_LINES
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{file}:{node.lineno} {node.name} has {lines} lines"


CORE_FILES = [file for file in FILES if room_of(file) in CORE and file.as_posix() not in ON_TOP]


@pytest.mark.parametrize("file", CORE_FILES, ids=str)
def test_core_has_no_environment_no_global_state_and_prints_nothing(file: Path) -> None:
    assert not ambient(tree_of(file))


def ambient(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            found.append(f"line {node.lineno}: global statement")
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv"):
            found.append(f"line {node.lineno}: reads the environment")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            found.append(f"line {node.lineno}: prints; use logging")
    return found


@every_file
def test_torch_distributed_is_called_where_it_belongs(file: Path) -> None:
    if room_of(file).split("/")[0] not in ("distributed", "engine", "hosts"):
        assert "torch.distributed" not in (PACKAGE / file).read_text().replace("``torch.distributed``", "")


@every_file
def test_host_engines_are_imported_by_hosts_alone(file: Path) -> None:
    if room_of(file).split("/")[0] == "hosts":
        return
    for node in ast.walk(tree_of(file)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {name.split(".")[0] for name in names} & {"sglang", "vllm"}


def test_every_exported_name_can_be_imported() -> None:
    for name in equipoise.__all__:
        assert getattr(equipoise, name) is not None


def test_readme_shows_every_room() -> None:
    """README's tree names each folder of the package, and none that is not there."""
    readme = (PACKAGE.parents[1] / "README.md").read_text()
    section = readme.split("## The tree", 1)[1].split("```", 2)[1]
    named = set(re.findall(r"^  ([a-z_]+)/ ", section, re.MULTILINE))
    assert named == {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    files = set(re.findall(r"\b([a-z_]+\.py)\b", section))
    assert files >= {path.name for path in PACKAGE.glob("*.py")} - set(ON_TOP)


def test_tests_lie_where_what_they_test_lies() -> None:
    """Folders of tests are rooms, or what has none; basenames are unique, as pytest imports them without packages."""
    tests = sorted((PACKAGE.parents[1] / "test").rglob("test_*.py"))
    folders = {path.parent.relative_to(PACKAGE.parents[1] / "test").as_posix() for path in tests}
    assert folders <= {*ROOMS, ".", "benchmark", "gpu"} - {""}
    names = [path.name for path in tests]
    assert sorted(set(names)) == sorted(names)


# The checks themselves, each with something it must refuse ---------------------------------------------------------


def test_an_import_upwards_is_refused() -> None:
    tree = ast.parse("from equipoise.manager.manager import EplbManager")
    assert complaints(Path("placement/made_up.py"), tree) == [
        "placement/made_up.py imports manager/manager.py, which lies above it"
    ]


def test_an_import_past_the_public_modules_is_refused() -> None:
    private = sorted(door("transfer/planning")[1])[0]
    tree = ast.parse(f"def late():\n    from equipoise.transfer.planning import {private[:-3]}")
    assert complaints(Path("manager/made_up.py"), tree) == [
        f"manager/made_up.py imports transfer/planning/{private}, which is private to transfer/planning/"
    ]


def test_a_cycle_is_refused() -> None:
    a, b, c = Path("a.py"), Path("b.py"), Path("c.py")
    assert cycle_in({a: {b}, b: {a, c}, c: set()}) == {a, b}


@pytest.mark.parametrize("code", ["print('x')", "import os\nos.environ['X']", "def f():\n    global x"])
def test_ambient_state_is_refused(code: str) -> None:
    assert ambient(ast.parse(code))
