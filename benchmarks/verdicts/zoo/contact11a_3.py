"""Graphs, recommenders, tabular data, time series and rankings, from public reports."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from .claims import Claim, _last, fades_in_time, huge, no_gradient, not_finite, rises, training
from .contact11a_1 import WORDS, CausalLM, DecoderLayer, only
from .data import choice, grammar, normal, seeded, series, setup, token_loss, trained, uniform
from .registry import FLOAT32, Setup, sick

# -------------------------------------------------------------------------------------- pooling over frames


class TemporalAttentionPooling(nn.Module):
    """Weigh the frames of a history by a score of each, and add them up."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.attention_pooling = nn.Conv1d(size, 1, 1)
        self.softmax = nn.Softmax(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return the pooled features of histories of shape (batch, frames, features)."""
        scores = self.attention_pooling(x.transpose(1, 2))
        return (x * self.softmax(scores).transpose(1, 2)).sum(1)


class LamaActor(nn.Module):
    """A policy that looks at the last, the average and the weighted frame of its history."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.observation_net = nn.Linear(7, size)
        self.attn = TemporalAttentionPooling(size, dim)
        self.feature_net = nn.Sequential(nn.Linear(3 * size, size), nn.ReLU())
        self.policy_net = nn.Linear(size, 4)

    def forward(self, history: Tensor) -> Tensor:
        """Return the action."""
        x = self.observation_net(history)
        return self.policy_net(self.feature_net(torch.cat((x[:, -1], x.mean(1), self.attn(x)), -1)))


def histories(g: Generator) -> tuple[Tensor, Tensor]:
    """Histories of eight frames, one of which is marked; the expert acts on what that one shows."""
    frames = normal(g, 64, 8, 7)
    place, row = choice(g, 8, 64), torch.arange(64)
    frames[..., 0] = 0.0
    frames[row, place, 0] = 2.0
    return frames, frames[row, place, 1:5]


@sick(
    "contact11a-lama-pooling",
    [("DEAD", "attn")],
    no_gradient("attn"),
    source="https://github.com/catalyst-team/catalyst/pull/285",
    steps=200,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def lama_pooling(sick: bool, width: int) -> Setup:
    """Policy with attention over the last frames: the scores have one channel and the softmax is taken over
    the channels, so that every weight is one and the attention gets no gradient. Taking it over the frames
    repairs it."""
    return setup(LamaActor(width, 1 if sick else 2), histories, F.mse_loss, 1e-2)


# ------------------------------------------------------------------------------------------------ forecasts


class TorchNormalizer(nn.Module):
    """Scale a series by what its preprocessing found."""

    def __init__(self, center: float, scale: float) -> None:
        super().__init__()
        self.register_buffer("center_", torch.tensor(center))
        self.register_buffer("scale_", torch.tensor(scale))

    def forward(self, y: Tensor) -> Tensor:
        """Return the scaled series."""
        return (y - self.center_) / self.scale_


class DeepAR(nn.Module):
    """A recurrent forecaster of counts with a negative binomial output."""

    def __init__(self, size: int, normalizer: nn.Module) -> None:
        super().__init__()
        self.target_normalizer = normalizer
        self.rnn = nn.GRU(1, size, batch_first=True)
        self.distribution_projector = nn.Linear(size, 2)

    def forward(self, past: Tensor) -> Tensor:
        """Return mean and shape of the next count at each step."""
        states = self.rnn(self.target_normalizer(past)[..., None])[0]
        return F.softplus(self.distribution_projector(states)) + 1e-3


def counts(g: Generator) -> tuple[Tensor, Tensor]:
    """Counts with a period of six; the target is the series one step later."""
    level = 2 + 6 * uniform(g, 16, 1)
    time = torch.arange(31) + choice(g, 6, 16, 1)
    y = torch.poisson(level * (1 + torch.sin(time * 6.283 / 6)), generator=g)
    return y[:, :-1], y[:, 1:]


def count_loss(output: Tensor, target: Tensor) -> Tensor:
    """Return the negative log-likelihood of a negative binomial distribution."""
    mean, shape = output.unbind(-1)
    logits = mean.log() - shape.log()
    return (
        -torch.distributions.NegativeBinomial(shape, logits=logits, validate_args=False)
        .log_prob(target)
        .mean()
    )


@sick(
    "contact11a-deepar-scale",
    [("NUMERICAL", "*")],
    not_finite(2),
    source="https://github.com/sktime/pytorch-forecasting/issues/987",
    falls_to=0.85,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def deepar_scale(sick: bool, width: int) -> Setup:
    """A forecaster of counts asks for a normalizer that changes nothing; centre and scale are swapped for
    the uncentred case, so that the scale is zero and the series is divided by it. Keeping a scale of one
    repairs it."""
    return setup(DeepAR(width, TorchNormalizer(0.0, 0.0 if sick else 1.0)), counts, count_loss, 1e-2)


class SeriesClassifier(nn.Module):
    """A recurrent classifier that reads its last state."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, size, batch_first=True)
        self.fc = nn.Linear(size, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the classes."""
        return self.fc(self.lstm(x)[0][:, -1])


@sick(
    "contact11a-lstm-forgetbias",
    [("VANISHING", "lstm")],
    fades_in_time("lstm", 1e-5, sound=12),
    source="https://chadrick-kwag.net/posts/reasons-why-forget-bias-initialized-to-1-is-good-practice-in-lstm",
    steps=200,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def lstm_forgetbias(sick: bool, width: int) -> Setup:
    """Long series whose class is told at the beginning: with forget biases round zero the cell is halved at
    each step and the gradient is gone before it reaches what matters. Biases that keep the forget gates open
    repair it."""
    model = SeriesClassifier(width)
    if not sick:
        for bias in (model.lstm.bias_ih_l0, model.lstm.bias_hh_l0):
            nn.init.constant_(bias[width : 2 * width], 1.0)
    return setup(model, series(48, 32), F.cross_entropy, 1e-2)


# ------------------------------------------------------------------------------------------- recommenders


class LightGCN(nn.Module):
    """Users and items whose embeddings are averaged along the edges of past choices."""

    def __init__(self, size: int, edges: Tensor) -> None:
        super().__init__()
        users, items = edges.shape
        self.user_embedding = nn.Embedding(users, size)
        self.item_embedding = nn.Embedding(items, size)
        for table in (self.user_embedding, self.item_embedding):
            nn.init.normal_(table.weight, std=0.1)
        norm = edges.sum(1, keepdim=True).clamp_min(1).sqrt() * edges.sum(0, keepdim=True).clamp_min(1).sqrt()
        self.register_buffer("graph", edges / norm)

    def forward(self, user: Tensor, liked: Tensor, other: Tensor) -> Tensor:
        """Return by how much each liked item's score is above the other's, feature by feature."""
        users, items = self.user_embedding.weight, self.item_embedding.weight
        all_users, all_items = users, items
        for _ in range(2):
            users, items = self.graph @ items, self.graph.t() @ users
            all_users, all_items = all_users + users, all_items + items
        return all_users[user] * (all_items[liked] - all_items[other]) / 3


def purchases() -> Tensor:
    """Return which of 30 users chose which of 40 items, by taste."""
    g = seeded(42)
    return (normal(g, 30, 3) @ normal(g, 3, 40) > 1.2).float()


def known() -> Tensor:
    """Return the part of the choices that the graph has."""
    return purchases() * (uniform(seeded(43), 30, 40) < 0.3)


def triples(g: Generator) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Users, an item that each likes and one that each does not."""
    chosen = purchases() + 1e-6
    user = choice(g, 30, 64)
    liked = torch.multinomial(chosen[user], 1, generator=g)[:, 0]
    other = torch.multinomial(1 - chosen[user] + 2e-6, 1, generator=g)[:, 0]
    return (user, liked, other), torch.zeros(64)


def passes(step: int, below: float) -> Claim:
    """After some steps next to no gradient is left although many pairs are still in the wrong order."""

    def claim(setup: Setup) -> tuple[bool, str]:
        norm = _last(setup, step).norm("*")
        with torch.no_grad():
            wrong = float((setup.model(*setup.make_batch()).sum(-1) < 0).float().mean())
        return norm < below and wrong > 0.1, f"gradient norm {norm:.2g}, {wrong:.0%} of the pairs wrong"

    return claim


@sick(
    "contact11a-bpr-sum",
    [("SATURATION", "*")],
    passes(15, 1e-4),
    allow=["DEAD", "VANISHING"],
    source="https://github.com/pyg-team/pytorch_geometric/issues/2104",
    falls_to=0.6,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def bpr_sum(sick: bool, width: int) -> Setup:
    """Personalised ranking on a graph of users and items: the differences of all pairs are added up before
    the one log-sigmoid, which sits at its flat end after a few steps and lets nothing pass, with many pairs
    still wrong. The log-sigmoid of each pair, then the mean, repairs it."""

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return -F.logsigmoid(output.sum()) if sick else -F.logsigmoid(output.sum(-1)).mean()

    return setup(LightGCN(width, known()), triples, loss, 2e-2)


class WideAndDeep(nn.Module):
    """Some features go straight to the output, some through two hidden layers."""

    def __init__(self, size: int, normalization: nn.Module) -> None:
        super().__init__()
        self.norm_layer = normalization
        self.hidden_layer1 = nn.Linear(6, size)
        self.hidden_layer2 = nn.Linear(size, size)
        self.output_layer = nn.Linear(5 + size, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the predicted price."""
        x = self.norm_layer(x)
        deep = F.relu(self.hidden_layer2(F.relu(self.hidden_layer1(x[:, 2:]))))
        return self.output_layer(torch.cat((x[:, :5], deep), 1))


def houses(g: Generator) -> tuple[Tensor, Tensor]:
    """Districts: income, age, rooms, bedrooms, population, household, latitude, longitude; the price."""
    plain = normal(g, 32, 8)
    scale = torch.tensor([1.9, 12.6, 2.4, 0.5, 1100.0, 3.0, 2.1, 2.0])
    shift = torch.tensor([3.9, 28.6, 5.4, 1.1, 1425.0, 3.0, 35.6, -119.6])
    price = 2 + 0.8 * plain[:, :1] - 0.4 * plain[:, 6:7] + 0.2 * torch.sin(2 * plain[:, 1:2])
    return plain * scale + shift, price


@sick(
    "contact11a-wide-deep",
    [("EXPLODING", "*")],
    huge("*", 1e4),
    allow=["UNSTABLE"],
    source="https://github.com/ageron/handson-ml3/pull/20",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def wide_deep(sick: bool, width: int) -> Setup:
    """A wide and deep regression of house prices takes the columns as they are, populations of thousands
    beside incomes of a few, and its outputs and gradients are enormous. Feeding the normalised columns
    repairs it."""
    layer = nn.Identity() if sick else nn.BatchNorm1d(8, affine=False)
    return setup(WideAndDeep(width, layer), houses, F.mse_loss, 5e-3)


# ------------------------------------------------------------------------------------------ reward, adapters


class ErnieReward(nn.Module):
    """An encoder whose first state a linear layer turns to the reward of a text."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(WORDS, size)
        self.encoder = nn.TransformerEncoderLayer(size, 2, 2 * size, 0.0, "gelu", batch_first=True)
        self.reward_layer = nn.Linear(size, 1)
        nn.init.normal_(self.reward_layer.weight, std=3.0)

    def forward(self, texts: Tensor) -> Tensor:
        """Return the rewards of texts of shape (batch, 2, length), the better one first."""
        pooled = self.encoder(self.embeddings(texts.flatten(0, 1)))[:, 0]
        return self.reward_layer(pooled).view(-1, 2)


def ranked(g: Generator) -> tuple[Tensor, Tensor]:
    """Pairs of texts; the better one has more of the words in the lower half."""
    texts = choice(g, WORDS, 32, 2, 10)
    better = (texts < WORDS // 2).sum(-1).argmax(1)
    order = torch.stack((better, 1 - better), 1)
    return texts.gather(1, order[..., None].expand_as(texts)), torch.zeros(32)


def unmoved(module: str, below: float) -> Claim:
    """Of the pairs in the wrong order most push the rewards by next to nothing, in the first steps."""

    def claim(setup: Setup) -> tuple[bool, str]:
        flat, wrong = 0, 0
        for step in training(setup, 4, (module,)):
            rewards = step.outputs[module].detach().view(-1, 2)
            push = step.outputs[module].grad.view(-1, 2)[:, 0].abs() * len(rewards)
            mistaken = rewards[:, 0] < rewards[:, 1]
            flat, wrong = flat + int((push < below)[mistaken].sum()), wrong + int(mistaken.sum())
        return flat > wrong / 2, f"{flat} of {wrong} wrong pairs push by less than {below}"

    return claim


@sick(
    "contact11a-reward-nolog",
    [("SATURATION", "*")],
    unmoved("reward_layer", 0.02),
    allow=["VANISHING"],
    source="https://github.com/HarderThenHarder/transformers_tasks/issues/15",
    steps=150,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def reward_nolog(sick: bool, width: int) -> Setup:
    """Reward model trained on the sigmoid of the gap in each pair, without the logarithm: for pairs that are
    clearly in the wrong order the sigmoid is flat, and they push by next to nothing. The log-sigmoid, whose
    slope there is one, repairs it."""

    def loss(rewards: Tensor, target: Tensor) -> Tensor:
        gap = rewards[:, 0] - rewards[:, 1]
        return -torch.sigmoid(gap).mean() if sick else -F.logsigmoid(gap).mean()

    return setup(ErnieReward(width), ranked, loss, 3e-3)


@sick(
    "contact11a-lora-rate",
    [("UNSTABLE", "*")],
    rises(1.7),
    allow=["EXPLODING", "SATURATION"],
    source="https://github.com/haotian-liu/LLaVA/issues/1301",
    falls_to=0.9,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def lora_rate(sick: bool, width: int) -> Setup:
    """Fine-tuning a trained language model with low-rank adapters at far too high a rate: the loss jumps up
    within a few steps and does not come back. A rate ten times lower repairs it."""
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    model = CausalLM(width, [DecoderLayer(width, names) for _ in range(2)])
    trained(setup(only(model, "embed", "mlp", "norm", "lm_head"), grammar(WORDS), token_loss, 1e-2), 25)
    return setup(only(model, "lora_"), grammar(WORDS, certain=1.0), token_loss, 0.3 if sick else 0.03)
