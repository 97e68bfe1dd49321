"""dispatch

Public modules, which other rooms import::

    dispatcher.py  From logical experts to the slots that serve them: the choice among replicas, for the top-k ids of...
"""
