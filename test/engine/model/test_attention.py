"""Attention over packed steps equals attention of each request on its own, whatever was packed together."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch

import equipoise.engine.model.step_batch as layout_module
from equipoise.engine.model.attention import packed_attention
from equipoise.engine.model.kv_cache import RowKvCache
from equipoise.engine.model.step_batch import Segment, StepBatch
from equipoise.engine.model.visibility import CAUSAL, Visibility

HEADS, KV_HEADS, WIDTH, VALUE_WIDTH = 4, 2, 8, 6
CPU = torch.device("cpu")


class Request:
    """One sequence: its queries, keys and values are drawn once, so a reference can be computed at any length."""

    def __init__(self, row: int, length: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.row, self.length, self.cached = row, length, 0
        self.query = torch.randn(HEADS, length, WIDTH, generator=generator)
        self.key = torch.randn(KV_HEADS, length, WIDTH, generator=generator)
        self.value = torch.randn(KV_HEADS, length, VALUE_WIDTH, generator=generator)

    def reference(self, visibility: Visibility, sinks: torch.Tensor | None, softcap: float | None) -> torch.Tensor:
        """(length, HEADS, VALUE_WIDTH), written down token by token."""
        result = torch.zeros(self.length, HEADS, VALUE_WIDTH)
        for position in range(self.length):
            first = {
                "causal": 0,
                "sliding": max(0, position - visibility.size + 1),
                "chunked": position - position % max(visibility.size, 1),
            }[visibility.kind]
            for head in range(HEADS):
                shared = head // (HEADS // KV_HEADS)
                logits = self.key[shared, first : position + 1] @ self.query[head, position] * 0.3
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                terms = logits.exp()
                total = terms.sum() + (sinks[head].exp() if sinks is not None else 0)
                result[position, head] = (terms / total) @ self.value[shared, first : position + 1]
        return result


def same(states: torch.Tensor) -> torch.Tensor:
    return states


def doubled_and_halved(states: torch.Tensor) -> torch.Tensor:
    return states * 2 / 2


@pytest.mark.parametrize(
    "visibility", [CAUSAL, Visibility("sliding", 5), Visibility("chunked", 5)], ids=lambda v: v.kind
)
@pytest.mark.parametrize("special", ["plain", "sinks", "softcap"])
@pytest.mark.parametrize(
    ("on_keys", "on_values"),
    [(same, same), (doubled_and_halved, doubled_and_halved), (same, doubled_and_halved)],
    ids=["straight", "computed", "values-computed"],
)
@pytest.mark.parametrize("padding_worth_a_call", [0, 6, math.inf])
def test_random_packing_equals_one_request_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
    visibility: Visibility,
    special: str,
    on_keys: Callable[[torch.Tensor], torch.Tensor],
    on_values: Callable[[torch.Tensor], torch.Tensor],
    padding_worth_a_call: float,
) -> None:
    monkeypatch.setitem(layout_module._PADDING_WORTH_A_CALL, "cpu", padding_worth_a_call)
    chance = random.Random(f"{visibility.size or None}{special}")
    sinks = torch.randn(HEADS, generator=torch.Generator().manual_seed(1)) if special == "sinks" else None
    softcap = 2.0 if special == "softcap" else None
    cache = RowKvCache(num_rows=6, max_length=300)
    requests = [Request(row, length, seed=row) for row, length in enumerate((9, 25, 37, 2, 30, 26))]
    runs_of_several = 0
    wanted = {request.row: request.reference(visibility, sinks, softcap) for request in requests}
    while any(request.cached < request.length for request in requests):
        chosen = [request for request in requests if request.cached < request.length and chance.random() < 0.8]
        if not chosen:
            continue
        pieces = sorted(
            (
                (request, min(chance.choice([1, 1, 1, 1, 1, 4, 30]), request.length - request.cached))
                for request in chosen
            ),
            key=lambda piece: piece[1] > 1,
        )
        segments = tuple(Segment(request.row, request.cached, length) for request, length in pieces)
        layout = cache.begin_step(StepBatch(segments, (0,) * sum(s.length for s in segments), (0,)), CPU)

        def packed(name: str, pieces: list[tuple[Request, int]] = pieces) -> torch.Tensor:
            return torch.cat([getattr(r, name)[:, r.cached : r.cached + n] for r, n in pieces], dim=1)[None]

        runs_of_several += any(run.num_rows > 1 for run in layout.runs)
        keys, values = cache.update(packed("key"), packed("value"), layer_idx=0)
        out, _ = packed_attention(
            torch.nn.Module(), packed("query"), on_keys(keys), on_values(values), visibility,
            step_layout=layout, scaling=0.3, sliding_window=3, s_aux=sinks, softcap=softcap,
        )  # fmt: skip
        assert layout.position_ids[0].tolist() == [i for s in segments for i in range(s.start, s.end)]
        start = 0
        for request, length in pieces:
            got = out[0, start : start + length]
            torch.testing.assert_close(got, wanted[request.row][request.cached : request.cached + length])
            request.cached += length
            start += length
    assert runs_of_several > 0 or padding_worth_a_call == 0


def test_a_mask_of_its_own_is_refused() -> None:
    tensor = torch.zeros(1, 1, 1, 4)
    with pytest.raises(NotImplementedError):
        packed_attention(torch.nn.Module(), tensor, tensor, tensor, torch.zeros(1), step_layout=None)  # type: ignore[arg-type]


def test_a_window_without_a_mask_is_refused() -> None:
    """Models that build no mask cannot say whether the window of the attention call is the one that holds."""
    tensor = torch.zeros(1, 1, 1, 4)
    with pytest.raises(NotImplementedError):
        packed_attention(torch.nn.Module(), tensor, tensor, tensor, None, step_layout=None, sliding_window=4)  # type: ignore[arg-type]
