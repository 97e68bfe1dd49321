"""algorithms/search

Public modules, which other rooms import::

    connect.py       Exchanges that let the hottest ranks hand load on to ranks that it could not reach
    fresh_plan.py    A plan from nothing: replicas where load and risk are, packed longest-processing-time first
    layer_state.py   LayerState: one layer's placement with the rank loads that it causes, kept up to date change by ...
    local_search.py  Local search from the placement in force: the fewest priced changes that balance the load to come
    move_price.py    What a placement's moves cost, by where each expert was before
    repair.py        Makes a placement valid before it is searched: no expert lost, no rank with two replicas of one ...
    shares.py        Shares: how much of a replicated expert's load each of its replicas best takes, for the cost of ...

Private to this room::

    changes.py       The changes that a local search may make to a placement, what each gains, and making it
    min_max.py       The exact least maximum of rank load that a fixed placement allows, by choice of shares alone
"""
