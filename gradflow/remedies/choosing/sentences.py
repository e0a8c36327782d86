"""What the sentences mean that detectors recommend in: for each kind, which remedies do what it says.

The rules stand here; what they yield is made in `weights.py`, `shapes.py` and `running.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from gradflow.remedies.choosing import running, shapes, weights
from gradflow.remedies.choosing.targets import Target
from gradflow.remedies.remedy import Remedy

_Maker = Callable[[Target, str], Iterable[Remedy]]


def of_action(target: Target, action: str) -> Iterator[Remedy]:
    """Yield the remedies that a recommended action stands for; none if it is about code to be edited."""
    for pattern, make in _RULES:
        if pattern.search(action):
            yield from make(target, action)


_RULES: tuple[tuple[re.Pattern[str], _Maker], ...] = tuple(
    (re.compile(pattern), make)
    for pattern, make in (
        (r"policy_head", weights.near_uniform),
        (r"inside its domain|[Cc]lamp the argument|Guard the denom|slope of a square root", running.defined),
        (r"inside the formula|make it positive where|on the logits|A clamp, log", running.defined),
        (r"leave them out before the logarithm", running.defined),
        (r"masked throughout|norm of zeros|mean of nothing|power below 1|where\(\) hides", running.defined),
        (r"Infinity times a mask", running.masked_by_zero),
        (r"See what lets it grow", running.grown),
        (r"Bound the divisor", running.divisors),
        (r"nn\.init\.\w+_\((?!policy_head|normal_\()", weights.drawn_anew),
        (r"Draw \S+ at random|start one of them at random|Start \S+ at random", weights.at_random),
        (r"at their usual scale", weights.usual_scale),
        (r"raised to that power", weights.per_call),
        (r"by the root of their fan-in", weights.by_fan_in),
        (r"rows that are never picked anew", weights.revived),
        (r"start its codes at the scale", weights.codes),
        (r"small step sizes", weights.slow_states),
        (r"Replace the|se (?:softplus or )?LeakyReLU", shapes.another_activation),
        (r"[Aa]dd a norm layer|Put a norm layer behind|norm layer before the last", shapes.norms),
        (r"normalise it at", shapes.norms),
        (r"Add skip connections|Put a skip connection|Add the input of", shapes.skips),
        (r"ower the learning rate|ower learning rate|learning rate below", running.lower_rate),
        (r"\(post-norm\)", shapes.post_norm),
        (r"[Cc]lip(?: the gradient)?: torch", running.clip),
        (r"a large eps|an epsilon of", shapes.epsilon),
        (r"attention scores|Scale the scores|scale it down|Normalise queries", shapes.scores),
        (r"tandardise (?:what enters|it|the obs)|[Rr]escale the inputs", shapes.scaled_inputs),
        (r"Normalise what enters(?!.*norm out)", shapes.scaled_inputs),
        (r"compute the loss on what|leave the softmax out|without an activation", shapes.as_scores),
        (r"leave the norm out", shapes.without_norm),
        (r"[Ww]iden (?:it|\S+):", shapes.more_outputs),
        (r"fires above a threshold", shapes.fired),
        (r"Bound the log of the standard deviation", shapes.bounded_std),
        (r"nn\.GRU or nn\.LSTM|a gated layer", shapes.gated),
        (r"\.fill_\(", weights.keeping),
        (r"recurrent weights (?:smaller or )?orthogonal", weights.orthogonal),
        (r"straight-through|a sign, a round", running.passed),
        (r"Remove detach|no_grad|\.data cuts|Follow the output", running.uncut),
        (r"use_reentrant", running.checkpointed),
        (r"Use GroupNorm", shapes.other_norm),
        (r"like the same", weights.siblings),
        (r"Drop less in|the share of the others", shapes.dropping),
        (r"Start the (?:gains|bias) of", weights.gains),
        (r"divide its scores by a constant", weights.divided),
        (r"Bring the targets of", running.far_targets),
        (r"last layer of each block's update", weights.small_updates),
        (r"fan_in of", weights.fan_in),
        (r"Bound what each block adds", shapes.bounded_updates),
        (r"look at the step, or", running.broken_steps),
        (r"pass something below zero", shapes.above_zero),
        (r"what bends in the place of", shapes.bending),
        (r"a smaller learning rate, in", running.own_rate),
        (r"Build the optimizer on the whole model", running.all_held),
        (r"multiplies group\['lr'\] at every step|step it once an epoch", running.steady_rates),
    )
)  # fmt: skip
