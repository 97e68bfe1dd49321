"""Decoding: activated experts of the busiest rank, and the seconds of the cost model, by tokens a rank.

Reading weights is what a small batch waits for, so an activated expert costs as much as many tokens. Compared are
dispatch by the batch in its scopes, `dynamic` on the same tokens, METRO's greedy (arXiv 2512.09277), which
gathers all ranks' choices, and the fewest that any choice of one replica an expert activates.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from dispatch_rivals import Layer, fewest_activated, metro_activated
from equipoise.dispatch.dispatcher import ExpertDispatcher
from equipoise.dispatch.policy import DispatchPolicy
from equipoise.dispatch.score import DispatchScorer, StepLoad, counts_by_source
from equipoise.dispatch.tables import DispatchTables
from equipoise.placement.metadata import ExpertLocationMetadata

TOKENS = (1, 2, 4, 8, 16, 32, 64)
COSTS = (4.0, 16.0, 64.0, 295.0, 1000.0)  # tokens that an activated expert costs; 295: an H100 in bfloat16
MEMORY_BOUND = COSTS[-1]
SCOPES = ("rank", "node", "all")
SHOWN = ("rank", "all")  # in the table

Cell = dict[str, list[float]]


class Dynamic:
    """`dynamic` as every rank runs it."""

    def __init__(self, metadata: ExpertLocationMetadata) -> None:
        ranks = range(metadata.topology.num_ranks)
        self._metadata = metadata
        self._of_rank = [ExpertDispatcher(metadata, rank=r, policy=DispatchPolicy("dynamic")) for r in ranks]

    def step(self, topk: np.ndarray) -> StepLoad:
        """The load of (T, L, K) tokens, dealt to the ranks in turns."""
        layers, slots = self._metadata.num_layers, self._metadata.num_physical_experts
        counts = torch.zeros(layers, slots + 1, dtype=torch.int32)
        for rank, dispatcher in enumerate(self._of_rank):
            ids = torch.from_numpy(np.ascontiguousarray(topk[rank :: len(self._of_rank)].swapaxes(0, 1)))
            for layer in range(layers):
                dispatcher.dispatch(layer, ids[layer], counts=counts)
            dispatcher.advance(ids.shape[1])
        by_rank = counts[:, :-1].numpy().reshape(layers, len(self._of_rank), -1)
        return StepLoad(by_rank.sum(-1).astype(np.float64), (by_rank > 0).sum(-1))


def measure_decode(
    metadata: ExpertLocationMetadata, tokens: np.ndarray, per_rank: int, num_experts: int, steps: int, stride: int
) -> Cell:
    """One number a layer and step; counts of the exact minimum and of METRO on one layer in ``stride``."""
    ranks = metadata.topology.num_ranks
    tables, dynamic = DispatchTables(metadata), Dynamic(metadata)
    scorers = {
        (scope, cost): DispatchScorer(metadata, "batch", DispatchPolicy("batch", scope, active_expert_cost=cost))
        for scope in SCOPES
        for cost in COSTS
    }
    cell: Cell = defaultdict(list)
    rng = np.random.default_rng(per_rank)
    for step in range(steps):
        size = per_rank * ranks
        first = int(rng.integers(0, max(len(tokens) - size, 1)))
        topk = np.resize(tokens[first : first + size], (size, *tokens.shape[1:]))
        counts = counts_by_source(topk, ranks, num_experts)
        turns, total = dynamic.step(topk), counts.sum(0)
        for (scope, cost), scorer in scorers.items():
            load = scorer.step(counts, step=step)
            cell[f"seconds {scope} {cost:g}"].extend(load.cost(cost) / turns.cost(cost))
            cell[f"tokens {scope} {cost:g}"].extend(load.balancedness())
            cell[f"activated {scope} {cost:g}"].extend(load.activated.max(-1))
        cell["activated dynamic"].extend(turns.activated.max(-1))
        for layer in range(step % stride, len(total), stride):
            one, place = Layer(tables, layer), step * len(total) + layer
            cell["fewest"].append(fewest_activated(one, total[layer]))
            cell["metro"].append(metro_activated(one, total[layer]))
            for scope in SCOPES:
                cell[f"sampled {scope}"].append(cell[f"activated {scope} {MEMORY_BOUND:g}"][place])
    return cell


def show_decode(cells: dict[str, dict[int, Cell]], console: Console) -> None:
    """Per placement, one row for each number of tokens: means over layers, steps and loads."""
    names = ("fewest", "metro", "sampled all", "sampled rank")
    table = Table(
        "slots/ranks",
        "tokens a rank",
        "fewest",
        "METRO",
        "all",
        "rank",
        "dynamic",
        *(f"{scope}, {cost:g}" for scope in SHOWN for cost in COSTS),
        title=f"decoding: activated experts of the busiest rank ({MEMORY_BOUND:g} tokens each); "
        "the model's seconds over those of dynamic, by scope and tokens an activated expert costs",
    )
    for place, by_tokens in cells.items():
        for tokens, cell in by_tokens.items():
            activated = [f"{np.mean(cell[name]):.2f}" for name in (*names, "activated dynamic")]
            seconds = [f"{np.mean(cell[f'seconds {scope} {cost:g}']):.3f}" for scope in SHOWN for cost in COSTS]
            table.add_row(place, str(tokens), *activated, *seconds)
    console.print(table)


def decode_bars(
    cells: dict[str, dict[int, Cell]], bar: Callable[[str, float, float, bool], None], console: Console
) -> None:
    """Bars by number of tokens, over all placements and loads."""
    for tokens in TOKENS:
        these = [by_tokens[tokens] for by_tokens in cells.values() if tokens in by_tokens]
        if not these:
            continue
        joined = {name: np.concatenate([np.asarray(cell[name], float) for cell in these]) for name in these[0]}
        fewest, metro = joined["fewest"], joined["metro"]
        ours, rank = joined["sampled all"], joined["sampled rank"]
        where = f"decoding, {tokens} tokens"
        bar(
            f"{where}: layers of steps within one of the fewest, scope all",
            float((ours <= fewest + 1).mean()),
            0.99,
            True,
        )
        bar(f"{where}: activated experts, scope all to METRO", float(ours.mean() / metro.mean()), 1.0, False)
        bar(f"{where}: activated experts, scope rank to METRO", float(rank.mean() / metro.mean()), 1.05, False)
        console.print(f"        {where}: activated experts, scope rank to scope all: {rank.mean() / ours.mean():.4f}")
        names = [f"seconds {scope} {cost:g}" for scope in SCOPES for cost in COSTS]
        worst = max(np.mean(cell[name]) for cell in these for name in names)
        bar(
            f"{where}: the model's seconds to those of dynamic, worst placement, cost and scope",
            float(worst),
            1.0,
            False,
        )
        console.print(f"        {where}: the same over all: {np.mean([joined[name].mean() for name in names]):.3f}")
        single = np.concatenate([joined[name] for name in names])
        console.print(f"        {where}: single layers of steps worse than dynamic: {(single > 1 + 1e-9).mean():.4f}")
