"""The page docs/remedies_measured.md, from the rows of `remedies.py`; and what no fix from outside mends."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

WIRE = "its forward pass has to use what it leaves out, or to pass on something else"
LOSS = "its loss, or a term of it, has to be another one"
DATA = "its data, targets or masks have to be others"
CHOICE = "a hard choice, or code outside of PyTorch, has to become another computation"

# Faults that cannot be mended by changing weights, modules, operations, batches or the optimizer: told by
# what repairs the labelled model, before anything was tried.
_MODELS: dict[str, str] = {
    WIRE: """
        mlp-deep-branch-never-called cnn-loss-on-side-output cnn-attention-pool-over-one
        cnn-instance-norm-after-pooling transformer-positions-never-added moe-router-only-chooses
        moe-early-exit-never-taken finetune-alpha-over-rank-in-integers
        finetune-wrapped-layer-not-the-one-called finetune-prompt-hidden-by-mask
        diffusion-condition-always-dropped contact1a-lm-top1gate contact1a-forecast-revin
        contact2b-anomaly-memory contact2b-hetero-source contact4b-meta-inner_loop_by_data
        timesfm-522-scale-not-guarded-on-the-way-back contact5a-moe-topone contact5a-series-quiescent
        contact5b-detection-same-memory contact6b-views-without-stop contact7b-rnn-lastframe
        contact7b-llm-topone contact8a-forecast-nbeats contact8a-weather-cells contact8a-flow-solver
        contact9a-tts-speaker contact10a-bytes-sequence-pooling contact11a-lora-fusedhead
        contact11a-beat-tcn contact11a-lama-pooling contact11b-stn-picture contact11b-segnet-decoders
        contact12a-robot-chunks contact12b-attn-qknorm contact13a-adapter-ramp contact13a-question-attention
        contact13b-vision-selective contact13b-speech-frontend contact13b-segmentation-pyramid
        contact13b-graph-complete contact13b-forecast-states contact14a-translation-onepixel
        contact14a-questions-padded contact14a-video-hidden contact14b-quant-inplace contact14b-session-dict
        contact14b-hyper-rate
        contact15b-speech-targets contact15b-quantisation-calibrating contact15b-recurrent-share
        contact16a-transformer-onefeature contact16a-detection-samebox contact16b-seq2seq-padstate
        contact16b-norm-rsqrt contact16b-memory-diverges contact16b-maml-innerrate contact16b-bnn-allplus
    """,
    LOSS: """
        moe-experts-without-tokens rl-log-probabilities-from-the-buffer rl-ratios-all-clipped
        rl-weights-without-a-cap finetune-distilled-from-the-wrong-side detection-boxes-that-never-meet
        diffusion-weight-without-bound contact1a-latent-codebook contact1a-forecast-jepa
        contact1b-generative-vq_latent_action contact1b-rl-leaking_actor_loss
        contact1b-contrastive-hardest_triplet contact2a-kd-pooled_normalised_map contact2b-world-collapse
        contact3a-vit-jepa_no_target contact3a-retrieval-splade_regularizer
        contact3a-speech-linear_durations contact3b-detect-disjoint contact3b-lstm-mape
        contact3b-mtl-zero-hinge contact3b-triplet-hardest contact4a-contrastive-no_spread_term
        contact4b-tabular-negative_scale so-31880720-one-unit-softmax
        olaf-world-8-codebook-loss-on-wrong-tensor ml-agents-2897-rare-huge-reward
        vjepa2-109-embeddings-collapse rq-vae-65-codebook-collapse aidotnet-1844-penalty-without-a-graph
        gan-discriminator-has-won contact5a-speech-selfdistilled contact5a-recsys-semanticid
        contact5a-tabular-constant contact5b-agent-unsquashed-action contact5b-ranking-own-target
        contact6b-game-clipped-error contact7a-vocoder-mel contact7b-vae-klsum contact8b-sentences-positives
        contact8b-energy-divergence contact8b-multitask-newtensor contact9b-crl-energy
        contact9b-anomaly-ocnn contact10b-rlhf-grpo contact11a-dqn-targetrate contact11a-bpr-sum
        contact11a-reward-nolog contact11b-arcface-clamp contact11b-vaecv-beta contact12a-frames-latent
        contact13a-preference-exponential contact13a-halfprecision-mean contact13a-rl-target
        contact13b-embedding-coincide contact13b-metric-hardest contact13b-autograd-total
        contact14a-rl-temperature contact14a-experts-unbalanced contact14a-distillation-sum
        contact14a-reid-collapsed contact14b-dpo-beta contact14b-pinn-weight
        contact16a-distil-loudfeatures contact16a-value-ownsteps
    """,
    DATA: """
        mlp-insurance-claims transformer-loss-mask-all-zero detection-logarithm-of-a-width
        contact4a-speech-crowded_utterances fairseq-3753-every-alignment-impossible contact6b-masks-of-255
        contact7a-gan-batchstd contact9a-survival-stays contact12a-animals-keypoints
        contact12b-deepsurv-events contact12b-botnet-norm contact13b-vae-pixels contact14b-sft-truncated
        contact14a-detection-anchors
        contact15a-lm-truncated contact16a-tabular-gaps contact16b-batchnorm-single
        contact16b-continual-oneclass
    """,
    CHOICE: """
        cnn-pooled-in-numpy rnn-hard-choice-between-parts detection-peak-by-argmax
        detection-score-only-compared contact1b-medical-nearest_warp contact2a-motion-rounded_forward_warp
        contact4a-segmentation-dice_threshold pytorch-1339-argmax-between-modules
        contact5b-dream-sampled-action contact9a-linearattention-anchor contact9a-text-residual
        contact11b-silhouette-order contact14a-registration-nearest
        contact15b-recommender-bag contact16b-moe-threshold
    """,
}
CANNOT = {id: why for why, ids in _MODELS.items() for id in ids.split()}
_ORDER = ("cures", "helps", "no effect", "harms", "not applicable")

Row = Mapping[str, Any]


def page(rows: Sequence[Row], before: str = "", missing: Sequence[str] = ()) -> str:
    """Return the page.

    Args:
        rows: what was measured.
        before: the page as it is: parts of which no row tells anything stay as they are there.
        missing: the models that have no row, and are named as such.
    """
    sick = [row for row in rows if row["kind"] == "sick"]
    healthy = [row for row in rows if row["kind"] == "healthy"]
    mendable = [row for row in sick if row["id"] not in CANNOT]
    parts = [
        _HEAD,
        _figures(sick, mendable),
        _missing(missing),
        _false(healthy) or _kept(before, "## False verdicts"),
        _costs([row for row in rows if row["kind"] == "cost"]) or _kept(before, "## Cost"),
        _cases(mendable),
        _cannot(sick),
        _failed([row for row in rows if row["kind"] == "failed"]),
    ]
    return "\n".join(part for part in parts if part)


_HEAD = """# Remedies, measured

