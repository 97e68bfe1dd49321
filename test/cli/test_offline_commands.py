"""The commands that work on recordings, as a person runs them."""

from __future__ import annotations

import io
import json
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from equipoise.cli.main import main
from equipoise.formats.readers.placements import read_placement
from equipoise.load.trace import LoadTrace

LAYERS, EXPERTS = 2, 16


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    popularity = rng.dirichlet(np.full(EXPERTS, 0.4), size=LAYERS)
    path = tmp_path / "load.npz"
    LoadTrace(rng.multinomial(200_000, popularity, size=(32, LAYERS)), metadata={"top_k": 4}).save(path)
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == code, capsys.readouterr()
    captured = capsys.readouterr()
    return captured.out if code == 0 else captured.err


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".csv", ".json", ".pt"])
def test_every_writer_of_convert_is_read_back(
    capsys: pytest.CaptureFixture[str], trace: Path, tmp_path: Path, suffix: str
) -> None:
    out = tmp_path / f"out{suffix}"
    assert f"written: {out}" in run(capsys, "convert", trace, out)
    np.testing.assert_array_equal(LoadTrace.open(out).logical_count, LoadTrace.open(trace).logical_count)


def test_an_unknown_suffix_names_those_that_would_do(
    capsys: pytest.CaptureFixture[str], trace: Path, tmp_path: Path
) -> None:
    said = run(capsys, "convert", trace, tmp_path / "out.parquet", code=2)
    assert ".safetensors, .npz, .csv, .json, .pt" in said
    assert list(tmp_path.iterdir()) == [trace]


def test_stdin(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    text = b"layer,expert,count\n0,0,30\n0,1,10\n"
    monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"buffer": io.BytesIO(text)}))
    said = run(capsys, "inspect", "-")
    assert "1 step, 1 layers of 2 experts" in said
    assert "1.50" in said  # the hottest expert has 30 of a mean of 20


