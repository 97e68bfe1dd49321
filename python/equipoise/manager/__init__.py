"""The loop of balancing: phases, decisions with a reason, commands and replies; what a host drives.

Public modules, which other rooms import::

    command_handler.py     PendingReply and CommandHandler: carries out what an operator asks of one rank
    commands.py            Commands to a running engine and their replies: plain frozen values that cross processes
    host.py                HostTraits: what a host says of itself
    live_placement.py      LivePlacement: the placement in force, on the device and on the CPU, and who follows it
    manager.py             EplbManager: the loop of balancing, driven once per forward pass by its host
    migration.py           Migration takes the live placement to a planned one; HostMigration: by the host's mover
    planning.py            plan_rebalance: load windows and the present placement in; Skip, Reweight or Migrate out
    reports.py             What a rebalance decided, did and cost, and its words for a log

Private to this room::

    background_planner.py  Planning overlapped with the forward passes: rank 0 computes, all ranks get the result
    decision.py            Whether a rebalance pays: pure decisions, each with a reason
    failures.py            FailureWatch: an error of one rank becomes one that all ranks know of
    phases.py              The phase machine: when a rebalance begins, what each tick does for it, and how it ends
    reporting.py           RebalanceTimer and Reporter: where the time goes, what it came to, and who is told
    warm_up.py             Compiles every kernel that a rebalance needs, before anybody waits for one
    weight_migration.py    WeightMigration: moves weights with our updater; the maps follow, layer by layer
"""
