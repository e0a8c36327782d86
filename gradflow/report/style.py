"""The style sheet and the colours of the HTML report, kept in the page so that it needs no other file."""

from __future__ import annotations

from gradflow.records import IssueSeverity

HEALTHY_COLOUR = "#2f7d5b"

COLOURS = {
    IssueSeverity.CRITICAL: "#b42318",
    IssueSeverity.HIGH: "#c4500b",
    IssueSeverity.MEDIUM: "#a16207",
    IssueSeverity.LOW: "#4c6a92",
    IssueSeverity.INFO: "#64748b",
}

STYLE = """
:root { color-scheme: light; --ink: #1f2937; --soft: #64748b; --line: #e2e8f0; --paper: #ffffff; }
* { box-sizing: border-box; }
body { margin: 0; background: #f4f6f9; color: var(--ink);
  font: 14px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; line-height: 1.25; margin: 4px 0 8px; }
h2 { font-size: 17px; margin: 34px 0 10px; }
h3 { font-size: 15px; margin: 0 0 6px; }
p { margin: 4px 0; }
pre { margin: 0; white-space: pre-wrap; }
code, .mono { font-family: ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; font-size: 0.93em; }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 16px 20px;
  margin: 12px 0; box-shadow: 0 1px 2px rgba(15, 23, 42, 0.05); overflow-x: auto; }
.side { border-left: 5px solid var(--tone, var(--soft)); }
.verdict { display: flex; gap: 32px; align-items: center; flex-wrap: wrap;
  border-top: 6px solid var(--tone); }
.verdict .answer { flex: 1 1 520px; min-width: 0; }
.eyebrow { color: var(--soft); font-size: 12px; letter-spacing: 0.08em; text-transform: uppercase; }
.badge { display: inline-block; padding: 1px 9px; border-radius: 99px; font-size: 11.5px; font-weight: 650;
  letter-spacing: 0.03em; color: #ffffff; background: var(--tone, var(--soft)); white-space: nowrap; }
.badge.hollow { color: var(--tone); background: transparent; border: 1px solid var(--tone); }
.soft { color: var(--soft); }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: 3px 18px; margin: 0; }
.facts dt { color: var(--soft); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
ul { margin: 4px 0 4px 20px; padding: 0; }
.bar { display: inline-block; width: 120px; height: 7px; border-radius: 4px; background: var(--line);
  vertical-align: middle; overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--tone); }
table { border-collapse: collapse; width: 100%; }
th { text-align: left; font-size: 12px; color: var(--soft); font-weight: 600;
  border-bottom: 1px solid var(--line); padding: 4px 10px 6px 0; white-space: nowrap; }
td { padding: 3px 10px 3px 0; border-bottom: 1px solid #f1f5f9; vertical-align: middle; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
details { margin-top: 8px; }
summary { cursor: pointer; color: var(--soft); }
svg.spark { background: #f8fafc; border-radius: 4px; display: block; }
svg.loss { display: block; }
svg.profile { max-width: 100%; height: auto; display: block; }
svg .grid { stroke: #e7ecf2; }
svg .path { stroke: #94a3b8; stroke-width: 1.4; }
svg text { font: 11px ui-monospace, Menlo, "DejaVu Sans Mono", monospace; fill: #64748b; }
svg text.tick, svg text.name { text-anchor: end; }
svg text.none { text-anchor: middle; font-size: 14px; }
.legend { display: flex; flex-wrap: wrap; gap: 6px 18px; margin-top: 6px; font-size: 12px;
  color: var(--soft); }
.legend b { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 5px; }
.scale { background: linear-gradient(90deg, #1d4ed8, #64748b, #c2410c); width: 90px; height: 8px;
  border-radius: 4px; display: inline-block; margin: 0 6px; }
"""
