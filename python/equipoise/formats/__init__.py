"""Files: containers told apart by content, our own formats, and what every reader returns. Readers are in readers/.

Public modules, which other rooms import::

    archive.py          Zip archives of arrays from strangers: nothing is unpacked before its size is known
    atomic_file.py      A file is written whole or not at all
    container.py        What kind of file a path is: opened once, nothing executed
    expert_location.py  What an engine can start with, and our own file of a placement
    numbers.py          Numbers checked for shape, size, sign and overflow
    raw_trace.py        What every reader of recorded load returns
    trace_file.py       Equipoise's trace format: what a file says of itself, its records
    trace_reader.py     Reads Equipoise's trace format, memory-mapped
    trace_writer.py     Writes Equipoise's trace format, step by step

Private to this room::

    text.py             JSON, one JSON value a line, YAML or CSV, told apart by content
"""
