"""Dispatch, counting, exchange, checksums and map changes never wait for the device, seen without one.

Tensors live on torch's ``meta`` device, which knows shapes and no values: whatever would have to wait for a value, such
as ``item``, a shape that depends on data, or a copy to the host, raises. Copies from the host are noted as they pass.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from equipoise.dispatch.dispatcher import ExpertDispatcher
from equipoise.dispatch.policy import DispatchPolicy
from equipoise.engine.model import token_exchange
from equipoise.load.recorder import ExpertDistributionRecorder
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.topology import EpTopology
from equipoise.transfer.memory.verification import checksum_on_device
from helpers.run_threads import results_of

ROOT = Path(__file__).parents[2]
DEVICE = torch.device("meta")
TOPOLOGY = EpTopology(4, 2, 3)
LAYERS, EXPERTS = 3, 8


class Watched(TorchDispatchMode):
    """Notes copies between host and device: (operation, whether the host waits for it)."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[tuple[str, bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in ("_to_copy", "to"):  # the latter inside torch.inference_mode, where it comes as it was called
            target = kwargs.get("device") or next((arg for arg in args[1:] if isinstance(arg, torch.device)), None)
            if target is not None and torch.device(target) != args[0].device:
                self.copies.append(("to", not (kwargs.get("non_blocking") or True in args[1:])))
        if name == "copy_" and args[0].device != args[1].device:
            self.copies.append(("copy_", not (kwargs.get("non_blocking") or True in args[2:])))
        return func(*args, **kwargs)


def on_device() -> ExpertLocationMetadata:
    return ExpertLocationMetadata.trivial(LAYERS, EXPERTS, TOPOLOGY, max_replicas=5).clone(DEVICE)


@pytest.mark.parametrize("wait", [lambda t: t.sum().item(), lambda t: t.nonzero(), lambda t: torch.bincount(t)])
def test_what_waits_for_the_device_raises_here(wait: Any) -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        wait(torch.zeros(4, dtype=torch.int64, device=DEVICE))


def test_what_copies_is_noted() -> None:
    with Watched() as seen:
        torch.zeros(3, device=DEVICE).copy_(torch.zeros(3))
        torch.zeros(3).to(DEVICE, non_blocking=True)
    assert seen.copies == [("copy_", True), ("to", False)]


