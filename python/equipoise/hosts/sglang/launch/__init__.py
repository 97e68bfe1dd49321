"""What can be said of a launch of SGLang before it happens: its flags, the plugin's settings, what they run into. Pure.

Public modules, which other rooms import::

    check.py            Finds what cannot work in a launch, or not as meant
    doctor.py           `equipoise doctor sglang`: what a launch would run into, without SGLang
    findings.py         What a launch is checked with, and what such a check finds
    flags.py            The flags of a launch that matter to balancing
    placement_check.py  Checks that look at files: the model's experts, a given placement
    settings.py         The plugin's level, and the options that SGLang has no flag for
    versions.py         Versions of SGLang that the plugin runs in
"""
