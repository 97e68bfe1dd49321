"""What dispatch by the batch is compared with: exact optimum, SGLang's LPLB, METRO's greedy, fewest activations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linprog
from scipy.sparse import coo_matrix, csr_matrix
from scipy.sparse.csgraph import maximum_flow

from equipoise.dispatch.tables import DispatchTables
from equipoise.placement.metadata import ExpertLocationMetadata
from neighbours import SGLANG, load_file, stand_in


class Layer:
    """One layer of a placement as lists: which ranks hold each expert."""

    def __init__(self, tables: DispatchTables, layer: int) -> None:
        arrays = tables.layer(layer)
        self.num_ranks = tables.num_ranks
        self.single = arrays.rank_of_single.numpy()
        self.expert = arrays.expert.numpy()
        self.rows, self.columns = np.nonzero(arrays.rank.numpy() >= 0)
        self.rank = arrays.rank.numpy()[self.rows, self.columns]

    def base(self, counts: np.ndarray) -> np.ndarray:
        held = self.single >= 0
        return np.bincount(self.single[held], counts[held], minlength=self.num_ranks)


def exact_largest_load(layer: Layer, counts: np.ndarray) -> float:
    """The least largest rank load that any shares reach, tokens being divisible: a linear program."""
    size, base = len(layer.rows), layer.base(counts)
    if not size:
        return float(base.max())
    by_rank = coo_matrix((np.ones(size), (layer.rank, np.arange(size))), (layer.num_ranks, size + 1)).tolil()
    by_rank[:, -1] = -1
    num_rows = layer.rows.max() + 1
    by_expert = coo_matrix((np.ones(size), (layer.rows, np.arange(size))), (num_rows, size + 1))
    cost = np.zeros(size + 1)
    cost[-1] = 1
    tokens = counts[layer.expert[:num_rows]].astype(float)
    return float(linprog(cost, by_rank.tocsr(), -base, by_expert.tocsr(), tokens, method="highs").fun)


def metro_activated(layer: Layer, counts: np.ndarray) -> int:
    """Most activated experts of a rank after METRO's greedy (arXiv 2512.09277), which knows all tokens.

    Each activated expert in turn goes to the replica whose rank has the fewest activated experts so far.
    """
    active = layer.base((counts > 0).astype(np.int64)).astype(np.int64)
    for row in range(layer.rows.max() + 1 if len(layer.rows) else 0):
        if counts[layer.expert[row]]:
            ranks = layer.rank[layer.rows == row]
            active[ranks[np.argmin(active[ranks])]] += 1
    return int(active.max())


def fewest_activated(layer: Layer, counts: np.ndarray) -> int:
    """The least that any choice of one replica an expert reaches: maximum flows of rising capacity."""
    active = layer.base((counts > 0).astype(np.int64)).astype(np.int64)
    rows = [row for row in range(layer.rows.max() + 1 if len(layer.rows) else 0) if counts[layer.expert[row]]]
    limit = int(active.max())
    source, sink, first_rank = 0, 1 + len(rows) + layer.num_ranks, 1 + len(rows)
    while rows:
        edges = [(source, 1 + i, 1) for i in range(len(rows))]
        edges += [(1 + i, first_rank + int(r), 1) for i, row in enumerate(rows) for r in layer.rank[layer.rows == row]]
        edges += [(first_rank + r, sink, max(limit - int(active[r]), 0)) for r in range(layer.num_ranks)]
        start, end, capacity = (np.array(column) for column in zip(*edges, strict=True))
        graph = csr_matrix((capacity.astype(np.int32), (start, end)), (sink + 1, sink + 1))
        if maximum_flow(graph, source, sink).flow_value == len(rows):
            break
        limit += 1
    return limit


def load_lplb(cache: Path) -> Callable[[ExpertLocationMetadata, int], Callable[[np.ndarray], np.ndarray]]:
    """SGLang's LPLB: its solver's matrices, and the torch form of its interior point that its tests carry.

    Only the inputs of a batch are made here, as its CUDA kernel ``lp_prep`` makes them: counts as parts of their sum,
    the singles' load on the right-hand side, the artificial column. Returns, per layer, a function from counts to rank
    loads; where the interior point does not converge it answers 0.5 everywhere, and replicas then share alike.
    """
    root = SGLANG.fetch(cache)
    stand_in("sglang", "sglang.srt", "sglang.kernels", "sglang.kernels.ops", "sglang.kernels.ops.lplb")
    stand_in("sglang.srt.runtime_context", get_resources=lambda: None)
    stand_in("sglang.kernels.ops.lplb.torch_solver", warmup=lambda *_args, **_kwargs: None)
    solver_class: Any = load_file("sglang.lplb_solver", root / "sglang/srt/eplb/lplb_solver.py").LPLBSolver
    interior_point = load_file("sglang.lplb_reference", root / "sglang/test/kernels/lplb.py").solve_ipm_torch_reference

    def make(metadata: ExpertLocationMetadata, layer: int) -> Callable[[np.ndarray], np.ndarray]:
        topology, p2l = metadata.topology, metadata.physical_to_logical_map[layer]
        solver = solver_class(p2l, metadata.logical_to_physical_map[layer], topology.num_ranks)
        expert = p2l[solver.phy_replicated]
        rank = solver.phy_replicated // topology.slots_per_rank

        def loads(counts: np.ndarray) -> np.ndarray:
            tokens = torch.from_numpy(counts).float()
            parts = tokens / tokens.sum().clamp(min=1)
            base = solver.B1 @ parts[solver.log_single]
            right = torch.cat([parts[solver.log_replicated], -base])
            matrix = torch.cat([solver.A_base, (right - solver.A_base.sum(1))[:, None]], 1)
            x = interior_point(matrix, right, solver.c_vec)[: len(rank)]
            whole = torch.zeros(len(parts)).index_add(0, expert, x)[expert].clamp(min=1e-12)
            share = x / whole * tokens[expert]  # what its dispatch samples from
            return (base * tokens.sum()).index_add(0, rank, share).numpy()

        return loads

    return make
