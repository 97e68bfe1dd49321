"""Files of recorded load and of expert placements: our own, and those of the neighbours. See :mod:`.raw_trace`."""
