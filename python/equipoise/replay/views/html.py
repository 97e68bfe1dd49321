"""A comparison as one HTML page that needs nothing else: no script, no font, no network."""

from __future__ import annotations

from html import escape
from typing import Any

import equipoise
from equipoise.replay.grid import BASELINES, TIMER
from equipoise.replay.report import human_bytes
from equipoise.replay.views.advice import flag_notes, launch_flags
from equipoise.replay.views.report_data import ReportData
from equipoise.replay.views.svg import curves, heat_map, points
from equipoise.replay.views.table import label_of

MAX_ROWS = 60

_STYLE = """
:root { --ground: #fbfaf7; --ink: #1d2126; --soft: #5c646d; --rule: #d9d6cd; --card: #ffffff; --idle: #d9d6cd;
  --c0: #8a8f96; --c1: #b8571f; --c2: #0b7a5b; --c3: #3b5fb0; --mark: #eaf4ef; }
@media (prefers-color-scheme: dark) { :root { --ground: #15181c; --ink: #e7e9ea; --soft: #9aa3ab; --rule:
  #353b42;
  --card: #1d2126; --idle: #353b42; --c0: #8d949c; --c1: #e08a4d; --c2: #45c79c; --c3: #86a5ee; --mark:
  #1d332b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 28px 20px 48px; max-width: 1120px; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { overflow-wrap: anywhere; font-size: 1.7rem; line-height: 1.2; margin: 0 0 4px; } h2 { font-size: 1.05rem;
  margin: 0 0 8px; }
p { margin: 6px 0; } .soft { color: var(--soft); font-size: .9rem; overflow-wrap: anywhere; }
.answer { background: var(--mark); border-left: 4px solid var(--c2); padding: 14px 18px; margin: 18px 0; }
.answer strong { font-size: 1.5rem; display: block; line-height: 1.25; }
.grid2 { display: grid; gap: 18px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr));
  margin: 18px 0; }
section { background: var(--card); border: 1px solid var(--rule); padding: 14px 16px; min-width: 0; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--soft); font: 13px system-ui,
  sans-serif; }
.grid { stroke: var(--rule); stroke-width: 1; } .line { fill: none; stroke-width: 2; }
.c0 { stroke: var(--c0); } .c1 { stroke: var(--c1); } .c2 { stroke: var(--c2); } .c3 { stroke: var(--c3);
  stroke-dasharray: 5 4; }
.p0 { fill: var(--c1); opacity: .75; } .p1 { fill: var(--c2); opacity: .75; } .chosen { fill: none; stroke:
  var(--c2); stroke-width: 3; }
.key { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 8px 0 0; padding: 0; list-style: none;
  font-size: .85rem; color: var(--soft); }
.key i { display: inline-block; width: 14px; height: 3px; margin-right: 6px; vertical-align: middle;
  background: currentColor; }
.k0 i { color: var(--c0); } .k1 i { color: var(--c1); } .k2 i { color: var(--c2); } .k3 i { color: var(--c3); }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .88rem;
  font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 4px 10px 4px 0; border-bottom: 1px solid var(--rule); white-space:
  nowrap; }
th:first-child, td:first-child { text-align: left; } tr.chosen-row td { background: var(--mark); font-weight:
  600; }
tr.base td { color: var(--soft); } pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 4px 0;
  font-size: .85rem; }
@media (max-width: 600px) { body { padding: 20px 12px 40px; } h1 { font-size: 1.35rem; } section { padding: 12px 10px; }
  svg text { font-size: 17px; } table { font-size: .74rem; } th, td { padding-right: 6px; } }
"""


