"""Keeps staging and commits in order on a GPU, beside the forward pass."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


class SideStream:
    """On a CPU it does nothing.

    Staging runs on a stream of its own, beside the forward pass, and waits for the last commit, which read the staging
    slots and wrote the live ones. A commit runs on the caller's stream after staging has finished.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._last_commit: torch.cuda.Event | None = None

    def beside_the_forward_pass(self) -> AbstractContextManager[object]:
        if self._stream is None:
            return nullcontext()
        if self._last_commit is not None:
            self._stream.wait_event(self._last_commit)
        return torch.cuda.stream(self._stream)

    def finish(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()

    def committed(self) -> None:
        if self._stream is not None:
            self._last_commit = torch.cuda.Event()
            self._last_commit.record()
