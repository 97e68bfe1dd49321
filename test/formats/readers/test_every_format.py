"""Every format that is read: a file as its producer makes it, read back to the right values, and what is said of it."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from equipoise.errors import TraceError
from equipoise.formats.readers.registry import READERS
from equipoise.load.trace import LoadTrace, open_traces

L, E = 3, 8
COUNTS = np.random.default_rng(0).integers(0, 99, (5, L, E))


def test_tensorrt_llm_statistics_of_all_ranks(tmp_path: Path) -> None:
    # As ExpertStatistic._write does: one file a rank, "{iteration}_{layer}", layers numbered as in the model.
    (tmp_path / "meta_info.json").write_text(json.dumps({"num_experts": E, "num_experts_per_token": 2}))
    for rank in range(2):
        tensors = {f"{100 + t}_{3 + layer}": COUNTS[t, layer] + rank for t in range(5) for layer in range(L)}
        save_file(tensors, tmp_path / f"rank{rank}.safetensors")
    save_file({"100_3": np.zeros((4, 2), np.int64)}, tmp_path / "rank0_raw.safetensors")
    trace = LoadTrace.open(tmp_path)
    np.testing.assert_array_equal(trace.logical_count, 2 * COUNTS + 1)
    np.testing.assert_array_equal(trace.rank_count[:, 1], COUNTS + 1)
    assert trace.layer_ids.tolist() == [3, 4, 5]
    assert trace.forward_pass_ids.tolist() == [100, 101, 102, 103, 104]
    assert trace.metadata["top_k"] == 2
    assert "ranks 0, 1" in trace.found
    one = LoadTrace.open(tmp_path / "rank0.safetensors")
    assert any("recorded by ranks [0] only" in note for note in one.notes)


def test_an_iteration_that_a_rank_missed_is_left_out(tmp_path: Path) -> None:
    save_file({"1_0": COUNTS[0, 0], "2_0": COUNTS[1, 0]}, tmp_path / "rank0.safetensors")
    save_file({"2_0": COUNTS[1, 0]}, tmp_path / "rank1.safetensors")
    trace = LoadTrace.open([tmp_path / "rank0.safetensors", tmp_path / "rank1.safetensors"])
    assert trace.forward_pass_ids.tolist() == [2]
    assert any("1 of 2 iterations are left out" in note for note in trace.notes)


@pytest.mark.parametrize("form", ["slots", "local"])
def test_vllm_ascend_load_view(tmp_path: Path, form: str) -> None:
    # moe_load (windows, L, ranks, local slots); expert_maps (L, ranks, E) with the local slot, or the slots' experts
    slots = np.array([[[0, 1, 2], [3, 0, 1]]] * 2)  # (L, ranks, local slots), 4 experts
    local = np.full((2, 2, 4), -1)
    for layer, rank, slot in np.ndindex(slots.shape):
        local[layer, rank, slots[layer, rank, slot]] = slot
    load = np.arange(24).reshape(2, 2, 2, 3)
    maps = slots if form == "slots" else local
    torch.save({"moe_load": torch.tensor(load), "expert_maps": torch.tensor(maps)}, tmp_path / "view.pt")
    trace = LoadTrace.open(tmp_path / "view.pt")
    assert trace.logical_count[0, 0].tolist() == [0 + 4, 1 + 5, 2, 3]
    assert trace.physical_to_logical_map.tolist() == slots.reshape(2, 6).tolist()


def test_a_load_view_without_a_map_says_what_is_missing(tmp_path: Path) -> None:
    torch.save({"moe_load": torch.ones(2, 2, 3)}, tmp_path / "view.pt")
    with pytest.raises(TraceError, match="must say which expert each slot holds"):
        LoadTrace.open(tmp_path / "view.pt")


def test_json_lines_of_a_training_log(tmp_path: Path) -> None:
    lines = [{"event": "start"}] + [
        {"iteration": 10 + t, "layer_number": 1 + layer, "rank": rank, "tokens_per_expert": COUNTS[t, layer].tolist()}
        for t in range(5) for layer in range(L) for rank in range(2)
    ]  # fmt: skip
    path = tmp_path / "router.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"iteration": 15, "tok')  # cut off
    trace = LoadTrace.open(path)
    np.testing.assert_array_equal(trace.logical_count, 2 * COUNTS)
    assert trace.forward_pass_ids.tolist() == [10, 11, 12, 13, 14]
    assert trace.layer_ids.tolist() == [1, 2, 3]
    assert any("1 lines without counts" in note for note in trace.notes)


def test_csv_with_ranks_steps_and_other_columns(tmp_path: Path) -> None:
    rows = ["step,rank,layer,expert,count,comment"]
    for t, layer, expert in np.ndindex(COUNTS.shape):
        rows += [f"{t},{rank},{2 * layer},{expert},{COUNTS[t, layer, expert]},x" for rank in range(2)]
    (tmp_path / "load.csv").write_text("# recorded on Monday\n" + "\n".join(rows))
    trace = LoadTrace.open(tmp_path / "load.csv", num_logical_experts=E)
    np.testing.assert_array_equal(trace.logical_count, 2 * COUNTS)
    assert trace.rank_count.shape == (5, 2, L, E)
    assert trace.layer_ids.tolist() == [0, 2, 4]
    assert any("columns comment are ignored" in note for note in trace.notes)


def test_csv_without_a_header_and_with_a_guess(tmp_path: Path) -> None:
    (tmp_path / "load.csv").write_text("0,0,3\n0,5,4\n1,1,2.5\n")
    trace = LoadTrace.open(tmp_path / "load.csv")
    assert trace.logical_count.tolist() == [[[3, 0, 0, 0, 0, 4], [0, 2.5, 0, 0, 0, 0]]]
    assert any("guessed from the highest id: 6; --num-logical-experts" in note for note in trace.notes)


@pytest.mark.parametrize("suffix", ["npy", "npz", "pt", "safetensors", "json"])
@pytest.mark.parametrize("counts", [COUNTS, COUNTS[0], COUNTS / 4], ids=["T L E", "L E", "fractions"])
def test_bare_arrays(tmp_path: Path, suffix: str, counts: np.ndarray) -> None:
    path = tmp_path / f"counts.{suffix}"
    match suffix:
        case "npy":
            np.save(path, counts)
        case "npz":
            np.savez_compressed(path, load=counts)
        case "pt":
            torch.save(torch.tensor(counts), path)
        case "safetensors":
            save_file({"logical_count": counts}, path)
        case "json":
            path.write_text(json.dumps({"logical_count": counts.tolist()}))
    np.testing.assert_array_equal(LoadTrace.open(path).logical_count, counts.reshape(-1, L, E))


def test_mindspeed_json(tmp_path: Path) -> None:
    (tmp_path / "all.json").write_text(json.dumps({"0": {"0": 123, "2": 89}, "1": {"1": 190}}))
    assert LoadTrace.open(tmp_path / "all.json").logical_count.tolist() == [[[123, 0, 89], [0, 190, 0]]]


def test_token_ids_in_a_bare_array_are_told_apart_from_counts(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    ids = rng.permuted(np.tile(np.arange(E), (200, L, 1)), axis=-1)[..., :3].astype(np.int16)
    np.save(tmp_path / "ids.npy", ids)
    trace = LoadTrace.open(tmp_path / "ids.npy", tokens_per_step=50)
    assert trace.num_steps == 4
    np.testing.assert_array_equal(trace.logical_count[0, 0], np.bincount(ids[:50, 0].ravel(), minlength=E))
    assert any("--read-as counts says otherwise" in note for note in trace.notes)
    assert LoadTrace.open(tmp_path / "ids.npy", read_as="counts").logical_count.shape == (200, L, 3)
    np.savez(tmp_path / "counts.npz", logical_count=ids)
    assert LoadTrace.open(tmp_path / "counts.npz").logical_count.shape == (200, L, 3)


def test_every_reader_is_tried_somewhere_in_the_tests() -> None:
    assert len({reader.name for reader in READERS}) == len(READERS) == 12


# The faults that strangers found, each as a kind ---------------------------------------------------------------------


def per_pass(path: Path, rank: int, passes: range, value: int = 1) -> Path:
    p2l = torch.arange(6).repeat(2, 1) % 4
    records = [
        {"forward_pass_id": i, "rank": rank, "gatherer_key": "primary",
         "global_physical_count": torch.full((2, 6), value, dtype=torch.int32)} for i in passes
    ]  # fmt: skip
    torch.save({"records": records, "last_physical_to_logical_map": p2l}, path)
    return path


def test_one_ranks_file_alone_says_so(tmp_path: Path) -> None:
    trace = LoadTrace.open(per_pass(tmp_path / "r0.pt", 0, range(4)))
    assert any("recorded by ranks [0] only" in note for note in trace.notes)


def test_files_of_ranks_given_one_by_one_are_one_recording(tmp_path: Path) -> None:
    files = [per_pass(tmp_path / f"r{rank}.pt", rank, range(4)) for rank in range(3)]
    traces = open_traces(files)
    assert len(traces) == 1
    assert traces[0].logical_count.sum() == 3 * 4 * 12
    assert not any("only" in note for note in traces[0].notes)


def test_recordings_of_other_passes_stay_apart(tmp_path: Path) -> None:
    files = [per_pass(tmp_path / "a.pt", 0, range(4)), per_pass(tmp_path / "b.pt", 0, range(50, 54))]
    assert len(open_traces(files)) == 2


def test_passes_left_out_are_said(tmp_path: Path) -> None:
    files = [per_pass(tmp_path / "a.pt", 0, range(40)), per_pass(tmp_path / "b.pt", 1, range(4))]
    trace = LoadTrace.open(files)
    assert trace.num_steps == 4
    assert any("36 of 40 forward passes are left out" in note for note in trace.notes)


def test_a_part_of_the_slots_is_no_workload(tmp_path: Path) -> None:
    count = torch.zeros(2, 6, dtype=torch.int32)
    count[:, 2:4] = 5  # as DeepEP low latency counts: the rank's own slots
    record = {"forward_pass_id": 1, "rank": 1, "global_physical_count": count}
    torch.save({"records": [record], "last_physical_to_logical_map": torch.arange(6).repeat(2, 1)}, tmp_path / "r1.pt")
    assert any("only slots 2 to 3 of 6 have load" in n for n in LoadTrace.open(tmp_path / "r1.pt").notes)


@pytest.mark.parametrize("fill", [0, 7, -1])
def test_padding_ids_are_no_load(tmp_path: Path, fill: int) -> None:
    ids = np.array([[[1, 2]], [[7, 0]], [[fill, fill]], [[fill, fill]]])
    np.savez(tmp_path / "t.npz", topk=ids)
    trace = LoadTrace.open(tmp_path / "t.npz", num_logical_experts=8)
    assert trace.logical_count.tolist() == [[[1, 1, 1, 0, 0, 0, 0, 1]]]
    assert any("4 padding ids" in note for note in trace.notes) == (fill >= 0)


def test_padding_in_per_token_dumps_is_taken_out_of_the_counts(tmp_path: Path) -> None:
    ids = torch.tensor(
        [[[1, 2, -1], [3, 0, -1], [0, 0, 0]]], dtype=torch.int32
    )  # (L, tokens, K); the last row is padding
    count = torch.bincount(ids[ids >= 0].flatten(), minlength=4)[None].int()
    record = {
        "forward_pass_id": 1,
        "rank": 0,
        "global_physical_count": count,
        "topk_ids_of_layer": ids,
        "forward_mode": 1,
    }
    torch.save({"records": [record], "last_physical_to_logical_map": torch.arange(4)[None]}, tmp_path / "t.pt")
    trace = LoadTrace.open(tmp_path / "t.pt")
    assert trace.logical_count.tolist() == [[[1, 1, 1, 1]]]
    assert trace.phases.tolist() == [1]
    assert any("3 padding ids" in note for note in trace.notes)


def stat(path: Path, ring: list[int]) -> Path:
    torch.save({"rank": 0, "logical_count": torch.tensor(ring, dtype=torch.int32).reshape(-1, 1, 1)}, path)
    return path


@pytest.mark.parametrize(
    ("ring", "steps"),
    [
        ([1, 2, 0, 0, 0, 0, 3, 4, 0, 0], [1, 2, 3, 4]),  # idle for four steps, never wrapped
        ([4, 5, 0, 0, 0, 0, 0, 1, 2, 3], [1, 2, 3, 4, 5]),  # wrapped
        ([0, 0, 0, 1, 2, 0, 3, 0, 0, 0], [1, 2, 3]),
    ],
)
def test_order_of_a_ring(tmp_path: Path, ring: list[int], steps: list[int]) -> None:
    assert LoadTrace.open(stat(tmp_path / "s.pt", ring)).logical_count.ravel().tolist() == steps


def test_a_full_ring_says_that_its_beginning_is_not_known(tmp_path: Path) -> None:
    trace = LoadTrace.open(stat(tmp_path / "s.pt", [1, 2, 3]))
    assert any("its oldest step is not known" in note for note in trace.notes)


def test_files_of_one_step_each_play_as_steps(tmp_path: Path) -> None:
    for index, counts in enumerate(COUNTS):
        np.save(tmp_path / f"{index}.npy", counts)
    trace = LoadTrace.open([tmp_path / f"{index}.npy" for index in range(5)])
    np.testing.assert_array_equal(trace.logical_count, COUNTS)
    assert "5 files of one step each" in trace.found


def test_counts_near_the_largest_integer_do_not_overflow(tmp_path: Path) -> None:
    np.save(tmp_path / "c.npy", np.full((4, 1, 2), 2**62))
    trace = LoadTrace.open(tmp_path / "c.npy")
    assert trace.total().tolist() == [[4 * 2.0**62] * 2]


def test_a_large_member_may_be_as_large_as_its_file_but_a_packed_one_may_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from equipoise.formats import archive

    monkeypatch.setattr(archive, "MAX_BYTES", 1000)
    np.savez(tmp_path / "plain.npz", load=np.ones((10, 4, 8), dtype=np.int64))
    torch.save({"rank": 0, "logical_count": torch.ones(10, 4, 8, dtype=torch.int64)}, tmp_path / "s.pt")
    assert LoadTrace.open(tmp_path / "s.pt").num_steps == 10
    with zipfile.ZipFile(tmp_path / "packed.npz", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("load.npy", bytes(100_000))
    with pytest.raises(TraceError, match="more than the limit"):
        LoadTrace.open(tmp_path / "packed.npz")
