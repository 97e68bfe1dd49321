"""Checksums and canaries."""

from __future__ import annotations

import pytest
import torch

from equipoise.transfer.memory.verification import (
    canary_of,
    checksum,
    checksum_on_device,
    describe_canary,
    sum_words_on_device,
)


def random_bytes(size: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [1, 7, 8, 9, 4096, 100_003])
def test_any_flipped_bit_changes_the_checksum(size):
    row = random_bytes(size)
    right = checksum([row])
    for position in {0, size // 2, size - 1}:
        for bit in range(8):
            damaged = row.clone()
            damaged[position] ^= 1 << bit
            assert checksum([damaged]) != right


def test_flips_that_cancel_in_a_plain_sum_do_not_cancel_here():
    row = random_bytes(64)
    damaged = row.clone()
    damaged[[7, 15]] ^= 0x80  # the top bits of two words: twice 2**63 is 0 mod 2**64
    assert checksum([damaged]) != checksum([row])


def test_order_and_length_count():
    a, b = random_bytes(40, 1), random_bytes(40, 2)
    assert checksum([a, b]) != checksum([b, a])
    assert checksum([torch.zeros(8, dtype=torch.uint8)]) != checksum([torch.zeros(16, dtype=torch.uint8)])
    swapped = torch.cat([a[8:16], a[:8], a[16:]])
    assert checksum([swapped]) != checksum([a])


def test_a_view_that_is_not_aligned_gives_the_same_sum():
    row = random_bytes(803)
    assert checksum([row[3:]]) == checksum([row[3:].clone()])


def test_the_device_sum_is_the_same_number():
    row = random_bytes(8 * 70_001)  # more than one block
    on_device = int(sum_words_on_device(row.view(torch.int64), block_words=1 << 16)) + row.numel()
    assert (on_device - checksum([row])) % (1 << 64) == 0


@pytest.mark.parametrize("sizes", [[1], [7, 8], [100, 511], [0, 16, 9], list(range(1, 40))])
def test_torch_and_numba_compute_one_checksum(sizes):
    rows = [random_bytes(size, seed) for seed, size in enumerate(sizes)]
    assert int(checksum_on_device(rows)) == checksum(rows)


def test_checksum_is_pinned_across_machines():
    assert checksum([torch.arange(100, dtype=torch.uint8)]) == -6976965884853565442


def test_canaries_tell_layers_and_experts_apart_and_are_never_zero():
    values = {canary_of(layer, expert) for layer in range(5) for expert in range(300)}
    assert len(values) == 1500
    assert 0 not in values
    assert describe_canary(canary_of(3, 7)) == "expert 7 of layer 3"
    assert "nothing that was sent" in describe_canary(0)
