"""Cases after reports on audio, series, recommenders and tables that do not train."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn

from .claims import alike, every, fades_in_time, fading, huge, no_gradient, not_finite, stuck
from .data import choice, clusters, frozen, normal, seeded, series, setup, sgd, stack, uniform
from .registry import FLOAT32, Setup, sick

functional = nn.functional


# ------------------------------------------------------------------------------------------ audio


@sick(
    "contact17b-speech-silence",
    [("NUMERICAL", "*")],
    not_finite(loss=True),
    source="https://github.com/yxlu-0102/MP-SENet/issues/33",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def speech_silence(sick: bool, width: int) -> Setup:
    """Speech enhancement where each clip is scaled to unit power: now and then a clip is all silence, its
    power is zero, and zero times infinity is NaN in the input. Repair: a floor under the power."""
    floor = 0.0 if sick else 1e-5

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        time = torch.arange(64)
        pitch = 0.2 + 0.6 * uniform(g, 8, 1)
        loud = (uniform(g, 8, 1) > 0.03).float()
        clean = loud * torch.sin(pitch * time + 6.3 * uniform(g, 8, 1))
        noisy = clean + loud * 0.7 * normal(g, 8, 64)
        scale = (noisy.square().mean(1, keepdim=True) + floor).rsqrt()
        return (noisy * scale)[:, None], (clean * scale)[:, None]

    model = stack(
        first=nn.Conv1d(1, width, 9, padding=4),
        act1=nn.ReLU(),
        second=nn.Conv1d(width, width, 9, padding=4),
        act2=nn.ReLU(),
        last=nn.Conv1d(width, 1, 9, padding=4),
    )
    return setup(model, sample, functional.mse_loss, 3e-3, seed=6)


# ----------------------------------------------------------------------------------------- series


class Forecaster(nn.Module):
    """An encoder over the past, and a decoder that is given a start of the future or nothing but zeros."""

    def __init__(self, width: int, *, zeros: bool, past: int = 16) -> None:
        super().__init__()
        self.enter, self.start = nn.Linear(1, width), nn.Linear(1, width)
        self.place = nn.Parameter(0.5 * torch.randn(past, width))
        options = {"nhead": 2, "dim_feedforward": 2 * width, "dropout": 0.0, "batch_first": True}
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(width, **options), 1)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(width, **options), 1)
        self.leave = nn.Linear(width, 1)
        self.zeros = zeros

    def forward(self, past: Tensor, shifted: Tensor) -> Tensor:
        memory = self.encoder(self.enter(past) + self.place)
        given = torch.zeros_like(shifted) if self.zeros else shifted
        mask = nn.Transformer.generate_square_subsequent_mask(given.shape[1])
        return self.leave(self.decoder(self.start(given), memory, tgt_mask=mask, tgt_is_causal=True))


def waves(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Sixteen steps of a wave, the next eight shifted by one, and the next eight."""
    time = torch.arange(24)
    x = torch.sin(0.5 * time + 6.3 * uniform(g, 16, 1))[..., None]
    return (x[:, :16], x[:, 15:23]), x[:, 16:]


@sick(
    "contact17b-series-zerotgt",
    [("BOTTLENECK", "decoder")],
    every(alike("decoder", 1e-3, dim=1), stuck(0.2)),
    allow=("DEAD",),
    source="https://openillumi.com/en/en-pytorch-transformer-multidim-output-same-fix",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def series_zerotgt(sick: bool, width: int) -> Setup:
    """A Transformer for forecasting whose decoder is fed zeros: every step of the future is the same to it,
    and all outputs of a sequence are equal. Repair: feed the future shifted by one step."""
    return setup(Forecaster(width, zeros=sick), waves, functional.mse_loss, 5e-3)


class Recall(nn.Module):
    """A recurrent network that answers at its last step."""

    def __init__(self, width: int, forget: float | None) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, width, batch_first=True)
        self.head = nn.Linear(width, 3)
        if forget is not None:
            with torch.no_grad():
                self.lstm.bias_ih_l0[width : 2 * width] = forget

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


