"""Help texts that reflow to the terminal.

tyro takes a field's docstring as it stands in the source, broken lines included. Here each becomes one paragraph.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterable
from typing import Annotated, Any, get_type_hints

import tyro

_done: set[type] = set()


def reflow_help(commands: Iterable[type]) -> None:
    """Gives the fields of commands, and of the dataclasses that they are made of, their help in one paragraph each."""
    for command in commands:
        _reflow(command)


def _reflow(cls: type) -> None:
    if cls in _done:
        return
    _done.add(cls)
    texts = _field_docstrings(cls)
    for name, hint in get_type_hints(cls, include_extras=True).items():
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            _reflow(hint)
        elif name in texts:
            cls.__annotations__[name] = _with_help(hint, texts[name])


def _with_help(hint: Any, text: str) -> Any:
    return Annotated[hint, tyro.conf.arg(help=text)]


def _field_docstrings(cls: type) -> dict[str, str]:
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, after in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
            and isinstance(after.value.value, str)
        ):
            found[field.target.id] = " ".join(after.value.value.split())
    return found
