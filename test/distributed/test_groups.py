"""What NCCL groups are made with, seen through patched calls: no GPU is needed, and none is used."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from equipoise.distributed import communicator as communicator_module
from equipoise.distributed.communicator import TorchCommunicator
from equipoise.distributed.groups import MAX_TRANSFER_CTAS, new_transfer_group, serving_options
from equipoise.errors import ConfigError
from helpers.run_ranks import run_ranks

VARIABLE = "TORCH_NCCL_BLOCKING_WAIT"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What groups were made with, and what the environment said then; NCCL's options are played."""
    calls: list[dict[str, Any]] = []
    environ: dict[str, str] = {}

    def new_group(ranks: Any, **given: Any) -> str:
        calls.append({"ranks": ranks, "environ": dict(environ), **given})
        return "a group"

    def options(is_high_priority_stream: bool) -> SimpleNamespace:
        return SimpleNamespace(is_high_priority_stream=is_high_priority_stream, config=SimpleNamespace(max_ctas=None))

    monkeypatch.setattr(dist, "new_group", new_group)
    monkeypatch.setattr(dist, "ProcessGroupNCCL", SimpleNamespace(Options=options), raising=False)
    calls.append(environ)
    return calls


def test_a_transfer_group_over_nccl_has_no_watchdog_and_few_thread_blocks(made: list[dict[str, Any]]) -> None:
    environ = made.pop()
    assert new_transfer_group("nccl", environ, ranks=[0, 3]) == "a group"
    (call,) = made
    assert call["environ"] == {VARIABLE: "1"}
    assert environ == {}, "only while the group is made: groups of forward passes must not have it"
    assert (call["backend"], call["ranks"]) == ("nccl", [0, 3])
    assert call["pg_options"].config.max_ctas == MAX_TRANSFER_CTAS
    assert call["pg_options"].is_high_priority_stream is False


@pytest.mark.parametrize("before", ["0", "1"])
def test_what_the_environment_said_is_put_back(made: list[dict[str, Any]], before: str) -> None:
    environ = made.pop()
    environ[VARIABLE] = before
    new_transfer_group("nccl", environ)
    assert (made[0]["environ"][VARIABLE], environ[VARIABLE]) == ("1", before)


def test_the_environment_is_put_back_when_no_group_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    environ: dict[str, str] = {}
    monkeypatch.setattr(dist, "ProcessGroupNCCL", SimpleNamespace(Options=lambda **_: 1 / 0), raising=False)
    with pytest.raises(ZeroDivisionError):
        new_transfer_group("nccl", environ)
    assert environ == {}


def test_a_gloo_group_is_made_as_ever(made: list[dict[str, Any]]) -> None:
    environ = made.pop()
    new_transfer_group("gloo", environ)
    assert made == [{"ranks": None, "environ": {}, "backend": "gloo"}]
    assert serving_options("gloo") is None


def test_groups_of_forward_passes_go_first(made: list[dict[str, Any]]) -> None:
    assert made
    options = serving_options("nccl")
    assert options is not None
    assert options.is_high_priority_stream is True


def test_one_connection_to_the_device_is_warned_of(
    made: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    environ = made.pop()
    environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    with caplog.at_level(logging.WARNING, "equipoise.distributed"):
        new_transfer_group("nccl", environ)
    assert "CUDA_DEVICE_MAX_CONNECTIONS=1" in caplog.text


def rebuild_in_order(rank: int, world_size: int, control: bool) -> dict[str, Any]:
    events: list[str] = []

    def new_group(name: str) -> dist.ProcessGroup:
        events.append(f"new {name}")
        return dist.new_group(backend="gloo")

    communicator = TorchCommunicator(
        dist.new_group(backend="gloo"),
        control_group=dist.new_group(backend="gloo"),
        new_group=lambda: new_group("bulk"),
        new_control_group=lambda: new_group("control"),
    )
    old = communicator._group
    post, barrier = communicator.post, communicator.barrier
    communicator_module.abort_group = lambda group: events.append("abort the old" if group is old else "abort another")

    def counted(sends: Any, recvs: Any) -> Any:
        events.append(f"post to {[peer for peer, _ in sends]} from {[peer for peer, _ in recvs]}")
        return post(sends, recvs)

    communicator.post = counted  # type: ignore[method-assign]
    communicator.barrier = lambda timeout=60.0: (events.append("barrier"), barrier(timeout))[1]  # type: ignore[method-assign]
    communicator.rebuild(control=control)
    landed = torch.zeros(1, dtype=torch.uint8)
    to, frm = (rank + 1) % world_size, (rank - 1) % world_size
    communicator.exchange([(to, torch.full_like(landed, rank))], [(frm, landed)], 10.0)
    return {"events": events[:-1], "landed": int(landed)}


@pytest.mark.parametrize("control", [False, True])
def test_a_rebuild_aborts_the_old_group_on_all_ranks_then_connects_every_pair(control: bool) -> None:
    """No group is made before all ranks have aborted the old one, and none is used before all pairs are connected."""
    results = run_ranks(rebuild_in_order, 3, control, timeout=60)
    for rank, result in enumerate(results):
        after, before = (rank + 1) % 3, (rank - 1) % 3
        expected = ["abort the old", "barrier", "new bulk"]
        expected += [f"post to [{after}] from [{before}]", f"post to [{before}] from [{after}]", "barrier"]
        assert result["events"] == (["new control"] if control else []) + expected
        assert result["landed"] == before


def without_a_control_group(_rank: int, _world_size: int) -> str:
    group = dist.group.WORLD
    assert group is not None
    with pytest.raises(ConfigError, match="control_group is needed for bulk on cuda") as caught:
        TorchCommunicator(group, "cuda")
    assert TorchCommunicator(group, "cuda", control_group=group).knows_streams
    assert not TorchCommunicator(group).knows_streams
    return str(caught.value.field)


def test_bulk_on_a_gpu_needs_a_control_group() -> None:
    assert run_ranks(without_a_control_group, 1, timeout=60) == ["control_group"]


def test_nccl_counts_a_timeout_from_the_post_so_the_wait_adds_what_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(communicator_module.time, "monotonic", lambda: now[0])
    limits: list[float] = []
    work = SimpleNamespace(wait=lambda limit: limits.append(limit.total_seconds()))
    for on_cuda in (True, False):
        pending = communicator_module._TorchPending([work], "a transfer", on_cuda=on_cuda)  # type: ignore[list-item]
        now[0] += 31.0
        pending.wait(29.0)
    assert limits == [60.0, 29.0]


def test_one_rank_sums_without_a_group() -> None:
    group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    communicator = TorchCommunicator(group)  # type: ignore[arg-type]
    values = torch.arange(3)
    communicator.all_reduce_sum_(values)
    assert values.tolist() == [0, 1, 2]
