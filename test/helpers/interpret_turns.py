"""Runs the kernel of ``static`` and ``dynamic`` in Triton's interpreter, against torch and numba; run as a program.

Triton reads TRITON_INTERPRET when it is imported, so this has a process of its own. With a GPU and without that
variable the same cases run on the GPU. Argument: number of cases.
"""

from __future__ import annotations

import os
import sys

import torch
from hypothesis import HealthCheck, given, settings

from equipoise import EpTopology, ExpertLocationMetadata
from equipoise.dispatch.choice import Batch
from equipoise.dispatch.turns import CpuTurns, TurnsTables
from equipoise.dispatch.turns_gpu import TritonTurns
from helpers.torch_turns import TorchTurns
from helpers.turn_cases import TurnCase, turn_cases

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


def check(case: TurnCase) -> None:
    """Every batch of the case: the same slots in the same dtype, the same counts, whatever moved before."""
    metadata = case.metadata.clone(DEVICE)
    tables = TurnsTables(metadata, case.rank, nearest=case.nearest, live_ranks=case.live_ranks)
    # On a GPU the sums of lost ranks' tables are the device's own, so both read the same ones there.
    ways = [TritonTurns(tables), TorchTurns(tables), *([CpuTurns(tables)] if INTERPRETED else [])]
    for step in case.steps:
        ids = step.ids.to(DEVICE)
        unpadded = None if step.num_unpadded is None else step.num_unpadded.to(DEVICE)
        answers = []
        for way in ways:
            counts = torch.ones(2, metadata.num_physical_experts + 1, dtype=torch.int32, device=DEVICE)
            batch = Batch(case.layer, ids, step.bounds, counts, unpadded)
            slots, uncounted = way.dispatch(batch), way.dispatch(batch._replace(counts=None))
            assert slots.dtype == ids.dtype
            assert torch.equal(slots, uncounted)
            answers.append((slots, counts))
            way.advance(step.advance)
        for slots, counts in answers[1:]:
            assert torch.equal(answers[0][0], slots), (answers[0][0], slots)
            assert torch.equal(answers[0][1], counts)
        metadata.update_layers_(case.target, step.moves)
        if step.moves:
            tables.refresh(step.moves)


def check_largest() -> None:
    """1024 experts in 2048 slots on 512 ranks, 1025 of them one expert's; ids that do not lie side by side."""
    p2l = torch.cat([torch.arange(1024), torch.zeros(1024, dtype=torch.int64)])[None]
    weights = torch.cat([torch.tensor([0.0]), torch.ones(1023), torch.full((1024,), 1 / 1024)])[None]
    metadata = ExpertLocationMetadata.from_physical_to_logical(
        p2l, 1024, EpTopology(512, 64, 4), dispatch_weights=weights, device=DEVICE
    )
    ids = torch.tensor([0, 1023, -1, 0, 5] * 20, dtype=torch.int32, device=DEVICE).repeat_interleave(2)[::2]
    assert not ids.is_contiguous()
    for nearest in (False, True):
        tables = TurnsTables(metadata, 511, nearest=nearest, live_ranks=None)
        ways = TritonTurns(tables), TorchTurns(tables)
        found, expected = (way.dispatch(Batch(0, ids[:, None])) for way in ways)
        assert torch.equal(found, expected)
        assert len(found[ids == 0].unique()) == (1 if nearest else 40)


def main() -> None:
    cases = int(sys.argv[1])

    @given(turn_cases(max_tokens=40))
    @settings(
        deadline=None, max_examples=cases, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    def run(case: TurnCase) -> None:
        check(case)

    run()
    check_largest()
    print(f"{cases} cases, {'interpreted' if INTERPRETED else 'on a GPU'}")


if __name__ == "__main__":
    main()
