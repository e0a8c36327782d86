"""Builds that look suspicious and train: reports whose answer was that all is well, and published designs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from .claims import Claim, _last, training, zero_at_first
from .contact11a_1 import WORDS, CausalLM, DecoderLayer, only
from .contact11a_2 import MaskNet
from .data import choice, frozen, normal, seeded, setup, uniform
from .registry import FLOAT32, Setup, healthy

# ----------------------------------------------------------------------------------------- what it looks like


def below_zero(share: float, *, steps: int = 40) -> Claim:
    """More than a share of the losses of some steps are negative."""

    def claim(setup: Setup) -> tuple[bool, str]:
        losses = [step.loss for step in training(setup, steps)]
        seen = sum(loss < 0 for loss in losses) / steps
        return seen > share, f"{seen:.0%} of the losses are negative"

    return claim


def nothing_to_lose(below: float) -> Claim:
    """The first loss is zero to rounding, and yet there is a gradient."""

    def claim(setup: Setup) -> tuple[bool, str]:
        step = _last(setup, 1)
        return abs(step.loss) < below < step.norm("*"), f"loss {step.loss:.1g}, gradient {step.norm('*'):.2g}"

    return claim


def rows_without(parameter: str, share: float) -> Claim:
    """More than a share of the rows of a parameter have no gradient at all."""

    def claim(setup: Setup) -> tuple[bool, str]:
        grad = _last(setup, 3).grads[parameter]
        seen = float((grad.abs().sum(1) == 0).float().mean()) if grad is not None else 1.0
        return seen > share, f"{seen:.0%} of the rows of {parameter} have no gradient"

    return claim


def even(module: str, below: float) -> Claim:
    """The weights that a softmax gives are nearly the same for all that are not masked."""

    def claim(setup: Setup) -> tuple[bool, str]:
        weights = _last(setup, 3, (module,)).outputs[module].detach()
        number = (weights > 0).sum(-1, keepdim=True)
        spread = float(((weights * number - 1)[weights > 0]).abs().mean())
        return spread < below, f"weights of {module} differ from even ones by {spread:.2g}"

    return claim


def one_class(module: str, share: float, steps: int) -> Claim:
    """After some steps more than a share of all frames are given to the class 0."""

    def claim(setup: Setup) -> tuple[bool, str]:
        output = _last(setup, steps, (module,)).outputs[module].detach()
        seen = float((output.argmax(-1) == 0).float().mean())
        return seen > share, f"{seen:.0%} of the frames are blank"

    return claim


def wide(module: str, above: float) -> Claim:
    """What goes into a module is large, or its columns differ in spread by a large factor."""

    def claim(setup: Setup) -> tuple[bool, str]:
        kept: list[Tensor] = []
        layer = dict(setup.model.named_modules())[module]
        handle = layer.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0].detach()))
        _last(setup, 1)
        handle.remove()
        spread = kept[0].std(0)
        ratio = float(spread.max() / spread.min())
        return ratio > above, f"largest / smallest spread into {module} = {ratio:.2g}"

    return claim


# -------------------------------------------------------------------------------------------- language models


class GRPOPolicy(nn.Module):
    """A policy that gives the log-probabilities of sampled answers."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.policy = CausalLM(size, [DecoderLayer(size) for _ in range(2)])

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the log-probability of each token after the first."""
        logs = F.log_softmax(self.policy(tokens[:, :-1]), -1)
        return logs.gather(2, tokens[:, 1:, None])[..., 0]


@healthy(
    "contact11a-grpo-zeroloss",
    nothing_to_lose(1e-5),
    source="https://github.com/huggingface/trl/issues/3452",
    steps=60,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def grpo_zeroloss(width: int) -> Setup:
    """Group-relative policy optimisation: the first loss is exactly zero, since every ratio is one and the
    advantages of a group have no mean; its gradient is not zero, and over the updates on the same answers
    the loss goes below zero."""
    model = GRPOPolicy(width)
    g = seeded(51)
    tokens = choice(g, WORDS, 8, 1, 1).expand(8, 8, 1)
    answers = torch.cat((tokens, choice(g, WORDS, 8, 8, 10)), -1)
    reward = (answers[..., 1:] < 6).float().mean(-1)
    advantage = ((reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)).flatten()
    with torch.no_grad():
        old = model(answers.flatten(0, 1))

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        return answers.flatten(0, 1), advantage

    def loss(logs: Tensor, target: Tensor) -> Tensor:
        ratio = (logs - old).exp()
        gain = torch.min(ratio * target[:, None], ratio.clamp(0.8, 1.2) * target[:, None])
        return -gain.mean()

    return setup(model, sample, loss, 1e-3)


class PromptedAttention(nn.Module):
    """Frozen attention that also looks at a learned prompt, through a gate that starts at zero."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(size, size) for _ in range(4))
        self.adaption_prompt = nn.Parameter(torch.randn(10, size))
        self.adaption_gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Attend to the past, and to the prompt as far as the gate is open."""
        q = self.q_proj(x)
        out = F.scaled_dot_product_attention(q, self.k_proj(x), self.v_proj(x), is_causal=True)
        key, value = self.k_proj(self.adaption_prompt), self.v_proj(self.adaption_prompt)
        prompted = (q @ key.t() / q.shape[-1] ** 0.5).softmax(-1) @ value
        return self.o_proj(out + torch.tanh(self.adaption_gate) * prompted)


def skewed(g: Generator) -> tuple[Tensor, Tensor]:
    """Random tokens whose successors come from only three words."""
    return choice(g, WORDS, 16, 12), choice(g, 3, 16, 12)


@healthy(
    "contact11a-llama-adapter",
    zero_at_first("layers.0.self_attn.adaption_prompt", "layers.1.self_attn.adaption_prompt"),
    source="https://github.com/huggingface/peft/issues/462",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def llama_adapter(width: int) -> Setup:
    """Zero-initialised attention to learned prompts in a frozen language model: while the gates are zero the
    prompts get no gradient whatever, but the gates do, and open within a step."""
    layers: list[nn.Module] = []
    for _ in range(2):
        layer = DecoderLayer(width)
        layer.self_attn = PromptedAttention(width)
        layers.append(layer)
    model = only(CausalLM(width, layers), "adaption_")

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output.flatten(0, 1), target.flatten())

    return setup(model, skewed, loss, 3e-2)


class Fromage(nn.Module):
    """A frozen language model with one trainable token, whose state is matched with that of a picture."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.lm = frozen(CausalLM(size, [DecoderLayer(size) for _ in range(2)]))
        self.lm.embed_tokens = nn.Embedding(WORDS + 1, size)
        self.text_hidden_fcs = nn.Linear(size, 16)
        self.visual_fc = nn.Linear(12, 16)
        mask = torch.zeros(WORDS + 1, 1)
        mask[WORDS] = 1.0
        self.lm.embed_tokens.weight.register_hook(lambda grad: grad * mask)

    def forward(self, caption: Tensor, visual: Tensor) -> Tensor:
        """Return the similarity of each caption with each picture."""
        marked = torch.cat((caption, torch.full_like(caption[:, :1], WORDS)), 1)
        text = self.text_hidden_fcs(self.lm.hidden(marked)[:, -1])
        return 10 * F.normalize(text, dim=1) @ F.normalize(self.visual_fc(visual), dim=1).t()


