from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from equipoise import EpTopology, ExpertLocationMetadata
from equipoise.dispatch.choice import Batch
from equipoise.dispatch.dispatcher import ExpertDispatcher
from equipoise.dispatch.policy import DispatchPolicy
from equipoise.dispatch.replicas import cumulative_weights, nearest_replicas, weyl_uniform
from equipoise.dispatch.turns import CpuTurns, TurnsTables
from equipoise.errors import ConfigError, LoadError, PlacementError
from equipoise.load.recorder import count_slots
from helpers.torch_turns import TorchTurns
from helpers.turn_cases import TurnCase, turn_cases

TOPOLOGY = EpTopology(8, 2, 2)  # 16 slots, 4 ranks a node


def random_placement(seed: int, num_layers: int = 2, num_experts: int = 6) -> ExpertLocationMetadata:
    rng = np.random.default_rng(seed)
    extra = TOPOLOGY.num_slots - num_experts
    rows = [
        rng.permutation(np.concatenate([np.arange(num_experts), rng.integers(0, num_experts, extra)]))
        for _ in range(num_layers)
    ]
    return ExpertLocationMetadata.from_physical_to_logical(
        np.stack(rows), num_experts, TOPOLOGY, max_replicas=extra + 1
    )


@given(st.integers(0, 10**6), st.integers(0, 7), st.sampled_from(["static", "dynamic", "batch"]))
@settings(deadline=None, max_examples=60)
def test_every_id_goes_to_a_slot_that_holds_its_expert(seed: int, rank: int, algorithm: str) -> None:
    metadata = random_placement(seed)
    dispatcher = ExpertDispatcher(metadata, rank=rank, policy=DispatchPolicy(algorithm))
    topk = torch.from_numpy(np.random.default_rng(seed).integers(-1, 6, (9, 3)))
    for layer in range(2):
        slots = dispatcher.dispatch(layer, topk)
        assert (slots[topk < 0] == -1).all()
        held = metadata.physical_to_logical_map[layer][slots[topk >= 0]]
        assert torch.equal(held, topk[topk >= 0])


@given(st.integers(0, 10**6), st.integers(0, 7))
@settings(deadline=None, max_examples=60)
def test_static_takes_the_nearest_replica(seed: int, rank: int) -> None:
    metadata = random_placement(seed)
    chosen = nearest_replicas(metadata.logical_to_physical_map, TOPOLOGY, rank)

    def distance(slot: int) -> int:
        there = TOPOLOGY.rank_of_slot(slot)
        return 0 if there == rank else 1 if TOPOLOGY.same_node(there, rank) else 2

    for layer in range(2):
        for expert in range(6):
            slots = [s for s in metadata.logical_to_physical_map[layer, expert].tolist() if s >= 0]
            assert chosen[layer, expert] in slots
            assert distance(int(chosen[layer, expert])) == min(map(distance, slots))


@pytest.mark.parametrize("shares", [[0.5, 0.5], [0.1, 0.9], [1 / 3, 2 / 3]])
def test_dynamic_follows_the_weights_even_in_steps_of_one_token(shares: list[float]) -> None:
    topology = EpTopology(2, 1, 2)
    weights = [[shares[0], 1, shares[1], 1]]
    metadata = ExpertLocationMetadata.from_physical_to_logical([[0, 1, 0, 2]], 3, topology, dispatch_weights=weights)
    dispatcher = ExpertDispatcher(metadata, rank=1, policy=DispatchPolicy("dynamic"))
    hits = 0
    for _ in range(300):
        hits += int(dispatcher.dispatch(0, torch.zeros(1, 1, dtype=torch.int64))[0, 0] == 0)
        dispatcher.advance(1)
    assert abs(hits / 300 - shares[0]) < 0.02


def test_a_replica_of_weight_zero_gets_nothing() -> None:
    metadata = ExpertLocationMetadata.from_physical_to_logical(
        [[0, 1, 0, 0]], 2, EpTopology(2, 1, 2), dispatch_weights=[[0, 1, 1, 0]]
    )
    slots = ExpertDispatcher(metadata, rank=0, policy=DispatchPolicy("dynamic")).dispatch(
        0, torch.zeros(500, 2, dtype=torch.int64)
    )
    assert slots.unique().tolist() == [2]


