"""Holds the shape of the package: imports point downwards, the core reads no environment, names stay exported."""

import ast
from pathlib import Path

import pytest

import equipoise

PACKAGE = Path(equipoise.__file__).parent

# Lowest layer first; a file may import from its own layer and from those before it. Listed by first path component.
LAYERS = [
    {"__init__", "errors", "topology", "config", "atomic_file", "cpus", "jit", "order"},
    {"expert_location", "expert_maps", "load_trace", "formats", "metrics", "commands"},
    {"algorithms", "dispatch", "trigger"}
    | {
        f"transfer_{part}"
        for part in (
            *("plan", "sources", "rounds", "pace", "schedule", "steps", "places", "cycles", "program"),
            *("report", "table", "types"),
        )
    }
    | {"placement_alignment"},
    {"communicator", "small_sums", "in_memory_communicator", "pinned_host_communicator", "fault_injection"}
    | {
        "expert_store",
        "expert_memory",
        "expert_pool",
        "pooled_experts",
        "staging",
        "verification",
        "side_stream",
        "layer_vote",
        "updater",
    }
    | {"sums_between_polls", "transfer_pipeline", "transfer_runner", "transfer_worker", "recorder"},
    {
        "background_planner",
        "kernels",
        "transfer_kernels",
        "planning",
        "migration",
        "recording",
        "rebalance_log",
        "manager_replies",
        "rebalance_timing",
        "rebalancing",
        "manager_commands",
        "manager",
    },
    {"engine", "server", "replay", "integrations", "demo_model"},
    {"cli", "__main__"},
]
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}
CORE = 5  # layers below this one belong to any host: no environment, no global state

FILES = sorted(path for path in PACKAGE.rglob("*.py"))


def component(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_modules(tree: ast.AST) -> set[str]:
    """Every module of this package that a file imports, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names if node.module == "equipoise")
    return {name for name in found if name.startswith("equipoise.")}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    if path == PACKAGE / "__init__.py":
        return  # names its exports for type checkers and loads them on first use
    here = LAYER_OF.get(component(path))
    assert here is not None, f"{path.name} has no layer: add it to LAYERS"
    for module in imported_modules(ast.parse(path.read_text())):
        target = module.split(".")[1]
        if target in LAYER_OF:
            assert LAYER_OF[target] <= here, f"{path.name} (layer {here}) imports {module} (layer {LAYER_OF[target]})"


def test_no_import_cycles_between_modules() -> None:
    graph = {}
    for path in FILES:
        graph.setdefault(component(path), set()).update(
            module.split(".")[1] for module in imported_modules(ast.parse(path.read_text()))
        )
    graph = {
        name: {target for target in targets if target in graph and target != name} for name, targets in graph.items()
    }
    graph.pop("__init__")
    while leaves := [name for name, targets in graph.items() if not targets]:
        graph = {name: targets - set(leaves) for name, targets in graph.items() if name not in leaves}
    assert not graph, f"modules that import each other: {graph}"


@pytest.mark.parametrize(
    "path", [f for f in FILES if LAYER_OF.get(component(f), 99) < CORE], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_core_reads_no_environment_and_keeps_no_global_state(path: Path) -> None:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Global), f"{path.name}:{node.lineno} has a global statement"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            assert node.attr not in ("environ", "getenv"), f"{path.name}:{node.lineno} reads the environment"


def test_torch_distributed_only_where_it_belongs() -> None:
    for path in FILES:
        if component(path) in ("communicator", "small_sums", "engine", "integrations"):
            continue
        assert "torch.distributed" not in path.read_text().replace("``torch.distributed``", ""), path.name


def test_engines_are_imported_only_by_integrations() -> None:
    for path in FILES:
        if component(path) == "integrations":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] in ("sglang", "vllm") for name in names), path.name


def test_every_exported_name_can_be_imported() -> None:
    for name in equipoise.__all__:
        assert getattr(equipoise, name) is not None
