"""The cost of an activated expert in tokens, from the speed of a device: ``--ep-dispatch-active-expert-cost auto``.

Reading an expert takes ``parameters * bytes per parameter / bandwidth`` seconds, computing a token
``2 * parameters / peak`` of them. The quotient is ``bytes per parameter * peak / (2 * bandwidth)``: the size of an
expert cancels, what is left is the device. For an H100 in bfloat16: 989e12 / 3.35e12 = 295 tokens.
"""

from __future__ import annotations

import logging
import time

import torch

logger = logging.getLogger("equipoise.dispatch")

# Dense 16-bit FLOP/s and bytes/s, from the vendors' data sheets; the first name that a device's name contains counts.
NAMED_SPEEDS = {
    "H20": (148e12, 4.0e12),
    "H200": (989e12, 4.8e12),
    "H100": (989e12, 3.35e12),
    "H800": (989e12, 3.35e12),
    "B200": (2250e12, 8.0e12),
    "A100": (312e12, 2.04e12),
    "A800": (312e12, 2.04e12),
    "L40S": (362e12, 0.864e12),
}


def active_expert_cost(device: torch.device, *, bytes_per_parameter: float) -> float:
    """Tokens whose computing takes as long as reading an expert.

    Args:
        device: named in :data:`NAMED_SPEEDS`, or measured in about a tenth of a second. Measured values differ from
            rank to rank: one must be agreed on.
        bytes_per_parameter: of the weights, 2 for bfloat16.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    speeds = [NAMED_SPEEDS[known] for known in sorted(NAMED_SPEEDS, key=len, reverse=True) if known in name]
    flops, bandwidth = speeds[0] if speeds else (_measured_flops(device), _measured_bandwidth(device))
    cost = bytes_per_parameter * flops / (2 * bandwidth)
    source = "named" if speeds else "measured"
    logger.info("an activated expert costs %.1f tokens on %s (%s speed)", cost, name, source)
    return cost


def _seconds(device: torch.device, matrix: torch.Tensor, *, multiply: bool) -> float:
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        _ = matrix @ matrix if multiply else matrix.clone()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def _measured_flops(device: torch.device) -> float:
    size = 4096 if device.type == "cuda" else 512
    matrix = torch.ones(size, size, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    return 2 * size**3 / _seconds(device, matrix, multiply=True)


def _measured_bandwidth(device: torch.device) -> float:
    matrix = torch.ones(1 << 24, device=device)  # 64 MB, beyond the caches of most CPUs
    return 2 * matrix.nbytes / _seconds(device, matrix, multiply=False)
