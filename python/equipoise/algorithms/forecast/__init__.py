"""Forecasts the next window from those that were: scenarios, their weights, the error to expect.

Public modules, which other rooms import::

    outlook.py         Judges placements by the balance they may expect of the next window
    risk.py            How much to trust a forecast: exponents and risk prices that fit its error
    scenarios.py       Scenarios: what the next window may look like, drawn from the windows that were
    shrinkage.py       Draws the loads of a single window of counts towards their mean

Private to this room::

    burst.py           Tells load that a few experts got on top of what there was from load of another kind
    window_weights.py  How much each past window says about the next one
"""
