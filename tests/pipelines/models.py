"""Models of every kind that `automatic` tells apart, each with a batch, a loss and the kinds to be seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, distributions, nn

from tests.functional.attention.models import gpt, hugging_face, token_loss, tokens
from tests.policies import ActorCritic, Gaussian, Plain, actor_critic_loss, gaussian_loss
from tests.policies import batch as experience


@attrs.frozen
class Case:
    """What is diagnosed, and the kinds that are to be seen in it: the first words of `provenance.chosen`."""

    model: nn.Module
    batch: Any
    loss: Any
    kinds: tuple[str, ...] = ()


class Read(nn.Module):
    """A recurrent layer of which the last step is read."""

    def __init__(self, kind: Callable[..., nn.RNNBase]) -> None:
        super().__init__()
        self.rnn, self.out = kind(3, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0][:, -1])


class Looped(nn.Module):
    """A loop over a cell: PyTorch's, or one written by hand."""

    def __init__(self, *, own: bool) -> None:
        super().__init__()
        self.cell = nn.Linear(3 + 8, 8) if own else nn.GRUCell(3, 8)
        self.out = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(len(x), 8)
        for t in range(x.shape[1]):
            step = x[:, t]
            h = (
                self.cell(step, h)
                if isinstance(self.cell, nn.GRUCell)
                else self.cell(torch.cat([step, h], -1))
            )
            h = h.tanh()
        return self.out(h)


class Neighbours(nn.Module):
    """Attention over the neighbours in a graph, scored by a sum as in GAT."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.left, self.right = nn.Linear(3, 8), nn.Linear(8, 1), nn.Linear(8, 1)
        self.out = nn.Linear(8, 2)
        self.edges = (torch.rand(12, 12, generator=torch.Generator().manual_seed(0)) > 0.6) | torch.eye(
            12
        ).bool()

    def forward(self, x: Tensor) -> Tensor:
        h = self.lift(x)
        scores = F.leaky_relu(self.left(h) + self.right(h).mT, 0.2)
        return self.out(scores.masked_fill(~self.edges, float("-inf")).softmax(-1) @ h)


class Experts(nn.Module):
    """A mixture of experts: its router's softmax weighs outputs, and is no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(3, 4), nn.ModuleList(nn.Linear(3, 2) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        every = torch.stack([expert(x) for expert in self.experts], 1)
        return (self.router(x).softmax(-1)[:, None] @ every).squeeze(1)


class Autoencoder(nn.Module):
    """A variational autoencoder: a distribution is made and sampled, and it is no policy."""

    def __init__(self) -> None:
        super().__init__()
        self.mu, self.log_std, self.decode = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        q = distributions.Normal(self.mu(x), self.log_std(x).exp())
        z = q.rsample()
        prior = distributions.Normal(torch.zeros(2), torch.ones(2))
        divergence = (q.log_prob(z) - prior.log_prob(z)).sum(-1)
        return -distributions.Normal(self.decode(z), 1.0).log_prob(x).sum(-1).mean() + divergence.mean()


def _data(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def _labels(number: int = 12) -> Tensor:
    return torch.arange(number) % 2


def _labelled(model: nn.Module, *shape: int, kinds: tuple[str, ...] = ()) -> Case:
    return Case(model, (_data(12, *shape), _labels()), nn.CrossEntropyLoss(), kinds)


def _weighed_by_hand(signs: Callable[[Tensor], Tensor]) -> Any:
    data = experience()
    weights = signs(data.returns - 2)

    def loss(output: tuple[Tensor, Tensor]) -> Tensor:
        chosen = output[0].log_softmax(-1).gather(1, data.choices[:, None]).squeeze(1)
        return -(chosen * weights).mean() + F.mse_loss(output[1].squeeze(1), data.returns)

    return loss


def _of_policy(model: nn.Module, loss: Any, kinds: tuple[str, ...] = ("policy",)) -> Case:
    return Case(model, experience().states, loss, kinds)


def _unreduced(output: tuple[Tensor, Tensor]) -> Tensor:
    data = experience()
    chosen = F.cross_entropy(output[0], data.choices, reduction="none")
    return (chosen * (data.returns - 2)).mean() + F.mse_loss(output[1].squeeze(1), data.returns)


def _transformers(name: str) -> Case:
    return Case(*hugging_face(name, "sdpa"), None, ("attention",))


def _encoder() -> Case:
    inner = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(inner, 2), nn.Flatten(), nn.Linear(40, 2))
    return _labelled(model, 5, 8, kinds=("attention",))


def _convolutions() -> Case:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2))
    return _labelled(model, 2, 6, 6)


def _classifier_by_distribution() -> Case:
    def loss(logits: Tensor, y: Tensor) -> Tensor:
        return -distributions.Categorical(logits=logits).log_prob(y).mean()

    return Case(nn.Linear(3, 2), (_data(12, 3), _labels()), loss)


CASES: dict[str, Callable[[], Case]] = {
    **{name: lambda name=name: _transformers(name) for name in ("gpt2", "bert", "llama", "t5")},
    "encoder": _encoder,
    "handwritten attention": lambda: Case(gpt("einsum"), tokens(), token_loss, ("attention",)),
    "attention over neighbours": lambda: _labelled(Neighbours(), 3, kinds=("attention",)),
    "rnn": lambda: _labelled(Read(nn.RNN), 6, 3, kinds=("recurrence",)),
    "lstm": lambda: _labelled(Read(nn.LSTM), 6, 3, kinds=("recurrence",)),
    "gru": lambda: _labelled(Read(nn.GRU), 6, 3, kinds=("recurrence",)),
    "loop over a cell": lambda: _labelled(Looped(own=False), 6, 3, kinds=("recurrence",)),
    "actor-critic": lambda: _of_policy(ActorCritic(), actor_critic_loss(experience())),
    "gaussian": lambda: _of_policy(
        Gaussian(lambda mean, log_std: distributions.Normal(mean, log_std.exp())), gaussian_loss(experience())
    ),
    "policy by hand": lambda: _of_policy(Plain(), _weighed_by_hand(lambda w: w)),
    "policy by cross-entropy": lambda: _of_policy(Plain(), _unreduced),
    "weighed by sample": lambda: _of_policy(Plain(), _weighed_by_hand(Tensor.abs), ()),
    "handwritten cell": lambda: _labelled(Looped(own=True), 6, 3),
    "perceptron": lambda: _labelled(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), 3),
    "convolutions": _convolutions,
    "mixture of experts": lambda: _labelled(Experts(), 3),
    "autoencoder": lambda: Case(Autoencoder(), _data(12, 3), None),
    "classifier by distribution": _classifier_by_distribution,
}


def case(name: str) -> Case:
    """Return a case, the same every time."""
    torch.manual_seed(0)
    return CASES[name]()
