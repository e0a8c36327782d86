"""Text, speech and series that look sick and are not, after public questions with that answer."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import Claim, no_gradient, training, zero_at_first
from .contact18b_1 import LENGTH, WORDS, Adapted, Block, Language, successors, text, topics
from .data import Sample, choice, frozen, normal, seeded, setup, token_loss, trained, uniform
from .registry import FLOAT32, Setup, healthy


def first_loss_zero(below: float = 1e-6) -> Claim:
    """The loss of the first step is practically zero."""

    def claim(ready: Setup) -> tuple[bool, str]:
        loss = next(training(ready, 1)).loss
        return abs(loss) < below, f"first loss = {loss:.2g}"

    return claim


def loss_negative(steps: int = 60) -> Claim:
    """The loss is below zero after some steps."""

    def claim(ready: Setup) -> tuple[bool, str]:
        *_, last = training(ready, steps)
        return last.loss < 0, f"loss after {steps} steps = {last.loss:.3g}"

    return claim


# -------------------------------------------------------------------------------- text and adapters


class Answerer(nn.Module):
    """A frozen network with adapters, and the scores of some answers."""

    def __init__(self, width: int, answers: int = 6) -> None:
        super().__init__()
        self.layer1 = Adapted(nn.Linear(8, width))
        self.layer2 = Adapted(nn.Linear(width, width))
        self.answers = nn.Linear(width, answers, bias=False)
        nn.init.zeros_(self.answers.weight)

    def forward(self, prompt: Tensor) -> Tensor:
        """Return the answers' log shares."""
        hidden = torch.tanh(self.layer2(torch.tanh(self.layer1(prompt))))
        return self.answers(hidden).log_softmax(-1)


def groups(prompts: int = 16, size: int = 12, answers: int = 6) -> Sample:
    """Return prompts, a group of answers to each by the policy of the start, and their advantages."""
    right = normal(seeded(71), 8, answers)

    def sample(g: Generator) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        prompt, answer = normal(g, prompts, 8), choice(g, answers, prompts, size)
        reward = (answer == (prompt @ right).argmax(-1)[:, None]).float()
        gain = (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)
        return prompt, (answer, gain)

    return sample


def group_loss(output: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
    """Return minus the clipped, advantage-weighted ratio of the policy to that of the start."""
    answer, gain = target
    ratio = output.gather(1, answer).exp() * output.shape[-1]
    return -torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain).mean()


