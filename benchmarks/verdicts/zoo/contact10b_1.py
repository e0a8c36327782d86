"""Labelled models from public reports: two views, adapters, critics, gated convolutions, clicks, pictures."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import Claim, every, huge, no_gradient, not_finite, rises, training
from .data import Sample, adam, choice, discs, frozen, grammar, normal, seeded, setup, token_loss, uniform
from .registry import FLOAT32, Setup, healthy, sick


def loss_between(low: float, high: float, *, steps: int = 20) -> Claim:
    """The loss of the last of some steps lies between two values."""

    def claim(ready: Setup) -> tuple[bool, str]:
        *_, last = training(ready, steps)
        return low < last.loss < high, f"loss of step {steps} = {last.loss:.3g}"

    return claim


# --------------------------------------------------------------------------- clustering of two views


class SwAV(nn.Module):
    """A small encoder of signals, a projection head, and prototypes; two views of each sample."""

    def __init__(self, size: int, prototypes: int, l2norm: bool) -> None:
        super().__init__()
        self.l2norm = l2norm
        self.backbone = nn.Sequential(
            nn.Conv1d(2, size, 3, padding=1),
            nn.ReLU(),
            nn.Conv1d(size, size, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.projection_head = nn.Sequential(
            nn.Linear(8 * size, 4 * size), nn.BatchNorm1d(4 * size), nn.ReLU(), nn.Linear(4 * size, 2 * size)
        )
        self.prototypes = nn.Linear(2 * size, prototypes, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv1d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scores of both views."""
        with torch.no_grad():
            self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))
        z = self.projection_head(self.backbone(torch.cat((first, second))))
        if self.l2norm:
            z = F.normalize(z, dim=1)
        one, two = self.prototypes(z).chunk(2)
        return one, two


@torch.no_grad()
def _sinkhorn(scores: Tensor, epsilon: float = 0.05) -> Tensor:
    q = torch.exp(scores / epsilon).t()
    q = q / q.sum()
    for _ in range(3):
        q = q / q.sum(1, keepdim=True) / q.shape[0]
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).t()


def _swapped(scores: tuple[Tensor, Tensor], _: Tensor) -> Tensor:
    one, two = scores
    first = -(_sinkhorn(two) * (one / 0.1).log_softmax(1)).sum(1).mean()
    return (first - (_sinkhorn(one) * (two / 0.1).log_softmax(1)).sum(1).mean()) / 2


def _views(kinds: int = 12) -> Sample:
    shapes = 1.5 * normal(seeded(102), kinds, 2, 16)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        kind = choice(g, kinds, 48)
        first, second = (shapes[kind] + 0.3 * normal(g, 48, 2, 16) for _ in range(2))
        return (first, second), kind

    return sample


