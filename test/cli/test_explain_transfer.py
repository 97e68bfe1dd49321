"""The readable form of a plan."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from rich.console import Console

from equipoise.cli.explain_transfer import explain_transfer, summarise_layer
from equipoise.errors import ConfigError, PlacementError
from equipoise.formats.expert_location import save_expert_location
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.topology import EpTopology
from equipoise.transfer.planning.plan import SlotCase, plan_transfer
from helpers.placements import random_map

TOPOLOGY = EpTopology(4, 2, 3)
OLD = [[0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 2], [*range(9), 0, 1, 2]]
NEW = [[0, 2, 1, 0, 4, 5, 3, 3, 8, 6, 7, 2], [*range(9), 0, 1, 2]]


def run(*paths, **options) -> str:
    out = io.StringIO()
    assert explain_transfer(*paths, Console(file=out, width=160), **options) == 0
    return out.getvalue()


def write(path, content):
    path.write_text(json.dumps(content))
    return path


def test_summary_counts_every_slot_once():
    rng = np.random.default_rng(2)
    old, new = random_map(rng, 8, TOPOLOGY, 5), random_map(rng, 8, TOPOLOGY, 5)
    for layer in plan_transfer(old, new, TOPOLOGY, num_logical_experts=8).layers:
        summary = summarise_layer(layer, TOPOLOGY)
        assert sum(summary.cases.values()) == TOPOLOGY.num_slots
        assert summary.crossings <= summary.cases[SlotCase.OTHER_NODE]
        assert summary.cases[SlotCase.SAME_NODE] + summary.cases[SlotCase.OTHER_NODE] == layer.num_transfers
        assert summary.num_rounds >= max(summary.busiest_sender, summary.busiest_receiver) - summary.relayed


def test_our_own_files_bring_their_topology(tmp_path):
    paths = []
    for name, row in (("old", OLD), ("new", NEW)):
        metadata = ExpertLocationMetadata.from_physical_to_logical(row, 9, TOPOLOGY)
        save_expert_location(metadata, tmp_path / f"{name}.json")
        paths.append(tmp_path / f"{name}.json")
    text = run(*paths)
    assert "other node" in text
    assert "4 experts sent in 1 of 2 layers" in text
    detail = run(*paths, layer_id=0)
    assert "slot 3 (rank 1, node 0)" in detail
    assert "free rider" in detail
    assert "nothing moves in layer 1" in run(*paths, layer_id=1)


def test_sglang_files_need_the_number_of_ranks(tmp_path):
    old = write(tmp_path / "old.json", {"physical_to_logical_map": OLD})
    torch.save({"physical_to_logical_map": torch.tensor(NEW)}, tmp_path / "new.pt")
    with pytest.raises(ConfigError, match="over how many ranks"):
        run(old, tmp_path / "new.pt")
    assert "4 experts sent" in run(old, tmp_path / "new.pt", num_ranks=4, num_nodes=2)
    with pytest.raises(ConfigError, match="num_ranks=5 must divide the 12 slots"):
        run(old, tmp_path / "new.pt", num_ranks=5)
    with pytest.raises(ConfigError, match=r"layer_id must be in \[0, 2\), got 2"):
        run(old, tmp_path / "new.pt", num_ranks=4, layer_id=2)


def test_the_same_placement_moves_nothing(tmp_path):
    old = write(tmp_path / "old.json", {"physical_to_logical_map": OLD})
    assert run(old, old, num_ranks=4) == "nothing moves\n"


def test_unusable_files_are_named(tmp_path):
    good = write(tmp_path / "good.json", {"physical_to_logical_map": OLD})
    load = write(tmp_path / "load.json", {"logical_count": [[1, 2, 3]]})
    other = write(tmp_path / "other.json", {"physical_to_logical_map": OLD[:1]})
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    for old, new, words in (
        (good, load, "NEW: .*load.json: holds no physical_to_logical_map"),
        (good, other, "OLD has shape"),
        (broken, good, "OLD: .*broken.json"),
        (good, tmp_path / "absent.json", "NEW: .*absent.json"),
    ):
        with pytest.raises(PlacementError, match=words):
            run(old, new, num_ranks=4)
