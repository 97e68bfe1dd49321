"""The .npz of a recording that a server of ours dumps."""

from __future__ import annotations

from typing import Any

from equipoise.errors import TraceError
from equipoise.formats.archive import array_names, read_array, read_json
from equipoise.formats.container import Container
from equipoise.formats.raw_trace import RawTrace, ReadOptions

NPZ_FORMAT = "equipoise.load_trace"
NPZ_VERSION = 1


def is_npz_trace(container: Container) -> bool:
    return container.kind == "npz" and "header" in container.names


def read_npz_trace(container: Container, _options: ReadOptions) -> RawTrace:
    """The dump that a server of ours writes: arrays beside a JSON header.

    Raises:
        TraceError: the header is of another format or version, or lists other arrays than there are.
    """
    archive = container.content
    header = read_json(archive, "header")
    if not isinstance(header, dict) or header.get("format") != NPZ_FORMAT:
        raise TraceError(f"its header does not say format {NPZ_FORMAT!r}")
    if header.get("version") != NPZ_VERSION:
        raise TraceError(f"version {header.get('version')!r} of the format; this program reads version {NPZ_VERSION}")
    metadata = header.get("metadata")
    if not isinstance(metadata, dict):
        raise TraceError("metadata must be a JSON object")
    names = array_names(archive) - {"header"}
    if header.get("arrays") != sorted(names):  # a member whose name was damaged would be missed silently
        raise TraceError(f"its header lists the arrays {header.get('arrays')}, it holds {sorted(names)}")
    return RawTrace(
        read_array(archive, "logical_count"),
        read_array(archive, "forward_pass_ids"),
        read_array(archive, "physical_count") if "physical_count" in names else None,
        read_array(archive, "physical_to_logical_map") if "physical_to_logical_map" in names else None,
        metadata,
        found="Equipoise dump",
    )


def is_placement(content: Any) -> bool:
    return isinstance(content, dict) and "physical_to_logical_map" in content and "records" not in content
