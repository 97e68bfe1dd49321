"""What was routed: counted, kept in windows, dumped and read back.

Public modules, which other rooms import::

    recorder.py     ExpertDistributionRecorder: tokens per physical expert, per layer and step, counted on the device
    recording.py    StepRecording: counts step by step between start and stop, and the file they are dumped to
    trace.py        LoadTrace: recorded expert load, with a file format of its own that also opens the neighbours' files
    windows.py      Recorded steps cut into load windows

Private to this room::

    synthetic.py    Synthetic load: skewed expert popularity that drifts slowly and shifts suddenly, from a seed
    window_ring.py  WindowRing: the last steps' load as a few windows, in memory that does not grow with steps
"""
