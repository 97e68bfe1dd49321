"""The load that placement algorithms are compared on: recorded traces cut into windows, and synthetic load."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from equipoise.load.synthetic import SyntheticLoad, synthetic_trace
from equipoise.topology import EpTopology

KINDS = {
    "real": "real traces",
    "mixed": "real traces, tasks mixed",
    "synthetic": "synthetic drift and shift",
}
MIXED_BLOCK = 256  # consecutive tokens of one task, about a request; windows hold some of each task
TASKS = {
    "intent": ("dsv2lite_esft_intent.npz",),
    "translation": ("dsv2lite_esft_translation.npz",),
    "both": ("dsv2lite_esft_intent.npz", "dsv2lite_esft_translation.npz"),
}
GPT_OSS = "gptoss20b_freq_think.npz"

SMALL = EpTopology(32, 4, 3)  # 26x64 -> 96
NODE = EpTopology(8, 1, 9)  # 26x64 -> 72
GPT = EpTopology(16, 2, 3)  # 24x32 -> 48


@dataclass(frozen=True)
class Sequence:
    """Load windows (T, L, E) in the order they came, on a topology."""

    name: str
    windows: np.ndarray
    topology: EpTopology
    kind: str  # one of KINDS


def missing_traces(traces: Path) -> list[str]:
    """Names of the recorded traces that the folder lacks."""
    return [name for name in (*TASKS["both"], GPT_OSS) if not (traces / name).is_file()]


def real_sequences(traces: Path) -> list[Sequence]:
    """Token traces in windows of 1024 and 2048 tokens; gpt-oss with one subject a window. Empty without the files."""
    if missing_traces(traces):
        return []
    found = []
    for tokens in (1024, 2048):
        for task, files in TASKS.items():
            topk = np.concatenate([np.load(traces / name)["topk"] for name in files])
            windows = _count(topk, tokens, 64)
            found.append(Sequence(f"{task} {tokens} -> 96/32/4", windows, SMALL, "real"))
            found.append(Sequence(f"{task} {tokens} -> 72/8/1", windows, NODE, "real"))
    file = np.load(traces / GPT_OSS)
    subjects = file["freq"] * file["mean_tokens"][:, None, None]
    for first in (0, 200, 400, 600):
        found.append(Sequence(f"gpt-oss {first} -> 48/16/2", subjects[first : first + 16], GPT, "real"))
    return found


def mixed_sequences(traces: Path) -> list[Sequence]:
    """Both tasks in random order, block by block: what a server sees that answers many users. Empty without files."""
    if missing_traces(traces):
        return []
    topk = np.concatenate([np.load(traces / name)["topk"] for name in TASKS["both"]])
    num_blocks = len(topk) // MIXED_BLOCK
    blocks = topk[: num_blocks * MIXED_BLOCK].reshape(num_blocks, MIXED_BLOCK, *topk.shape[1:])
    found = []
    for seed, tokens in enumerate((1024, 2048)):
        order = np.random.default_rng(seed).permutation(num_blocks)
        windows = _count(blocks[order].reshape(-1, *topk.shape[1:]), tokens, 64)
        found.append(Sequence(f"mixed {tokens} -> 96/32/4", windows, SMALL, "mixed"))
        found.append(Sequence(f"mixed {tokens} -> 72/8/1", windows, NODE, "mixed"))
    return found


def _count(topk: np.ndarray, tokens: int, num_experts: int) -> np.ndarray:
    windows = []
    for first in range(0, len(topk) - tokens + 1, tokens):
        chunk = topk[first : first + tokens]
        windows.append([np.bincount(chunk[:, layer].ravel(), minlength=num_experts) for layer in range(topk.shape[1])])
    return np.array(windows, dtype=np.float64)


CONFIGURATIONS = {
    # name: (layers, logical experts, topology, top-k)
    "58x256 -> 288/32/4": (58, 256, EpTopology(32, 4, 9), 8),
    "58x256 -> 320/64/8": (58, 256, EpTopology(64, 8, 5), 8),
    "58x256 -> 432/144/18": (58, 256, EpTopology(144, 18, 3), 8),
    "48x128 -> 160/32/4": (48, 128, EpTopology(32, 4, 5), 8),
    "26x64 -> 96/32/4": (26, 64, SMALL, 6),
    "26x64 -> 72/8/1": (26, 64, NODE, 6),
    "24x32 -> 48/16/2": (24, 32, GPT, 4),
}


def synthetic_sequences(num_windows: int, most_layers: int) -> list[Sequence]:
    """Drift, and drift with a shift in the middle, for every configuration; at most ``most_layers`` layers of each."""
    found = []
    for name, (layers, experts, topology, top_k) in CONFIGURATIONS.items():
        for kind, shift_at in (("drift", ()), ("shift", (num_windows // 2,))):
            trace = synthetic_trace(
                SyntheticLoad(
                    num_windows,
                    min(layers, most_layers),
                    experts,
                    tokens_per_step=8192,
                    top_k=top_k,
                    drift_steps=60.0,
                    shift_at=shift_at,
                    shifted_fraction=0.5,
                    seed=len(found),
                )
            )
            found.append(Sequence(f"{kind} {name}", trace.logical_count.astype(np.float64), topology, "synthetic"))
    return found
