"""The page `docs/verdicts.md`, from the rows of a run of `score.py`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rounds import ROUNDS
from zoo import TYPES

if TYPE_CHECKING:
    from score import Row

_INTRO = """# Verdicts

How often gradflow is right, on the project's own zoo of labelled models: {sick} sick ones, each with its
repair, and {healthy} healthy ones that look suspicious. `benchmarks/verdicts/check_labels.py` checks every
label with plain PyTorch: that the claimed mechanism is there in the sick build and gone in the repaired one,
and that every repaired and healthy model trains. The figures of the zoo are from one run of

```
python benchmarks/verdicts/score.py{options} --write
```

*Found*: every expected type is told, on the expected layer, with severity MEDIUM or above. *Cause named*:
the first cause is of an expected type and on an expected layer. *Spurious*: the verdicts on a sick model
include a type that is neither expected nor allowed for it. *False alarm*: a healthy or repaired model gets
any verdict of MEDIUM or above.

The zoo is no held-out set: its labels were corrected, and the detectors changed, while each could be seen
from the other, so these figures flatter gradflow. Other widths and dtypes, where shown, are the nearest thing
to models it was not made beside.
"""

_FIRST = """
The zoo flatters. These figures do not: each is the first score on a round of cases from public reports, found
and built without knowledge of the detectors or of any other case, their labels checked with plain PyTorch and
committed before gradflow was run on them. They stay as they are; the cases have since joined the zoo, and
what was missed has been mended where its kind was understood.
"""

_LOOKS = """
`benchmarks/verdicts/moments.py` trains {healthy} healthy models of as many kinds to their end and beyond, and
looks at each when it is new, after 5 and 30 percent, at its end, and after as many steps again; with its own
optimizer and without; and {late} that go bad late. Whether each has learned, or is ill, is told by a figure
of its own, taken with plain PyTorch. *Alarm*: any verdict of MEDIUM or above on a healthy one.
"""

_RIVALS = """
Every tool gets the same models, batches, losses and optimizers, and the same {steps} steps of training. The
rule of thumb is a hook on every parameter that calls a gradient norm below 1e-6 vanishing, above 10
exploding, and one that is no number a numerical fault. The verdicts of torchmortem have other names; each
counts for every type that it comes near.
"""


@dataclass(frozen=True)
class Others:
    """What the page tells beside the rows of the zoo.

    Args:
        reasons: why something goes wrong, by the id of the case.
        steps: how many steps of training each tool looked at.
        labelled: rows of a run on other labelled cases.
        looks: rows of a run of `moments.py`.
    """

    reasons: Mapping[str, str]
    steps: int
    labelled: Sequence[Mapping[str, Any]] = ()
    looks: Sequence[Mapping[str, Any]] = ()


def page(rows: Sequence[Row], tools: Sequence[str], missing: Mapping[str, str], others: Others) -> str:
    """Return the page as Markdown."""
    reasons, labelled = others.reasons, others.labelled
    usual = [r for r in rows if r.usual]
    cases = {r.case.id: r.case for r in rows}.values()
    parts = [
        _INTRO.format(
            sick=sum(not c.healthy for c in cases),
            healthy=sum(c.healthy for c in cases),
            options=" --widths" if len(usual) < len(rows) else "",
        )
    ]
    parts += ["## First contact", _FIRST, _rounds()]
    if others.looks:
        parts += ["## Whole trainings", _moments(others.looks)]
    parts += ["## In all", _in_all(usual, tools), _RIVALS.format(steps=others.steps)]
    parts += [f"Not asked: {why}." for why in missing.values()]
    parts += ["## By type", _by_type(usual, tools), "## By family", _by_family(usual)]
    if len(usual) < len(rows):
        parts += ["## At other widths and in other dtypes", _by_width(rows)]
    mine = [r for r in rows if r.tool == "gradflow"]
    missed = [r for r in mine if r.build == "sick" and not (r.found and r.cause)]
    parts += [
        "## What gradflow misses",
        _bad(missed, reasons, "Every sick model is found and its cause named."),
    ]
    alarms = [r for r in mine if r.alarm]
    parts += ["## Where it raises a false alarm", _bad(alarms, reasons, "Nowhere.")]
    if labelled:
        parts += ["## On other labelled cases", _labelled(labelled, reasons)]
    parts += ["## The zoo", _zoo(usual)]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _rounds() -> str:
    """Return the figures of first contact, and what was missed and flagged, with the reasons."""
    head = ["round", "date", "found", "cause named", "false alarms, healthy", "repaired"]
    figures = [
        [f"`{r.name}`", r.date, f"{r.found}/{r.sick}", f"{r.cause}/{r.sick}",
         f"{r.alarms_healthy}/{r.healthy}", f"{r.alarms_repaired}/{r.sick}"]
        for r in ROUNDS
    ]  # fmt: skip
    bad = [
        [f"`{id}`", what, why]
        for r in ROUNDS
        for what, some in (("missed", r.missed), ("flagged", r.alarmed))
        for id, why in some.items()
    ]
    return _table(head, figures) + "\n\n" + _table(["case", "", "reason, then"], bad)


def _moments(looks: Sequence[Mapping[str, Any]]) -> str:
    """Return the alarms of healthy trainings by moment, and what is found of those that go bad."""
    valid = [look for look in looks if look["valid"]]
    well, ill = ([look for look in valid if look["healthy"] is state] for state in (True, False))
    late = [look for look in ill if look["moment"] == "late"]
    intro = _LOOKS.format(healthy=len({look["id"] for look in well}), late=len({k["id"] for k in ill}))

    def part(some: Sequence[Mapping[str, Any]], what: str) -> str:
        number = sum(bool(look[what]) for look in some)
        return f"{number}/{len(some)} ({100 * number / max(len(some), 1):.1f} %)"

    lines = []
    for moment in (*dict.fromkeys(look["moment"] for look in well), "all"):
        some = [look for look in well if moment in (look["moment"], "all")]
        kinds = [[look for look in some if look["optimizer"] is state] for state in (True, False)]
        lines.append([moment, *(part(kind, "alarm") for kind in kinds), part(some, "alarm")])
    alarms = _table(["moment", "alarms with optimizer", "without", "both"], lines)
    found = [
        ["with optimizer" if state else "without"]
        + [
            part([k for k in late if k["optimizer"] is state], w)
            for w in ("found", "layer_right", "cause_right")
        ]
        for state in (True, False)
    ]
    return "\n\n".join(
        [intro.strip(), alarms, _table(["go bad late", "found", "layer right", "cause right"], found)]
    )


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def _share(rows: Sequence[Row], what: str) -> str:
    return f"{sum(bool(getattr(r, what)) for r in rows)}/{len(rows)}"


def _split(rows: Sequence[Row]) -> tuple[list[Row], list[Row], list[Row]]:
    sick, repaired, healthy = ([r for r in rows if r.build == b] for b in ("sick", "repaired", "healthy"))
    return sick, repaired, healthy


def _in_all(rows: Sequence[Row], tools: Sequence[str]) -> str:
    lines = []
    for tool in tools:
        sick, repaired, healthy = _split([r for r in rows if r.tool == tool])
        shares = [_share(sick, what) for what in ("found", "cause", "spurious")]
        crashes = str(sum(bool(r.error) for r in (*sick, *repaired, *healthy)))
        lines.append([tool, *shares, _share(healthy, "alarm"), _share(repaired, "alarm"), crashes])
    head = ["", "found", "cause named", "spurious", "false alarms, healthy", "repaired", "crashes"]
    return _table(head, lines)


def _by_type(rows: Sequence[Row], tools: Sequence[str]) -> str:
    lines = []
    for kind in TYPES:
        some = [r for r in rows if any(k == kind for k, _ in r.case.expect)]
        if not some:
            continue
        line = [kind]
        for tool in tools:
            sick, repaired, _ = _split([r for r in some if r.tool == tool])
            line += [_share(sick, "found"), _share(sick, "cause"), _share(repaired, "alarm")]
        lines.append(line)
    head = [""] + [f"{tool}: {what}" for tool in tools for what in ("found", "cause", "alarms repaired")]
    return _table(head, lines)


def _by_family(rows: Sequence[Row]) -> str:
    lines = []
    for family in sorted({r.case.family for r in rows}):
        sick, repaired, healthy = _split(
            [r for r in rows if r.case.family == family and r.tool == "gradflow"]
        )
        shares = [_share(sick, "found"), _share(sick, "cause")]
        lines.append([family, *shares, _share(healthy, "alarm"), _share(repaired, "alarm")])
    return _table(["", "found", "cause named", "false alarms, healthy", "repaired"], lines)


def _by_width(rows: Sequence[Row]) -> str:
    lines = []
    mine = [r for r in rows if r.tool == "gradflow"]
    for dtype in dict.fromkeys(r.dtype for r in mine):
        for name, place in (("narrow", 0), ("usual", 1), ("wide", 2)):
            some = [r for r in mine if r.dtype == dtype and _place(r) == place]
            sick, repaired, healthy = _split(some)
            shares = [_share(sick, what) for what in ("found", "cause", "spurious")]
            lines.append([name, dtype, *shares, _share(healthy, "alarm"), _share(repaired, "alarm")])
    return _table(
        ["width", "dtype", "found", "cause named", "spurious", "false alarms, healthy", "repaired"], lines
    )


def _place(row: Row) -> int:
    """Return 0 below the usual width, 1 at it, 2 above it."""
    return 1 + (row.width > row.case.width) - (row.width < row.case.width)


def _bad(rows: Sequence[Row], reasons: Mapping[str, str], none: str) -> str:
    """Return one line for each case and build, with all widths and dtypes at which it goes wrong."""
    if not rows:
        return none
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.id, row.build), []).append(row)
    lines = []
    for (id, build), some in groups.items():
        want = ", ".join(f"{kind} `{prefix}`" for kind, prefix in some[0].case.expect)
        at = ", ".join("usual" if r.usual else f"{r.width} {r.dtype}" for r in some)
        told = some[0].error or some[0].told
        reason = reasons.get(id, "not looked into yet")
        lines.append([f"`{id}`", want if build == "sick" else build, at, told, reason])
    return _table(["case", "expected", "at width and dtype", "told", "reason"], lines)


def _labelled(rows: Sequence[Mapping[str, Any]], reasons: Mapping[str, str]) -> str:
    """Return the figures of a run on other labelled cases, and what it missed."""
    sick = [r for r in rows if r["build"] == "sick"]
    well = {b: [r for r in rows if r["build"] == b] for b in ("healthy", "fixed")}
    shares = [f"{sum(bool(r[what]) for r in sick)}/{len(sick)}" for what in ("found", "cause", "spurious")]
    alarms = [f"{sum(bool(r['alarm']) for r in some)}/{len(some)}" for some in well.values()]
    text = _table(
        ["found", "cause named", "spurious", "false alarms, healthy", "repaired"], [[*shares, *alarms]]
    )
    bad = [r for r in rows if r.get("alarm") or not r.get("found", True) or not r.get("cause", True)]
    lines = []
    for r in bad:
        told = "; ".join(f"{s} {k} {layer}" for k, s, layer in r["issues"][:3]) or "nothing"
        lines.append([f"`{r['id']}`", r["build"], told, reasons.get(r["id"], "not looked into yet")])
    return text + ("\n\n" + _table(["case", "build", "told", "reason"], lines) if lines else "")


def _zoo(rows: Sequence[Row]) -> str:
    lines = []
    for case in {r.case.id: r.case for r in rows}.values():
        want = ", ".join(f"{kind} `{prefix}`" for kind, prefix in case.expect) or "healthy"
        name = f"[`{case.id}`]({case.source})" if case.source else f"`{case.id}`"
        lines.append([name, want, case.note])
    return _table(["case", "label", "what it is"], lines)
