"""VANISHING: the gradient is lost on its way back from the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import attrs

from gradflow.detect.actions import vanishing_actions
from gradflow.detect.evidence import Shares, early, is_normed, kept_at_least, late, row_gain, shares
from gradflow.detect.flow.ends.unheard import flat_scores, heard_below_a_tower, unheard
from gradflow.detect.flow.forgetting import deep, fading, forgetful
from gradflow.detect.flow.readings.falls import best_upstream, falls_of, lossy_operation
from gradflow.detect.flow.readings.idle import idle
from gradflow.detect.flow.readings.same_keys import never_asked
from gradflow.detect.flow.readings.weakened import weakened
from gradflow.detect.flow.readings.zeros import zeros_of
from gradflow.detect.knowledge import AT_LEVEL, at_level, coped_with, differing, guesses, lowered
from gradflow.detect.updates.readings import stands_still
from gradflow.detect.view import Flow, flow_of
from gradflow.detect.wiring import node_name
from gradflow.records import Evidence, FlowRecord, Issue, IssueSeverity, IssueType, Role

_ALIKE = 1e-2  # of the outputs: where no more differs, they tell no samples apart, if nothing can grow
_FAINT = 3e-8  # part of the outputs that differs, times that of the gradient that arrives
_STACK = 3  # starved layers one behind the other, from which a first step counts: a tiny last layer is one
_FEW_CALLS = 4  # of one module: more are steps of a loop
_LATER = " Its later calls get what they should, so it learns, if nothing early is asked for."


def vanishing(
    threshold: float = 1e-6,
    *,
    share: float = 1e-3,
    local_share: float = 0.5,
    bypass: float = 100.0,
    leverage: float = 1e-4,
    faded: float = 0.25,
) -> Callable[[FlowRecord], Iterable[Issue]]:
    """Return the detector of gradients that are lost between the loss and a layer.

    Measured: the norm of the output gradient of each layer call, over the norm measured at the layers
    nearest the loss, along the path of the graph that should carry most. Two ratios: the plain one (what
    *arrives*), and the one over what the layers between should let through by their kind (NOTE [What should
    arrive] in `gradflow.detect.evidence`). They are medians over the last third of the steps, so that a fall
    that training has cured does not count, and one that training has brought about does.

    Why this is evidence: the loss, the batch and the width cancel in a ratio of norms on one path. The
    gradient of the *weights* is not looked at: large inputs enlarge it, and a uniform decay makes those of
    all weights alike. What each layer keeps, against its kind, shows uniform decay too.

    A fused plain recurrent layer whose last step alone is read is judged by its recurrent weights, see
    `gradflow.detect.flow.readings.recurrent_weights`. Of a loop of operations over a sequence (a scan, a
    recurrence written out), the gradient is measured along the sequence, at what the loop takes step by step.
    Of a stack that applies less of its weights than it holds, see `weakened`; whose steps miss it, `idle`.

    Where one layer accounts for half of the fall along a path, in logarithms, that layer is named, or the
    operation that its input goes through. Where none does, the fall is reported where it shows most, in the
    part of the model that loses most.

    Looks alike and is not: the first calls of a cell in a loop, whose last calls get what they should, while
    the first are not lost in their sum (LOW); a branch beside a path that carries the gradient (zero or tiny
    gates, LayerScale); the modest decay of a stack at PyTorch's default initialisation, unless the signal has
    decayed with it, and the model gives the same for every sample; the fall behind a pooling; a small last
    layer (policy heads at gain 0.01); a modest fall in a run that learns all the same, as where the slopes of
    probabilities near 0 and 1 tower (LOW); exact zeros, which are `dead`'s, unless they are what a decay
    comes to where the format of the numbers ends; zeros but for rounding behind a norm over one feature,
    likewise; and inside of attention that reads the same everywhere, which is told of what it reads.

    Args:
        threshold: what arrives, below which the verdict is at least MEDIUM whatever the kinds of layers, and
            the share below which it is CRITICAL. 1e-6: float32 keeps 7 digits, so what is smaller is lost
            where it meets another gradient.
        share: arriving over expected, below which a layer is starved. 1e-3: a single badly scaled layer
            (0.01) and a factor of ten of ordinary spread are both still above it.
        local_share: part of the whole fall, in logarithms, that one layer must account for to be named as the
            one that absorbs the gradient. One half: no other can account for more.
        bypass: how many times more than a layer one further upstream must get for the layer to be on a
            branch that others do not depend on. A branch of one or two layers, or one that loses its
            gradient at one place (a gate), is then no illness; a long one that loses it layer by layer is.
        leverage: part of the loss that the last outputs can change by changing as much as they are large,
            below which the loss does not hear them, where the model guesses: then what stands between the
            last layer and the loss is measured, and told if it keeps less than `share`.
        faded: share of the steps of a loop of operations at which the gradient is below 1e-6 of the largest,
            from which it is told in a model that guesses. A quarter of a sequence is more than its start.
    """

    def detector(record: FlowRecord) -> Iterable[Issue]:
        flow = flow_of(record)
        against = shares(flow, kept_at_least(flow), from_peak=True)
        plain = shares(flow, kept_at_least(flow, by_matrix=1.0))
        zeros = zeros_of(flow)
        gone, fed = zeros.underflown(), best_upstream(flow, against)
        starved = _starved(against, plain, gone, threshold, share, local_share)
        starved = [s for s in starved if s.node in gone or s.node not in zeros.why]  # as late steps told
        starved = [s for s in starved if not _by_the_way(s, fed[s.node], bypass)]
        quiet = {*zeros.muted, *never_asked(flow), *heard_below_a_tower(flow)}  # to the former two: rounding
        starved = [_heard_later(s, against, threshold, share) for s in starved if s.node not in quiet]
        found = [*_issues(flow, plain, starved, fed), *forgetful(flow, threshold), *fading(flow, faded)]
        found = found or deep(flow) or _uncured(flow, against, plain, threshold, share, local_share, bypass)
        found = found or _inexcusable(flow, plain, threshold, share, local_share, bypass)
        found = found or weakened(flow, plain.share) or idle(flow, plain)
        found = [lowered(i, AT_LEVEL) for i in found] if at_level(record) else coped_with(record, found)
        return [*found, *(unheard(flow, leverage, share) or flat_scores(flow))]

    return detector


@attrs.frozen(kw_only=True)
class _Starved:
    """One layer that gets too little, and where on its path the gradient is lost.

    Args:
        node: the layer's node.
        share: arriving over expected.
        arriving: the plain ratio.
        severity: how bad.
        num_layers: layers on the path to the loss.
        absorber: the layer that loses most of it, or "" where none does.
        local: what passes the absorber, against its kind.
        before: the layer that the absorber hands to.
        at_once: whether most is lost between two neighbours on the path, at a layer or at an operation.
        part: the part of the model in which the gradient falls most on its path.
        num_starved: layers with a weight matrix on the path, itself included, that get too little.
        kept_per_layer: what each layer on the path keeps, as a geometric mean of the plain ratio; up to where
            the gradient has become too small for its format, if it has.
        least: the plain ratio here, or where that happened.
    """

    node: str
    share: float
    arriving: float
    severity: IssueSeverity
    num_layers: int
    absorber: str
    local: float
    before: str
    at_once: bool
    num_starved: int
    part: str
    kept_per_layer: float
    least: float


def _starved(
    against: Shares,
    plain: Shares,
    gone: Mapping[str, str],
    threshold: float,
    share: float,
    local_share: float,
) -> list[_Starved]:
    """Every starved layer, worst first; of `gone` are those to which nothing comes, by underflow."""
    seen = {node: late(values) for node, values in against.share.items()}
    arriving = {node: late(plain.share[node]) if node in plain.share else seen[node] for node in seen}
    severity = {node: _severity(seen[node], arriving[node], threshold, share) for node in seen}
    for node in gone.keys() & seen.keys():
        seen[node], arriving[node], severity[node] = 0.0, 0.0, IssueSeverity.CRITICAL
    # How many layers, and how many starved ones with a weight matrix, stand between a node and the loss.
    depth, num_starved = _counts(against, severity)
    worst_first = sorted((n for n in seen if severity[n]), key=lambda n: (seen[n], n))
    blamed = falls_of(against, seen, worst_first, gone, local_share)
    found = []
    for node in worst_first:
        fall, ahead = blamed[node]
        absorber = fall.node if ahead and fall.to_blame else ""
        last = gone.get(node, node)
        least = arriving.get(last, 0.0)
        found.append(
            _Starved(
                node=node,
                share=seen[node],
                arriving=arriving[node],
                severity=severity[node] or IssueSeverity.MEDIUM,
                num_layers=depth[node],
                absorber=absorber,
                local=fall.kept if absorber else math.nan,
                before=fall.before if absorber else "",
                at_once=ahead,
                num_starved=num_starved[node],
                part=fall.part,
                kept_per_layer=least ** (1.0 / max(depth.get(last, 1) - 1, 1)),
                least=least,
            )
        )
    return found


def _counts(
    against: Shares, severity: Mapping[str, IssueSeverity | None]
) -> tuple[dict[str, int], dict[str, int]]:
    """By node, the measured layers from it to the loss, and those of them with a matrix that are starved."""
    depth: dict[str, int] = {}
    starved: dict[str, int] = {}
    for node in reversed(against.flow.wiring.order):
        behind = against.via.get(node, "")
        seen = node if node in against.share else against.flow.summed.get(node, "")
        measured = node in against.share or (seen in against.share and behind != seen)
        bad = measured and severity[seen] is not None and against.flow.has_matrix(seen)
        depth[node] = depth.get(behind, 0) + int(measured)
        starved[node] = starved.get(behind, 0) + int(bad)
    return depth, starved


def _by_the_way(s: _Starved, fed: float, bypass: float) -> bool:
    """Whether a starved layer is on a short or a gated branch that others do not depend on."""
    return fed > bypass * s.share and (s.at_once or s.num_starved <= 2)


def _heard_later(s: _Starved, against: Shares, threshold: float, share: float) -> _Starved:
    """Return it LOW at most where other calls of its module get what they should, and it is not lost
    in their sum.

    A memory that fades within some tens of steps is as good as its task asks for: whether anything is asked
    of the first steps, the gradient does not show.
    """
    layers = against.flow.layers
    calls = [late(x) for n, x in against.share.items() if layers[n].module == layers[s.node].module]
    most = max((c for c in calls if math.isfinite(c)), default=0.0)
    heard = len(calls) > _FEW_CALLS and most >= share and s.share >= threshold * most
    return attrs.evolve(s, severity=min(s.severity, IssueSeverity.LOW)) if heard else s


def _severity(seen: float, arriving: float, threshold: float, share: float) -> IssueSeverity | None:
    """Worst of two scales: against the kinds of layers, and absolutely."""
    if not (seen > 0 and arriving >= 0):  # exact zeros and NaN are other illnesses
        return None
    if seen < threshold:
        return IssueSeverity.CRITICAL
    if seen < share / 30:
        return IssueSeverity.HIGH
    if seen < share or arriving < threshold:
        return IssueSeverity.MEDIUM
    return None


def _issues(flow: Flow, plain: Shares, starved: Sequence[_Starved], fed: Mapping[str, float]) -> list[Issue]:
    """One issue for each starved module, at its first starved call, and one for each layer that absorbs."""
    told: dict[str, _Starved] = {}
    worst: dict[str, _Starved] = {}
    for s in sorted(starved, key=lambda s: flow.layers[s.node].order):
        if flow.trainable(s.node):
            told.setdefault(flow.layers[s.node].module, s)
    for s in starved:  # worst first
        if s.absorber:
            worst.setdefault(s.absorber, s)
    if not told:
        return []
    absorbers = {name: _absorber_issue(flow, plain, s) for name, s in worst.items()}
    at = {name: issue.layer for name, issue in absorbers.items()}
    issues = [_starved_issue(flow, plain, s, fed[s.node], at.get(s.absorber)) for s in told.values()]
    return [*issues, *absorbers.values()]


def _starved_issue(flow: Flow, plain: Shares, s: _Starved, fed: float, origin: str | None) -> Issue:
    layer = flow.layers[s.node]
    per_layer = s.kept_per_layer
    arriving = f"Only {s.arriving:.2e}" if s.arriving else "Nothing"
    if s.absorber:
        how = f"it is lost at {s.absorber}, which hands back {s.local:.1e} of what a layer of its kind should"
    else:
        kept = f"about {per_layer:.2g} of it (1 is healthy)"
        how = f"each of the {s.num_layers - 1} layers on its way keeps {kept}"
    share = f"{s.share:.1e} times what should" if s.arriving else "for it has become too small for its format"
    first = early(plain.share[s.node]) if s.node in plain.share else math.nan
    trend = ""
    if _developed(plain, s):
        trend = f" It was {first:.1e} in the first steps: training has brought this about."
    return Issue(
        layer=layer.name,
        layer_type=layer.type,
        issue_type=IssueType.VANISHING,
        severity=s.severity,
        description=f"{arriving} of the gradient that enters the model at the loss arrives here, {share}: "
        f"{how}.{trend}" + (_LATER if s.severity is IssueSeverity.LOW else ""),
        magnitude=s.arriving,
        recommended_actions=vanishing_actions(flow, s.node, absorber=s.absorber, per_layer=per_layer),
        metrics={
            "arriving": s.arriving,
            "share_of_expected": s.share,
            "num_layers_to_loss": s.num_layers,
            "kept_per_layer": per_layer,
            "row_gain": row_gain(flow, s.node),
            "first_steps": first,
        },
        evidence=Evidence(
            roles=Role.STARVED,
            origin=origin,
            developed=bool(trend),
            elsewhere=bool(s.part) and not layer.module.startswith(f"{s.part}."),
            side_branch=fed > 3 * s.share,
        ),
    )


def _developed(plain: Shares, s: _Starved) -> bool:
    """Whether what arrives at a layer has fallen by two orders since the first steps."""
    first = early(plain.share[s.node]) if s.node in plain.share else math.nan
    return math.isfinite(first) and first > 100 * s.least


def _absorber_issue(flow: Flow, plain: Shares, s: _Starved) -> Issue:
    """The verdict on the layer that loses the gradient, or on what stands between it and the next one."""
    node, gain = s.absorber, row_gain(flow, s.absorber)
    op, at = lossy_operation(flow, s.before, s.absorber) if gain >= 0.1 else ("", node)
    layer = flow.layers[at]
    return Issue(
        layer=layer.name,
        layer_type=layer.type,
        issue_type=IssueType.VANISHING,
        severity=s.severity,
        description=f"Only {s.local:.1e} of the gradient that should comes back through it"
        + (f"; the rms of its weights' rows is {gain:.1e}" if gain < 0.1 else "")
        + (f": it is lost in what its output goes through ({op})" if op else "")
        + f". Upstream, {s.arriving:.1e} of the gradient arrives at {s.node}.",
        magnitude=s.local,
        recommended_actions=vanishing_actions(flow, at, absorber=node, per_layer=s.local),
        metrics={"local_share": s.local, "row_gain": gain, "op": op},
        evidence=Evidence(roles=Role.ABSORBING, op=op, developed=_developed(plain, s)),
    )


def _uncured(
    flow: Flow,
    against: Shares,
    plain: Shares,
    threshold: float,
    share: float,
    local_share: float,
    bypass: float,
) -> list[Issue]:
    """Layers that lost the gradient at the first step, one after the other, and have learned nothing since.

    An optimizer whose steps have a size of their own enlarges tiny weights within the run, and the gradient
    with them; where next to nothing arrives even then, and the model guesses, that is no cure.
    """
    if not flow.record.provenance.optimizer or not guesses(flow.record):
        return []
    first, first_plain = (shares.at_first() for shares in (against, plain))
    fed = best_upstream(flow, first)
    starved = _starved(first, first_plain, {}, threshold, share, local_share)
    starved = _stacked((s for s in starved if s.severity >= IssueSeverity.HIGH), fed, bypass)
    now = {s.node: late(plain.share[s.node]) for s in starved if s.node in plain.share}
    starved = [s for s in starved if now.get(s.node, 1.0) < share]
    return [
        attrs.evolve(
            issue,
            description=f"In the first step: {issue.description} By the end "
            f"{now[node_name(issue.layer)]:.1e} arrives, as steps have enlarged tiny weights, and the model "
            "still guesses.",
        )
        for issue in _issues(flow, first_plain, starved, fed)
        if node_name(issue.layer) in now
    ]


def _inexcusable(
    flow: Flow, plain: Shares, threshold: float, share: float, local_share: float, bypass: float
) -> list[Issue]:
    """Layers that get next to nothing through a stack whose layers each keep what their kind may, in a model
    that gives the same for every sample.

    That a stack of the usual initialisation keeps 0.4 a layer is no illness while the steps make up for it.
    Where the signal has faded on the same way, what would have to tell samples apart is what none reaches:
    the part of the outputs that differs, times the part of the gradient that arrives, is next to nothing.
    (After twenty steps, networks of six layers that learn within a hundred have 1e-7 of it, or more.)
    Where outputs differ by a way past the stack, its loss must stand still, and less must arrive.
    Where a norm holds the size of all weights (a spectral one), no step makes up for it, and less will do.
    """
    known, held = flow.record.knowledge, not any(_is_free(flow, n) for n in flow.layers)
    if known is None or not flow.record.provenance.optimizer:
        return []
    differs, most = differing(known), _ALIKE if held else _ALIKE / 10
    alike = differs <= most and math.isclose(known.averaged, known.loss, rel_tol=10 * most)
    if not (alike and guesses(flow.record)) and not stands_still(flow.record):
        return []
    fed = best_upstream(flow, plain)
    gradual = [s for s in _starved(plain, plain, {}, threshold, share, local_share) if not s.absorber]
    if alike:
        faint = [s for s in gradual if held or s.arriving * differs <= _FAINT]
    else:  # a way past these layers makes outputs differ
        faint = [s for s in gradual if s.severity >= IssueSeverity.HIGH]
    return _issues(flow, plain, _stacked(faint, fed, bypass), fed)


def _is_free(flow: Flow, node: str) -> bool:
    """Whether a layer has weights whose size no norm holds."""
    return flow.has_matrix(node) and not is_normed(flow, node)


def _stacked(starved: Iterable[_Starved], fed: Mapping[str, float], bypass: float) -> list[_Starved]:
    """Return, as MEDIUM, those that are starved with others behind them, and not by the way."""
    far = [s for s in starved if s.severity >= IssueSeverity.MEDIUM and s.num_starved >= _STACK]
    return [
        attrs.evolve(s, severity=IssueSeverity.MEDIUM) for s in far if not _by_the_way(s, fed[s.node], bypass)
    ]
