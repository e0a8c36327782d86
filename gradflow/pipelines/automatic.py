"""`automatic`: the base pipeline, with the special measurements of what the first step shows; the default."""

from __future__ import annotations

import attrs

from gradflow.detect.knowledge import sparing_learned
from gradflow.functional.attention.automatic import AutomaticAttention
from gradflow.functional.attention.measurement import Attention
from gradflow.functional.policy.automatic import AutomaticPolicy
from gradflow.functional.policy.measurement import PolicyHeads
from gradflow.functional.precision.automatic import AutomaticPrecision
from gradflow.functional.precision.measurement import Precision
from gradflow.functional.recurrent.automatic import AutomaticRecurrence
from gradflow.functional.recurrent.measurement import Recurrence
from gradflow.pipelines.flow import Pipeline, flow
from gradflow.pipelines.policy import policy_detectors, sparing
from gradflow.pipelines.precision import precision_detectors
from gradflow.pipelines.recurrent import recurrence_detectors
from gradflow.pipelines.transformer import attention_detectors

BY_STATE = 0.3  # see `collapsed_policy`


def automatic(base: Pipeline | None = None) -> Pipeline:
    """Return the pipeline that `diagnose` runs by default: the base, and what the model turns out to need.

    In the first step it sees what runs: attention of any kind, recurrent layers and loops over recurrent
    cells, a policy that is trained by what its actions brought, numbers in a short format or near the end of
    theirs. For what it sees, it adds the measurements and the detectors of `transformer`, `recurrent`,
    `policy` and `precision`, at the first and the last step alone, and on some samples where there are many.
    What was chosen, and why, is in the report's head and in `record.provenance.chosen`. A model with none of
    them is measured as by `flow()`.

    Args:
        base: the pipeline to add to; `flow()` by default, which by itself leaves all of this out. A kind that
            it measures already is left to it.

    >>> pipeline = automatic()
    >>> pipeline.name, len(pipeline.measurements)
    ('flow+automatic', 4)
    """
    base = base or flow()
    base = attrs.evolve(base, detectors=[sparing_learned(d) for d in base.detectors])
    measured = tuple(type(measurement) for measurement in base.measurements)
    own = Pipeline("automatic", ())
    if Attention not in measured:
        own += Pipeline("", attention_detectors(), measurements=(AutomaticAttention(),))
    if Recurrence not in measured:
        through_time = recurrence_detectors(fresh=0.0)
        own += Pipeline("", through_time, measurements=(AutomaticRecurrence(),))
    if Precision not in measured:
        own += Pipeline("", precision_detectors(), measurements=(AutomaticPrecision(),))
    if PolicyHeads not in measured:
        base = sparing(base, by_state=BY_STATE)
        own += Pipeline("", policy_detectors(by_state=BY_STATE), measurements=(AutomaticPolicy(),))
    return base + attrs.evolve(own, name="automatic")
