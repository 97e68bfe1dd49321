"""SGLang's recorder dumps (``torch.save``): stat and per_pass, as of SGLang 0.5.23.

stat: ``{"rank", "logical_count": int32 (steps, L, E), "average_utilization_rate_over_window"}``. ``logical_count`` is
already summed over the ranks. It is the recorder's ring buffer as it lies: rows that were never written are zero.

per_pass: ``{"records": [{"forward_pass_id", "rank", "gatherer_key", "global_physical_count": int32 (L, P)}],
"last_physical_to_logical_map": int (L, P)}``. Every rank writes a file of its own, in which it counts only what it saw
itself: the load of a pass is the sum over ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from equipoise.errors import TraceError
from equipoise.formats.archive import MAX_EXPERTS, open_archive, require_size
from equipoise.formats.raw_trace import RawTrace


def load_torch_file(path: Path) -> Any:
    """What ``torch.save`` wrote, without ever running code from it (``weights_only=True``).

    Raises:
        TraceError: too large, damaged, or asks for something other than tensors and plain values.
    """
    try:
        with open_archive(path) as archive:  # checks the unpacked size, which torch.load does not
            damaged = archive.testzip()  # nor does it compare checksums
        if damaged is not None:
            raise TraceError(f"the archive is damaged: member {damaged!r} does not match its checksum")
        return torch.load(path, map_location="cpu", weights_only=True)
    except TraceError:
        raise
    except Exception as error:  # a hostile pickle can raise anything
        reason = "it holds objects other than tensors and plain values" if "nsupported" in str(error) else "damaged"
        raise TraceError(f"torch.load refuses the file: {reason} ({type(error).__name__})") from None


def read_stat(pack: dict[str, Any]) -> RawTrace:
    """A stat dump: steps in the order of the ring, unwritten (all-zero) rows dropped."""
    counts = as_numbers(pack["logical_count"], "logical_count", 3)
    utilization = pack.get("average_utilization_rate_over_window")
    metadata: dict[str, Any] = {"source": "sglang stat"}
    if isinstance(utilization, float):
        metadata["average_utilization_rate_over_window"] = utilization
    written = np.asarray(counts.reshape(counts.shape[0], -1).any(axis=1))
    start = _oldest_row(written)
    counts, written = np.roll(counts, -start, axis=0), np.roll(written, -start)
    if not written.any():
        raise TraceError("logical_count holds no step with a token in it")
    return RawTrace(counts[written], metadata=metadata)


def _oldest_row(written: np.ndarray) -> int:
    """Where the ring starts: behind its longest stretch of unwritten rows.

    SGLang's reset clears the ring but not its write position, so a second recording begins in the middle and may wrap
    round. A ring without a gap was overwritten at an unknown place; it is read from row 0.
    """
    num_rows = len(written)
    filled = np.flatnonzero(written)
    if not len(filled) or len(filled) == num_rows:
        return 0
    gap_before = np.diff(filled, prepend=filled[-1] - num_rows)  # cyclic distance to the previous written row
    return int(filled[np.argmax(gap_before)])


def read_per_pass(packs: Sequence[dict[str, Any]]) -> RawTrace:
    """The per_pass dumps of one recording, in any number of files.

    Records of one forward pass are summed over ranks and gatherers. A pass that some rank did not record (the edges of
    a recording) is dropped: its sum would show that rank's experts as idle. Passes without a token are dropped too.

    Raises:
        TraceError: two records for the same pass, rank and gatherer, or files of different placements.
    """
    p2l = _common_map([pack["last_physical_to_logical_map"] for pack in packs])
    num_experts = int(p2l.max()) + 1
    sums: dict[int, np.ndarray] = {}
    seen: dict[int, set[tuple[int, str]]] = {}
    num_records = sum(len(pack["records"]) for pack in packs if isinstance(pack["records"], list))
    require_size("global_physical_count", (num_records, *p2l.shape))
    for pack in packs:
        if not isinstance(pack["records"], list):
            raise TraceError(f"records must be a list, got {type(pack['records']).__name__}")
        for index, record in enumerate(pack["records"]):
            pass_id, source, count = _parse_record(record, index, p2l.shape)
            if source in seen.setdefault(pass_id, set()):
                raise TraceError(f"two records of forward pass {pass_id} from rank {source[0]} (gatherer {source[1]})")
            seen[pass_id].add(source)
            sums[pass_id] = sums[pass_id] + count if pass_id in sums else count
    every_source = set().union(*seen.values())
    complete = [pass_id for pass_id in sorted(sums) if seen[pass_id] == every_source]
    used = [pass_id for pass_id in complete if sums[pass_id].any()]
    if not used:
        raise TraceError("no forward pass with a token in it was recorded by every rank")
    physical = np.stack([sums[pass_id] for pass_id in used])
    return RawTrace(
        to_logical_count(physical, p2l, num_experts),
        np.array(used),
        physical,
        p2l,
        metadata={
            "source": "sglang per_pass",
            "ranks": sorted({rank for rank, _ in every_source}),
            "incomplete_passes_dropped": len(sums) - len(complete),
        },
    )


def to_logical_count(physical_count: np.ndarray, physical_to_logical_map: np.ndarray, num_experts: int) -> np.ndarray:
    """Counts per slot (T, L, P) summed over each expert's replicas: (T, L, E) int64."""
    num_steps, num_layers, _ = physical_count.shape
    require_size("logical_count", (num_steps, num_layers, num_experts))
    logical = np.zeros((num_layers, num_experts, num_steps), dtype=np.int64)
    for layer, experts in enumerate(physical_to_logical_map):
        np.add.at(logical[layer], experts, physical_count[:, layer].T)
    return np.ascontiguousarray(logical.transpose(2, 0, 1))


