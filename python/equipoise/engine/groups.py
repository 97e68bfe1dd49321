"""Makes a rank's process groups, and the communicators over them by the transport that was chosen."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from equipoise.config import TransferTransport
from equipoise.distributed.communicator import Communicator, TorchCommunicator
from equipoise.distributed.groups import new_transfer_group, serving_options
from equipoise.distributed.pinned_host import PinnedHostCommunicator
from equipoise.errors import ConfigError

# Idle ranks wait in a broadcast for as long as nobody asks for anything; a dead peer breaks the connection at once.
_FOREVER = timedelta(days=365)
# All ranks are in the same forward pass: one that keeps the others waiting this long hangs.
_HUNG = timedelta(minutes=10)
_LOOPBACK = {"Linux": "lo", "Darwin": "lo0"}


@dataclass(frozen=True)
class RankGroups:
    """Process groups over all ranks: the serving thread uses the first three, the transfer thread the last.

    Two threads must never share a group: their collectives would be matched in whatever order they are called.
    """

    control: dist.ProcessGroup  # gloo: step inputs, and what the managers agree on between steps
    experts: dist.ProcessGroup  # tokens on their way to experts and back
    serving: Communicator  # over both
    transfers: Communicator  # experts that move to other ranks, and the votes on them


def make_groups(
    rank: int,
    num_ranks: int,
    rendezvous: Path,
    device: torch.device,
    transport: TransferTransport,
    environ: MutableMapping[str, str],
) -> RankGroups:
    """Collective.

    Args:
        rendezvous: a directory that is empty at first, shared by the ranks.
        device: of this rank.
        transport: how experts travel.
        environ: the process's environment; changed while groups are made.

    Raises:
        ConfigError: transport ``nccl`` without a GPU.
    """
    require_transport(transport, device)
    loopback = _LOOPBACK.get(os.uname().sysname)
    if loopback is not None:
        environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(rendezvous / "store"), num_ranks),
        rank=rank,
        world_size=num_ranks,
        timeout=_FOREVER,
    )
    backend = "nccl" if device.type == "cuda" else "gloo"
    control = dist.new_group(backend="gloo", timeout=_FOREVER)
    experts = dist.new_group(backend=backend, timeout=_HUNG, pg_options=serving_options(backend))
    return RankGroups(
        control,
        experts,
        TorchCommunicator(experts, device, control_group=control),
        _transfer_communicator(device, transport, environ),
    )


def require_transport(transport: TransferTransport, device: torch.device) -> None:
    """Checks that ``transport`` can carry tensors of ``device``.

    Raises:
        ConfigError: it cannot.
    """
    if transport == "nccl" and device.type != "cuda":
        raise ConfigError(
            f"eplb_transport 'nccl' carries tensors between GPUs, the weights lie on {device}: use 'auto' or 'host'",
            field="eplb_transport",
        )


def _transfer_communicator(
    device: torch.device, transport: TransferTransport, environ: MutableMapping[str, str]
) -> Communicator:
    over_nccl = device.type == "cuda" and transport != "host"
    new_group = partial(new_transfer_group, "nccl" if over_nccl else "gloo", environ)
    new_control_group = partial(dist.new_group, backend="gloo")
    communicator = TorchCommunicator(
        new_group(),
        device if over_nccl else "cpu",
        control_group=new_control_group(),
        new_group=new_group,
        new_control_group=new_control_group,
    )
    if device.type == "cuda" and not over_nccl:
        return PinnedHostCommunicator(communicator, device)
    return communicator
