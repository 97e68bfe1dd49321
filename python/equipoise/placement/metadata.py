"""ExpertLocationMetadata: which logical expert each slot holds, per layer, with its inverse.

The live object of an engine is changed in place, layer by layer, so the addresses of its tensors never change and
captured CUDA graphs stay valid. A planner's result is a fresh object that nobody changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from equipoise.errors import PlacementError
from equipoise.placement.maps import IntMap, build_expert_maps
from equipoise.placement.packed_rows import copy_rows_
from equipoise.topology import EpTopology

_PADDING = (0, 0, 0, -1, 1.0)  # of ExpertLocationMetadata._tensors, where an expert has fewer replicas than fit


@dataclass(frozen=True)
class PlacementDiff:
    """What separates two placements, per layer; each field is an int64 array of shape (L,)."""

    slots_changed: np.ndarray  # slots whose logical expert differs
    moves: np.ndarray  # slots whose new expert was not on that rank before: its weights cross a wire
    cross_node_moves: np.ndarray  # moves whose new expert was not on that node before

    @property
    def layers(self) -> list[int]:
        """Ids of the layers that differ at all, ascending."""
        return [int(layer) for layer in np.flatnonzero(self.slots_changed)]


class ExpertLocationMetadata:
    """A placement and its inverse.

    Attributes:
        physical_to_logical_map: (L, P) int64, the logical expert in each slot.
        logical_to_physical_map: (L, E, X) int64, the slots of each expert in ascending order, padded with -1.
        num_replicas: (L, E) int64, how many slots hold each expert.
        dispatch_weights: (L, P) float32, the share of its expert's tokens that a slot takes; sums to 1 per expert.
        dispatch_cdf: (L, E, X) float32, running sum of the weights over an expert's replicas, 1 from the
            last with a weight on: the form dispatch samples from.
    """

    def __init__(
        self,
        physical_to_logical_map: torch.Tensor,
        logical_to_physical_map: torch.Tensor,
        num_replicas: torch.Tensor,
        dispatch_weights: torch.Tensor,
        dispatch_cdf: torch.Tensor,
        topology: EpTopology,
    ) -> None:
        self.physical_to_logical_map = physical_to_logical_map
        self.logical_to_physical_map = logical_to_physical_map
        self.num_replicas = num_replicas
        self.dispatch_weights = dispatch_weights
        self.dispatch_cdf = dispatch_cdf
        self.topology = topology

    @classmethod
    def from_physical_to_logical(
        cls,
        physical_to_logical_map: IntMap,
        num_logical_experts: int,
        topology: EpTopology,
        *,
        dispatch_weights: npt.ArrayLike | torch.Tensor | None = None,
        max_replicas: int | None = None,
        device: torch.device | str = "cpu",
    ) -> ExpertLocationMetadata:
        """Builds the inverse of a map.

        Args:
            physical_to_logical_map: (L, P) ints.
            num_logical_experts: ``E``.
            topology: where slots lie; ``P`` is its ``num_slots``.
            dispatch_weights: (L, P) shares, non-negative, summing to 1 per expert; uniform over replicas if None.
            max_replicas: ``X``, the replicas an expert can have without a new allocation; as many as the map needs
                if None. The live metadata of an engine takes ``R + 1``, which any valid placement fits.
            device: where the tensors live.

        Raises:
            PlacementError: wrong shape, an id outside [0, E), an expert without a slot or with more than ``X``, weights
                that do not sum to 1. The message names the layer, the experts and the values.
        """
        maps = build_expert_maps(
            physical_to_logical_map,
            num_logical_experts,
            topology,
            dispatch_weights=dispatch_weights,
            max_replicas=max_replicas,
        )
        # Hazard: a tensor that is made inside torch.inference_mode() cannot be written outside of it.
        with torch.inference_mode(mode=False):
            p2l, l2p, num_replicas, weights, cdf = (torch.from_numpy(array).to(device) for array in maps)
        return cls(p2l, l2p, num_replicas, weights, cdf, topology)

    @classmethod
    def trivial(
        cls,
        num_layers: int,
        num_logical_experts: int,
        topology: EpTopology,
        *,
        max_replicas: int | None = None,
        device: torch.device | str = "cpu",
    ) -> ExpertLocationMetadata:
        """Expert ``p % E`` in slot ``p``: contiguous, redundant slots repeat the first experts (as SGLang starts)."""
        row = np.arange(topology.num_slots) % num_logical_experts
        return cls.from_physical_to_logical(
            np.tile(row, (num_layers, 1)), num_logical_experts, topology, max_replicas=max_replicas, device=device
        )

    @property
    def num_layers(self) -> int:
        return self.physical_to_logical_map.shape[0]

    @property
    def num_physical_experts(self) -> int:
        return self.physical_to_logical_map.shape[1]

    @property
    def num_logical_experts(self) -> int:
        return self.logical_to_physical_map.shape[1]

    @property
    def num_redundant_experts(self) -> int:
        return self.num_physical_experts - self.num_logical_experts

    @property
    def max_replicas(self) -> int:
        return self.logical_to_physical_map.shape[2]

    def update_layers_(self, new: ExpertLocationMetadata, layer_ids: Sequence[int]) -> None:
        """Takes over the listed layers of ``new``, in place: no tensor changes its address.

        Raises:
            PlacementError: ``new`` has another shape or topology, or an expert with more replicas than fit here;
                nothing was changed.
        """
        self._require_same_shape(new)
        layers = list(layer_ids)
        if not layers:
            return
        index = torch.tensor(layers, device=new.num_replicas.device)
        most = int(new.num_replicas[index].max())
        if most > self.max_replicas:
            raise PlacementError(
                f"an expert has {most} replicas in the new placement, room is for max_replicas={self.max_replicas}",
                field="num_replicas",
            )
        self._copy_layers(layers, new, layers)

    def update_layer_(self, layer_id: int, physical_to_logical: IntMap) -> None:
        """Sets one layer to a map of its own, in place, with uniform dispatch weights.

        Args:
            physical_to_logical: (P,) ints.

        Raises:
            PlacementError: not a valid map, or more replicas of an expert than fit here; nothing was changed.
        """
        row = torch.as_tensor(physical_to_logical)[None, :]
        new = self.from_physical_to_logical(
            row, self.num_logical_experts, self.topology, max_replicas=self.max_replicas
        )
        self._copy_layers([layer_id], new, [0])

    @torch.inference_mode()
    def _copy_layers(self, layers: Sequence[int], new: ExpertLocationMetadata, new_layers: Sequence[int]) -> None:
        copy_rows_(self._tensors(), new._tensors(), _PADDING, layers, new_layers)

    def _tensors(self) -> tuple[torch.Tensor, ...]:
        maps = self.physical_to_logical_map, self.num_replicas, self.dispatch_weights
        return (*maps, self.logical_to_physical_map, self.dispatch_cdf)

    @torch.inference_mode(mode=False)
    def clone(self, device: torch.device | str | None = None) -> ExpertLocationMetadata:
        """A copy that shares no memory with this one."""
        target = device if device is not None else self.physical_to_logical_map.device
        return ExpertLocationMetadata(
            self.physical_to_logical_map.to(target, copy=True),
            self.logical_to_physical_map.to(target, copy=True),
            self.num_replicas.to(target, copy=True),
            self.dispatch_weights.to(target, copy=True),
            self.dispatch_cdf.to(target, copy=True),
            self.topology,
        )

    def diff(self, new: ExpertLocationMetadata) -> PlacementDiff:
        """Slots changed, moves and cross-node moves from this placement to ``new``, per layer."""
        self._require_same_shape(new)
        old_p2l = self.physical_to_logical_map.cpu().numpy()
        new_p2l = new.physical_to_logical_map.cpu().numpy()
        topology, num_experts = self.topology, self.num_logical_experts
        changed = old_p2l != new_p2l
        moved = changed & ~_was_on(old_p2l, new_p2l, topology.slots_per_rank, num_experts)
        crossed = moved & ~_was_on(old_p2l, new_p2l, topology.slots_per_node, num_experts)
        return PlacementDiff(changed.sum(1), moved.sum(1), crossed.sum(1))

    def check_integrity(self) -> None:
        """Compares both maps, the counts and the weights with each other.

        Raises:
            PlacementError: they disagree; the message prints both sides for the first layer that does.
        """
        p2l = self.physical_to_logical_map.cpu()
        weights = self.dispatch_weights.cpu()
        fresh = ExpertLocationMetadata.from_physical_to_logical(
            p2l, self.num_logical_experts, self.topology, dispatch_weights=weights, max_replicas=self.max_replicas
        )
        for name in ("logical_to_physical_map", "num_replicas", "dispatch_cdf"):
            held, derived = getattr(self, name).cpu(), getattr(fresh, name)
            if torch.equal(held, derived):
                continue
            layer = int((held != derived).flatten(1).any(1).nonzero()[0])
            raise PlacementError(
                f"{name} disagrees with physical_to_logical_map in layer {layer}: it holds "
                f"{held[layer].tolist()}, the map {p2l[layer].tolist()} gives {derived[layer].tolist()}",
                field=name,
            )

    def _require_same_shape(self, new: ExpertLocationMetadata) -> None:
        mine = (self.num_layers, self.num_logical_experts, self.topology)
        theirs = (new.num_layers, new.num_logical_experts, new.topology)
        if mine != theirs:
            raise PlacementError(
                f"placements do not fit together: (layers, logical experts, topology) is {mine} here, {theirs} there",
                field="physical_to_logical_map",
            )


def _was_on(old_p2l: np.ndarray, new_p2l: np.ndarray, slots_per_place: int, num_experts: int) -> np.ndarray:
    """(L, P) bool: whether each slot's new expert was already in the same place (a rank or a node) before."""
    num_layers, num_slots = old_p2l.shape
    num_places = num_slots // slots_per_place
    place = np.arange(num_slots) // slots_per_place
    base = (np.arange(num_layers)[:, None] * num_places + place) * num_experts
    present = np.zeros(num_layers * num_places * num_experts, dtype=bool)
    present[(base + old_p2l).ravel()] = True
    return present[base + new_p2l]