def render_html(data: ReportData) -> str:
    """The page."""
    title = f"Expert balancing: {data.traces} on {data.cluster}"
    chosen, layers = data.advice.row, data.layer_ids.tolist()
    name, ring = None, ""
    if chosen is not None:
        ring = "; the ring is the recommended one"
        name = (
            f"{label_of(chosen)}, R {chosen['num_redundant_experts']}, every {chosen['interval']}, {chosen['dispatch']}"
        )
    key = "".join(f'<li class="k{index}"><i></i>{escape(label)}</li>' for index, (label, _) in enumerate(data.curves))
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        '<meta name=viewport content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style>",
        f"<h1>{escape(data.traces)}</h1>",
        f"<p class=soft>{escape(data.shape)}, on {escape(data.cluster)}. equipoise {equipoise.__version__}.</p>",
        _answer(data),
        "<div class=grid2>",
        _section("Rank loads, as engines start", heat_map(data.heat_before, layers, "rank loads before"),
                 "Each row a layer, each column a rank, of the last quarter of the trace. Red: above the mean."),
        _section(f"Rank loads, {data.chosen_label}", heat_map(data.heat_after, layers, "rank loads after"),
                 "The same load on the placement that the replay ends with, which was planned before it."),
        _section("Balancedness over the trace", curves(data.curves, "balancedness over steps", "steps of the trace"),
                 "Mean over largest rank load, mean over layers; 1 is even.", f"<ul class=key>{key}</ul>"),
        _section("Balance against bytes", points(data.points, "balancedness against bytes moved", name),
                 f"A point is a combination of options{ring}, orange DeepSeek's algorithm."),
        "</div>",
        _section("Every combination", _table(data.rows, chosen, data.advice.nothing["tokens_per_second"]),
                 "tokens/s against nothing moved, by a roofline model of the expert layers."),
        _notes(data),
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


def _answer(data: ReportData) -> str:
    found = data.advice
    if found.row is None:
        return f"<div class=answer><strong>Leave it as it is.</strong><p>{escape(found.reasons[0])}.</p></div>"
    row = found.row
    ranks = row["topology"]["num_ranks"]
    flags = "".join(
        f"<p class=soft>{escape(engine)}</p><pre>{escape(launch_flags(row, engine))}</pre>"
        + "".join(f"<p class=soft>{escape(note)}</p>" for note in flag_notes(row, engine))
        for engine in ("equipoise", "sglang", "vllm")
    )
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in found.reasons)
    return (
        f"<div class=answer><strong>{found.gain:+.1%} tokens a second, worth {found.gpus:.1f} of {ranks} GPUs</strong>"
        f"<p>with {row['num_redundant_experts']} redundant experts, a rebalance every {row['interval']} steps "
        f"({escape(str(row['algorithm']))}), dispatch by {escape(row['dispatch'])}. Balancedness "
        f"{found.nothing['mean_balancedness']:.3f} to {row['mean_balancedness']:.3f}, "
        f"{human_bytes(row['bytes_moved'])} moved.</p></div>"
        f"<details><summary>Why, and the launch flags</summary><ul>{reasons}</ul>{flags}</details>"
    )


def _section(title: str, body: str, caption: str, more: str = "") -> str:
    return f"<section><h2>{escape(title)}</h2>{body}{more}<p class=soft>{escape(caption)}</p></section>"


def _table(rows: list[dict[str, Any]], chosen: dict[str, Any] | None, base: float) -> str:
    live = [row for row in rows if row["kind"] not in BASELINES][:MAX_ROWS]
    head = ("placement", "dispatch", "redundant", "every", "balancedness", "lost", "stall", "moved", "tokens/s")
    body = []
    for row in [*live, *(row for row in rows if row["kind"] in BASELINES)]:
        mark = ' class="base"' if row["kind"] in (*BASELINES, TIMER) else ""
        mark = ' class="chosen-row"' if row is chosen else mark
        cells = (
            label_of(row), row["dispatch"], row["num_redundant_experts"], row["interval"] or "-",
            f"{row['mean_balancedness']:.3f}", f"{row['lost_to_imbalance_seconds'] / row['seconds']:.1%}",
            f"{row['stall_seconds'] / row['seconds']:.1%}", human_bytes(row["bytes_moved"]),
            f"{row['tokens_per_second'] / base - 1:+.1%}",
        )  # fmt: skip
        body.append(f"<tr{mark}>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in cells) + "</tr>")
    header = "".join(f"<th>{name}</th>" for name in head)
    return f"<div class=wide><table><tr>{header}</tr>{''.join(body)}</table></div>"


def _notes(data: ReportData) -> str:
    left_out = "".join(f"<p class=soft>Left out: {escape(reason)}</p>" for reason in data.left_out)
    return (
        "<p class=soft>Steps are replayed through the decision and the planner that run live; migrations are spread "
        "over steps by the bytes of their transfer plans. The oracle plans from the very steps it is scored on, and "
        f"moves for free.</p>{left_out}"
    )
