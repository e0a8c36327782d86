"""First contact: what gradflow said of cases that nobody who shaped its rules had seen, round by round.

A round's cases come from public reports. They were built, and their labels checked with plain PyTorch and
committed, before gradflow was run on them. The figures are those of that first run, and are never improved;
afterwards the cases are a part of the zoo like all others.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Round:
    """The first score on one set of cases.

    Args:
        name: the prefix of its cases' ids.
        date: of the score.
        sick: number of sick cases, each with its repair.
        healthy: number of healthy cases.
        found: sick ones of which every expected pair was told.
        cause: sick ones whose first cause was an expected pair.
        alarms_healthy: healthy ones with a verdict of MEDIUM or above.
        alarms_repaired: repaired ones with such a verdict.
        missed: why, by id, what was not found was not.
        alarmed: why, by id, what is well was flagged.
    """

    name: str
    date: str
    sick: int
    healthy: int
    found: int
    cause: int
    alarms_healthy: int
    alarms_repaired: int
    missed: dict[str, str] = field(default_factory=dict)
    alarmed: dict[str, str] = field(default_factory=dict)


ROUNDS = (
    Round(
        name="contact1",
        date="2026-11-29",
        sick=20,
        healthy=10,
        found=13,
        cause=11,
        alarms_healthy=0,
        alarms_repaired=3,
        missed={
            "contact1a-forecast-revin": "What is lost between the last layer and the loss was not looked at.",
            "contact1a-forecast-jepa": "A collapsed embedding was told only where rows are mixed.",
            "contact1a-quant-stepsize": "The step that throws a parameter away was not looked at, only "
            "what it leaves dead.",
            "contact1b-splatting-opacity_reset": "Rows of a parameter were not looked at one by one.",
            "contact1b-molecule-unbounded_egnn": "Growth along coordinates, made of operations alone.",
            "contact1b-rl-leaking_actor_loss": "A loss that falls without end looks like a learned one.",
            "contact1b-contrastive-hardest_triplet": "As the other collapsed embedding.",
        },
        alarmed={
            "contact1a-ode-controlled": "A tanh at its ends in a model that learns all the same.",
            "contact1b-molecule-unbounded_egnn": "A last round that nothing reads was HIGH.",
            "contact1b-tabular-vae_log_variance": "A clamp that a third of the elements pass, whole.",
        },
    ),
    Round(
        name="contact2",
        date="2026-11-29",
        sick=20,
        healthy=10,
        found=17,
        cause=16,
        alarms_healthy=0,
        alarms_repaired=2,
        missed={
            "contact2a-kd-pooled_normalised_map": "Told as VANISHING, which it is too.",
            "contact2a-control-long_horizon": "A simulator's steps may sum and fan out, and that was taken "
            "for the reason why the gradient grows.",
            "contact2b-hypernet-init": "Weights that a layer generates are no weights of a layer.",
        },
        alarmed={
            "contact2a-text-reentrant_checkpoint": "A crash: a gradient asked through such a checkpoint.",
            "contact2a-control-long_horizon": "A rectifier beside a waist was taken for one on it.",
        },
    ),
    Round(
        name="contact3",
        date="2026-11-29",
        sick=20,
        healthy=10,
        found=13,
        cause=13,
        alarms_healthy=0,
        alarms_repaired=2,
        missed={
            "contact3a-retrieval-splade_regularizer": "A last rectifier was taken for a hinge.",
            "contact3a-speech-linear_durations": "A head's scale was judged when steps had made it large.",
            "contact3a-protein-equivariant_moves": "Told as UNSTABLE, which it is too; growth along moved "
            "coordinates had to rise at every block.",
            "contact3b-field-pixels": "Told as EXPLODING; the rise of the gradient comes later in the run.",
            "contact3b-lstm-mape": "Errors divided by 1e-8: to a verdict that must not change with the scale "
            "of the loss, a loss like others.",
            "contact3b-mtl-zero-hinge": "Twenty steps end before it begins.",
            "contact3b-triplet-hardest": "One output, of which a loss compares the rows, was not looked at.",
        },
        alarmed={
            "contact3b-lsq-pruned": "A batch norm over pruned filters, which learns all the same.",
            "contact3b-focal-root": "Bytes into a sigmoid at its ends; the label takes it for repaired.",
        },
    ),
    Round(
        name="contact4",
        date="2026-11-29",
        sick=12,
        healthy=8,
        found=6,
        cause=6,
        alarms_healthy=1,
        alarms_repaired=0,
        missed={
            "contact4a-lm-unscaled_head": "Told as EXPLODING, at that layer.",
            "contact4a-segmentation-dice_threshold": "Refused: the loss carries no gradient.",
            "contact4a-contrastive-no_spread_term": "A collapse to a seventh of the signal, not to a tenth.",
            "contact4b-vq-normal_codebook": "Codes that are buffers and not parameters are not looked at.",
            "contact4b-tabular-negative_scale": "A loss that falls without end looks like a learned one.",
            "contact4b-meta-inner_loop_by_data": "Refused: the model copies its layers, and none is called.",
        },
        alarmed={
            "contact4b-rnn-late_evidence": "A memory that fades, where nothing early is asked for.",
        },
    ),
    Round(
        name="contact5",
        date="2026-11-29",
        sick=20,
        healthy=12,
        found=13,
        cause=11,
        alarms_healthy=0,
        alarms_repaired=1,
        missed={
            "contact5a-ssm-stepinit": "A state that forgets within a step, along an axis of time.",
            "contact5a-tabular-constant": "Errors divided by a tiny constant, at the loss.",
            "contact5a-quantised-stepsize": "A step size that steps throw about is one number among many.",
            "contact5b-agent-unsquashed-action": "Told as SATURATION, which it is too.",
            "contact5b-ranking-own-target": "It begins after step 20.",
            "contact5b-detection-same-memory": "All queries get the same features: rows of one sample alike.",
            "contact5b-torsion-score-norm": "Told as UNSTABLE, at the head.",
        },
        alarmed={
            "contact5a-moe-routerlogits": "An expert that a repaired router still does not choose.",
        },
    ),
    Round(
        name="contact6",
        date="2026-11-30",
        sick=22,
        healthy=13,
        found=17,
        cause=13,
        alarms_healthy=1,
        alarms_repaired=2,
        missed={
            "contact6a-operator-init": "Steps of their own size had made the gradient larger by the end of "
            "the run, although nothing was learned by then.",
            "contact6a-letters-own_adam": "A loss that leaves in the last few steps was looked at as a "
            "median of the last third.",
            "contact6b-words-raw-embedding": "A head with another layer's weight was not taken for a head.",
            "contact6b-masks-of-255": "The targets that a loss is given were not looked at.",
            "contact6b-views-without-stop": "A collapse to one direction, where lengths differ, was unseen.",
        },
        alarmed={
            "contact6a-render-crisp": "A sigmoid at its ends that lets enough through to learn by.",
            "contact6a-render-sigma": "As the other renderer.",
            "contact6a-molecule-size": "One lucky batch early in the run made the next ones look like jumps.",
        },
    ),
    Round(
        name="contact7",
        date="2026-11-30",
        sick=22,
        healthy=12,
        found=18,
        cause=17,
        alarms_healthy=0,
        alarms_repaired=1,
        missed={
            "contact7a-matching-timestep": "An embedding of rank one, whose rows still differ a little.",
            "contact7a-medical-onevoxel": "A norm over one number gives rounding noise, not zeros.",
            "contact7b-llm-topone": "A weight divided by itself leaves rounding noise for a gradient.",
            "contact7b-vae-klsum": "A posterior that has collapsed when the run begins.",
        },
        alarmed={
            "contact7b-llm-stoppenalty": "A head that is loud by its training was taken for one made so.",
        },
    ),
    Round(
        name="contact8",
        date="2026-11-30",
        sick=22,
        healthy=12,
        found=16,
        cause=17,
        alarms_healthy=0,
        alarms_repaired=1,
        missed={
            "contact8a-forecast-nbeats": "Named as the cause, but LOW: a last round that nothing reads.",
            "contact8a-weather-cells": "Rows of one cell get one output, which is measured nowhere.",
            "contact8a-graph-hydra": "Told as BOTTLENECK, which it is too.",
            "contact8b-sentences-positives": "Embeddings that are alike, but not yet one and the same.",
            "contact8b-detection-yolobox": "Told as UNSTABLE, at that layer; EXPLODING in the backbone.",
            "contact8b-distillation-temperature": "Steps of SGD on a loss so small teach next to nothing: to "
            "verdicts that must not change with the scale of the loss, a loss like others.",
        },
        alarmed={
            "contact8b-faces-arcface": "Scores that a margin head makes loud by its own scale.",
        },
    ),
    Round(
        name="contact9",
        date="2026-11-30",
        sick=22,
        healthy=12,
        found=19,
        cause=16,
        alarms_healthy=1,
        alarms_repaired=2,
        missed={
            "contact9a-worldmodel-latents": "A clamp at its bounds for most elements, in a loss that falls.",
            "contact9b-lm-draftmodel": "Updates of norm weights that bfloat16 rounds away are few.",
            "contact9b-anomaly-ocnn": "A loss that falls in a straight line, for want of a floor.",
        },
        alarmed={
            "contact9a-healthy-perturbation": "A tanh that is driven to the bound it is there for.",
            "contact9b-lora-mtpblock": "A frozen part of zeros that nothing trainable depends on.",
            "contact9b-diffusion-adaln": "Rows that are large, and that nothing reads.",
        },
    ),
    Round(
        name="contact10",
        date="2026-11-30",
        sick=14,
        healthy=10,
        found=8,
        cause=6,
        alarms_healthy=2,
        alarms_repaired=0,
        missed={
            "contact10a-recsys-embedding-size": "Told as SATURATION, at that layer.",
            "contact10a-robot-action-units": "Targets a thousand times the outputs, in a loss that falls.",
            "contact10a-bytes-sequence-pooling": "Rows that are alike but for an eighth.",
            "contact10b-peft-dora": "Told at the projection beside the one that it is born at.",
            "contact10b-gan-critic": "A critic whose loss has no floor: two calls of a head may pull apart.",
            "contact10b-frames-indrnn": "A memory that fades through operations, to a ten-thousandth.",
        },
        alarmed={
            "contact10a-pruning-ticket": "Rows of weights that are pruned away by a mask.",
            "contact10b-rendering-vgg": "A frozen network of features, for a part that amplifies.",
        },
    ),
    Round(
        name="contact11",
        date="2026-11-30",
        sick=34,
        healthy=18,
        found=29,
        cause=29,
        alarms_healthy=1,
        alarms_repaired=3,
        missed={
            "contact11a-autovc-neck": "Told at the encoder, as a remark.",
            "contact11a-lstm-forgetbias": "Told at the recurrent layer, as a remark.",
            "contact11a-bpr-sum": "A log-sigmoid in the loss, at its flat end as a whole: the loss's own "
            "activations were not looked at.",
            "contact11b-protonet-scale": "A softmax in the loss that is one-hot from the start.",
            "contact11b-maml-clip": "Told as UNSTABLE, behind the steps of the inner loop.",
        },
        alarmed={
            "contact11a-llamapro-norm": "A block whose inputs a zeroed norm makes small.",
            "contact11a-distill-reverse": "A head that a divergence between near equals hardly pulls.",
            "contact11a-reward-logsigmoid": "A leap of the first steps that heals.",
            "contact11b-realnvp-nats": "A likelihood of some thousand nats that wavers as it falls.",
        },
    ),
    Round(
        name="contact12",
        date="2026-11-30",
        sick=34,
        healthy=18,
        found=29,
        cause=26,
        alarms_healthy=0,
        alarms_repaired=1,
        missed={
            "contact12a-render-pose": "A guarded norm whose slope is exactly zero where all starts: told as "
            "a remark, of the whole model.",
            "contact12a-capsule-votes": "Lengths that a squash of vectors, made by operations, brings to 1.",
            "contact12b-lm-master": "Steps that rounding of bfloat16 swallows, for most of the entries.",
            "contact12b-deepsurv-events": "A loss that is divided by a sum near zero, of either sign.",
            "contact12b-isqf-knots": "Told as VANISHING, at that layer.",
        },
        alarmed={
            "contact12a-hyper-surface": "A loss that leaps in the first steps of a hypernetwork, and heals.",
        },
    ),
    Round(
        name="contact13",
        date="2026-11-30",
        sick=28,
        healthy=16,
        found=19,
        cause=18,
        alarms_healthy=0,
        alarms_repaired=2,
        missed={
            "contact13a-halfprecision-mean": "A count that overflows in half precision, and a loss of zero: "
            "told as DEAD, without the overflow.",
            "contact13a-adapter-ramp": "A factor that ramps up from zero over a thousand steps.",
            "contact13a-optimizer-layerdecay": "Rates that fall to nothing within the steps seen.",
            "contact13a-lm-newword": "Told as EXPLODING, at that layer.",
            "contact13a-recommender-shrunk": "Vectors that weight decay shrinks to nothing.",
            "contact13a-rl-target": "Targets that run away later; for twenty steps the loss only stays high.",
            "contact13b-vision-selective": "Two scores of one layer, whose softmax is always a half: "
            "gradients that are rounding beside their parts.",
            "contact13b-metric-hardest": "Embeddings that are pulled together over twenty steps.",
            "contact13b-autograd-total": "A backward pass, written by hand, that ignores what comes in.",
        },
        alarmed={
            "contact13a-preference-exponential": "A sigmoid in the loss at its flat end: all is learned.",
            "contact13a-speech-codebook": "Logits of a contrastive loss that are sharp and right.",
        },
    ),
    Round(
        name="contact14",
        date="2026-11-30",
        sick=28,
        healthy=16,
        found=15,
        cause=14,
        alarms_healthy=2,
        alarms_repaired=2,
        missed={
            "contact14a-superres-everybatch": "A rate that falls by tens, step by step and not all the way.",
            "contact14a-detection-anchors": "One head of three that gets a two-hundredth of the gradient.",
            "contact14a-questions-padded": "Told as BOTTLENECK, at that layer.",
            "contact14a-graph-isolated": "Told of the model, not of the module in which it is born.",
            "contact14a-video-hidden": "A cell that is handed a state of zeros in every step.",
            "contact14a-rl-temperature": "A temperature that grows steadily: its target is out of reach.",
            "contact14a-reid-collapsed": "Embeddings that have come together under a soft margin.",
            "contact14b-quant-inplace": "A model that writes rounded numbers over its own weights.",
            "contact14b-qat-bounds": "Weights at the bound of a function whose slope is zero there.",
            "contact14b-margin-forgotten": "Named as the cause, but as a remark.",
            "contact14b-adapter-loud": "New parts beside frozen ones that start loud.",
            "contact14b-pinn-weight": "Told as SATURATION, of a tanh behind large coordinates.",
            "contact14b-critic-spectral": "Told as DEAD: what fades was taken for rounding.",
        },
        alarmed={
            "contact14a-healthy-warmup": "A rate of zero at the first step.",
            "contact14a-healthy-switch": "An expert that no token has chosen so far.",
            "contact14a-experts-unbalanced": "The same.",
            "contact14b-pinn-weight": "A tanh that large coordinates saturate.",
        },
    ),
    Round(
        name="contact15",
        date="2026-11-30",
        sick=28,
        healthy=16,
        found=20,
        cause=18,
        alarms_healthy=1,
        alarms_repaired=1,
        missed={
            "contact15a-series-encoder": "A deep encoder without norms, whose gradient comes back by the "
            "thirtieth step.",
            "contact15a-vision-fusion": "Named as the cause, as a remark: numbers that no optimizer has.",
            "contact15a-vision-slow": "A rate of 1e-8, told as VANISHING of a head of zeros.",
            "contact15b-recurrent-share": "Told at the recurrent layer, as a remark.",
            "contact15b-regression-uniform": "A deep plain stack that starts small, behind an adaptive rate.",
            "contact15b-embedding-zero": "Rows of zeros that are normalised: gradients of 1e12, which an "
            "adaptive rate takes.",
            "contact15b-speech-warmup": "A rate that warms up to far too much.",
            "contact15b-contrastive-rate": "A rate of 1, at which the loss stays that of guesses.",
        },
        alarmed={
            "contact15a-healthy-ratio": "A policy whose ratio is exactly one: outputs alike for all samples.",
            "contact15b-gan-tanh": "Pictures of every scale that are added up, for parts off scale.",
        },
    ),
    Round(
        name="contact16",
        date="2026-11-30",
        sick=28,
        healthy=16,
        found=14,
        cause=16,
        alarms_healthy=1,
        alarms_repaired=1,
        missed={
            "contact16a-transformer-twosoftmax": "Told as SATURATION, of the head.",
            "contact16a-transformer-onefeature": "Told as DEAD: a norm over one feature gives zeros.",
            "contact16a-detection-headless": "Named as the cause, as a remark: a head that no optimizer has.",
            "contact16a-detection-samebox": "Queries that are copies, of a model that guesses.",
            "contact16a-distil-loudfeatures": "A term of features that swamps two others.",
            "contact16a-medical-voxels": "Named as the cause, as a remark: a term in voxels.",
            "contact16a-value-ownsteps": "Named as the cause, as a remark: values that run after themselves.",
            "contact16a-sparse-denseinit": "Sparse rows that are drawn as if they were dense.",
            "contact16b-seq2seq-padstate": "Told as SATURATION of the encoder, whose gates padding drives.",
            "contact16b-text-twosoftmax": "Told at the head in front of the softmax.",
            "contact16b-sae-deadfeatures": "Features that a rate too high puts out within twenty steps.",
            "contact16b-bnn-allplus": "Signs that are all one, behind a rectifier.",
            "contact16b-memory-diverges": "Told at the head behind the memory.",
            "contact16b-norm-rsqrt": "Told at the head behind blocks that multiply.",
        },
        alarmed={
            "contact16b-healthy-oldrows": "Rows of a head for classes that are no longer asked for.",
            "contact16b-continual-oneclass": "The same.",
        },
    ),
)
