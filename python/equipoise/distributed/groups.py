"""Makes process groups for transfers that survive a failed transfer and leave the device to the forward passes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

logger = logging.getLogger("equipoise.distributed")

MAX_TRANSFER_CTAS = 8
"""Most thread blocks that an NCCL kernel of a transfer takes from a forward pass. vLLM bounds its own at 8 as well."""


def new_transfer_group(
    backend: str, environ: MutableMapping[str, str], *, ranks: Sequence[int] | None = None
) -> dist.ProcessGroup:
    """Collective. Makes a bulk group for transfers.

    Args:
        backend: ``gloo`` or ``nccl``.
        environ: the process's environment; changed while the group is made.
        ranks: of the group; None: all.
    """
    if backend != "nccl":
        return dist.new_group(ranks, backend=backend)
    if environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1":
        logger.warning(
            "CUDA_DEVICE_MAX_CONNECTIONS=1 makes transfers and forward passes wait for each other, on several ranks "
            "for good: unset it, or use the transport 'host'"
        )
    with without_watchdog(environ):
        return dist.new_group(ranks, backend="nccl", pg_options=transfer_options())


@contextmanager
def without_watchdog(environ: MutableMapping[str, str]) -> Iterator[None]:
    """Makes the NCCL groups that are made inside wait on the CPU, without a watchdog thread.

    Hazard: a wait that times out aborts its communicator. A watchdog would find it aborted a minute later and take the
    whole process down. With blocking wait torch starts none for the group (since 2.6, pytorch #138001) and leaves it to
    the caller, which here votes, aborts and makes a new group. The variable is read once, when a group is made; groups
    of forward passes must not have it, or each of their collectives would block the CPU.
    """
    name = "TORCH_NCCL_BLOCKING_WAIT"
    before = environ.get(name)
    environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del environ[name]
        else:
            environ[name] = before


def transfer_options() -> Any:
    """Returns NCCL's options for transfers: few thread blocks, a stream of low priority."""
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=False)
    options.config.max_ctas = MAX_TRANSFER_CTAS
    return options


def serving_options(backend: str) -> Any | None:
    """Returns the options of a group that forward passes use: a stream of high priority on NCCL, None on gloo."""
    return dist.ProcessGroupNCCL.Options(is_high_priority_stream=True) if backend == "nccl" else None
