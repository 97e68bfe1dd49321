"""manager

Public modules, which other rooms import::

    commands.py            What an operator can ask of a running engine, and what comes back: plain frozen values tha...
    log_line.py            A rebalance in words for a log: one line, and with --profile where its time went
    manager.py             EplbManager: the loop of balancing, driven once per forward pass by its host

Private to this room::

    background_planner.py  Planning beside the forward passes: rank 0 computes in a thread, all ranks learn the resul...
    command_handler.py     Carries out what an operator asks of one rank
    decision.py            Whether a rebalance pays: pure decisions, each with a reason that a person can read in a log
    migration.py           A placement on its way: commits what the transfer brings, layer by layer, and lets the map...
    phases.py              The phase machine: when a rebalance begins, what each tick does for it, and how it ends
    planning.py            One rebalance, planned: load windows and the present placement in, a decision and a new pl...
    recording.py           What a manager records: a load window that is always open, and what an operator starts, st...
    replies.py             What the manager answers with: replies built from its state, and the dump file
    timing.py              Where the time of the rebalance under way goes, as one rank sees it
    warm_up.py             Compiles every kernel that a rebalance needs, before anybody waits for one
"""
