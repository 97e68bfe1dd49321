"""Each trap of a launch is found, by its flag; a sound launch has none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from equipoise.errors import ConfigError
from equipoise.hosts.sglang.launch.check import check_launch
from equipoise.hosts.sglang.launch.findings import Launch
from equipoise.hosts.sglang.launch.flags import LaunchFlags
from equipoise.hosts.sglang.launch.placement_check import count_experts
from equipoise.hosts.sglang.launch.settings import Level

SOUND = LaunchFlags(
    tp_size=4,
    ep_size=4,
    enable_eplb=True,
    ep_num_redundant_experts=4,
    eplb_algorithm="equipoise",
    ep_dispatch_algorithm="dynamic",
)


def found(
    level: Level = "full", *, plugins: str = "", experts: int | None = 8, **flags: object
) -> set[tuple[str, str]]:
    launch = Launch(replace(SOUND, **flags), level, plugins, experts)
    return {(finding.severity, finding.flag) for finding in check_launch(launch)}


@pytest.mark.parametrize("level", ["algorithm", "manager", "full"])
def test_sound_launch_has_nothing_found(level: Level) -> None:
    assert not found(level)


@pytest.mark.parametrize(
    ("flags", "flag"),
    [
        ({"ep_size": 2}, "--ep-size"),
        ({"ep_size": 1}, "--ep-size"),
        ({"moe_dp_size": 2}, "--moe-dp-size"),
        ({"pp_size": 2}, "--pp-size"),
        ({"dp_size": 2}, "--dp-size"),
        ({"ep_dispatch_algorithm": "lp", "moe_a2a_backend": "deepep"}, "--ep-dispatch-algorithm"),
        ({"ep_dispatch_algorithm": "static"}, "--ep-dispatch-algorithm"),
        ({"elastic_ep_backend": "mooncake"}, "--elastic-ep-backend"),
        (
            {"enable_dp_attention_local_control_broadcast": True},
            "--enable-dp-attention-local-control-broadcast",
        ),
        ({"tokenizer_worker_num": 2}, "--tokenizer-worker-num"),
        ({"eplb_algorithm": "deepseek_vec"}, "--eplb-algorithm"),
        ({"expert_distribution_recorder_mode": "per_pass"}, "--expert-distribution-recorder-mode"),
        ({"eplb_min_rebalancing_utilization_threshold": 0.0}, "--eplb-min-rebalancing-utilization-threshold"),
        ({"ep_num_redundant_experts": 3}, "--ep-num-redundant-experts"),
    ],
)
def test_what_cannot_work_is_refused_at_full(flags: dict[str, object], flag: str) -> None:
    assert ("refused", flag) in found("full", **flags)


def test_plugin_left_out_is_a_trap_by_what_would_run_instead() -> None:
    assert ("trap", "SGLANG_PLUGINS") in found("algorithm", plugins="other, another")
    assert not found("algorithm", plugins="other, equipoise")


def test_traps_of_stock_eplb_at_level_algorithm() -> None:
    threshold = "--eplb-min-rebalancing-utilization-threshold"
    assert ("trap", threshold) in found("algorithm", eplb_min_rebalancing_utilization_threshold=0.9)
    assert not found(
        "algorithm", eplb_min_rebalancing_utilization_threshold=0.9, expert_balancedness_report_mode="prometheus"
    )
    buffer = "--expert-distribution-recorder-buffer-size"
    assert ("refused", buffer) in found("algorithm", expert_distribution_recorder_buffer_size=2000)
    assert ("note", buffer) in found("algorithm", expert_distribution_recorder_buffer_size=10)
    assert ("trap", "--eplb-algorithm") in found("algorithm", eplb_algorithm="auto")
    dispatch = ("trap", "--ep-dispatch-algorithm")
    assert dispatch in found("algorithm", ep_dispatch_algorithm=None, moe_a2a_backend="deepep")


@pytest.mark.parametrize(("row", "is_trap"), [([0, 1, 0, 2], False), ([0, 0, 1, 2], True)])
def test_given_map_with_two_replicas_on_a_rank(tmp_path: Path, row: list[int], is_trap: bool) -> None:
    file = tmp_path / "map.json"
    file.write_text(json.dumps({"physical_to_logical_map": [[0, 1, 2, 0], row]}))
    given = {"tp_size": 2, "ep_size": 2, "ep_num_redundant_experts": 1, "init_expert_location": str(file)}
    got = found("full", experts=3, moe_a2a_backend="deepep", **given)
    assert (("trap", "--init-expert-location") in got) == is_trap
    assert not found("full", experts=3, **given)  # without an a2a backend SGLang loads both


def test_message_names_the_count_that_divides() -> None:
    launch = Launch(replace(SOUND, ep_num_redundant_experts=3), "full", num_logical_experts=8)
    assert any("give 4" in finding.message for finding in check_launch(launch))


def test_command_line_as_sglang_reads_it() -> None:
    flags, ignored = LaunchFlags.from_command_line(
        [
            "--model",
            "m",
            "--tp",
            "8",
            "--ep=8",
            "--dp-size",
            "8",
            "--enable-dp-attention",
            "--port",
            "1",
            "--enable-eplb",
        ]
    )
    assert (flags.model_path, flags.tp_size, flags.ep_size, flags.dp_size, flags.attn_dp_size) == ("m", 8, 8, 1, 8)
    assert flags.enable_eplb
    assert ignored == ["--port", "1"]
    with pytest.raises(ConfigError, match="--tp-size"):
        LaunchFlags.from_command_line(["--tp", "many"])


def test_experts_are_counted_from_the_models_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"n_routed_experts": 64, "num_local_experts": 2}))
    assert count_experts(str(tmp_path)) == 64
    assert count_experts("deepseek-ai/DeepSeek-V3") is None
