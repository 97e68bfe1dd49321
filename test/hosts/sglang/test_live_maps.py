"""SGLang's maps after a commit: rows of the committed layers alone, in place, in both copies."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from equipoise.hosts.sglang.live_maps import SglangMaps
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.topology import EpTopology

TOPOLOGY = EpTopology(2, 1, 3)
NUM_LAYERS, NUM_EXPERTS, NUM_SLOTS = 3, 4, 6  # layer 0 is dense: SGLang has a row for it, we have none
TRIVIAL = torch.arange(NUM_SLOTS).repeat(NUM_LAYERS, 1) % NUM_EXPERTS


def live_maps(*, static: bool = False) -> SimpleNamespace:
    """The fields of SGLang's ExpertLocationMetadata."""
    table = torch.full((NUM_LAYERS, NUM_EXPERTS, NUM_SLOTS), -1)
    for slot in range(NUM_SLOTS):
        table[:, slot % NUM_EXPERTS, slot // NUM_EXPERTS] = slot
    return SimpleNamespace(
        physical_to_logical_map=TRIVIAL.clone(),
        physical_to_logical_map_cpu=TRIVIAL.clone(),
        logical_to_all_physical_map=table.clone(),
        logical_to_all_physical_map_cpu=table.clone(),
        logical_to_all_physical_map_num_valid=(table >= 0).sum(-1),
        logical_to_rank_dispatch_physical_map=table[..., 0].clone() if static else None,
    )


def placement() -> ExpertLocationMetadata:
    """Two MoE layers; in both expert 3 has slots 3, 4 and 5, with shares 1/2, 1/4, 1/4."""
    weights = np.array([[1, 1, 1, 0.5, 0.25, 0.25]] * 2, dtype=np.float32)
    p2l = np.array([[2, 1, 0, 3, 3, 3]] * 2)
    return ExpertLocationMetadata.from_physical_to_logical(p2l, NUM_EXPERTS, TOPOLOGY, dispatch_weights=weights)


def test_committed_layer_is_written_in_place_and_no_other() -> None:
    live = live_maps()
    before = {name: tensor.clone() for name, tensor in vars(live).items() if tensor is not None}
    addresses = {name: getattr(live, name).data_ptr() for name in before}
    SglangMaps(live, rank=0).write([2], placement(), [1])
    for name, tensor in before.items():
        assert torch.equal(getattr(live, name)[:2], tensor[:2]), name
        assert getattr(live, name).data_ptr() == addresses[name]
    assert live.physical_to_logical_map[2].tolist() == [2, 1, 0, 3, 3, 3]
    assert torch.equal(live.physical_to_logical_map_cpu, live.physical_to_logical_map)


def test_dispatch_table_repeats_by_share_and_loading_table_does_not() -> None:
    live = live_maps()
    maps = SglangMaps(live, rank=0)
    maps.write([2], placement(), [1])
    assert live.logical_to_all_physical_map_num_valid[2].tolist() == [1, 1, 1, 3]  # even turns until all are through
    maps.write_shares(2, placement(), 1)
    valid = live.logical_to_all_physical_map_num_valid[2]
    assert valid.tolist() == [1, 1, 1, 4]
    assert sorted(live.logical_to_all_physical_map[2, 3, :4].tolist()) == [3, 3, 4, 5]
    assert live.logical_to_all_physical_map_cpu[2, 3].tolist() == [3, 4, 5, -1, -1, -1]


def test_shorter_table_leaves_nothing_of_the_longer_one() -> None:
    live = live_maps()
    maps = SglangMaps(live, rank=0)
    maps.write([2], placement(), [1])
    maps.write_shares(2, placement(), 1)
    even = ExpertLocationMetadata.from_physical_to_logical(TRIVIAL[1:].numpy(), NUM_EXPERTS, TOPOLOGY)
    maps.write([2], even, [1])
    assert torch.equal(live.logical_to_all_physical_map[2], live_maps().logical_to_all_physical_map[2])


def test_static_dispatch_takes_the_nearest_replica_of_this_rank() -> None:
    live = live_maps(static=True)
    SglangMaps(live, rank=1).write([1, 2], placement(), [0, 1])
    assert live.logical_to_rank_dispatch_physical_map[2].tolist()[:3] == [2, 1, 0]
    assert live.logical_to_rank_dispatch_physical_map[2, 3] in (3, 4, 5)
    assert live.logical_to_all_physical_map_num_valid[2].tolist() == [1, 1, 1, 3]


def test_layer_whose_slots_hold_what_they_held_waits_for_its_shares() -> None:
    """A rank that fails before it takes new shares over must not choose other replicas than the rest."""
    live = live_maps()
    maps = SglangMaps(live, rank=0)
    maps.write([2], placement(), [1])
    maps.write_shares(2, placement(), 1)
    before = live.logical_to_all_physical_map.clone()
    p2l = placement().physical_to_logical_map.numpy()
    reweighted = ExpertLocationMetadata.from_physical_to_logical(p2l, NUM_EXPERTS, TOPOLOGY)
    maps.write([2], reweighted, [1])
    assert torch.equal(live.logical_to_all_physical_map, before)
    maps.write_shares(2, reweighted, 1)
    assert live.logical_to_all_physical_map_num_valid[2].tolist() == [1, 1, 1, 3]
