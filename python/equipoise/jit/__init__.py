"""Compiles and runs numba kernels alike everywhere, on threads, ahead of time; knows no torch.

Public modules, which other rooms import::

    compile.py    How inner loops are compiled: by the same few decorators, so that all round, divide and cache alike
    addresses.py  Arrays that a kernel finds by their address, for kernels called for each layer of each step
    sort.py       A sort whose ties are the same everywhere, and whose kernel compiles in a moment (numba's: seconds)
    threads.py    Runs numba kernels over layers on several threads, with one and the same result; counts processors
    warming.py    Compiles kernels in the background, before anybody waits for a plan
"""
