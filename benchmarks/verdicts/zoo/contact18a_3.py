"""A conditional autoencoder, and healthy models that look sick: re-created from public reports."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .claims import huge, no_gradient, stuck, training, weak
from .contact18a_2 import _Critic, _Graph, _itself, _real_and_fake
from .data import clusters, factors, frozen, normal, seeded, setup, stack, textures, trained
from .registry import FLOAT32, Setup, healthy, sick

# ------------------------------------------------------------------------- a code that is not used


class _Conditional(nn.Module):
    """Draws a picture of a shape in an appearance: the shape comes by skips, the appearance by a code."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = stack(fc1=nn.Linear(32, width), act=nn.ReLU(), fc2=nn.Linear(width, 16))
        self.shape = stack(fc1=nn.Linear(16, width), act=nn.ReLU())
        self.mix = nn.Linear(8 + width, width)
        self.out = nn.Linear(2 * width, 32)

    def forward(self, x: Tensor, shape: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, spread = self.encoder(x).chunk(2, 1)
        code = mean + noise * (0.5 * spread).exp()
        skip = self.shape(shape)
        picture = self.out(torch.cat([self.mix(torch.cat([code, skip], 1)).relu(), skip], 1))
        return picture, mean, spread


def _shapes_and_looks(g) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    fixed = seeded(31)
    by_shape, by_look = normal(fixed, 16, 32) / 4, normal(fixed, 4, 32) / 2
    shape, look = normal(g, 64, 16), normal(g, 64, 4)
    x = shape @ by_shape + look @ by_look
    return (x, shape, normal(g, 64, 8)), x


def _told_apart(module: str, below: float, *, steps: int = 20):
    """The means of the codes hardly differ between samples, against a prior of unit size."""

    def claim(ready: Setup) -> tuple[bool, str]:
        *_, last = training(ready, steps, (module,))
        mean = last.outputs[module].detach().chunk(2, 1)[0]
        apart = float((mean - mean.mean(0)).square().mean().sqrt())
        return apart < below, f"deviation of the codes = {apart:.2g}"

    return claim


@sick(
    "contact18a-vunet-code",
    [("BOTTLENECK", "encoder")],
    _told_apart("encoder", 0.1),
    allow=("VANISHING",),
    source="https://github.com/CompVis/vunet/issues/5",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def vunet_code(sick: bool, width: int) -> Setup:
    """The skips of a variational U-Net carry so much that the decoder does without the code, and the KL term
    at full weight presses it to the prior at once. A weight of nearly zero at the start repairs it."""
    weight = 1.0 if sick else 1e-3

    def loss(output: tuple[Tensor, Tensor, Tensor], x: Tensor) -> Tensor:
        picture, mean, spread = output
        kl = 0.5 * (mean.square() + spread.exp() - 1 - spread).sum(1).mean()
        return F.mse_loss(picture, x) + weight * kl

    return setup(_Conditional(width), _shapes_and_looks, loss, 1e-2)


# ------------------------------------------------------------------------------------------ healthy


def _below_zero(*, steps: int = 40):
    """The loss is negative after some steps."""

    def claim(ready: Setup) -> tuple[bool, str]:
        *_, last = training(ready, steps)
        return last.loss < 0, f"loss after {steps} steps = {last.loss:.3g}"

    return claim


@healthy(
    "contact18a-healthy-critic",
    _below_zero(),
    source="https://github.com/DegardinBruno/Kinetic-GAN/issues/1",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def healthy_critic(width: int) -> Setup:
    """The loss of a Wasserstein critic with its penalty is negative: it is a difference of two means."""
    return setup(_Critic(width), _real_and_fake(False), _itself, 1e-3)


class _Denoiser(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.time = nn.Linear(1, width)
        self.fc1 = nn.Linear(16, width)
        self.fc2 = nn.Linear(width, width)
        self.out = nn.Linear(width, 16)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = F.silu(self.fc1(x) + self.time(t))
        return self.out(F.silu(self.fc2(h)))


def _noised(g) -> tuple[tuple[Tensor, Tensor], Tensor]:
    clean, _ = factors(16, 12, number=64, noise=0.5)(g)
    t, noise = torch.rand(64, 1, generator=g), normal(g, 64, 16)
    return ((1 - t).sqrt() * clean + t.sqrt() * noise, t), noise


@healthy(
    "contact18a-healthy-diffusion",
    stuck(0.3),
    source="https://github.com/PRBonn/LiDiff/issues/27",
    converged=True,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def healthy_diffusion(width: int) -> Setup:
    """The loss of a diffusion model stays where it is, far above zero: the noise cannot be told at small
    noise levels, and samples get better all the same."""
    return trained(setup(_Denoiser(width), _noised, F.mse_loss, 2e-3), 600)


class _Prototypes(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.student = stack(fc1=nn.Linear(16, width), act=nn.GELU(), fc2=nn.Linear(width, 16))
        self.last = frozen(nn.Linear(16, 24, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.normalize(self.student(x), dim=1)) / 0.1


@healthy(
    "contact18a-healthy-lastlayer",
    no_gradient("last"),
    source="https://github.com/lightly-ai/lightly/issues/1586",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def healthy_lastlayer(width: int) -> Setup:
    """The last layer of the student's head is kept fixed for the first epoch of self-distillation, and all
    before it trains towards the sharpened words of a teacher."""
    model, teacher = _Prototypes(width), frozen(_Prototypes(width))
    points = clusters(16, 6, number=64)

    def sample(g) -> tuple[Tensor, Tensor]:
        x = points(g)[0]
        return x + 0.1 * normal(g, *x.shape), (teacher(x) / 0.4).softmax(1)

    return setup(model, sample, F.cross_entropy, 3e-3)


class _Averaged(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = stack(fc1=nn.Linear(16, width), act=nn.GELU(), fc2=nn.Linear(width, 8))
        self.codebook = frozen(nn.Embedding(32, 8))
        self.decoder = stack(fc1=nn.Linear(8, width), act=nn.GELU(), fc2=nn.Linear(width, 16))
        self.commitment = torch.zeros(())
        self.register_buffer("count", torch.ones(32))
        self.register_buffer("total", self.codebook.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        z = self.encoder(x)
        with torch.no_grad():
            index = torch.cdist(z, self.codebook.weight).argmin(1)
            chosen = F.one_hot(index, 32).to(z.dtype)
            code = self.codebook(index)
            self.count.lerp_(chosen.sum(0), 0.05)
            self.total.lerp_(chosen.T @ z, 0.05)
            self.codebook.weight.copy_(self.total / self.count.clamp_min(1e-3)[:, None])
        self.commitment = F.mse_loss(z, code)
        return self.decoder(z + (code - z).detach())


@healthy(
    "contact18a-healthy-ema",
    no_gradient("codebook"),
    source="https://github.com/lucidrains/vector-quantize-pytorch/issues/40",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def healthy_ema(width: int) -> Setup:
    """The codebook of a VQ-VAE gets no gradient: it follows the moving average of what is mapped to it."""
    model = _Averaged(width)

    def loss(output: Tensor, x: Tensor) -> Tensor:
        return F.mse_loss(output, x) + 0.25 * model.commitment

    return setup(model, factors(16, 3), loss, 3e-3)


class _Variational(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = stack(
            conv=nn.Conv2d(3, width, 3, 2, 1), act=nn.ReLU(), flat=nn.Flatten(), fc=nn.Linear(16 * width, 64)
        )
        self.decoder = stack(fc1=nn.Linear(32, 4 * width), act=nn.ReLU(), fc2=nn.Linear(4 * width, 192))

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, spread = self.encoder(x).chunk(2, 1)
        return self.decoder(mean + noise * (0.5 * spread).exp()), mean, spread


_pictures = textures()


def _with_noise(g) -> tuple[tuple[Tensor, Tensor], Tensor]:
    x = _pictures(g)[0]
    return (x, normal(g, len(x), 32)), x.flatten(1)


@healthy(
    "contact18a-healthy-sums",
    huge("*", 100.0),
    source="https://github.com/sinhasam/vaal/issues/10",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def healthy_sums(width: int) -> Setup:
    """Both terms of a variational autoencoder are summed over pixels, codes and batch: losses of thousands,
    and a KL term that grows as the codes come to say something."""

    def loss(output: tuple[Tensor, Tensor, Tensor], x: Tensor) -> Tensor:
        picture, mean, spread = output
        return (picture - x).square().sum() + 0.5 * (mean.square() + spread.exp() - 1 - spread).sum()

    return setup(_Variational(width), _with_noise, loss, 2e-3)


class _Faces(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = stack(
            fc1=nn.Linear(16, width), act1=nn.ReLU(), fc2=nn.Linear(width, width), act2=nn.ReLU()
        )
        self.recognition = nn.Linear(width, 24, bias=False)
        self.analysis = stack(fc=nn.Linear(width, width), act=nn.ReLU(), age=nn.Linear(width, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x)
        cosine = F.normalize(features, dim=1) @ F.normalize(self.recognition.weight, dim=1).T
        return 16 * cosine, self.analysis(features)


@healthy(
    "contact18a-healthy-faces",
    weak("analysis", "recognition", 0.25),
    source="https://github.com/lxq1000/SwinFace/issues/7",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def healthy_faces(width: int) -> Setup:
    """The loss of recognition is many times those of analysis, all with weight one: each task has a subnet of
    its own, and both fall."""

    def loss(output: tuple[Tensor, Tensor], kind: Tensor) -> Tensor:
        scores, age = output
        return F.cross_entropy(scores, kind) + F.mse_loss(age[:, 0], (kind % 3).float() / 2)

    return setup(_Faces(width), clusters(16, 24, number=64), loss, 3e-3)


def _grows(first: str, last: str, above: float):
    """Activations of a late layer are larger than those of an early one."""

    def claim(ready: Setup) -> tuple[bool, str]:
        (step,) = training(ready, 1, (first, last))
        sizes = [float(step.outputs[name].detach().square().mean().sqrt()) for name in (first, last)]
        return sizes[1] > above * sizes[0], f"size of {last} / {first} = {sizes[1] / sizes[0]:.2g}"

    return claim


@healthy(
    "contact18a-healthy-molecule",
    _grows("convs.0", "convs.3", 1.5),
    source="https://github.com/awslabs/dgl-lifesci/issues/113",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def healthy_molecule(width: int) -> Setup:
    """Messages are summed without any norm by degree, so that activations grow from layer to layer: with the
    two neighbours of an atom this is by design, since degrees can be told apart so."""
    ring = torch.eye(5) + torch.eye(5).roll(1, 0) + torch.eye(5).roll(-1, 0)
    links = torch.block_diag(*[ring] * 16)
    points = clusters(16, 4, number=16, spread=0.3)

    def sample(g) -> tuple[Tensor, Tensor]:
        molecule, kind = points(g)
        atoms = molecule.repeat_interleave(5, 0)
        return atoms + normal(g, *atoms.shape), kind.repeat_interleave(5)

    return setup(_Graph(width, links, 4, 4), sample, F.cross_entropy, 3e-3)
