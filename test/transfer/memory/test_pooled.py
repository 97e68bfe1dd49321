"""Commits that exchange rows: what the slots hold, which bytes move, and which rows are spare afterwards."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.errors import ConfigError
from equipoise.topology import EpTopology
from equipoise.transfer.memory.pool import ExpertPool
from equipoise.transfer.memory.pooled import PooledExperts, allocate_pool
from equipoise.transfer.planning.plan import plan_transfer
from equipoise.transfer.planning.rank_program import rank_program

NUM_EXPERTS = 9
LARGE = 5000  # int64 per row: travels apart from the packed message


def pool_of(held: list[list[int]], num_spare: int) -> ExpertPool:
    """One large and one small tensor; each row is full of its expert's number, spare rows of -1."""
    values = torch.tensor([expert for layer in held for expert in layer] + [-1] * num_spare)
    return ExpertPool([values[:, None].expand(-1, LARGE).clone(), values[:, None].clone()], len(held), len(held[0]))


def memory_of(pool: ExpertPool, *, with_canary: bool = False) -> PooledExperts:
    return PooledExperts(pool, pool.slots_per_rank, "canary" if with_canary else "off", num_send_buffers=2)


def experts_in(pool: ExpertPool, layer_id: int) -> list[int]:
    large, small = (tensor[pool.row_of_slot[layer_id]] for tensor in pool.tensors)
    assert torch.equal(large, small.expand_as(large))
    return small[:, 0].tolist()


