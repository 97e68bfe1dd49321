"""Log records of the serving processes: one handler on the logger ``equipoise``, the rank in every record.

The library itself adds no handler (each room logs through ``logging.getLogger("equipoise.<room>")``); the processes of
``equipoise serve`` are applications and call :func:`configure_logging` once, before they start anything.
"""

from __future__ import annotations

import logging
import sys

_FORMAT = "%(asctime)s %(levelname)s %(process_name)s %(name)s: %(message)s"


class _ProcessName(logging.Filter):
    """Writes ``rank`` (None outside the ranks) and ``process_name`` into each record."""

    def __init__(self, process_name: str, rank: int | None) -> None:
        super().__init__()
        self._process_name, self._rank = process_name, rank

    def filter(self, record: logging.LogRecord) -> bool:
        record.process_name = self._process_name
        if not hasattr(record, "rank"):  # a caller may have named another rank with extra={"rank": ...}
            record.rank = self._rank
        return True


def configure_logging(level: str, process_name: str, rank: int | None = None) -> None:
    """Send records of Equipoise to stderr, in place of any handler that an earlier call has set.

    Args:
        level: lowest level that is shown, as ``--log-level`` takes it.
        process_name: shown in each line: ``server``, ``supervisor`` or ``rank 3``.
        rank: attribute ``rank`` of each record.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(_FORMAT))
    handler.addFilter(_ProcessName(process_name, rank))
    logger = logging.getLogger("equipoise")
    for old in [*logger.handlers]:
        logger.removeHandler(old)
    logger.addHandler(handler)
    logger.setLevel(level.upper())
    logger.propagate = False  # or an application's root handler would show each line twice
