"""A communicator that checks that all ranks call the same collectives in the same order.

With each collective travel its name and how many came before it. Where ranks differ, every one of them raises
:class:`RanksDiverged`, which names the first call that does, instead of hanging or adding up unlike things.
"""

from __future__ import annotations

from typing import Any

import torch

from equipoise.distributed.communicator import Communicator, Pending


class RanksDiverged(AssertionError):
    """Ranks are in different collectives."""


class LockstepCommunicator:
    """Wraps another communicator; point-to-point messages pass through unchecked."""

    def __init__(self, inner: Communicator) -> None:
        self._inner = inner
        self._count = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def _label(self, name: str) -> str:
        self._count += 1
        return f"call {self._count}, {name}"

    def _check(self, name: str, timeout: float) -> None:
        label = self._label(name)
        _require_equal(self._inner.all_gather_object(label, timeout))

    def all_reduce_sum_(self, tensor: torch.Tensor, timeout: float = 60.0) -> None:
        self._check(f"all_reduce_sum_ of {tuple(tensor.shape)} {tensor.dtype}", timeout)
        self._inner.all_reduce_sum_(tensor, timeout)

    def post_sum(self, tensor: torch.Tensor, timeout: float = 600.0) -> Pending:
        name = self._label(f"post_sum of {tuple(tensor.shape)} {tensor.dtype}").encode()
        labels = torch.zeros(self._inner.world_size, 128, dtype=torch.uint8)
        labels[self._inner.rank, : len(name)] = torch.frombuffer(bytearray(name), dtype=torch.uint8)
        return _CheckedSum(self._inner.post_sum(labels, timeout), self._inner.post_sum(tensor, timeout), labels)

    def all_gather_object(self, value: Any, timeout: float = 60.0) -> list[Any]:
        label = self._label("all_gather_object")
        gathered = self._inner.all_gather_object((label, value), timeout)
        _require_equal([each[0] if isinstance(each, tuple) else each for each in gathered])
        return [each[1] for each in gathered]

    def broadcast_object(self, value: Any, src: int, timeout: float = 60.0) -> Any:
        self._check(f"broadcast_object from {src}", timeout)
        return self._inner.broadcast_object(value, src, timeout)

    def barrier(self, timeout: float = 60.0) -> None:
        self._check("barrier", timeout)
        self._inner.barrier(timeout)

    def connect(self, timeout: float = 60.0) -> None:
        self._check("connect", timeout)
        self._inner.connect(timeout)

    def rebuild(self, *, control: bool = False) -> None:
        if control:  # a rank may have left out a collective: that is what a rebuild mends
            self._inner.rebuild(control=True)
            self._count = 0
            return
        self._check("rebuild", 60.0)
        self._inner.rebuild(control=control)


class _CheckedSum:
    def __init__(self, labels_under_way: Pending, inner: Pending, labels: torch.Tensor) -> None:
        self._labels_under_way, self._inner, self._labels = labels_under_way, inner, labels

    def wait(self, timeout: float) -> None:
        self._labels_under_way.wait(timeout)
        _require_equal([bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in self._labels])
        self._inner.wait(timeout)


def _require_equal(labels: list[str]) -> None:
    if len(set(labels)) > 1:
        raise RanksDiverged("; ".join(f"rank {rank}: {label}" for rank, label in enumerate(labels)))
