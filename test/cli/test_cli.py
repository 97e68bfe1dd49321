"""The command line as a person meets it: a subprocess, its exit code and what it says on stderr."""

from __future__ import annotations

import json
import os
import pickle
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import equipoise
from equipoise.cli.arguments import Serve
from equipoise.cli.main import COMMANDS, main, parse
from equipoise.errors import InvalidInputError


def run_cli(*arguments: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """``equipoise ARGUMENTS`` in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100", "NO_COLOR": "1"}
    return subprocess.run(
        [sys.executable, "-m", "equipoise", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
    )


def the_line(code: int, stdout: str, stderr: str) -> str:
    """What was complained of: exit code 2, one line on stderr, no traceback anywhere."""
    assert code == 2, (code, stdout, stderr)
    assert stderr.count("\n") == 1, stderr
    assert stderr.startswith("equipoise: error: "), stderr
    assert "Traceback" not in stdout + stderr
    return stderr.strip()


def complaint(*arguments: object) -> str:
    """What ``equipoise ARGUMENTS`` complains of in a process of its own."""
    done = run_cli(*arguments)
    return the_line(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def complain(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """:func:`complaint` in this process, which has torch already; what child processes say counts too."""

    def run(*arguments: object) -> str:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        return the_line(code, *capfd.readouterr())

    return run


LAYERS, EXPERTS = 3, 8  # of the tiny model


class TestHelp:
    def test_top_level_lists_the_commands(self) -> None:
        done = run_cli("--help")
        assert done.returncode == 0
        for command in ("serve", "replay"):
            assert re.search(rf"• {command}\s+\w+", done.stdout)

    def test_help_comes_without_torch_and_at_once(self) -> None:
        code = (
            "import sys; from equipoise.cli.main import main\n"
            "try: main(['serve', '--help'])\n"
            "except SystemExit: pass\n"
            "assert 'torch' not in sys.modules and 'numba' not in sys.modules and 'fastapi' not in sys.modules"
        )
        began = time.monotonic()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert time.monotonic() - began < 10  # 0.2 s on a machine with nothing else to do

    def test_version(self) -> None:
        assert run_cli("--version").stdout.strip() == f"equipoise {equipoise.__version__}"
        assert run_cli("-V").stdout == run_cli("--version").stdout

    def test_alone_it_prints_help(self) -> None:
        done = run_cli()
        assert (done.returncode, done.stderr) == (0, "")
        assert "equipoise advise dump.pt" in done.stdout

    @pytest.mark.parametrize("command", COMMANDS)
    def test_help_of_every_command_reflows(
        self, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """No option's text has a line that ends early, as one from a source file's line would."""
        monkeypatch.setenv("COLUMNS", "80")
        with pytest.raises(SystemExit) as caught:
            main([command, "--help"])
        assert caught.value.code == 0
        boxed = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("│", " "))]
        assert max(map(len, boxed)) <= 80
        lines = [line.strip("│").rstrip() for line in boxed]
        for line, after in pairwise(lines):
            indent, word = len(after) - len(after.lstrip()), after.split()[0] if after.split() else ""
            continues = indent >= 18 and line.startswith(" " * 18) and not line.lstrip().startswith(("(", "•"))
            if continues and word and not word.startswith("("):
                assert len(line) + len(word) + 2 >= 74, (line, after)


class TestArguments:
    """Complaints that need no process of their own."""

    @pytest.mark.parametrize(
        ("line", "says"),
        [
            ("nope", "unknown command 'nope'"),
            ("sreve", "did you mean serve?"),
            ("serve --model-path m --ep-sise 2", "did you mean --ep-size?"),
            ("inspect", "at least one FILE"),
            ("synth x.csv --num-steps 0", "--num-steps must be at least 1"),
            ("thin a b.csv --sum many", "--sum"),
            ("serve", "--model-path"),
            ("serve --model-path m --ep-size four", "--ep-size"),
            ("serve --model-path m --ep-size", "--ep-size"),
            ("serve --model-path m --ep-size 0", "--ep-size must be at least 1, got 0"),
            ("serve --model-path m --ep-size 3 --nnodes 2", "--nnodes must be a divisor"),
            ("serve --model-path m --ep-sise 2", "--ep-sise"),
            ("serve --model-path m --eplb-verification maybe", "'maybe'"),
            ("serve --model-path m --eplb-min-rebalancing-utilization-threshold 2", "in (0, 1], got 2.0"),
            ("serve --model-path m --port 70000", "--port must be in [0, 65535]"),
            ("serve --model-path m --expert-distribution-recorder-mode per_token", "'per_token'"),
            ("replay", "at least one TRACE"),
            ("replay trace --num-ranks 0", "--num-ranks must be at least 1"),
            ("replay trace --window many", "--window"),
        ],
    )
    def test_one_line_and_exit_code_2(self, capsys: pytest.CaptureFixture[str], line: str, says: str) -> None:
        assert main(line.split()) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("equipoise: error: ")
        assert captured.err.count("\n") == 1
        assert says in captured.err
        assert "│" not in captured.err

    def test_flags_reach_the_configuration(self) -> None:
        line = (
            "serve --model-path m --ep-size 4 --ep-num-redundant-experts 8 --enable-eplb --nnodes 2 "
            "--eplb-max-moves-per-layer 3 --admin-api-key k"
        )
        command = parse(line.split())
        assert isinstance(command, Serve)
        assert (command.engine.ep_size, command.engine.nnodes) == (4, 2)
        assert (command.eplb.enable_eplb, command.eplb.ep_num_redundant_experts) == (True, 8)
        assert command.eplb.eplb_max_moves_per_layer == 3
        assert command.http.admin_api_key == "k"

    def test_validation_raises_the_field(self) -> None:
        with pytest.raises(InvalidInputError) as caught:
            parse(["serve", "--model-path", "m", "--ep-size", "0"])
        assert caught.value.field == "ep_size"


@pytest.mark.timeout(90)  # what is not refused would be served for ever
class TestServe:
    def test_missing_model_directory(self, tmp_path: Path) -> None:
        assert str(tmp_path / "nowhere") in complaint("serve", "--port", 0, "--model-path", tmp_path / "nowhere")

    def test_directory_without_a_model(self, complain: Callable[..., str], tmp_path: Path) -> None:
        assert str(tmp_path) in complain("serve", "--port", 0, "--model-path", tmp_path)

    def test_slots_that_do_not_divide_over_the_ranks(self, complain: Callable[..., str], tiny_model: Path) -> None:
        said = complain(
            "serve", "--port", 0, "--model-path", tiny_model, "--ep-size", 2, "--ep-num-redundant-experts", 1
        )
        assert f"{EXPERTS} logical + 1 redundant" in said

    def test_port_in_use(self, tmp_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            # The model does not exist either: the port is looked at first, before minutes of loading.
            said = complaint("serve", "--port", port, "--model-path", tmp_path / "nowhere")
        assert f"port {port} is in use" in said

    def test_unknown_host(self, complain: Callable[..., str]) -> None:
        assert "no.such.host.invalid" in complain("serve", "--model-path", "m", "--host", "no.such.host.invalid")

    def test_unknown_algorithm_lists_the_known(self, complain: Callable[..., str], tiny_model: Path) -> None:
        said = complain("serve", "--port", 0, "--model-path", tiny_model, "--eplb-algorithm", "best")
        assert "'best'" in said
        assert "deepseek_hierarchical" in said

    def test_an_unknown_algorithm_is_told_before_torch_is_imported(self) -> None:
        code = (
            "import sys; from equipoise.cli.main import main; code = main(); "
            "assert 'torch' not in sys.modules; sys.exit(code)"
        )
        arguments = ("serve", "--port", "0", "--model-path", "m", "--eplb-algorithm", "best")
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
        assert done.returncode == 2, done.stderr
        assert "'best'" in done.stderr

    def test_missing_dump_directory(self, complain: Callable[..., str], tiny_model: Path, tmp_path: Path) -> None:
        said = complain("serve", "--port", 0, "--model-path", tiny_model, "--dump-dir", tmp_path / "nowhere")
        assert "--dump-dir" in said

    @pytest.mark.parametrize("kind", ["truncated", "missing expert", "zeros", "nan"])
    def test_init_expert_location(
        self, complain: Callable[..., str], tiny_model: Path, tmp_path: Path, kind: str
    ) -> None:
        path = tmp_path / "location.json"
        if kind == "truncated":
            path = tmp_path / "location.pt"
            torch.save({"logical_count": torch.ones(LAYERS, EXPERTS)}, path)
            path.write_bytes(path.read_bytes()[:100])
        elif kind == "missing expert":
            path.write_text(json.dumps({"physical_to_logical_map": [[1, *range(1, EXPERTS)]] * LAYERS}))
        else:
            value = {"zeros": 0, "nan": float("nan")}[kind]
            path.write_text(json.dumps({"logical_count": [[value] * EXPERTS] * LAYERS}))
        arguments = ("serve", "--port", 0, "--model-path", tiny_model, "--ep-size", 2, "--init-expert-location", path)
        said = complain(*arguments)
        assert {"missing expert": "experts [0]", "nan": "nan", "zeros": "zero everywhere"}.get(kind, str(path)) in said

    def test_hostile_init_expert_location(self, tiny_model: Path, tmp_path: Path) -> None:
        path, touched = hostile_file(tmp_path)
        complaint("serve", "--port", 0, "--model-path", tiny_model, "--ep-size", 2, "--init-expert-location", path)
        assert not touched.exists(), "code from the file was run"


class TestReplay:
    @pytest.mark.parametrize("kind", ["missing", "truncated", "text", "empty"])
    def test_unreadable_trace(self, complain: Callable[..., str], tmp_path: Path, kind: str) -> None:
        path = tmp_path / "dump.pt"
        if kind == "truncated":
            torch.save({"rank": 0, "logical_count": torch.ones(8, 2, 8, dtype=torch.int32)}, path)
            path.write_bytes(path.read_bytes()[:200])
        elif kind == "text":
            path.write_text("hello")
        elif kind == "empty":
            path.write_bytes(b"")
        assert "dump.pt" in complain("replay", path, "--num-ranks", 2, "--algorithm", "deepseek")

    def test_hostile_trace(self, tmp_path: Path) -> None:
        path, touched = hostile_file(tmp_path)
        assert path.name in complaint("replay", path, "--num-ranks", 2)
        assert not touched.exists(), "code from the file was run"

    @pytest.mark.parametrize("value", [0, -1, float("nan")])
    def test_counts_that_are_none(self, complain: Callable[..., str], tmp_path: Path, value: float) -> None:
        path = tmp_path / "dump.pt"
        counts = torch.full((64, 2, 8), value, dtype=torch.float32 if value != value else torch.int32)
        save_stat_dump(path, counts)
        complain("replay", path, "--num-ranks", 2, "--algorithm", "deepseek")

    def test_unknown_algorithm_and_slots_that_do_not_divide(self, complain: Callable[..., str], tmp_path: Path) -> None:
        path = tmp_path / "dump.pt"
        save_stat_dump(path, torch.randint(1, 9, (64, 2, 8), dtype=torch.int32))
        assert "'best'" in complain("replay", path, "--num-ranks", 2, "--algorithm", "best")
        assert "divide evenly" in complain("replay", path, "--num-ranks", 3, "--algorithm", "deepseek")

    def test_table_and_json(self, tmp_path: Path) -> None:
        path, out = tmp_path / "dump.pt", tmp_path / "out.json"
        save_stat_dump(path, torch.randint(1, 9, (64, 2, 8), dtype=torch.int32))
        done = run_cli(
            "replay", path, "--algorithm", "deepseek", "--algorithm", "deepseek_hierarchical", "--num-ranks", 2,
            "--num-redundant-experts", 2, "--json", out,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert "deepseek_hierarchical" in done.stdout
        assert json.loads(out.read_text())


def save_stat_dump(path: Path, counts: torch.Tensor) -> None:
    """SGLang's stat dump of (steps, L, E) counts."""
    torch.save({"rank": 0, "logical_count": counts, "average_utilization_rate_over_window": None}, path)


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


def hostile_file(directory: Path) -> tuple[Path, Path]:
    """A dump that creates a second file when its pickle is trusted, and that second file."""
    path, touched = directory / "hostile.pt", directory / "touched"
    path.write_bytes(pickle.dumps({"logical_count": _Touch(touched)}))
    return path, touched
