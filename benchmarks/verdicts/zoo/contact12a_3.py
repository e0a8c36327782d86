"""Cases from public reports: codebooks, capsules, adversarial nets, re-identification."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import Claim, every, flat, stuck, tiny, training
from .data import Sample, adam, normal, seeded, setup, sgd, stack, textures
from .registry import FLOAT32, Setup, sick


def same_rows(module: str, below: float, *, steps: int) -> Claim:
    """After some steps, what differs among the samples is a small part of a module's output."""

    def claim(ready: Setup) -> tuple[bool, str]:
        *_, last = training(ready, steps, (module,))
        rows = last.outputs[module].detach().double()
        size = float(rows.square().mean().sqrt())
        share = float((rows - rows.mean(0)).square().mean().sqrt()) / max(size, 1e-300)
        return share < below, f"what differs in {module} after {steps} steps = {share:.2g}"

    return claim


# -------------------------------------------------------------------------------------------- codebooks


class Quantize(nn.Module):
    """A codebook that follows running sums of the vectors assigned to its entries."""

    def __init__(self, dim: int, entries: int, count: float, decay: float = 0.99) -> None:
        super().__init__()
        self.decay = decay
        embed = normal(seeded(36), entries, dim)
        self.register_buffer("embed", embed)
        self.register_buffer("cluster_size", torch.full((entries,), count))
        self.register_buffer("embed_avg", embed.clone())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the nearest entries, with the gradient passed through, and the commitment loss."""
        flat = x.flatten(0, -2)
        index = torch.cdist(flat, self.embed).argmin(1)
        quantized = self.embed[index].view_as(x)
        with torch.no_grad():
            hits = F.one_hot(index, len(self.embed)).float()
            self.cluster_size = self.decay * self.cluster_size + (1 - self.decay) * hits.sum(0)
            self.embed_avg = self.decay * self.embed_avg + (1 - self.decay) * hits.T @ flat
            total = self.cluster_size.sum()
            size = (self.cluster_size + 1e-5) / (total + len(self.embed) * 1e-5) * total
            self.embed = self.embed_avg / size[:, None]
        return x + (quantized - x).detach(), F.mse_loss(x, quantized)


class VectorAutoencoder(nn.Module):
    """A convolutional autoencoder with a quantised middle."""

    def __init__(self, width: int, count: float) -> None:
        super().__init__()
        self.encoder = stack(
            conv1=nn.Conv2d(3, width, 4, stride=2, padding=1),
            act1=nn.ReLU(),
            conv2=nn.Conv2d(width, 8, 3, padding=1),
            norm=nn.BatchNorm2d(8),
        )
        self.quantize = Quantize(8, 128, count)
        self.decoder = stack(
            conv1=nn.Conv2d(8, width, 3, padding=1),
            act1=nn.ReLU(),
            up=nn.ConvTranspose2d(width, 3, 4, stride=2, padding=1),
        )

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return the reconstruction and the commitment loss."""
        quantized, commit = self.quantize(self.encoder(image).permute(0, 2, 3, 1))
        return self.decoder(quantized.permute(0, 3, 1, 2)), commit


