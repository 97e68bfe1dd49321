"""Dispatch by the batch on a GPU: Triton kernels, bit for bit as ``quotas.py`` and ``assign.py``.

Two launches::

    count_and_solve  every program counts a block of ids; the last one to finish solves the quotas
    assign           every program assigns its block; it sums the counts of the blocks before it

and three where counts of other ranks are needed: ``count_and_solve`` without the solve, the host's collective,
``solve_gathered``, ``assign``. A barrier over the grid in one launch would deadlock in Triton's interpreter, whose
programs run one after the other, so it could never be tested without a GPU.

Nothing depends on the host but the number of ids: tables, controls and the number of tokens that are no padding are
read from buffers, so a captured CUDA graph follows placements and costs. The solve runs in one warp while rows are
few: its reductions are then shuffles, not barriers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from equipoise.dispatch.solver.kernel_solve import solve


# Numbers that change from batch to batch are not specialized: for 1 and for multiples of 16 Triton would compile anew,
# in the middle of serving.
@triton.jit(do_not_specialize=["num_ids", "top_k"])
def count_and_solve(
    ids, num_ids, top_k, num_unpadded, block_counts, totals, finished,
    expert, num_choices, rank, weight, colour, step, choices_of_rank, singles_of_rank, sizes, controls, momentum,
    quotas, inverses, starts,
    E: tl.constexpr, EP: tl.constexpr, M: tl.constexpr, C: tl.constexpr, D: tl.constexpr, G: tl.constexpr,
    BLOCK: tl.constexpr, SOLVE: tl.constexpr,
):  # fmt: skip
    """Counts ``ids`` by block (NB, EP) and in all (EP); with SOLVE the last program solves and clears the totals."""
    block, bins = tl.program_id(0), tl.arange(0, EP)
    index = block * BLOCK + tl.arange(0, BLOCK)
    e = _valid_experts(ids, index, num_ids, top_k, num_unpadded, E)
    # Bins are a power of two above E: the last one takes what is no expert.
    counts = tl.histogram(tl.where(e >= 0, e, EP - 1), EP)
    tl.store(block_counts + block * EP + bins, counts)
    tl.atomic_add(totals + bins, counts, mask=(counts > 0) & (bins < E), sem="relaxed")
    if SOLVE:
        tl.debug_barrier()  # all threads' adds come before the program says that it is done
        if tl.atomic_add(finished, 1, sem="acq_rel") == tl.num_programs(0) - 1:
            solve(
                totals, expert, num_choices, rank, weight, colour, step, choices_of_rank, singles_of_rank, sizes,
                controls, momentum, quotas, inverses, starts, M, C, D, G,
            )  # fmt: skip
            tl.debug_barrier()
            tl.store(totals + bins, tl.zeros([EP], tl.int32))  # ready for the next call, without a memset
            tl.store(finished, 0)


@triton.jit
def solve_gathered(
    gathered, num_ranks, own_row, totals, before,
    expert, num_choices, rank, weight, colour, step, choices_of_rank, singles_of_rank, sizes, controls, momentum,
    quotas, inverses, starts,
    E: tl.constexpr, EP: tl.constexpr, M: tl.constexpr, C: tl.constexpr, D: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """Sums the scope's counts (num_ranks, E), solves, and stores in ``before`` (EP) the tokens of ranks before us."""
    bins = tl.arange(0, EP)
    total, earlier = tl.zeros([EP], tl.int32), tl.zeros([EP], tl.int32)
    for row in range(num_ranks):
        counts = tl.load(gathered + row * E + bins, mask=bins < E, other=0)
        total += counts
        earlier += tl.where(row < own_row, counts, 0)
    tl.store(before + bins, earlier)
    tl.store(totals + bins, total)
    tl.debug_barrier()
    solve(
        totals, expert, num_choices, rank, weight, colour, step, choices_of_rank, singles_of_rank, sizes, controls,
        momentum, quotas, inverses, starts, M, C, D, G,
    )  # fmt: skip
    tl.debug_barrier()
    tl.store(totals + bins, tl.zeros([EP], tl.int32))


@triton.jit(do_not_specialize=["num_ids", "top_k", "none", "first_own", "last_own"])
def assign(
    ids, slots, num_ids, top_k, num_unpadded, block_counts, before,
    row_of_expert, slot_of_expert, slot, inverses, starts, recorded, none, first_own, last_own,
    E: tl.constexpr, EP: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, GATHERED: tl.constexpr, RECORD: tl.constexpr,
):  # fmt: skip
    """Slots of the ids: the n-th token of an expert goes where the running quotas say (``assign.py``).

    With RECORD, those of ids [first_own, last_own) are added to ``recorded`` (none + 1), -1 in its last column.
    """
    block = tl.program_id(0)
    nth_id = tl.arange(0, BLOCK)
    index = block * BLOCK + nth_id
    e = _valid_experts(ids, index, num_ids, top_k, num_unpadded, E)
    known = tl.maximum(e, 0)
    result = tl.load(slot_of_expert + known)
    row = tl.load(row_of_expert + known)
    done = (row < 0) | (e < 0)
    row = tl.maximum(row, 0)
    same = (e[None, :] == e[:, None]) & (nth_id[None, :] < nth_id[:, None])
    n = tl.sum(same.to(tl.int32), 1)
    for first in range(0, block, ROWS):
        earlier = first + tl.arange(0, ROWS)
        place = block_counts + earlier[:, None] * EP + known[None, :]
        n += tl.sum(tl.load(place, mask=(earlier < block)[:, None] & ~done[None, :], other=0), 0)
    if GATHERED:
        n += tl.load(before + known)
    n += tl.load(starts + row)
    tokens = tl.load(starts + M + row)
    n = tl.where(n >= tokens, n - tokens, n)
    for j in range(C):
        inverse = tl.load(inverses + row * C + j).to(tl.uint32, bitcast=True)
        taken = tl.umulhi(n.to(tl.uint32), inverse)
        after = tl.umulhi((n + 1).to(tl.uint32), inverse)
        hit = ~done & ((after > taken) | (inverse == 0xFFFFFFFF))
        result = tl.where(hit, tl.load(slot + row * C + j), result)
        done = done | hit
        n = tl.where(done, n, n - taken.to(tl.int32))
    tl.store(slots + index, tl.where(e >= 0, result, -1).to(slots.dtype.element_ty), mask=index < num_ids)
    if RECORD:
        mine = (index >= first_own) & (index < last_own)
        tl.atomic_add(recorded + tl.where(e >= 0, result, none), 1, mask=mine, sem="relaxed")


@triton.jit
def _valid_experts(ids, index, num_ids, top_k, num_unpadded, E: tl.constexpr):
    """(BLOCK,) int32 experts; -1 for padding and for what is no expert."""
    e = tl.load(ids + index, mask=index < num_ids, other=-1).to(tl.int32)
    real = index < tl.load(num_unpadded) * top_k
    return tl.where((e >= 0) & (e < E) & real, e, -1)
