"""Carries out a transfer plan: pipeline, vote, commit, and the runners that a host drives.

Public modules, which other rooms import::

    profile.py   Tells what one committed batch cost a rank, and what it moved between all of them
    runner.py    Defines how a host drives a transfer, and runs one inline, in the serving thread
    updater.py   Moves expert weights between ranks: stage, verify, vote, commit
    vote.py      Agrees whether what the ranks have staged may be committed
    warm_up.py   Compiles the kernels that carry out a rebalance
    worker.py    Runs transfer plans in a thread of its own, overlapped with the forward passes

Private to this room::

    pipeline.py  Exchanges the rounds of a rank's program with its peers, several of them at a time
    stream.py    Orders staging and commits on a device: the stream of transfers, and its thread's device

**Failure protocol.** Each row is one event; test/transfer/execution/test_failure_protocol.py has a test of that name.
"Voted down" ends in the same :class:`~equipoise.errors.TransferError` on every rank, "in doubt" in ``start_over`` once
no rank is inside a transfer; either way the layer serves from its old weights and maps, and the next plan may succeed.
``BROKEN`` is for good: the last committed placement serves on.

=================  =========  ================================  =========================  ==========================
event              on rank    what it knows                     what it does               who ends it
=================  =========  ================================  =========================  ==========================
plans_differ       any        every rank's digest               moves nothing              PlanMismatchError
message_lost       sender     nothing                           votes YES                  voted down; new bulk groups
                   receiver   nothing came within the timeout   votes TIMED_OUT
message_late       sender     that it was held up               votes what it finds        voted down; new bulk groups
                   receiver   nothing came within the timeout   votes TIMED_OUT
bytes_damaged      receiver   canary or checksum differs        votes NOT_AS_SENT          voted down; groups stay
                   others     nothing                           vote YES
staging_raises     raising    its exception                     votes FAILED               voted down; new bulk groups
                   its peers  a timeout, if messages miss       vote TIMED_OUT
vote_not_cast      silent     that it cast no vote              says IN_DOUBT              start_over: nobody commits;
                   others     that the vote broke off           say IN_DOUBT               all groups new
vote_answer_lost   one        not how the vote ended            says IN_DOUBT              start_over: READY alone
                   others     that all ranks could commit       say READY, do not commit   never commits
thread_ends        one        the exception that ended it       says IN_DOUBT              start_over; a new thread
                   others     that the vote broke off, or not   say IN_DOUBT or READY
thread_hangs       one        no progress for stall_timeout     says BROKEN                BROKEN on all: the thread
                   others     that one is BROKEN                stop                       may still write
no_new_groups      any        that groups cannot be made        raises what was voted      BROKEN on all
commit_raises      one        its exception                     raises it to its host      that rank's end: rank_dies
                   others     nothing                           have committed
rank_dies          others     that a peer hung up or timed out  name it in their error     the host ends
=================  =========  ================================  =========================  ==========================
"""
