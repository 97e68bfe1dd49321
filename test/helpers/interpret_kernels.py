"""Runs the dispatch kernels in Triton's interpreter and compares them with the reference; run as a program.

Triton reads TRITON_INTERPRET when it is imported, so this has a process of its own. With a GPU and without that
variable the same cases run on the GPU. Argument: number of cases.
"""

from __future__ import annotations

import os
import sys
from itertools import accumulate

import torch
from hypothesis import HealthCheck, given, settings

from equipoise.dispatch.batch_cpu import CpuBatchDispatch
from equipoise.dispatch.batch_gpu import BLOCK, TritonBatchDispatch
from equipoise.dispatch.choice import Batch
from equipoise.dispatch.solver.assign import assign_slots
from equipoise.dispatch.solver.controls import ROTATION
from equipoise.dispatch.solver.quotas import solve_quotas
from equipoise.dispatch.tables import DispatchTables
from equipoise.load.recorder import count_slots
from helpers.dispatch_cases import DispatchCase, dispatch_cases

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


def check(case: DispatchCase, first_part: int) -> None:
    """Two steps on the same buffers, all of the scope's tokens in sight or gathered, with and without padding."""
    metadata, policy, ids = case.metadata.clone(DEVICE), case.policy, case.ids.to(DEVICE)
    topology = metadata.topology
    tables = DispatchTables(metadata)
    ranks = policy.ranks_of_scope(topology, case.rank)
    elsewhere = torch.zeros(len(ranks), case.num_experts, dtype=torch.int32)
    for place, part in enumerate(ids.cpu().tensor_split(len(ranks))):
        elsewhere[place] = case.count(part)
    own = case.rank - ranks.start

    def gather(counts: torch.Tensor) -> torch.Tensor:
        rows = elsewhere.to(counts.device)
        rows[own] = counts
        return rows

    host = DispatchTables(case.metadata).layer(0)
    kernels = TritonBatchDispatch(tables, policy, topology, case.rank, gather, max_ids=BLOCK)
    for step in range(2):
        controls = torch.from_numpy(policy.controls(topology, case.rank, step=step))
        unpadded = first_part if step else len(ids)
        seen = torch.where(torch.arange(len(ids))[:, None] < unpadded, case.ids, -1)
        rows = gather(case.count(seen)).cpu()
        quotas = solve_quotas(rows.sum(0), host, controls)
        expected = assign_slots(seen, quotas, host, int(controls[ROTATION]), rows[:own].sum(0))
        recorded = torch.ones(1, metadata.num_physical_experts + 1, dtype=torch.int32, device=DEVICE)
        padding_from = torch.tensor(unpadded, dtype=torch.int32, device=DEVICE)
        slots = kernels.dispatch(Batch(0, ids, None, recorded, padding_from))
        assert torch.equal(kernels.quotas.cpu(), quotas)
        assert slots.dtype == case.ids.dtype
        assert torch.equal(slots.cpu(), expected)
        counted = torch.ones_like(recorded, device="cpu")
        count_slots(counted[0], expected)
        assert torch.equal(recorded.cpu(), counted)
        kernels.advance(len(ids))
    bounds = [0, *accumulate(len(part) for part in case.ids.tensor_split(topology.num_ranks))]
    in_sight = TritonBatchDispatch(tables, policy, topology, case.rank, None)
    on_host = CpuBatchDispatch(DispatchTables(case.metadata), policy, topology, case.rank, None)
    padding_from = torch.tensor((bounds[case.rank] + bounds[case.rank + 1]) // 2)  # in the middle of the own part
    batch = Batch(0, case.ids, bounds, None, padding_from)
    found = in_sight.dispatch(batch._replace(ids=ids, num_unpadded=padding_from.to(DEVICE)))
    assert torch.equal(found.cpu(), on_host.dispatch(batch))


def main() -> None:
    cases = int(sys.argv[1])

    @given(dispatch_cases(max_tokens=300))
    @settings(
        deadline=None, max_examples=cases, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    def run(case: DispatchCase) -> None:
        check(case, case.first)

    run()
    print(f"{cases} cases, {'interpreted' if INTERPRETED else 'on a GPU'}")


if __name__ == "__main__":
    main()
