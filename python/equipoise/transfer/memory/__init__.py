"""transfer/memory

Public modules, which other rooms import::

    pool.py          Expert weights of all layers of a rank in common rows, of which any may serve any slot
    pooled.py        The experts of a rank in an :class:`~equipoise.transfer.memory.pool.ExpertPool`: commits exchang...
    store.py         The experts of one rank, live and staged, addressed by place: what is sent, what lands, what com...
    verification.py  What proves that a slot received the expert that the plan names

Private to this room::

    stacked.py       Where the experts of one rank lie, live and staged, and what a commit does to them
    staging.py       Where experts land before they are committed, and how an expert's tensors lie in a message
"""
