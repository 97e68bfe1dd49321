"""OperatorRecording: what an operator records on one rank, in memory for a dump or streamed to files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from equipoise.config import EplbConfig, StreamMode
from equipoise.distributed.communicator import Communicator
from equipoise.errors import ConfigError, EquipoiseError, PhaseError
from equipoise.formats.trace_file import TraceDescription
from equipoise.load.recorder import ExpertDistributionRecorder
from equipoise.load.recording import LoadSnapshot
from equipoise.load.step_stream import CountStream, TokenStream
from equipoise.load.step_writer import StepSink, StepWriter
from equipoise.load.stream_file import open_trace_file
from equipoise.load.stream_report import RecordingReply, StreamReply
from equipoise.placement.metadata import ExpertLocationMetadata

_CLOSE_SECONDS = 3.0  # that the end of the process waits for what was taken to be written


class OperatorRecording:
    """One recording at a time. Every rank has one and calls it alike: all methods but ``close`` are collective.

    Args:
        recorder: what is recorded.
        metadata: the live placement.
        layer_ids: the host's number of each of its rows.
        communicator: of the serving thread.
        open_sink: makes what a stream is written to: (directory, name, description of the trace, rank).
    """

    def __init__(
        self,
        config: EplbConfig,
        recorder: ExpertDistributionRecorder,
        metadata: ExpertLocationMetadata,
        layer_ids: Sequence[int],
        communicator: Communicator,
        *,
        open_sink: Callable[[str, str, TraceDescription, int], StepSink] = open_trace_file,
    ) -> None:
        self._config = config
        self._recorder = recorder
        self._metadata = metadata
        self._layer_ids = list(layer_ids)
        self._communicator = communicator
        self._open_sink = open_sink
        self._mode: StreamMode | None = None  # of the last recording, if it was streamed; the same on all ranks
        self._stream: StepWriter | None = None  # None where another rank counts what this one does
        self._streaming = False

    @property
    def running(self) -> bool:
        """The same on all ranks."""
        return self._streaming or self._recorder.recording

    def start(self, mode: StreamMode | None, directory: str, name: str) -> RecordingReply:
        """Begins a recording: into a new folder ``name`` of ``directory``, or with ``mode`` None into memory.

        Raises:
            ConfigError: files that cannot be made on some rank; no recording runs then.
            StorageError: no room for them.
            PhaseError: experts of tokens were asked for, and none were seen yet.
        """
        self._end()
        self._mode = self._stream = None
        if mode is None:
            self._recorder.start_record()
            return self.describe()
        self._recorder.drop_record()
        self._open_stream(mode, directory, name)
        self._recorder.stream = self._stream
        self._mode, self._streaming = mode, True
        return self.describe()

    def stop(self) -> RecordingReply:
        """
        Raises:
            PhaseError: none runs.
        """
        if not self.running:
            raise PhaseError("no recording runs: start one first")
        self._end()
        return self.describe()

    def describe(self) -> RecordingReply:
        """Whether one runs, and what has become of a stream's steps on all ranks."""
        if self._mode is None:
            return RecordingReply(self.running, None)
        mine = None if self._stream is None else self._stream.report()
        reports = [each for each in self._communicator.all_gather_object(mine) if each is not None]
        folder, finished = str(Path(reports[0].path).parent), all(report.finished for report in reports)
        return RecordingReply(self.running, StreamReply(folder, self._mode, finished, reports))

    def snapshot(self) -> LoadSnapshot:
        """What a recording in memory holds, summed over ranks.

        Raises:
            PhaseError: nothing was recorded, or it was streamed.
        """
        if self._mode is not None:
            raise PhaseError("the recording is streamed: stop it, and the folder it was written to is the trace")
        return self._recorder.snapshot()

    def close(self) -> None:
        """Ends a stream, and waits some seconds for its file."""
        if self._stream is not None:
            self._stream.stop()
            self._stream.join(_CLOSE_SECONDS)

    def _end(self) -> None:
        if self._recorder.recording:
            self._recorder.stop_record()
        if self._stream is not None:
            self._stream.stop()
        self._recorder.stream, self._streaming = None, False

    def _open_stream(self, mode: StreamMode, directory: str, name: str) -> None:
        """Sets the stream of this rank; all ranks raise if one cannot."""
        failure: EquipoiseError | None = None
        try:
            if not (self._recorder.replicated and self._communicator.rank):
                self._stream = self._new_stream(mode, directory, name)
        except EquipoiseError as error:
            failure = error
        except Exception as error:  # the other ranks wait for the message below, whatever this one runs into
            failure = EquipoiseError(f"rank {self._communicator.rank} cannot record: {type(error).__name__}: {error}")
        failures = [each for each in self._communicator.all_gather_object(failure) if each is not None]
        if not failures:
            return
        if self._stream is not None:
            self._stream.stop()
            path = Path(self._stream.report().path)
            with suppress(OSError):
                path.unlink()
                path.parent.rmdir()  # by the last of the ranks
            self._stream = None
        raise failures[0]

    def _new_stream(self, mode: StreamMode, directory: str, name: str) -> StepWriter:
        if not name or Path(name).name != name:
            raise ConfigError(f"name must be that of a folder, got {name!r}", field="name")
        top_k = self._recorder.top_k
        if mode == "per_token" and top_k is None:
            raise PhaseError("no token was routed yet: send a request first")
        config, description = self._config, self._description(mode, name)
        layers, experts = description.num_layers, description.num_logical_experts
        sink = self._open_sink(directory, name, description, self._communicator.rank)
        max_records = max(1, config.expert_distribution_stream_max_bytes // description.record().itemsize)
        device = self._metadata.physical_to_logical_map.device
        if mode == "per_pass":
            num_staged = config.expert_distribution_stream_buffer_size
            return CountStream(layers, experts, sink, num_staged=num_staged, max_records=max_records, device=device)
        assert top_k is not None
        return TokenStream(
            layers,
            top_k,
            sink,
            dtype=torch.int16 if description.id_type == "i2" else torch.int32,
            num_staged=config.expert_distribution_stream_buffer_tokens,
            max_records=max_records,
            device=device,
        )

    def _description(self, mode: StreamMode, name: str) -> TraceDescription:
        metadata, layer_ids = self._metadata, self._layer_ids
        num_ranks = 1 if self._recorder.replicated else self._communicator.world_size
        return TraceDescription(
            metadata.num_layers,
            metadata.num_logical_experts,
            top_k=self._recorder.top_k,
            tokens=mode == "per_token",
            id_type="i2" if metadata.num_logical_experts < 2**15 else "i4",
            layer_ids=None if layer_ids == list(range(len(layer_ids))) else layer_ids,
            topology={key: getattr(metadata.topology, key) for key in ("num_ranks", "num_nodes", "slots_per_rank")},
            metadata={"recording": {"id": name, "rank": self._communicator.rank, "num_ranks": num_ranks}},
        )
