"""Generative, self-supervised and graph models, and fine-tuning: re-created from public reports."""

from __future__ import annotations

import copy
import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .claims import every, flat, growing, no_gradient, rises, strong, tiny, training
from .data import choice, factors, frozen, normal, seeded, setup, sgd, stack, textures, trained
from .registry import FLOAT32, Setup, sick

# ---------------------------------------------------------------------- a decoder of bare indices


class _Tokens(nn.Module):
    def __init__(self, width: int, straight: bool) -> None:
        super().__init__()
        self.encoder = stack(fc1=nn.Linear(16, width), act=nn.GELU(), fc2=nn.Linear(width, 8))
        self.codebook = nn.Embedding(32, 8)
        self.decoder = stack(fc1=nn.Linear(8, width), act=nn.GELU(), fc2=nn.Linear(width, 16))
        self.straight = straight
        self.extra = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        z = self.encoder(x)
        index = torch.cdist(z.detach(), self.codebook.weight.detach()).argmin(1)
        code = self.codebook(index)
        if not self.straight:
            return self.decoder(code)
        self.extra = (code - z.detach()).square().sum(1).mean() + (z - code.detach()).square().sum(1).mean()
        return self.decoder(z + (code - z).detach())


@sick(
    "contact18a-vqvae-index",
    [("DEAD", "encoder")],
    no_gradient("encoder"),
    source="https://github.com/Biohub/esm/issues/92",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def vqvae_index(sick: bool, width: int) -> Setup:
    """The decoder of a VQ-VAE takes only the indices that the encoder chose, and looks the codes up itself:
    nothing leads back to the encoder. The straight-through codes and the commitment loss repair it."""
    model, points = _Tokens(width, not sick), factors(16, 3)
    with torch.no_grad():  # codes start on what the encoder says
        model.codebook.weight.copy_(model.encoder(points(seeded(9))[0])[:32])

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(output, target) + model.extra

    return setup(model, points, loss, 1e-2)


# ------------------------------------------------------------------- a discriminator that has won


class _Fooling(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.generator = stack(fc1=nn.Linear(8, width), act=nn.ReLU(), fc2=nn.Linear(width, 16))
        self.discriminator = stack(
            fc1=nn.Linear(16, width), act=nn.LeakyReLU(0.2), fc2=nn.Linear(width, 1), chance=nn.Sigmoid()
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.discriminator(self.generator(z))


def _noise(g) -> tuple[Tensor, Tensor]:
    return normal(g, 64, 8), torch.zeros(64, 1)


@sick(
    "contact18a-gan-winner",
    [("SATURATION", "discriminator")],
    every(flat("discriminator", "sigmoid", 0.9), tiny("generator", 0.01)),
    allow=("VANISHING", "DEAD"),
    source="https://github.com/simontomaskarlsson/GAN-MRI/issues/11",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def gan_winner(sick: bool, width: int) -> Setup:
    """The discriminator tells every fake with certainty, its sigmoid sits at zero, and the generator, which
    minimises log(1 - D), gets no gradient through it. Minimising -log D instead repairs it."""
    model = _Fooling(width)
    real, g = factors(16, 3, noise=0.1), seeded(3)
    optimizer = torch.optim.Adam(model.discriminator.parameters(), lr=1e-2)
    for _ in range(600):
        optimizer.zero_grad()
        fake = model.generator(_noise(g)[0]).detach()
        true = model.discriminator(2 + real(g)[0]).clamp(1e-6, 1 - 1e-6)
        false = model.discriminator(fake).clamp(1e-6, 1 - 1e-6)
        (-true.log().mean() - (1 - false).log().mean()).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    frozen(model.discriminator)

    def loss(chance: Tensor, _: Tensor) -> Tensor:
        return (1 - chance).clamp_min(1e-20).log().mean() if sick else -chance.clamp_min(1e-20).log().mean()

    return setup(model, _noise, loss, sgd(0.01))


# -------------------------------------------------------------------------- a critic fed with pixels


class _Critic(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = stack(
            conv1=nn.Conv2d(3, width, 4, 2, 1),
            act1=nn.LeakyReLU(0.2),
            conv2=nn.Conv2d(width, width, 4, 2, 1),
            act2=nn.LeakyReLU(0.2),
            flat=nn.Flatten(),
            out=nn.Linear(4 * width, 1),
        )

    def forward(self, real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
        between = (mix * real + (1 - mix) * fake).requires_grad_()
        (slope,) = torch.autograd.grad(self.body(between).sum(), between, create_graph=True)
        penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
        return self.body(fake).mean() - self.body(real).mean() + 10 * penalty


def _real_and_fake(pixels: bool):
    pictures = textures()

    def sample(g) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        real = (0.4 * pictures(g)[0]).clamp(-1, 1)
        fake = torch.tanh(normal(g, *real.shape))
        mix = torch.rand(len(real), 1, 1, 1, generator=g)
        return (127.5 * (real + 1) if pixels else real, fake, mix), torch.zeros(())

    return sample


def _itself(output: Tensor, _: Tensor) -> Tensor:
    return output


@sick(
    "contact18a-wgan-pixels",
    [("EXPLODING", "*")],
    every(strong("body.conv1", 10.0), strong("body.conv1", 10.0, steps=10)),
    allow=("UNSTABLE",),
    source="https://github.com/igul222/improved_wgan_training/issues/72",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def wgan_pixels(sick: bool, width: int) -> Setup:
    """The real pictures come with pixels from 0 to 255, and the generator's lie between -1 and 1: the loss
    of the critic goes to thousands below zero with gradients as large. Pictures from -1 to 1 repair it."""
    return setup(_Critic(width), _real_and_fake(sick), _itself, 1e-3)


# --------------------------------------------------------------------------- views without a centre


class _Dino(nn.Module):
    def __init__(self, width: int, centred: bool, out: int = 16) -> None:
        super().__init__()
        self.student = stack(
            conv1=nn.Conv2d(3, width, 3, padding=1),
            act1=nn.GELU(),
            conv2=nn.Conv2d(width, width, 3, 2, 1),
            act2=nn.GELU(),
            pool=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            fc=nn.Linear(width, width),
            act3=nn.GELU(),
            head=nn.Linear(width, out),
        )
        self.teacher = frozen(copy.deepcopy(self.student))
        self.register_buffer("centre", torch.zeros(out))
        self.centred = centred

    def forward(self, one: Tensor, two: Tensor) -> Tensor:
        with torch.no_grad():
            for mine, theirs in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                mine.lerp_(theirs, 0.1)
            target = self.teacher(one)
            if self.centred:
                self.centre.lerp_(target.mean(0), 0.1)
            target = ((target - self.centre) / 0.04).softmax(1)
        return -(target * (self.student(two) / 0.1).log_softmax(1)).sum(1).mean()


_pictures = textures(8, number=32)


def _views(g) -> tuple[tuple[Tensor, Tensor], Tensor]:
    x = _pictures(g)[0]
    return (x + 0.2 * normal(g, *x.shape), x + 0.2 * normal(g, *x.shape)), torch.zeros(())


def _all_say_the_same(module: str, *, steps: int = 20):
    """What a module says of a batch, as a distribution, is the same for all its samples."""

    def claim(ready: Setup) -> tuple[bool, str]:
        *_, last = training(ready, steps, (module,))
        said = (last.outputs[module].detach() / 0.1).softmax(1)
        apart = float((said - said.mean(0)).abs().sum(1).mean() / 2)
        return apart < 0.02, f"share in which samples differ = {apart:.2g}, loss {last.loss:.3g}"

    return claim


@sick(
    "contact18a-dino-collapse",
    [("BOTTLENECK", "student")],
    _all_say_the_same("student"),
    allow=("UNSTABLE", "SATURATION"),
    source="https://github.com/facebookresearch/dinov2/issues/272",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def dino_collapse(sick: bool, width: int) -> Setup:
    """Self-distillation on crops that look much alike: the loss drops to almost nothing at once because the
    student says the same of every picture. The teacher's centre, which is left out, repairs it."""
    return setup(_Dino(width, not sick), _views, _itself, 3e-3)


# --------------------------------------------------------------------------- neighbours summed up


def _community(nodes: int, kinds: int, inside: float, outside: float) -> tuple[Tensor, Tensor]:
    g = seeded(21)
    kind = choice(g, kinds, nodes)
    chance = torch.where(kind[:, None] == kind[None], inside, outside)
    links = (torch.rand(nodes, nodes, generator=g) < chance).float().triu(1)
    return links + links.T + torch.eye(nodes), kind


class _Graph(nn.Module):
    def __init__(self, width: int, links: Tensor, layers: int, kinds: int) -> None:
        super().__init__()
        self.register_buffer("links", links)
        sizes = [16] + [width] * layers
        self.convs = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.head = nn.Linear(width, kinds)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = (self.links @ conv(x)).relu()
        return self.head(x)


@sick(
    "contact18a-graph-sum",
    [("EXPLODING", "convs")],
    growing("convs.0", "convs.3", 100.0),
    allow=("UNSTABLE",),
    source="https://github.com/alibaba/graph-learn/issues/153",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def graph_sum(sick: bool, width: int) -> Setup:
    """A graph convolution only adds up the features of a node and of its neighbours, of which there are many,
    and every layer multiplies activations and gradients. The factors from the degrees repair it."""
    links, kind = _community(96, 4, 0.6, 0.06)
    if not sick:
        scale = links.sum(1).rsqrt()
        links = scale[:, None] * links * scale[None]
    centres = normal(seeded(22), 4, 16)

    def sample(g) -> tuple[Tensor, Tensor]:
        return centres[kind] + 1.5 * normal(g, 96, 16), kind

    return setup(_Graph(width, links, 4, 4), sample, F.cross_entropy, 1e-2)


# ---------------------------------------------------------------------------------- fine-tuning


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))).relu()


def _resnet(width: int, kinds: int) -> nn.Sequential:
    return stack(
        stem=nn.Conv2d(3, width, 3, padding=1),
        layer1=_Block(width),
        layer2=_Block(width),
        pool=nn.AdaptiveAvgPool2d(1),
        flat=nn.Flatten(),
        fc=nn.Linear(width, kinds),
    )


@sick(
    "contact18a-finetune-rate",
    [("UNSTABLE", "*")],
    rises(4.0),
    allow=("EXPLODING",),
    source="https://github.com/keyu-tian/SparK/issues/69",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def finetune_rate(sick: bool, width: int) -> Setup:
    """A pretrained residual network is fine-tuned at a rate that suits another optimizer and batch size: the
    loss explodes within some steps. A fiftieth of the rate repairs it."""
    model = _resnet(width, 4)
    trained(setup(model, textures(4), F.cross_entropy, 3e-3), 60)
    model.fc = nn.Linear(width, 6)
    rate = 1.0 if sick else 0.02
    return setup(model, textures(6), F.cross_entropy, sgd(rate, 0.9), seed=1)
