"""Placement algorithms: one solver per file, one registry, one conformance suite that all of them pass.

A new algorithm is a function from :class:`~equipoise.algorithms.problem.PlacementProblem` to
:class:`~equipoise.algorithms.problem.Placement` and a line in ``registry.py``.

Public modules, which other rooms import::

    rebalance.py  The one function that callers use: from load and the placement in force to the placement to come
    registry.py   The registry of placement algorithms: what each is called, and what sets it apart
    warm_up.py    Compiles the solvers' kernels: in shares, as a program of its own, or all in this process

Private to this room::

    deepseek.py   `deepseek` and `deepseek_hierarchical`: DeepSeek's published planner (https://github.com/deepseek-a...
    equipoise.py  `equipoise`, the default: joint placement and dispatch weights, from the placement in force, with p...
    problem.py    PlacementProblem: what a placement algorithm is asked, checked once, so that a solver only solves
    reweight.py   `reweight`: dispatch weights for the placement in force; no slot changes
    task.py       Task: a problem as the kernels take it, and what turns their answer into a placement
"""
