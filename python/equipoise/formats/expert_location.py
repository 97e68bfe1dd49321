"""What an engine can start with, and our own file of a placement.

Ours is one JSON object with the names that ``GET /eplb/expert_location`` answers with (a saved answer can be read back)
beside ``format`` and ``version``::

    {"format": "equipoise.expert_location", "version": 1, "num_ranks": 8, "num_nodes": 1, "slots_per_rank": 9,
     "num_logical_experts": 64, "physical_to_logical_map": [[...]], "dispatch_weights": [[...]]}

:mod:`equipoise.formats.readers.placements` reads it, and every neighbour's.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from equipoise.errors import PlacementError
from equipoise.formats.atomic_file import write_whole
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.topology import EpTopology

FORMAT = "equipoise.expert_location"
VERSION = 1

TOPOLOGY_KEYS = ("num_ranks", "num_nodes", "slots_per_rank")
OWN_KEYS = {*TOPOLOGY_KEYS, "num_logical_experts", "physical_to_logical_map", "dispatch_weights"}


@dataclass(frozen=True)
class TrivialStart:
    """Expert ``p % E`` in slot ``p``."""


@dataclass(frozen=True, eq=False)
class MapStart:
    """A placement that was given; whether every expert has a slot is checked in :meth:`to_metadata`."""

    physical_to_logical_map: np.ndarray  # (L, P) int64
    dispatch_weights: np.ndarray | None = None  # (L, P) float32; uniform over replicas if None
    topology: EpTopology | None = None  # where the file says it
    found: str = "expert map"
    notes: tuple[str, ...] = ()  # what was ignored, a sentence each

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

    logical_count: np.ndarray  # (T, L, E), finite and not negative
    found: str = "recorded load"
    notes: tuple[str, ...] = ()


InitialLocation = TrivialStart | MapStart | LoadStart


def expert_location_content(metadata: ExpertLocationMetadata) -> dict[str, Any]:
    """The JSON value of our own format."""
    return {
        "format": FORMAT,
        "version": VERSION,
        **{name: getattr(metadata.topology, name) for name in TOPOLOGY_KEYS},
        "num_logical_experts": metadata.num_logical_experts,
        "physical_to_logical_map": metadata.physical_to_logical_map.tolist(),
        "dispatch_weights": metadata.dispatch_weights.tolist(),
    }


def save_expert_location(metadata: ExpertLocationMetadata, path: str | os.PathLike[str]) -> None:
    """Writes a placement as our own JSON, whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    with write_whole(path) as file:
        file.write(json.dumps(expert_location_content(metadata)).encode())
