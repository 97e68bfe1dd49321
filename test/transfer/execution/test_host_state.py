"""State as hosts have it: lists of tensors, tensors made in inference mode, parameters; staging before serving."""

from __future__ import annotations

import logging
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from equipoise.distributed.in_memory import InMemoryHub
from equipoise.errors import ConfigError
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.topology import EpTopology
from equipoise.transfer.execution import stream as stream_module
from equipoise.transfer.execution.updater import ExpertLocationUpdater
from equipoise.transfer.execution.worker import TransferWorker
from equipoise.transfer.planning.plan import plan_transfer
from helpers.migrate import migrate_layer
from helpers.placements import WEIGHT_SPECS, pooled, rank_weights, same_bytes
from helpers.run_threads import results_of

TOPOLOGY = EpTopology(2, 1, 3)
OLD, NEW = np.arange(6)[None], np.array([[3, 1, 5, 2, 0, 4]])


def move(communicator, weights, **options):
    updater = ExpertLocationUpdater(communicator, TOPOLOGY, weights, **options)
    migrate_layer(updater, plan_transfer(OLD, NEW, TOPOLOGY).layers[0])
    return updater


def test_weights_as_a_list_of_one_tensor_per_expert():
    """The layout of vLLM-Ascend: nothing stacked, each expert's tensor an allocation of its own."""

    def body(communicator):
        stacked = rank_weights(OLD, communicator.rank, TOPOLOGY)
        lists = [[[row.clone() for row in tensor] for tensor in tensors] for tensors in stacked]
        addresses = [row.data_ptr() for tensor in lists[0] for row in tensor]
        move(communicator, lists, verification="checksum")
        expected = rank_weights(NEW, communicator.rank, TOPOLOGY)[0]
        assert all(same_bytes(torch.stack(rows), right) for rows, right in zip(lists[0], expected, strict=True))
        assert [row.data_ptr() for tensor in lists[0] for row in tensor] == addresses

    results_of(body, 2)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([torch.zeros(4)] * 2, "a list of 2 tensors .* must have slots_per_rank=3 rows"),
        ([torch.zeros(4), torch.zeros(4), torch.zeros(5)], "must hold tensors of one shape and dtype"),
        ([torch.zeros(4, 3).t()] * 3, "must have contiguous rows"),
    ],
)
def test_unusable_lists_are_refused(rows, words):
    with pytest.raises(ConfigError, match=words):
        ExpertLocationUpdater(InMemoryHub(1).communicator(0), EpTopology(1, 1, 3), [[rows]])


@pytest.mark.parametrize("in_a_pool", [False, True])
@pytest.mark.parametrize("made_inside", [False, True])
@pytest.mark.parametrize("used_inside", [False, True])
def test_weights_and_state_made_in_inference_mode_or_not_are_moved_in_it_or_not(in_a_pool, made_inside, used_inside):
    def body(communicator):
        with torch.inference_mode(mode=made_inside):  # of this thread
            weights = rank_weights(OLD, communicator.rank, TOPOLOGY)
            if in_a_pool:
                weights = pooled(weights, 3)
            updater = ExpertLocationUpdater(communicator, TOPOLOGY, weights, verification="checksum")
            metadata = ExpertLocationMetadata.from_physical_to_logical(OLD, 6, TOPOLOGY, max_replicas=2).clone()
            made = torch.zeros(()).is_inference()
            kept = ExpertLocationMetadata.trivial(1, 6, TOPOLOGY), metadata
        assert made is made_inside
        # What we make lives on wherever the host writes it.
        assert not any(tensor.is_inference() for placement in kept for tensor in placement._tensors())
        assert not (in_a_pool and weights.row_of_slot.is_inference())
        with torch.inference_mode(mode=used_inside):
            layer = plan_transfer(OLD, NEW, TOPOLOGY).layers[0]
            migrate_layer(updater, layer, lambda batch: metadata.update_layer_(0, batch.new_map.copy()))
            migrate_layer(updater, plan_transfer(NEW, OLD, TOPOLOGY).layers[0])
            updater.forget_canaries([0])
        return metadata.physical_to_logical_map.tolist()

    assert results_of(body, 2) == [NEW.tolist()] * 2


def test_parameters_that_want_gradients_are_moved_as_well():
    def body(communicator):
        specs = WEIGHT_SPECS[:1]
        weights = [[torch.nn.Parameter(rank_weights(OLD, communicator.rank, TOPOLOGY, specs)[0][0])]]
        move(communicator, weights)
        return same_bytes(weights[0][0].data, rank_weights(NEW, communicator.rank, TOPOLOGY, specs)[0][0])

    assert results_of(body, 2) == [True, True]


@pytest.mark.parametrize("budget", [None, 1 << 16])
def test_warm_up_takes_all_the_staging_there_will_ever_be(budget, caplog):
    def body(communicator):
        weights = rank_weights(OLD, communicator.rank, TOPOLOGY)
        updater = ExpertLocationUpdater(communicator, TOPOLOGY, weights, staging_bytes=budget)
        assert updater.staging_bytes == 0
        updater.warm_up()
        reserved = updater.staging_bytes
        profiles = migrate_layer(updater, plan_transfer(OLD, NEW, TOPOLOGY).layers[0])
        assert [profile.peak_staging_bytes for profile in profiles] == [reserved]
        assert reserved == updater.staging_bytes
        return reserved

    with caplog.at_level(logging.INFO, "equipoise.transfer"):
        reserved = results_of(body, 2)
    expert = sum(torch.zeros(shape, dtype=dtype).nbytes for dtype, shape in WEIGHT_SPECS)
    assert min(reserved) > 3 * expert
    assert budget is None or max(reserved) <= budget
    assert f"{reserved[0]} bytes of staging" in caplog.text


def test_the_transfer_thread_makes_the_weights_device_its_own(monkeypatch):
    """Seen through a patched ``set_device``: the current device is each thread's own, and starts at GPU 0."""
    calls = []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: calls.append((threading.current_thread().name, device))
    )
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: SimpleNamespace(wait_stream=lambda _: None, device_index=3))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    side = stream_module.SideStream(torch.device("cuda", 3))
    updater = ExpertLocationUpdater(InMemoryHub(1).communicator(0), EpTopology(1, 1, 3), [[torch.zeros(3, 2)]])
    updater._stream = side
    runner = TransferWorker(updater)
    runner.close()
    assert calls == [("eplb-transfer", torch.device("cuda", 3))]
    with pytest.raises(AssertionError, match="current device is 0, the weights lie on cuda:3"):
        side.overlapped()
