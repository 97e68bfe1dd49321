"""The cache is read in place by attention, and copied, once, for models that compute with what it returns."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from equipoise.engine.model.attention import packed_attention
from equipoise.engine.model.contexts import StepContexts
from equipoise.engine.model.kv_cache import RowKvCache
from equipoise.engine.model.step_batch import Segment, StepBatch, StepLayout

CPU = torch.device("cpu")
HEADS, WIDTH = 2, 4


def step(*segments: Segment) -> StepBatch:
    return StepBatch(segments, (0,) * sum(segment.length for segment in segments), ())


def filled_cache(lengths: tuple[int, ...]) -> RowKvCache:
    """Rows of so many random entries, in layer 0."""
    cache = RowKvCache(num_rows=len(lengths), max_length=400)
    cache.begin_step(step(*(Segment(row, 0, length) for row, length in enumerate(lengths))), CPU)
    states = torch.randn(1, HEADS, sum(lengths), WIDTH, generator=torch.Generator().manual_seed(0))
    cache.update(states, states + 1, layer_idx=0)
    return cache


def one_more_token(cache: RowKvCache, *segments: Segment) -> tuple[StepLayout, torch.Tensor, torch.Tensor]:
    layout = cache.begin_step(step(*segments), CPU)
    states = torch.ones(1, HEADS, len(segments), WIDTH)
    keys, values = cache.update(states, states, layer_idx=0)
    return layout, keys, values


def attend(layout: StepLayout, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    query = torch.linspace(-1, 1, HEADS * WIDTH * len(layout.rows)).view(1, HEADS, -1, WIDTH)
    return packed_attention(torch.nn.Module(), query, keys, values, None, step_layout=layout)[0]


@pytest.mark.parametrize("inference", [False, True])
def test_what_is_handed_straight_on_is_not_copied(monkeypatch: pytest.MonkeyPatch, inference: bool) -> None:
    def copied(_: StepContexts) -> torch.Tensor:
        raise AssertionError("copied")

    monkeypatch.setattr(StepContexts, "copied", copied)
    with torch.inference_mode(inference):
        layout, keys, values = one_more_token(filled_cache((6, 5, 9)), Segment(0, 6, 1), Segment(2, 9, 1))
        assert keys.shape == (1, HEADS, 7 + 10, WIDTH)
        assert attend(layout, keys, values).isfinite().all()
        with pytest.raises(AssertionError, match="copied"):
            keys + 1


COMPUTATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "plus": lambda states: 1 + states,
    "matmul": lambda states: states @ torch.ones(WIDTH, 3),
    "linear": lambda states: torch.nn.functional.linear(states, torch.ones(3, WIDTH)),
    "einsum": lambda states: torch.einsum("bhcw,bhdw->bhcd", states, states),
    "view": lambda states: states.view(HEADS, -1),
    "transpose": lambda states: states.transpose(1, 2).reshape(-1, HEADS * WIDTH),
    "slice": lambda states: states[:, 1:, ..., 2],
    "split": lambda states: torch.cat(states.split([1, 3], dim=-1)[::-1], dim=-1),
    "repeat": lambda states: states.repeat_interleave(3, dim=1),
    "expand": lambda states: states[:, :, None].expand(-1, -1, 3, -1, -1).flatten(1, 2),
    "dtype": lambda states: states.to(torch.bfloat16),
    "clone": lambda states: states.clone(),
    "out": lambda states: torch.add(states, states, out=torch.empty(states.shape)),
    "sdpa": lambda states: torch.nn.functional.scaled_dot_product_attention(states, states, states),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("computation", COMPUTATIONS)
def test_computing_with_contexts_is_computing_with_a_plain_tensor(computation: str, inference: bool) -> None:
    with torch.inference_mode(inference):
        _, keys, _ = one_more_token(filled_cache((6, 5, 9)), Segment(2, 9, 1), Segment(0, 6, 1))
        plain = torch.cat([keys._storage[2, :, :10], keys._storage[0, :, :7]], dim=1)[None]  # type: ignore[attr-defined]
        got = COMPUTATIONS[computation](keys)
        assert type(got) is torch.Tensor
        torch.testing.assert_close(got, COMPUTATIONS[computation](plain), rtol=0, atol=0)
        assert keys.stride() == plain.stride()
        assert (keys.dtype, keys.device) == (plain.dtype, plain.device)


def test_changes_in_place_reach_attention_and_leave_the_cache_alone() -> None:
    cache, segments = filled_cache((6, 5, 9)), (Segment(0, 6, 1), Segment(1, 5, 1), Segment(2, 9, 1))
    layout, keys, values = one_more_token(cache, *segments)
    plain = attend(layout, keys, values)
    tripled = values * 3
    wanted = attend(layout, keys, tripled)
    values.view(-1).mul_(3)
    torch.testing.assert_close(values.clone(), tripled)
    torch.testing.assert_close(attend(layout, keys, values), wanted)
    torch.testing.assert_close(attend(*one_more_token(cache, *segments)), plain)


def test_the_cache_grows_and_keeps_what_it_holds() -> None:
    cache = RowKvCache(num_rows=2, max_length=500)
    states = torch.randn(1, HEADS, 400, 3)
    small = cache.capacity
    for start, length in ((0, 100), (100, 1), (101, 299)):
        cache.begin_step(step(Segment(1, start, length)), CPU)
        part = states[:, :, start : start + length]
        keys, values = cache.update(part, part * 2, layer_idx=5)
    assert small < cache.capacity <= 500
    assert torch.equal(keys.clone(), states)
    assert torch.equal(values.clone(), states * 2)


@pytest.mark.parametrize(
    ("segments", "rows", "widths"),
    [
        ([(3, 9, 1), (4, 7, 1), (5, 90, 1)], [(3, 4, 5)], [91]),
        ([(3, 9, 1), (5, 9, 1), (4, 9, 1)], [(3,), (5,), (4,)], [10, 10, 10]),  # neither a gap nor backwards
        ([(0, 9, 1), (1, 2, 4), (2, 9, 1)], [(0,), (1,), (2,)], [10, 6, 10]),  # a prompt stays on its own
        ([(0, 0, 4), (1, 0, 4)], [(0,), (1,)], [4, 4]),
        ([(0, 10, 1), (1, 500, 1), (2, 520, 1)], [(0,), (1, 2)], [11, 521]),  # too much padding
        ([(0, 10, 1), (1, 60, 1), (2, 170, 1)], [(0, 1), (2,)], [61, 171]),  # 50, then 270 more than two calls' worth
    ],
)
def test_runs_are_of_adjacent_rows_with_contexts_about_as_long(
    segments: list[tuple[int, int, int]], rows: list[tuple[int, ...]], widths: list[int]
) -> None:
    layout = StepLayout.build(step(*(Segment(*fields) for fields in segments)), CPU)
    assert [tuple(segment.row for segment in run.segments) for run in layout.runs] == rows
    assert [run.width for run in layout.runs] == widths
    sizes = [len(run.segments) * run.width for run in layout.runs]
    assert [run.context_start for run in layout.runs] == [sum(sizes[:i]) for i in range(len(sizes))]
    assert layout.num_entries == sum(sizes)
