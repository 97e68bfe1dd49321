"""The end of a step against one that takes its slots one at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.errors import LoadError
from equipoise.load.step_fold import StepFold


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 5), st.booleans(), st.booleans(), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=100)
def test_experts_get_the_counts_of_their_slots_and_all_are_cleared(
    layers: int, slots: int, experts: int, taken: bool, transposed: bool, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    counts = torch.zeros(layers, slots + 1, dtype=torch.int32)
    fold = StepFold(counts)
    mapping = torch.randint(0, experts, (layers, slots), generator=random)
    if transposed:  # which the compiled call cannot read
        mapping = mapping.T.contiguous().T
    row = torch.randint(0, 2**40, (layers, experts), generator=random)
    expected = row.clone()
    for _ in range(3):
        counts.copy_(torch.randint(0, 2**31 - 1, counts.shape, generator=random))
        if taken:
            for layer in range(layers):
                for slot in range(slots):
                    expected[layer, mapping[layer, slot]] += counts[layer, slot]
        fold.fold_and_clear(row if taken else None, mapping)
        assert torch.equal(row, expected)
        assert not counts.any()
        mapping = mapping.flip(1) if seed % 2 else mapping  # a placement that went live


def test_a_map_changed_in_place_is_seen() -> None:
    counts, row = torch.zeros(1, 3, dtype=torch.int32), torch.zeros(1, 2, dtype=torch.int64)
    fold, mapping = StepFold(counts), torch.tensor([[0, 1]])
    for expected in ([[5, 7]], [[12, 12]]):
        counts.copy_(torch.tensor([[5, 7, 9]]))
        fold.fold_and_clear(row, mapping)
        assert row.tolist() == expected
        mapping.copy_(torch.tensor([[1, 0]]))


@pytest.mark.parametrize("mapping", [[[-1, 0]], [[0, 2]]])
def test_a_map_to_no_expert_is_refused_and_writes_nowhere(mapping: list[list[int]]) -> None:
    counts, memory = torch.tensor([[5, 5, 9]], dtype=torch.int32), torch.zeros(3, 2, dtype=torch.int64)
    with pytest.raises(LoadError, match="must hold experts from 0 to 1, got"):
        StepFold(counts).fold_and_clear(memory[1:2], torch.tensor(mapping))
    assert memory.tolist() == [[0, 0], [5, 0], [0, 0]]
