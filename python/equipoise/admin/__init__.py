"""HTTP for an operator, over one function ``control(command)``: any server mounts it, ours and an engine's own.

Nothing here knows an engine: hosts hand in how a command reaches their ranks.

Public modules, which other rooms import::

    auth.py         Route classes that ask for a key: a new route on a keyed router cannot forget to
    bodies.py       Request bodies: a field that is not listed is refused by name
    body_limit.py   A request body may not grow without end: nobody's memory is a client's to fill
    codec.py        Commands and replies as JSON, by name and a closed table
    http_errors.py  Exceptions to HTTP answers: {"error": {"message", "type", "field"}} and a status
    routes.py       admin_router: rebalance now, look at the balance, record
"""
