"""Files of recorded load and of expert placements: our own, and those of the neighbours. See :mod:`.raw_trace`.

Public modules, which other rooms import::

    archive.py          Zip archives of arrays (.npz, torch.save) from people we do not know: nothing is unpacked bef...
    atomic_file.py      A file is written whole or not at all
    expert_location.py  Files of expert placements: our own JSON, and what SGLang's ``--init-expert-location`` takes
    raw_trace.py        What every reader of recorded load returns, before LoadTrace checks it
    sglang.py           SGLang's recorder dumps (``torch.save``): stat and per_pass, as of SGLang 0.5.23
    tokens.py           The npz traces of published routing studies: one row per token (``topk``), or one per subject...
"""
