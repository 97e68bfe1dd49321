"""Offline replay: recorded load played against a placement algorithm.

Public modules, which other rooms import::

    report.py    A replay's table for people and its JSON for programs
    simulate.py  Plays recorded load against a policy: plans on the past, scores on what follows

Private to this room::

    policy.py    What decides on a new placement during a replay
    result.py    What a replay found: numbers per window and the summaries made from them
"""
