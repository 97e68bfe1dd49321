"""Holds the documents to what they say: commands run, code blocks work, links and paths lead somewhere.

Every command in a document and every target of the Makefile is classified by the first rule of :data:`RULES` that
matches it; one that none matches fails the test. Quick ones run here, long ones under ``make soak``, shortened by their
``--quick``. They run in a copy of the tree without ``out/``; the long ones also without compiled kernels.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from helpers.documents import (
    DOCUMENTS,
    ROOT,
    Document,
    anchors,
    copy_tree,
    make_targets,
    read_documents,
    run_command,
    run_server,
    tree_paths,
)

SAMPLE = "python/equipoise/engine/demo_model/sample_trace.npz"
SUBCOMMAND = r"(\.venv/bin/)?equipoise [a-z-]+"


@dataclass(frozen=True)
class Rule:
    """How commands are run that a pattern matches as a whole."""

    pattern: str
    how: str  # "quick", "long", "server" (long) or the reason why it is not run
    add: str = ""  # appended to the command
    collect_only: bool = False  # pytest names the tests instead of running them


RULES = (
    Rule(r"make( help)?", "quick"),
    Rule(r"make test PYTEST_ARGS=.+", "long", collect_only=True),
    Rule(r"make (test( WORKERS=\d+)?|soak)", "it is what runs this"),
    Rule(r"make (setup|clean test)", "it installs every package; CI starts with it"),
    Rule(r"make (test|bench)-sglang.*", "it installs 2.6 GB, and needs minutes to start each server"),
    Rule(r"make (api|check|clean|dist|format|kernels)", "long"),
    Rule(r"make demo ARGS=--keep-running", "it never ends; `make demo` is run"),
    Rule(r"make (demo|test-gpu|bench-[a-z]+)", "long", add=" ARGS=--quick"),
    Rule(r"python benchmark/[a-z_]+\.py", "long", add=" --quick"),
    Rule(rf"{SUBCOMMAND}", "quick", add=" --help"),
    Rule(rf"{SUBCOMMAND} --help", "quick"),
    Rule(r"(\.venv/bin/)?equipoise (inspect|convert|plan) .+", "quick"),
    Rule(r"equipoise compare gptoss20b_freq_think\.npz .+", "it is made from a trace that is not in the repository"),
    Rule(r"(\.venv/bin/)?equipoise (advise|compare) .+", "long"),
    Rule(r"python -m equipoise\.manager\.warm_up", "it is what `make kernels` runs"),
    Rule(r"(\.venv/bin/)?equipoise replay .+", "quick"),
    Rule(r"(\.venv/bin/)?equipoise explain-transfer .+", "quick"),
    Rule(r"(\.venv/bin/)?equipoise serve .+", "server"),
    Rule(r"(\.venv/bin/)?equipoise doctor .+", "quick", add=" --ep-dispatch-algorithm dynamic"),
    Rule(r"(sglang serve|pip install|pip uninstall) .+", "it needs an environment of SGLang's, and GPUs"),
    Rule(r"pip wheel .+", "long"),
    Rule(r"git clone .+", "it names no repository"),
    Rule(r"pre-commit install", "pre-commit is no dependency of ours"),
)
# What stands for a reader's own file or choice.
PLACEHOLDERS = {
    "TRACE.npz": SAMPLE,
    "TRACE": SAMPLE,
    "RECORDING": SAMPLE,
    "IN": SAMPLE,
    "dump.pt": "dump.npy",
    "OLD.json": "old.json",
    "NEW.json": "new.json",
    "OLD": "old.json",
    "NEW": "new.json",
    "NAME": "deepseek",
    "DIRECTORY": "demo",
}
# Files of other projects, and of readers.
NOT_OURS = re.compile(r"out/.*|.*EPLB/.*")


def shortened(command: str) -> str:
    return command[:50]


def rule_of(command: str) -> Rule:
    for rule in RULES:
        if re.fullmatch(rule.pattern, command):
            return rule
    raise AssertionError(
        f"nothing says how this command is checked: {command}\n"
        f"Add a Rule for it to {Path(__file__).name}: quick (run here), long (run by make soak), or why it is not run."
    )


def every_command() -> list[str]:
    """Commands of all documents and the targets of the Makefile, each once."""
    written = [command for document in read_documents() for command in document.commands()]
    return list(dict.fromkeys([*written, *(f"make {target}" for target in make_targets())]))


def commands_to_run(*kinds: str) -> list[str]:
    """Commands of these kinds; unclassified ones are the business of a test of its own."""
    return [
        command
        for command in every_command()
        if any(re.fullmatch(rule.pattern, command) for rule in RULES) and rule_of(command).how in kinds
    ]


def environment(**more: str) -> dict[str, str]:
    """The caller's, without what a reader's shell would not have; the venv's programs are found first."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "MAKE", "MFLAGS"))}
    return kept | {"PATH": f"{Path('.venv/bin')}{os.pathsep}{os.environ['PATH']}"} | more


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree with what placeholders stand for in it."""
    folder = copy_tree(tmp_path_factory.mktemp("clone"))
    for name, rotated in (("old", 0), ("new", 1)):
        slots = [*range(rotated, 8), *range(rotated)]
        (folder / f"{name}.json").write_text(f'{{"physical_to_logical_map": [{slots}]}}')
    np.save(folder / "dump.npy", np.random.default_rng(0).poisson(50.0, (16, 2, 64)))  # (T, L, E)
    return folder


def run(command: str, folder: Path, timeout: float, **variables: str) -> str:
    rule = rule_of(command)
    words = "|".join(map(re.escape, PLACEHOLDERS))
    line = re.sub(rf"(?<=\s)({words})(?=\s|$)", lambda match: PLACEHOLDERS[match[1]], command + rule.add)
    if "explain-transfer" in line and "--help" not in line:
        line += " --num-ranks 4"
    if rule.collect_only:
        variables["PYTEST_ADDOPTS"] = "--collect-only -q"
    runner = run_server if rule.how == "server" else run_command
    return runner(line, folder, environment(**variables), timeout)


@pytest.mark.parametrize("command", every_command(), ids=shortened)
def test_every_command_is_classified(command: str) -> None:
    assert rule_of(command)


def test_no_rule_is_left_over() -> None:
    used = {rule_of(command) for command in every_command()}
    assert set(RULES) == used


@pytest.mark.parametrize("command", commands_to_run("quick"), ids=shortened)
def test_quick_commands_run(command: str, clone: Path) -> None:
    assert run(command, clone, timeout=280)


@pytest.mark.parametrize("command", commands_to_run("long"), ids=shortened)
def test_arguments_for_pytest_name_what_is_there(command: str) -> None:
    for path in re.findall(r"(?:PYTEST_ARGS=|[' ])(test/[\w/.]+)", command):
        assert (ROOT / path).exists(), f"{command}: there is no {path}"


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("command", commands_to_run("long", "server"), ids=shortened)
def test_long_commands_run_in_a_new_clone(command: str, tmp_path: Path) -> None:
    """With PYTHONPATH the copy's package runs, which has no compiled kernels beside it."""
    folder = copy_tree(tmp_path)
    assert run(command, folder, timeout=1500, PYTHONPATH=str(folder / "python"))


