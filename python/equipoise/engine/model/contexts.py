"""All contexts of a step as models see them: a tensor that is copied out of the cache only if somebody looks at it.

Most models hand what their cache returns straight on to attention, which can read the cache in place. Others compute
with it first (MLA expands compressed states, some repeat heads); they get the copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from equipoise.engine.model.step_batch import Run, StepLayout


class StepContexts(torch.Tensor):
    """(1, heads, C, width): the contexts of a step's runs end to end, as the layout places them.

    Whatever is computed with it, in place or not, is computed with one copy, made when it is first needed; the cache
    itself is never changed through it.
    """

    _storage: torch.Tensor  # (rows, heads, capacity, width), the cache of a layer
    _layout: StepLayout
    _copy: torch.Tensor | None

    @staticmethod
    def __new__(cls, storage: torch.Tensor, layout: StepLayout) -> StepContexts:
        shape = (1, storage.shape[1], layout.num_entries, storage.shape[3])
        contexts = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=storage.dtype, device=storage.device)
        contexts._storage, contexts._layout, contexts._copy = storage, layout, None
        return contexts

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """Torch calls this instead of any operator that reads or writes values."""
        args, kwargs = tree_map_only(StepContexts, StepContexts.copied, (args, kwargs or {}))
        return func(*args, **kwargs)

    def copied(self) -> torch.Tensor:
        """The plain tensor, for models and attention alike from now on."""
        if self._copy is None:
            rows = [(segment.row, run.width) for run in self._layout.runs for segment in run.segments]
            self._copy = torch.cat([self._storage[row, :, :width] for row, width in rows], dim=1)[None]
        return self._copy


def contexts_of(run: Run, first: int, states: torch.Tensor) -> torch.Tensor:
    """Entries ``first`` to ``run.width`` of a run, (rows, heads, entries, D), from (1, heads, C, D): always a view."""
    if isinstance(states, StepContexts):
        if states._copy is None:
            return states._storage[run.row : run.row + run.num_rows, :, first : run.width]
        states = states._copy
    entries = states[0, :, run.context_start : run.context_start + run.num_rows * run.width]
    return entries.unflatten(1, (run.num_rows, run.width))[:, :, first:].transpose(0, 1)
