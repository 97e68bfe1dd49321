"""The embedded engine: any Hugging Face MoE model over ``--ep-size`` worker processes.

::

    launcher (HTTP)          Engine ─ pipe ─┐
    supervisor process       forks the ranks, watches them, ends them all when one or the launcher dies
      rank 0                 Scheduler, sampler, detokenizer; broadcasts each step's plan
      rank 1 .. G-1          wait for the plan, then step with rank 0

Attention runs replicated on every rank; at each MoE layer the tokens are split over the ranks, travel to the slots
their experts live in, and back.
"""

from equipoise.engine.engine import Engine
from equipoise.engine.messages import EngineDeadError
from equipoise.engine.requests import GenerateRequest, SamplingParams, TokenEvent

__all__ = ["Engine", "EngineDeadError", "GenerateRequest", "SamplingParams", "TokenEvent"]
