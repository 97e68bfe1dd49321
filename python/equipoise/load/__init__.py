"""load

Public modules, which other rooms import::

    recorder.py   ExpertDistributionRecorder: tokens per physical expert, per layer and step, in a bounded ring on th...
    trace.py      LoadTrace: recorded expert load, with a file format of its own that also opens the neighbours' files
    windows.py    Recorded steps cut into load windows

Private to this room::

    synthetic.py  Synthetic load: skewed expert popularity that drifts slowly and shifts suddenly, from a seed
"""
