"""The embedded engine: any Hugging Face MoE model over ``--ep-size`` worker processes.

::

    launcher (HTTP)          Engine ─ pipe ─┐
    supervisor process       forks the ranks, watches them, ends them all when one or the launcher dies
      rank 0                 Scheduler, sampler, detokenizer; broadcasts each step's plan
      rank 1 .. G-1          wait for the plan, then step with rank 0

Attention runs replicated on every rank; at each MoE layer the tokens are split over the ranks, travel to the slots
their experts live in, and back.

Public modules, which other rooms import::

    engine.py        Engine: the embedded engine as its clients see it, from an asyncio program
    requests.py      What a client asks of the engine and what it gets back: frozen values that cross processes

Private to this room::

    detokenizer.py   From tokens to text as they come: whole characters only, and nothing that may turn out to be a s...
    frontend.py      Rank 0's side of the engine: takes requests and commands, makes the plans, samples, tells the cl...
    messages.py      What crosses the pipe between the launcher and rank 0, and between the supervisor and the launcher
    processes.py     The engine's processes as the launcher holds them: started, talked to, and ended
    sampler.py       Choosing the next token of a request from its logits
    scheduler.py     Which tokens go into the next step: continuous batching with prompts cut into chunks. Rank 0 onl...
    step_channel.py  What rank 0 tells the other ranks before every step
    step_log.py      What rank 0 remembers of the forward passes: the last ones one by one, all of them in sums
    supervisor.py    The process between the launcher and the ranks: imports torch once, forks the ranks, ends all wh...
    worker.py        One rank: sets itself up, then steps in lockstep with the others until it is told to stop
"""