@healthy(
    "contact18b-healthy-grpo",
    first_loss_zero(),
    source="https://github.com/shangshang-wang/Tina/issues/1",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def healthy_grpo(width: int) -> Setup:
    """The loss of the first step is zero, since the advantages of a group have a mean of zero and the policy
    is still that of the roll-out; the gradient is not, and the loss goes below zero from there."""
    return setup(Answerer(width), groups(), group_loss, 5e-3)


@healthy(
    "contact18b-healthy-newtokens",
    no_gradient("embed", "head"),
    source="https://github.com/szqwu/Motion-Agent/issues/6",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def healthy_newtokens(width: int) -> Setup:
    """A language model gets four new words whose rows in embedding and head stay as they were drawn: all of
    the model is frozen but adapters in its layers, and these learn to use the random rows."""
    model = Language(width)
    old = text(successors(72))
    known = torch.randperm(WORDS - 4, generator=seeded(73))

    def before(g: Generator) -> tuple[Tensor, Tensor]:
        tokens, _ = old(g)
        tokens = tokens % (WORDS - 4)
        for t in range(1, LENGTH):
            tokens[:, t] = known[tokens[:, t - 1]]
        return tokens, known[tokens]

    trained(setup(model, before, token_loss, 5e-3, seed=5), 120)
    with torch.no_grad():
        model.embed.weight[-4:] = torch.randn(4, width)
        model.head.weight[-4:] = 0.3 * torch.randn(4, width)
        model.head.bias[-4:] = 0.0
    frozen(model)
    for block in model.blocks:
        block.attention.qkv = Adapted(block.attention.qkv, 8)
        block.attention.out = Adapted(block.attention.out, 8)
        block.mlp[0], block.mlp[2] = Adapted(block.mlp[0], 8), Adapted(block.mlp[2], 8)
    return setup(model, text(successors(74)), token_loss, 1e-2)


class AdaptedEmbedding(nn.Module):
    """A frozen embedding with a low-rank update, whose own embedding starts at zero."""

    def __init__(self, words: int, width: int, rank: int = 4) -> None:
        super().__init__()
        self.base = frozen(nn.Embedding(words, width))
        self.lora_a = nn.Embedding(words, rank)
        self.lora_b = nn.Linear(rank, width, bias=False)
        nn.init.zeros_(self.lora_a.weight)
        nn.init.normal_(self.lora_b.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the words' vectors."""
        return self.base(tokens) + self.lora_b(self.lora_a(tokens))


class Topics(nn.Module):
    """A frozen layer between an adapted embedding and a classifier."""

    def __init__(self, width: int, kinds: int = 4) -> None:
        super().__init__()
        self.embed = AdaptedEmbedding(WORDS, width)
        self.block = frozen(Block(width))
        self.classifier = nn.Linear(width, kinds)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the classes' scores."""
        return self.classifier(self.block(self.embed(tokens)).mean(1))


@healthy(
    "contact18b-healthy-loraembed",
    zero_at_first("embed.lora_b"),
    source="https://github.com/microsoft/LoRA/issues/142",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def healthy_loraembed(width: int) -> Setup:
    """In an adapted embedding it is the first factor that starts at zero, so the second has a gradient of
    exactly zero in the first step; after it both learn."""
    return setup(Topics(width), topics(), F.cross_entropy, 5e-3)


# ------------------------------------------------------------------------------- speech and series


class Listener(nn.Module):
    """A pretrained encoder of frames that is tuned only after some updates, and a classifier."""

    def __init__(self, width: int, held: int) -> None:
        super().__init__()
        self.held, self.updates = held, 0
        self.encoder = nn.Sequential(
            nn.Conv1d(8, width, 3, padding=1), nn.GELU(), nn.Conv1d(width, width, 3, padding=1), nn.GELU()
        )
        self.head = nn.Linear(width, 5)

    def forward(self, frames: Tensor) -> Tensor:
        """Return the classes' scores."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.updates >= self.held):
            hidden = self.encoder(frames)
        self.updates += self.training
        return self.head(hidden.mean(-1))


def commands(kinds: int = 5, number: int = 32, length: int = 16) -> Sample:
    """Return noisy frames whose bands move as the spoken word tells."""
    shapes = normal(seeded(75), kinds, 8, length)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        kind = choice(g, kinds, number)
        return shapes[kind] + normal(g, number, 8, length), kind

    return sample


@healthy(
    "contact18b-healthy-held",
    zero_at_first("encoder"),
    source="https://github.com/facebookresearch/av_hubert/issues/52",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def healthy_held(width: int) -> Setup:
    """The encoder is run without a graph in the first updates, so that the fresh head learns first and does
    not spoil it; from the seventh on it gets its gradient."""
    return setup(Listener(width, 6), commands(), F.cross_entropy, 5e-3)


class Likely(nn.Module):
    """A recurrent forecast of a mean and a deviation at every step."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rnn = nn.GRU(1, width, batch_first=True)
        self.mean, self.spread = nn.Linear(width, 1), nn.Linear(width, 1)

    def forward(self, series: Tensor) -> tuple[Tensor, Tensor]:
        """Return the next value's mean and deviation."""
        hidden, _ = self.rnn(series)
        return self.mean(hidden), F.softplus(self.spread(hidden)) + 1e-3


def waves(number: int = 32, length: int = 24) -> Sample:
    """Return waves of several phases with little noise; the target is the next value."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        phase = 6.3 * uniform(g, number, 1)
        wave = 0.5 * torch.sin(phase + 0.4 * torch.arange(length + 1)) + 0.02 * normal(g, number, length + 1)
        return wave[:, :-1, None], wave[:, 1:, None]

    return sample


def unlikeliness(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    """Return the negative log-likelihood."""
    return -torch.distributions.Normal(*output).log_prob(target).mean()


@healthy(
    "contact18b-healthy-likelihood",
    loss_negative(),
    source="https://github.com/zhykoties/TimeSeries/issues/16",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def healthy_likelihood(width: int) -> Setup:
    """The loss passes zero and goes on falling: it is a negative log-likelihood, and a density may be above
    one where the deviation is small."""
    return setup(Likely(width), waves(), unlikeliness, 4e-3)
