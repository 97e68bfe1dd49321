"""Load windows of one phase's tokens, held against counts made token by token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.config import EplbConfig, LoadPhase
from equipoise.distributed.in_memory import InMemoryHub
from equipoise.errors import ConfigError
from equipoise.load.recorder import ExpertDistributionRecorder
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.topology import EpTopology

L, P, E = 2, 6, 4
MAP = torch.tensor([[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 0, 0]])
METADATA = ExpertLocationMetadata.from_physical_to_logical(MAP, E, EpTopology(2, 1, 3), max_replicas=3)
PHASES = ("prefill", "decode", "mixed")


def new_recorder(load_phase: LoadPhase) -> ExpertDistributionRecorder:
    config = EplbConfig(eplb_load_phase=load_phase, eplb_rebalance_num_iterations=100)
    hub = InMemoryHub(1)
    return ExpertDistributionRecorder.from_config(
        config, METADATA, hub.communicator(0), num_windows=8, replicated=False
    )


def step_of(recorder: ExpertDistributionRecorder, phase: Any, num_decode: int, slots: np.ndarray, step: int) -> None:
    """A step as a manager takes it; ``slots``: (L, T, K), the same call of ``begin_step`` as on any other rank."""
    if phase is not None:
        recorder.begin_step(phase, num_decode)
    for layer in range(L):
        ids = torch.from_numpy(slots[layer])
        recorder.record(layer, ids)
        recorder.record_routed(layer, ids, ids)
    recorder.end_step(MAP, forward_pass_id=step, counted=True)


def load_of(slots: np.ndarray) -> np.ndarray:
    """(L, E) by the oracle: one token and one choice at a time."""
    load = np.zeros((L, E), dtype=np.int64)
    for layer, token, choice in np.ndindex(slots.shape):
        if slots[layer, token, choice] >= 0:
            load[layer, MAP[layer, slots[layer, token, choice]]] += 1
    return load


@pytest.mark.parametrize("load_phase", ["all", "prefill", "decode"])
@given(st.integers(0, 2**32 - 1), st.integers(1, 12))
@settings(deadline=None, max_examples=25)
def test_the_window_holds_the_tokens_of_its_phase_and_the_recording_all(
    load_phase: LoadPhase, seed: int, num_steps: int
) -> None:
    rng = np.random.default_rng(seed)
    recorder = new_recorder(load_phase)
    recorder.start_record()
    in_window, recorded, window_steps = np.zeros((L, E), np.int64), np.zeros((L, E), np.int64), 0
    for step in range(num_steps):
        slots = rng.integers(-1, P, (L, int(rng.integers(0, 7)), 2))
        phase = rng.choice([*PHASES, None])
        num_decode = {"prefill": 0, "decode": slots.shape[1]}.get(phase, int(rng.integers(0, slots.shape[1] + 1)))
        step_of(recorder, phase, num_decode, slots, step)
        recorded += load_of(slots)
        if load_phase == "all" or phase is None:
            taken, counts = slots, True
        else:
            taken = slots[:, :num_decode] if load_phase == "decode" else slots[:, num_decode:]
            counts = phase in (load_phase, "mixed")
        if counts:
            in_window += load_of(taken)
            window_steps += 1
    assert recorder.window_steps() == window_steps
    assert recorder.windows(8).sum(0).tolist() == in_window.tolist() or not window_steps
    assert recorder.snapshot().logical_count.sum(0).tolist() == recorded.tolist()


def test_a_mixed_step_without_such_tokens_on_this_rank_is_a_step_of_the_window_as_on_the_other_ranks() -> None:
    recorder = new_recorder("decode")
    step_of(recorder, "mixed", 0, np.zeros((L, 3, 2), np.int64), 0)
    assert recorder.window_steps() == 1
    assert recorder.windows(8).sum() == 0


def test_counts_of_a_host_in_a_mixed_step_count_whole() -> None:
    recorder = new_recorder("prefill")
    for phase in PHASES:
        recorder.begin_step(phase, 2)  # type: ignore[arg-type]
        recorder.record_counts(torch.ones(L, P, dtype=torch.int32))
        recorder.end_step(MAP, forward_pass_id=0, counted=True)
    assert recorder.window_steps() == 2
    assert recorder.windows(8).sum() == 2 * L * P


def test_a_step_that_does_not_count_leaves_nothing_for_the_next() -> None:
    recorder = new_recorder("decode")
    recorder.begin_step("mixed", 1)
    recorder.record_routed(0, *[torch.zeros(2, 2, dtype=torch.int64)] * 2)
    recorder.end_step(MAP, forward_pass_id=0, counted=False)
    step_of(recorder, "mixed", 1, np.ones((L, 2, 1), np.int64), 1)
    assert recorder.windows(8).sum() == L


def test_an_unknown_phase_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="eplb_load_phase must be one of all, prefill, decode, got 'both'") as caught:
        EplbConfig(eplb_load_phase="both")  # type: ignore[arg-type]
    assert caught.value.field == "eplb_load_phase"
