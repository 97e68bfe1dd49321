"""Versions of SGLang that the plugin runs in."""

from __future__ import annotations

import logging

log = logging.getLogger("equipoise.hosts.sglang")

SUPPORTED = "0.5.23"
TOLERATED = ("0.5.21", "0.5.22")
"""Same signatures at every target as :data:`SUPPORTED`, compared by reading; the tests run on that one alone."""


def version_complaint(version: str) -> str | None:
    """Why this version of SGLang is refused; None if it is supported, with a warning if it is merely tolerated."""
    if version == SUPPORTED:
        return None
    if version in TOLERATED:
        log.warning(
            "SGLang %s is not what Equipoise is tested with (%s); its hook points are the same", version, SUPPORTED
        )
        return None
    return (
        f"Equipoise supports SGLang {SUPPORTED} ({' and '.join(TOLERATED)} with a warning), found {version}: "
        f"install sglang=={SUPPORTED}, or set EQUIPOISE_SGLANG=off to run SGLang's own balancer"
    )
