"""Exchanges routed tokens with the ranks that hold their experts, and the results back in the same order.

A *routed token* is one (token, choice) pair: its hidden state with the slot that it goes to. Collective: every rank
calls it for the same layer of the same step.

Two ways with one result. A large step first tells every rank how many to expect, and sends exactly those. A small one
(decoding) is bound by the number of messages, not by their size: there each pair of ranks exchanges a block with room
for the maximum, so that no count needs to be sent, nor be known on the host.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist

PADDED_BYTES = 1 << 20
"""Blocks are padded while all of a rank's blocks together stay below this."""


class TokenExchange(Protocol):
    """One step's exchange at one layer; collective."""

    def there(self, tokens: torch.Tensor) -> torch.Tensor:
        """(N, W) routed tokens, sorted by destination, to the (M, W) for this rank; padding is all -1 bits."""
        ...

    def back(self, results: torch.Tensor) -> torch.Tensor:
        """(M, H) results of what was received to the (N, H) results of what was sent."""
        ...


def make_exchange(
    destinations: torch.Tensor, max_tokens: int, token_bytes: int, group: dist.ProcessGroup
) -> TokenExchange:
    """Choose the exchange for routed tokens going to ``destinations``.

    Args:
        destinations: (N,) int64 ranks in ascending order.
        max_tokens: routed tokens that any rank sends at most in this exchange; the same on all ranks.
        token_bytes: bytes of a routed token, the same on all ranks.
    """
    num_ranks = group.size()
    if num_ranks * max_tokens * token_bytes <= PADDED_BYTES:
        return _PaddedExchange(destinations, num_ranks, max_tokens, group)
    return _ExactExchange(destinations, num_ranks, group)


class _ExactExchange:
    def __init__(self, destinations: torch.Tensor, num_ranks: int, group: dist.ProcessGroup) -> None:
        send_counts = _first_of_each(destinations, num_ranks).diff()
        recv_counts = torch.empty_like(send_counts)
        dist.all_to_all_single(recv_counts, send_counts, group=group)
        self._sends, self._recvs = torch.stack([send_counts, recv_counts]).tolist()
        self._group = group

    def there(self, tokens: torch.Tensor) -> torch.Tensor:
        received = tokens.new_empty(sum(self._recvs), tokens.shape[1])
        dist.all_to_all_single(received, tokens, self._recvs, self._sends, group=self._group)
        return received

    def back(self, results: torch.Tensor) -> torch.Tensor:
        returned = results.new_empty(sum(self._sends), results.shape[1])
        dist.all_to_all_single(returned, results, self._sends, self._recvs, group=self._group)
        return returned


class _PaddedExchange:
    def __init__(self, destinations: torch.Tensor, num_ranks: int, capacity: int, group: dist.ProcessGroup) -> None:
        self._num_tokens = num_ranks * capacity
        self._group = group
        # The n-th for a rank goes to the n-th place of its block.
        first = _first_of_each(destinations, num_ranks)
        nth = torch.arange(len(destinations), device=destinations.device) - first[destinations]
        self._places = destinations * capacity + nth

    def there(self, tokens: torch.Tensor) -> torch.Tensor:
        blocks = torch.full(
            (self._num_tokens, tokens.shape[1] * tokens.itemsize), 0xFF, dtype=torch.uint8, device=tokens.device
        )
        blocks = blocks.view(tokens.dtype)
        blocks[self._places] = tokens
        received = torch.empty_like(blocks)
        dist.all_to_all_single(received, blocks, group=self._group)
        return received

    def back(self, results: torch.Tensor) -> torch.Tensor:
        returned = torch.empty_like(results)
        dist.all_to_all_single(returned, results, group=self._group)
        return returned[self._places]


def _first_of_each(destinations: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """Find where each rank's tokens begin among the sorted ``destinations``, and their number: (G + 1,) int64.

    Not by ``torch.bincount``: on a GPU it waits for the device, to find out how long its result is.
    """
    return torch.searchsorted(destinations, torch.arange(num_ranks + 1, device=destinations.device))
