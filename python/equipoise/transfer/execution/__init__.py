"""transfer/execution

Public modules, which other rooms import::

    faults.py    Faults on purpose: fail at (rank, layer, phase), so that tests can prove what the transfer path prom...
    profile.py   What a layer's migration cost one rank, and what it moved between all of them
    runner.py    Runs a transfer plan batch by batch for a host that serves meanwhile
    updater.py   Moves expert weights between ranks: stage, verify, vote, commit
    vote.py      How ranks agree whether what they have staged may be committed: by a vote, which decides the same on...
    warm_up.py   Compiles the kernels that carry out a rebalance: alignment, transfer plan, a rank's program, checksums
    worker.py    Runs transfer plans in a thread of its own, beside the forward passes; see transfer_runner.py for th...

Private to this room::

    pipeline.py  Exchanges the rounds of a rank's program with its peers, several of them at a time
"""
