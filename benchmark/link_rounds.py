"""How many rounds a set of messages takes if a rank's link carries one expert at a time each way.

A system posts batches of messages and waits for a batch before it posts the next. In a round every rank sends at most
one expert and receives at most one: the first, in the order in which it posted them, whose receiver has posted the
matching receive and has its link free. Ranks choose in an order that rotates from round to round. The same rule is
applied to every system, whatever its own idea of order is.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any

Posted = dict[str, Any]  # batch, sent, peer, num_bytes


def count_rounds(messages: Sequence[Sequence[Posted]], tensors_per_expert: int) -> int:
    """Rounds until everything is through.

    Args:
        messages: per rank, what it posted, in order.
        tensors_per_expert: messages that make up one expert, posted one after the other for one peer.
    """
    num_ranks = len(messages)
    sends = [_experts(own, True, tensors_per_expert) for own in messages]
    receives = [_experts(own, False, tensors_per_expert) for own in messages]
    receive_batches: dict[tuple[int, int], deque[int]] = defaultdict(
        deque
    )  # (source, destination) -> batches, in order
    for rank, own in enumerate(receives):
        for batch, peer in own:
            receive_batches[peer, rank].append(batch)
    open_per_batch: list[dict[int, int]] = [defaultdict(int) for _ in range(num_ranks)]
    for rank in range(num_ranks):
        for batch, _ in [*sends[rank], *receives[rank]]:
            open_per_batch[rank][batch] += 1
    rounds = 0
    while any(sends):
        at = [min(left, default=-1) for left in open_per_batch]
        receiving: set[int] = set()
        done: list[tuple[int, int, int]] = []
        for turn in range(num_ranks):
            rank = (rounds + turn) % num_ranks
            seen: set[int] = set()
            for index, (batch, peer) in enumerate(sends[rank]):
                if batch != at[rank]:
                    break
                posted = receive_batches[rank, peer]
                if peer not in seen and peer not in receiving and posted[0] == at[peer]:
                    receiving.add(peer)
                    done.append((rank, index, peer))
                    break
                seen.add(peer)  # messages of a pair stay in order
        assert done, "a set of messages that blocks itself"
        for rank, index, peer in done:
            batch, _ = sends[rank].pop(index)
            _close(open_per_batch[rank], batch)
            _close(open_per_batch[peer], receive_batches[rank, peer].popleft())
        rounds += 1
    return rounds


def _experts(own: Sequence[Posted], sent: bool, tensors_per_expert: int) -> list[tuple[int, int]]:
    """(batch, peer) of each expert sent, or received, in posting order."""
    tensors = [(message["batch"], message["peer"]) for message in own if message["sent"] == sent]
    assert len(tensors) % tensors_per_expert == 0
    experts = tensors[::tensors_per_expert]
    assert all(each == experts[i // tensors_per_expert] for i, each in enumerate(tensors))
    return experts


def _close(open_batches: dict[int, int], batch: int) -> None:
    open_batches[batch] -= 1
    if not open_batches[batch]:
        del open_batches[batch]