def as_numbers(value: Any, name: str, num_dims: int) -> np.ndarray:
    """A tensor (or nested list) of numbers from a file as an array, its declared shape checked before it is filled."""
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_complex() or value.is_quantized:
            raise TraceError(f"{name} must be a dense tensor of numbers")
        shape = tuple(value.shape)
        require_size(name, shape)  # a few bytes with stride 0 can stand for any shape
        array = value.detach().to(torch.float64 if value.is_floating_point() else torch.int64).numpy()
    else:
        try:
            array = np.asarray(value)
        except ValueError:
            raise TraceError(f"{name} must be a matrix, its rows have different lengths") from None
        shape = array.shape
    if array.dtype.kind not in "iuf" or array.ndim != num_dims or 0 in shape:
        raise TraceError(f"{name} must be numbers in {num_dims} dimensions, got {array.dtype} of shape {shape}")
    if shape[-1] > MAX_EXPERTS:
        raise TraceError(f"{name} has {shape[-1]} experts a layer, the limit is {MAX_EXPERTS}")
    return array


def _common_map(values: Sequence[Any]) -> np.ndarray:
    maps = [as_numbers(value, "last_physical_to_logical_map", 2) for value in values]
    first = maps[0]
    if any(other.shape != first.shape or (other != first).any() for other in maps[1:]):
        raise TraceError("the files do not agree on last_physical_to_logical_map: they are of different recordings")
    if first.dtype.kind == "f" or first.min() < 0 or first.max() >= MAX_EXPERTS:
        raise TraceError(f"last_physical_to_logical_map must hold expert ids in [0, {MAX_EXPERTS})")
    return first.astype(np.int64)


def _parse_record(record: Any, index: int, shape: tuple[int, ...]) -> tuple[int, tuple[int, str], np.ndarray]:
    """(forward pass, (rank, gatherer), int64 (L, P) counts) of one record; its other keys are not needed."""
    needed = {"forward_pass_id", "rank", "global_physical_count"}
    if not isinstance(record, dict) or not needed <= record.keys():
        raise TraceError(f"records[{index}] must have the keys {sorted(needed)}")
    pass_id, rank = record["forward_pass_id"], record["rank"]
    for name in ("forward_pass_id", "rank"):
        if not isinstance(record[name], int) or not 0 <= record[name] < 2**63:
            raise TraceError(f"records[{index}].{name} must be an integer of at least 0, got {record[name]!r}")
    name = f"records[{index}].global_physical_count"
    count = as_numbers(record["global_physical_count"], name, 2)
    if count.shape != shape:
        raise TraceError(f"{name} has shape {count.shape}, last_physical_to_logical_map has {shape}")
    if count.dtype.kind == "f" or count.min() < 0:
        raise TraceError(f"{name} must hold whole numbers of at least 0")
    return pass_id, (rank, str(record.get("gatherer_key", "primary"))[:64]), count.astype(np.int64)
