"""A rebalance in words for a log: one line, and with --profile where its time went."""

from __future__ import annotations

from equipoise.manager.commands import RebalanceReport


def describe(report: RebalanceReport, *, profile: bool) -> str:
    """One line; with ``profile`` a table under it."""
    line = f"rebalance after step {report.forward_pass_id}: {report.outcome}: {report.error or report.reason}"
    if report.outcome == "committed":
        line += (
            f"; {sum(report.moves)} experts moved, {report.bytes_moved / 1e6:.2f} MB over a wire, "
            f"steps waited {1e3 * report.stall_seconds:.1f} ms"
        )
    return "\n".join([line, *_profile_lines(report)]) if profile else line


def _profile_lines(report: RebalanceReport) -> list[str]:
    times = report.profile
    planning = times.plan_seconds + times.plan_transfer_seconds
    rows = [
        ("load gathered from all ranks", times.gather_seconds),
        ("placement planned", times.plan_seconds),
        ("transfer planned", times.plan_transfer_seconds),
        ("plan broadcast, and waited for a step", max(0.0, times.wait_seconds - times.gather_seconds - planning)),
        ("migrated, first start to last commit", times.migrate_seconds),
        ("  transfers", sum(layer.transfer_seconds for layer in times.layers)),
        ("  checks and votes", sum(layer.verify_seconds for layer in times.layers)),
        ("  commits", sum(layer.commit_seconds for layer in times.layers)),
        ("steps waited, in all", times.stall_seconds),
    ]
    lines = [f"  {name:<40s}{1e3 * seconds:10.2f} ms" for name, seconds in rows]
    lines.append(f"  {'staging, at most':<40s}{times.peak_staging_bytes:10,d} bytes a rank")
    if times.layers:
        lines.append("  layer  rounds      bytes in  transfer ms  verify ms  commit ms")
    for layer in times.layers:
        counts = f"  {layer.layer_id:5d}  {layer.num_rounds:6d}  {layer.bytes_received:12,d}"
        seconds = (layer.transfer_seconds, layer.verify_seconds, layer.commit_seconds)
        lines.append(counts + "  {:11.2f}  {:9.2f}  {:9.2f}".format(*(1e3 * s for s in seconds)))
    return lines
