"""What dispatch, recording and streaming add to the embedded engine's steps, on and off in turns, step by step.

The demo model on several ranks of this machine. Off: nothing is dispatched or counted. On or off, a batch goes to the
slots that its first dispatch gave it. So both compute the same, and the difference is what dispatch and recording cost,
whatever they gain. Each step that is on is held against the one after it, which is off: medians of these differences
count, since a shared machine is faster at one time than at another. Both draw their batches from the same few, never
the one just computed: a step after the same step would find its experts' weights in the cache. Ranks wait for each
other, so single differences scatter by a fifth of a step; the standard error of their median is told as well, and the
difference in CPU seconds, which does not hang on who waits. Each rank stays on a core of its own if there are enough.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from math import pi, sqrt
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from statistics import NormalDist, median, quantiles

import torch

import equipoise.engine.demo_model
from dispatch_routing import Routing
from equipoise.config import EngineConfig, EplbConfig, ServeConfig
from equipoise.dispatch.dispatcher import ExpertDispatcher
from equipoise.dispatch.policy import DispatchPolicy
from equipoise.engine.groups import make_groups
from equipoise.engine.model.blueprint import ModelBlueprint
from equipoise.engine.model.experts import EpContext, token_bounds
from equipoise.engine.model.runner import ModelRunner
from equipoise.engine.model.step_batch import Segment, StepBatch
from equipoise.formats.trace_file import TraceDescription
from equipoise.load.recorder import ExpertDistributionRecorder
from equipoise.load.step_stream import CountStream
from equipoise.load.stream_file import TraceFileSink

NUM_RANKS = 2  # as many as a small machine has cores: more would wait for each other
DECODING, PROMPT = (1, 8, 32), 256
NUM_BATCHES = 8  # of a kind, each of other tokens
JUDGED, FEWER = "batch", 4  # the policy that bars are about; others take so many times fewer rounds
POLICIES = {
    "dynamic": DispatchPolicy("dynamic"),
    "batch": DispatchPolicy("batch"),
    "batch, scope all": DispatchPolicy("batch", "all"),
}


def engine_overhead(quick: bool) -> dict[str, dict[str, float]]:
    """Milliseconds of a step, by kind of step and policy: off, what dispatch adds, what recording adds to that."""
    engine = EngineConfig("demo", ep_size=NUM_RANKS, nnodes=1, device="cpu", max_running_requests=max(DECODING))
    config = ServeConfig(engine, EplbConfig(ep_num_redundant_experts=8))
    blueprint = ModelBlueprint.prepare(config)
    context = multiprocessing.get_context("fork")  # ranks share what was prepared, as the engine's own do
    mine, theirs = context.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(
                target=_run_rank, args=(config, blueprint, r, Path(folder), theirs if r == 0 else None, quick)
            )
            for r in range(NUM_RANKS)
        ]
        for process in ranks:
            process.start()
        theirs.close()
        try:
            found: dict[str, dict[str, float]] = mine.recv()
        finally:
            for process in ranks:
                process.join(10)
                process.kill()
    return found


def _run_rank(
    config: ServeConfig, blueprint: ModelBlueprint, rank: int, rendezvous: Path, pipe: Connection | None, quick: bool
) -> None:
    torch.set_num_threads(1)
    _stay_on_one_core(rank)
    device = torch.device("cpu")
    groups = make_groups(rank, NUM_RANKS, rendezvous, device, "host", os.environ)
    runner = ModelRunner(blueprint, rank, device, config)
    metadata = blueprint.metadata.clone()
    dispatchers = {name: ExpertDispatcher(metadata, rank=rank, policy=policy) for name, policy in POLICIES.items()}
    recorder = ExpertDistributionRecorder(metadata, groups.serving, period=80, num_windows=8, buffer_size=1)
    routing = Routing(dispatchers, recorder, metadata.physical_to_logical_map)
    description = TraceDescription(metadata.num_layers, metadata.num_logical_experts)
    routing.stream = CountStream(
        metadata.num_layers,
        metadata.num_logical_experts,
        TraceFileSink(rendezvous / f"rank_{rank}.safetensors", description),
        num_staged=EplbConfig.expert_distribution_stream_buffer_size,
        max_records=1 << 20,
        device=device,
    )
    runner.connect(EpContext(blueprint.topology, rank, groups.experts, routing.route))
    found = {
        f"{kind}, {policy}": _measure(
            runner, routing, policy, batches, rank, rounds if policy == JUDGED else rounds // FEWER
        )
        for kind, batches, rounds in _batches(quick)
        for policy in POLICIES
    }
    routing.stream.stop()
    routing.stream.join(10)
    for values in found.values():
        values["steps dropped"] = routing.stream.report().num_dropped
    if pipe is not None:
        pipe.send(found)


def _stay_on_one_core(rank: int) -> None:
    """Where this process may use one for each rank, and the system lets it choose."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) >= NUM_RANKS:
            os.sched_setaffinity(0, cores[rank : rank + 1])


