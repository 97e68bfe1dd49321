"""Files of expert placements: our own JSON, and what SGLang's ``--init-expert-location`` takes.

Ours is one JSON object with the names that ``GET /eplb/expert_location`` answers with (a saved answer can be read back)
beside ``format`` and ``version``::

    {"format": "equipoise.expert_location", "version": 1, "num_ranks": 8, "num_nodes": 1, "slots_per_rank": 9,
     "num_logical_experts": 64, "physical_to_logical_map": [[...]], "dispatch_weights": [[...]]}

SGLang's is JSON or ``torch.save`` of an object with exactly one of ``physical_to_logical_map`` (L, P) and
``logical_count`` (L, E) or (steps, L, E).
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from equipoise.errors import ConfigError, InvalidInputError, PlacementError, TraceError
from equipoise.formats.archive import MAX_EXPERTS, require_regular_file
from equipoise.formats.atomic_file import write_whole
from equipoise.formats.sglang import as_numbers, load_torch_file
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.topology import EpTopology

FORMAT = "equipoise.expert_location"
VERSION = 1
MAX_JSON_BYTES = 256 << 20

_TOPOLOGY_KEYS = ("num_ranks", "num_nodes", "slots_per_rank")
_OWN_KEYS = {*_TOPOLOGY_KEYS, "num_logical_experts", "physical_to_logical_map", "dispatch_weights"}


@dataclass(frozen=True)
class TrivialStart:
    """Expert ``p % E`` in slot ``p``."""


@dataclass(frozen=True, eq=False)
class MapStart:
    """A placement that was given; whether every expert has a slot is checked in :meth:`to_metadata`."""

    physical_to_logical_map: np.ndarray  # (L, P) int64
    dispatch_weights: np.ndarray | None = None  # (L, P) float32; uniform over replicas if None

    def to_metadata(
        self,
        num_layers: int,
        num_logical_experts: int,
        topology: EpTopology,
        *,
        max_replicas: int | None = None,
        device: torch.device | str = "cpu",
    ) -> ExpertLocationMetadata:
        """The placement for a model of ``num_layers`` MoE layers.

        Raises:
            PlacementError: it has other layers, slots or experts than the model and the topology.
        """
        if self.physical_to_logical_map.shape[0] != num_layers:
            raise PlacementError(
                f"physical_to_logical_map must have one row for each of the {num_layers} MoE layers, "
                f"got {self.physical_to_logical_map.shape[0]}",
                field="init_expert_location",
            )
        return ExpertLocationMetadata.from_physical_to_logical(
            self.physical_to_logical_map,
            num_logical_experts,
            topology,
            dispatch_weights=self.dispatch_weights,
            max_replicas=max_replicas,
            device=device,
        )


@dataclass(frozen=True, eq=False)
class LoadStart:
    """Recorded load: the caller runs an algorithm on it."""

    logical_count: np.ndarray  # (T, L, E) float64, finite and not negative


InitialLocation = TrivialStart | MapStart | LoadStart


def read_init_expert_location(value: str) -> InitialLocation:
    """What ``--init-expert-location`` names: ``trivial``, or a file (the content decides between JSON and .pt).

    Raises:
        ConfigError: no such file, or it cannot be read.
        PlacementError: it holds both or neither of the two keys, a key more, or values that are no map or no load.
    """
    if value == "trivial":
        return TrivialStart()
    path = Path(value)
    content = _read_file(path)
    try:
        return _interpret(content)
    except InvalidInputError as error:
        raise PlacementError(f"init_expert_location {path}: {error}", field="init_expert_location") from None
    except Exception as error:  # a tensor of a kind that numpy cannot read, say
        raise PlacementError(
            f"init_expert_location {path}: holds no numbers that can be read ({type(error).__name__})",
            field="init_expert_location",
        ) from error


def save_expert_location(metadata: ExpertLocationMetadata, path: str | os.PathLike[str]) -> None:
    """Writes a placement as our own JSON, whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    content = {
        "format": FORMAT,
        "version": VERSION,
        **{name: getattr(metadata.topology, name) for name in _TOPOLOGY_KEYS},
        "num_logical_experts": metadata.num_logical_experts,
        "physical_to_logical_map": metadata.physical_to_logical_map.tolist(),
        "dispatch_weights": metadata.dispatch_weights.tolist(),
    }
    with write_whole(path) as file:
        file.write(json.dumps(content).encode())


