"""Plays recorded load against a policy: plans on the past, scores on what follows.

Windows 0, 1, 2, ... follow each other. Before window ``w >= 1`` (every ``rebalance_every`` windows) the policy sees up
to ``history`` windows that end with ``w - 1`` and the placement in force; its plan takes effect at once and is scored
on ``w`` and whatever follows until the next plan. Window 0 is only history. Beside it the same windows are scored on

- **no rebalancing**: the initial placement, kept;
- **the oracle**: for each window and layer the best balancedness that any of the oracle's algorithms reaches with a
  plan made from that very window, with no limit on moves. No plan from the past can count on it, and it is not a
  proven optimum: it is the best these algorithms find with the future in hand.

Scores assume that dispatch splits an expert's tokens exactly by the placement's weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from equipoise.algorithms.rebalance import rebalance_experts
from equipoise.algorithms.registry import HISTORY, available_algorithms, find_algorithm
from equipoise.config import EplbConfig
from equipoise.errors import ConfigError, EquipoiseError, InvalidInputError
from equipoise.load.trace import LoadTrace
from equipoise.load.windows import Windows, cut_windows
from equipoise.placement.balancedness import balancedness
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.replay.policy import AlgorithmPolicy, Policy
from equipoise.replay.result import PlanRecord, ReplayResult
from equipoise.topology import EpTopology


@dataclass(frozen=True, eq=False)
class Baselines:
    """What a policy is held against; rows are the windows from 1 on, NaN where a layer saw no token."""

    no_rebalancing: np.ndarray  # (W - 1, L) float64
    oracle: np.ndarray  # (W - 1, L) float64; all NaN without an oracle
    oracle_algorithms: tuple[str, ...]


def replay(
    trace: np.ndarray | LoadTrace | Sequence[LoadTrace] | Windows,
    topology: EpTopology,
    policy: Policy | str,
    *,
    window: int = 8,
    history: int | None = None,
    rebalance_every: int = 1,
    initial: ExpertLocationMetadata | None = None,
    expert_bytes: int | None = None,
    num_groups: int | None = None,
    max_moves_per_layer: int | None = None,
    move_price: float = EplbConfig.eplb_move_price,
    oracle_algorithms: Sequence[str] | None = None,
    baselines: Baselines | None = None,
    clock: Callable[[], float] = time.perf_counter,
    on_window: Callable[[], None] = lambda: None,
) -> ReplayResult:
    """Plays one or more traces, one after the other, against a policy.

    Args:
        trace: recorded load, (T, L, E) counts, or windows that were cut already (``window`` is not used then).
        topology, policy: slots that hold every expert at least once; an algorithm's name, or an object that plans.
        window: steps in a load window. A trace's last, partial window is left out.
        history: most windows a plan looks back on; what suits the algorithm if None.
        rebalance_every, initial: windows between two plans; the first placement, the trivial one if None.
        expert_bytes: bytes of one expert of one layer, to turn moves into bytes.
        num_groups, max_moves_per_layer, move_price: for a policy given by name, see ``rebalance_experts``.
        oracle_algorithms: what the oracle chooses from; every algorithm that can plan for this topology if None.
        baselines: from an earlier :func:`score_baselines` of the same windows, to spare the work.
        clock, on_window: seconds, to time the planning with; called after each window played.

    Raises:
        TraceError: traces of different models, or too short for two windows.
        ConfigError: an unknown algorithm, a number below 1, slots that cannot hold the experts.
        EquipoiseError: the policy failed, or planned for another model or topology.
    """
    _require_positive(window=window, history=history, rebalance_every=rebalance_every, expert_bytes=expert_bytes)
    history = history or (find_algorithm(policy).history if isinstance(policy, str) else HISTORY)
    windows = trace if isinstance(trace, Windows) else cut_windows(_as_list(trace), window)
    start = _initial_placement(windows, topology) if initial is None else initial
    chosen = AlgorithmPolicy(policy, num_groups, max_moves_per_layer, move_price) if isinstance(policy, str) else policy
    baselines = baselines or score_baselines(
        windows, topology, initial=start, num_groups=num_groups, oracle_algorithms=oracle_algorithms
    )
    scores, plans, current = _play(chosen, windows, start, history, rebalance_every, clock, on_window)
    return ReplayResult(
        policy=chosen.name,
        topology=topology,
        windows=windows,
        history=history,
        rebalance_every=rebalance_every,
        expert_bytes=expert_bytes,
        balancedness=scores,
        no_rebalancing=baselines.no_rebalancing,
        oracle=baselines.oracle,
        oracle_algorithms=baselines.oracle_algorithms,
        plans=plans,
        final_placement=current,
    )


def _play(
    policy: Policy,
    windows: Windows,
    start: ExpertLocationMetadata,
    history: int,
    rebalance_every: int,
    clock: Callable[[], float],
    on_window: Callable[[], None],
) -> tuple[np.ndarray, tuple[PlanRecord, ...], ExpertLocationMetadata]:
    """Balancedness (W - 1, L) of the windows from 1 on, the plans, and the placement at the end."""
    current, scores, plans = start, [], []
    for index in range(1, len(windows)):
        if (index - 1) % rebalance_every == 0:
            began = clock()
            new = _plan(policy, windows.load[max(0, index - history) : index], current, index)
            plans.append(PlanRecord.of_change(index, current, new, clock() - began))
            current = new
        scores.append(balancedness(windows.load[index], current).numpy())
        on_window()
    return np.stack(scores), tuple(plans), current


def score_baselines(
    windows: Windows,
    topology: EpTopology,
    *,
    initial: ExpertLocationMetadata | None = None,
    num_groups: int | None = None,
    oracle_algorithms: Sequence[str] | None = None,
    on_window: Callable[[], None] = lambda: None,
) -> Baselines:
    """Scores every window but the first without rebalancing and with the oracle (see the module).

    An algorithm that cannot plan for this topology (its groups do not fit, say) is left out of the default oracle; one
    that was asked for by name must work.
    """
    start = _initial_placement(windows, topology) if initial is None else initial
    names = tuple(n for n in available_algorithms() if n != "auto") if oracle_algorithms is None else oracle_algorithms
    best = np.full((len(windows) - 1, windows.load.shape[1]), np.nan)
    used = []
    for name in names:
        try:
            _oracle_plan(windows.load[1], topology, name, num_groups)
        except InvalidInputError:
            if oracle_algorithms is not None:
                raise
            continue
        used.append(name)
    for index in range(1, len(windows)):
        for name in used:
            plan = _oracle_plan(windows.load[index], topology, name, num_groups)
            score = balancedness(windows.load[index], plan).numpy()
            best[index - 1] = np.fmax(best[index - 1], score)
        on_window()
    return Baselines(balancedness(windows.load[1:], start).numpy(), best, tuple(used))


def _oracle_plan(
    load: np.ndarray, topology: EpTopology, algorithm: str, num_groups: int | None
) -> ExpertLocationMetadata:
    return rebalance_experts(load[None], topology, algorithm=algorithm, num_groups=num_groups)


def _plan(policy: Policy, history: np.ndarray, current: ExpertLocationMetadata, index: int) -> ExpertLocationMetadata:
    try:
        new = policy.plan(history, current)
    except EquipoiseError:
        raise  # it says itself what is wrong
    except Exception as error:
        reason = " ".join(str(error).split())
        raise EquipoiseError(
            f"algorithm {policy.name!r} failed before window {index}: {type(error).__name__}: {reason}"
        ) from error
    wanted = (current.num_layers, current.num_logical_experts, current.topology)
    got = (new.num_layers, new.num_logical_experts, new.topology)
    if got != wanted:
        raise EquipoiseError(
            f"algorithm {policy.name!r} planned for (layers, experts, topology) = {got} before window {index}, "
            f"asked for {wanted}"
        )
    return new


def _initial_placement(windows: Windows, topology: EpTopology) -> ExpertLocationMetadata:
    _, num_layers, num_experts = windows.load.shape
    if topology.num_slots < num_experts:
        raise ConfigError(
            f"{topology} has {topology.num_slots} slots, fewer than the trace's {num_experts} logical experts",
            field="slots_per_rank",
        )
    return ExpertLocationMetadata.trivial(num_layers, num_experts, topology)


def _require_positive(**numbers: int | None) -> None:
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}", field=name)


def _as_list(trace: np.ndarray | LoadTrace | Sequence[LoadTrace]) -> list[LoadTrace]:
    if isinstance(trace, np.ndarray):
        return [LoadTrace(trace)]
    return [trace] if isinstance(trace, LoadTrace) else list(trace)
