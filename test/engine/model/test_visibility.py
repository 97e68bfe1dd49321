"""What a token may attend to is read from transformers' own mask functions, and refused where it has another form."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import masking_utils

from equipoise.engine.model.attention import packed_attention
from equipoise.engine.model.visibility import CAUSAL, UNKNOWN, Visibility, classify, visibility_of_mask

NO_PADDING = torch.zeros(1, dtype=torch.int64)


def test_causal() -> None:
    assert classify(masking_utils.causal_mask_function, None) == CAUSAL


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3000), st.booleans())
def test_sliding_windows_with_and_without_a_word_of_their_size(size: int, told: bool) -> None:
    mask = masking_utils.sliding_window_causal_mask_function(size)
    found = classify(mask, size if told else None)
    assert found == Visibility("sliding", size) if told or size < 512 else found.kind in ("causal", "sliding")


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 3000))
def test_chunks(size: int) -> None:
    assert classify(masking_utils.chunked_causal_mask_function(size, NO_PADDING), size) == Visibility("chunked", size)


def test_sizes_that_differ_are_never_taken_for_one_another() -> None:
    """Masks are built anew in every step, and known again by what they close over."""
    sizes = (4, 7, 4, 9, 7)
    made = [masking_utils.sliding_window_causal_mask_function(size) for size in sizes]
    assert [visibility_of_mask(mask_function=mask, local_size=None).size for mask in made] == list(sizes)


@pytest.mark.parametrize(
    "mask",
    [
        masking_utils.bidirectional_mask_function,
        masking_utils.sliding_window_bidirectional_mask_function(8),
        masking_utils.or_masks(
            masking_utils.causal_mask_function, masking_utils.blockwise_overlay(torch.zeros(1, 600, dtype=torch.int64))
        ),
        lambda _batch, _head, query, key: (key <= query) & (key % 2 == 0),
    ],
    ids=["bidirectional", "bidirectional-window", "blocks", "every-other"],
)
def test_any_other_form_is_refused(mask: object) -> None:
    assert classify(mask, None) == UNKNOWN  # type: ignore[arg-type]
    tensor = torch.zeros(1, 1, 1, 4)
    with pytest.raises(NotImplementedError, match="neither causal, nor sliding, nor chunked"):
        packed_attention(torch.nn.Module(), tensor, tensor, tensor, UNKNOWN, step_layout=None)  # type: ignore[arg-type]


@settings(deadline=None)
@given(st.sampled_from(["causal", "sliding", "chunked"]), st.integers(1, 20), st.integers(0, 60))
def test_the_first_visible_entry_is_the_first_of_the_mask(kind: str, size: int, position: int) -> None:
    visibility = Visibility(kind, 0 if kind == "causal" else size)  # type: ignore[arg-type]
    seen = visibility.mask(torch.tensor([[position]]), torch.arange(61)[None])[0]
    assert int(seen.nonzero()[0]) == visibility.first(position)
    assert int(seen.nonzero()[-1]) == position
