"""The command line. A new command: a dataclass in arguments.py or in offline/, a line in main.py, a file.

Public modules, which other rooms import::

    main.py              Entry point: parses, runs, turns what went wrong into one line and an exit code

Private to this room::

    arguments.py         Arguments of serve, replay, explain-transfer, doctor, warm-up
    complaints.py        What a person got wrong, in one line that names the flag as typed
    doctor.py            `equipoise doctor sglang FLAGS`: a table of what a launch would run into
    explain_transfer.py  `equipoise explain-transfer OLD NEW`: what a change of placement moves, for people
    help_text.py         Help texts that reflow to the terminal
    replay.py            `equipoise replay`: recorded load window by window, a table and JSON
    tables.py            Prints tables and paragraphs so that they fit the terminal
"""
