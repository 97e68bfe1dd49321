"""The cost of an activated expert: the machine's balance of computing and reading."""

from __future__ import annotations

import pytest
import torch

from equipoise import EpTopology, ExpertLocationMetadata
from equipoise.config import EplbConfig
from equipoise.dispatch.cost import active_expert_cost
from equipoise.dispatch.dispatcher import ExpertDispatcher
from equipoise.distributed.in_memory import InMemoryHub


@pytest.mark.parametrize(("name", "tokens"), [("NVIDIA H100 80GB HBM3", 295), ("NVIDIA H200", 206), ("NVIDIA H20", 37)])
def test_named_devices(monkeypatch: pytest.MonkeyPatch, name: str, tokens: int) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert round(active_expert_cost(torch.device("cuda"), bytes_per_parameter=2.0)) == tokens
    assert round(active_expert_cost(torch.device("cuda"), bytes_per_parameter=1.0) * 2) == pytest.approx(tokens, abs=1)


def test_auto_measures_a_cpu_and_reaches_the_policy() -> None:
    metadata = ExpertLocationMetadata.trivial(1, 4, EpTopology(1, 1, 6))
    config = EplbConfig(ep_dispatch_algorithm="batch", ep_dispatch_active_expert_cost="auto")
    dispatcher = ExpertDispatcher.from_config(config, metadata, InMemoryHub(1).communicator(0))
    assert 0 < dispatcher.policy.active_expert_cost < 10_000
