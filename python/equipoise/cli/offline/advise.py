"""``equipoise advise``: what to set, why, what it is worth, and the flags."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from equipoise.cli.offline.cluster import costs_of, num_ranks_of
from equipoise.cli.offline.compare import check_outputs, play_with_progress, title_of, write_outputs
from equipoise.cli.offline.recordings import opened
from equipoise.load.merge import merge_traces
from equipoise.replay.grid import default_intervals, default_redundancies, make_grid, without_slow_rows
from equipoise.replay.live import LiveSettings
from equipoise.replay.report import human_bytes
from equipoise.replay.views.advice import Advice, advise, flag_notes, launch_flags

if TYPE_CHECKING:
    from equipoise.cli.offline.balance_arguments import Advise

_ALGORITHMS = ("equipoise", "reweight")
_ENGINES = ("equipoise", "sglang", "vllm")


def run_advise(arguments: Advise, console: Console) -> int:
    """Plays a grid and says what it shows. Returns 0.

    Raises:
        InvalidInputError: a recording, a flag or an output that cannot be used.
    """
    check_outputs(arguments.json, arguments.html, arguments.png, arguments.resume)
    with opened(arguments.traces, arguments.reading, console) as traces:
        trace = merge_traces(traces)
        costs = costs_of(arguments.cluster, trace.num_logical_experts, console)
        ranks = num_ranks_of(arguments.cluster)
        candidates = make_grid(
            trace.num_logical_experts,
            ranks,
            arguments.cluster.num_nodes,
            algorithms=_ALGORITHMS,
            redundancies=default_redundancies(trace.num_logical_experts, ranks, arguments.max_redundant_experts),
            intervals=default_intervals(trace.num_steps),
            dispatches=("even", "weights", "batch"),
            base=LiveSettings(None, num_groups=arguments.cluster.num_groups),
        )
        candidates = without_slow_rows(candidates, _ALGORITHMS[0])  # batch dispatch is solved step by step
        played = play_with_progress(candidates, trace, costs, arguments.jobs, arguments.resume, console)
        found = advise(played, ranks)
        names = [path.name for path in arguments.traces]
        engines = _ENGINES if arguments.engine is None else (arguments.engine,)
        flags = {} if found.row is None else {engine: launch_flags(found.row, engine) for engine in engines}
        about = {"advice": {"gain": found.gain, "gpus": found.gpus, "row": found.row, "flags": flags}}
        write_outputs(arguments, trace, names, costs, played, console, **about)
        if str(arguments.json) != "-":
            _say(found, flags, title_of(arguments.cluster), ranks, console)
    return 0


def _say(found: Advice, flags: dict[str, str], cluster: str, ranks: int, console: Console) -> None:
    row = found.row
    if row is None:
        console.print(f"\nLeave it as it is: {found.reasons[0]}.", highlight=False)
        return
    console.print(
        f"\n[bold]{found.gain:+.1%} tokens a second on {cluster}, worth {found.gpus:.1f} of {ranks} GPUs[/bold]\n"
        f"with {row['num_redundant_experts']} redundant experts, a rebalance every {row['interval']} steps "
        f"({row['algorithm']}), dispatch by {row['dispatch']}.",
        highlight=False,
    )
    console.print(
        f"Balancedness {found.nothing['mean_balancedness']:.3f} -> {row['mean_balancedness']:.3f}; "
        f"{row['num_migrations']} migrations move {human_bytes(row['bytes_moved'])} and hold up steps for "
        f"{row['stall_seconds'] / row['seconds']:.2%} of the time.",
        highlight=False,
    )
    console.print("\nWhy:", highlight=False)
    for reason in found.reasons:
        console.print(f"- {reason}", highlight=False, markup=False)
    for engine, line in flags.items():
        console.print(f"\n{engine}:", style="bold", highlight=False)
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
        for note in flag_notes(row, engine):
            console.print(f"  note: {note}", highlight=False, markup=False, style="yellow")
    console.print(
        "\nA step is a recorded step; times are of a roofline model (docs/offline.md), only their ratios are of use.",
        style="dim",
        highlight=False,
    )
