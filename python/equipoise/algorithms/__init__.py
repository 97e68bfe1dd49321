"""Placement algorithms: one solver per file, one registry, one conformance suite that all of them pass.

A new algorithm is a file and a line in ``registry.py``: a function from
:class:`~equipoise.algorithms.problem.PlacementProblem` to :class:`~equipoise.algorithms.problem.Solution`. One of
another package is registered by decorator or entry point.

Public modules, which other rooms import::

    rebalance.py      Computes a placement for the load to come: the one function that callers use
    problem.py        PlacementProblem and Solution: what a placement algorithm is asked and answers
    registry.py       Registers placement algorithms, own and others: one frozen record each
    warm_up.py        Compiles the solvers' kernels: in parts, as a program of its own, or all in this process

Private to this room::

    batch_plan.py     Plans for dispatch that solves its shares on each batch
    deepseek.py       `deepseek` and `deepseek_hierarchical`: DeepSeek's published planner
    guard.py          Keeps the placement in force where a plan cannot be expected to do better on what comes
    improve.py        Improves placements layer by layer: repairs them, then searches for moves and shares that pay
    packing.py        Packs all layers from scratch, for the priced search to start from
    priced_search.py  `equipoise`, the default: placement and dispatch weights by a local search with priced moves
    reweight.py       `reweight`: dispatch weights for the placement in force; no slot changes
    task.py           Task: a problem as the kernels take it, and what turns their answer into a placement
    twins.py          Splits replicas of one expert that share a rank, with no change to any rank's load
"""
