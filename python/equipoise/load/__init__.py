"""What was routed: counted, kept in windows, dumped; read from any file, cut, put together, described.

Public modules, which other rooms import::

    export.py       Writes a LoadTrace in the formats that others read, by the suffix of the file
    merge.py        Traces put together, thinned, and cut
    recorder.py     ExpertDistributionRecorder: tokens per physical expert, per layer and step, counted on the device
    recording.py    StepRecording: counts step by step between start and stop, and the file they are dumped to
    statistics.py   What a trace says at a glance: skew, hottest experts, idle layers, drift, phases
    synthetic.py    Synthetic load with known skew, drift, shifts, alternation and bursts, from a seed
    trace.py        LoadTrace: recorded load, whatever recorded it
    window_ring.py  WindowRing: the last steps' load as a few windows, in memory that does not grow with steps
    windows.py      Recorded steps cut into load windows
"""
