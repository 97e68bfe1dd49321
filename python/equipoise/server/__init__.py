"""HTTP over an engine: inference in SGLang's and OpenAI's request shapes, balancing for the operator, metrics.

::

    app.py               create_app(engine, config): routes, errors, keys and metrics put together
    auth.py              which key a route needs
    engine_protocol.py   what the server asks of an engine
    errors.py            exceptions to HTTP answers that name the field
    generation.py        from a request to token events: batches, streams, clients that leave
    request_models.py    request bodies
    inference.py         POST /generate, /v1/completions
    admin.py             POST /eplb/rebalance, GET /eplb/*, the record calls
    info.py              GET /health, /v1/models, /server_info, /metrics
    prometheus.py        what /metrics shows
    engine_figures.py    of that, what the engine says of itself
    launch.py            serve(config): port, model, readiness line, signals

The package is imported without torch; only :func:`equipoise.server.launch.serve` loads an engine.
"""
