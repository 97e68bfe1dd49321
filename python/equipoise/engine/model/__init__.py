"""The model side of a rank: parameters, attention over a packed step, the cache, experts spread over ranks.

Public modules, which other rooms import::

    blueprint.py          What is known of a model before any weight is read: made once, before the ranks are forked
    experts.py            Finds a model's experts modules, and spreads them over ranks (EpExperts)
    runner.py             Runs the forward passes of one rank
    self_check.py         Compares a family that was never tested with transformers itself, before it serves
    step_batch.py         A step as one packed sequence: the new tokens of every request, without padding

Private to this room::

    attention.py          Attention over a packed step, registered with transformers
    contexts.py           All contexts of a step as models see them: copied out of the cache only if somebody looks
    families.py           Model families that are tested
    initial_placement.py  The placement that an engine starts with
    kv_cache.py           Keys and values of all running requests, a transformers Cache to the model
    row_experts.py        Experts found by row, registered with transformers
    token_exchange.py     Exchanges routed tokens with the ranks that hold their experts
    visibility.py         Reads from a model's own mask function which tokens a token may attend to
    weights.py            Loads what one rank needs of a checkpoint into a model on the meta device
"""
