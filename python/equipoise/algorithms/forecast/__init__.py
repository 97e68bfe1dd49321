"""Forecasts the next window from those that were: scenarios, their weights, the error to expect.

Public modules, which other rooms import::

    outlook.py         Judges placements by the balance they may expect of the next window
    risk.py            How much to trust a forecast: exponents and risk prices that fit its error
    scenarios.py       Scenarios: what the next window may look like, drawn from the windows that were

Private to this room::

    window_weights.py  How much each past window says about the next one
"""
