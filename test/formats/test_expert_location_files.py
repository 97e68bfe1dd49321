"""Placement files: our own JSON and SGLang's --init-expert-location."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from equipoise.errors import ConfigError, InvalidInputError, PlacementError
from equipoise.formats.expert_location import (
    LoadStart,
    MapStart,
    TrivialStart,
    save_expert_location,
)
from equipoise.formats.readers.placements import load_expert_location, read_init_expert_location, read_placement
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.topology import EpTopology

P2L = [[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 3, 3]]
TOPOLOGY = EpTopology(3, 1, 2)


def write(path: Path, content: object) -> str:
    if path.suffix == ".pt":
        torch.save(content, path)
    else:
        path.write_text(json.dumps(content))
    return str(path)


@st.composite
def placements(draw):
    ranks, slots_per_rank = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    topology = EpTopology(ranks, 1, slots_per_rank)
    experts = draw(st.integers(1, topology.num_slots))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows = np.arange(topology.num_slots) % experts
    p2l = rng.permuted(np.tile(rows, (draw(st.integers(1, 3)), 1)), axis=1)
    raw = rng.random(p2l.shape) + 0.01
    sums = np.stack([np.bincount(row, part, experts)[row] for row, part in zip(p2l, raw, strict=True)])
    return ExpertLocationMetadata.from_physical_to_logical(p2l, experts, topology, dispatch_weights=raw / sums)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(metadata=placements())
def test_save_and_load_give_the_same_placement(metadata, tmp_path):
    save_expert_location(metadata, tmp_path / "p.json")
    loaded = load_expert_location(tmp_path / "p.json")
    assert loaded.topology == metadata.topology
    assert loaded.num_logical_experts == metadata.num_logical_experts
    for name in (
        "physical_to_logical_map",
        "logical_to_physical_map",
        "num_replicas",
        "dispatch_weights",
        "dispatch_cdf",
    ):
        assert torch.equal(getattr(loaded, name), getattr(metadata, name)), name
    start = read_init_expert_location(str(tmp_path / "p.json"))
    assert isinstance(start, MapStart)
    np.testing.assert_array_equal(start.dispatch_weights, metadata.dispatch_weights.numpy())


def test_the_answer_of_the_server_can_be_saved_and_loaded(tmp_path):
    answer = {
        "num_ranks": 3,
        "num_nodes": 1,
        "slots_per_rank": 2,
        "num_logical_experts": 4,
        "physical_to_logical_map": P2L,
        "dispatch_weights": [[0.5, 0.5, 1, 1, 0.5, 0.5], [0.2, 1, 1, 1, 0.4, 0.4]],
    }
    loaded = load_expert_location(write(tmp_path / "answer.json", answer))
    assert loaded.physical_to_logical_map.tolist() == P2L


def test_trivial_needs_no_file():
    assert isinstance(read_init_expert_location("trivial"), TrivialStart)


@pytest.mark.parametrize("name", ["map.json", "map.pt"])
def test_a_map_in_sglang_form(tmp_path, name):
    content = {"physical_to_logical_map": torch.tensor(P2L, dtype=torch.int32) if name.endswith(".pt") else P2L}
    start = read_init_expert_location(write(tmp_path / name, content))
    assert isinstance(start, MapStart)
    metadata = start.to_metadata(2, 4, TOPOLOGY, max_replicas=3)
    assert metadata.physical_to_logical_map.tolist() == P2L
    assert metadata.max_replicas == 3


@pytest.mark.parametrize("name", ["load.json", "load.pt"])
@pytest.mark.parametrize("num_steps", [None, 3])
def test_recorded_load_in_sglang_form_always_has_steps(tmp_path, name, num_steps):
    count = np.arange(8).reshape(2, 4) if num_steps is None else np.arange(24).reshape(3, 2, 4)
    content = {"logical_count": torch.tensor(count) if name.endswith(".pt") else count.tolist()}
    start = read_init_expert_location(write(tmp_path / name, content))
    assert isinstance(start, LoadStart)
    np.testing.assert_array_equal(start.logical_count, count.reshape(num_steps or 1, 2, 4))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "logical_count"),
        ({"rank": 0, "other": [[1]]}, "other"),
        ({"physical_to_logical_map": [[0, 1], [0]]}, "different lengths"),
        ({"physical_to_logical_map": [0, 1]}, "2 dimensions"),
        ({"physical_to_logical_map": [[0.5, 1.0]]}, "must hold integers"),
        ({"physical_to_logical_map": "x"}, "2 dimensions"),
        ({"physical_to_logical_map": [[10**30]]}, "2 dimensions"),
        ({"logical_count": [[1, -2]]}, "-2"),
        ({"logical_count": [[0, 0]]}, "zero everywhere"),
        ({"logical_count": [[1, float("nan")]]}, "nan"),
        ({"logical_count": [[[[1]]]]}, "2 or 3 dimensions"),
        ({"logical_count": []}, "2 or 3 dimensions"),
    ],
)
@pytest.mark.parametrize("suffix", ["json", "pt"])
def test_wrong_content_is_a_placement_error_that_names_the_file(tmp_path, content, message, suffix):
    path = write(tmp_path / f"bad.{suffix}", content)
    with pytest.raises(PlacementError) as caught:
        read_init_expert_location(path)
    assert message in str(caught.value)
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.field == "init_expert_location"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"{", "JSON that is truncated"),
        (b"\xff\xfe\x00", "of no known kind"),
        (b"[" * 100_000, "nested too deeply"),
        (b"9" * 10_000, "neither JSON, YAML nor CSV"),
        (b"PK\x03\x04 and nothing else", "truncated or damaged"),
    ],
)
def test_files_that_cannot_be_parsed(tmp_path, data, message):
    path = tmp_path / "bad"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=message) as caught:
        read_init_expert_location(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::UserWarning")  # nested tensors are a prototype
def test_a_tensor_that_is_no_array(tmp_path):
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    for content in (nested, [nested, nested], [[torch.ones(1, requires_grad=True)]]):
        path = write(tmp_path / "nested.pt", {"physical_to_logical_map": content})
        with pytest.raises(InvalidInputError, match="nested.pt"):
            read_init_expert_location(path)


def test_a_missing_file_says_what_would_do(tmp_path):
    with pytest.raises(ConfigError, match=r"`trivial`, JSON or a file of .*tirvial: no such file"):
        read_init_expert_location("tirvial")
    with pytest.raises(ConfigError, match="directory"):
        read_init_expert_location(str(tmp_path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_without_permission(tmp_path):
    path = tmp_path / "secret.json"
    path.write_text("{}")
    path.chmod(0)
    with pytest.raises(ConfigError, match="Permission denied"):
        read_init_expert_location(str(path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 4, TOPOLOGY), "each of the 3 MoE layers, got 2"),
        ((2, 5, TOPOLOGY), r"misses experts \[4\] in layer 0"),
        ((2, 3, TOPOLOGY), r"is 3, outside \[0, 3\)"),
        ((2, 4, EpTopology(2, 1, 2)), r"must have shape \(layers, 4\)"),
    ],
)
def test_a_map_that_does_not_fit_the_model(arguments, message):
    with pytest.raises(PlacementError, match=message):
        MapStart(np.array(P2L)).to_metadata(*arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version"),
        ({"format": "other"}, "format"),
        ({"num_ranks": 0}, "num_ranks"),
        ({"num_logical_experts": True}, "num_logical_experts"),
        ({"num_logical_experts": 5}, "misses experts"),
        ({"dispatch_weights": [[1.0] * 6] * 2}, "sum to"),
        ({"slots_per_rank": 3}, "must have shape"),
    ],
)
def test_our_own_format_is_checked(tmp_path, change, message):
    path = tmp_path / "p.json"
    save_expert_location(ExpertLocationMetadata.from_physical_to_logical(P2L, 4, TOPOLOGY), path)
    write(path, {**json.loads(path.read_text()), **change})
    with pytest.raises(InvalidInputError, match=message) as caught:
        load_expert_location(path)
    assert str(path) in str(caught.value)


def test_a_placement_that_cannot_be_written(tmp_path):
    metadata = ExpertLocationMetadata.from_physical_to_logical(P2L, 4, TOPOLOGY)
    with pytest.raises(OSError, match="No such file"):
        save_expert_location(metadata, tmp_path / "missing" / "p.json")


def test_unknown_keys_are_named_and_ignored(tmp_path):
    for content in ({"physical_to_logical_map": P2L, "comment": "x"}, {"logical_count": [[1, 2]], "comment": "x"}):
        start = read_init_expert_location(write(tmp_path / "map.json", content))
        assert start.notes == ("keys comment are ignored",)


def test_inline_json_as_sglang_takes_it():
    start = read_init_expert_location(json.dumps({"physical_to_logical_map": P2L}))
    assert start.physical_to_logical_map.tolist() == P2L
    load = read_init_expert_location('{"logical_count": [[3, 4]]}')
    assert load.logical_count.tolist() == [[[3, 4]]]
    with pytest.raises(PlacementError, match=r"\(inline JSON\)"):
        read_init_expert_location('{"other": 1}')


def test_a_server_starts_from_any_recording(tmp_path):
    np.save(tmp_path / "counts.npy", np.arange(8).reshape(2, 4))
    (tmp_path / "counts.csv").write_text("layer,expert,count\n0,0,1\n0,1,2\n")
    assert read_init_expert_location(str(tmp_path / "counts.npy")).logical_count.tolist() == [
        [[0, 1, 2, 3], [4, 5, 6, 7]]
    ]
    assert read_init_expert_location(str(tmp_path / "counts.csv")).logical_count.tolist() == [[[1, 2]]]


def test_placements_of_the_neighbours(tmp_path):
    from equipoise.formats.readers.tensorrt_llm import write_assignments
    from equipoise.formats.readers.vllm_ascend import write_expert_map

    ascend = read_placement(write(tmp_path / "ascend.json", write_expert_map(np.array(P2L), 3, [0, 1])))
    assert (ascend.physical_to_logical_map.tolist(), ascend.topology) == (P2L, EpTopology(3, 1, 2))
    path = tmp_path / "trtllm.yaml"
    path.write_text(write_assignments(np.array(P2L), [3, 4]))
    assert read_placement(path).physical_to_logical_map.tolist() == P2L


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_slots: 3\ninitial_global_assignments:\n  0: [0, 1]\n", "num_slots=3"),
        ("initial_global_assignments:\n  0: [0, x]\n", r"\[0\]\[1\] must be an integer"),
        ("initial_global_assignments: &a\n  0: [0]\nother: *a\n", "aliases"),
        ("initial_global_assignments: [1]\n", "must map layers"),
        ("initial_global_assignments: {0: [0}\n", "truncated or damaged"),
    ],
)
def test_wrong_assignments(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(InvalidInputError, match=message):
        read_placement(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moe_layer_count": 2}, "moe_layer_count is 2"),
        ({"layer_list": {}}, "must be a list of layers"),
        ({"layer_list": [{"layer_id": 0, "device_list": [{"device_expert": [0, -1]}]}]}, "device_expert must be"),
        ({"layer_list": [{"layer_id": 0, "device_list": [{"device_expert": [0]}, {"device_expert": [1, 2]}]}]}, "same"),
        ({"layer_list": [{"layer_id": 0, "device_count": 3, "device_list": [{"device_expert": [0]}]}]}, "device_count"),
    ],
)
def test_wrong_expert_maps(tmp_path, change, message):
    content = {"moe_layer_count": 1, "layer_list": [{"layer_id": 0, "device_list": [{"device_expert": [0, 1]}]}]}
    with pytest.raises(InvalidInputError, match=message):
        read_placement(write(tmp_path / "map.json", {**content, **change}))
