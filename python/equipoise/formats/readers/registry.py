"""The registry of recordings: which reader takes a file, by its content; and which files are one recording.

A new format is one file beside this one and one line in :data:`READERS`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from equipoise.errors import TraceError
from equipoise.formats.container import Container, open_container
from equipoise.formats.numbers import human_list
from equipoise.formats.raw_trace import RawTrace, ReadOptions
from equipoise.formats.readers import (
    arrays,
    own,
    own_ranks,
    sglang,
    sglang_records,
    tensorrt_llm,
    text_counts,
    tokens,
    vllm_ascend,
)

logger = logging.getLogger("equipoise.formats")


@dataclass(frozen=True)
class Reader:
    """One format.

    Attributes:
        matches: whether a container is of this format; looks at names, never at data.
        read: one file; or, where ``joins`` is given, all files of one recording.
        joins: whether two files are parts of one recording.
    """

    name: str
    matches: Callable[[Container], bool]
    read: Callable[[Container, ReadOptions], RawTrace] | None = None
    read_all: Callable[[Sequence[Container], ReadOptions], RawTrace] | None = None
    joins: Callable[[Container, Container], bool] | None = None


def _same_folder(left: Container, right: Container) -> bool:
    return left.path.parent == right.path.parent


READERS: tuple[Reader, ...] = (
    Reader(
        "Equipoise trace (.safetensors)",
        own_ranks.is_trace_file,
        read_all=own_ranks.read_trace_files,
        joins=own_ranks.same_recording,
    ),
    Reader("Equipoise dump (.npz)", own.is_npz_trace, own.read_npz_trace),
    Reader("SGLang stat dump", sglang.is_stat, sglang.read_stat),
    Reader(
        "SGLang per_pass or per_token dump",
        sglang.is_records,
        read_all=sglang_records.read_records,
        joins=sglang_records.same_recording,
    ),
    Reader(
        "TensorRT-LLM expert statistics",
        tensorrt_llm.is_statistics,
        read_all=tensorrt_llm.read_statistics,
        joins=_same_folder,
    ),
    Reader("vLLM-Ascend load view", vllm_ascend.is_load_view, vllm_ascend.read_load_view),
    Reader("token ids (.npz)", tokens.is_tokens, tokens.read_tokens),
    Reader("shares of subjects (.npz)", tokens.is_frequencies, tokens.read_frequencies),
    Reader("JSON lines of tokens per expert", text_counts.is_json_lines, text_counts.read_json_lines),
    Reader("JSON counts", text_counts.is_json_counts, text_counts.read_json_counts),
    Reader("CSV of layer, expert, count", text_counts.is_csv, text_counts.read_csv),
    Reader("array of counts or token ids", arrays.is_array, arrays.read_array_file),
)


def read_recordings(paths: Sequence[Path], options: ReadOptions) -> list[tuple[list[Path], RawTrace]]:
    """Reads files and folders; files that are parts of one recording become one trace.

    A folder stands for the dumps in it. Ranks of one recording are put together. Two or more
    files of a single step each play as the steps of one recording, in the order in which they were named.

    Returns:
        (files, trace) of each recording, in the order of their first file.

    Raises:
        TraceError: a file that cannot be read; the message names it.
    """
    opened = [(path, *_open(path)) for given in paths for path in _files(given)]
    groups: list[tuple[Reader, list[Container]]] = []
    for _, container, reader in opened:
        for other, members in groups:
            if other is reader and reader.joins is not None and any(reader.joins(m, container) for m in members):
                members.append(container)
                break
        else:
            groups.append((reader, [container]))
    return _join_single_steps(
        [([one.path for one in members], _read(reader, members, options)) for reader, members in groups]
    )


def reader_of(container: Container) -> Reader | None:
    """The first reader that takes a container."""
    return next((reader for reader in READERS if reader.matches(container)), None)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = tensorrt_llm.files_of_folder(path) or sorted(path.glob("*.pt")) or own_ranks.files_of_folder(path)
    if not found:
        raise TraceError(
            f"trace {path}: is a directory without rank_*.safetensors, .pt files or meta_info.json; name a file, or "
            "a directory of a streamed recording, of SGLang dumps or of TensorRT-LLM statistics",
            field="trace",
        )
    return found


def _open(path: Path) -> tuple[Container, Reader]:
    with _naming([path]):
        container = open_container(path)
        reader = reader_of(container)
        if reader is not None:
            return container, reader
        content = container.content
        if vllm_ascend.is_expert_map(content) or tensorrt_llm.is_assignments(content) or own.is_placement(content):
            raise TraceError("holds a placement and no load; --init-expert-location takes it, a trace must hold counts")
        raise TraceError(_unknown(container))


def _unknown(container: Container) -> str:
    held = human_list(sorted(container.names)) or type(container.content).__name__
    if container.kind == "torch":
        return (
            "a torch.save file that is neither a stat dump (`logical_count`) nor a per_pass dump (`records`, "
            f"`last_physical_to_logical_map`) nor a tensor of counts: {held}"
        )
    if container.kind == "npz":
        return f"an .npz file needs one array, or `topk`, `freq` or `logical_count`; this one has {held}"
    return f"{container.kind} of no format that is known; it holds {held}"


def _read(reader: Reader, members: list[Container], options: ReadOptions) -> RawTrace:
    paths = [one.path for one in members]
    with _naming(paths):
        if reader.read_all is not None:
            raw = reader.read_all(members, options)
        else:
            assert reader.read is not None
            raw = reader.read(members[0], options)
    for note in raw.notes:
        logger.info("%s: %s", paths[0], note)
    return raw


class _naming:
    """Any failure inside as a TraceError of one line that names the files."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._name = str(paths[0]) + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or not isinstance(error, Exception):
            return
        if isinstance(error, TraceError):
            raise TraceError(f"trace {self._name}: {' '.join(str(error).split())}", field="trace") from None
        if isinstance(error, OSError):
            why = error.strerror or error
            raise TraceError(f"trace {self._name}: cannot be read: {why}", field="trace") from None
        reason = " ".join(str(error).split())[:200]  # the parsers below us raise many types for damaged bytes
        raise TraceError(
            f"trace {self._name}: truncated or damaged ({type(error).__name__}: {reason})", field="trace"
        ) from error


def _join_single_steps(found: list[tuple[list[Path], RawTrace]]) -> list[tuple[list[Path], RawTrace]]:
    """Recordings of one step each, and of one shape, as the steps of one."""
    single = [entry for entry in found if entry[1].logical_count.shape[0] == 1 and entry[1].physical_count is None]
    if len(single) < 2 or len({raw.logical_count.shape for _, raw in single}) > 1:
        return found
    raws = [raw for _, raw in single]
    joined = replace(
        raws[0],
        logical_count=np.concatenate([raw.logical_count for raw in raws]),
        forward_pass_ids=None,
        physical_count=None,
        rank_count=None,
        phases=None,
        timestamps=None,
        topk_ids=None,
        token_offsets=None,
        found=f"{len(raws)} files of one step each ({raws[0].found})",
        notes=tuple(dict.fromkeys(note for raw in raws for note in raw.notes)),
    )
    files = [path for paths, _ in single for path in paths]
    rest = [entry for entry in found if not any(entry is one for one in single)]
    return [(files, joined), *rest] if found[0] is single[0] else [*rest, (files, joined)]