@pytest.mark.parametrize("path", sorted((ROOT / "benchmark").glob("*.py")), ids=lambda path: path.name)
def test_every_benchmark_can_be_quick(path: Path) -> None:
    text = path.read_text()
    if "__main__" in text:
        assert '"--quick"' in text, f"{path.name} has no --quick: nothing could check that it runs"


def python_blocks() -> list[tuple[str, str]]:
    """Those of docs/api.md are signatures."""
    documents = [document for document in read_documents() if document.name != "docs/api.md"]
    return [(document.name, block) for document in documents for block in document.blocks("python")]


@pytest.mark.parametrize(("name", "block"), python_blocks(), ids=lambda value: value if value.endswith(".md") else "")
def test_python_blocks_run(name: str, block: str) -> None:
    exec(compile(block, name, "exec"), {"__name__": name})


@pytest.mark.parametrize("document", read_documents(), ids=lambda document: document.name)
def test_links_lead_somewhere(document: Document) -> None:
    for link in document.links():
        page, _, anchor = link.partition("#")
        target = (document.path.parent / page) if page else document.path
        assert target.exists(), f"{document.name} links to {link}"
        if anchor:
            assert anchor in anchors(target.read_text()), f"{document.name} links to {link}"


@pytest.mark.parametrize("document", read_documents(), ids=lambda document: document.name)
def test_paths_exist(document: Document) -> None:
    """A path may be shortened from its left, as `algorithms/registry.py`, as long as something ends like it."""
    ends = ["/" + path for path in tree_paths()]
    for path in document.paths():
        if not NOT_OURS.fullmatch(path):
            assert any(end.endswith("/" + path) for end in ends), f"{document.name} names {path}, which is not there"


def test_every_page_can_be_found_from_readme() -> None:
    linked = {
        document.path.parent / link.partition("#")[0] for document in read_documents() for link in document.links()
    }
    assert {path for path in DOCUMENTS if path.parent.name == "docs"} <= {path.resolve() for path in linked}
