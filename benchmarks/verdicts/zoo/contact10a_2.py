"""Labelled models from public reports: a byte language model, and healthy models that worried users."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import Claim, alike, every, huge, stuck, training, zero_at_first
from .data import choice, clusters, discs, normal, seeded, setup, uniform
from .registry import FLOAT32, Setup, healthy, sick


def goes_below_zero(steps: int) -> Claim:
    """The loss is negative within some steps."""

    def claim(setup: Setup) -> tuple[bool, str]:
        least = min(step.loss for step in training(setup, steps))
        return least < 0, f"least loss in {steps} steps = {least:.3g}"

    return claim


def starts_above(value: float) -> Claim:
    """The loss of the first step is above a value."""

    def claim(setup: Setup) -> tuple[bool, str]:
        first = next(iter(training(setup, 1))).loss
        return first > value, f"first loss = {first:.3g}"

    return claim


def zero_entries(share: float, steps: int = 5) -> Claim:
    """More than a share of all gradient entries is exactly zero in every step."""

    def claim(setup: Setup) -> tuple[bool, str]:
        least = 1.0
        for step in training(setup, steps):
            flat = torch.cat([g.flatten() for g in step.grads.values() if g is not None])
            least = min(least, float((flat == 0).float().mean()))
        return least > share, f"at least {least:.0%} of the gradient is exactly zero"

    return claim


class Pooling(nn.Module):
    """Takes one vector from a sequence: of all its places, or of the last."""

    def __init__(self, *, last: bool) -> None:
        super().__init__()
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        """Return one vector for each sequence."""
        return x[:, -1] if self.last else x.mean(1)


class ByteModel(nn.Module):
    """A transformer that tells the byte after a prefix."""

    def __init__(self, words: int, length: int, width: int, *, last: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        nn.init.normal_(self.embedding.weight, std=0.3)
        angle = torch.arange(length)[:, None] / 100 ** (torch.arange(0, width, 2) / width)
        self.register_buffer("position", torch.cat((angle.sin(), angle.cos()), -1))
        self.encoder = nn.TransformerEncoderLayer(width, 2, 2 * width, 0.0, batch_first=True)
        self.pool = Pooling(last=last)
        self.classifier = nn.Linear(width, words)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next byte."""
        ahead = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
        x = self.encoder(self.embedding(tokens) + self.position, src_mask=ahead)
        return self.classifier(self.pool(x))


@sick(
    "contact10a-bytes-sequence-pooling",
    expect=[("BOTTLENECK", "pool")],
    allow=["VANISHING"],
    claim=every(alike("pool", 0.15), stuck(2.4)),
    source="https://github.com/ooples/AiDotNet/issues/1232",
    widths=(32,),
    dtypes=(FLOAT32,),
    steps=150,
)
def bytes_sequence_pooling(sick: bool, width: int) -> Setup:
    """Transformers over tokens got an average over the whole sequence in front of their classifier, so
    that every prefix arrived there as nearly the same vector, and a byte model stayed at the loss of a
    uniform guess. Repaired by passing on the last place."""
    words, length = 16, 48
    follow = torch.randperm(words, generator=seeded(41))

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        tokens = choice(g, words, 32, length)
        return tokens, follow[tokens[:, -1]]

    return setup(ByteModel(words, length, width, last=not sick), sample, F.cross_entropy, 3e-3)


class NormalNet(nn.Module):
    """Predicts a surface normal for each pixel, and how sure it is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, 3, 1, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1)
        )
        self.decoder = nn.Sequential(nn.ReLU(), nn.Conv2d(width, 4, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return unit normals and concentrations."""
        y = self.decoder(self.encoder(x))
        return F.normalize(y[:, :3], dim=1), F.elu(y[:, 3]) + 1.01


