"""Our choice of replicas in place of SGLang's: dispatch ``batch``, which splits the tokens at hand evenly over ranks.

Without an a2a backend every rank routes all tokens and must choose as the others do: all tokens count as its own, and
scope ``all`` needs no message. With one a rank routes its own tokens alone, in scope ``rank``, which needs none either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from equipoise.dispatch.dispatcher import ExpertDispatcher
from equipoise.errors import InvalidInputError
from equipoise.hosts.sglang.hook_targets import Hook, HookTarget

_LAYER = "equipoise_layer_id"  # on SGLang's ExpertLocationDispatchInfo, which does not say whose layer's it is


class BatchDispatch:
    """One for each scheduler. What it chooses depends on the maps, the tokens and the number of passes alone.

    Args:
        dispatcher: of this rank, with policy ``batch`` over our live placement.
        layer_ids: SGLang's number of each row of the placement.
        rank: of this process in the expert-parallel group of ``num_ranks``.
        replicated: every rank routes all tokens (no a2a backend).
    """

    def __init__(
        self, dispatcher: ExpertDispatcher, layer_ids: Sequence[int], *, rank: int, num_ranks: int, replicated: bool
    ) -> None:
        self._dispatcher = dispatcher
        self._row_of = {layer_id: row for row, layer_id in enumerate(layer_ids)}
        # Times the rows of a batch, the (G + 1) bounds by which all of them are this rank's; None: they are anyway.
        self._mine = [int(other > rank) for other in range(num_ranks + 1)] if replicated else None

    def warm_up(self, device: torch.device) -> None:
        """Compiles kernels before serving."""
        for dtype in (torch.int32, torch.int64):
            self.choose(next(iter(self._row_of)), torch.zeros((1, 1), dtype=dtype, device=device))

    def choose(self, layer_id: int, topk_ids: torch.Tensor) -> torch.Tensor:
        """(T, K) logical experts to (T, K) slots, -1 to -1; the same on all ranks where all see the same tokens.

        Raises:
            InvalidInputError: a batch that is too large; on all of these ranks.
        """
        bounds = None if self._mine is None else [len(topk_ids) * each for each in self._mine]
        return self._dispatcher.dispatch(self._row_of[layer_id], topk_ids, rank_bounds=bounds)

    def knows(self, layer_id: int) -> bool:
        return layer_id in self._row_of

    def refresh(self, rows: Sequence[int]) -> None:
        """Inside each commit, on every rank: rows of the placement have changed."""
        self._dispatcher.refresh(rows)

    def advance(self) -> None:
        """After each pass, on every rank: rounding favours other replicas next."""
        self._dispatcher.advance(0)


def dispatch_hooks(current: Callable[[], BatchDispatch | None]) -> list[Hook]:
    """
    Args:
        current: what chooses now; None: SGLang does.
    """

    def remember_layer(info: Any, _cls: type, layer_id: int, **_options: Any) -> None:
        if info is not None:
            setattr(info, _LAYER, layer_id)

    def choose(original: Callable[..., torch.Tensor], topk_ids: torch.Tensor, info: Any, *args: Any) -> torch.Tensor:
        batch, layer_id = current(), int(getattr(info, _LAYER, -1))
        if batch is None or not batch.knows(layer_id):
            return original(topk_ids, info, *args)
        try:
            return batch.choose(layer_id, topk_ids)
        except InvalidInputError:  # the same on all ranks; anything else ends the pass: ranks must not choose apart
            return original(topk_ids, info, *args)

    room = "eplb.expert_location_dispatch."
    return [
        Hook(HookTarget(room + "ExpertLocationDispatchInfo.init_new", ("layer_id",)), "AFTER", remember_layer),
        Hook(HookTarget(room + "topk_ids_logical_to_physical", ("topk_ids", "info")), "AROUND", choose),
    ]
