"""One reader a format, a registry that finds it by content. A new format is a file here and a line in registry.py.

Public modules, which other rooms import::

    own.py             The .npz of a server's dump
    own_ranks.py       Equipoise's trace files, those of the ranks of a recording put together
    placements.py      Placements of every kind, and whatever else an engine may start with
    registry.py        Which reader takes a file, and which files are one recording
    tensorrt_llm.py    TensorRT-LLM: statistics of ranks, YAML assignments
    vllm_ascend.py     vLLM-Ascend: expert maps and load views

Private to this room::

    arrays.py          Arrays without a story: counts or token ids
    padding.py         Ids that fill up a row and name no choice of a router
    sglang.py          SGLang stat dumps: a ring put in order
    sglang_records.py  SGLang per_pass and per_token dumps of all ranks
    text_counts.py     CSV, JSON, JSON lines
    tokens.py          Token ids, and shares of subjects
"""