def test_uniform_numbers_stay_below_one_and_spread_evenly_over_any_run() -> None:
    first = torch.tensor([0, 2**40, 2**62])
    for start in first:
        values = weyl_uniform(start + torch.arange(64), 4, layer_id=57, rank=511)
        assert values.min() >= 0
        assert values.max() < 1
        for choice in range(4):
            gaps = values[:, choice].sort().values.diff()
            assert gaps.max() < 4 / 64  # random numbers would leave gaps of ~ log(64) / 64


def test_live_maps_are_seen_after_an_update() -> None:
    metadata = random_placement(1)
    target = random_placement(2)
    for algorithm in ("static", "dynamic", "batch"):
        live = metadata.clone()
        dispatcher = ExpertDispatcher(live, rank=3, policy=DispatchPolicy(algorithm))
        live.update_layers_(target, [1])
        dispatcher.refresh([1])
        fresh = ExpertDispatcher(live.clone(), rank=3, policy=DispatchPolicy(algorithm))
        topk = torch.arange(6)[:, None]
        for layer in range(2):
            assert torch.equal(dispatcher.dispatch(layer, topk), fresh.dispatch(layer, topk))


@pytest.mark.parametrize("algorithm", ["static", "dynamic", "batch"])
def test_what_lies_outside_is_refused_not_written_to(algorithm: str) -> None:
    """Kernels on a CPU are given addresses and check nothing."""
    dispatcher = ExpertDispatcher(random_placement(0), rank=3, policy=DispatchPolicy(algorithm))
    ids, columns = torch.zeros(8, 2, dtype=torch.int64), TOPOLOGY.num_slots + 1
    for layer in (-1, 2):
        with pytest.raises(ConfigError, match=f"layer_id must be from 0 to 1, got {layer}"):
            dispatcher.dispatch(layer, ids)
    for bounds in ([0, 1, 2, 3, 9, 9, 9, 9, 9], [0, 1, 2, 4, 3, 5, 6, 7, 8], [0, 0, 0, -1, 0, 0, 0, 0, 8]):
        with pytest.raises(ConfigError, match="rank_bounds must rise from 0 to the number of tokens, 8"):
            dispatcher.dispatch(0, ids, rank_bounds=bounds)
    if algorithm == "batch":  # the own tokens lie outside those of the scope
        everybody = ExpertDispatcher(random_placement(0), rank=3, policy=DispatchPolicy("batch", "all"))
        for bounds in ([4, 0, 0, 2, 3, 5, 6, 7, 8], [0, 1, 2, 3, 8, 5, 6, 7, 7]):
            with pytest.raises(ConfigError, match="rank_bounds must rise"):
                everybody.dispatch(0, ids, rank_bounds=bounds)
    good = torch.zeros(2, columns, dtype=torch.int32)
    for counts in (good.long(), good[:1], torch.zeros(2, columns - 1, dtype=torch.int32), good.t().contiguous().t()):
        with pytest.raises(LoadError, match="counts must be contiguous int32 of shape"):
            dispatcher.dispatch(0, ids, counts=counts)
    dispatcher.dispatch(1, ids, rank_bounds=range(9), counts=good)
    assert good.sum(1).tolist() == [0, 2]


def test_an_empty_batch_is_fine() -> None:
    for algorithm in ("static", "dynamic", "batch"):
        dispatcher = ExpertDispatcher(random_placement(0), rank=0, policy=DispatchPolicy(algorithm))
        assert dispatcher.dispatch(0, torch.zeros(0, 2, dtype=torch.int64)).shape == (0, 2)


