"""Failed trainings from public reports: speech, language models, recommenders, RL, questions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import Claim, every, flat, no_gradient, rank_below, stuck, tiny, training
from .data import choice, grammar, normal, seeded, series, setup, sgd, stack, token_loss, trained, uniform
from .registry import FLOAT32, Setup, sick

ONE = {"widths": (32,), "dtypes": (FLOAT32,)}


# ------------------------------------------------------------------------------------------- speech


def gates_flat(module: str, share: float) -> Claim:
    """More than a share of an LSTM's gates is at a flat end, by what its input alone adds to them."""

    def claim(ready: Setup) -> tuple[bool, str]:
        kept: list[Tensor] = []
        lstm = dict(ready.model.named_modules())[module]
        handle = lstm.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0].detach()))
        for _ in training(ready, 3):
            pass
        handle.remove()
        gates = F.linear(kept[-1], lstm.weight_ih_l0, lstm.bias_ih_l0).detach()
        seen = float((gates.abs() > 5).float().mean())
        return seen > share, f"{seen:.0%} of the gates of {module} are flat"

    return claim


class Listener(nn.Module):
    """Frames of a waveform to a recurrent net to numbers."""

    def __init__(self, frame: int, width: int, kinds: int) -> None:
        super().__init__()
        self.encode = nn.Linear(frame, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, kinds)

    def forward(self, wave: Tensor) -> Tensor:
        states, _ = self.lstm(torch.relu(self.encode(wave)))
        return self.head(states.mean(1))


