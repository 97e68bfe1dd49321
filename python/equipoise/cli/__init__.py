"""cli

Public modules, which other rooms import::

    main.py              The command line: flags made from the dataclasses in config.py, one class per subcommand

Private to this room::

    doctor.py            `equipoise doctor sglang FLAGS`: a table of what a launch would run into
    explain_transfer.py  `equipoise explain-transfer OLD NEW`: what a change of placement moves, for people
    replay.py            ``equipoise replay``: recorded load, one or more algorithms, a table and JSON
    tables.py            Prints tables and paragraphs so that they fit the terminal
"""