ALGORITHMS = ("static", "dynamic", "batch")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(12,), (12, 2), (3, 4, 2), (0, 2)])
def test_ids_keep_their_dtype_and_shape(algorithm: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    metadata = random_placement(4)
    ids = torch.randint(-1, 6, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    slots = ExpertDispatcher(metadata, rank=2, policy=DispatchPolicy(algorithm)).dispatch(1, ids)
    assert slots.dtype == dtype
    assert slots.shape == ids.shape
    held = metadata.physical_to_logical_map[1][slots[ids >= 0].long()]
    assert torch.equal(held, ids[ids >= 0].long())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("num_unpadded", [4, torch.tensor(4), torch.tensor([4], dtype=torch.int32)])
@pytest.mark.parametrize("shape", [(9,), (9, 2)])
def test_tokens_beyond_the_unpadded_ones_get_no_slot_and_are_not_counted(
    algorithm: str, num_unpadded: int | torch.Tensor, shape: tuple[int, ...]
) -> None:
    metadata = random_placement(5)
    policy = DispatchPolicy(algorithm)
    ids = torch.randint(0, 6, shape, generator=torch.Generator().manual_seed(0))
    padded = ExpertDispatcher(metadata, rank=0, policy=policy).dispatch(0, ids, num_unpadded=num_unpadded)
    alone = ExpertDispatcher(metadata, rank=0, policy=policy).dispatch(0, ids[:4])
    assert torch.equal(padded[:4], alone)
    assert (padded[4:] == -1).all()


@pytest.mark.parametrize("rank", [0, 1])
def test_static_never_takes_a_replica_of_weight_zero(rank: int) -> None:
    metadata = ExpertLocationMetadata.from_physical_to_logical(
        [[0, 1, 0, 1]], 2, EpTopology(2, 1, 2), dispatch_weights=[[0, 1, 1, 0]]
    )
    dispatcher = ExpertDispatcher(metadata, rank=rank, policy=DispatchPolicy("static"))
    assert dispatcher.dispatch(0, torch.tensor([[0, 1]])).tolist() == [[2, 1]]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_lost_ranks_get_no_tokens(algorithm: str) -> None:
    metadata = ExpertLocationMetadata.from_physical_to_logical(
        [[0, 1, 0, 2, 1, 2]], 3, EpTopology(3, 1, 2), dispatch_weights=[[1, 1, 0, 1, 0, 0]]
    )
    policy, live = DispatchPolicy(algorithm), [1, 2]
    slots = ExpertDispatcher(metadata, rank=1, policy=policy, live_ranks=live).dispatch(0, torch.tensor([0, 1, 2] * 20))
    assert set(slots.tolist()) <= {2, 3, 4, 5}
    with pytest.raises(PlacementError, match="expert 0 of layer 0 has no replica"):
        ExpertDispatcher(metadata, rank=1, policy=policy, live_ranks=[2])


def test_a_profiler_sees_dispatch() -> None:
    dispatcher = ExpertDispatcher(random_placement(0), rank=0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        dispatcher.dispatch(0, torch.zeros(1, 1, dtype=torch.int64))
    assert "equipoise.dispatch" in {event.key for event in profile.key_averages()}


@given(turn_cases(max_tokens=60))
@settings(deadline=None, max_examples=100)
def test_the_compiled_turns_are_those_of_torch(case: TurnCase) -> None:
    metadata = case.metadata.clone()
    tables = TurnsTables(metadata, case.rank, nearest=case.nearest, live_ranks=case.live_ranks)
    ways = TorchTurns(tables), CpuTurns(tables)
    for step in case.steps:
        counts = [torch.zeros(2, metadata.num_physical_experts + 1, dtype=torch.int32) for _ in ways]
        slots = [
            way.dispatch(Batch(case.layer, step.ids, step.bounds, counted, step.num_unpadded))
            for way, counted in zip(ways, counts, strict=True)
        ]
        assert torch.equal(*slots)
        assert torch.equal(*counts)
        for way in ways:
            way.advance(step.advance)
        metadata.update_layers_(case.target, step.moves)
        if step.moves:
            tables.refresh(step.moves)


def test_sums_of_weights_never_fall_and_weight_zero_adds_nothing() -> None:
    """Whatever the order in which a device sums: here one that is off by the last bit."""
    weights = torch.tensor([[0.25, 0.0, 0.5, 0.25, 0.0], [0.0, 0.0, 1.0, 0.0, 0.0], [0.0] * 5])

    class OffByOne(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.cumsum.default and result.is_floating_point():
                result[..., 1] += 2.0**-24
                result[..., 2] -= 2.0**-24
            return result

    with OffByOne():
        sums = cumulative_weights(weights)
    assert (sums.diff(dim=-1) >= 0).all()
    assert sums[0, 0] == sums[0, 1] == 0.25
    assert sums[0, 3:].tolist() == [1.0, 1.0]
    assert sums[1].tolist() == [0.0, 0.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_dispatcher_counts_the_slots_of_its_own_tokens(algorithm: str) -> None:
    metadata = random_placement(6)
    dispatcher = ExpertDispatcher(metadata, rank=1, policy=DispatchPolicy(algorithm))
    ids = torch.randint(-1, 6, (20, 3), generator=torch.Generator().manual_seed(0))
    counts = torch.full((2, 17), 5, dtype=torch.int32)
    slots = dispatcher.dispatch(1, ids, rank_bounds=[0, 4, *[20] * 7], counts=counts)
    assert slots.shape == (16, 3)
    expected = torch.full((2, 17), 5, dtype=torch.int32)
    count_slots(expected[1], slots)
    assert torch.equal(counts, expected)
    assert expected[1, -1] > 5  # some were none