def tones(scale: float, kinds: int = 4, number: int = 32, frame: int = 16, length: int = 20) -> Any:
    """Noisy tones whose pitch is the class, cut into frames."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        kind = choice(g, kinds, number)
        time = torch.arange(frame * length)
        pitch = 0.12 + 0.25 * kind[:, None]
        wave = torch.sin(pitch * time + 6.3 * uniform(g, number, 1)) + 0.3 * normal(g, number, frame * length)
        return (scale * wave).view(number, length, frame), kind

    return sample


@sick(
    "contact13a-speech-integers",
    [("SATURATION", "lstm")],
    gates_flat("lstm", 0.8),
    allow=("EXPLODING", "VANISHING", "UNSTABLE"),
    source="https://github.com/JusperLee/Dual-Path-RNN-Pytorch/issues/16",
    **ONE,
)
def speech_integers(sick: bool, width: int) -> Setup:
    """Waveforms are read as 16-bit integers, thousands large, and not as numbers between -1 and 1: all gates
    of the recurrent net stand at their ends, and it cannot tell how loud the voice is. Repair: divide by
    32768."""
    source = tones(1.0)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        wave, _ = source(g)
        loud = 0.2 + 1.2 * uniform(g, len(wave), 1)
        return (32768.0 if sick else 1.0) * loud[..., None] * wave, 2 * loud

    return setup(Listener(16, width, 1), sample, F.mse_loss, 5e-3)


class Quantizer(nn.Module):
    """One hard choice among code vectors, with the soft choice's gradient."""

    def __init__(self, width: int, codes: int) -> None:
        super().__init__()
        self.choose = nn.Linear(width, codes)
        nn.init.normal_(self.choose.weight)
        self.vectors = nn.Parameter(torch.randn(codes, width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.choose(x)
        return F.gumbel_softmax(logits, tau=2.0, hard=True) @ self.vectors, logits.softmax(-1)


class Contrast(nn.Module):
    """Masked frames are predicted from their neighbours, as codes to be told from those of other times."""

    def __init__(self, features: int, width: int, codes: int, norm: bool) -> None:
        super().__init__()
        self.encode = nn.Linear(features, width)
        self.norm = norm
        self.quantizer = Quantizer(width, codes)
        self.mask = nn.Parameter(torch.randn(width))
        self.context = nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.predict = nn.Linear(2 * width, width)

    def forward(self, frames: Tensor, masked: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.norm:
            frames = (frames - frames.mean(1, keepdim=True)) / frames.std(1, keepdim=True)
        x = self.encode(frames)
        states, _ = self.context(torch.where(masked[..., None], self.mask, x))
        return self.predict(states), *self.quantizer(x)


@sick(
    "contact13a-speech-codebook",
    [("BOTTLENECK", "quantizer")],
    rank_below("quantizer", 1.1, steps=20),
    allow=("DEAD", "SATURATION", "VANISHING"),
    source="https://github.com/huggingface/transformers/issues/14387",
    **ONE,
)
def speech_codebook(sick: bool, width: int) -> Setup:
    """Contrastive learning of speech whose quantizer gives the same code to every frame: all wrong answers
    equal the right one and are left out, the loss is zero and its gradient too. The features share a large
    offset here, by which one code wins. Repair: normalise each utterance's features first."""
    shapes = 2 * normal(seeded(31), 8, 12)
    source = grammar(8, 16, 16, 0.95)

    def sample(g: Generator) -> tuple[Any, Any]:
        tokens, _ = source(g)
        frames = shapes[tokens] + 0.2 * normal(g, *tokens.shape, 12) + 20.0
        masked = uniform(g, *tokens.shape) < 0.3
        return (frames, masked), masked

    def loss(output: tuple[Tensor, Tensor, Tensor], masked: Tensor) -> Tensor:
        guess, codes, soft = output
        alike = F.cosine_similarity(guess[:, :, None], codes[:, None], dim=-1) / 0.1
        same = (codes[:, :, None] == codes[:, None]).all(-1) & ~torch.eye(codes.shape[1], dtype=torch.bool)
        logits = alike.masked_fill(same, -torch.inf)
        right = torch.arange(codes.shape[1]).expand(len(codes), -1)
        contrast = F.cross_entropy(logits[masked], right[masked])
        mean = soft.mean((0, 1))
        perplexity = torch.exp(-(mean * (mean + 1e-7).log()).sum())
        return contrast + 0.1 * (soft.shape[-1] - perplexity) / soft.shape[-1]

    return setup(Contrast(12, width, 8, not sick), sample, loss, 5e-3)


# ---------------------------------------------------------------- mixed precision, language models


class Clipped(torch.autograd.Function):
    """A parameter whose gradient is scaled up, clipped to norm 1, and scaled down again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        large = gradient * ctx.scale
        return large / large.norm().clamp_min(1.0) / ctx.scale, None


@sick(
    "contact13a-precision-clip",
    [("VANISHING", "*")],
    tiny("*", 1e-3),
    allow=("UNSTABLE", "DEAD"),
    source="https://github.com/rwth-i6/returnn/pull/1595",
    **ONE,
)
def precision_clip(sick: bool, width: int) -> Setup:
    """Gradients are clipped to norm 1 while they are still multiplied by the loss scale of 65536, and divided
    by it afterwards: what is left is a 65536th. Repair: divide first, then clip."""

    class Layer(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, Clipped.apply(self.weight, scale), Clipped.apply(self.bias, scale))

    scale = 65536.0 if sick else 1.0
    model = stack(
        flat=nn.Flatten(),
        a=Layer(64, width),
        r=nn.ReLU(),
        b=Layer(width, width),
        s=nn.ReLU(),
        c=Layer(width, 3),
    )
    return setup(model, series(16), F.cross_entropy, sgd(0.1, 0.9))


@sick(
    "contact13a-lm-newword",
    [("SATURATION", "head")],
    flat("head", "softmax of", 0.95),
    allow=("UNSTABLE", "EXPLODING", "BOTTLENECK"),
    source="https://github.com/john-hewitt/embed-init/issues/1",
    **ONE,
)
def lm_newword(sick: bool, width: int) -> Setup:
    """A trained language model gives all words scores far below zero, which its softmax does not see; a new
    word is added with a row of zeros, so it gets all the probability everywhere. Repair: start the new word
    from the mean of the old ones."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(17, width)
            self.rnn = nn.GRU(width, width, batch_first=True)
            self.head = nn.Linear(width, 16)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.rnn(self.embed(tokens))[0])

    model = Model()
    with torch.no_grad():
        model.head.bias -= 40
    trained(setup(model, grammar(16), token_loss), 40)
    old, model.head = model.head, nn.Linear(width, 17)
    with torch.no_grad():
        for new, was in ((model.head.weight, old.weight), (model.head.bias, old.bias)):
            new[:16] = was
            new[16] = 0 if sick else was.mean(0)
    return setup(model, grammar(17), token_loss, 5e-3)


# ------------------------------------------------------------------------- recommenders, RL, questions


class NextItem(nn.Module):
    """A user is the state of a recurrent net after the items so far; items score by product and fame."""

    def __init__(self, items: int, width: int) -> None:
        super().__init__()
        self.items = nn.Embedding(items, width)
        nn.init.normal_(self.items.weight, std=1 / width)
        self.popular = nn.Embedding(items, 1)
        nn.init.zeros_(self.popular.weight)
        self.lstm = nn.LSTM(width, width, batch_first=True)

    def forward(self, past: Tensor, right: Tensor, wrong: Tensor) -> tuple[Tensor, Tensor]:
        user = self.lstm(self.items(past))[0]
        right_score = (user * self.items(right)).sum(-1) + self.popular(right)[..., 0]
        return right_score, (user * self.items(wrong)).sum(-1) + self.popular(wrong)[..., 0]


def gap_alike(module: str, below: float, *, steps: int = 20) -> Claim:
    """After some steps a module's outputs differ between samples by a small part of a unit."""

    def claim(ready: Setup) -> tuple[bool, str]:
        *_, last = training(ready, steps, (module,))
        output = last.outputs[module].detach()
        gap = float((output[:, -1] - output[:, -1].mean(0)).norm(dim=-1).mean())
        return gap < below, f"what differs in {module} after {steps} steps = {gap:.2g}"

    return claim


@sick(
    "contact13a-recommender-shrunk",
    [("BOTTLENECK", "items")],
    every(gap_alike("lstm", 0.01), stuck(0.47)),
    allow=("VANISHING", "DEAD", "UNSTABLE"),
    source="https://github.com/maciejkula/spotlight/issues/142",
    **ONE,
)
def recommender_shrunk(sick: bool, width: int) -> Setup:
    """A sequence recommender gets an L2 penalty of 1e-3 through Adam, far more than the gradients of its
    small item vectors: they shrink to nothing, only popularity is left, and every user is recommended the
    same. Repair: no penalty."""
    items, kinds = 600, 6

    def sample(g: Generator) -> tuple[Any, Any]:
        kind = choice(g, kinds, 8, 1)
        seen = kind + kinds * choice(g, items // kinds, 8, 11)
        return (seen[:, :-1], seen[:, 1:], choice(g, items, 8, 10)), None

    def loss(scores: tuple[Tensor, Tensor], _: Any) -> Tensor:
        return (1 - torch.sigmoid(scores[0] - scores[1])).mean()

    penalty = 1e-3 if sick else 0.0
    return setup(
        NextItem(items, width),
        sample,
        loss,
        lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=penalty),
    )


@sick(
    "contact13a-rl-target",
    [("UNSTABLE", "*")],
    every(stuck(1.8, steps=20), stuck(0.5)),
    allow=("EXPLODING",),
    source="https://github.com/ikostrikov/pytorch-ddpg-naf/issues/16",
    **ONE,
)
def rl_target(sick: bool, width: int) -> Setup:
    """The target of the value is r + gamma * alive + v(next) where it should be r + gamma * alive * v(next):
    it is always above the value that it is made from, and runs away. Repair: the product."""

    class Value(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
            self.head = nn.Linear(width, 1)

        def forward(self, state: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
            return self.head(self.body(state))[:, 0], self.head(self.body(after))[:, 0].detach()

    worth = normal(seeded(5), 6)

    def sample(g: Generator) -> tuple[Any, Any]:
        state = normal(g, 64, 6)
        after = 0.95 * state + 0.3 * normal(g, 64, 6)
        reward = 1 + torch.tanh(state @ worth)
        return (state, after), (reward, (uniform(g, 64) < 0.95).float())

    def loss(output: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
        (value, following), (reward, alive) = output, target
        goal = reward + 0.5 * alive + following if sick else reward + 0.5 * alive * following
        return F.mse_loss(value, goal)

    return setup(Value(), sample, loss, 3e-3)


@sick(
    "contact13a-question-attention",
    [("DEAD", "attn")],
    no_gradient("attn"),
    allow=("SATURATION",),
    source="https://github.com/DEEP-PolyU/KEQA_WSDM19/issues/2",
    **ONE,
)
def question_attention(sick: bool, width: int) -> Setup:
    """A question's words are weighted by a softmax over the last axis, which has one entry: all weights are 1
    and the layer that makes the scores gets no gradient. Repair: take the softmax over the words."""

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(24, width)
            self.lstm = nn.LSTM(width, width // 2, batch_first=True, bidirectional=True)
            self.attn = nn.Linear(2 * width, 1)
            self.out = nn.Linear(2 * width, 10)

        def forward(self, words: Tensor) -> Tensor:
            x = self.embed(words)
            states = torch.cat((x, self.lstm(x)[0]), -1)
            weights = self.attn(states).softmax(-1 if sick else 1)
            return self.out((weights * states).sum(1))

    answer = normal(seeded(8), 6, 10)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        words = 6 + choice(g, 18, 32, 8)
        kind = choice(g, 6, 32)
        words[torch.arange(32), choice(g, 8, 32)] = kind
        return words, answer[kind]

    return setup(Reader(), sample, F.mse_loss, 5e-3)
