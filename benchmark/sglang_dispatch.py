"""What a layer's choice of replicas costs on a CPU inside SGLang: its own `dynamic`, and our `batch` in its place.

    make bench-sglang-dispatch

256 experts, 288 slots on 32 ranks, top-8, no a2a backend: every rank chooses for all tokens. Medians of one thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from equipoise.dispatch.dispatcher import ExpertDispatcher
from equipoise.dispatch.policy import DispatchPolicy
from equipoise.hosts.sglang.batch_dispatch import BatchDispatch
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.topology import EpTopology

TOPOLOGY = EpTopology(32, 4, 9)
NUM_EXPERTS, TOP_K = 256, 8
NUM_REPLICATED = TOPOLOGY.num_slots - NUM_EXPERTS


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    call()
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return 1e3 * median(taken)


def stock_dynamic(metadata: ExpertLocationMetadata) -> Callable[[torch.Tensor], torch.Tensor]:
    """SGLang's own function over the same placement."""
    from sglang.srt.eplb import expert_location_dispatch as theirs

    table = metadata.logical_to_physical_map[0]
    info = theirs.ExpertLocationDispatchInfo(
        ep_dispatch_algorithm="dynamic",
        partial_logical_to_rank_dispatch_physical_map=None,
        partial_logical_to_all_physical_map=table,
        partial_logical_to_all_physical_map_num_valid=(table >= 0).sum(-1),
        num_physical_experts=TOPOLOGY.num_slots,
        rank_invariant=True,
    )
    return lambda ids: theirs.topk_ids_logical_to_physical(ids, info)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repeats: shows that it runs")
    repeats = 5 if parser.parse_args().quick else 200
    torch.set_num_threads(1)
    metadata = ExpertLocationMetadata.trivial(1, NUM_EXPERTS, TOPOLOGY, max_replicas=NUM_REPLICATED + 1)
    dispatcher = ExpertDispatcher(metadata, rank=0, policy=DispatchPolicy("batch", "all"))
    batch = BatchDispatch(dispatcher, [0], rank=0, num_ranks=TOPOLOGY.num_ranks, replicated=True)
    dynamic = stock_dynamic(metadata)
    table = Table(title=f"{NUM_EXPERTS} + {NUM_REPLICATED} experts on {TOPOLOGY.num_ranks} ranks, top-{TOP_K}: a layer")
    for name in ("tokens", "SGLang `dynamic`", "our `batch`"):
        table.add_column(name, justify="right")
    generator = torch.Generator().manual_seed(0)
    for tokens in (1, 16, 128, 1024, 4096):
        ids = torch.rand(tokens, NUM_EXPERTS, generator=generator).topk(TOP_K).indices.to(torch.int32)
        theirs = milliseconds(lambda ids=ids: dynamic(ids), repeats)  # type: ignore[misc]
        ours = milliseconds(lambda ids=ids: batch.choose(0, ids), repeats)  # type: ignore[misc]
        table.add_row(f"{tokens:,}", f"{theirs:.3f} ms", f"{ours:.3f} ms")
    Console().print(table)


if __name__ == "__main__":
    main()
