"""What only a GPU can settle of groups, dispatch, graphs and products, on one of them, most information a minute first.

`make test-gpu` runs it and reports; transfers are in test_transfers_on_gpu.py.
Each test notes its figures with ``record_property``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from equipoise.dispatch.dispatcher import ExpertDispatcher
from equipoise.dispatch.policy import DispatchPolicy
from equipoise.distributed.communicator import TorchCommunicator
from equipoise.distributed.groups import new_transfer_group
from equipoise.formats.trace_file import TraceDescription
from equipoise.load.recorder import ExpertDistributionRecorder
from equipoise.load.step_stream import CountStream, TokenStream
from equipoise.load.stream_file import TraceFileSink
from equipoise.load.trace import LoadTrace
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.topology import EpTopology
from helpers.placements import random_map
from helpers.run_ranks import run_ranks
from helpers.run_threads import results_of

TOPOLOGY = EpTopology(4, 2, 3)

# A group of size 1 whose all-reduce never ends within its timeout; argument: plain, blocking or late.
_WATCHDOG = """
import os, sys, time, datetime, torch, torch.distributed as dist
from equipoise.distributed.groups import new_transfer_group
kind = sys.argv[1]
torch.cuda.set_device(0)
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
make = (lambda: dist.new_group(backend="nccl")) if kind == "plain" else (lambda: new_transfer_group("nccl", os.environ))
group = make()
value = torch.ones(1, device="cuda")
dist.all_reduce(value, group=group)
torch.cuda.synchronize()
torch.cuda._sleep(int(4e10) if kind != "late" else int(6e9))
work = dist.all_reduce(value, group=group, async_op=True)
start = time.monotonic()
try:
    if kind == "late":
        time.sleep(1.0)
    work.wait(datetime.timedelta(seconds=2.0 if kind != "late" else 0.9))
    print("waited", flush=True)
except RuntimeError as error:
    print("timeout after", round(time.monotonic() - start, 2), flush=True)
if kind == "late":
    os._exit(0)
if kind == "blocking":
    dist.distributed_c10d._abort_process_group(group)
time.sleep(80)
group = make()
dist.all_reduce(value, group=group)
torch.cuda.synchronize()
print("alive", flush=True)
os._exit(0)
"""


@pytest.mark.gpu
@pytest.mark.timeout(60)
def test_versions_and_forks(record_property: Any) -> None:
    """Settles A6: counting GPUs and importing the engine leave a fork usable."""
    record_property("card", torch.cuda.get_device_name(0))
    record_property("torch", torch.__version__)
    record_property("nccl", ".".join(map(str, torch.cuda.nccl.version())))
    code = (
        "import os, torch\n"
        "os.environ.setdefault('PYTORCH_NVML_BASED_CUDA_CHECK', '1')\n"
        "assert torch.cuda.device_count() > 0\n"
        "import equipoise.engine.worker as worker\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    worker.require_usable_fork(); torch.zeros(1, device='cuda'); os._exit(0)\n"
        "assert os.waitpid(pid, 0)[1] == 0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=50)


@pytest.mark.gpu
@pytest.mark.timeout(240)
def test_a_timeout_ends_no_process(record_property: Any) -> None:
    """Settles A1: with a watchdog a timed-out wait kills the process a minute later; a transfer group has none."""
    kinds = ("plain", "blocking", "late")
    children = {
        kind: subprocess.Popen([sys.executable, "-c", _WATCHDOG, kind], stdout=subprocess.PIPE, text=True)
        for kind in kinds
    }
    said = {kind: child.communicate(timeout=200)[0].split("\n")[:-1] for kind, child in children.items()}
    codes = {kind: child.returncode for kind, child in children.items()}
    for kind in kinds:
        record_property(f"{kind} group", f"{'; '.join(said[kind])} (exit code {codes[kind]})")
    assert said["blocking"][-1] == "alive"
    assert said["blocking"][0].startswith("timeout after 2.")
    assert codes["blocking"] == 0


@pytest.mark.gpu
@pytest.mark.timeout(60)
@pytest.mark.parametrize("algorithm", ["static", "dynamic"])
def test_nothing_waits_for_the_device(algorithm: Any) -> None:
    """Settles B2 and B3, with torch's own check of synchronising calls."""

    def body(communicator: Any) -> None:
        metadata = ExpertLocationMetadata.trivial(3, 8, TOPOLOGY, max_replicas=5).clone("cuda")
        new = ExpertLocationMetadata.from_physical_to_logical(
            np.roll(metadata.physical_to_logical_map.cpu().numpy(), 1, axis=1), 8, TOPOLOGY
        )
        dispatcher = ExpertDispatcher(metadata, rank=0, policy=DispatchPolicy(algorithm))
        recorder = ExpertDistributionRecorder(metadata, communicator, period=8, num_windows=2, buffer_size=4)
        ids = torch.randint(0, 8, (16, 2), device="cuda")
        for checked in (False, True):  # once to load kernels
            torch.cuda.set_sync_debug_mode("error" if checked else "default")
            try:
                for layer in range(3):
                    recorder.record(layer, dispatcher.dispatch(layer, ids))
                    dispatcher.dispatch(layer, ids, counts=recorder.counts, num_unpadded=recorder.counts[0, 0])
                recorder.end_step(metadata.physical_to_logical_map, forward_pass_id=int(checked), counted=True)
                dispatcher.advance(16)
                metadata.update_layers_(new, [0, 2])
                dispatcher.refresh([0, 2])
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(metadata.physical_to_logical_map[2].cpu(), new.physical_to_logical_map[2])

    results_of(body, 1)


