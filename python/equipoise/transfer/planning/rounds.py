"""Orders transfers in rounds in which a rank sends to at most one peer and receives from at most one.

Senders and receivers are the two sides of a bipartite multigraph, transfers its edges, rounds its colours. König's
theorem (1916) gives as many rounds as the busiest rank has transfers one way; the proof's alternating paths are the
algorithm. That holds for transfers from ranks that held the expert; those from relays, which must have received it
before, fill the gaps behind its arrival.
"""

from __future__ import annotations

import numpy as np

from equipoise.jit.compile import helper, inlined, int32_table, int32_zeros, kernel, number, zeros
from equipoise.jit.sort import descending
from equipoise.transfer.planning.senders import DESTINATION_RANK, EXPERT, RELAYED, SOURCE_RANK


@helper
def _max_degree(sources: np.ndarray, destinations: np.ndarray, num_ranks: int) -> int:
    """Most transfers that one rank sends, or receives: the least number of rounds."""
    sends, receives = int32_zeros(num_ranks), int32_zeros(num_ranks)
    highest = 0
    for edge in range(sources.shape[0]):
        source, destination = sources[edge], destinations[edge]
        sends[source] += 1
        receives[destination] += 1
        highest = max(highest, max(sends[source], receives[destination]))
    return highest


@helper
def _color_edges(sources: np.ndarray, destinations: np.ndarray, num_ranks: int, num_colors: int) -> np.ndarray:
    """A round for each transfer, (edges,) int32 below ``num_colors``, at least :func:`_max_degree`.

    None holds two with one source, or one destination.
    """
    colors = int32_zeros(sources.shape[0])
    # sent[rank, color]: the edge by which a rank sends in that round; received: the one by which it receives
    sent, received = int32_table(num_ranks, num_colors, number(-1)), int32_table(num_ranks, num_colors, number(-1))
    for edge in range(sources.shape[0]):
        source, destination = sources[edge], destinations[edge]
        free_to_send, free_to_receive, common = number(-1), number(-1), number(-1)
        for color in range(num_colors):
            sends = sent[source, color] < 0
            receives = received[destination, color] < 0
            if sends and receives:
                common = color
                break
            if sends and free_to_send < 0:
                free_to_send = color
            if receives and free_to_receive < 0:
                free_to_receive = color
        if common < 0:
            # Make free_to_send free at the destination: swap the two colours along the path that starts there. It
            # cannot end at the source, which it could enter only by an edge of the colour that the source lacks.
            _swap_path(sent, received, colors, sources, destinations, destination, free_to_send, free_to_receive)
            common = free_to_send
        colors[edge] = common
        sent[source, common] = edge
        received[destination, common] = edge
    return colors


@helper
def _swap_path(
    sent: np.ndarray,
    received: np.ndarray,
    colors: np.ndarray,
    sources: np.ndarray,
    destinations: np.ndarray,
    start: int,
    color: int,
    other: int,
) -> None:
    """Exchanges ``color`` and ``other`` on the alternating path that leaves receiver ``start`` by ``color``."""
    rank, wanted, fresh = start, color, other
    here, there, far_ranks, near_ranks = received, sent, sources, destinations  # the path crosses over at each edge
    edge = here[rank, wanted]
    here[rank, wanted] = -1
    while edge >= 0:
        far_rank = far_ranks[edge]
        following = there[far_rank, fresh]  # has the colour that this edge takes: next to change
        colors[edge] = fresh
        here[rank, fresh] = edge
        there[far_rank, fresh] = edge
        if following < 0:
            there[far_rank, wanted] = -1
        # `following` gives up `fresh` at far_rank and takes `wanted`, the position that `edge` has left
        rank, edge = far_rank, following
        here, there, far_ranks, near_ranks = there, here, near_ranks, far_ranks
        wanted, fresh = fresh, wanted


