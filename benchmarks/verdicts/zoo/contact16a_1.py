"""Cases after public reports: transformers and detection."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import Claim, alike, every, fading, flat, no_gradient, stuck, training, under
from .data import choice, normal, setup, stack, textures, token_loss, uniform
from .registry import FLOAT32, Setup, sick


def unmoved(prefix: str, *, after: int = 8) -> Claim:
    """Every parameter under a prefix is bit for bit what it was, after some steps of the optimizer."""

    def claim(setup: Setup) -> tuple[bool, str]:
        before = {n: p.detach().clone() for n, p in setup.model.named_parameters() if under(n, prefix)}
        for _ in training(setup, after):
            pass
        now = dict(setup.model.named_parameters())
        moved = sum(not torch.equal(old, now[n]) for n, old in before.items())
        return bool(before) and moved == 0, f"{moved} of {len(before)} parameters of {prefix} moved"

    return claim


# ------------------------------------------------------------------------- transformers and attention


class PatchBlock(nn.Module):
    """A pre-norm encoder block."""

    def __init__(self, width: int, batch_first: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=batch_first)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class PatchClassifier(nn.Module):
    """A small vision transformer that is read out at its class token."""

    def __init__(self, width: int, batch_first: bool, number: int = 16, kinds: int = 4) -> None:
        super().__init__()
        self.patch = nn.Linear(3 * 16, width)
        self.token = nn.Parameter(0.5 * torch.randn(number, 1, width))
        self.place = nn.Parameter(0.1 * torch.randn(1, 5, width))
        self.blocks = nn.ModuleList(PatchBlock(width, batch_first) for _ in range(2))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, kinds))

    def forward(self, x: Tensor) -> Tensor:
        patches = x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        x = torch.cat([self.token, self.patch(patches)], 1) + self.place
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


@sick(
    "contact16a-transformer-batchaxis",
    [("DEAD", "patch")],
    no_gradient("patch"),
    allow=("BOTTLENECK",),
    source="https://github.com/pytorch/examples/issues/1184",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def batch_axis(sick: bool, width: int) -> Setup:
    """The vision transformer gives the same answer whatever the picture is: its attention expects the time
    axis first and gets the batch axis, so the class token never sees a patch, and the patch embedding gets no
    gradient. Attention with the batch first repairs it."""
    model = PatchClassifier(width, batch_first=not sick)
    return setup(model, textures(4, 16, 8), F.cross_entropy, 3e-3)


class Bare(nn.Module):
    """Causal attention written out, with or without the division by the root of the head's size."""

    def __init__(self, width: int, scaled: bool) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        for layer in (self.query, self.key, self.value):
            nn.init.xavier_normal_(layer.weight)
        self.weights = nn.Softmax(-1)
        self.scale = 1 / math.sqrt(width) if scaled else 1.0

    def forward(self, x: Tensor) -> Tensor:
        scores = self.scale * self.query(x) @ self.key(x).transpose(1, 2)
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return self.weights(scores.masked_fill(later, -torch.inf)) @ self.value(x)


class Decoder(nn.Module):
    """A one-block language model."""

    def __init__(self, width: int, scaled: bool, words: int = 16, length: int = 12) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(words, width), nn.Embedding(length, width)
        self.norm = nn.LayerNorm(width)
        self.attend = Bare(width, scaled)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU())
        self.out = nn.Linear(2 * width, words)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.place.weight[: tokens.shape[1]]
        return self.out(self.mlp(x + self.attend(self.norm(x))))


def look_back(g: Generator) -> tuple[Tensor, Tensor]:
    """Tokens at random; the target at each place is the token three places before, or else the first."""
    tokens = choice(g, 16, 16, 12)
    return tokens, torch.cat([tokens[:, :1].expand(-1, 3), tokens[:, :-3]], 1)


@sick(
    "contact16a-transformer-unscaled",
    [("SATURATION", "attend")],
    flat("attend.weights", "softmax", 0.4),
    allow=("VANISHING",),
    source="https://github.com/huggingface/blog/pull/2893",
    widths=(64,),
    dtypes=(FLOAT32,),
)
def unscaled(sick: bool, width: int) -> Setup:
    """The attention of the tutorial lacks the division by the root of the key's size: with 64 features the
    scores are so large that the softmax picks one token from the start. The division repairs it."""
    return setup(Decoder(width, scaled=not sick), look_back, token_loss, 3e-3)


class TextClassifier(nn.Module):
    """An encoder over tokens with a class read out from their mean."""

    def __init__(self, width: int, squash: nn.Module, words: int = 40, kinds: int = 10) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.encoder = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(width, kinds)
        self.squash = squash

    def forward(self, tokens: Tensor) -> Tensor:
        return self.squash(self.head(self.encoder(self.embed(tokens)).mean(1)))


def topics(g: Generator) -> tuple[Tensor, Tensor]:
    """Texts of 12 words, a third of which belong to the topic that is to be told."""
    kind = choice(g, 10, 32)
    words = choice(g, 40, 32, 12)
    own = 4 * kind[:, None] + choice(g, 4, 32, 12)
    return torch.where(uniform(g, 32, 12) < 0.35, own, words), kind


