"""The command line is an interface: a flag or default that changes must be changed here too, on purpose."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys

import pytest

from equipoise.config import EngineConfig, EplbConfig, HttpConfig
from equipoise.replay.config import ReplayConfig

REQUIRED = "required"

SERVE = {
    "--model-path": REQUIRED,
    "--ep-size": 1,
    "--nnodes": 1,
    "--dtype": "auto",
    "--device": "auto",
    "--max-running-requests": 16,
    "--max-model-len": 1024,
    "--chunked-prefill-size": 2048,
    "--random-seed": 0,
    "--watchdog-timeout": 300.0,
    "--log-level": "info",
    "--enable-eplb": False,
    "--eplb-algorithm": "auto",
    "--eplb-rebalance-num-iterations": 1000,
    "--eplb-load-phase": "all",
    "--eplb-transfer-mode": "async",
    "--eplb-rebalance-layers-per-chunk": 1,
    "--eplb-min-rebalancing-utilization-threshold": 1.0,
    "--eplb-max-moves-per-layer": None,
    "--eplb-move-price": 0.12,
    "--eplb-verification": "canary",
    "--eplb-staging-bytes": None,
    "--eplb-transfer-timeout": 60.0,
    "--eplb-transport": "auto",
    "--eplb-transfer-duty": 1.0,
    "--eplb-profile": False,
    "--ep-num-redundant-experts": 0,
    "--ep-dispatch-algorithm": "dynamic",
    "--ep-dispatch-scope": "rank",
    "--ep-dispatch-active-expert-cost": 0.0,
    "--ep-dispatch-cross-node-cost": 0.0,
    "--init-expert-location": "trivial",
    "--expert-distribution-recorder-mode": "stat",
    "--expert-distribution-recorder-buffer-size": 1000,
    "--expert-distribution-stream-buffer-size": 64,
    "--expert-distribution-stream-buffer-tokens": 16384,
    "--expert-distribution-stream-max-bytes": 2 << 30,
    "--host": "127.0.0.1",
    "--port": 30000,
    "--api-key": None,
    "--admin-api-key": None,
    "--served-model-name": None,
    "--dump-dir": ".",
    "--max-queued-requests": 1024,
    "--request-timeout": None,
    "--health-timeout": 20.0,
    "--drain-timeout": 3.0,
}

EXPLAIN_TRANSFER = {"--num-ranks", "--num-nodes", "--max-staged-experts", "--layer"}

REPLAY = {
    "--num-ranks": 8,
    "--num-nodes": 1,
    "--num-redundant-experts": 0,
    "--num-groups": None,
    "--window": 8,
    "--history": None,
    "--rebalance-every": 1,
    "--max-moves-per-layer": None,
    "--move-price": 0.12,
    "--expert-bytes": None,
    "--tokens-per-step": 128,
}
READING = {"--tokens-per-step", "--num-logical-experts", "--read-as"}
CLUSTER = {
    "--gpu", "--num-nodes", "--num-ranks", "--model", "--hidden-size", "--intermediate-size", "--bytes-per-weight",
    "--memory-bandwidth", "--flops", "--network-bandwidth", "--efficiency", "--balanced-share", "--num-groups",
}  # fmt: skip
OUTPUTS = {"--jobs", "--resume", "--html", "--png", "--json"}
REPLAY_ONLY_ON_THE_COMMAND_LINE = {"--algorithm", "--json"}


def flags_of(*groups: type) -> dict[str, object]:
    return {
        "--" + field.name.replace("_", "-"): REQUIRED if field.default is dataclasses.MISSING else field.default
        for group in groups
        for field in dataclasses.fields(group)
    }


def flags_in_help(command: str) -> set[str]:
    environment = {**os.environ, "COLUMNS": "120", "NO_COLOR": "1"}
    text = subprocess.run(
        [sys.executable, "-m", "equipoise", command, "--help"], capture_output=True, text=True, env=environment
    ).stdout
    return set(re.findall(r"^│ (?:-\w [A-Z]+, |-h, )?(--[a-z-]+)", text, re.MULTILINE)) - {"--help"}


def test_options_are_frozen() -> None:
    assert flags_of(EngineConfig, EplbConfig, HttpConfig) == SERVE
    assert flags_of(ReplayConfig) == REPLAY


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("serve", set(SERVE)),
        ("replay", set(REPLAY) | REPLAY_ONLY_ON_THE_COMMAND_LINE),
        ("explain-transfer", EXPLAIN_TRANSFER),
        ("inspect", READING),
        ("convert", READING),
        ("merge", READING | {"--out"}),
        ("thin", READING | {"--sum", "--first", "--last"}),
        ("plan", READING | CLUSTER | {"--out", "--format", "--num-redundant-experts", "--algorithm", "--dispatch"}),
        ("advise", READING | CLUSTER | OUTPUTS | {"--max-redundant-experts", "--engine"}),
        (
            "compare",
            READING
            | CLUSTER
            | OUTPUTS
            | {
                "--algorithm",
                "--num-redundant-experts",
                "--interval",
                "--dispatch",
                "--dispatch-scope",
                "--planning-delay",
                "--layers-per-chunk",
            },
        ),
        ("warm-up", set()),
    ],
)
def test_help_lists_every_flag_and_no_other(command: str, flags: set[str]) -> None:
    assert flags_in_help(command) == flags