@sick(
    "contact12a-codes-counter",
    [("BOTTLENECK", "*")],
    every(same_rows("quantize", 1e-3, steps=4), stuck(1.0)),
    source="https://github.com/rosinality/vq-vae-2-pytorch/pull/72",
    allow=("NUMERICAL", "UNSTABLE", "EXPLODING", "DEAD"),
    falls_to=0.7,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def codes_counter(sick: bool, width: int) -> Setup:
    """The running counts of the codebook start at zero while its running sums start at the entries, so the
    first updates divide by almost nothing and throw all entries but one far away, which everything is then
    assigned to; counts that start at one repair it."""
    draw = textures()

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        image = draw(g)[0]
        return image, image

    def loss(output: tuple[Tensor, Tensor], image: Tensor) -> Tensor:
        return F.mse_loss(output[0], image) + 0.25 * output[1]

    return setup(VectorAutoencoder(width, 0.0 if sick else 1.0), sample, loss, 3e-3)


# ------------------------------------------------------------------------------------------------ capsules


def squash(s: Tensor) -> Tensor:
    """Return vectors of the same direction with a length below one."""
    square = s.square().sum(-1, keepdim=True)
    return square / (1 + square) * s / (square + 1e-8).sqrt()


class DigitCaps(nn.Module):
    """Capsules of classes that agree with the primary ones by routing."""

    def __init__(self, nodes: int, inputs: int, classes: int, size: int, scale: float) -> None:
        super().__init__()
        self.route_weights = nn.Parameter(scale * torch.randn(classes, nodes, inputs, size))

    def forward(self, u: Tensor) -> Tensor:
        """Return the capsules, of shape (batch, classes, size)."""
        votes = torch.einsum("bni,cnio->bcno", u, self.route_weights)
        logits = torch.zeros_like(votes[..., :1])
        for _ in range(2):
            v = squash((logits.softmax(1) * votes).sum(2, keepdim=True))
            logits = logits + (votes * v).sum(-1, keepdim=True)
        return squash((logits.softmax(1) * votes).sum(2))


class Length(nn.Module):
    """The lengths of vectors."""

    def forward(self, v: Tensor) -> Tensor:
        """Return them."""
        return (v.square().sum(-1) + 1e-8).sqrt()


class CapsuleNet(nn.Module):
    """Convolution, primary capsules, and capsules of classes whose lengths are the scores."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.primary = nn.Conv2d(width, width, 3, padding=1)
        self.digit_caps = DigitCaps(width // 8 * 144, 8, 4, 16, scale)
        self.length = Length()

    def forward(self, image: Tensor) -> Tensor:
        """Return the scores of the classes."""
        u = self.primary(F.relu(self.conv(image)))
        u = squash(u.unflatten(1, (-1, 8)).permute(0, 1, 3, 4, 2).flatten(1, 3))
        return self.length(self.digit_caps(u))


@sick(
    "contact12a-capsule-votes",
    [("SATURATION", "*")],
    every(flat("length", "one", 0.9), stuck(0.3, steps=40)),
    source="https://github.com/gram-ai/capsule-networks/issues/10",
    allow=("VANISHING",),
    steps=60,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def capsule_votes(sick: bool, width: int) -> Setup:
    """The routing weights have unit size, so the summed votes are long, every squashed capsule has a length
    of nearly one where the squashing is flat, and the net keeps guessing; weights a hundred times smaller
    repair it."""

    def loss(length: Tensor, kind: Tensor) -> Tensor:
        right = F.one_hot(kind, 4)
        per_class = right * F.relu(0.9 - length).square() + 0.5 * (1 - right) * F.relu(length - 0.1).square()
        return per_class.sum(1).mean()

    return setup(CapsuleNet(width, 1.0 if sick else 0.01), textures(size=12), loss, 1e-3)


# -------------------------------------------------------------------------------------- adversarial nets


class Generator8(nn.Module):
    """Pictures of 8 by 8 from noise, by transposed convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(8, 4 * width)
        self.up1 = nn.ConvTranspose2d(width, width, 4, stride=2, padding=1)
        self.up2 = nn.ConvTranspose2d(width, 3, 4, stride=2, padding=1)

    def forward(self, noise: Tensor) -> Tensor:
        """Return the pictures."""
        hidden = F.relu(self.project(noise)).unflatten(1, (-1, 2, 2))
        return 2 * torch.tanh(self.up2(F.relu(self.up1(hidden))))


class LeastSquaresGAN(nn.Module):
    """A generator and a critic that has been trained against it; the output is the critic's score of
    fakes."""

    def __init__(self, width: int, last: nn.Module) -> None:
        super().__init__()
        self.generator = Generator8(width)
        self.discriminator = stack(
            conv1=nn.Conv2d(3, width, 4, stride=2, padding=1),
            act1=nn.LeakyReLU(0.2),
            conv2=nn.Conv2d(width, width, 4, stride=2, padding=1),
            act2=nn.LeakyReLU(0.2),
            flat=nn.Flatten(),
            fc=nn.Linear(4 * width, 1),
            last=last,
        )

    def forward(self, noise: Tensor) -> Tensor:
        """Return the scores of generated pictures."""
        return self.discriminator(self.generator(noise))


@sick(
    "contact12a-gan-leastsquares",
    [("SATURATION", "*")],
    every(flat("discriminator.fc", "sigmoid of", 0.9), tiny("generator", 0.05), stuck(0.9, steps=40)),
    source="https://github.com/hwalsuklee/tensorflow-generative-model-collections/issues/19",
    allow=("VANISHING", "DEAD"),
    steps=80,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def gan_leastsquares(sick: bool, width: int) -> Setup:
    """The critic of a least-squares GAN ends in a sigmoid, and once it tells real from fake the sigmoid is
    flat, so the squared error passes hardly any gradient to the generator; the plain logit as score repairs
    it."""
    model = LeastSquaresGAN(width, nn.Sigmoid() if sick else nn.Identity())
    draw, g = textures(), seeded(37)
    optimizer = adam(5e-3)(model.discriminator.parameters())
    for _ in range(250):
        with torch.no_grad():
            fake = model.generator(normal(g, 16, 8))
        real = draw(g)[0]
        optimizer.zero_grad()
        loss = (model.discriminator(real) - 1).square().mean() + model.discriminator(fake).square().mean()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    model.discriminator.requires_grad_(False)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        return normal(g, 16, 8), torch.ones(16, 1)

    return setup(model, sample, F.mse_loss, sgd(0.005, 0.9))


# ------------------------------------------------------------------------------------- re-identification


class ReIdNet(nn.Module):
    """Embeddings of pictures for matching identities."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.backbone = stack(
            conv1=nn.Conv2d(3, width, 3, padding=1),
            act1=nn.ReLU(),
            conv2=nn.Conv2d(width, width, 3, stride=2, padding=1),
            act2=nn.ReLU(),
            conv3=nn.Conv2d(width, width, 3, stride=2, padding=1),
            act3=nn.ReLU(),
            pool=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
        )
        self.embedding = nn.Linear(width, 16)

    def forward(self, image: Tensor) -> Tensor:
        """Return the embeddings."""
        return self.embedding(self.backbone(image))


def batch_hard(embedding: Tensor, identity: Tensor) -> Tensor:
    """Return the triplet loss with the hardest positive and negative of each anchor, margin 0.5."""
    square = (embedding[:, None] - embedding[None]).square().sum(-1)
    distance = (square + 1e-12).sqrt()
    same = identity[:, None] == identity[None]
    positive = torch.where(same, distance, 0.0).amax(1)
    negative = torch.where(same, math.inf, distance).amin(1)
    return F.relu(0.5 + positive - negative).mean()


def identities(kinds: int = 10, each: int = 4) -> Sample:
    """Pictures of some identities, several of each, under strong changes of light."""
    looks = normal(seeded(38), kinds, 3, 8, 8)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        identity = torch.arange(kinds).repeat_interleave(each)
        light = normal(g, len(identity), 3, 1, 1)
        return looks[identity] + light + 0.5 * normal(g, len(identity), 3, 8, 8), identity

    return sample


@sick(
    "contact12a-tracking-triplets",
    [("BOTTLENECK", "*")],
    every(same_rows("embedding", 0.02, steps=18), stuck(0.45)),
    source="https://github.com/omoindrot/tensorflow-triplet-loss/issues/38",
    allow=("UNSTABLE", "DEAD", "VANISHING"),
    falls_to=0.7,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def tracking_triplets(sick: bool, width: int) -> Setup:
    """With hard triplets and too high a rate all embeddings run into one point within a few steps, and the
    loss stays at its margin, where nothing tells one picture from another; a lower rate repairs it."""
    return setup(ReIdNet(width), identities(), batch_hard, 2e-2 if sick else 1e-3)
