"""The solver of quotas: exact sums, near the optimum of a linear program, the same bits in torch and numba."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from equipoise import EpTopology, ExpertLocationMetadata, rebalance_experts
from equipoise.dispatch.policy import DispatchPolicy
from equipoise.dispatch.solver.assign import assign_slots, quota_inverses
from equipoise.dispatch.solver.assign_numba import dispatch_batch
from equipoise.dispatch.solver.controls import ROTATION
from equipoise.dispatch.solver.quotas import solve_quotas
from equipoise.dispatch.solver.table_addresses import table_addresses
from equipoise.dispatch.tables import DispatchTables
from equipoise.errors import ConfigError, PlacementError
from equipoise.load.recorder import count_slots
from helpers.dispatch_cases import DispatchCase, dispatch_cases, placement


def largest_loads(tables: DispatchTables, layer: int, counts: np.ndarray, controls: torch.Tensor) -> tuple[int, float]:
    """What the solver reaches, and the least that any shares could reach."""
    arrays = tables.layer(layer)
    quotas = solve_quotas(torch.from_numpy(counts), arrays, controls).numpy()
    base = np.zeros(tables.num_ranks)
    single = arrays.rank_of_single.numpy()
    np.add.at(base, single[single >= 0], counts[single >= 0])
    rows, choices = np.nonzero(arrays.rank.numpy() >= 0)
    ranks = arrays.rank.numpy()[rows, choices]
    loads = base.copy()
    np.add.at(loads, ranks, quotas[rows, choices])
    if not len(rows):
        return int(loads.max()), float(base.max())
    by_rank = scipy.sparse.coo_matrix(
        (np.ones(len(rows)), (ranks, np.arange(len(rows)))), (tables.num_ranks, len(rows) + 1)
    ).tolil()
    by_rank[:, -1] = -1
    num_rows = rows.max() + 1
    by_expert = scipy.sparse.coo_matrix((np.ones(len(rows)), (rows, np.arange(len(rows)))), (num_rows, len(rows) + 1))
    cost = np.zeros(len(rows) + 1)
    cost[-1] = 1
    tokens = counts[arrays.expert.numpy()[:num_rows]].astype(float)
    solved = linprog(cost, by_rank.tocsr(), -base, by_expert.tocsr(), tokens, method="highs")
    return int(loads.max()), float(solved.fun)


@given(dispatch_cases())
@settings(deadline=None, max_examples=80)
def test_quotas_are_whole_tokens_that_add_up(case: DispatchCase) -> None:
    tables = DispatchTables(case.metadata).layer(0)
    counts = case.count(case.ids)
    quotas = solve_quotas(counts, tables, case.controls)
    assert (quotas >= 0).all()
    assert (quotas[tables.slot < 0] == 0).all()
    assert torch.equal(
        quotas.sum(1)[tables.expert >= 0].to(torch.int32), counts[tables.expert[tables.expert >= 0].long()]
    )


@given(dispatch_cases())
@settings(deadline=None, max_examples=150)
def test_the_ranks_of_a_scope_meet_the_quotas_exactly(case: DispatchCase) -> None:
    tables = DispatchTables(case.metadata).layer(0)
    quotas = solve_quotas(case.count(case.ids), tables, case.controls)
    rotation = int(case.controls[ROTATION])
    parts = [
        assign_slots(case.ids[a:b], quotas, tables, rotation, case.count(case.ids[:a]))
        for a, b in ((0, case.first), (case.first, case.last), (case.last, len(case.ids)))
    ]
    slots = torch.cat(parts)
    assert slots.dtype == case.ids.dtype
    assert torch.equal(slots, assign_slots(case.ids, quotas, tables, rotation))
    none = (case.ids < 0) | (case.ids >= case.num_experts)
    assert torch.equal(slots < 0, none)
    assert torch.equal(case.metadata.physical_to_logical_map[0][slots[~none].long()], case.ids[~none].long())
    taken = torch.bincount(slots[~none].long(), minlength=case.metadata.num_physical_experts)
    real = tables.slot >= 0
    assert torch.equal(taken[tables.slot[real].long()].to(torch.int32), quotas[real])


@given(dispatch_cases())
@settings(deadline=None, max_examples=150)
def test_numba_computes_the_bits_of_the_reference(case: DispatchCase) -> None:
    tables = DispatchTables(case.metadata)
    mine = case.ids[case.first : case.last]
    before = case.count(case.ids[: case.first])
    quotas = solve_quotas(case.count(case.ids), tables.layer(0), case.controls)
    expected = assign_slots(mine, quotas, tables.layer(0), int(case.controls[ROTATION]), before)
    gathered = torch.stack([before, case.count(mine), case.count(case.ids[case.last :])])
    everything, alone = case.ids.long().contiguous(), mine.long().contiguous()
    addresses, width = table_addresses(tables.host, case.controls.numpy()), everything.shape[1]
    num_columns = case.metadata.num_physical_experts + 1
    for ids, scope, own, counts in (
        (everything, (0, len(everything)), (case.first, case.last), gathered[:0]),
        (alone, (0, len(alone)), (0, len(alone)), gathered),
    ):
        slots = torch.full(mine.shape, -7, dtype=torch.int64)
        recorded = torch.ones(1, num_columns, dtype=torch.int32)
        place = recorded.data_ptr(), num_columns
        scope_counts = counts.data_ptr(), len(counts), 1
        dispatch_batch(0, ids.data_ptr(), *scope, *own, width, *scope_counts, *place, slots.data_ptr(), addresses)
        assert torch.equal(slots, expected.long())
        counted = torch.ones(num_columns, dtype=torch.int32)
        count_slots(counted, expected)
        assert torch.equal(recorded[0], counted)


@pytest.mark.parametrize(("ranks", "slots", "experts"), [(8, 9, 64), (16, 5, 64), (32, 9, 256), (144, 3, 256)])
def test_close_to_the_exact_optimum(ranks: int, slots: int, experts: int) -> None:
    """12 steps and one sweep on planned placements, after a drift."""
    rng = np.random.default_rng(ranks)
    popularity = np.exp(rng.normal(0, 1, (4, experts)))
    metadata = rebalance_experts(popularity * 1000, EpTopology(ranks, 4, slots))
    tables = DispatchTables(metadata)
    controls = torch.from_numpy(DispatchPolicy("batch", "all").controls(metadata.topology, 0))
    drifted = popularity * np.exp(rng.normal(0, 0.3, popularity.shape))
    ratios = []
    for layer in range(4):
        counts = rng.multinomial(128 * ranks * 8, drifted[layer] / drifted[layer].sum()).astype(np.int32)
        reached, optimum = largest_loads(tables, layer, counts, controls)
        ratios.append(optimum / reached)
    assert min(ratios) > 0.985
    assert np.mean(ratios) > 0.99


@given(st.integers(0, 10**6), st.integers(1, 2000))
@settings(deadline=None, max_examples=60)
def test_never_worse_than_planned_shares_by_more_than_rounding(seed: int, tokens: int) -> None:
    rng = np.random.default_rng(seed)
    metadata = placement(EpTopology(6, 2, 4), 17, rng)
    tables = DispatchTables(metadata)
    controls = torch.from_numpy(DispatchPolicy("batch", "all").controls(metadata.topology, 0, step=seed % 99))
    counts = rng.multinomial(tokens, rng.dirichlet(np.full(17, 0.4))).astype(np.int32)
    reached, optimum = largest_loads(tables, 0, counts, controls)
    shares = counts[metadata.physical_to_logical_map[0].numpy()] * metadata.dispatch_weights[0].numpy()
    planned = shares.reshape(6, 4).sum(1).max()
    assert optimum <= reached + 1e-6
    assert reached <= planned + 4  # at most one whole token for each replica on the rank


def test_largest_batch_of_the_largest_topology_does_not_overflow() -> None:
    topology = EpTopology(512, 64, 4)
    metadata = placement(topology, 1024, np.random.default_rng(0))
    tables = DispatchTables(metadata, max_choices=8).layer(0)
    counts = np.random.default_rng(1).multinomial(16384 * 16 * 512, np.random.default_rng(2).dirichlet(np.ones(1024)))
    for cost in (0.0, 1e9):
        policy = DispatchPolicy("batch", "all", active_expert_cost=cost)
        quotas = solve_quotas(torch.from_numpy(counts), tables, torch.from_numpy(policy.controls(topology, 0)))
        real = tables.expert >= 0
        assert (quotas >= 0).all()
        assert torch.equal(quotas.sum(1)[real], torch.from_numpy(counts)[tables.expert[real].long()])


@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=8))
@settings(deadline=None, max_examples=100)
def test_inverses_divide_exactly(quotas: list[int]) -> None:
    """At the end of a row's tokens each replica has taken its quota: the running division has lost nothing."""
    inverses = quota_inverses(torch.tensor([quotas]))[0].tolist()
    left = sum(quotas)
    for quota, inverse in zip(quotas, inverses, strict=True):
        if inverse == (1 << 32) - 1:
            assert quota == left
        else:
            assert (left * inverse) >> 32 == quota
        left -= quota


