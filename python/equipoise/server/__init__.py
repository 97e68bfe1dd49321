"""HTTP over an engine: inference in SGLang's and OpenAI's request shapes, balancing for the operator, metrics.

The package is imported without torch; only :func:`equipoise.server.launch.serve` loads an engine.

Public modules, which other rooms import::

    launch.py           serve(config): takes the port, loads the model, says when it is ready, leaves nothing behind

Private to this room::

    answering.py        Answers requests whole or as a stream; work ends when the client leaves
    app.py              create_app: routes, keys, error answers and metrics around one engine
    engine_figures.py   The engine's own figures as Prometheus metrics
    engine_protocol.py  What the server asks of an engine; commands that wait for no silent engine
    fields.py           Types of request fields: each refuses with one sentence that says what it must be
    generate.py         POST /generate, in SGLang's shape
    generation.py       Runs prompts on the engine: one stream of events for a whole batch; admission, deadline
    info.py             What is running: health, models, settings, metrics, steps; aborting a request
    middleware.py       A bounded wait for each request, a check of its host, an id that its answer carries back
    openai.py           POST /v1/completions and /v1/chat/completions, in OpenAI's shape
    openai_models.py    Their bodies
    prometheus.py       Metrics of a server, in a registry of its own
    request_models.py   Body of POST /generate
    tokenizing.py       Turns prompts into token ids off the event loop; refuses what cannot fit
"""