@pytest.mark.gpu
@pytest.mark.timeout(60)
def test_a_step_is_streamed_without_waiting_for_the_device(tmp_path: Path, record_property: Any) -> None:
    """Counts of each step reach the file through pinned memory, while the next step is being counted."""
    shape = (58, 288)
    p2l = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0))
    sink = TraceFileSink(tmp_path / "t.safetensors", TraceDescription(58, 256))
    stream = CountStream(58, 256, sink, num_staged=64, max_records=1000, device=torch.device("cuda"))
    on_device, counts = p2l.cuda(), torch.zeros(shape, dtype=torch.int32, device="cuda")
    seconds = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(60):
            counts.fill_(step)
            began = time.perf_counter()
            stream.add(counts, on_device, step, "decode")
            seconds.append(time.perf_counter() - began)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.stop()
    stream.join(20)
    record_property("us a step", round(1e6 * sorted(seconds)[len(seconds) // 2], 1))
    report = stream.report()
    assert (report.num_written, report.num_dropped, report.error) == (60, 0, None)
    one = torch.zeros(58, 256, dtype=torch.int64).scatter_add_(1, p2l, torch.ones(shape, dtype=torch.int64))
    for step, found in enumerate(LoadTrace.open(sink.path).logical_count):
        assert torch.equal(torch.from_numpy(found.astype(np.int64)), one * step), step


@pytest.mark.gpu
@pytest.mark.timeout(60)
def test_tokens_are_streamed_without_waiting_for_the_device(tmp_path: Path) -> None:
    layers, top_k, sizes = 5, 4, [3, 0, 17, 1] * 5
    description = TraceDescription(layers, 64, tokens=True, top_k=top_k)
    sink = TraceFileSink(tmp_path / "t.safetensors", description)
    options = {"dtype": torch.int16, "num_staged": 4096, "max_records": 10_000, "device": torch.device("cuda")}
    stream = TokenStream(layers, top_k, sink, **options)  # type: ignore[arg-type]
    ids = [torch.randint(0, 64, (layers, size, top_k)) for size in sizes]
    on_device = [each.cuda() for each in ids]
    unused = torch.zeros(0, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step, of_step in enumerate(on_device):
            for layer in range(layers):
                stream.record_tokens(layer, of_step[layer])
            stream.add(unused, unused, step, "decode")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.stop()
    stream.join(20)
    assert (stream.report().num_written, stream.report().num_dropped) == (len(sizes), 0)
    trace = LoadTrace.open(sink.path)
    empty = torch.full((layers, 1, top_k), -1)  # of a step without tokens
    expected = torch.cat([each if each.shape[1] else empty for each in ids], dim=1).swapaxes(0, 1)
    assert trace.topk_ids is not None
    assert np.array_equal(trace.topk_ids, expected.numpy())


@pytest.mark.gpu
@pytest.mark.timeout(120)
@pytest.mark.parametrize("algorithm", ["static", "dynamic", "batch"])
def test_a_captured_graph_follows_the_maps(algorithm: Any, record_property: Any) -> None:
    """Settles invariant 4: replays see maps, turns and padding that changed in place, and count like the CPU."""
    layers, experts, topology = 58, 256, EpTopology(32, 4, 9)
    rng = np.random.default_rng(0)
    maps = [random_map(rng, experts, topology, layers) for _ in range(4)]

    def metadata_of(device: str) -> ExpertLocationMetadata:
        first = ExpertLocationMetadata.from_physical_to_logical(maps[0], experts, topology, max_replicas=33)
        return first.clone(device)

    live, twin = metadata_of("cuda"), metadata_of("cpu")
    dispatchers = [ExpertDispatcher(each, rank=3, policy=DispatchPolicy(algorithm)) for each in (live, twin)]
    ids = torch.randint(-1, experts, (64, 8))
    on_device, unpadded = ids.cuda(), torch.tensor(64, dtype=torch.int32, device="cuda")
    counts = torch.zeros(layers, topology.num_slots + 1, dtype=torch.int32, device="cuda")

    def step() -> list[torch.Tensor]:
        each = range(layers)
        return [dispatchers[0].dispatch(n, on_device, counts=counts, num_unpadded=unpadded) for n in each]

    step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    record_property("eager us a layer", round(1e6 * (time.perf_counter() - start) / layers, 1))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        slots = step()
    counts.zero_()
    total = torch.zeros_like(counts, device="cpu")
    for number in range(40):
        if number % 10 == 5:
            new = ExpertLocationMetadata.from_physical_to_logical(maps[number // 10], experts, topology)
            for metadata, dispatcher in zip((live, twin), dispatchers, strict=True):
                metadata.update_layers_(new, list(range(layers)))
                dispatcher.refresh(list(range(layers)))
        unpadded.fill_(64 - number)
        graph.replay()
        for layer in range(layers):
            expected = dispatchers[1].dispatch(layer, ids, counts=total, num_unpadded=64 - number)
            assert torch.equal(slots[layer].cpu(), expected)
        for dispatcher in dispatchers:
            dispatcher.advance(64)
    assert torch.equal(counts.cpu(), total)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        graph.replay()
    torch.cuda.synchronize()
    record_property("captured us a layer", round(1e6 * (time.perf_counter() - start) / layers / 20, 1))


@pytest.mark.gpu
@pytest.mark.timeout(60)
def test_products_depend_on_their_number_of_rows(record_property: Any) -> None:
    """Settles A11's wording: whether one row's result is the same bits, whatever the number of rows beside it."""
    torch.backends.cuda.matmul.allow_tf32 = False
    for dtype in (torch.float32, torch.bfloat16):
        weight, rows = (
            torch.randn(1024, 2048, device="cuda", dtype=dtype),
            torch.randn(512, 2048, device="cuda", dtype=dtype),
        )
        alone = torch.nn.functional.linear(rows[:1], weight)
        differing = sum(
            not torch.equal(torch.nn.functional.linear(rows[:count], weight)[:1], alone) for count in range(2, 513)
        )
        record_property(f"{dtype}: numbers of rows that change row 0, of 511", differing)


@pytest.mark.gpu
@pytest.mark.timeout(60)
def test_every_nccl_line_runs_once() -> None:
    """On a group of size 1, which is all that one GPU allows."""
    run_ranks(_nccl_alone, 1, timeout=50)


def _nccl_alone(_rank: int, _world_size: int) -> None:
    torch.cuda.set_device(0)
    make = lambda: new_transfer_group("nccl", os.environ)  # noqa: E731
    gloo = lambda: dist.new_group(backend="gloo")  # noqa: E731
    communicator = TorchCommunicator(
        make(), torch.device("cuda", 0), control_group=gloo(), new_group=make, new_control_group=gloo
    )
    assert communicator.knows_streams
    communicator.connect(10.0)
    communicator.rebuild()
    communicator.rebuild(control=True)
    values = torch.arange(3, device="cuda")
    communicator.all_reduce_sum_(values)
    dist.all_reduce(values, group=communicator._group)
    assert values.tolist() == [0, 1, 2]