def load_expert_location(path: str | os.PathLike[str]) -> ExpertLocationMetadata:
    """Reads what :func:`save_expert_location` wrote, topology included.

    Raises:
        ConfigError: no such file, or it is not JSON.
        PlacementError: it is not our format, or not a valid placement.
    """
    target = Path(path)
    content = _read_file(target)
    try:
        if not isinstance(content, dict) or not content.keys() >= _OWN_KEYS:
            raise PlacementError(f"must be a JSON object with the keys {sorted(_OWN_KEYS)}")
        start = _own(content)
        topology = EpTopology(*(content[name] for name in _TOPOLOGY_KEYS))
        num_experts = content["num_logical_experts"]
        if isinstance(num_experts, bool) or not isinstance(num_experts, int) or not 0 < num_experts <= MAX_EXPERTS:
            raise PlacementError(f"num_logical_experts must be an integer in [1, {MAX_EXPERTS}], got {num_experts!r}")
        return start.to_metadata(start.physical_to_logical_map.shape[0], num_experts, topology)
    except InvalidInputError as error:
        raise PlacementError(f"placement {target}: {error}", field=error.field) from None


def _read_file(path: Path) -> Any:
    """The file's content as plain values, nothing executed."""
    name = "init_expert_location"
    try:
        require_regular_file(path)
        with path.open("rb") as file:
            is_archive = file.read(2) == b"PK"
        if is_archive:
            return load_torch_file(path)
        if path.stat().st_size > MAX_JSON_BYTES:
            raise TraceError(f"larger than the limit of {MAX_JSON_BYTES >> 20} MiB")
        return json.loads(path.read_bytes())
    except TraceError as error:
        raise ConfigError(f"{name} must be `trivial` or a .json/.pt file; {path}: {error}", field=name) from None
    except OSError as error:
        raise ConfigError(f"{name} {path}: cannot be read: {error.strerror}", field=name) from None
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(f"{name} {path}: neither JSON nor a torch.save file: {reason}", field=name) from None


def _interpret(content: Any) -> MapStart | LoadStart:
    if not isinstance(content, dict):
        raise PlacementError(f"must hold an object (a dict), got {type(content).__name__}")
    if content.keys() >= _OWN_KEYS:
        return _own(content)
    keys = {str(key)[:40] for key in content}
    if keys == {"physical_to_logical_map"}:
        return MapStart(_map(content["physical_to_logical_map"]))
    if keys == {"logical_count"}:
        return LoadStart(_load(content["logical_count"]))
    raise PlacementError(
        "must hold exactly one of `physical_to_logical_map` and `logical_count` and nothing else, "
        f"got {sorted(keys)[:8] or 'nothing'}"
    )


def _own(content: dict[Any, Any]) -> MapStart:
    found = (content.get("format", FORMAT), content.get("version", VERSION))
    if found != (FORMAT, VERSION):
        raise PlacementError(f"format and version must be {(FORMAT, VERSION)}, got {found}")
    extra = content.keys() - _OWN_KEYS - {"format", "version"}
    if extra:
        raise PlacementError(f"unknown keys {sorted(map(str, extra))[:8]}")
    p2l = _map(content["physical_to_logical_map"])
    weights = as_numbers(content["dispatch_weights"], "dispatch_weights", 2)
    return MapStart(p2l, weights.astype(np.float32))


def _map(value: Any) -> np.ndarray:
    array = as_numbers(value, "physical_to_logical_map", 2)
    if array.dtype.kind == "f":
        raise PlacementError("physical_to_logical_map must hold integers, got numbers with a decimal point")
    return array.astype(np.int64)


def _load(value: Any) -> np.ndarray:
    is_matrix = (value.dim() if isinstance(value, torch.Tensor) else _depth(value)) == 2
    array = as_numbers(value, "logical_count", 2 if is_matrix else 3).astype(np.float64)
    bad = ~np.isfinite(array) | (array < 0)
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        raise PlacementError(f"logical_count{list(where)} is {array[where]}, must be a finite count of at least 0")
    if not array.any():
        raise PlacementError("logical_count is zero everywhere: there is no load to place experts for")
    return array[None] if is_matrix else array


def _depth(value: Any) -> int:
    depth = 0
    while isinstance(value, list) and depth < 4:
        depth, value = depth + 1, value[0] if value else None
    return depth
