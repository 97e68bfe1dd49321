"""What goes wrong in a scheduler, injected by the tests: ``SGLANG_CPU_FAULT`` names one. And what each hook counted.

``copies``: the updater is given copies of the weights, so maps change and weights do not (negative control).
``slow``: each message of a background transfer waits for two seconds.
``attach``: on rank 1 the last step of attaching raises.
``tick``: on rank 1 the second migration raises in the tick that begins it.
"""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any


def inject(kind: str) -> None:
    """Arms a fault in this process."""
    if kind == "copies":
        _give_copies()
    elif kind == "slow":
        _slow_transfers_down()
    elif kind == "attach":
        _raise_while_attaching()
    elif kind == "tick":
        _raise_in_a_tick()
    else:
        raise ValueError(f"no fault is called {kind!r}")


def _give_copies() -> None:
    import dataclasses

    from equipoise.hosts.sglang import scheduler_side

    runtime_of = scheduler_side.runtime_of

    def with_copies(runner: Any) -> Any:
        runtime = runtime_of(runner)
        copies = {layer: [tensor.clone() for tensor in tensors] for layer, tensors in runtime.weights.items()}
        return dataclasses.replace(runtime, weights=copies)

    scheduler_side.runtime_of = with_copies


def _slow_transfers_down() -> None:
    from equipoise.distributed.communicator import TorchCommunicator

    post = TorchCommunicator.post

    def slow(self: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            time.sleep(2)
        return post(self, *args, **kwargs)

    TorchCommunicator.post = slow  # type: ignore[method-assign]


def _raise_while_attaching() -> None:
    from equipoise.hosts.sglang import scheduler_side

    build = scheduler_side.build_balancer

    def broken(runtime: Any, *args: Any) -> Any:
        built = build(runtime, *args)
        if runtime.rank == 1:
            raise RuntimeError("injected by a test")
        return built

    scheduler_side.build_balancer = broken


def _raise_in_a_tick() -> None:
    from equipoise.manager.weight_migration import WeightMigration

    begin, calls = WeightMigration.begin, 0

    def broken(self: Any, *args: Any) -> None:
        nonlocal calls
        import torch.distributed as dist

        calls += 1
        if calls == 2 and dist.get_rank() == 1:
            raise RuntimeError("injected by a test")
        begin(self, *args)

    WeightMigration.begin = broken  # type: ignore[method-assign]


def report_calls(directory: Path) -> None:
    """Writes this process's hook counts to ``directory``/PID.json, twice a second."""

    def run() -> None:
        from equipoise.hosts.sglang.hook_targets import calls

        while True:
            part = directory / f"{os.getpid()}.part"
            part.write_text(json.dumps(calls))
            part.rename(directory / f"{os.getpid()}.json")
            time.sleep(0.5)

    threading.Thread(target=run, daemon=True).start()