@sick(
    "contact16a-transformer-twosoftmax",
    [("VANISHING", "*")],
    every(fading("head", "squash", 0.2), stuck(1.9)),
    allow=("SATURATION", "BOTTLENECK", "UNSTABLE"),
    source="https://github.com/illiterate/BertClassifier/issues/2",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def two_softmax(sick: bool, width: int) -> Setup:
    """The classifier ends with a softmax and the cross entropy takes another one: what comes back to the
    logits is a tenth of the gradient, and the loss falls very slowly. Logits without a softmax repair it."""
    model = TextClassifier(width, nn.Softmax(-1) if sick else nn.Identity())
    return setup(model, topics, F.cross_entropy, 1e-3)


class Counter(nn.Module):
    """A transformer over a series of numbers, read out by one layer over its steps."""

    def __init__(self, width: int, lift: bool, length: int = 10) -> None:
        super().__init__()
        self.lift = nn.Linear(1, width) if lift else nn.Identity()
        size, heads = (width, 4) if lift else (1, 1)
        layer = nn.TransformerEncoderLayer(size, heads, 2 * width, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.out = nn.Linear(length * size, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.encoder(self.lift(x)).flatten(1))


def counting(g: Generator) -> tuple[Tensor, Tensor]:
    """Ten numbers in a row, in hundreds; the target is the next one."""
    first = choice(g, 100, 32, 1)
    return (first + torch.arange(10.0))[..., None] / 100, (first + 10.0) / 100


@sick(
    "contact16a-transformer-onefeature",
    [("BOTTLENECK", "encoder")],
    every(alike("encoder", 1e-3), no_gradient("encoder.layers.0")),
    allow=("DEAD", "VANISHING"),
    source="https://discuss.pytorch.org/t/transformer-cannot-predict-next-number-in-linear-sequence/184454",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def one_feature(sick: bool, width: int) -> Setup:
    """The transformer has a model size of one, and a layer norm over one feature returns its bias: nothing of
    the series gets through, no gradient comes back. A layer that lifts the numbers to more features repairs
    it."""
    return setup(Counter(width, lift=not sick), counting, F.mse_loss, 3e-3)


# --------------------------------------------------------------------------------------- detection

ROWS, COLUMNS = torch.meshgrid(torch.arange(12), torch.arange(12), indexing="ij")


def objects(g: Generator, number: int = 16) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Pictures with one disc; the targets are its cell in a 3 by 3 grid and its centre and radius."""
    centre, radius = 2 + 8 * uniform(g, number, 2), 1.5 + 1.5 * uniform(g, number, 1)
    far = (ROWS - centre[:, :1, None]) ** 2 + (COLUMNS - centre[:, 1:, None]) ** 2
    picture = (far < radius[..., None] ** 2).float()[:, None] + 0.2 * normal(g, number, 1, 12, 12)
    cell = (centre / 4).long().clamp(0, 2)
    return picture, (3 * cell[:, 0] + cell[:, 1], torch.cat([centre / 4 - cell, radius / 4], 1))


class Detector(nn.Module):
    """A body of convolutions and heads for the object and its box in every cell."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = stack(
            conv1=nn.Conv2d(1, width // 2, 3, 2, 1),
            act1=nn.ReLU(),
            conv2=nn.Conv2d(width // 2, width, 3, 2, 1),
            act2=nn.ReLU(),
        )
        self.head = nn.ModuleDict({"cls": nn.Conv2d(width, 1, 1), "box": nn.Conv2d(width, 3, 1)})

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.body(x)
        return self.head["cls"](x).flatten(1), self.head["box"](x).flatten(2), x


def detection_loss(output: tuple[Tensor, ...], target: tuple[Tensor, Tensor]) -> Tensor:
    """Return the cross entropy over the cells and the error of the box in the right one."""
    scores, boxes = output[:2]
    cell, box = target
    found = boxes[torch.arange(len(cell)), :, cell]
    return F.cross_entropy(scores, cell) + F.smooth_l1_loss(found, box)


@sick(
    "contact16a-detection-headless",
    [("DEAD", "head")],
    unmoved("head"),
    source="https://github.com/fastai/course-v3/pull/598",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def headless(sick: bool, width: int) -> Setup:
    """The split of the parameters names the layers of the body only, so the optimizer never gets those of the
    detection head, and it stays as it was drawn. A split that has the head in it repairs it."""
    model = Detector(width)
    return setup(model, objects, detection_loss, 1e-3, trains=(model.body if sick else model).parameters)


class Slots(nn.Module):
    """A decoder that reads boxes out of a picture's features, one for every query."""

    def __init__(self, width: int, clones: bool, slots: int = 3) -> None:
        super().__init__()
        self.slots = slots
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 4, 2, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1)
        )
        self.place = nn.Parameter(0.5 * torch.randn(1, 36, width))
        self.query = nn.Parameter(torch.randn(1, 1 if clones else slots, width))
        self.decoder = nn.TransformerDecoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=True)
        self.box = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        memory = self.features(x).flatten(2).transpose(1, 2) + self.place
        return self.box(self.decoder(self.query.expand(len(x), self.slots, -1), memory))


def three_discs(g: Generator) -> tuple[Tensor, Tensor]:
    """Pictures of three discs, in order from left to right; the target is where they are."""
    across = torch.tensor([2.0, 6.0, 10.0]) + 2 * uniform(g, 16, 3) - 1
    down = 2 + 8 * uniform(g, 16, 3)
    far = (ROWS - down[..., None, None]) ** 2 + (COLUMNS - across[..., None, None]) ** 2
    picture = (far < 3).any(1, keepdim=True).float() + 0.1 * normal(g, 16, 1, 12, 12)
    return picture, torch.stack([across, down], -1) / 6 - 1


@sick(
    "contact16a-detection-samebox",
    [("BOTTLENECK", "decoder")],
    every(alike("decoder", 1e-4, dim=1), stuck(0.25)),
    allow=("DEAD",),
    source="https://github.com/facebookresearch/detr/issues/202",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def same_box(sick: bool, width: int) -> Setup:
    """All predicted boxes are exactly the same: the decoder gets copies of one query, and nothing tells its
    slots apart, so they can only learn the mean box. A query of its own for every slot repairs it."""
    return setup(Slots(width, clones=sick), three_discs, F.l1_loss, 2e-3)
