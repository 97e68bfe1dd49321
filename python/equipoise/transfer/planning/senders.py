"""Picks relays and balances senders over all experts of a layer: parts of assign_sources, compiled into it.

Relays are chosen first, largest fan-out first, each the least loaded rank that needs the expert. Then transfers are
moved along alternating paths from a busiest sender to one with at least two fewer until no such path is left: for
transfers of equal size that is the least possible load of the busiest sender (optimal semi-matchings, Harvey, Ladner,
Lovász and Tamir, 2003), given the relays.
"""

from __future__ import annotations

import numpy as np

from equipoise.jit.compile import inlined, int32_zeros

# Columns of the table of transfers.
EXPERT, SOURCE_RANK, DESTINATION_RANK, RELAYED = 0, 1, 2, 3
# Columns of the table of choices: holders[BEGIN:END] may serve a transfer.
BEGIN, END = 0, 1


@inlined
def choose_relays(transfers: np.ndarray, choice: np.ndarray, bundle: np.ndarray, load: np.ndarray) -> None:
    """Gives the cross-node transfer of each bundle to one of its ranks and makes that rank the source of the others."""
    largest = 1
    for transfer in range(bundle.size):
        largest = max(largest, bundle[transfer])
    for size in range(largest, 1, -1):
        for first in range(bundle.size):
            if bundle[first] != size:
                continue
            relay = first
            for transfer in range(first, first + size):
                if load[transfers[transfer, DESTINATION_RANK]] < load[transfers[relay, DESTINATION_RANK]]:
                    relay = transfer
            relay_rank = transfers[relay, DESTINATION_RANK]
            source = transfers[first, SOURCE_RANK]
            begin, end = choice[first, BEGIN], choice[first, END]
            for transfer in range(first, first + size):
                transfers[transfer, SOURCE_RANK] = relay_rank
                transfers[transfer, RELAYED] = 1
                choice[transfer, BEGIN] = choice[transfer, END] = 0
            transfers[relay, SOURCE_RANK] = source
            transfers[relay, RELAYED] = 0
            choice[relay, BEGIN], choice[relay, END] = begin, end
            load[relay_rank] += size - 1


@inlined
def balance_senders(transfers: np.ndarray, choice: np.ndarray, holders: np.ndarray, load: np.ndarray) -> None:
    """Moves transfers that have a choice of holders until the busiest sender cannot be relieved."""
    num_transfers, num_ranks = transfers.shape[0], load.shape[0]
    head, after = (
        int32_zeros(num_ranks),
        int32_zeros(num_transfers),
    )  # transfers with a choice, listed by their present source
    for rank in range(num_ranks):
        head[rank] = -1
    for transfer in range(num_transfers - 1, -1, -1):
        if choice[transfer, END] - choice[transfer, BEGIN] > 1:
            source = transfers[transfer, SOURCE_RANK]
            load[source] += 1
            after[transfer] = head[source]
            head[source] = transfer
    queue = int32_zeros(num_ranks)
    reached_by = int32_zeros(num_ranks)  # the transfer whose move brings one more to this rank
    while True:
        top, queued = 0, 0
        for rank in range(num_ranks):
            top = max(top, load[rank])
        for rank in range(num_ranks):
            reached_by[rank] = -2
            if load[rank] == top:
                queue[queued] = rank
                reached_by[rank] = -1
                queued += 1
        target, taken = -1, 0
        while taken < queued and target < 0:
            transfer = head[queue[taken]]
            taken += 1
            while transfer >= 0 and target < 0:
                for at in range(choice[transfer, BEGIN], choice[transfer, END]):
                    rank = holders[at]
                    if reached_by[rank] == -2:
                        reached_by[rank] = transfer
                        queue[queued] = rank
                        queued += 1
                        if load[rank] <= top - 2:
                            target = rank
                            break
                transfer = after[transfer]
        if target < 0:
            return
        load[target] += 1
        while reached_by[target] >= 0:
            transfer = reached_by[target]
            source = transfers[transfer, SOURCE_RANK]
            if head[source] == transfer:
                head[source] = after[transfer]
            else:
                before = head[source]
                while after[before] != transfer:
                    before = after[before]
                after[before] = after[transfer]
            after[transfer] = head[target]
            head[target] = transfer
            transfers[transfer, SOURCE_RANK] = target
            target = source
        load[target] -= 1