def _batches(quick: bool) -> list[tuple[str, list[StepBatch], int]]:
    """Name, batches of that kind, how many rounds of them."""
    text = "".join(equipoise.engine.demo_model.prompts()["prose"]).encode()

    def tokens(first: int, stride: int, count: int) -> tuple[int, ...]:
        return tuple(text[(first + stride * i) % len(text)] for i in range(count))

    found = []
    for count in DECODING[1:2] if quick else DECODING:
        segments = tuple(Segment(row, 64, 1) for row in range(count))
        batches = [StepBatch(segments, tokens(101 * i, 37, count), tuple(range(count))) for i in range(NUM_BATCHES)]
        found.append((f"decode, {count} requests", batches, 10 if quick else 800))
    prompts = [StepBatch((Segment(0, 0, PROMPT),), tokens(101 * i, 1, PROMPT), (0,)) for i in range(NUM_BATCHES)]
    found.append((f"prefill, {PROMPT} tokens", prompts, 10 if quick else 400))
    return found


def _measure(
    runner: ModelRunner, routing: Routing, policy: str, batches: list[StepBatch], rank: int, rounds: int
) -> dict[str, float]:
    bounds = token_bounds(batches[0].num_tokens, NUM_RANKS)
    num_tokens = bounds[rank + 1] - bounds[rank]
    routing.begin(policy)

    def step(mode: str, number: int) -> tuple[float, float]:
        routing.mode, routing.batch = mode, number
        return _timed_step(runner, routing, batches[number], num_tokens)

    for number in range(len(batches)):
        step("record", number)
    draw, number = Random(0), 0  # alike on every rank
    modes = ("dispatch", "record", "stream")
    seconds: dict[str, list[float]] = {name: [] for name in (*modes, "off", "CPU", "inside", "inside stream")}
    for turn in range(rounds + 3):
        for mode in (*modes[turn % 3 :], *modes[: turn % 3]):
            routing.inside = 0.0
            number = _another(draw, number, len(batches))
            on, cpu_on = step(mode, number)
            inside = routing.inside
            number = _another(draw, number, len(batches))
            off, cpu_off = step("remember", number)
            if turn < 3:
                continue
            seconds[mode].append(on - off)
            seconds["off"].append(off)
            if mode == "record":
                seconds["CPU"].append(cpu_on - cpu_off)
            if mode != "dispatch":
                seconds["inside" if mode == "record" else "inside stream"].append(inside)
    return _summary(seconds)


def _another(draw: Random, number: int, count: int) -> int:
    """One of ``count`` numbers other than this one."""
    return (number + draw.randrange(1, count)) % count


def _timed_step(runner: ModelRunner, routing: Routing, batch: StepBatch, num_tokens: int) -> tuple[float, float]:
    """Seconds, and CPU seconds of all threads."""
    began, cpu_began = time.perf_counter(), time.process_time()
    runner.forward(batch)
    routing.end_step(num_tokens)
    return time.perf_counter() - began, time.process_time() - cpu_began


def _summary(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Milliseconds of a step that is off, and what is added to it, as parts of that."""
    names = ("off", "dispatch", "record", "stream", "inside", "inside stream")
    off, dispatch, record, stream, inside, inside_stream = (1e3 * median(seconds[name]) for name in names)
    return {
        "off": off,
        "dispatch adds": dispatch / off,
        "dispatch and recording add": record / off,
        "CPU": 1e3 * median(seconds["CPU"]) / off,
        "standard error of CPU": 1e3 * _error_of_median(seconds["CPU"]) / off,
        "standard error": 1e3 * _error_of_median(seconds["record"]) / off,
        "recording adds": (record - dispatch) / off,
        "streaming adds": (stream - record) / off,
        "inside streaming": (inside_stream - inside) / off,
        # By a clock inside them: less noise, without what they cool down.
        "inside dispatch and recording": inside / off,
    }


def _error_of_median(values: list[float]) -> float:
    """Standard error of the median, of values that lie about it as normal ones do."""
    lower, _, upper = quantiles(values)
    spread = (upper - lower) / (2 * NormalDist().inv_cdf(0.75))
    return spread * sqrt(pi / 2 / len(values))


Bar = Callable[[str, float, float], None]


def overhead_bars(found: dict[str, dict[str, float]], bar: Bar) -> None:
    """What `batch` and recording may add, as parts of a step."""
    for kind, values in found.items():
        if kind.endswith(f", {JUDGED}"):
            limit = 0.02 if kind.startswith("prefill") else 0.03
            bar(f"{kind}: dispatch and recording add", values["dispatch and recording add"], limit)
            bar(f"{kind}: recording adds", values["recording adds"], 0.01)
            bar(f"{kind}: streaming each step adds", values["streaming adds"], 0.01)
