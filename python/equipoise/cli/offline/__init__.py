"""The commands that work on recordings, without a GPU.

Public modules, which other rooms import::

    balance_arguments.py    Arguments of plan, compare, advise
    recording_arguments.py  Arguments of inspect, convert, merge, thin, synth
    recordings.py           Recordings named on the command line, opened with a word on what was found

Private to this room::

    advise.py               `equipoise advise`: what to set, why, what it is worth, and the flags
    cluster.py              What would serve the model, from the flags of a command
    compare.py              `equipoise compare`: a recording played with every combination of options
    convert.py              `equipoise convert`, `merge` and `thin`
    inspect.py              `equipoise inspect`: what a file is and what its load looks like
    options.py              Groups of flags that the offline commands share
    plan.py                 `equipoise plan`: a placement for an engine to start with
    synth.py                `equipoise synth`: a trace with a known skew and a known way to change
"""
