"""Writes docs/api.md from the public names' own signatures and docstrings: `make api`.

The source is read, not imported: the page is the same on every Python, and torch is not waited for.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "python" / "equipoise"

HEAD = """# API

Made from the docstrings by `make api`; a test holds that it is current. First the names that `import equipoise` offers,
in full; then, a line each, what hosts, new algorithms and tools import from its modules. What is not listed may change
without a word in `CHANGELOG.md`.
"""
# What hosts, new algorithms and tools build on, in the order of the package's own layers.
MODULES = (
    "errors",
    "config",
    "topology",
    "placement.metadata",
    "placement.balancedness",
    "distributed.protocol",
    "distributed.communicator",
    "load.recorder",
    "load.trace",
    "dispatch.dispatcher",
    "algorithms.problem",
    "algorithms.registry",
    "algorithms.rebalance",
    "transfer.planning.plan",
    "transfer.planning.types",
    "manager.commands",
    "manager.host",
    "manager.manager",
    "admin.routes",
)
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def parse(module: str) -> ast.Module:
    return ast.parse(path_of(module).read_text())


def path_of(module: str) -> Path:
    return PACKAGE / Path(*module.split(".")).with_suffix(".py")


def homes_of_exported_names() -> dict[str, str]:
    """Module under ``equipoise`` of each name in its ``__all__``, as its ``__init__.py`` says."""
    for node in ast.parse((PACKAGE / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOME_OF_NAME":
            return {name: home.removeprefix("equipoise.") for name, home in ast.literal_eval(node.value).items()}
    raise AssertionError("equipoise/__init__.py has no _HOME_OF_NAME")


def find(name: str, module: str) -> Definition:
    """The definition of a name that a module has, or imports from another one."""
    for node in parse(module).body:
        if isinstance(node, Definition) and node.name == name:
            return node
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            return find(name, str(node.module).removeprefix("equipoise."))
    raise AssertionError(f"equipoise.{module} has no {name}")


def definitions(body: list[ast.stmt]) -> Iterator[Definition]:
    """Public classes and functions, in the order of the source."""
    for node in body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield node


def signature(node: Definition) -> str:
    """``name(arguments) -> result`` without ``self``; a dataclass shows its fields as arguments."""
    if isinstance(node, ast.ClassDef):
        made = next((inner for inner in node.body if getattr(inner, "name", "") == "__init__"), None)
        if isinstance(made, ast.FunctionDef):
            return f"{node.name}({arguments(made)})"
        if is_dataclass(node):
            return f"{node.name}({', '.join(ast.unparse(field) for field in fields(node))})"
        return node.name
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{node.name}({arguments(node)}){result}"


def arguments(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    return re.sub(r"^(self|cls)(, )?", "", ast.unparse(node.args))


def is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


def fields(node: ast.ClassDef) -> list[ast.AnnAssign]:
    return [inner for inner in node.body if isinstance(inner, ast.AnnAssign) and ast.unparse(inner.target)[0] != "_"]


def summary(node: Definition) -> str:
    """The first paragraph of the docstring, as one line of Markdown."""
    text = ast.get_docstring(node) or ""
    return markdown(" ".join(text.split("\n\n")[0].split()))


def markdown(text: str) -> str:
    """Docstrings mark code as reStructuredText does: roles and double backquotes become code spans."""
    text = re.sub(r":\w+:`~?[\w.]*?(\w+)`", r"`\1`", text)
    return text.replace("``", "`").replace("::\n", ":\n")


def in_full(node: Definition) -> str:
    """Signature, and the docstring as it stands."""
    text = inspect.cleandoc(ast.get_docstring(node) or "")
    parts = [f"### `{node.name}`", f"```python\n{signature(node)}\n```", markdown_paragraphs(text)]
    if isinstance(node, ast.ClassDef):
        methods = [f"- {line}" for line in members(node)]
        parts.append("\n".join(methods))
    return "\n\n".join(part for part in parts if part)


def markdown_paragraphs(text: str) -> str:
    """Sections such as Args, whose lines are indented, keep their lines; other paragraphs flow."""
    paragraphs = []
    for paragraph in text.split("\n\n"):
        if re.match(r"(Args|Returns|Raises|Attributes):", paragraph) or paragraph.startswith("    "):
            paragraphs.append(f"```text\n{paragraph}\n```")
        else:
            paragraphs.append(markdown(paragraph))
    return "\n\n".join(paragraphs)


def members(node: ast.ClassDef) -> Iterator[str]:
    """A line of Markdown for each public method and property."""
    for inner in definitions(node.body):
        is_property = any(ast.unparse(each).endswith("property") for each in inner.decorator_list)
        shown = inner.name if is_property else signature(inner)
        said = summary(inner)
        yield f"`{node.name}.{shown}`" + (f": {said}" if said else "")


def page() -> str:
    """The whole page."""
    parts = [HEAD, "## `import equipoise`"]
    for name, module in sorted(homes_of_exported_names().items()):
        parts.append(in_full(find(name, module)))
    for module in MODULES:
        tree = parse(module)
        link = path_of(module).relative_to(ROOT)
        parts.append(f"## [`equipoise.{module}`](../{link})")
        parts.append(markdown(" ".join((ast.get_docstring(tree) or "").split("\n\n")[0].split())))
        lines = []
        for node in definitions(tree.body):
            said = summary(node)
            lines.append(f"- `{signature(node)}`" + (f": {said}" if said else ""))
            if isinstance(node, ast.ClassDef):
                lines += [f"  - {line}" for line in members(node)]
        parts.append("\n".join(lines))
    return "\n\n".join(part for part in parts if part).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "api.md")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is out of date")
    arguments = parser.parse_args()
    path = arguments.out
    if arguments.check:
        if not path.exists() or path.read_text() != page():
            raise SystemExit(f"out of date: {path}; run `make api`")
        return
    path.write_text(page())
    print(f"written: {path}")


if __name__ == "__main__":
    main()
