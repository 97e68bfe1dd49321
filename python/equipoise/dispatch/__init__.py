"""dispatch: from the logical experts that a router chose to the slots that compute them

Public modules, which other rooms import::

    dispatcher.py     ExpertDispatcher: slots for a batch, statically, in turns, or solved on the batch itself
    policy.py         DispatchPolicy: what decides among replicas, as data; the integers that kernels read of it
    replicas.py       `static` and `dynamic`: the nearest replica, or turns by planned weight
    score.py          Scores a placement under the dispatch it will have

Private::

    scopes.py         Gathers the counts of a scope's ranks where a rank sees its own tokens alone
    tables.py         DispatchTables: what `batch` looks up, in buffers that keep their address
    table_builder.py  Builds a layer's tables from its placement (numba)
    quotas.py         Solves the quotas of replicas from counts: the method, and its reference in torch
    assign.py         Assigns tokens to replicas by their quotas: the reference in torch
    solve_numba.py    The same quotas on a CPU
    level_numba.py    The water-fill of one expert's tokens over its replicas
    open_numba.py     Which replicas open where an activated expert has a cost
    assign_numba.py   Counts, solves and assigns a batch on a CPU
    batch_cpu.py      `batch` on a CPU: what the dispatcher calls
    batch_gpu.py      `batch` on a GPU: launches the kernels over buffers of fixed address
    kernels.py        Triton kernels: count and solve, assign
    kernel_solve.py   The solve inside a kernel
    kernel_parts.py   Its parts: water-fill, loads of ranks, choices in rotated order
"""