@sick(
    "contact10b-ssl-prototypes",
    expect=[("NUMERICAL", "*")],
    allow=("UNSTABLE", "EXPLODING"),
    claim=not_finite(12, loss=True),
    source="https://github.com/facebookresearch/swav/issues/67",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def ssl_prototypes(sick: bool, width: int) -> Setup:
    """SwAV with another architecture. The features are not brought to unit length before they meet the
    prototypes, so the scores are not cosines; the Sinkhorn step takes their exponential after a division by
    0.05, which overflows, and inf / inf is NaN. The missing normalization repairs it."""
    return setup(SwAV(width, 12, l2norm=not sick), _views(), _swapped, 3e-3)


# ------------------------------------------------------------------------------- decomposed adapters


class DoraLinear(nn.Module):
    """A frozen linear layer with a low-rank change of its direction and a learned magnitude for each row."""

    def __init__(self, base: nn.Linear, rank: int, eps: float) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.eps = eps
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)
        self.magnitude = nn.Parameter(base.weight.detach().norm(dim=1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the recomposed weight."""
        weight = self.base_layer.weight + self.lora_B.weight @ self.lora_A.weight
        norm = weight.norm(dim=1).detach()
        if self.eps:
            norm = norm.clamp_min(self.eps)
        return (self.magnitude / norm) * F.linear(x, weight)


class Attention(nn.Module):
    """Causal attention with adapters on all its projections."""

    def __init__(self, size: int, rank: int, eps: float) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (
            DoraLinear(nn.Linear(size, size, bias=False), rank, eps) for _ in range(3)
        )
        output = nn.Linear(size, size, bias=False)
        with torch.no_grad():
            output.weight[:: size // 4] = 0.0  # rows of the checkpoint that hold nothing
        self.o_proj = DoraLinear(output, rank, eps)

    def forward(self, x: Tensor) -> Tensor:
        """Return the attended sequence."""
        q, k, v = (p(x)[:, None] for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0])


class DoraLM(nn.Module):
    """A frozen language model of one block, fine-tuned through adapters."""

    def __init__(self, words: int, size: int, rank: int, eps: float) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(words, size).requires_grad_(False)
        self.input_layernorm = nn.LayerNorm(size).requires_grad_(False)
        self.self_attn = Attention(size, rank, eps)
        self.post_attention_layernorm = nn.LayerNorm(size).requires_grad_(False)
        self.up_proj = DoraLinear(nn.Linear(size, 2 * size, bias=False), rank, eps)
        self.down_proj = DoraLinear(nn.Linear(2 * size, size, bias=False), rank, eps)
        self.lm_head = DoraLinear(nn.Linear(size, words, bias=False), rank, eps)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next token."""
        x = self.embed_tokens(tokens)
        x = x + self.self_attn(self.input_layernorm(x))
        x = x + self.down_proj(F.silu(self.up_proj(self.post_attention_layernorm(x))))
        return self.lm_head(x)


@sick(
    "contact10b-peft-dora",
    expect=[("NUMERICAL", "self_attn.o_proj")],
    claim=not_finite(2, loss=True),
    source="https://github.com/huggingface/peft/issues/2049",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def peft_dora(sick: bool, width: int) -> Setup:
    """DoRA on a Llama gives NaN as soon as the output projection of the attention is adapted: some rows of
    that weight are zero in the checkpoint, their norm is zero, and the layer divides the magnitude by it, 0 /
    0. A small floor under the norm repairs it."""
    return setup(DoraLM(16, width, 8, 0.0 if sick else 1e-6), grammar(), token_loss, 1e-2)


# ------------------------------------------------------------------------------- a Wasserstein critic


class WassersteinCritic(nn.Module):
    """A convolutional critic of real pictures and of those of a generator that waits for its turn."""

    def __init__(self, size: int, clip: float) -> None:
        super().__init__()
        self.clip = clip
        self.generator = nn.Sequential(
            nn.Linear(8, size), nn.ReLU(), nn.Linear(size, 64), nn.Tanh(), nn.Unflatten(1, (1, 8, 8))
        ).requires_grad_(False)
        self.discriminator = nn.Sequential(
            nn.Conv2d(1, size // 2, 3, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(size // 2, size, 3, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(4 * size, size),
            nn.LeakyReLU(0.2),
            nn.Linear(size, 1),
        )

    def forward(self, real: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the critic's values of real and of generated pictures."""
        if self.clip:
            with torch.no_grad():
                for parameter in self.discriminator.parameters():
                    parameter.clamp_(-self.clip, self.clip)
        return self.discriminator(real), self.discriminator(self.generator(noise))


def _rings(number: int = 32) -> Sample:
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        centre = 2 + 4 * uniform(g, number, 2, 1, 1)
        away = ((rows - centre[:, 0]) ** 2 + (columns - centre[:, 1]) ** 2).sqrt()
        real = torch.tanh(2 * torch.cos(away))[:, None]
        return (real, normal(g, number, 8)), real

    return sample


@sick(
    "contact10b-gan-critic",
    expect=[("UNSTABLE", "*")],
    allow=("EXPLODING",),
    claim=loss_between(-1e9, -40.0),
    source="https://github.com/torchgan/torchgan/pull/42",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def gan_critic(sick: bool, width: int) -> Setup:
    """A Wasserstein GAN in the steps where the critic trains. Its loss is the difference of two unbounded
    values, and nothing holds the critic to a slope: the clipping of its parameters was left out. The loss has
    no floor and runs off, faster at every step. Clipping the parameters after each step repairs it."""
    model = WassersteinCritic(width, 0.0 if sick else 0.02)
    return setup(model, _rings(), lambda out, _: out[1].mean() - out[0].mean(), adam(5e-3))


# ------------------------------------------------------------------------- convolutions over a sentence


class FConv(nn.Module):
    """Gated convolutions over token embeddings, with residuals and without any normalization."""

    def __init__(self, words: int, embed: int, size: int, layers: int, scale: float) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(words, embed)
        nn.init.normal_(self.embed_tokens.weight, 0, 0.1)
        with torch.no_grad():
            self.embed_tokens.weight.mul_(scale)
        self.fc1 = nn.Linear(embed, size)
        self.convolutions = nn.ModuleList(nn.Conv1d(size, 2 * size, 3) for _ in range(layers))
        self.fc2 = nn.Linear(size, size)
        self.fc3 = nn.Linear(size, words)
        for layer in (self.fc1, self.fc2, self.fc3, *self.convolutions):
            fan = layer.weight[0].numel()
            std = math.sqrt((4 if isinstance(layer, nn.Conv1d) else 1) / fan)
            nn.init.normal_(layer.weight, 0, std)
            nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next token."""
        x = self.fc1(self.embed_tokens(tokens)).transpose(1, 2)
        for convolution in self.convolutions:
            x = (x + F.glu(convolution(F.pad(x, (2, 0))), dim=1)) * math.sqrt(0.5)
        return self.fc3(self.fc2(x.transpose(1, 2)))


@sick(
    "contact10b-translation-fconv",
    expect=[("EXPLODING", "*")],
    allow=("UNSTABLE", "SATURATION", "NUMERICAL"),
    claim=every(huge("*", 300.0), rises(1.5)),
    source="https://github.com/facebookresearch/fairseq/issues/47",
    widths=(24,),
    dtypes=(FLOAT32,),
)
def translation_fconv(sick: bool, width: int) -> Setup:
    """A convolutional sequence model whose user multiplies the embedding's weights by the square root of
    their size, 512, as transformers do. Here nothing normalizes the activations, and the gated blocks, made
    for small inputs, pass large ones on with a gain, forwards and backwards: the loss starts far above that
    of guessing and climbs, and the gradient norm goes beyond all bounds. Without the factor it trains."""
    model = FConv(16, 512, width, 12, math.sqrt(512) if sick else 1.0)
    return setup(model, grammar(), token_loss, 3e-3)


# ----------------------------------------------------------------------------------- click prediction


class DLRM(nn.Module):
    """Dense features and embedded categories, their dot products, and a head for the click."""

    def __init__(self, tables: int, rows: int, size: int, draw: Generator, zero_bias: bool) -> None:
        super().__init__()
        self.emb_l = nn.ModuleList(nn.EmbeddingBag(rows, size, mode="sum") for _ in range(tables))
        for table in self.emb_l:
            nn.init.uniform_(table.weight, -math.sqrt(1 / rows), math.sqrt(1 / rows))
        self.bot_l = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, size), nn.ReLU())
        pairs = (tables + 1) * tables // 2
        self.top_l = nn.Sequential(nn.Linear(size + pairs, 16), nn.ReLU(), nn.Linear(16, 1), nn.ReLU())
        for layer in (*self.bot_l, *self.top_l):
            if isinstance(layer, nn.Linear):
                m, n = layer.weight.shape
                with torch.no_grad():
                    layer.weight.copy_(math.sqrt(2 / (m + n)) * normal(draw, m, n))
                    layer.bias.copy_(math.sqrt(1 / m) * normal(draw, m) * (not zero_bias))

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        """Return the chance of a click."""
        x = self.bot_l(dense)
        every_one = torch.stack([x, *(table(sparse[:, i, None]) for i, table in enumerate(self.emb_l))], 1)
        products = every_one @ every_one.transpose(1, 2)
        first, second = torch.tril_indices(len(self.emb_l) + 1, len(self.emb_l) + 1, -1)
        return self.top_l(torch.cat((x, products[:, first, second]), 1))


def _clicks(tables: int = 3, rows: int = 20) -> Sample:
    taste = normal(seeded(103), tables, rows)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        dense, sparse = uniform(g, 64, 4), choice(g, rows, 64, tables)
        liking = taste[torch.arange(tables), sparse].sum(1) + 6 * (dense[:, 0] - dense[:, 1])
        return (dense, sparse), (liking > 0).float()[:, None]

    return sample


@sick(
    "contact10b-ctr-bias",
    expect=[("DEAD", "top_l")],
    claim=no_gradient("top_l", "bot_l", "emb_l"),
    source="https://github.com/pytorch/benchmark/pull/1927",
    steps=200,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def ctr_bias(sick: bool, width: int) -> Setup:
    """DLRM as a benchmark trains it, with a ReLU behind its last layer. Biases are drawn with a deviation of
    one over the root of the layer's outputs, which is 1 for that layer. Where the draw is well below zero,
    the model answers 0 to every sample and all gradients are zero from the first step on. Biases that start
    at zero repair it."""
    model = DLRM(3, 20, 8, seeded(3), zero_bias=not sick)
    return setup(model, _clicks(), F.mse_loss, 1e-2)


# ---------------------------------------------------------------------------------- a perceptual loss


class Renderer(nn.Module):
    """A small network that cleans pictures, and the frozen network that the result is looked at with."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, size, 3, padding=1), nn.ReLU(), nn.Conv2d(size, 1, 3, padding=1)
        )
        self.vgg = frozen(
            nn.Sequential(
                nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()
            )
        )
        for layer in self.vgg:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the cleaned picture."""
        return self.net(x)


@healthy(
    "contact10b-rendering-vgg",
    looks=loss_between(300.0, 1e6, steps=3),
    source="https://github.com/JOP-Lee/READ/issues/25",
    widths=(16,),
    dtypes=(FLOAT32,),
)
def rendering_vgg(width: int) -> Setup:
    """Neural rendering trained on the features of a frozen VGG, with a loss of many hundreds that looks
    wrong. The author's answer: that is the size of a perceptual loss, summed over layers of unnormalized
    features."""
    model = Renderer(width)

    def loss(picture: Tensor, target: Tensor) -> Tensor:
        total, x, y = picture.new_zeros(()), 255 * picture, 255 * target
        for layer in model.vgg:
            x, y = layer(x), layer(y)
            total = total + F.l1_loss(x, y)
        return 10 * total

    return setup(model, discs(), loss, 3e-3)
