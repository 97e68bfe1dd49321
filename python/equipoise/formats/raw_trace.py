"""What every reader of recorded load returns, before LoadTrace checks it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

UNKNOWN, PREFILL, DECODE, MIXED = 0, 1, 2, 3
"""Phase of a step. PREFILL..MIXED carry SGLang's numbers of ForwardMode EXTEND, DECODE, MIXED."""

PHASE_NAMES = ("unknown", "prefill", "decode", "mixed")

StepPhase = Literal["prefill", "decode", "mixed"]


@dataclass(frozen=True, eq=False)
class RawTrace:
    """The fields of a LoadTrace as a file holds them; see there for shapes and meaning.

    Attributes:
        found: what the file is, in a few words.
        notes: what was guessed, dropped or ignored, a sentence each.
        merge_key: recordings with equal keys are one recording in several files (None: stands alone).
    """

    logical_count: np.ndarray
    forward_pass_ids: np.ndarray | None = None
    physical_count: np.ndarray | None = None
    physical_to_logical_map: np.ndarray | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    layer_ids: np.ndarray | None = None
    phases: np.ndarray | None = None
    timestamps: np.ndarray | None = None
    rank_count: np.ndarray | None = None
    topk_ids: np.ndarray | None = None
    token_offsets: np.ndarray | None = None
    found: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReadOptions:
    """What a person may say about a file that does not say it itself.

    Attributes:
        tokens_per_step: for single tokens without step boundaries: how many consecutive ones make a step.
        num_logical_experts: E, where a file names only the experts that were chosen.
        read_as: ``counts`` or ``tokens``, for an array without a name.
    """

    tokens_per_step: int = 128
    num_logical_experts: int | None = None
    read_as: str = "auto"
