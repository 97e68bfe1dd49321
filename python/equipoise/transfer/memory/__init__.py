"""Holds the experts of one rank: live and staged, in tensors of each layer or in a pool, verified.

Public modules, which other rooms import::

    pool.py          Keeps expert weights of all layers of a rank in common rows, of which any may serve any slot
    pooled.py        Holds the experts of one rank in such a pool: commits exchange rows
    store.py         Addresses experts by place: what is sent, what lands, what is checked
    verification.py  Computes canaries and checksums, which prove that a slot received the expert that the plan names

Private to this room::

    host_weights.py  Checks the weights that a host hands in, and views them as rows of bytes
    protocol.py      Defines what holds the experts of one rank and carries out its commits
    stacked.py       Holds them in tensors of each layer: commits copy
    staging.py       Allocates staging slots and send buffers, and lays an expert out in a message

Words, each with one meaning here: a **row** is one slot's part of a tensor, or of the pool; a **layout** says how an
expert's rows lie in a message and in staging.
"""
