"""Files that `equipoise plan`, `equipoise convert` and a live server write, through the code SGLang reads them with."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from equipoise.cli.main import main
from equipoise.formats.readers.placements import read_placement
from equipoise.hosts.sglang.http_side import initial_location
from equipoise.load.trace import LoadTrace
from equipoise.manager.commands import ExpertLocationReply
from helpers.sglang_server import PYTHON, ROOT, SHIMS

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(900)]

RANKS, REDUNDANT = 4, 4
READ = """
import json, sys
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.eplb.expert_location import compute_initial_expert_location_metadata
from sglang.srt.runtime_context import publish
from sglang.srt.server_args import ServerArgs

model, ranks, redundant, location = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
arguments = ServerArgs(
    model_path=model, device="cpu", dtype="float32", attention_backend="torch_native", tp_size=ranks, ep_size=ranks,
    ep_num_redundant_experts=redundant, init_expert_location=location,
)
publish(arguments, role="scheduler")
found = compute_initial_expert_location_metadata(ModelConfig.from_server_args(arguments), moe_ep_rank=1)
print(json.dumps({"map": found.physical_to_logical_map.tolist(), "ranks": found.ep_size,
                  "replicas": found.logical_to_all_physical_map_num_valid.tolist()}))
"""


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """Load of the model of the fixture ``qwen``: three layers of 8 experts."""
    rng = np.random.default_rng(0)
    popularity = rng.dirichlet(np.full(8, 0.4), size=3)
    LoadTrace(rng.multinomial(5000, popularity, size=(16, 3))).save(tmp_path / "load.npz")
    return tmp_path / "load.npz"


def read_by_sglang(model: Path, location: str) -> dict[str, list[list[int]]]:
    """What SGLang starts with for ``--init-expert-location``."""
    variables = {**os.environ, "PYTHONPATH": str(SHIMS), "SGLANG_USE_CPU_ENGINE": "1"}
    ran = subprocess.run(
        [PYTHON, "-c", READ, model, str(RANKS), str(REDUNDANT), location],
        capture_output=True, text=True, env=variables, check=False, cwd=ROOT,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(ran.stdout.splitlines()[-1])


def test_a_plan_is_the_placement_that_sglang_starts_with(qwen: Path, recorded: Path, tmp_path: Path) -> None:
    out = tmp_path / "map.json"
    flags = ["--num-ranks", str(RANKS), "--num-redundant-experts", str(REDUNDANT), "--dispatch", "even"]
    assert main(["plan", str(recorded), "-o", str(out), "--format", "sglang", *flags]) == 0
    planned = read_placement(out).physical_to_logical_map
    for location in (str(out), out.read_text()):  # it takes a file, or JSON itself
        found = read_by_sglang(qwen, location)
        assert found["map"] == np.asarray(planned).tolist()
        assert found["replicas"] == [np.bincount(row, minlength=8).tolist() for row in planned]


def test_the_live_placement_is_one_that_sglang_starts_with(qwen: Path, tmp_path: Path) -> None:
    moved = [7, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 0]
    live = ExpertLocationReply(
        num_ranks=RANKS,
        num_nodes=1,
        slots_per_rank=3,
        num_logical_experts=8,
        layer_ids=[1, 2],
        physical_to_logical_map=[moved, moved[::-1]],
        dispatch_weights=[],
    )
    location = tmp_path / "live.json"
    location.write_text(json.dumps(initial_location(live, num_layers=3)))
    trivial = [slot % 8 for slot in range(12)]
    assert read_by_sglang(qwen, str(location))["map"] == [trivial, moved, moved[::-1]]


def test_sglang_plans_from_a_converted_recording(qwen: Path, recorded: Path, tmp_path: Path) -> None:
    out = tmp_path / "load.pt"
    assert main(["convert", str(recorded), str(out)]) == 0
    found = read_by_sglang(qwen, str(out))
    load = LoadTrace.open(recorded).total()
    assert np.shape(found["map"]) == (3, 8 + REDUNDANT)
    for replicas, counts in zip(found["replicas"], load, strict=True):
        assert replicas[int(counts.argmax())] == max(replicas) > 1, "the busiest expert is replicated"
