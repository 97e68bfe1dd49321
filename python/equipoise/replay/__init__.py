"""Offline replay: recorded load played through the planner, window by window, or through the live loop, step by step.

Public modules, which other rooms import::

    config.py       Options of `equipoise replay`
    costs.py        What a step costs in seconds: a roofline with presets of GPUs and models
    grid.py         Many ways to balance, and how one of them is played
    live.py         Steps played through the loop that runs live
    pool.py         Rows of a comparison played side by side, and kept
    report.py       A window replay's table and JSON
    simulate.py     Windows played against a policy: plans on the past, scores on what follows

Private to this room::

    baselines.py    An oracle, and a load that is even by decree
    live_result.py  What a replay of steps found
    planner.py      The manager's decision and plan, as a replay uses them
    policy.py       What decides on a new placement during a window replay
    result.py       What a window replay found
    scoring.py      What one step costs the ranks of a placement, by kind of dispatch
    sources.py      The tokens of a step by the rank that routes them
"""