What trying fixes does, on models whose fault is known: those of the zoo (`benchmarks/verdicts/zoo`), and of
labelled cases from outside this project. All figures are printed by

```
python benchmarks/remedies.py run ROWS.jsonl --cases FOLDER ...
python benchmarks/remedies.py run ROWS.jsonl --healthy
python benchmarks/remedies.py cost ROWS.jsonl
python benchmarks/remedies.py write ROWS.jsonl
```

A sick model is diagnosed in 20 steps, and for each of the first two causes of its report the fixes that
`gradflow.try_remedies` chooses are tried: 50 steps, three seeds, at most 2,000 steps a model. *Like its
twin* means that the loss comes to within ten percent of that of the repaired model after as many steps, of
that loss or of how far it fell.
What the verdicts mean, and how they are reached: [remedies.md](remedies.md).
"""


def _kept(before: str, title: str) -> str:
    """Return a part of the page as it was."""
    _, found, rest = before.partition(f"{title}\n")
    return f"{title}\n{rest.partition(chr(10) + '## ')[0]}".rstrip() + "\n" if found else ""


def _missing(ids: Sequence[str]) -> str:
    if not ids:
        return ""
    return (
        f"{len(ids)} sick models have not been run with the remedies as they are now, and are in none of "
        f"these figures: {', '.join(ids)}.\n"
    )


def best_of(row: Row) -> Mapping[str, Any] | None:
    """Return the trial that came out best for a model."""
    tried = [t for t in row.get("trials", ()) if t["verdict"] != "not applicable"]
    return min(tried, key=_place, default=None)


def _place(trial: Mapping[str, Any]) -> tuple[int, int, float]:
    loss = trial["with"]
    return _ORDER.index(trial["verdict"]), -trial["seeds"], loss if math.isfinite(loss) else math.inf


def first_helps(row: Row) -> bool | None:
    """Return whether the first recommended action helps; None where it is not one that can be tried."""
    first = [t for t in row.get("trials", ()) if t["remedy"] in row.get("first", ())]
    tried = [t for t in first if t["verdict"] != "not applicable"]
    return any(t["verdict"] in ("cures", "helps") for t in tried) if tried else None


def like_twin(row: Row) -> bool | None:
    """Return whether a remedy brings the loss to that of the repaired model; None without one."""
    twin, tried = row.get("twin", math.nan), row.get("trials", ())
    if not math.isfinite(twin) or not tried:
        return None
    for trial in tried:
        start, loss = trial["start"], trial["with"]
        room = max(abs(twin), abs(start - twin) if math.isfinite(start) else 0.0)
        if loss <= twin + 0.1 * room:
            return True
    return False


def _share(values: Sequence[Any]) -> str:
    known = [bool(value) for value in values if value is not None]
    return f"{sum(known)} of {len(known)} ({sum(known) / len(known):.0%})" if known else "none"


def _figures(sick: Sequence[Row], mendable: Sequence[Row]) -> str:
    groups = list(dict.fromkeys(row["group"] for row in sick))
    lines = [
        "## Sick models",
        "",
        "Of those whose fault can be mended from outside of the code; the others are listed below.",
        "",
        "|  | models | a remedy cures | cures or helps | like its twin | the first action helps |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for group in (*groups, "all"):
        rows = [row for row in mendable if group in ("all", row["group"])]
        best = [best_of(row) for row in rows]
        lines.append(
            f"| {group} | {len(rows)} | {_share([b is not None and b['verdict'] == 'cures' for b in best])} "
            f"| {_share([b is not None and b['verdict'] in ('cures', 'helps') for b in best])} "
            f"| {_share([like_twin(row) for row in rows])} | {_share([first_helps(row) for row in rows])} |"
        )
    every = [row for row in sick if row.get("trials")]
    useless = sum(first_helps(row) is False for row in every)
    tried = sum(first_helps(row) is not None for row in every)
    lines += [
        "",
        f"Of all {len(sick)} sick models, those that cannot be mended from outside included, the first "
        f"action of the report could be tried in {tried}; it was of no use in {useless} of them.",
        "",
        "What the first action does, by the type of the first cause:",
        "",
        "| type | tried | helps |",
        "| --- | ---: | ---: |",
    ]
    for kind in dict.fromkeys(row["causes"][0][0] for row in mendable if row.get("causes")):
        values = [first_helps(row) for row in mendable if row.get("causes") and row["causes"][0][0] == kind]
        known = [value for value in values if value is not None]
        if known:
            lines.append(f"| {kind} | {len(known)} | {sum(known)} |")
    return "\n".join([*lines, ""])


def _false(healthy: Sequence[Row]) -> str:
    if not healthy:
        return ""
    lines = [
        "## False verdicts",
        "",
        "Healthy models on which extreme thresholds force a verdict. *No effect* is what trials should say; "
        "the best remedy of each counts, harm included.",
        "",
        "| verdict forced | tried | no effect or harm | a remedy seems to help |",
        "| --- | ---: | ---: | ---: |",
    ]
    kinds = list(dict.fromkeys(row["id"].rpartition("/")[2] for row in healthy))
    told = [(row["id"].rpartition("/")[2], best_of(row)) for row in healthy]
    for kind in (*kinds, "all"):
        best = [b for k, b in told if kind in ("all", k)]
        tried = [b for b in best if b is not None]
        helps = [b["verdict"] in ("cures", "helps") for b in tried]
        lines.append(f"| {kind} | {len(tried)} | {_share([not h for h in helps])} | {sum(helps)} |")
    return "\n".join([*lines, ""])


def _costs(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    lines = [
        "## Cost",
        "",
        "Processor time of the trials of four remedies, over that of as many plain steps of training "
        "(forward and backward pass, loss, and the step of Adam), one thread. What a run adds once (the "
        "account of reach, the looks, the record) weighs on a network whose steps are short.",
        "",
        "| network | plain step, ms | steps run | trials / plain steps |",
        "| --- | ---: | ---: | ---: |",
    ]
    for row in rows:
        lines.append(f"| {row['what']} | {row['plain']:.1f} | {row['steps']} | {row['ratio']:.2f} |")
    return "\n".join([*lines, ""])


def _cases(rows: Sequence[Row]) -> str:
    lines = [
        "## Model by model",
        "",
        "| model | first cause | best remedy | verdict | loss without | with | repaired |",
        "| --- | --- | --- | --- | ---: | ---: | ---: |",
    ]
    for row in rows:
        best = best_of(row)
        cause = " in ".join(row["causes"][0]) if row.get("causes") else "none found"
        twin = _number(row.get("twin", math.nan))
        if best is None:
            lines.append(f"| {row['id']} | {cause} | none could be tried |  |  |  | {twin} |")
            continue
        lines.append(
            f"| {row['id']} | {cause} | {best['remedy']} | {best['verdict']} | {_number(best['without'])} "
            f"| {_number(best['with'])} | {twin} |"
        )
    return "\n".join([*lines, ""])


def _number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "not finite"


def _cannot(sick: Sequence[Row]) -> str:
    here = {row["id"] for row in sick}
    lines = ["## What cannot be mended from outside of the code", ""]
    for reason in dict.fromkeys(CANNOT.values()):
        ids = [id for id, why in CANNOT.items() if why == reason and id in here]
        if ids:
            lines.append(f"- {reason[0].upper()}{reason[1:]}: {', '.join(ids)}.")
    return "\n".join([*lines, ""])


def _failed(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    lines = ["## What could not be run", "", *(f"- {row['id']}: {row['error']}" for row in rows)]
    return "\n".join([*lines, ""])
