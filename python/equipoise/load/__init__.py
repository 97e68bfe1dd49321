"""What was routed: counted, kept in windows, dumped or streamed; read from any file, cut, put together, described.

Public modules, which other rooms import::

    export.py              Writes a LoadTrace in the formats that others read, by the suffix of the file
    merge.py               Traces put together, thinned, and cut
    operator_recording.py  OperatorRecording: what an operator records, in memory for a dump or streamed to files
    recorder.py            ExpertDistributionRecorder: tokens per slot, layer and step, counted on the device
    recording.py           StepRecording: counts step by step between start and stop, and the file they are dumped to
    statistics.py          What a trace says at a glance: skew, hottest experts, idle layers, drift, phases
    step_fold.py           StepFold: what the end of a step does with its counts
    stream_report.py       What became of the steps of a streamed recording
    synthetic.py           Synthetic load with known skew, drift, shifts, alternation and bursts, from a seed
    trace.py               LoadTrace: recorded load, whatever recorded it
    window_ring.py         WindowRing: the last steps' load as a few windows, in memory that does not grow with steps
    windows.py             Recorded steps cut into load windows

Private to this room::

    step_stream.py         What of each step is streamed: tokens of each expert, or experts of each token
    step_writer.py         Hands the steps of a recording to a sink in a thread, and says which it could not take
    stream_file.py         Where a streamed recording is written: a folder, in it a trace file of each rank
"""
