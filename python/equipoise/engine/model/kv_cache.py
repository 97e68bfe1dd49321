"""Keys and values of all running requests: one row of entries per request, a transformers ``Cache`` to the model."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache

from equipoise.engine.model.contexts import StepContexts
from equipoise.engine.model.step_batch import StepBatch, StepLayout

_FIRST_CAPACITY = 128


class RowKvCache(Cache):
    """``num_rows`` rows that grow together, doubling, up to ``max_length`` entries each.

    Whatever a model's attention hands to ``update`` is stored as it is, so models that cache compressed states (MLA)
    keep them compressed; keys and values may differ in heads and width. Windowed layers keep all entries, and
    attention reads those in the window.
    """

    def __init__(self, num_rows: int, max_length: int) -> None:
        super().__init__(layers=[])
        self._num_rows = num_rows
        self._max_length = max_length
        self._capacity = min(_FIRST_CAPACITY, max_length)
        self._storage: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # layer: (rows, heads, capacity, width) each
        self._layout: StepLayout | None = None

    @property
    def capacity(self) -> int:
        """Entries per row that there is memory for."""
        return self._capacity

    def begin_step(self, batch: StepBatch, device: torch.device) -> StepLayout:
        """Makes room for a step and says where its tokens lie."""
        longest = max(segment.end for segment in batch.segments)
        assert longest <= self._max_length, f"a request of {longest} tokens in a cache for {self._max_length}"
        if longest > self._capacity:
            self._grow(longest)
        self._layout = StepLayout.build(batch, device)
        return self._layout

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores (1, heads, T, width) of the new tokens; returns (1, heads, C, width) of all contexts of the step.

        What comes back is copied out of the cache only if the model does anything else with it than attend.
        """
        assert self._layout is not None, "begin_step comes first"
        if layer_idx not in self._storage:
            self._storage[layer_idx] = (self._new_storage(key_states), self._new_storage(value_states))
        keys, values = self._storage[layer_idx]
        for storage, states in ((keys, key_states), (values, value_states)):
            storage[self._layout.rows, :, self._layout.position_ids[0]] = states[0].transpose(0, 1)
        return StepContexts(keys, self._layout), StepContexts(values, self._layout)

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - the interface of transformers
        # Positions are given with every step, and no mask is built from sizes: a packed step has no one length.
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:  # noqa: ARG002 - likewise
        return query_length, 0

    def get_query_offset(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - likewise
        return 0

    def _new_storage(self, states: torch.Tensor) -> torch.Tensor:
        _, heads, _, width = states.shape
        # Zeros, not garbage: masked entries are multiplied by a weight of 0, and 0 times NaN is NaN.
        return states.new_zeros(self._num_rows, heads, self._capacity, width)

    def _grow(self, needed: int) -> None:
        capacity = min(max(needed, 2 * self._capacity), self._max_length)

        def grown(storage: torch.Tensor) -> torch.Tensor:
            rows, heads, _, width = storage.shape
            new = storage.new_zeros(rows, heads, capacity, width)
            new[:, :, : self._capacity] = storage
            return new

        for layer, (keys, values) in self._storage.items():
            self._storage[layer] = (grown(keys), grown(values))
        self._capacity = capacity
