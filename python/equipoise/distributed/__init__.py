"""distributed

Public modules, which other rooms import::

    communicator.py  How ranks talk: one protocol, implemented over torch.distributed here and in memory in in_memory...
    posted_sum.py    A sum over all ranks that travels between two polls of a host, beside its forward pass

Private to this room::

    in_memory.py     Ranks as threads of one process: the communicator of tests, and of a host with one process and s...
    pinned_host.py   For GPUs that cannot reach each other: bulk tensors travel through pinned host memory over a CPU...
    small_sums.py    Sums of a few bytes over all ranks, over gloo and around its ring
"""
