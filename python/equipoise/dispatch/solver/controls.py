"""The integers that kernels read of a policy: columns of an int32 vector, ``DispatchPolicy.controls``."""

from __future__ import annotations

# Columns of the controls: int32, in a buffer that keeps its address, so that a captured CUDA graph sees changes.
ROTATION = 0  # who rounds in favour of whom: the scope's number and the step's
ITERATIONS = 1
SWEEPS = 2
MIN_SWEEP_TOKENS = 3  # a scope with fewer tokens is not swept
ACTIVE_COST = 4  # tokens that reading an expert's weights costs a rank of this scope, in 16ths
CROSS_COST = 5  # of sending a token to another node, in 65536ths of computing it
HOME_FIRST, HOME_LAST = 6, 7  # first rank of the own node, and one past its last
SEES_ALL = 8  # 1: the scope's tokens are all there are, so which replicas open may follow the batch
NUM_CONTROLS = 9

ROTATION_MASK = 0x7FFF  # times the expert stride below 2**31
