"""ExpertDistributionRecorder: tokens per physical expert, per layer and step, counted on the device.

Counting adds no host sync. At the end of a step its physical counts are folded into logical ones through the map
that was live during that step, so a window stays true when experts move in the middle of it. Ranks are summed only
when somebody asks. The planner's load window is always open; an operator's recording beside it never takes it away.
Where the window takes the tokens of one phase alone, those of a mixed step are counted a second time, by themselves;
a recording takes the tokens of all phases.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from equipoise.config import EplbConfig, LoadPhase
from equipoise.distributed.communicator import Communicator
from equipoise.errors import LoadError, PhaseError
from equipoise.formats.raw_trace import StepPhase
from equipoise.load.recording import LoadSnapshot, StepRecording
from equipoise.load.step_fold import StepFold
from equipoise.load.step_writer import StepWriter
from equipoise.load.window_ring import WindowRing
from equipoise.placement.metadata import ExpertLocationMetadata


class ExpertDistributionRecorder:
    """Counts of this rank's tokens; every rank has one and calls it alike.

    Args:
        metadata: the live placement, for its shape and its device.
        communicator: sums over ranks.
        period: steps that a plan looks back on.
        num_windows: windows that they can be told apart in.
        buffer_size: steps that a recording keeps.
        keep_physical: a recording keeps physical counts as well.
        replicated: every rank counts the tokens of all ranks, so nothing is summed over them.
        load_phase: whose tokens the load window takes.

    Attributes:
        counts: (L, P + 1) int32 on the device, of the step under way; column ``P`` takes what has no expert. Its
            address never changes: a kernel that dispatches may count into it.
        replicated: as given.
        stream: takes every step that counts, of all phases; None: no streamed recording runs.
        top_k: experts of a token, once tokens were seen.
    """

    def __init__(
        self,
        metadata: ExpertLocationMetadata,
        communicator: Communicator,
        *,
        period: int,
        num_windows: int,
        buffer_size: int,
        keep_physical: bool = False,
        replicated: bool = False,
        load_phase: LoadPhase = "all",
    ) -> None:
        layers, slots, experts = metadata.num_layers, metadata.num_physical_experts, metadata.num_logical_experts
        device = metadata.physical_to_logical_map.device
        self._communicator = communicator
        self.replicated = replicated
        self.stream: StepWriter | None = None
        self.top_k: int | None = None
        self._num_slots = slots
        self._period = period
        self.counts = torch.zeros(layers, slots + 1, dtype=torch.int32, device=device)
        self._physical = self.counts[:, :slots]
        self._load_phase = load_phase
        self._phase: StepPhase | None = None  # of the step under way
        self._part: slice | None = None  # of this rank's tokens, in a mixed step: those that the load window takes
        self._part_counts = None if load_phase == "all" else torch.zeros_like(self.counts)
        self._fold = StepFold(self.counts)
        self._part_fold = None if self._part_counts is None else StepFold(self._part_counts)
        self._ring = WindowRing(layers, experts, num_rows=2 * num_windows, period=period, device=device)
        self._recording = StepRecording(
            layers, slots, experts, buffer_size=buffer_size, device=device, keep_physical=keep_physical
        )

    @classmethod
    def from_config(
        cls,
        config: EplbConfig,
        metadata: ExpertLocationMetadata,
        communicator: Communicator,
        *,
        num_windows: int,
        replicated: bool,
    ) -> ExpertDistributionRecorder:
        """The recorder that the options describe."""
        return cls(
            metadata,
            communicator,
            period=config.eplb_rebalance_num_iterations,
            num_windows=num_windows,
            buffer_size=config.expert_distribution_recorder_buffer_size,
            keep_physical=config.expert_distribution_recorder_mode == "per_pass",
            replicated=replicated,
            load_phase=config.eplb_load_phase,
        )

    # During a step --------------------------------------------------------------------------------------------------

    def begin_step(self, phase: StepPhase, num_decode_tokens: int) -> None:
        """Says what the step to come holds; a step of which nothing is said counts whole, whatever the load phase.

        Args:
            phase: of the step, the same on all ranks.
            num_decode_tokens: of this rank's tokens the first so many are decoded; read in a mixed step only.
        """
        self._phase = phase
        if phase == "mixed" and self._load_phase != "all":
            decode = self._load_phase == "decode"
            self._part = slice(num_decode_tokens) if decode else slice(num_decode_tokens, None)

    def record(self, layer_id: int, physical_ids: torch.Tensor) -> None:
        """Counts the slots of a batch.

        Args:
            layer_id: MoE layer, 0-based.
            physical_ids: any shape, int64 slots; -1 for "none".
        """
        count_slots(self.counts[layer_id], physical_ids)

    def record_routed(
        self, layer_id: int, topk_ids: torch.Tensor, slots: torch.Tensor, rank_bounds: Sequence[int] | None = None
    ) -> None:
        """Takes what else there is to a batch that is in ``counts`` already: tokens by phase, and experts of tokens.

        Args:
            topk_ids: (T, K) logical experts; of all ranks' tokens where ``rank_bounds``, (G + 1), says whose are which.
            slots: (T, K) int64 slots of this rank's tokens, decoded ones first; -1 for "none".
        """
        if self._part is not None:
            assert self._part_counts is not None
            count_slots(self._part_counts[layer_id], slots[self._part])
        self.top_k = topk_ids.shape[-1]
        if self.stream is not None:
            if rank_bounds is not None:
                rank = self._communicator.rank
                topk_ids = topk_ids[rank_bounds[rank] : rank_bounds[rank + 1]]
            self.stream.record_tokens(layer_id, topk_ids)

    def record_counts(self, physical_counts: torch.Tensor) -> None:
        """Adds (L, P) counts of the step under way, of any integer dtype, on the device of the maps.

        Those of a mixed step cannot be told apart: the load window takes all of them.

        Raises:
            LoadError: another shape.
        """
        expected = (len(self.counts), self._num_slots)
        if tuple(physical_counts.shape) != expected:
            raise LoadError(
                f"physical_counts must have shape (layers, slots) = {expected}, got {tuple(physical_counts.shape)}",
                field="physical_counts",
            )
        self._physical.add_(physical_counts)
        if self._part is not None:
            assert self._part_counts is not None
            self._part_counts[:, : self._num_slots] += physical_counts

    def end_step(self, physical_to_logical_map: torch.Tensor, *, forward_pass_id: int, counted: bool) -> None:
        """Closes a step.

        Args:
            physical_to_logical_map: (L, P) int64, the live map of this step.
            forward_pass_id: number of the step, the same on all ranks.
            counted: False for warm-up and idle steps, which leave no trace. The same on all ranks.
        """
        row = None
        if counted:
            if self._load_phase == "all" or self._phase in (self._load_phase, "mixed", None):
                row = self._ring.open_row()
            if self._recording.running:
                self._recording.add(self._physical, physical_to_logical_map, forward_pass_id)
            if self.stream is not None:
                self.stream.add(self._physical, physical_to_logical_map, forward_pass_id, self._phase)
        elif self.stream is not None:
            self.stream.discard()
        if self._part is not None:
            assert self._part_fold is not None
            self._part_fold.fold_and_clear(row, physical_to_logical_map)
            row = None
        self._fold.fold_and_clear(row, physical_to_logical_map)
        self._phase = self._part = None

    # The planner's window -------------------------------------------------------------------------------------------

    def window_steps(self, asked: int | None = None) -> int:
        """Steps in the load window: at least ``asked`` (None: the period) where as many were counted."""
        return self._ring.covered_steps(asked or self._period)

    def local_windows(self, num_windows: int, asked: int | None = None) -> torch.Tensor:
        """(W, L, E) int64 of this rank, on the device, oldest first, over :meth:`window_steps` steps; W = 0 if none."""
        return self._ring.windows(num_windows, asked or self._period)

    def sum_over_ranks(self, counts: torch.Tensor) -> torch.Tensor:
        """Collective. Counts of all ranks, on the CPU."""
        if not self.replicated and counts.numel():
            self._communicator.all_reduce_sum_(counts)
        return counts.cpu()

    def windows(self, num_windows: int, asked: int | None = None) -> torch.Tensor:
        """Collective. :meth:`local_windows` summed over ranks, on the CPU: small, whatever the ring holds."""
        return self.sum_over_ranks(self.local_windows(num_windows, asked))

    # An operator's recording ----------------------------------------------------------------------------------------

    @property
    def recording(self) -> bool:
        """Whether an operator's recording runs."""
        return self._recording.running

    def start_record(self) -> None:
        """Begins a recording; an earlier one is dropped."""
        self._recording.start()

    def drop_record(self) -> None:
        """Forgets the recording."""
        self._recording.drop()

    def stop_record(self) -> None:
        """Ends the recording, which can still be dumped.

        Raises:
            PhaseError: none runs.
        """
        if not self._recording.running:
            raise PhaseError("no recording runs: start one first")
        self._recording.stop()

    def snapshot(self) -> LoadSnapshot:
        """Collective. The recording in one sum over ranks; changes nothing.

        Raises:
            PhaseError: nothing was recorded.
        """
        if self._recording.num_steps == 0:
            raise PhaseError("nothing was recorded: start a recording and send requests first")
        return self._recording.snapshot(self.sum_over_ranks(self._recording.counts()))


def count_slots(counts: torch.Tensor, physical_ids: torch.Tensor) -> None:
    """Adds slots of any shape and integer dtype to ``counts``, (P + 1,) int32; -1 to the last column."""
    flat = physical_ids.reshape(-1).long()
    column = torch.where(flat < 0, len(counts) - 1, flat)
    counts.scatter_add_(0, column, torch.ones_like(column, dtype=torch.int32))