def test_inspect_says_what_matters(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    counts = np.ones((8, 3, 4), dtype=int)
    counts[:, 1, 2] = 9
    counts[:, 2] = 0
    counts[4:, 0] = [4, 0, 0, 0]
    LoadTrace(counts, layer_ids=np.array([3, 4, 5])).save(tmp_path / "a.npz")
    said = run(capsys, "inspect", tmp_path / "a.npz")
    assert "layers without a token (dense, or not recorded): [2]" in said
    assert "expert 2 of layer 1 (75.0%)" in said
    assert "between parts 4 and 5" in said


def test_inspect_of_a_placement(capsys: pytest.CaptureFixture[str], trace: Path, tmp_path: Path) -> None:
    run(capsys, "plan", trace, "-o", tmp_path / "map.json", "--num-ranks", 4, "--format", "vllm-ascend")
    said = run(capsys, "inspect", tmp_path / "map.json")
    assert "vLLM-Ascend expert map of 4 devices: 2 layers, 16 slots, 16 experts" in said


@pytest.mark.parametrize("kind", ["equipoise", "sglang", "vllm-ascend", "trtllm"])
def test_plans_are_read_back_and_are_better(
    capsys: pytest.CaptureFixture[str], trace: Path, tmp_path: Path, kind: str
) -> None:
    out = tmp_path / ("map.yaml" if kind == "trtllm" else "map.json")
    said = run(capsys, "plan", trace, "-o", out, "--num-ranks", 4, "--num-redundant-experts", 4, "--format", kind)
    said = " ".join(said.split())
    before, after = (float(said.split(word)[0].split()[-1]) for word in (" as an engine", " with it"))
    assert after > before
    placed = read_placement(out)
    assert placed.physical_to_logical_map.shape == (LAYERS, 20)
    assert set(np.unique(placed.physical_to_logical_map)) == set(range(EXPERTS))
    if kind == "sglang":
        assert json.loads(out.read_text()).keys() == {"physical_to_logical_map"}  # SGLang passes keys on as arguments
    assert ("no place for dispatch weights" in said) == (kind != "equipoise")


def test_merge_and_thin(capsys: pytest.CaptureFixture[str], trace: Path, tmp_path: Path) -> None:
    run(capsys, "merge", trace, trace, "-o", tmp_path / "both.npz")
    assert LoadTrace.open(tmp_path / "both.npz").num_steps == 64
    run(capsys, "thin", tmp_path / "both.npz", tmp_path / "thin.npz", "--sum", 5, "--first", 2, "--last", 32)
    thin, whole = LoadTrace.open(tmp_path / "thin.npz"), LoadTrace.open(trace)
    np.testing.assert_array_equal(thin.logical_count[1], whole.logical_count[7:12].sum(0))
    assert thin.num_steps == 6
    assert "keep none" in run(capsys, "thin", trace, tmp_path / "x.npz", "--first", 50, code=2)


def test_synth_has_what_was_asked_for(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run(
        capsys, "synth", tmp_path / "s.safetensors", "--num-steps", 40, "--num-layers", 2, "--num-logical-experts", 32,
        "--alternate-every", 10, "--burst-every", 8, "--tokens-per-step", 4000, "--top-k", 4,
    )  # fmt: skip
    load = LoadTrace.open(tmp_path / "s.safetensors").logical_count
    assert (load.sum(2) == 16000).all()

    def apart(a: int, b: int) -> float:
        return float(np.abs(load[a] - load[b]).sum() / 32000 / 2)

    assert apart(0, 1) < 0.1 < apart(0, 11)
    assert apart(0, 21) < 0.1, "the first workload has come back"
    assert apart(0, 7) > 0.1, "step 7 is a burst"


def test_compare_writes_everything_and_fits_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, trace: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    html, png, out = (tmp_path / name for name in ("r.html", "r.png", "r.json"))
    said = run(
        capsys, "compare", trace, "--num-ranks", 4, "--interval", 8, "--algorithm", "equipoise", "--jobs", 1,
        "--num-redundant-experts", 4, "--html", html, "--png", png, "--json", out,
    )  # fmt: skip
    table = said[said.index("placement") :].split("R: redundant")[0]
    assert max(map(len, table.splitlines())) <= 80
    for word in ("equipoise", "deepseek, timer", "nothing moved", "oracle", "force-balanced", "batch"):
        assert word in table
    assert "…" not in said
    content = json.loads(out.read_text())
    assert content["format"] == "equipoise.compare"
    assert {row["kind"] for row in content["rows"]} >= {"live", "nothing", "oracle", "force-balanced"}
    assert png.read_bytes().startswith(b"\x89PNG")
    assert_self_contained(html.read_text())


def assert_self_contained(page: str) -> None:
    class Checker(HTMLParser):
        def handle_starttag(self, tag, attrs):
            tags.append(tag)
            for name, value in attrs:
                assert name not in ("src", "href"), (tag, value)

    tags: list[str] = []
    Checker().feed(page)
    assert "script" not in tags
    assert tags.count("svg") == 4
    assert "url(" not in page


def test_compare_to_stdout_is_json_alone(capsys: pytest.CaptureFixture[str], trace: Path) -> None:
    said = run(
        capsys, "compare", trace, "--num-ranks", 4, "--interval", 8, "--algorithm", "reweight", "--dispatch", "weights",
        "--num-redundant-experts", 4, "--jobs", 1, "--json", "-",
    )  # fmt: skip
    assert json.loads(said)["rows"]


def test_a_file_name_cannot_inject_into_the_page(
    capsys: pytest.CaptureFixture[str], trace: Path, tmp_path: Path
) -> None:
    evil = tmp_path / "<script>alert(1)<'&.npz"
    evil.write_bytes(trace.read_bytes())
    run(
        capsys, "compare", evil, "--num-ranks", 4, "--interval", 8, "--algorithm", "reweight", "--dispatch", "weights",
        "--num-redundant-experts", 4, "--jobs", 1, "--html", tmp_path / "r.html",
    )  # fmt: skip
    assert "<script" not in (tmp_path / "r.html").read_text()


def test_advise_recommends_and_prints_flags(capsys: pytest.CaptureFixture[str], trace: Path) -> None:
    said = run(capsys, "advise", trace, "--num-ranks", 4, "--model", "qwen3-30b", "--jobs", 1)
    assert "tokens a second on 4 h100 in 1 node, worth" in said
    assert "equipoise serve --model-path MODEL --ep-size 4" in said
    assert '--eplb-config \'{"num_redundant_experts":' in said


def test_advise_says_when_it_would_not_pay(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    LoadTrace(np.full((16, 2, 16), 1000)).save(tmp_path / "even.npz")
    said = run(capsys, "advise", tmp_path / "even.npz", "--num-ranks", 4, "--jobs", 1)
    assert "Leave it as it is" in said


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("compare TRACE --algorithm best", "algorithm must be one of"),
        ("compare TRACE --gpu h1000", "--gpu must be one of"),
        ("compare TRACE --num-ranks 3 --num-redundant-experts 1", "num_redundant_experts=2 would do"),
        ("compare TRACE --json /nonexistent/x.json", "existing directory"),
        ("advise TRACE --num-ranks 4 --efficiency 2", "--efficiency must be in (0, 1]"),
        ("plan TRACE -o /nonexistent/x.json --num-ranks 4", "/nonexistent/x.json: cannot be written"),
        ("inspect /nonexistent.pt", "/nonexistent.pt: no such file"),
        ("synth /nonexistent/x.csv --num-steps 2 --num-layers 1 --num-logical-experts 8", "cannot be written"),
        ("synth x.csv --top-k 300", "--top-k must be at most num_logical_experts=256"),
    ],
)
def test_what_is_wrong_is_one_line(capsys: pytest.CaptureFixture[str], trace: Path, line: str, says: str) -> None:
    words = [str(trace) if word == "TRACE" else word for word in line.split()]
    said = run(capsys, *words, code=2)
    assert says in said
    assert said.count("\n") == 1