class Launches:
    """Stands for a Triton kernel, which no device is here to run: notes what each launch was given."""

    def __init__(self) -> None:
        self.arguments: list[list[Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            self.arguments.append([grid, *arguments, options])

        return launch

    def frozen(self, number: int) -> list[Any]:
        """What a captured graph would keep of a launch: of tensors their place alone."""
        place = lambda x: (x.untyped_storage()._cdata, x.storage_offset(), x.dtype)  # noqa: E731
        return [place(x) if isinstance(x, torch.Tensor) else x for x in self.arguments[number]]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    turns_gpu = pytest.importorskip("equipoise.dispatch.turns_gpu", reason="needs triton")
    noted = Launches()
    monkeypatch.setattr(turns_gpu, "choose", noted)
    return noted


@pytest.mark.parametrize("algorithm", ["static", "dynamic"])
@pytest.mark.parametrize("in_one_launch", [True, False])
def test_dispatch_and_counting(algorithm: Any, in_one_launch: bool, launches: Launches) -> None:
    def body(communicator: Any) -> list[tuple[str, bool]]:
        metadata = on_device()
        dispatcher = ExpertDispatcher(metadata, rank=0, policy=DispatchPolicy(algorithm))
        recorder = ExpertDistributionRecorder(metadata, communicator, period=4, num_windows=2, buffer_size=4)
        unpadded = torch.zeros((), dtype=torch.int32, device=DEVICE)
        ids = torch.zeros(16, 2, dtype=torch.int64, device=DEVICE)
        counts = recorder.counts if in_one_launch else None
        with Watched() as seen:
            for step in range(3):
                for layer in range(LAYERS):
                    slots = dispatcher.dispatch(layer, ids, counts=counts, num_unpadded=unpadded)
                    if not in_one_launch:
                        recorder.record(layer, slots)
                recorder.end_step(metadata.physical_to_logical_map, forward_pass_id=step, counted=True)
                dispatcher.advance(16)
        return seen.copies

    assert results_of(body, 1) == [[]]
    assert len(launches.arguments) == 3 * LAYERS


@pytest.mark.parametrize("algorithm", ["static", "dynamic"])
def test_a_launch_of_turns_is_given_the_same_whatever_has_changed(algorithm: Any, launches: Launches) -> None:
    """So a captured graph, which keeps what its launches were given, follows placements, turns and padding."""
    metadata = on_device()
    dispatcher = ExpertDispatcher(metadata, rank=0, policy=DispatchPolicy(algorithm))
    counts = torch.zeros(LAYERS, TOPOLOGY.num_slots + 1, dtype=torch.int32, device=DEVICE)
    unpadded = torch.zeros((), dtype=torch.int32, device=DEVICE)
    ids = torch.zeros(16, 2, dtype=torch.int64, device=DEVICE)
    kept = []  # the slots of every launch, so that none takes the place of another
    with Watched() as seen:
        for step in range(2):
            kept += [dispatcher.dispatch(layer, ids, counts=counts, num_unpadded=unpadded) for layer in range(LAYERS)]
            dispatcher.advance(16 + step)
            metadata.update_layers_(ExpertLocationMetadata.trivial(LAYERS, EXPERTS, TOPOLOGY), [0, 2])
            dispatcher.refresh([0, 2])
            unpadded.add_(1)
    assert all(copy == ("to", False) for copy in seen.copies)
    slots = 2  # argument 1, behind the grid: made anew by each call, in a graph's pool always at the same place
    for layer in range(LAYERS):
        first, second = launches.frozen(layer), launches.frozen(LAYERS + layer)
        assert len(first) > slots
        assert first[:slots] + first[slots + 1 :] == second[:slots] + second[slots + 1 :]


@pytest.mark.parametrize("max_tokens", [4, 32])
def test_padded_exchange(max_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exact exchange tells each rank how many tokens to expect, and so has to know: one wait, as documented."""
    monkeypatch.setattr(dist, "all_to_all_single", lambda received, sent, **_: received.copy_(sent))
    with Watched() as seen:
        destinations = torch.zeros(max_tokens, dtype=torch.int64, device=DEVICE)
        exchange = token_exchange._PaddedExchange(destinations, 4, max_tokens, None)  # type: ignore[arg-type]
        received = exchange.there(torch.zeros(max_tokens, 6, device=DEVICE))
        returned = exchange.back(received)
    assert (received.shape, returned.shape) == ((4 * max_tokens, 6), (max_tokens, 6))
    assert seen.copies == []


@pytest.mark.parametrize("layers", [[1], [0, 2], [0, 1, 2]])
def test_maps_change_by_one_copy_that_nobody_waits_for(layers: list[int]) -> None:
    live = on_device()
    new = ExpertLocationMetadata.trivial(LAYERS, EXPERTS, TOPOLOGY)
    addresses = [id(tensor) for tensor in live._tensors()]
    with Watched() as seen:
        live.update_layers_(new, layers)
    assert seen.copies == [("to", False)]
    assert [id(tensor) for tensor in live._tensors()] == addresses


def test_a_layer_with_a_map_of_its_own_changes_the_same_way() -> None:
    live = on_device()
    with Watched() as seen:
        live.update_layer_(1, torch.arange(TOPOLOGY.num_slots) % EXPERTS)
    assert seen.copies == [("to", False)]


@pytest.mark.parametrize("target", ["cpu", "meta"])
def test_packed_rows_are_those_of_the_source(target: str) -> None:
    """On the CPU the same function can be compared with plain indexing."""
    from equipoise.placement import packed_rows

    sources = [torch.arange(12).view(4, 3), torch.rand(4, 2, 3), torch.arange(4)[:, None].float()]
    targets = [torch.zeros_like(source, device=target) for source in sources]
    packed_rows._scatter_rows_(targets, [source[[3, 1]] for source in sources], [0, 2])
    for now, source in zip(targets, sources, strict=True):
        if target == "cpu":
            assert torch.equal(now[[0, 2]], source[[3, 1]])
            assert not now[[1, 3]].any()


def test_checksums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda _: 0)  # meta tensors have no address
    with Watched() as seen:
        total = checksum_on_device([torch.zeros(size, dtype=torch.uint8, device=DEVICE) for size in (100, 8192, 3)])
    assert (total.shape, total.dtype, seen.copies) == ((), torch.int64, [])


def test_every_test_for_a_gpu_is_found_with_its_limit() -> None:
    """By the command that runs each of them in a process of its own."""
    spec = importlib.util.spec_from_file_location("run_gpu_tests", ROOT / "scripts" / "test_gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    found = dict(module.collect())
    for file in module.FILES:
        for name in re.findall(r"mark\.gpu.*\n(?:@.*\n)*def (test_\w+)", (ROOT / file).read_text()):
            assert any(test.split("::")[1].split("[")[0] == name for test in found), name
    assert len(found) >= 20
    assert all(0 < seconds <= 300 for seconds in found.values())
