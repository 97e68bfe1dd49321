"""Computes canaries and checksums, which prove that a slot received the expert that the plan names.

``canary``: an int64 per slot that travels with the weights and names layer and expert. It finds messages that are mixed
up, lost or late. ``checksum`` adds 64 bits over the content of every expert, computed where it is sent and again where
it has landed; it also finds damaged bytes.
"""

from __future__ import annotations

import numpy as np
import torch

from equipoise.jit.compile import kernel

# Multipliers and the xor-shift between them are SplitMix64's (Steele, Lea and Flood, 2014). Each word is mixed with its
# position on its own and the results are added up, so that blocks can be summed in any order.
_WORD_STEP = -7046029254386353131  # 0x9E3779B97F4A7C15
_WORD_FACTOR = -4658895280553007687  # 0xBF58476D1CE4E5B9
_ROW_FACTOR = -7723592293110705685  # 0x94D049BB133111EB
_HIGH_HALF = 0xFFFFFFFF  # of a word shifted right by 32, without the sign bits that an arithmetic shift fills in
_BLOCK_WORDS = 1 << 22  # on a device; each takes a few kernel launches and 32 MiB for a moment


def canary_of(layer_id: int, expert: int) -> int:
    """Returns the canary of an expert: never zero, so that memory nobody wrote to is not taken for one."""
    return (layer_id + 1) << 32 | expert


def describe_canary(value: int) -> str:
    """Names the expert of a canary, for an error's message."""
    layer, expert = (value >> 32) - 1, value & 0xFFFFFFFF
    return f"expert {expert} of layer {layer}" if value > 0 and layer >= 0 else f"nothing that was sent ({value})"


def checksum(rows: list[torch.Tensor]) -> int:
    """Sums the bytes of an expert's rows to 64 bits, position and order included.

    Args:
        rows: 1-d uint8 tensors on one device; those on the CPU contiguous.

    Returns:
        A signed 64-bit sum, the same on every device and machine. Waits for a device; see
        :func:`checksum_on_device`.
    """
    if rows and rows[0].device.type != "cpu":
        return int(checksum_on_device(rows))
    total = 0
    for row in rows:
        total = _wrap(total * _ROW_FACTOR + _row_sum(row))
    return total


def checksum_on_device(rows: list[torch.Tensor]) -> torch.Tensor:
    """Computes :func:`checksum` by torch: 0-d int64 on the rows' device, without a synchronisation."""
    total = torch.zeros((), dtype=torch.int64, device=rows[0].device)
    for row in rows:
        words, tail = _words_of(row), row[row.numel() // 8 * 8 :]
        total = total * _ROW_FACTOR + sum_words_on_device(words) + row.numel()
        if tail.numel():
            last = torch.zeros(8, dtype=torch.uint8, device=row.device)
            last[: tail.numel()].copy_(tail)
            total = total + sum_words_on_device(last.view(torch.int64), words.numel())
    return total


def _row_sum(row: torch.Tensor) -> int:
    """Sum of the mixed 8-byte little-endian words, the last one padded with zeros, and of the length, mod 2**64."""
    words, tail = _words_of(row), row[row.numel() // 8 * 8 :]
    total = int(_sum_words(words.numpy()))
    if tail.numel():
        last = np.array([int.from_bytes(bytes(tail.tolist()), "little")], np.int64)
        total += int(_sum_words(last, words.numel()))
    return _wrap(total + row.numel())


def _words_of(row: torch.Tensor) -> torch.Tensor:
    """Views the whole 8-byte words of a row, or copies them where it does not start at a multiple of eight."""
    whole = row[: row.numel() // 8 * 8]
    aligned = row.data_ptr() % 8 == 0 and row.storage_offset() % 8 == 0
    return (whole if aligned else whole.clone()).view(torch.int64)


@kernel
def _sum_words(words: np.ndarray, start: int = 0) -> np.int64:
    total = np.int64(0)
    for i in range(words.size):
        mixed = words[i] + np.int64(_WORD_STEP) * np.int64(start + i + 1)
        mixed = (mixed ^ ((mixed >> 32) & np.int64(_HIGH_HALF))) * np.int64(_WORD_FACTOR)
        total += mixed ^ ((mixed >> 32) & np.int64(_HIGH_HALF))
    return total


def sum_words_on_device(words: torch.Tensor, start: int = 0, *, block_words: int = _BLOCK_WORDS) -> torch.Tensor:
    """Sums words as :func:`_sum_words` does, 0-d int64, by torch and in blocks: no second copy of the expert.

    Args:
        words: 1-d int64.
        start: position of the first one in its row.
        block_words: words of a block.
    """
    length = min(block_words, words.numel())
    offsets = torch.arange(1, length + 1, dtype=torch.int64, device=words.device) * _WORD_STEP
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for begin in range(0, words.numel(), block_words):
        block = words[begin : begin + block_words]
        mixed = block + offsets[: block.numel()] + _wrap((start + begin) * _WORD_STEP)
        mixed = (mixed ^ ((mixed >> 32) & _HIGH_HALF)) * _WORD_FACTOR
        total = total + (mixed ^ ((mixed >> 32) & _HIGH_HALF)).sum()
    return total


def _wrap(value: int) -> int:
    """``value`` as a signed 64-bit number."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)
