"""The embedded engine: any Hugging Face MoE model over ``--ep-size`` worker processes.

Arrows carry the names of the messages (messages.py, step_channel.py)::

                 Submit Abort Control Ping Stop           StepInput (broadcast, once per step)
    launcher  ------------------------------>  rank 0  ------------------------------>  ranks 1 .. G-1
    Engine    <------------------------------  Frontend: Scheduler, Sampler,              StepChannel.receive
      |  ^         Ready Tokens Reply Pong          IncrementalDetokenizer, StepLog                  |
      |  |                                       |                                              |
      |  | Started Died Ended                    | a failure, or None at a clean end            |
      |  |                                       v                                              v
      |  +------------------------------------ supervisor <-------------------------------------+
      +--------------------------------------> forks the ranks; ends them all when one has failed, or the launcher
                   ServeConfig                 is gone; a lifeline pipe ends the ranks when the supervisor is gone

One step, on every rank alike: submit the commands, forward, ``EplbManager.tick``, sample (rank 0). Attention runs
replicated on every rank; at each MoE layer the tokens are split over the ranks, travel to the slots their experts live
in, and back. Whatever is collective must be called in the same order by all ranks: only rank 0 decides, and what it
decides reaches the others in a StepInput.

Public modules, which other rooms import::

    engine.py        Launches the engine and gives asyncio programs access to it
    logs.py          Log records of the serving processes: one handler, the rank in every record
    requests.py      Requests to the engine and events from it: frozen values that cross processes
    step_log.py      Log of forward passes on rank 0, and the commands that ask for it

Private to this room::

    detokenizer.py   Decodes tokens to text as they come
    frontend.py      Rank 0's side: takes requests and commands, makes the step inputs, samples, streams tokens
    groups.py        Makes process groups, and communicators over them by the transport that was chosen
    messages.py      Messages of the pipes: launcher to rank 0 and back, supervisor to launcher
    pending.py       Calls that wait for the engine: streams of requests and replies to commands
    processes.py     Starts, watches, talks to and ends the processes, on the launcher's side
    sampler.py       Samples the next token of a request from its logits
    scheduler.py     Chooses the tokens of the next step: continuous batching with chunked prefill
    step_channel.py  Broadcasts the input of each step from rank 0 to the other ranks
    supervisor.py    The process between launcher and ranks: imports torch once, forks the ranks, ends all when one dies
    worker.py        One rank: sets itself up, then steps in lockstep with the others
"""