def test_replicas_on_one_rank_are_one_choice() -> None:
    metadata = ExpertLocationMetadata.from_physical_to_logical([[0, 0, 0, 1]], 2, EpTopology(2, 1, 2))
    tables = DispatchTables(metadata).layer(0)
    assert tables.num_choices[0] == 2
    assert sorted(tables.weight[0, :2].tolist()) == [65536 // 3, 65536 * 2 // 3]


def test_slots_of_lost_ranks_get_nothing() -> None:
    metadata = ExpertLocationMetadata.from_physical_to_logical([[0, 1, 0, 2, 1, 2]], 3, EpTopology(3, 1, 2))
    tables = DispatchTables(metadata, live_ranks=[0, 2]).layer(0)
    assert tables.slot[tables.slot >= 0].tolist() == [1, 4] or tables.slot[tables.slot >= 0].tolist() == [4, 1]
    assert tables.slot_of_expert.tolist()[0] == 0
    assert tables.slot_of_expert.tolist()[2] == 5
    with pytest.raises(
        PlacementError, match=r"expert 0 of layer 0 has no replica left: all its slots are on ranks \[0, 1\]"
    ):
        DispatchTables(metadata, live_ranks=[2])


def test_an_expert_with_more_replicas_than_choices_keeps_the_heaviest(caplog: pytest.LogCaptureFixture) -> None:
    metadata = ExpertLocationMetadata.from_physical_to_logical(
        [[0, 1, 0, 2, 0, 3]], 4, EpTopology(3, 1, 2), dispatch_weights=[[0.2, 1, 0.5, 1, 0.3, 1]]
    )
    tables = DispatchTables(metadata, max_choices=2).layer(0)
    assert sorted(tables.slot[0].tolist()) == [2, 4]
    assert "1 experts have more replicas" in caplog.text


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"algorithm": "lp"}, "ep_dispatch_algorithm"),
        ({"scope": "pod"}, "ep_dispatch_scope"),
        ({"active_expert_cost": -1.0}, "ep_dispatch_active_expert_cost"),
        ({"active_expert_cost": float("nan")}, "ep_dispatch_active_expert_cost"),
        ({"scope": "all", "cross_node_cost": 0.1}, "ep_dispatch_cross_node_cost"),
    ],
)
def test_policies_that_cannot_work_are_refused(values: dict, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        DispatchPolicy(**values)
    assert caught.value.field == field
