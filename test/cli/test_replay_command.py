"""`equipoise replay` below the command line: arguments, table, JSON."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from equipoise.cli.replay import run_replay
from equipoise.errors import ConfigError, InvalidInputError, TraceError
from equipoise.load.trace import LoadTrace, open_traces
from equipoise.replay.config import ReplayConfig
from equipoise.replay.report import human_bytes

TRACES = Path(__file__).resolve().parents[3] / "shared" / "traces"
CONFIG = ReplayConfig(num_ranks=4, num_nodes=2, num_redundant_experts=4, window=2, expert_bytes=1 << 20)


def save_trace(path: Path, num_steps: int = 9, experts: int = 8, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    popularity = rng.dirichlet(np.full(experts, 0.5), size=3)
    LoadTrace(rng.multinomial(600, popularity, size=(num_steps, 3))).save(path)
    return path


def run(config, traces, algorithms, json_path=None) -> str:
    output = io.StringIO()
    assert run_replay(config, traces, algorithms, json_path, Console(file=output, width=60)) == 0
    return output.getvalue()


def table_rows(output: str) -> dict[str, list[str]]:
    lines = [line for line in output.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in cells}


def test_table_and_json_say_the_same(tmp_path):
    traces = [save_trace(tmp_path / "a[red].npz"), save_trace(tmp_path / "b.npz", seed=1)]
    out = tmp_path / "out.json"
    output = run(CONFIG, traces, ["deepseek", "deepseek_hierarchical"], out)
    content = json.loads(out.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (content["format"], content["version"]) == ("equipoise.replay", 1)
    assert content["traces"] == ["a[red].npz", "b.npz"]
    assert "Replay of a[red].npz, then b.npz" in output
    assert content["config"]["num_redundant_experts"] == 4
    assert content["topology"] == {"num_ranks": 4, "num_nodes": 2, "slots_per_rank": 3}
    assert [window["trace"] for window in content["windows"]] == [0] * 4 + [1] * 4
    assert content["steps_left_out"] == 2
    assert "2 steps behind the last full windows left out" in output

    rows = table_rows(output)
    column = rows["placement"].index
    assert rows["no rebalancing"][column("balancedness")] == f"{content['no_rebalancing']['mean_balancedness']:.4f}"
    assert rows["oracle"][column("balancedness")] == f"{content['oracle']['mean_balancedness']:.4f}"
    for result in content["algorithms"]:
        row = rows[result["algorithm"]]
        assert row[column("balancedness")] == f"{result['mean_balancedness']:.4f}"
        assert row[column("PAR")] == f"{result['mean_peak_to_average']:.3f}"
        assert row[column("worst")] == f"{min(result['balancedness_per_window']):.4f}"
        assert row[column("moves")] == str(result["moves"])
        assert row[column("bytes")] == human_bytes(result["bytes_moved"])
        assert result["bytes_moved"] == result["moves"] << 20
        assert len(result["balancedness_per_window"]) == 7
        assert len(result["balancedness_per_layer"]) == 3
        assert [plan["window"] for plan in result["plans"]] == list(range(1, 8))


def test_layers_without_tokens_are_null_in_json(tmp_path):
    counts = np.ones((4, 2, 8), dtype=int)
    counts[:, 1] = 0
    LoadTrace(counts).save(tmp_path / "t")
    run(CONFIG, [tmp_path / "t"], ["deepseek"], tmp_path / "out.json")
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["no_rebalancing"]["balancedness_per_layer"][1] is None
    assert content["algorithms"][0]["balancedness_per_layer"][0] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"traces": []}, "at least one trace"),
        ({"algorithms": []}, "at least one algorithm"),
        ({"algorithms": ["deepseek", "random"]}, "algorithm must be one of auto, .*, got 'random'"),
        ({"json_path": Path("/nonexistent/out.json")}, "json must name a file in an existing directory"),
        ({"json_path": Path("/")}, "json must name a file"),
        ({"config": ReplayConfig(num_ranks=5, window=2)}, "num_redundant_experts=2 would do"),
        ({"config": ReplayConfig(num_ranks=4, num_nodes=3, window=2)}, "num_nodes"),
        ({"config": ReplayConfig(num_ranks=4, window=5)}, "at least two windows"),
    ],
)
def test_wrong_arguments_are_one_clear_line(tmp_path, options, message):
    arguments = {
        "config": CONFIG,
        "traces": [save_trace(tmp_path / "t")],
        "algorithms": ["deepseek"],
        "json_path": None,
    }
    with pytest.raises(InvalidInputError, match=message) as caught:
        run(**{**arguments, **options})
    assert "\n" not in str(caught.value)


def test_traces_of_different_models_name_both_files(tmp_path):
    traces = [save_trace(tmp_path / "a"), save_trace(tmp_path / "b", experts=16)]
    with pytest.raises(TraceError, match=r"b has \(layers, experts\) = \(3, 16\), .*a has \(3, 8\)"):
        open_traces(traces)


def test_a_token_trace_that_never_saw_the_last_expert_takes_the_others_number(tmp_path):
    for name, highest in (("a", 7), ("b", 5)):
        np.savez(tmp_path / f"{name}.npz", topk=np.arange(64).reshape(32, 2, 1) % (highest + 1))
    traces = open_traces([tmp_path / "b.npz", tmp_path / "a.npz"], tokens_per_step=4)
    assert [trace.num_logical_experts for trace in traces] == [8, 8]


def test_json_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(*_args):
        raise OSError(28, "No space left on device")

    trace = save_trace(tmp_path / "t")
    monkeypatch.setattr("equipoise.formats.atomic_file.os.fsync", full_disk)
    with pytest.raises(ConfigError, match="No space left on device"):
        run(CONFIG, [trace], ["deepseek"], tmp_path / "out.json")
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


@pytest.mark.skipif(not TRACES.is_dir(), reason=f"recorded traces are not at {TRACES}")
@pytest.mark.parametrize("name", ["dsv2lite_esft_intent.npz", "dsv2lite_esft_translation.npz"])
def test_real_traces_are_balanced_by_every_published_algorithm(name):
    config = ReplayConfig(num_ranks=8, num_redundant_experts=8, window=8)
    rows = table_rows(run(config, [TRACES / name], ["deepseek", "deepseek_hierarchical"]))
    score = {placement: float(row[0]) for placement, row in rows.items() if row[0][0].isdigit()}
    assert score["no rebalancing"] < 0.7
    assert 0.9 < score["deepseek"] < score["oracle"]
    assert 0.9 < score["deepseek_hierarchical"] < score["oracle"]
