"""Searches one layer for a placement and shares: numba kernels, from a repaired placement to a balanced one.

Public modules, which other rooms import::

    ejection_chain.py  Swaps slots so that the hottest ranks can hand load on to ranks they could not reach
    even_split.py      Evaluates and applies overwrites where replicas share alike
    layer_state.py     Holds one layer's placement and its rank loads, updated change by change
    local_search.py    Searches from the placement in force for the fewest priced changes that balance the load to come
    lpt_packing.py     Packs replicas from scratch, longest processing time first
    move_price.py      Prices the moves of a placement by where each expert was before
    recourse.py        Places replicas for dispatch that solves shares on each batch
    repair.py          Restores lost experts, splits co-located replicas
    shares.py          Optimises the shares of replicas by coordinate descent

Private to this room::

    batch_state.py     Holds one layer's placement and its best split in each scenario, updated change by change
    best_change.py     Finds the change between two sets of ranks that lowers the cost most per price
    change_bounds.py   Bounds what changes between two ranks can gain, before any is computed
    changes.py         Evaluates and applies the changes that a local search may make
    min_max.py         Minimises the maximum rank load of a fixed placement, by choice of shares alone: a flow
"""
