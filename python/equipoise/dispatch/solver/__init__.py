"""dispatch/solver: from counts to quotas of replicas, and from quotas to slots, on a CPU and on a GPU

Public modules, which other rooms import::

    controls.py         The integers that kernels read of a policy
    table_builder.py    TableArrays, and how a layer's are built from its placement (numba)
    table_addresses.py  Tables and controls as one vector of addresses, for a kernel on a CPU
    count_numba.py      Counts the tokens that a solve is made for, and the slots that were chosen
    solve_numba.py      Solves the quotas of a layer on a CPU
    assign_numba.py     Counts, solves and assigns a batch on a CPU
    kernels.py          Triton kernels: count and solve, assign

Private::

    primaries.py        Chooses the replica of each expert that decoding opens first
    quotas.py           Solves the quotas of replicas from counts: the method, and its reference in torch
    assign.py           Assigns tokens to replicas by their quotas: the reference in torch
    level_numba.py      The water-fill of one expert's tokens over its replicas
    open_numba.py       Which replicas open where an activated expert has a cost
    kernel_solve.py     The solve inside a Triton kernel
    kernel_parts.py     Its parts: water-fill, loads of ranks, choices in rotated order
"""
