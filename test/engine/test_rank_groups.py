"""How a rank's groups are chosen, and that a rank which cannot use CUDA says why; seen through patched calls."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist

from equipoise.distributed.communicator import TorchCommunicator
from equipoise.distributed.pinned_host import PinnedHostCommunicator
from equipoise.engine import groups as groups_module
from equipoise.engine.worker import require_usable_fork
from equipoise.errors import ConfigError
from helpers.run_ranks import run_ranks


def choose(_rank: int, _world_size: int, device: str, transport: Any) -> tuple[str, list[str], str]:
    backends: list[str] = []

    def new_transfer_group(backend: str, _environ: Any) -> Any:
        backends.append(backend)
        return dist.new_group(backend="gloo")  # stands in for NCCL's

    groups_module.new_transfer_group = new_transfer_group
    communicator = groups_module._transfer_communicator(torch.device(device), transport, {})
    return type(communicator).__name__, backends, str(communicator.device)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("device", "transport", "expected"),
    [
        ("cpu", "auto", (TorchCommunicator, "gloo", "cpu")),
        ("cpu", "host", (TorchCommunicator, "gloo", "cpu")),
        ("cuda:1", "auto", (TorchCommunicator, "nccl", "cuda:1")),
        ("cuda:1", "nccl", (TorchCommunicator, "nccl", "cuda:1")),
        ("cuda:1", "host", (PinnedHostCommunicator, "gloo", "cuda:1")),
    ],
)
def test_the_transport_is_the_one_that_was_chosen(device: str, transport: str, expected: Any) -> None:
    kind, backend, where = expected
    assert run_ranks(choose, 1, device, transport, timeout=60) == [(kind.__name__, [backend], where)]


def test_nccl_without_a_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="'nccl' carries tensors between GPUs, the weights lie on cpu") as caught:
        groups_module.require_transport("nccl", torch.device("cpu"))
    assert caught.value.field == "eplb_transport"
    groups_module.require_transport("nccl", torch.device("cuda", 0))


def test_a_fork_that_cannot_use_cuda_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    require_usable_fork()
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    with pytest.raises(ConfigError, match="started CUDA and can use no GPU.*NVML") as caught:
        require_usable_fork()
    assert caught.value.field == "device"


# A build of torch without CUDA plays one with it, from after the imports on (inductor's fail otherwise).
_COUNT = """
import os, sys
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
import torch
import equipoise.engine.worker
from equipoise.config import EngineConfig, ServeConfig
from equipoise.engine.model.blueprint import ModelBlueprint
calls = []
torch.cuda._is_compiled = torch.backends.cuda.is_built = lambda: True
torch._C._cuda_getDeviceCount = lambda: calls.append("poisons a fork") or 2
torch.cuda._device_count_nvml = lambda: int(sys.argv[2])
torch.cuda._device_count_amdsmi = torch.cuda._device_count_nvml
blueprint = ModelBlueprint.prepare(ServeConfig(EngineConfig(sys.argv[1], ep_size=2, device="auto")))
print(blueprint.device_type, len(calls))
"""


@pytest.mark.parametrize(("gpus_by_nvml", "poisoned"), [(2, False), (-1, True)])
def test_what_the_supervisor_does_before_it_forks_starts_no_cuda(gpus_by_nvml: int, poisoned: bool) -> None:
    """With NVML no call is made that poisons a fork. Without it there is one, which shows that calls are counted."""
    command = [sys.executable, "-c", _COUNT, "demo", str(gpus_by_nvml)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.split()
    assert said[-2] == "cuda"
    assert (int(said[-1]) > 0) is poisoned
