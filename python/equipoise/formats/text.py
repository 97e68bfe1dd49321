"""Text files of numbers: JSON, one JSON value a line, YAML or CSV, told apart by content."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any, Literal

import yaml

from equipoise.errors import TraceError

TextKind = Literal["json", "jsonl", "yaml", "csv"]

MAX_TEXT_BYTES = 256 << 20
MAX_YAML_BYTES = 32 << 20


def open_text(path: Path) -> tuple[TextKind, Any]:
    """Kind and content of a text file; see :func:`parse_text`."""
    size = path.stat().st_size
    if size > MAX_TEXT_BYTES:
        raise TraceError(f"a text of {size} bytes, larger than the limit of {MAX_TEXT_BYTES >> 20} MiB")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise TraceError(
            "of no known kind: neither an archive (.npz, torch.save), .npy, safetensors, JSON, YAML nor CSV"
        ) from None
    return parse_text(text)


def parse_text(text: str) -> tuple[TextKind, Any]:
    """JSON, one JSON value a line, YAML, or CSV; whichever the text is.

    Raises:
        TraceError: none of them.
    """
    stripped = text.lstrip()
    if not stripped:
        raise TraceError("the file is empty")
    if stripped[0] in "{[":
        try:
            return "json", json.loads(text)
        except RecursionError:
            raise TraceError("JSON that is nested too deeply") from None
        except ValueError as error:
            lines = _json_lines(text)
            if lines is None:
                raise TraceError(f"JSON that is truncated or damaged ({error})") from None
            return "jsonl", lines
    first = stripped.split("\n", 1)[0]
    if ":" in first and "," not in first.split(":", 1)[0]:
        return "yaml", _yaml(text)
    try:
        rows = [row for row in csv.reader(io.StringIO(text)) if row and not row[0].lstrip().startswith("#")]
    except csv.Error as error:
        raise TraceError(f"text that is no CSV either ({error})") from None
    if not rows or len(rows[0]) < 2:
        raise TraceError("a text that is neither JSON, YAML nor CSV with at least two columns")
    return "csv", rows


def _json_lines(text: str) -> list[Any] | None:
    """One value a line, a cut-off last line left out; None if the lines are no JSON."""
    lines = [line for line in text.splitlines() if line.strip()]
    values = []
    for index, line in enumerate(lines):
        try:
            values.append(json.loads(line))
        except (ValueError, RecursionError):
            if index == len(lines) - 1 and values:
                break  # the writer was cut off
            return None
    return values if len(lines) > 1 else None


class _PlainLoader(yaml.SafeLoader):
    """Safe, and without aliases: a few of those can stand for a structure of any size."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise TraceError("YAML with aliases, which a list of experts has no use for")
        return super().compose_node(parent, index)


def _yaml(text: str) -> Any:
    if len(text) > MAX_YAML_BYTES:
        raise TraceError(f"YAML larger than the limit of {MAX_YAML_BYTES >> 20} MiB")
    try:
        content = yaml.load(text, Loader=_PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise TraceError(f"YAML that is truncated or damaged ({' '.join(str(error).split())[:120]})") from None
    if not isinstance(content, dict):
        raise TraceError("a text that is neither JSON, YAML with keys, nor CSV")
    return content
