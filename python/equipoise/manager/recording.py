"""What a manager records: a load window that is always open, and what an operator starts, stops and dumps."""

from __future__ import annotations

import torch

from equipoise.config import EplbConfig
from equipoise.distributed.communicator import Communicator
from equipoise.errors import PhaseError
from equipoise.load.recorder import ExpertDistributionRecorder
from equipoise.manager.commands import DumpReply
from equipoise.manager.replies import write_dump
from equipoise.placement.metadata import ExpertLocationMetadata


class LoadRecording:
    """Two recorders of one host, so that an operator's start and stop never take the planner's window away."""

    def __init__(self, config: EplbConfig, metadata: ExpertLocationMetadata, communicator: Communicator) -> None:
        self._config = config
        self._metadata = metadata
        self._communicator = communicator
        self._window = self._new_recorder(keep_physical=False)
        self._window.start()
        self._recording = self._new_recorder(keep_physical=config.expert_distribution_recorder_mode == "per_pass")

    @property
    def recording(self) -> bool:
        """Whether an operator's recording runs."""
        return self._recording.recording

    def record(self, layer_id: int, physical_ids: torch.Tensor) -> None:
        """Counts the slots of a batch; -1 for "none"."""
        self._window.record(layer_id, physical_ids)
        self._recording.record(layer_id, physical_ids)

    def end_step(self, *, forward_pass_id: int, counted: bool) -> None:
        p2l = self._metadata.physical_to_logical_map
        for recorder in (self._window, self._recording):
            recorder.end_step(p2l, forward_pass_id=forward_pass_id, counted=counted)

    def start(self) -> None:
        """Begins a recording; an earlier one is dropped."""
        self._recording.reset()
        self._recording.start()

    def stop(self) -> None:
        """Ends the recording, which can still be dumped. Raises PhaseError if none runs."""
        if not self._recording.recording:
            raise PhaseError("no recording runs: start one first")
        self._recording.stop()

    def dump(self, directory: str, wall_clock: float) -> DumpReply | None:
        """Collective. Writes the recording to a new file; rank 0 answers, the others None.

        Raises:
            PhaseError: nothing was recorded.
            ConfigError: the directory cannot be written.
        """
        if self._recording.num_steps == 0:
            raise PhaseError("nothing was recorded: start a recording and send requests first")
        snapshot = self._recording.snapshot(self._communicator)
        if self._communicator.rank != 0:
            return None
        return write_dump(snapshot, self._metadata, directory, wall_clock)

    def window_steps(self, asked: int | None) -> int:
        """Steps in the load window: those there are, at most ``asked`` or else --eplb-rebalance-num-iterations."""
        return min(asked or self._config.eplb_rebalance_num_iterations, self._window.num_steps)

    def windows(self, num_windows: int, asked: int | None = None) -> torch.Tensor:
        """Collective. (W, L, E) int64 on the CPU, oldest first, over :meth:`window_steps` steps; W = 0 without any."""
        return self._window.windows(self._communicator, num_windows=num_windows, last=max(1, self.window_steps(asked)))

    def _new_recorder(self, *, keep_physical: bool) -> ExpertDistributionRecorder:
        metadata = self._metadata
        return ExpertDistributionRecorder(
            metadata.num_layers,
            metadata.num_physical_experts,
            metadata.num_logical_experts,
            buffer_size=self._config.expert_distribution_recorder_buffer_size,
            device=metadata.physical_to_logical_map.device,
            keep_physical=keep_physical,
        )
