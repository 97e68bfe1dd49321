"""Dispatch `batch` in SGLang's place: ranks that see the same tokens choose alike, and evenly."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from equipoise.dispatch.dispatcher import ExpertDispatcher
from equipoise.dispatch.policy import DispatchPolicy
from equipoise.hosts.sglang.batch_dispatch import BatchDispatch, dispatch_hooks
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.topology import EpTopology

TOPOLOGY = EpTopology(4, 1, 3)
NUM_EXPERTS, LAYER_IDS = 8, [1, 2]


def placement() -> ExpertLocationMetadata:
    return ExpertLocationMetadata.trivial(len(LAYER_IDS), NUM_EXPERTS, TOPOLOGY, max_replicas=5)


def on_rank(rank: int, metadata: ExpertLocationMetadata, *, replicated: bool = True) -> BatchDispatch:
    policy = DispatchPolicy("batch", "all" if replicated else "rank")
    dispatcher = ExpertDispatcher(metadata, rank=rank, policy=policy)
    batch = BatchDispatch(dispatcher, LAYER_IDS, rank=rank, num_ranks=TOPOLOGY.num_ranks, replicated=replicated)
    batch.warm_up(torch.device("cpu"))
    return batch


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    """(count, 2) different experts each, the replicated ones (0 to 3) more often; some entries are none."""
    rng = np.random.default_rng(seed)
    weights = np.where(np.arange(NUM_EXPERTS) < 4, 3.0, 1.0)
    ids = np.stack([rng.choice(NUM_EXPERTS, 2, replace=False, p=weights / weights.sum()) for _ in range(count)])
    ids[rng.random(ids.shape) < 0.05] = -1
    return torch.from_numpy(ids.astype(np.int32))


@pytest.mark.parametrize("count", [1, 7, 256])
def test_ranks_that_see_the_same_tokens_choose_alike(count: int) -> None:
    metadata = placement()
    ranks = [on_rank(rank, metadata) for rank in range(TOPOLOGY.num_ranks)]
    for step in range(3):
        ids = tokens(count, step)
        chosen = [batch.choose(2, ids) for batch in ranks]
        assert all(torch.equal(slots, chosen[0]) for slots in chosen)
        assert chosen[0].dtype == ids.dtype
        held = metadata.physical_to_logical_map[1][chosen[0].clamp(min=0).long()]
        assert torch.equal(torch.where(ids < 0, ids, held.int()), ids)
        for batch in ranks:
            batch.advance()


def test_all_ranks_get_even_parts_of_the_batch() -> None:
    metadata = placement()
    slots = on_rank(0, metadata).choose(1, tokens(512))
    load = torch.bincount(slots[slots >= 0] // TOPOLOGY.slots_per_rank, minlength=TOPOLOGY.num_ranks)
    assert load.sum() == (slots >= 0).sum()
    assert load.float().mean() / load.max() > 0.95, load


def test_after_a_commit_the_choice_is_among_the_new_slots() -> None:
    metadata = placement()
    batch = on_rank(1, metadata)
    moved = metadata.physical_to_logical_map.numpy().copy()
    moved[1] = np.roll(moved[1], 5)
    metadata.update_layers_(
        ExpertLocationMetadata.from_physical_to_logical(moved, NUM_EXPERTS, TOPOLOGY, max_replicas=5), [1]
    )
    batch.refresh([1])
    ids = tokens(64).clamp(min=0)
    assert torch.equal(torch.from_numpy(moved[1])[batch.choose(2, ids).long()].int(), ids)


def test_own_tokens_alone_need_no_message() -> None:
    """With an a2a backend."""
    metadata = placement()
    ids = tokens(100, 3)
    slots = on_rank(3, metadata, replicated=False).choose(1, ids)
    held = metadata.physical_to_logical_map[0][slots.clamp(min=0).long()].int()
    assert torch.equal(torch.where(ids < 0, ids, held), ids)


def test_hooks_know_the_layer_and_leave_others_to_sglang() -> None:
    batch = on_rank(0, placement())
    current: list[BatchDispatch | None] = [batch]
    remember, choose = (hook.function for hook in dispatch_hooks(lambda: current[0]))

    def stock(topk_ids: torch.Tensor, *_: Any) -> torch.Tensor:
        return topk_ids + 1000

    ids = tokens(9)
    info = SimpleNamespace()
    remember(info, object, 2)
    assert torch.equal(choose(stock, ids, info), batch.choose(2, ids))
    remember(info, object, 0)  # dense
    assert torch.equal(choose(stock, ids, info), ids + 1000)
    assert torch.equal(choose(stock, ids, SimpleNamespace()), ids + 1000)
    remember(None, object, 2)  # a draft model's
    assert torch.equal(choose(stock, ids, None), ids + 1000)
    remember(info, object, 2)
    current[0] = None
    assert torch.equal(choose(stock, ids, info), ids + 1000)
