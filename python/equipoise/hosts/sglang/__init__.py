"""Equipoise inside SGLang, as a plugin of its entry-point group ``sglang.srt.plugins``.

SGLang is imported inside functions alone: all but messages.py can be imported, and most of it tested, without it.

::

    HTTP process        http_side ── command_channel ──┐ SGLang's requests
    each scheduler      scheduler_side ── balancer ── EplbManager
                            hooks          one pass, one turn, one command

Public modules, which other rooms import::

    plugin.py           Entry point: reads the settings, registers the hooks

Private to this room::

    algorithm.py        Level `algorithm`: plans SGLang's own rebalances
    attach.py           Builds our manager from what SGLang's runtime holds
    balancer.py         Our manager in a scheduler, as the hooks call it
    batch_dispatch.py   Dispatch `batch` in place of SGLang's choice of replicas
    command_channel.py  Commands through SGLang's request broadcast, and their replies
    hook_targets.py     The functions of SGLang that are hooked: checked at load, counted
    http_side.py        The operator's routes on SGLang's own server
    launch_guard.py     Stops a launch that cannot work with one line
    live_maps.py        SGLang's own maps, written in place
    messages.py         Our messages on SGLang's control channel
    metrics.py          Our figures in SGLang's /metrics
    scheduler_side.py   The hooks of a scheduler
    share_table.py      Dispatch shares as repeated entries of SGLang's replica table
    stock_mover.py      Level `manager`: SGLang's own mover
"""
