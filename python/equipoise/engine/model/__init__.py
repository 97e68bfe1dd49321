"""engine/model

Public modules, which other rooms import::

    blueprint.py          What is known of a model before any weight is read: made once, before the ranks are forked,...
    experts.py            Experts spread over ranks: finding a model's experts, and the module that stands in for the...
    files.py              The directory of a model, and its tokenizer: what the launcher needs without importing the ...
    runner.py             The forward pass of one rank
    step_batch.py         A step as one packed sequence: the new tokens of every request side by side, without padding

Private to this room::

    attention.py          Attention over a packed step, registered with transformers as an attention implementation
    checkpoint.py         A directory of safetensors files, read tensor by tensor and row by row, counting the bytes
    contexts.py           All contexts of a step as models see them: a tensor that is copied out of the cache only if...
    conversion.py         Makes a model's parameters from the tensors of its checkpoint, whole or for some experts only
    initial_placement.py  The placement that an engine starts with
    kv_cache.py           Keys and values of all running requests: one row of entries per request, a transformers ``C...
    row_experts.py        Experts found by row, registered with transformers as an experts implementation
    token_exchange.py     Rows to the ranks that hold their experts, and the results back in the order in which the r...
    weights.py            Loading what one rank needs of a checkpoint into a model built on the meta device
"""
