"""HTTP over an engine: inference in SGLang's and OpenAI's request shapes, balancing for the operator, metrics.

The package is imported without torch; only :func:`equipoise.server.launch.serve` loads an engine.

Public modules, which other rooms import::

    launch.py           serve(config): take the port, load the model, say when it is ready, and leave nothing behind

Private to this room::

    app.py              create_app: routes, keys, error answers and metrics around one engine
    engine_figures.py   The engine's own figures as Prometheus metrics: read when scraped, summed where they come about
    engine_protocol.py  What the server asks of an engine. ``equipoise.engine.engine.Engine`` has it; tests hand in s...
    generation.py       From prompts to token events: one stream for a whole batch, and an engine that stops when the...
    inference.py        POST /generate in SGLang's request shape and POST /v1/completions in OpenAI's; both answer wh...
    info.py             What is running: health for a load balancer, the model's name for a client, settings and metr...
    prometheus.py       What /metrics shows, in a registry of its own: two servers in one process do not meet
    steps.py            GET /eplb/steps: the embedded engine's forward passes, for an operator
    request_models.py   Request bodies. A field that is not listed is refused by name, so that a misspelt option neve...
"""
