"""What proves that a slot received the expert that the plan names.

``canary``: an int64 per slot that travels with the weights and names layer and expert. It finds messages that are mixed
up, lost or late. ``checksum`` adds 64 bits over the content of every expert, computed where it is sent and again where
it has landed; it also finds damaged bytes.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from equipoise.jit.compile import kernel

Verification = Literal["off", "canary", "checksum"]

# Multipliers and the xor-shift between them are SplitMix64's (Steele, Lea and Flood, 2014). Each word is mixed with its
# position on its own and the results are added up, so that blocks can be summed in any order.
_WORD_STEP = -7046029254386353131  # 0x9E3779B97F4A7C15
_WORD_FACTOR = -4658895280553007687  # 0xBF58476D1CE4E5B9
_ROW_FACTOR = -7723592293110705685  # 0x94D049BB133111EB
_HIGH_HALF = 0xFFFFFFFF  # of a word shifted right by 32, without the sign bits that an arithmetic shift fills in
_BLOCK_WORDS = 1 << 16


def canary_of(layer_id: int, expert: int) -> int:
    """Never zero, so that memory nobody wrote to is not taken for an expert."""
    return (layer_id + 1) << 32 | expert


def describe_canary(value: int) -> str:
    layer, expert = (value >> 32) - 1, value & 0xFFFFFFFF
    return f"expert {expert} of layer {layer}" if value > 0 and layer >= 0 else f"nothing that was sent ({value})"


def checksum(rows: list[torch.Tensor]) -> int:
    """64 bits over the bytes of an expert's rows, position and order included.

    Args:
        rows: 1-d uint8 tensors on one device; those on the CPU contiguous.

    Returns:
        A signed 64-bit sum, the same on every device and machine.
    """
    total = 0
    for row in rows:
        total = _wrap(total * _ROW_FACTOR + _row_sum(row))
    return total


def _row_sum(row: torch.Tensor) -> int:
    """Sum of the mixed 8-byte little-endian words, the last one padded with zeros, and of the length, mod 2**64."""
    num_words = row.numel() // 8
    aligned = row.data_ptr() % 8 == 0 and row.storage_offset() % 8 == 0
    whole = row[: num_words * 8]
    words = (whole if aligned else whole.clone()).view(torch.int64)
    total = int(_sum_words(words.numpy())) if row.device.type == "cpu" else sum_words_on_device(words)
    tail = row[num_words * 8 :]
    if tail.numel():
        last = np.array([int.from_bytes(bytes(tail.tolist()), "little")], np.int64)
        total += int(_sum_words(last, num_words))
    return _wrap(total + row.numel())


@kernel
def _sum_words(words: np.ndarray, start: int = 0) -> np.int64:
    total = np.int64(0)
    for i in range(words.size):
        mixed = words[i] + np.int64(_WORD_STEP) * np.int64(start + i + 1)
        mixed = (mixed ^ ((mixed >> 32) & np.int64(_HIGH_HALF))) * np.int64(_WORD_FACTOR)
        total += mixed ^ ((mixed >> 32) & np.int64(_HIGH_HALF))
    return total


def sum_words_on_device(words: torch.Tensor) -> int:
    """The same sum by torch, in blocks, so that it needs no second copy of the expert. ``words`` is 1-d int64."""
    steps = torch.arange(1, _BLOCK_WORDS + 1, dtype=torch.int64, device=words.device) * _WORD_STEP
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, words.numel(), _BLOCK_WORDS):
        block = words[start : start + _BLOCK_WORDS]
        mixed = block + steps[: block.numel()] + _wrap(start * _WORD_STEP)
        mixed = (mixed ^ ((mixed >> 32) & _HIGH_HALF)) * _WORD_FACTOR
        total += (mixed ^ ((mixed >> 32) & _HIGH_HALF)).sum()
    return int(total)


def _wrap(value: int) -> int:
    """``value`` as a signed 64-bit number."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)
