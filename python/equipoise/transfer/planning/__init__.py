"""transfer/planning

Public modules, which other rooms import::

    plan.py          Plans who sends which expert to whom when a placement changes: pure, the same on every rank and ...
    rank_program.py  What one rank does in a step: whom it sends to, what it receives, and the copies that commit. De...
    types.py         What a transfer plan is: frozen values, with the digest by which ranks compare them and a JSON form

Private to this room::

    cycles.py        Cycles of arrivals, each of which releases the place that the next one needs: see transfer_steps
    places.py        What lies where while a layer is rearranged step by step, and which slots may be written over: s...
    rounds.py        Orders transfers in rounds in which a rank sends to at most one peer and receives from at most one
    sources.py       Who sends which expert to whom, for one step of one layer: integer kernels compiled by numba
    steps.py         Splits a change of placement into steps in which no rank receives more experts than it may stage
"""
