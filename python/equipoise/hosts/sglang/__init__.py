"""Equipoise inside SGLang, as a plugin of its entry-point group ``sglang.srt.plugins``.

SGLang is imported inside functions alone: everything here can be imported, and most of it tested, without it.

Public modules, which other rooms import::

    doctor.py           `equipoise doctor sglang`: what a launch would run into
    plugin.py           Entry point: reads the settings, registers the hooks

Private to this room::

    algorithm.py        Level `algorithm`: plans SGLang's own rebalances
    findings.py         What a launch is checked with, and what such a check finds
    hook_targets.py     The functions of SGLang that are hooked: checked at load, counted
    launch_check.py     Finds what cannot work in a launch, or not as meant; pure
    launch_flags.py     The flags of a launch that matter to balancing
    launch_guard.py     Stops a launch that cannot work with one line
    live_maps.py        SGLang's own maps, written in place
    placement_check.py  Checks of a launch that look at files: model, given placement
    settings.py         Level, and the options that SGLang has no flag for
    share_table.py      Dispatch shares as repeated entries of SGLang's replica table
"""
