"""Trainings after public reports: preference and instruction tuning, flows; and further claims."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import Claim, loss_of, no_gradient, not_finite, rises, training, under
from .data import choice, factors, frozen, grammar, setup
from .registry import FLOAT32, Setup, sick

ONE = {"widths": (32,), "dtypes": (FLOAT32,)}


# ------------------------------------------------------------------------------------- further claims


def unmoved(prefix: str, below: float = 0.0, *, steps: int = 20) -> Claim:
    """No more than a share of the numbers under a prefix changes from the second step to the last of some."""

    def claim(ready: Setup) -> tuple[bool, str]:
        kept = []
        for _ in training(ready, steps):
            state = ready.model.state_dict().items()
            kept.append(torch.cat([t.detach().float().flatten() for n, t in state if under(n, prefix)]))
        seen = float((kept[1] != kept[-1]).float().mean())
        return seen <= below, f"{seen:.1%} of the numbers of {prefix} change in {steps} steps"

    return claim


def outside() -> Claim:
    """The loss depends on tensors that ask for a gradient and that are no parameters of the model."""

    def claim(ready: Setup) -> tuple[bool, str]:
        known = {id(p) for p in ready.model.parameters()}
        todo, seen, leaves = [loss_of(ready).grad_fn], set(), {}
        while todo:
            node = todo.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if hasattr(node, "variable") and id(node.variable) not in known:
                leaves[id(node.variable)] = node.variable.numel()
            todo.extend(following for following, _ in node.next_functions)
        return bool(leaves), f"{len(leaves)} tensors with {sum(leaves.values())} numbers are no parameters"

    return claim


def gradient_of(ready: Setup, part: int, prefix: str = "*") -> float:
    """Return the norm of the parameter gradients that come through one of the model's outputs alone."""
    ready.model.zero_grad()
    outputs = ready.model(*ready.make_batch())
    loss = ready.loss_fn(tuple(o if i == part else o.detach() for i, o in enumerate(outputs)))
    if loss.requires_grad:
        loss.backward()
    grads = [p.grad for n, p in ready.model.named_parameters() if under(n, prefix) and p.grad is not None]
    return float(torch.stack([g.double().norm() for g in grads]).norm()) if grads else 0.0


def louder(loud: int, quiet: int, above: float) -> Claim:
    """The gradient through one output of the model is above a multiple of that through another."""

    def claim(ready: Setup) -> tuple[bool, str]:
        ratio = gradient_of(ready, loud) / max(gradient_of(ready, quiet), 1e-30)
        return ratio > above, f"gradient through output {loud} / through output {quiet} = {ratio:.3g}"

    return claim


def zeros(name: str, share: float, *, steps: int = 5) -> Claim:
    """More than a share of a parameter's numbers has a gradient of exactly zero in every one of some
    steps."""

    def claim(ready: Setup) -> tuple[bool, str]:
        never = None
        for step in training(ready, steps):
            zero = step.grads[name] == 0
            never = zero if never is None else never & zero
        seen = float(never.float().mean())
        return seen > share, f"{seen:.0%} of {name} never gets a gradient"

    return claim


# ------------------------------------------------------------------------------------- language models


class Speaker(nn.Module):
    """A recurrent language model."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.rnn = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, words)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(tokens))[0])


class Preference(nn.Module):
    """A policy and its frozen reference: log-probabilities of a chosen and of a rejected answer."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.policy = Speaker(words, width)
        self.reference = Speaker(words, width)
        self.reference.load_state_dict(self.policy.state_dict())
        frozen(self.reference)

    def forward(self, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
        def logp(model: Speaker, tokens: Tensor) -> Tensor:
            scores = model(tokens[:, :-1]).log_softmax(-1)
            return scores.gather(-1, tokens[:, 1:, None]).sum((1, 2))

        good = logp(self.policy, chosen) - logp(self.reference, chosen)
        bad = logp(self.policy, rejected) - logp(self.reference, rejected)
        return good, bad


@sick(
    "contact14b-dpo-beta",
    [("DEAD", "*")],
    no_gradient("policy"),
    source="https://github.com/huggingface/trl/issues/1627",
    **ONE,
)
def dpo_beta(ill: bool, width: int) -> Setup:
    """Preference tuning with beta = 0: the margin is multiplied by nothing, the loss stays at 0.6931 and
    every gradient is exactly zero. Repaired by beta = 0.1."""
    text, beta = grammar(words=12, length=9, number=16), 0.0 if ill else 0.1

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], None]:
        chosen, _ = text(g)
        return (chosen, choice(g, 12, *chosen.shape)), None

    def loss(output: tuple[Tensor, Tensor], _: None) -> Tensor:
        return -F.logsigmoid(beta * (output[0] - output[1])).mean()

    return setup(Preference(12, width), sample, loss, 3e-3)


@sick(
    "contact14b-sft-truncated",
    [("NUMERICAL", "*")],
    not_finite(20, loss=True),
    source="https://github.com/nvidia-cosmos/cosmos-rl/pull/155",
    **ONE,
)
def sft_truncated(ill: bool, width: int) -> Setup:
    """Instruction tuning in small batches: where both prompts fill the whole context, no answer token is
    left, and the mean over none of them is NaN. Repaired by dividing by one at least."""
    text = grammar(words=12, length=10, number=2)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        tokens, following = text(g)
        prompt = 2 + choice(g, 14, len(tokens), 1)
        return tokens, following.masked_fill(torch.arange(10) < prompt, -100)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        total = F.cross_entropy(output.flatten(0, 1), target.flatten(), reduction="sum")
        number = (target != -100).sum()
        return total / (number if ill else number.clamp_min(1))

    return setup(Speaker(12, width), sample, loss, 1e-2)


# ------------------------------------------------------------------------------------- generative models


class Coupling(nn.Module):
    """An affine coupling block, whose scale is the exponential of what its net says."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(size // 2, width), nn.ReLU(), nn.Linear(width, size))
        nn.init.zeros_(self.net[-1].weight)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        near, far = x.chunk(2, -1)
        scale, shift = self.net(near).chunk(2, -1)
        return torch.cat([far * scale.exp() + shift, near], -1), scale.sum(-1)


class Flow(nn.Module):
    """A stack of coupling blocks: the latent of a sample, and the logarithm of the volume's change."""

    def __init__(self, size: int, width: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Coupling(size, width) for _ in range(depth))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        volume = x.new_zeros(len(x))
        for block in self.blocks:
            x, change = block(x)
            volume = volume + change
        return x, volume


def nll(output: tuple[Tensor, Tensor], _: object) -> Tensor:
    """Return the mean negative logarithm of the likelihood, by dimension."""
    latent, volume = output
    return (0.5 * latent.square().sum(-1) + 0.919 * latent.shape[-1] - volume).mean() / latent.shape[-1]


@sick(
    "contact14b-flow-rate",
    [("UNSTABLE", "*")],
    rises(3.0),
    allow=("NUMERICAL", "EXPLODING"),
    source="https://github.com/volflow/DeFlow/issues/4",
    **ONE,
)
def flow_rate(ill: bool, width: int) -> Setup:
    """A flow whose learned scales are unbounded exponentials, at a rate that is too high: a scale gets far
    too large in a few steps, the likelihood breaks down, at worst to NaN. Repaired by a tenth of the rate."""
    data = factors(8, 3, noise=0.3)
    return setup(Flow(8, width, 8), lambda g: (2 * data(g)[0], None), nll, 1e-1 if ill else 1e-2)
