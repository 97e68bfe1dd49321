"""Who sends which expert to whom, for one step of one layer: integer kernels compiled by numba.

Words: a **job** is one expert that one rank needs and does not hold. A rank of a node where the expert already lies is
served from inside that node; of a node that lacks it, exactly one rank (the **relay**) is served from another node and
passes the expert on to the others there. So an expert crosses to a node once.

Sources start from chunks: the destinations of an expert, in rank order, split over its holders in contiguous chunks
whose sizes differ by at most one. Then senders are balanced over all experts of the layer, by moving jobs along
alternating paths from a busiest sender to one with at least two jobs fewer until no such path is left: for jobs of
equal size that is the least possible load of the busiest sender (optimal semi-matchings, Harvey, Ladner, Lovász and
Tamir, 2003), given the relays. Relays are chosen first, largest fan-out first, each the least loaded rank that
needs the expert.

Everything is integer arithmetic in a fixed order, so any machine computes the same result.
"""

from __future__ import annotations

import numpy as np

from equipoise.jit.compile import helper, inlined, int32_table, int32_zeros, kernel, number

# Columns of the job table.
EXPERT, SOURCE_RANK, DESTINATION_RANK, RELAYED = 0, 1, 2, 3


@kernel
def first_slots(row: np.ndarray, num_experts: int, num_ranks: int) -> np.ndarray:
    """(E, G) int32: the first slot of each rank that holds each expert, -1 where none does; ``row`` is (P,) int32."""
    slots_per_rank = row.size // num_ranks
    first = int32_table(num_experts, num_ranks, number(-1))
    for slot in range(row.size - 1, -1, -1):
        first[row[slot], slot // slots_per_rank] = slot
    return first


def chunk_of(index: int, num_elements: int, num_chunks: int) -> int:
    """The chunk that holds element ``index`` when elements are split contiguously, larger chunks first."""
    size, num_larger = num_elements // num_chunks, num_elements % num_chunks
    in_larger = num_larger * (size + 1)
    if index < in_larger:
        return index // (size + 1)
    return num_larger + (index - in_larger) // size


_chunk_of = helper(chunk_of)


@helper
def _rank_lists(
    row: np.ndarray, first: np.ndarray, but_not: np.ndarray, leave_out: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Ranks that hold each expert in ``row``, ascending, one expert after the other.

    Args:
        row: (P,) int32.
        first: (E, G) int32, its first slots.
        but_not: (E, G) int32, first slots of another map.
        leave_out: whether those that hold it in that other map are left out.

    Returns:
        Where each expert's part starts, (E + 2,) int32 of which the last says nothing, and the ranks, int32.
    """
    num_experts, num_ranks = first.shape
    slots_per_rank = row.shape[0] // num_ranks
    start, listed = int32_zeros(num_experts + 2), int32_zeros(row.shape[0])
    for slot in range(row.shape[0]):
        expert, rank = row[slot], slot // slots_per_rank
        if first[expert, rank] == slot and not (leave_out and but_not[expert, rank] >= 0):
            listed[slot] = 1
            start[expert + 2] += 1
    for expert in range(num_experts):
        start[expert + 2] += start[expert + 1]
    ranks = int32_zeros(start[num_experts + 1])
    for slot in range(row.shape[0]):
        if listed[slot] > 0:
            expert = row[slot]
            ranks[start[expert + 1]] = slot // slots_per_rank
            start[expert + 1] += 1
    return start, ranks


@kernel
def assign_sources(
    old: np.ndarray, new: np.ndarray, held: np.ndarray, wanted: np.ndarray, ranks_per_node: int
) -> np.ndarray:
    """The jobs of a step with their sources.

    Args:
        old: (P,) int32, the map before; every expert of ``new`` is in it.
        new: (P,) int32, the map after.
        held: (E, G) int32 from :func:`first_slots` of ``old``.
        wanted: the same of ``new``.
        ranks_per_node: ranks of a node.

    Returns:
        (jobs, 4) int32 with columns expert, source rank, destination rank, relayed (1: the source received the expert
        in this same step), in ascending order of (expert, destination rank).
    """
    num_experts, num_ranks = held.shape
    leave_out = num_ranks < 0  # False, as a variable: see equipoise.jit.compile.number
    holder_start, holders = _rank_lists(old, held, held, leave_out)
    job_start, needy = _rank_lists(new, wanted, held, not leave_out)
    num_jobs = needy.shape[0]
    jobs = int32_table(num_jobs, number(4), number(0))
    choice = int32_table(num_jobs, number(2), number(0))  # holders[begin:end] may serve the job
    bundle = int32_zeros(num_jobs)  # ranks of the node that wait for this expert, at the first of them
    for expert in range(num_experts):
        begin, end = holder_start[expert], holder_start[expert + 1]
        job, num_cross = job_start[expert], 0
        inside = begin
        while job < job_start[expert + 1]:
            node = needy[job] // ranks_per_node
            first_of_node = job
            while job < job_start[expert + 1] and needy[job] // ranks_per_node == node:
                jobs[job, EXPERT] = expert
                jobs[job, DESTINATION_RANK] = needy[job]
                job += 1
            while inside < end and holders[inside] // ranks_per_node < node:
                inside += 1
            inside_end = inside
            while inside_end < end and holders[inside_end] // ranks_per_node == node:
                inside_end += 1
            num_needy = job - first_of_node
            if inside_end == inside:
                bundle[first_of_node] = num_needy
                num_cross += 1
                continue
            for i in range(num_needy):
                choice[first_of_node + i, 0] = inside
                choice[first_of_node + i, 1] = inside_end
                source = holders[inside + _chunk_of(i, num_needy, inside_end - inside)]
                jobs[first_of_node + i, SOURCE_RANK] = source
        nth_cross = 0
        for cross in range(job_start[expert], job_start[expert + 1]):
            if bundle[cross] > 0:
                choice[cross, 0], choice[cross, 1] = begin, end
                jobs[cross, SOURCE_RANK] = holders[begin + _chunk_of(nth_cross, num_cross, end - begin)]
                nth_cross += 1
    load = int32_zeros(num_ranks)
    for job in range(num_jobs):
        if choice[job, 1] - choice[job, 0] == 1:  # no choice: known before the relays are picked
            load[holders[choice[job, 0]]] += 1
    _choose_relays(jobs, choice, bundle, load)
    _balance_senders(jobs, choice, holders, load)
    return jobs


@inlined
def _choose_relays(jobs: np.ndarray, choice: np.ndarray, bundle: np.ndarray, load: np.ndarray) -> None:
    """Gives the cross-node job of each bundle to one of its ranks and makes that rank the source of the others."""
    largest = 1
    for job in range(bundle.size):
        largest = max(largest, bundle[job])
    for size in range(largest, 1, -1):
        for first in range(bundle.size):
            if bundle[first] != size:
                continue
            relay = first
            for job in range(first, first + size):
                if load[jobs[job, DESTINATION_RANK]] < load[jobs[relay, DESTINATION_RANK]]:
                    relay = job
            relay_rank = jobs[relay, DESTINATION_RANK]
            source = jobs[first, SOURCE_RANK]
            begin, end = choice[first, 0], choice[first, 1]
            for job in range(first, first + size):
                jobs[job, SOURCE_RANK] = relay_rank
                jobs[job, RELAYED] = 1
                choice[job, 0] = choice[job, 1] = 0
            jobs[relay, SOURCE_RANK] = source
            jobs[relay, RELAYED] = 0
            choice[relay, 0], choice[relay, 1] = begin, end
            load[relay_rank] += size - 1


@inlined
def _balance_senders(jobs: np.ndarray, choice: np.ndarray, holders: np.ndarray, load: np.ndarray) -> None:
    """Moves jobs that have a choice of holders until the busiest sender cannot be relieved."""
    num_jobs, num_ranks = jobs.shape[0], load.shape[0]
    head, after = int32_zeros(num_ranks), int32_zeros(num_jobs)  # jobs with a choice, listed by their present source
    for rank in range(num_ranks):
        head[rank] = -1
    for job in range(num_jobs - 1, -1, -1):
        if choice[job, 1] - choice[job, 0] > 1:
            source = jobs[job, SOURCE_RANK]
            load[source] += 1
            after[job] = head[source]
            head[source] = job
    queue = int32_zeros(num_ranks)
    reached_by = int32_zeros(num_ranks)  # the job whose move brings one more to this rank
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
            job = head[queue[taken]]
            taken += 1
            while job >= 0 and target < 0:
                for at in range(choice[job, 0], choice[job, 1]):
                    rank = holders[at]
                    if reached_by[rank] == -2:
                        reached_by[rank] = job
                        queue[queued] = rank
                        queued += 1
                        if load[rank] <= top - 2:
                            target = rank
                            break
                job = after[job]
        if target < 0:
            return
        load[target] += 1
        while reached_by[target] >= 0:
            job = reached_by[target]
            source = jobs[job, SOURCE_RANK]
            if head[source] == job:
                head[source] = after[job]
            else:
                before = head[source]
                while after[before] != job:
                    before = after[before]
                after[before] = after[job]
            after[job] = head[target]
            head[target] = job
            jobs[job, SOURCE_RANK] = target
            target = source
        load[target] -= 1
