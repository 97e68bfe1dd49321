"""Gathers the counts of a scope's ranks, where a rank sees its own tokens alone.

Gathered, not summed: a rank must know the tokens before its own, so that the parts which the ranks take of a quota add
up to it exactly. With a sum alone, small batches fall to half their balancedness.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from equipoise.distributed.communicator import Communicator

GatherCounts = Callable[[torch.Tensor], torch.Tensor]
"""Collective over the ranks of a scope, in the same order everywhere, ranks without tokens included: this rank's (E,)
int32 counts to (ranks of the scope, E) int32, in rank order, on the same device."""


def gather_by_sum(communicator: Communicator, ranks: range) -> GatherCounts:
    """Gathering for a host that has only sums: each rank adds a table in which the other ranks' rows are zero.

    Args:
        communicator: over all ranks; its sums are of CPU tensors, so counts of a GPU are waited for.
        ranks: those of the scope, a range of the communicator's; rows of other ranks are summed along and left out.
    """

    def gather(counts: torch.Tensor) -> torch.Tensor:
        rows = torch.zeros(communicator.world_size, counts.numel(), dtype=torch.int32)
        rows[communicator.rank] = counts.cpu()
        communicator.all_reduce_sum_(rows)
        return rows[ranks.start : ranks.stop].to(counts.device)

    return gather
