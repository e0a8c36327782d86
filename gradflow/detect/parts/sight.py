"""Attention that lets an output see what it must not: what comes later, or padding."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from gradflow.records import FlowRecord, Issue, IssueSeverity, IssueType, SightRecord

_HIDDEN = 1e-6  # of the gradient: exactly zero, but for masks of large finite numbers


def leaking_attention(leak: float = 1e-3, *, most: float = 2.0) -> Callable[[FlowRecord], Iterable[Issue]]:
    """Return the detector of attention that sees what it must not, or not what its siblings see.

    Measured, in the first step: the gradient from the middle position of what a module with self-attention
    returns, at the positions of what enters it; and from positions of words at those of padding. It is the
    derivative itself, whatever the mask is made of.

    Why this is evidence: where a position is hidden, the gradient is exactly zero; where it leaks, it has
    0.06 to 0.8 of the size of the others. A model whose targets are its inputs shifted by one must not see
    the future: what it is asked for is there to be copied, its loss falls, and it has learned nothing for the
    day when there is no future yet. So it is where the future is hidden and the targets are the inputs, not
    shifted at all. Padding is known from the mask among the model's inputs, or from
    `padding_idx`.

    Looks alike and is not: a model that is not told positions and hides none, which sees the next word and
    cannot tell which it is (LOW); encoders, which see both sides; targets that are not the next words;
    attentions of an encoder beside those of a decoder, which are not siblings. None of the seven types means
    a leak; it is told as BOTTLENECK, the one about what passes.

    Args:
        leak: share of the gradient from which a position is seen.
        most: how many times as many siblings must agree on what they see as do not.
    """

    def detector(record: FlowRecord) -> Iterable[Issue]:
        sights = [sight for sight in record.parts.sights if not sight.whole]
        model = next((sight for sight in record.parts.sights if sight.whole), None)
        if model is not None and model.own:
            if model.future <= _HIDDEN:
                yield _asked_for_its_own(model)
            model = None
        if model is not None and model.future > leak:
            leaking = [s for s in sights if s.future > leak]
            for sight in _once(leaking, sights) or [model]:
                yield _leak(sight, model, len(leaking), len(sights))
        groups: dict[str, list[SightRecord]] = {}
        for sight in sights:
            groups.setdefault(re.sub(r"\d+", "*", sight.name), []).append(sight)
        for group in groups.values():
            if model is None or model.future <= leak:  # else what hides the future is right
                yield from _disagreeing(group, leak, most)
            yield from _padded(group, leak, most)

    return detector


def _asked_for_its_own(model: SightRecord) -> Issue:
    return Issue(
        layer=model.name,
        layer_type=model.type,
        issue_type=IssueType.BOTTLENECK,
        severity=IssueSeverity.HIGH,
        description="It hides later positions, as what predicts the next word does, and its targets are the "
        "very words that it is given, each at its own place: they are there to be copied, and the loss falls "
        "without anything learned of what comes next. (None of the seven types means this; it is the one "
        "about what passes.)",
        magnitude=1.0,
        recommended_actions=(
            "Shift the targets by one: the output at a position against the word at the next "
            "(logits[:, :-1] against tokens[:, 1:]).",
            "Where the model shifts labels by itself, as those of transformers do, hand it labels and let it "
            "compute the loss.",
        ),
        metrics={"model_future": model.future},
    )


def _once(found: Sequence[SightRecord], of: Sequence[SightRecord]) -> Sequence[SightRecord]:
    """Return what is told: where all have one fault, it is one fault, and told at the first."""
    return found[:1] if len(found) == len(of) else found


def _leak(sight: SightRecord, model: SightRecord, number: int, all_of_them: int) -> Issue:
    others = f", as {number} of its {all_of_them} attentions do" if number > 1 else ""
    others = f", and {all_of_them - 1} others hide it" if number == 1 < all_of_them else others
    blind = (
        "" if model.ordered else " It is not told positions, so it can hardly tell which word is the next."
    )
    return Issue(
        layer=sight.name,
        layer_type=sight.type,
        issue_type=IssueType.BOTTLENECK,
        severity=IssueSeverity.HIGH if model.ordered else IssueSeverity.LOW,
        description="It lets outputs see later positions, which hold what they are asked for: the targets "
        f"are the inputs shifted by one, and of the gradient from a position {sight.future:.2g} goes to "
        f"later ones, where it must be exactly zero{others}. The loss falls by copying, and means nothing. "
        "(A leak is none of the seven types; this is the one about what passes.)" + blind,
        magnitude=sight.future,
        recommended_actions=(
            f"Hide later positions in {sight.name or 'the model'}: is_causal=True, or a mask of "
            "torch.triu(ones, diagonal=1) filled with -inf before the softmax.",
            "Look at the sense of the mask: True means 'attend' for scaled_dot_product_attention, 'hide' for "
            "nn.MultiheadAttention.",
            "Check: change the last token of an input, and no earlier output may change.",
        ),
        metrics={"future": sight.future, "model_future": model.future, "leaking": number},
    )


def _disagreeing(group: Sequence[SightRecord], leak: float, most: float) -> Iterator[Issue]:
    """Yield what sees the future where most of its siblings do not, or the other way round."""
    seeing = [s for s in group if s.future > leak]
    blind = [s for s in group if s.future <= _HIDDEN]
    for few, many, what in ((seeing, blind, "sees"), (blind, seeing, "does not see")):
        if not few or len(many) < max(2, most * len(few)):
            continue
        for sight in few:
            yield Issue(
                layer=sight.name,
                layer_type=sight.type,
                issue_type=IssueType.BOTTLENECK,
                severity=IssueSeverity.MEDIUM,
                description=f"It {what} later positions, and its {len(many)} siblings do otherwise: of "
                f"the gradient from a position {sight.future:.2g} goes to later ones, in the others "
                f"{_median(many):.2g}.",
                magnitude=sight.future,
                recommended_actions=(
                    f"Give {sight.name} the mask that the other blocks have.",
                    "If the blocks are to see different positions, nothing is wrong.",
                ),
                metrics={"future": sight.future, "siblings": _median(many)},
            )


def _median(sights: Sequence[SightRecord]) -> float:
    return sorted(s.future for s in sights)[len(sights) // 2]


def _padded(group: Sequence[SightRecord], leak: float, most: float) -> Iterator[Issue]:
    """Yield what sees padding, where the model is told of it or most siblings do not."""
    known = [s for s in group if math.isfinite(s.padding)]
    seeing = [s for s in known if s.padding > leak]
    odd = bool(seeing) and len(known) - len(seeing) >= most * len(seeing)
    for sight in _once(seeing, known):
        grave = sight.padding_told or odd
        others = f", as {len(seeing)} of {len(known)} do" if len(seeing) > 1 else ""
        others = f", and its {len(known) - 1} siblings do not" if odd and len(seeing) == 1 else others
        how = "a mask among the model's inputs" if sight.padding_told else "the embedding's padding_idx"
        yield Issue(
            layer=sight.name,
            layer_type=sight.type,
            issue_type=IssueType.BOTTLENECK,
            severity=IssueSeverity.MEDIUM if grave else IssueSeverity.LOW,
            description=f"It lets words see padding{others}: the gradient from words at padding, which {how} "
            f"tells, is {sight.padding:.2g} of that at words, where it must be exactly zero. What the model "
            "says of a text changes with how much padding it is given.",
            magnitude=sight.padding,
            recommended_actions=(
                f"Hide padding in {sight.name or 'the model'}: key_padding_mask, attn_mask, or masked_fill("
                "padding, -inf) before the softmax.",
                "Look at the sense and the shape of the mask: a mask that is never applied, or is inverted, "
                "raises no error.",
            ),
            metrics={"padding": sight.padding, "seeing": len(seeing)},
        )