def commit(memory: PooledExperts, layer_id: int, old: list[int], new: list[int]) -> int:
    """Stages what rank 0 lacks, as if it had arrived, and commits; returns how many experts were staged."""
    slots = len(old)
    other_ranks = -(-NUM_EXPERTS // slots)  # they hold every expert all the time
    others = [expert % NUM_EXPERTS for expert in range(other_ranks * slots)]
    topology = EpTopology(1 + other_ranks, 1, slots)
    batch = plan_transfer([old + others], [new + others], topology, max_staged_experts=slots).layers[0].batches[0]
    program = rank_program(batch, 0, topology)
    memory.reserve(program.num_staging_slots)
    received = [each.receive for each in program.rounds if each.receive is not None]
    for receive in received:
        for row in memory.staged(layer_id, receive.staging_index).rows:
            row.view(torch.int64).fill_(receive.expert)
    memory.commit(layer_id, program.copies)
    return len(received)


@st.composite
def walks(draw: st.DrawFn) -> tuple[list[int], list[list[int]]]:
    """What a rank's slots hold at first, and after each of some rebalances; duplicates included."""
    slots = draw(st.integers(1, 6))
    held = st.lists(st.integers(0, NUM_EXPERTS - 1), min_size=slots, max_size=slots)
    return draw(held), draw(st.lists(held, min_size=1, max_size=6))


@settings(deadline=None)
@given(walks(), st.integers(0, 3))
def test_slots_hold_what_the_plan_says_and_no_row_is_lost(walk, more_spare):
    first, later = walk
    slots = len(first)
    pool = pool_of([first, first], slots + more_spare)
    memory, now = memory_of(pool), first
    for target in later:
        if target == now:
            continue
        before = pool.tensors[0].clone()
        staged = commit(memory, 1, now, target)
        assert experts_in(pool, 1) == target
        assert experts_in(pool, 0) == first, "other layers are as they were"
        in_use = set(pool.row_of_slot.flatten().tolist())
        assert sorted([*in_use, *pool.spare_rows]) == list(range(pool.num_rows))
        assert pool.rows(1) == pool.row_of_slot[1].tolist()
        changed = int((pool.tensors[0] != before).any(dim=1).sum())
        assert changed <= staged, "only what arrived was written: nothing was copied"
        now = target


def test_slots_that_change_places_copy_nothing_and_need_no_message():
    pool = pool_of([[4, 5, 6, 7]], 1)
    memory = memory_of(pool)
    where = {expert: tensor.data_ptr() for expert, tensor in zip([4, 5, 6, 7], pool.tensors[0], strict=False)}
    assert commit(memory, 0, [4, 5, 6, 7], [5, 6, 4, 7]) == 0
    assert experts_in(pool, 0) == [5, 6, 4, 7]
    assert [pool.tensors[0][row].data_ptr() for row in pool.rows(0)] == [where[expert] for expert in (5, 6, 4, 7)]


def test_canaries_follow_their_experts():
    pool = pool_of([[0, 1], [2, 3]], 2)
    memory = memory_of(pool, with_canary=True)
    memory.set_canaries(0, [10, 11])
    memory.set_canaries(1, [12, 13])
    commit(memory, 1, [2, 3], [3, 8])
    assert memory.canaries(0) == [10, 11]
    assert memory.canaries(1) == [13, 8]


def test_staging_is_the_spare_rows_and_what_small_rows_need():
    pool = pool_of([[0, 1, 2, 3]], 3)
    memory = memory_of(pool)
    assert memory.capacity == 3
    assert memory.allocated_bytes == 3 * 8 * (LARGE + 1)
    memory.reserve(2)
    assert 3 * 8 * (LARGE + 1) < memory.allocated_bytes < 3 * 8 * (LARGE + 1) + 1024
    with pytest.raises(ConfigError, match="stages 4 experts at once on a rank whose staging holds 3"):
        memory.reserve(4)


@pytest.mark.parametrize(("budget", "spare"), [(None, 3), (2.5, 2), (7.5, 4)])
def test_a_pool_has_a_spare_row_for_each_expert_that_may_be_staged(budget, spare):
    """None: one per round in flight. Never more than a rank has slots: it cannot receive more in a batch."""
    num_values = 4096
    pool = allocate_pool(
        [(torch.Size([num_values]), torch.float32)],
        EpTopology(2, 1, 4),
        5,
        verification="canary",
        staging_bytes=None if budget is None else int(budget * num_values * 4),
        rounds_in_flight=3,
        device=torch.device("cpu"),
    )
    assert pool.num_extra_rows == spare
    assert pool.tensors[0].shape == (5 * 4 + spare, num_values)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ([], "at least one tensor"),
        ([torch.zeros(5, 2), torch.zeros(6, 2)], r"must agree in rows and device: shapes \[\(5, 2\), \(6, 2\)\]"),
        ([torch.zeros(5, 2, 3).transpose(1, 2)], "must be contiguous"),
        ([torch.zeros(4, 2)], "4 rows has none to spare: its slots need 4"),
    ],
)
def test_unusable_pools_are_refused(tensors, words):
    with pytest.raises(ConfigError, match=words):
        ExpertPool(tensors, 2, 2)


def test_a_pool_for_another_topology_is_refused():
    with pytest.raises(ConfigError, match="slots_per_rank=2, the topology 3"):
        PooledExperts(pool_of([[0, 1]], 1), 3, "off", num_send_buffers=1)


def test_a_row_of_another_layer_is_not_to_be_had():
    pool = pool_of([[0, 1], [2, 3]], 1)
    for rows in ([0, 2], [0]):
        with pytest.raises(AssertionError):
            pool.assign(0, rows)
    assert np.array_equal(pool.row_of_slot, [[0, 1], [2, 3]])


def test_replicas_on_one_rank_share_a_row_until_they_part():
    pool = pool_of([[0, 1, 2]], 1)
    memory = memory_of(pool)
    assert commit(memory, 0, [0, 1, 2], [0, 0, 0]) == 0
    assert pool.rows(0) == [0, 0, 0]
    assert pool.spare_rows == [1, 2, 3]
    memory = memory_of(pool)
    assert (memory.capacity, memory.allocated_bytes) == (1, 8 * (LARGE + 1)), "the others will be needed again"
    assert commit(memory, 0, [0, 0, 0], [5, 0, 0]) == 1
    assert experts_in(pool, 0) == [5, 0, 0]