def captioned(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Captions and the features of the pictures that they tell of."""
    meaning = normal(seeded(52), WORDS, 12)
    caption = choice(g, WORDS, 16, 4)
    return (caption, meaning[caption].sum(1) + 0.1 * normal(g, 16, 12)), torch.arange(16)


@healthy(
    "contact11a-fromage-token",
    rows_without("lm.embed_tokens.weight", 0.9),
    source="https://github.com/kohjingyu/fromage/issues/6",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def fromage_token(width: int) -> Setup:
    """A frozen language model in which the embedding of one added token is meant to train: the gradients of
    all other rows are set to zero on purpose, and nearly the whole model stands still."""
    return setup(Fromage(width), captioned, F.cross_entropy, 1e-2)


# ----------------------------------------------------------------------------------------------------- speech


class CTCNet(nn.Module):
    """A recurrent recogniser of characters in frames of speech."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, size, 5, padding=2)
        self.rnn = nn.LSTM(size, size, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(2 * size, 7)

    def forward(self, x: Tensor) -> Tensor:
        """Return the log-probabilities of the characters in each frame, the blank first."""
        return F.log_softmax(self.fc(self.rnn(F.relu(self.conv(x)).transpose(1, 2))[0]), -1)


def spoken(g: Generator) -> tuple[Tensor, Tensor]:
    """Forty frames in which three characters are spoken, four frames each."""
    shapes = normal(seeded(53), 7, 8)
    text = 1 + choice(g, 6, 16, 3)
    x = 0.3 * normal(g, 16, 8, 40)
    for n in range(3):
        start = 12 * n + choice(g, 8, 16)
        for row in range(16):
            x[row, :, start[row] : start[row] + 4] += shapes[text[row, n]][:, None]
    return x, text


@healthy(
    "contact11a-ctc-blank",
    one_class("fc", 0.99, 25),
    source="https://github.com/baidu-research/warp-ctc/issues/34",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def ctc_blank(width: int) -> Setup:
    """Connectionist temporal classification with far more frames than characters: for a while every frame is
    given to the blank, as if the output were constant; that passes with training."""

    def loss(logs: Tensor, text: Tensor) -> Tensor:
        frames, letters = torch.full((16,), logs.shape[1]), torch.full((16,), 3)
        return F.ctc_loss(logs.transpose(0, 1), text, frames, letters)

    return setup(CTCNet(width), spoken, loss, 1e-2)


def duets(g: Generator) -> tuple[Tensor, Tensor]:
    """Mixtures of a slow and a fast tone."""
    time = torch.arange(84) / 84
    rates = torch.tensor([3.0, 17.0])[:, None]
    sources = torch.sin(6.283 * (rates * time + uniform(g, 16, 2, 1)))
    return sources.sum(1), sources


@healthy(
    "contact11a-separation-negative",
    below_zero(0.6, steps=60),
    source="https://github.com/csteinmetz1/auraloss/issues/41",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def separation_negative(width: int) -> Setup:
    """A separator trained on the negated scale-invariant distortion ratio in decibels: the loss goes
    below zero soon and has no lower bound; the more negative the better."""

    def loss(output: Tensor, target: Tensor) -> Tensor:
        scale = (output * target).sum(-1, keepdim=True) / (target.square().sum(-1, keepdim=True) + 1e-8)
        part = scale * target
        rest = (output - part).square().sum(-1)
        return -10 * torch.log10(part.square().sum(-1) / (rest + 1e-8) + 1e-8).mean()

    return setup(MaskNet(width), duets, loss, 3e-3)
