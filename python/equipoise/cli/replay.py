"""``equipoise replay``: recorded load, one or more algorithms, a table and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from equipoise.algorithms.registry import available_algorithms
from equipoise.cli.offline.recordings import say_what
from equipoise.cli.tables import print_paragraphs, print_table
from equipoise.errors import ConfigError
from equipoise.load.trace import open_traces
from equipoise.load.windows import cut_windows
from equipoise.replay.config import ReplayConfig
from equipoise.replay.report import legend, to_json, to_table, write_json
from equipoise.replay.simulate import replay, score_baselines
from equipoise.topology import EpTopology


def run_replay(
    config: ReplayConfig,
    traces: Sequence[Path],
    algorithms: Sequence[str],
    json_path: Path | None,
    console: Console,
) -> int:
    """Plays the traces, one after the other as a workload shift, and prints how each algorithm did. Returns 0.

    Raises:
        InvalidInputError: a trace that cannot be read, traces of different models, an unknown algorithm, ranks that the
            slots do not fit, a place where the JSON cannot be written. Nothing long runs before these are checked.
        EquipoiseError: an algorithm failed.
    """
    _check_arguments(traces, algorithms, json_path)
    recorded = open_traces(traces, tokens_per_step=config.tokens_per_step)
    for trace in recorded:
        say_what(trace, console)
    topology = EpTopology.for_experts(
        recorded[0].num_logical_experts, config.num_redundant_experts, config.num_ranks, config.num_nodes
    )
    windows = cut_windows(recorded, config.window)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        num_scored = len(windows) - 1
        task = progress.add_task("oracle", total=num_scored * (1 + len(algorithms)))
        baselines = score_baselines(
            windows, topology, num_groups=config.num_groups, on_window=lambda: progress.advance(task)
        )
        results = []
        for algorithm in algorithms:
            progress.update(task, description=algorithm)
            results.append(
                replay(
                    windows,
                    topology,
                    algorithm,
                    history=config.history,
                    rebalance_every=config.rebalance_every,
                    expert_bytes=config.expert_bytes,
                    num_groups=config.num_groups,
                    max_moves_per_layer=config.max_moves_per_layer,
                    move_price=config.move_price,
                    baselines=baselines,
                    on_window=lambda: progress.advance(task),
                )
            )
    names = [path.name for path in traces]
    print_table(to_table(results, f"Replay of {', then '.join(names)}"), console)
    print_paragraphs(legend(results), console)
    if json_path is not None:
        write_json(to_json(results, config, names), json_path)
        console.print(f"written: {json_path}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _check_arguments(traces: Sequence[Path], algorithms: Sequence[str], json_path: Path | None) -> None:
    if not traces:
        raise ConfigError("replay needs at least one trace", field="trace")
    if not algorithms:
        raise ConfigError("replay needs at least one algorithm", field="algorithm")
    known = sorted({*available_algorithms(), "auto"})
    for algorithm in algorithms:
        if algorithm not in known:
            raise ConfigError(f"algorithm must be one of {', '.join(known)}, got {algorithm!r}", field="algorithm")
    if json_path is not None and (json_path.is_dir() or not json_path.parent.is_dir()):
        raise ConfigError(f"json must name a file in an existing directory, got {json_path}", field="json")
