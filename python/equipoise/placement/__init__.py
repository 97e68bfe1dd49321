"""Where experts are: placements with their inverses, how even they are, alignment of two; knows no load to come.

Public modules, which other rooms import::

    alignment.py     Arranges a new placement so that nothing moves that need not: same balance, fewer bytes
    balancedness.py  How even a load lies on a placement: pure functions
    maps.py          The maps of a placement as arrays: what was handed in is checked, and its inverse and dispatch f...
    metadata.py      ExpertLocationMetadata: which logical expert each slot holds, per layer, with its inverse
    relabel.py       Names for the ranks of a plan from nothing, so that it costs the fewest moves against the placem...

Private to this room::

    packed_rows.py   Copies rows of several tensors at once, from the host to a device without waiting for it
"""
