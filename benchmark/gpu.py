"""What balancing costs on a GPU: dispatch, commits, checksums, and moving experts over the host (or NCCL, with two).

Device times are taken by events, not by the host's clock. Without a GPU it says so and measures nothing, but the
instructions of the kernel that ``static`` and ``dynamic`` launch, which is compiled for an H100 anywhere.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "test"))

import numpy as np
import torch

from equipoise.dispatch.dispatcher import ExpertDispatcher
from equipoise.dispatch.policy import DispatchPolicy
from equipoise.distributed.in_memory import InMemoryHub
from equipoise.distributed.pinned_host import PinnedHostCommunicator
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.topology import EpTopology
from equipoise.transfer.execution.updater import ExpertLocationUpdater
from equipoise.transfer.memory.verification import checksum_on_device
from equipoise.transfer.planning.plan import plan_transfer

MIB = 1 << 20


def device_ms(work: Callable[[], object], repeats: int) -> float:
    """Median milliseconds on the device, by timed events."""
    work()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def host_ms(work: Callable[[], object], repeats: int) -> float:
    """Median milliseconds that the host needs, while the device is busy with something else."""
    work()
    times = []
    for _ in range(repeats):
        torch.cuda._sleep(40_000_000)  # a forward pass of about 20 ms
        start = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - start))
        torch.cuda.synchronize()
    return statistics.median(times)


def captured_us(work: Callable[[int], object], repeats: int, layers: int = 58) -> float:
    """Median microseconds a layer on the device, in a graph of ``work(layer)`` for every layer."""
    work(0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [work(layer) for layer in range(layers)]  # so that each has a place of its own
    us = 1e3 * device_ms(graph.replay, repeats) / layers
    del kept
    return us


def print_instructions() -> None:
    """Of the kernel of ``static`` and ``dynamic``; a warp runs each once for two ids a thread."""
    try:
        from helpers.compile_kernels import turns_figures
    except ImportError:
        print("No Triton: the kernel of static and dynamic is not compiled.")
        return
    for row in turns_figures(90):
        name = f"kernel of {row['kernel']:8s} {row['tile']:9s} {row['ids']} ids"
        print(f"{name}  {row['instructions']} instructions on sm_90")
    print("reads that follow one another: copy 1, static 2, dynamic 2 and 1 more for each four further replicas")


def measure_dispatch(repeats: int) -> None:
    topology = EpTopology(32, 4, 9)
    metadata = ExpertLocationMetadata.trivial(58, 256, topology, max_replicas=33).clone("cuda")
    new = ExpertLocationMetadata.from_physical_to_logical(
        np.roll(metadata.physical_to_logical_map.cpu().numpy(), 9, axis=1), 256, topology
    )
    counts = torch.zeros(58, topology.num_slots + 1, dtype=torch.int32, device="cuda")
    for tokens in (1, 64, 4096):
        ids = torch.randint(0, 256, (tokens, 8), device="cuda")
        copy = captured_us(lambda _, ids=ids: ids.clone(), repeats)  # type: ignore[misc]
        print(f"copy of the ids   {tokens:5d} tokens  {copy:9.2f} us in a captured graph")
        for algorithm in ("static", "dynamic", "batch"):
            dispatcher = ExpertDispatcher(metadata, rank=0, policy=DispatchPolicy(algorithm))  # type: ignore[arg-type]
            choose = lambda n, d=dispatcher, ids=ids: d.dispatch(n, ids, counts=counts)  # noqa: E731
            eager = 1e3 * device_ms(lambda choose=choose: choose(0), repeats)  # type: ignore[misc]
            us = captured_us(choose, repeats)
            name = f"dispatch {algorithm:8s} {tokens:5d} tokens"
            bar = " (at most 1.10)" if algorithm == "dynamic" else ""
            print(f"{name}  {us:9.2f} us a layer in a graph, {us / copy:.2f} of a copy{bar}; alone {eager:.1f} us")
    ms = host_ms(lambda: metadata.update_layers_(new, [0]), repeats)
    print(f"maps of one layer, behind a forward pass     {1e3 * ms:9.1f} us of the host")


def measure_weights(num_mib: int, slots: int, repeats: int) -> None:
    expert = torch.randint(0, 256, (num_mib * MIB,), dtype=torch.uint8, device="cuda")
    ms = device_ms(lambda: checksum_on_device([expert]), repeats)
    print(f"checksum of {num_mib} MiB                            {ms:9.2f} ms, {expert.numel() / ms / 1e6:.0f} GB/s")
    topology = EpTopology(2, 1, slots)
    old = np.arange(2 * slots)[None]
    new = np.roll(old, slots, axis=1)
    hub = InMemoryHub(2)
    updaters = []
    for communicator in hub.communicators():
        weights = [[torch.zeros(slots, num_mib * MIB, dtype=torch.uint8, device="cuda")]]
        host = PinnedHostCommunicator(communicator, torch.device("cuda", 0))
        updaters.append(ExpertLocationUpdater(host, topology, weights, staging_bytes=(slots + 1) * num_mib * MIB + MIB))
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda updater: updater.warm_up(), updaters))
        start = time.perf_counter()
        plan = plan_transfer(old, new, topology)
        staged = list(pool.map(lambda updater: updater.stage(0, plan.layers[0].batches[0]), updaters))
        seconds = time.perf_counter() - start
    moved = 2 * slots * num_mib * MIB
    print(f"over the host, both ways on one GPU          {moved / seconds / 1e9:9.2f} GB/s")
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start = time.perf_counter()
    begin.record()
    updaters[0].commit(staged[0])
    end.record()
    on_host = 1e3 * (time.perf_counter() - start)
    end.synchronize()
    print(
        f"commit of {slots} slots                            {begin.elapsed_time(end):9.2f} ms, host {on_host:.2f} ms"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small experts, few repeats")
    parser.add_argument("--mib", type=int, default=44, help="of an expert (default: %(default)s, DeepSeek-V3 in fp8)")
    parser.add_argument("--slots", type=int, default=16, help="of a rank (default: %(default)s)")
    arguments = parser.parse_args()
    print_instructions()
    if not torch.cuda.device_count():
        print("No GPU: nothing to measure.")
        return 0
    mib, slots, repeats = (2, 4, 5) if arguments.quick else (arguments.mib, arguments.slots, 50)
    print(torch.cuda.get_device_name(0))
    measure_dispatch(repeats)
    measure_weights(mib, slots, repeats)
    return 0


if __name__ == "__main__":
    sys.exit(main())
