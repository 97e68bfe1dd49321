"""Executes a transfer plan for all ranks in one process, by the programs of the ranks, on arrays of expert ids."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from equipoise.topology import EpTopology
from equipoise.transfer.planning.plan import LayerTransferPlan
from equipoise.transfer.planning.rank_program import RankProgram, rank_program


@dataclass
class Executed:
    row: np.ndarray  # (P,): what the slots hold in the end
    peak_staged: int  # most experts in staging on any rank at once
    crossings: int  # transfers between nodes
    transfers: int


def execute_layer(layer: LayerTransferPlan, start: np.ndarray, topology: EpTopology) -> Executed:
    """Runs all batches of a layer; asserts that nothing is read before it is there and that every map is reached."""
    live = start.reshape(topology.num_ranks, -1).astype(np.int64).copy()
    done = Executed(start, 0, 0, 0)
    for batch in layer.batches:
        programs = [rank_program(batch, rank, topology) for rank in range(topology.num_ranks)]
        staged = [np.full(program.num_staging_slots, -1) for program in programs]
        for index in range(batch.num_rounds):
            landed = [run_round(index, rank, programs, live, staged) for rank in range(topology.num_ranks)]
            for rank, arrival in enumerate(landed):
                if arrival is not None:
                    sender, place, expert = arrival
                    assert staged[rank][place] == -1
                    staged[rank][place] = expert
                    done.transfers += 1
                    done.crossings += not topology.same_node(sender, rank)
        for rank, program in enumerate(programs):
            commit(program, live[rank], staged[rank])
            done.peak_staged = max(done.peak_staged, program.num_staging_slots)
        done.row = live.reshape(-1).copy()
        assert done.row.tolist() == batch.new_map.tolist()
    return done


def run_round(
    index: int, rank: int, programs: list[RankProgram], live: np.ndarray, staged: list[np.ndarray]
) -> tuple[int, int, int] | None:
    """What ``rank`` receives in a round: (sender, staging index, expert that its sender really has there)."""
    mine = next((each for each in programs[rank].rounds if each.number == index), None)
    if mine is None or mine.receive is None:
        return None
    theirs = next(each for each in programs[mine.receive.peer].rounds if each.number == index)
    assert theirs.send is not None
    assert theirs.send.peer == rank
    place = theirs.send.place
    expert = live[mine.receive.peer][place] if place >= 0 else staged[mine.receive.peer][~place]
    assert expert == mine.receive.expert == theirs.send.expert
    return mine.receive.peer, mine.receive.staging_index, int(expert)


def commit(program: RankProgram, live: np.ndarray, staged: np.ndarray) -> None:
    for source, destination in program.copies:
        content = live[source] if source >= 0 else staged[~source]
        assert content >= 0
        if destination >= 0:
            live[destination] = content
        else:
            staged[~destination] = content