@sick(
    "contact17b-recurrent-lag",
    [("VANISHING", "lstm")],
    fades_in_time("lstm", 1e-5, sound=18),
    source="https://discuss.pytorch.org/t/reproducing-classical-lstm-results/21588",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def recurrent_lag(sick: bool, width: int) -> Setup:
    """A classical long time lag problem with the default initialization: the forget gate stands at one half,
    and of what came early nothing is left at the last step. Repair: a forget bias of 5."""
    return setup(Recall(width, None if sick else 5.0), series(72, 32), functional.cross_entropy, 1e-2)


# ----------------------------------------------------------------------------------- recommenders


class DeepFM(nn.Module):
    """Raw and categorical features by embeddings, their products, and a deep part."""

    def __init__(self, width: int, raw: int = 4, ids: int = 20, size: int = 8) -> None:
        super().__init__()
        self.fields = nn.Parameter(0.1 * torch.randn(raw, size))
        self.embed = nn.Embedding(ids, size)
        nn.init.normal_(self.embed.weight, std=0.1)
        self.linear = nn.Linear(raw, 1)
        self.fm = nn.Identity()
        self.deep = nn.Sequential(nn.Linear((raw + 1) * size, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, raw: Tensor, ids: Tensor) -> Tensor:
        vectors = torch.cat([raw[..., None] * self.fields, self.embed(ids)[:, None]], 1)
        pairs = 0.5 * (vectors.sum(1).square() - vectors.square().sum(1)).sum(1, keepdim=True)
        return self.linear(raw) + self.fm(pairs) + self.deep(vectors.flatten(1))


@sick(
    "contact17b-recommend-raw",
    [("EXPLODING", "*")],
    every(huge("*", 1e3), stuck(1.0)),
    allow=("UNSTABLE", "SATURATION"),
    source="https://github.com/alibaba/EasyRec/issues/23",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def recommend_raw(sick: bool, width: int) -> Setup:
    """Click prediction with raw counts and prices as features, in the hundreds: their products, by
    embeddings, swamp the logit, and the loss stays far above that of a coin. Repair: standardize them."""
    taste = normal(seeded(31), 4)
    liking = normal(seeded(32), 20)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        x, ids = normal(g, 128, 4), choice(g, 20, 128)
        y = (x @ taste + liking[ids] > 0).float()[:, None]
        return (150 * (x + 2) if sick else x, ids), y

    return setup(DeepFM(width), sample, functional.binary_cross_entropy_with_logits, 3e-3)


class Towers(nn.Module):
    """Users and items by an encoder of their text, whose vectors share one large common part."""

    def __init__(self, width: int, *, centred: bool, items: int = 64) -> None:
        super().__init__()
        vectors = torch.randn(items, width) + 12 * torch.randn(width)
        self.user = nn.Embedding(items, width)
        text = nn.Embedding.from_pretrained(vectors - vectors.mean(0) if centred else vectors)
        self.item = stack(text=frozen(text), last=nn.Linear(width, width))

    def forward(self, number: Tensor) -> Tensor:
        one = functional.normalize(self.user(number), dim=-1)
        two = functional.normalize(self.item(number), dim=-1)
        same = (two @ two.T > 0.95) & ~torch.eye(len(number), dtype=torch.bool)
        return (10 * one @ two.T).masked_fill(same, -1e9)


@sick(
    "contact17b-recommend-masked",
    [("BOTTLENECK", "item")],
    every(alike("item", 0.3), no_gradient("user", "item")),
    allow=("DEAD",),
    source="https://github.com/bytedance/HLLM/issues/15",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def recommend_masked(sick: bool, width: int) -> Setup:
    """Contrastive training that masks negatives too similar to the positive: the items' vectors are almost
    alike, all negatives are masked, the loss is 0 and nothing learns. Repair: take the common part away."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        return torch.randperm(64, generator=g)[:32], torch.arange(32)

    return setup(Towers(width, centred=not sick), sample, functional.cross_entropy, 1e-2)


# ----------------------------------------------------------------------------------------- tables


@sick(
    "contact17b-tabular-sigmoid",
    [("VANISHING", "layer1")],
    fading("layer1", "layer6", 1e-3),
    allow=("BOTTLENECK",),
    source="https://github.com/phlippe/uvadlc_notebooks/issues/119",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def tabular_sigmoid(sick: bool, width: int) -> Setup:
    """A classifier of six sigmoid layers under gradient descent with momentum stays at chance: each layer
    shrinks the gradient by a factor. Repair: ReLU with the initialization for it."""
    layers: dict[str, nn.Module] = {}
    for number in range(1, 7):
        layer = nn.Linear(10 if number == 1 else width, width)
        if not sick:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        layers |= {f"layer{number}": layer, f"act{number}": nn.Sigmoid() if sick else nn.ReLU()}
    model = stack(**layers, head=nn.Linear(width, 4))
    return setup(model, clusters(10, 4), functional.cross_entropy, sgd(0.02, 0.9))


@sick(
    "contact17b-tabular-zeros",
    [("DEAD", "out")],
    every(no_gradient("out", "first", after=19), stuck(0.5)),
    source="https://github.com/keras-team/tf-keras/issues/82",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def tabular_zeros(sick: bool, width: int) -> Setup:
    """Regression of daily turnover with a ReLU after the last layer: that layer's sum is negative for every
    day, all predictions are zero, and no gradient passes. Repair: no activation at the output."""
    torch.manual_seed(1)
    w = normal(seeded(33), 6) / math.sqrt(6)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x = 2 + 0.5 * normal(g, 32, 6)
        return x, (1 + (x - 2) @ w).clamp_min(0)[:, None]

    model = stack(
        first=nn.Linear(6, width),
        act1=nn.ReLU(),
        second=nn.Linear(width, 2 * width),
        act2=nn.ReLU(),
        out=nn.Linear(2 * width, 1),
        act3=nn.ReLU() if sick else nn.Identity(),
    )
    return setup(model, sample, functional.mse_loss, 3e-3)
