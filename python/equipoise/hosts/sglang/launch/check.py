"""Finds what cannot work in a launch, and what will not do what its operator expects. Pure: flags in, findings out."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from equipoise.algorithms.registry import available_algorithms
from equipoise.hosts.sglang.launch.findings import Finding, Launch
from equipoise.hosts.sglang.launch.placement_check import check_given_map, check_slots

SGLANGS_ALGORITHMS = frozenset(
    f"{name}{suffix}" for name in ("deepseek", "deepseek_vec", "elasticity_aware") for suffix in ("", "_hierarchical")
)
PLUGIN_NAME = "equipoise"  # of the entry point in pyproject.toml


def check_launch(launch: Launch) -> list[Finding]:
    """Every finding, the refusals first."""
    found = [finding for check in _CHECKS for finding in check(launch)]
    order = ("refused", "trap", "note")
    return sorted(found, key=lambda finding: order.index(finding.severity))


def _needs_eplb(launch: Launch) -> Iterator[Finding]:
    if not launch.flags.enable_eplb:
        yield Finding("note", "--enable-eplb", "not given: nothing is balanced, the plugin does nothing")
    elif launch.flags.ep_size < 2:
        yield Finding("refused", "--ep-size", "EPLB needs experts on more than one rank; give --ep-size N, N > 1")
    elif launch.level == "off":
        yield Finding("note", "EQUIPOISE_SGLANG", "is off: SGLang's own balancer runs")


def _left_out(launch: Launch) -> Iterator[Finding]:
    names = [name.strip() for name in launch.plugins.split(",") if name.strip()]
    if not names or PLUGIN_NAME in names or launch.level == "off":
        return
    own = launch.flags.eplb_algorithm in own_algorithms()
    yield Finding(
        "trap",
        "SGLANG_PLUGINS",
        f"is {launch.plugins!r} and leaves {PLUGIN_NAME} out: "
        + ("the first rebalance ends every scheduler with a KeyError" if own else "SGLang's own balancer runs"),
    )


def _parallelism(launch: Launch) -> Iterator[Finding]:
    flags = launch.flags
    if launch.level not in ("manager", "full"):
        return
    if flags.ep_size != flags.tp_size:
        yield Finding(
            "refused",
            "--ep-size",
            f"is {flags.ep_size}, --tp-size {flags.tp_size}: each expert-parallel group would move on its own; "
            f"give --ep-size {flags.tp_size}",
        )
    for name in ("moe_dp_size", "pp_size", "dp_size"):
        if getattr(flags, name) != 1:
            flag = _flag(name)
            advice = "start one server per replica" if name == "dp_size" else f"give {flag} 1"
            yield Finding("refused", flag, f"is {getattr(flags, name)}, needs 1 at this level; {advice}")


def _control_path(launch: Launch) -> Iterator[Finding]:
    flags = launch.flags
    if launch.level not in ("manager", "full"):
        return
    if flags.enable_dp_attention_local_control_broadcast:
        yield Finding(
            "refused",
            "--enable-dp-attention-local-control-broadcast",
            "hands commands to the ranks in different turns; leave it out",
        )
    if flags.tokenizer_worker_num > 1:
        yield Finding(
            "refused",
            "--tokenizer-worker-num",
            f"is {flags.tokenizer_worker_num}: its workers load no plugins and would have no /eplb routes; give 1",
        )


def _algorithm(launch: Launch) -> Iterator[Finding]:
    flags = launch.flags
    if flags.elastic_ep_backend not in (None, "none") and launch.level != "off":
        yield Finding(
            "refused",
            "--elastic-ep-backend",
            "elastic EP allows SGLang's own algorithm alone; set EQUIPOISE_SGLANG=off",
        )
    known = ("auto", *available_algorithms())
    if launch.level in ("manager", "full") and flags.eplb_algorithm not in known:
        yield Finding("refused", "--eplb-algorithm", f"is {flags.eplb_algorithm!r}, needs one of {', '.join(known)}")
    if launch.level == "algorithm" and flags.enable_eplb and flags.eplb_algorithm not in own_algorithms():
        yield Finding(
            "trap",
            "--eplb-algorithm",
            f"is {flags.eplb_algorithm!r}, SGLang's own; give one of {', '.join(own_algorithms())}",
        )


def _dispatch(launch: Launch) -> Iterator[Finding]:
    flags = launch.flags
    if flags.ep_dispatch_algorithm == "lp" and launch.level in ("manager", "full"):
        yield Finding(
            "refused", "--ep-dispatch-algorithm", "is lp, whose solvers do not follow our placement; give dynamic"
        )
    if flags.ep_dispatch_algorithm in ("static", "lp") and flags.moe_a2a_backend == "none":
        yield Finding(
            "refused",
            "--ep-dispatch-algorithm",
            f"is {flags.ep_dispatch_algorithm}, which needs an a2a backend (SGLang refuses it too); give dynamic",
        )
    implied = flags.ep_dispatch_algorithm is None and flags.enable_eplb and flags.moe_a2a_backend != "none"
    if launch.level != "off" and (flags.ep_dispatch_algorithm == "static" or implied):
        yield Finding(
            "trap" if implied else "note",
            "--ep-dispatch-algorithm",
            ("not given, so static: " if implied else "is static: ")
            + "a rank uses the nearest replica alone, the planned shares are not used; give dynamic",
        )


def _recorder(launch: Launch) -> Iterator[Finding]:
    flags = launch.flags
    mode, size, interval = (
        flags.expert_distribution_recorder_mode,
        flags.expert_distribution_recorder_buffer_size,
        flags.eplb_rebalance_num_iterations,
    )
    if not flags.enable_eplb:
        return
    if mode in ("per_pass", "per_token"):
        yield Finding(
            "refused",
            "--expert-distribution-recorder-mode",
            f"is {mode}, which a rebalance cannot read (SGLang's first one ends the schedulers); give stat",
        )
    if launch.level in ("manager", "full"):
        return
    if size is not None and size > interval:
        yield Finding(
            "refused",
            "--expert-distribution-recorder-buffer-size",
            f"is {size}, above --eplb-rebalance-num-iterations {interval}: SGLang does not start; give at most that",
        )
    if size is not None and 0 <= size < interval:
        yield Finding(
            "note", "--expert-distribution-recorder-buffer-size", f"plans see the last {size} of {interval} passes"
        )


def _threshold(launch: Launch) -> Iterator[Finding]:
    flags = launch.flags
    threshold, flag = flags.eplb_min_rebalancing_utilization_threshold, "--eplb-min-rebalancing-utilization-threshold"
    own = launch.level in ("manager", "full")
    if own and not 0 < threshold <= 1:
        yield Finding("refused", flag, f"is {threshold:g}, must be in (0, 1]")
    if threshold < 1 and flags.expert_balancedness_report_mode == "off" and not own:
        yield Finding(
            "trap", flag, "does nothing without --expert-balancedness-report-mode: SGLang has no figure to compare"
        )


def _quantisation(launch: Launch) -> Iterator[Finding]:
    if launch.level == "full" and launch.flags.quantization in ("mxfp4", "gptq_marlin", "awq_marlin", "moe_wna16"):
        yield Finding(
            "note",
            "--quantization",
            f"is {launch.flags.quantization}: some kernels keep an expert's rows apart in memory; if so the server "
            "starts, says which tensor, and rebalances nothing",
        )


def own_algorithms() -> list[str]:
    """Names that are ours alone; SGLang keeps those that both have."""
    return [name for name in available_algorithms() if name not in SGLANGS_ALGORITHMS]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


_CHECKS: tuple[Callable[[Launch], Iterator[Finding]], ...] = (
    _needs_eplb,
    _left_out,
    _parallelism,
    _control_path,
    _algorithm,
    _dispatch,
    _recorder,
    _threshold,
    check_slots,
    check_given_map,
    _quantisation,
)
