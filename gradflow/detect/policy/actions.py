"""What to change in a policy: recommended actions for each of its illnesses, most likely cure first."""

from __future__ import annotations

from collections.abc import Sequence

from gradflow.records import ActionDistribution, FlowRecord

Actions = tuple[str, ...]


def sure_actions(record: FlowRecord, *, fell: bool) -> Actions:
    """For a policy that is sure of its actions too soon."""
    rates = ", ".join(f"{r:.3g}" for r in record.provenance.learning_rates)
    if fell:
        return (
            "Reward entropy: subtract 0.01 times the mean entropy from the loss, and more while it falls.",
            f"Lower the learning rate of {record.provenance.optimizer or 'the optimizer'}"
            + (f" ({rates})" if rates else "")
            + ", or limit the change of the policy in one update: PPO's ratio, a KL divergence.",
            "Standardise the advantages of a batch: large ones push the policy to a corner in a few steps.",
        )
    return (
        "Start near uniform: nn.init.orthogonal_(policy_head.weight, gain=0.01), and a bias of zero.",
        "Standardise the observations: large ones make large logits.",
        "Reward entropy: subtract about 0.01 times the mean entropy from the loss.",
    )


def dominance_actions(value: str, policy: str, ratio: float) -> Actions:
    """For a value whose gradient leaves the policy no say."""
    return (
        "Scale the rewards so that returns are of size one (by a running standard deviation): the errors of "
        f"{value} shrink with them.",
        f"Or weigh the value's loss by less, here about {max(ratio / 1e-2, 1e-9):.1e} of its weight.",
        f"Or give {policy} layers of its own, or detach the shared ones from the value.",
    )


def conflict_actions(policy: Sequence[str], value: Sequence[str]) -> Actions:
    """For gradients of policy and value that oppose each other."""
    return (
        f"Give {', '.join(policy)} and {', '.join(value)} layers of their own instead of the shared ones.",
        "Or let one of them lead: a smaller weight on the value's loss, or a detach.",
    )


def starved_actions(*, reached: bool) -> Actions:
    """For a policy that gets no gradient."""
    if reached:
        return (
            "Look at the advantages: all zero teaches nothing. Rewards may never vary within a batch.",
            "With PPO, look at the ratios: all beyond the clip teaches nothing. Use fewer epochs per rollout "
            "or a lower learning rate.",
        )
    return (
        "Compute the log probabilities of the actions from the policy's present output, within the loss: "
        "Categorical(logits=logits).log_prob(actions). Those stored when acting are constants.",
        "Use log_prob of a sampled action, or rsample; argmax and sample carry no gradient.",
        "Remove detach() and no_grad() between the policy and the loss.",
    )


def narrow_actions(d: ActionDistribution) -> Actions:
    """For a standard deviation that is next to zero."""
    where = ", ".join(d.parameters) or "the log of the standard deviation"
    return (
        f"Bound {where} from below: torch.clamp(log_std, min=-5), or a softplus plus a constant.",
        "Start at a standard deviation of about half the range of the actions, and reward entropy.",
    )


def wide_actions(d: ActionDistribution) -> Actions:
    """For a standard deviation that drowns the actions."""
    where = ", ".join(d.parameters) or "the log of the standard deviation"
    return (
        f"Bound {where} from above: torch.clamp(log_std, max=2).",
        "Weigh the entropy bonus by less; with a learned temperature, look at its target entropy.",
        "Standardise the action space to [-1, 1].",
    )


def twice_actions() -> Actions:
    """For probabilities that are taken for logits."""
    return ("Pass them as probabilities, Categorical(probs=...), or drop the network's softmax.",)