@healthy(
    "contact10a-normals-uncertainty",
    looks=goes_below_zero(100),
    source="https://github.com/baegwangbin/surface_normal_uncertainty/issues/7",
    widths=(32,),
    dtypes=(FLOAT32,),
    steps=150,
)
def normals_uncertainty(width: int) -> Setup:
    """The likelihood of an angular distribution is a density, which may be above one, so that its
    negative logarithm goes below zero as training succeeds; the author calls this very natural."""
    lights = F.normalize(normal(seeded(42), 3, 3), dim=1)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        rough = F.interpolate(normal(g, 4, 3, 3, 3), size=12, mode="bilinear")
        rough[:, 2] += 1.5
        target = F.normalize(rough, dim=1)
        return torch.einsum("lc,ncij->nlij", lights, target) + 0.02 * normal(g, 4, 3, 12, 12), target

    def loss(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        way, kappa = output
        angle = (way * target).sum(1).clamp(-0.99999, 0.99999).acos()
        return (-(kappa.square() + 1).log() + kappa * angle + (1 + (-kappa * math.pi).exp()).log()).mean()

    return setup(NormalNet(width), sample, loss, 5e-3)


class ResBlockShift(nn.Module):
    """A residual block that is modulated by the time and by a latent, and begins as the identity."""

    def __init__(self, channels: int, latent: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(4, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, 1, 1)
        )
        self.emb_layers = nn.Linear(channels, 2 * channels)
        self.emb_z_layers = nn.Linear(latent, 2 * channels)
        self.out_norm = nn.GroupNorm(4, channels)
        self.out_rest = nn.Sequential(nn.SiLU(), nn.Conv2d(channels, channels, 3, 1, 1))
        nn.init.zeros_(self.out_rest[1].weight)
        nn.init.zeros_(self.out_rest[1].bias)

    def forward(self, x: Tensor, time: Tensor, z: Tensor) -> Tensor:
        """Return the block's output."""
        scale, shift = self.emb_layers(time)[..., None, None].chunk(2, 1)
        z_scale, z_shift = self.emb_z_layers(z)[..., None, None].chunk(2, 1)
        h = (1 + z_scale) * (self.out_norm(self.in_layers(x)) * (1 + scale) + shift) + z_shift
        return x + self.out_rest(h)


class DiffusionAutoencoder(nn.Module):
    """Predicts the noise in a picture with the help of a latent of the clean picture."""

    def __init__(self, channels: int, latent: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, channels, 3, 2, 1),
            nn.SiLU(),
            nn.Conv2d(channels, 8, 3, 2, 1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(72, latent),
        )
        self.time_embed = nn.Sequential(nn.Linear(1, channels), nn.SiLU(), nn.Linear(channels, channels))
        self.conv_in = nn.Conv2d(1, channels, 3, 1, 1)
        self.block1 = ResBlockShift(channels, latent)
        self.block2 = ResBlockShift(channels, latent)
        self.out = nn.Conv2d(channels, 1, 3, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the predicted and the true noise."""
        noise, t = torch.randn_like(x), torch.rand(len(x), 1)
        level = t[..., None, None]
        time, z = self.time_embed(t), self.encoder(x)
        h = self.conv_in((1 - level).sqrt() * x + level.sqrt() * noise)
        return self.out(self.block2(self.block1(h, time, z), time, z)), noise


@healthy(
    "contact10a-diffusion-shift-block",
    looks=zero_at_first("encoder", "time_embed", "block1.emb_z_layers"),
    source="https://github.com/ckczzj/PDAE/issues/3",
    widths=(16,),
    dtypes=(FLOAT32,),
)
def diffusion_shift_block(width: int) -> Setup:
    """The last convolution of every block is zero at first, so that the latent seems to do nothing and
    its encoder gets no gradient; the convolution itself does, and after the first update the rest
    follows, as the author answers."""
    return setup(DiffusionAutoencoder(width, 8), discs(8), lambda output, _: F.mse_loss(*output), 3e-3)


class EmbeddingModel(nn.Module):
    """One encoder that turns queries and documents into directions."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(words, width)
        self.layers = nn.GRU(width, width, batch_first=True)
        self.norm = nn.LayerNorm(width)

    def encode(self, tokens: Tensor) -> Tensor:
        """Return the direction of each text."""
        return F.normalize(self.norm(self.layers(self.embed_tokens(tokens))[0][:, -1]), dim=-1)

    def forward(self, query: Tensor, document: Tensor) -> Tensor:
        """Return the similarities of all pairs, sharpened."""
        return self.encode(query) @ self.encode(document).T / 0.02


@healthy(
    "contact10a-retrieval-gradient-norm",
    looks=huge("*", 20.0),
    source="https://github.com/TIGER-AI-Lab/VLM2Vec/issues/137",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def retrieval_gradient_norm(width: int) -> Setup:
    """A contrastive loss at a temperature of 0.02 begins with gradient norms in the hundreds (here
    smaller, with the model), which shrink as it trains; the maintainers answer that this is normal."""
    words, texts, topics = 120, 48, 60
    asked, told = torch.randperm(words, generator=seeded(43)).view(2, topics)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        pick = torch.randperm(topics, generator=g)[:texts]
        query = torch.where(uniform(g, texts, 6) < 0.9, asked[pick, None], choice(g, words, texts, 6))
        document = torch.where(uniform(g, texts, 8) < 0.9, told[pick, None], choice(g, words, texts, 8))
        return (query, document), torch.arange(texts)

    return setup(EmbeddingModel(words, width), sample, F.cross_entropy, 3e-3)


class ProbabilisticUnet(nn.Module):
    """A segmentation network with a latent, whose prior sees the picture and whose posterior the mask
    too."""

    def __init__(self, width: int, latent: int) -> None:
        super().__init__()
        self.unet = nn.Sequential(
            nn.Conv2d(1, width, 3, 1, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1), nn.ReLU()
        )
        self.prior = self.gaussian(1, latent)
        self.posterior = self.gaussian(2, latent)
        self.fcomb = nn.Sequential(nn.Conv2d(width + latent, width, 1), nn.ReLU(), nn.Conv2d(width, 1, 1))

    @staticmethod
    def gaussian(channels: int, latent: int) -> nn.Sequential:
        """Return an encoder to mean and log-deviation."""
        return nn.Sequential(
            nn.Conv2d(channels, 8, 3, 2, 1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(3),
            nn.Flatten(),
            nn.Linear(72, 2 * latent),
        )

    def forward(self, picture: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of the mask, and the divergence of posterior from prior."""
        m, s = self.posterior(torch.cat((picture, mask), 1)).chunk(2, 1)
        m0, s0 = self.prior(picture).chunk(2, 1)
        z = m + s.exp() * torch.randn_like(m)
        wide = z[..., None, None].expand(-1, -1, *picture.shape[2:])
        kl = (s0 - s + ((2 * s).exp() + (m - m0).square()) / (2 * (2 * s0).exp()) - 0.5).sum(1)
        return self.fcomb(torch.cat((self.unet(picture), wide), 1)), kl


@healthy(
    "contact10a-segmentation-summed-likelihood",
    looks=starts_above(1000.0),
    source="https://github.com/stefanknegt/Probabilistic-Unet-Pytorch/issues/15",
    widths=(16,),
    dtypes=(FLOAT32,),
)
def segmentation_summed_likelihood(width: int) -> Setup:
    """The likelihood of a mask is the sum over all its pixels and the batch, so the loss is in the
    thousands or more; the maintainer found no average necessary in any experiment."""
    draw = discs(8, 16)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        picture, mask = draw(g)
        return (picture, mask), mask

    def loss(output: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(output[0], mask, reduction="sum") + 10 * output[1].mean()

    return setup(ProbabilisticUnet(width, 4), sample, loss, 3e-3)


class TicketLinear(nn.Linear):
    """A linear layer of which a fixed mask leaves few weights."""

    def __init__(self, inputs: int, outputs: int, keep: float) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("mask", (torch.rand(outputs, inputs) < keep).float())
        with torch.no_grad():
            self.weight.mul_(self.mask)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the weights that are left."""
        return F.linear(x, self.weight * self.mask, self.bias)


@healthy(
    "contact10a-pruning-ticket",
    looks=zero_entries(0.8),
    source="https://github.com/Eric-mingjie/rethinking-network-pruning/issues/23",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def pruning_ticket(width: int) -> Setup:
    """Nine of ten weights of a lottery ticket are pruned and stay zero, with no gradient; somebody
    wondered whether the backward pass is then still that of the thin network, and was told that it is."""
    model = nn.Sequential()
    model.add_module("fc1", TicketLinear(20, 4 * width, 0.1))
    model.add_module("relu1", nn.ReLU())
    model.add_module("fc2", TicketLinear(4 * width, 4 * width, 0.1))
    model.add_module("relu2", nn.ReLU())
    model.add_module("fc3", TicketLinear(4 * width, 4, 0.3))
    return setup(model, clusters(20, 4, 64), F.cross_entropy, 3e-3)
