"""Connects ranks: one protocol for bulk and control traffic, and its implementations.

Public modules, which other rooms import::

    communicator.py  Implements a communicator over ``torch.distributed`` process groups, and gives the protocol on
    groups.py        Makes process groups for transfers
    pinned_host.py   Carries bulk tensors of a device through pinned host memory, over a communicator of the CPU
    posted_sum.py    Sums over all ranks between two polls of a host, overlapped with its forward pass

Private to this room::

    in_memory.py     Connects ranks that are threads of one process
    protocol.py      Defines how ranks talk
    small_sums.py    Sums a few bytes over all ranks, over gloo but not by its ring
"""
