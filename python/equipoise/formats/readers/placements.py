"""Placements: our own, SGLang's, vLLM-Ascend's and TensorRT-LLM's; and whatever else an engine may start with."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np

from equipoise.errors import ConfigError, InvalidInputError, PlacementError, TraceError
from equipoise.formats.archive import MAX_EXPERTS
from equipoise.formats.container import Container, open_container
from equipoise.formats.expert_location import (
    FORMAT,
    OWN_KEYS,
    TOPOLOGY_KEYS,
    VERSION,
    InitialLocation,
    LoadStart,
    MapStart,
    TrivialStart,
)
from equipoise.formats.numbers import as_numbers, human_list
from equipoise.formats.raw_trace import ReadOptions
from equipoise.formats.readers.registry import read_recordings
from equipoise.formats.readers.tensorrt_llm import is_assignments, read_assignments
from equipoise.formats.readers.text_counts import is_json_counts, is_json_lines, read_json_counts
from equipoise.formats.readers.vllm_ascend import is_expert_map, read_expert_map
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.topology import EpTopology

logger = logging.getLogger("equipoise.formats")

_MAP = "physical_to_logical_map"
_NAME = "init_expert_location"


def read_init_expert_location(value: str) -> InitialLocation:
    """What ``--init-expert-location`` names: ``trivial``, JSON itself, a file of a placement, or any recording.

    A file with a map and load starts from the map, as in SGLang. Keys that are not known are named in ``notes``.

    Raises:
        ConfigError: no such file, or it cannot be read.
        PlacementError: it holds neither a map nor load, or values that are none.
    """
    if value == "trivial":
        return TrivialStart()
    inline = value.lstrip().startswith("{")
    shown = "(inline JSON)" if inline else str(Path(value))
    try:
        start = _start(_inline(value) if inline else _opened(Path(value)))
    except ConfigError:
        raise
    except InvalidInputError as error:
        told = str(error).removeprefix(f"trace {shown}: ")
        raise PlacementError(f"{_NAME} {shown}: {told}", field=_NAME) from None
    except Exception as error:  # a tensor of a kind that numpy cannot read, say
        raise PlacementError(
            f"{_NAME} {shown}: holds no numbers that can be read ({type(error).__name__})", field=_NAME
        ) from error
    for note in () if isinstance(start, TrivialStart) else start.notes:
        logger.warning("%s %s: %s", _NAME, shown, note)
    return start


def read_placement(path: str | os.PathLike[str]) -> MapStart:
    """A file that holds a placement, whoever wrote it.

    Raises:
        ConfigError: no such file, or it cannot be read.
        PlacementError: it holds no placement. The message names the file.
    """
    target = Path(path)
    container = _opened(target, name="placement")
    try:
        found = placement_of(container.content)
        if found is None:
            raise PlacementError(f"holds no {_MAP}, no vLLM-Ascend layer_list and no initial_global_assignments")
        return found
    except InvalidInputError as error:
        raise PlacementError(f"placement {target}: {error}", field=error.field) from None


def load_expert_location(path: str | os.PathLike[str]) -> ExpertLocationMetadata:
    """Reads what :func:`~equipoise.formats.expert_location.save_expert_location` wrote, topology included.

    Raises:
        ConfigError: no such file, or it is not JSON.
        PlacementError: it is not our format, or not a valid placement.
    """
    target = Path(path)
    content = _opened(target, name="placement").content
    try:
        if not isinstance(content, dict) or not content.keys() >= OWN_KEYS:
            raise PlacementError(f"must be a JSON object with the keys {sorted(OWN_KEYS)}")
        start = _own(content)
        assert start.topology is not None
        num_experts = content["num_logical_experts"]
        if isinstance(num_experts, bool) or not isinstance(num_experts, int) or not 0 < num_experts <= MAX_EXPERTS:
            raise PlacementError(f"num_logical_experts must be an integer in [1, {MAX_EXPERTS}], got {num_experts!r}")
        return start.to_metadata(start.physical_to_logical_map.shape[0], num_experts, start.topology)
    except InvalidInputError as error:
        raise PlacementError(f"placement {target}: {error}", field=error.field) from None


def placement_of(content: Any) -> MapStart | None:
    """The placement that plain values hold; None if they hold none."""
    if is_expert_map(content):
        p2l, num_ranks = read_expert_map(content)
        topology = EpTopology(num_ranks, 1, p2l.shape[1] // num_ranks)
        return MapStart(p2l, topology=topology, found=f"vLLM-Ascend expert map of {num_ranks} devices")
    if is_assignments(content):
        return MapStart(read_assignments(content), found="TensorRT-LLM assignments")
    if isinstance(content, dict) and _MAP in content:
        if content.keys() & {"format", "dispatch_weights", *TOPOLOGY_KEYS}:
            return _own(content)
        ignored = sorted(str(key) for key in content.keys() - {_MAP})
        notes = (f"keys {human_list(ignored)} are ignored",) if ignored else ()
        return MapStart(_as_map(content[_MAP]), found="SGLang expert location", notes=notes)
    return None


def _start(container: Container) -> InitialLocation:
    placed = placement_of(container.content)
    if placed is not None:
        return placed
    if container.kind == "json" and not is_json_lines(container) and not is_json_counts(container):
        held = human_list(sorted(container.names)) or "nothing"
        raise PlacementError(f"must hold `{_MAP}` or `logical_count`, got {held}")
    if container.path == Path():
        raw = read_json_counts(container, ReadOptions())
    else:
        _, raw = read_recordings([container.path], ReadOptions())[0]
    if not raw.logical_count.any():
        raise PlacementError("logical_count is zero everywhere: there is no load to place experts for")
    return LoadStart(raw.logical_count, raw.found, raw.notes)


def _inline(value: str) -> Container:
    try:
        content = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{_NAME} is neither `trivial`, a file, nor JSON: {error}", field=_NAME) from None
    return Container(Path(), "json", content)


def _opened(path: Path, name: str = _NAME) -> Container:
    try:
        return open_container(path)
    except TraceError as error:
        wanted = "`trivial`, JSON or a file of a placement or of load; " if name == _NAME else "a file of a placement; "
        raise ConfigError(f"{name} must be {wanted}{path}: {error}", field=name) from None
    except OSError as error:
        raise ConfigError(f"{name} {path}: cannot be read: {error.strerror}", field=name) from None


def _own(content: dict[Any, Any]) -> MapStart:
    found = (content.get("format", FORMAT), content.get("version", VERSION))
    if found != (FORMAT, VERSION):
        raise PlacementError(f"format and version must be {(FORMAT, VERSION)}, got {found}")
    ignored = sorted(str(key) for key in content.keys() - OWN_KEYS - {"format", "version"})
    weights = None
    if "dispatch_weights" in content:
        weights = as_numbers(content["dispatch_weights"], "dispatch_weights", 2).astype(np.float32)
    topology = EpTopology(*(content[name] for name in TOPOLOGY_KEYS)) if content.keys() >= {*TOPOLOGY_KEYS} else None
    notes = (f"keys {human_list(ignored)} are ignored",) if ignored else ()
    return MapStart(_as_map(content[_MAP]), weights, topology, "Equipoise expert location", notes)


def _as_map(value: Any) -> np.ndarray:
    array = as_numbers(value, _MAP, 2)
    if array.dtype.kind == "f":
        raise PlacementError(f"{_MAP} must hold integers, got numbers with a decimal point")
    return array.astype(np.int64)
