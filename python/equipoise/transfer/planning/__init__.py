"""Plans a transfer: pure functions from two placements to what each rank sends, receives and copies.

Public modules, which other rooms import::

    plan.py             Plans who sends which expert to whom when a placement changes
    rank_program.py     Derives what one rank does in a batch: sends, receives, and the copies that commit
    types.py            Defines a transfer plan: frozen values, their digest, a JSON form

Private to this room::

    batches.py          Splits a change of placement into batches in which no rank receives more than it may stage
    cycles.py           Finds cycles of arrivals, each of which frees the slot that the next one needs
    layer_in_motion.py  Tracks what lies where while a layer is rearranged, and which slots are free
    rounds.py           Orders transfers in rounds in which a rank sends to and receives from at most one other
    senders.py          Picks relays and balances senders over all experts of a layer
    sources.py          Assigns sources to the transfers of one batch of one layer

Words, each with one meaning here: a **transfer** is one expert sent from one rank to another; a **round** holds at most
one sent and one received by each rank; a **batch** commits as a whole; a **place** is a slot of a rank, live or staged;
a **slot map** says which expert each slot holds.
"""