@kernel
def assign_rounds(transfers: np.ndarray, num_ranks: int) -> np.ndarray:
    """(transfers,) int32: the round of each transfer.

    Transfers from holders take A rounds, the least possible. Rounds that bring experts to relays go first, and each
    transfer from a relay takes the first later round in which both ranks' links are free. Should that need more rounds
    than A + B, B being the least for the relays' transfers alone, those are put in B rounds of their own instead.
    """
    from_holders, sources, destinations = _part(transfers, number(0))
    num_held = _max_degree(sources, destinations, num_ranks)
    colors = _color_edges(sources, destinations, num_ranks, num_held)
    rounds = int32_zeros(transfers.shape[0])
    for i in range(from_holders.shape[0]):
        rounds[from_holders[i]] = colors[i]
    if from_holders.shape[0] == transfers.shape[0]:
        return rounds
    fed_by = _relays_first(transfers, rounds, num_held)
    from_relays, sources, destinations = _part(transfers, number(1))
    num_relayed = _max_degree(sources, destinations, num_ranks)
    # A transfer waits for its expert, and then at most for all others of its two ranks.
    max_rounds = num_held + 1 + 2 * (num_held + num_relayed)
    if _fill_in_relayed(transfers, rounds, fed_by, num_ranks, max_rounds) > num_held + num_relayed:
        colors = _color_edges(sources, destinations, num_ranks, num_relayed)
        for i in range(from_relays.shape[0]):
            rounds[from_relays[i]] = num_held + colors[i]
    return rounds


@helper
def _part(transfers: np.ndarray, relayed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The transfers whose column RELAYED is ``relayed``, ascending: their numbers, sources and destinations, int32."""
    count = 0
    for transfer in range(transfers.shape[0]):
        if transfers[transfer, RELAYED] == relayed:
            count += 1
    part, sources, destinations = int32_zeros(count), int32_zeros(count), int32_zeros(count)
    count = 0
    for transfer in range(transfers.shape[0]):
        if transfers[transfer, RELAYED] == relayed:
            part[count] = transfer
            sources[count], destinations[count] = (
                transfers[transfer, SOURCE_RANK],
                transfers[transfer, DESTINATION_RANK],
            )
            count += 1
    return part, sources, destinations


@inlined
def _relays_first(transfers: np.ndarray, rounds: np.ndarray, num_rounds: int) -> np.ndarray:
    """Reorders the rounds of the holders' transfers, those that feed most relays first.

    Returns:
        (transfers,) int32: for each transfer from a relay the transfer that feeds it, -1 for the others.
    """
    num_transfers = transfers.shape[0]
    fed_by, worth = int32_zeros(num_transfers), zeros(num_rounds)
    first = 0  # of the transfers of the same expert, which lie together
    for transfer in range(num_transfers):
        fed_by[transfer] = -1
        if transfers[transfer, EXPERT] != transfers[first, EXPERT]:
            first = transfer
        if transfers[transfer, RELAYED] == 0:
            continue
        feeder = first
        while (
            transfers[feeder, RELAYED] == 1 or transfers[feeder, DESTINATION_RANK] != transfers[transfer, SOURCE_RANK]
        ):
            feeder += 1
        fed_by[transfer] = feeder
        worth[rounds[feeder]] += 1
    order, position = descending(worth), int32_zeros(num_rounds)
    for i in range(num_rounds):
        position[order[i]] = i
    for transfer in range(num_transfers):
        if transfers[transfer, RELAYED] == 0:
            rounds[transfer] = position[rounds[transfer]]
    return fed_by


@inlined
def _fill_in_relayed(
    transfers: np.ndarray, rounds: np.ndarray, fed_by: np.ndarray, num_ranks: int, max_rounds: int
) -> int:
    """Gives each transfer from a relay the first round after its expert's arrival; returns the number of rounds."""
    num_transfers = transfers.shape[0]
    nothing = number(0)
    sends, receives = int32_table(num_ranks, max_rounds, nothing), int32_table(num_ranks, max_rounds, nothing)
    highest, latest = 0, 0
    for transfer in range(num_transfers):
        if fed_by[transfer] < 0:
            sends[transfers[transfer, SOURCE_RANK], rounds[transfer]] = 1
            receives[transfers[transfer, DESTINATION_RANK], rounds[transfer]] = 1
            highest = max(highest, rounds[transfer] + 1)
            latest = max(latest, rounds[transfer])
    for arrival in range(latest + 1):  # what arrives first is passed on first
        for transfer in range(num_transfers):
            if fed_by[transfer] < 0 or rounds[fed_by[transfer]] != arrival:
                continue
            source, destination = transfers[transfer, SOURCE_RANK], transfers[transfer, DESTINATION_RANK]
            at = arrival + 1
            while sends[source, at] > 0 or receives[destination, at] > 0:
                at += 1
            sends[source, at] = receives[destination, at] = 1
            rounds[transfer] = at
            highest = max(highest, at + 1)
    return highest
