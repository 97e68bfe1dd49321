"""dispatch: from the logical experts that a router chose to the slots that compute them

Public modules, which other rooms import::

    dispatcher.py     ExpertDispatcher: slots for a batch, statically, in turns, or solved on the batch itself
    policy.py         DispatchPolicy: what decides among replicas, as data; the integers that kernels read of it
    replicas.py       The nearest replica, and turns by planned weight, in torch
    score.py          Scores a placement under the dispatch it will have

Private::

    choice.py         Choice: one way to choose replicas, on one kind of device; Batch, what it chooses for; HostCounts
    turns.py          `static` and `dynamic`: what they look up, and on a CPU what the dispatcher calls
    turns_numba.py    Their loops on a CPU
    turns_gpu.py      The same on a GPU: launches the kernel over buffers of fixed address
    turns_kernel.py   Triton kernel: choose, and count what was chosen
    scopes.py         Gathers the counts of a scope's ranks where a rank sees its own tokens alone
    cost.py           The cost of an activated expert in tokens, from the speed of a device
    tables.py         DispatchTables: what `batch` looks up, in buffers that keep their address
    batch_cpu.py      `batch` on a CPU: what the dispatcher calls
    batch_gpu.py      `batch` on a GPU: launches the kernels over buffers of fixed address
    warm_up.py        Compiles the kernels for a CPU ahead
"""
