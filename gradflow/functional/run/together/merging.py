"""Records of several processes, field by field, as one: what is not said of a field is a mean.

NOTE [Rules by field]
Records that measurements of gradflow return hold, most of all, means over samples or positions: their mean
    over processes is that of the joined batch where all have as many. Other fields have a rule: norms of
    gradients of a process's own loss are roots of sums of squares over the number of processes, norms of
    tensors without that, extremes stay extremes, counts are added up. Records of one name belong together;
    what only some processes have is kept.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import numpy as np

from gradflow.records import ExponentHistogram

GRADIENT, NORM, ROOT, LARGEST, SMALLEST, ADDED, ALL, FIRST = range(8)
_RULES: dict[tuple[str, str], int] = {
    **{("AttentionGradients", f"{of}_grad"): GRADIENT for of in ("query", "key", "value", "output")},
    **{("AttentionGradients", f"{of}_norm"): NORM for of in ("query", "key", "value")},
    ("AttentionRecord", "head_grad"): GRADIENT,
    ("AttentionRecord", "head_output"): NORM,
    ("AttentionScores", "logit_std"): ROOT,
    ("AttentionScores", "logit_peak"): LARGEST,
    **{("RecurrentLevelRecord", f"{of}_profile"): GRADIENT for of in ("gradient", "state", "readout")},
    ("RecurrentLevelRecord", "hidden_rms"): ROOT,
    ("RecurrentLevelRecord", "cell_rms"): ROOT,
    ("ActionDistribution", "num_samples"): ADDED,
    ("ActionDistribution", "largest_prob"): LARGEST,
    ("ActionDeviation", "std_min"): SMALLEST,
    ("ActionDeviation", "std_max"): LARGEST,
    ("ActionDeviation", "mean_rms"): ROOT,
    ("KnowledgeRecord", "num_samples"): ADDED,
    ("KnowledgeRecord", "scales"): ROOT,
    ("SubnormalRecord", "num_elements"): ADDED,
    ("SubnormalRecord", "num_subnormal"): ADDED,
    ("ChoiceRecord", "num_choices"): ADDED,
    ("ChoiceRecord", "num_picked"): LARGEST,
    ("QuotientRecord", "smallest"): SMALLEST,
    ("TurnsRecord", "span"): LARGEST,
    ("TurnsRecord", "num_different"): LARGEST,
    ("ReachRecord", "num_choices"): LARGEST,
    ("BlockRecord", "passes"): FIRST,
    ("SightRecord", "ordered"): ALL,
    ("AttentionRecord", "num_queries"): FIRST,
}
_NAMES = ("name", "parameter", "layer", "level", "step")  # by one of these, records belong together


def merged(values: Sequence[Any], rule: int | None = None) -> Any:
    """Return one value of those of several processes, in the order of their ranks."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    first = known[0]
    if rule == FIRST:
        return first
    if isinstance(first, ExponentHistogram):
        return _histogram(known)
    if attrs.has(type(first)):
        return _record(known)
    if isinstance(first, np.ndarray):
        return _array(known, rule)
    if isinstance(first, (bool, np.bool_)):
        return all(known) if rule == ALL else any(known)
    if isinstance(first, (int, float)):
        number = float(_array([np.array(float(value)) for value in known], rule))
        return number if isinstance(first, float) else int(number)
    if isinstance(first, (tuple, list)):
        return _sequence(known, rule)
    if isinstance(first, Mapping):
        keys = dict.fromkeys(key for value in known for key in value)
        return {key: merged([value[key] for value in known if key in value]) for key in keys}
    return first


def _array(known: Sequence[Any], rule: int | None) -> Any:
    first = known[0]
    if any(value.shape != first.shape for value in known):  # of sequences of another length
        return max(known, key=lambda value: value.size)
    if first.dtype == bool:
        return np.logical_and.reduce(known) if rule == ALL else np.logical_or.reduce(known)
    stack, number = np.stack([np.asarray(value, dtype=np.float64) for value in known]), len(known)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)  # NaN everywhere
        if rule in (GRADIENT, NORM):
            missing = np.isnan(stack).all(0)
            found = np.where(missing, np.nan, np.sqrt(np.nansum(stack**2, 0)))
            found = found / number if rule == GRADIENT else found
        elif rule == ROOT:
            found = np.sqrt(np.nanmean(stack**2, 0))
        elif rule == ADDED:
            found = np.nansum(stack, 0)
        else:
            how = {LARGEST: np.nanmax, SMALLEST: np.nanmin}.get(rule or -1, np.nanmean)
            found = how(stack, 0)
    if first.dtype.kind in "iu":
        return first if rule is None else found.astype(first.dtype)
    return found.astype(first.dtype)


def _record(known: Sequence[Any]) -> Any:
    first = known[0]
    kind = type(first)
    if any(type(value) is not kind for value in known):
        return first
    changes = {}
    for field in attrs.fields(kind):
        rule = _RULES.get((kind.__name__, field.name))
        changes[field.name] = merged([getattr(value, field.name) for value in known], rule)
    return attrs.evolve(first, **changes)


def _sequence(known: Sequence[Any], rule: int | None) -> tuple[Any, ...]:
    first = known[0]
    entries = [entry for value in known for entry in value]
    if entries and all(attrs.has(type(entry)) for entry in entries):
        by_key: dict[Any, list[Any]] = {}
        for value in known:
            met: dict[Any, int] = {}
            for entry in value:
                key = type(entry), *(getattr(entry, name, None) for name in _NAMES)
                met[key] = met.get(key, 0) + 1
                by_key.setdefault((key, met[key]), []).append(entry)
        return tuple(merged(group) for group in by_key.values())
    as_long = bool(entries) and all(len(value) == len(first) for value in known)
    kinds = float if rule is None else (float, int)
    if as_long and all(isinstance(entry, kinds) for entry in entries):
        return tuple(merged(column, rule) for column in zip(*known, strict=True))
    if entries and all(isinstance(entry, str) for entry in entries):
        return tuple(dict.fromkeys(entries))
    return first


def _histogram(known: Sequence[ExponentHistogram]) -> ExponentHistogram:
    """Return the histogram of the entries of several, look by look."""
    looks = min(len(h.num_elements) for h in known)
    bins = sorted(set().union(*(h.bins for h in known)))
    counts = np.zeros((looks, len(bins)), np.int64)
    for h in known:
        counts[:, np.searchsorted(bins, h.bins)] += h.counts[:looks]
    total = {
        name: sum(getattr(h, name)[:looks] for h in known)
        for name in ("num_elements", "num_zero", "num_infinite")
    }
    return attrs.evolve(known[0], bins=tuple(bins), counts=counts, **total)
