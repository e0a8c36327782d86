"""Models of public reports: neural operators, differentiable rendering, molecules, splines."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from .claims import alike, every, fading, flat, growing, no_gradient, stuck, training
from .data import Sample, choice, normal, seeded, setup, sgd, stack, textures, uniform
from .registry import FLOAT32, Setup, healthy, sick

# -------------------------------------------------------------------------------------- neural operators


class SpectralFilter(nn.Module):
    """A linear map of the channels of each of the lowest frequencies."""

    def __init__(self, size: int, modes: int, deviation: float) -> None:
        super().__init__()
        self.modes = modes
        self.weight = nn.Parameter(deviation * torch.randn(modes, size, size, 2) / math.sqrt(2))

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x, norm="ortho")[..., : self.modes]
        kept = torch.einsum("mio,nim->nom", torch.view_as_complex(self.weight), spectrum)
        return torch.fft.irfft(kept, n=x.shape[-1], norm="ortho")


class OperatorBlock(nn.Module):
    """A spectral filter and a map of the channels side by side."""

    def __init__(self, size: int, modes: int, deviation: float, local: float) -> None:
        super().__init__()
        self.filter = SpectralFilter(size, modes, deviation)
        self.local = nn.Conv1d(size, size, 1)
        nn.init.normal_(self.local.weight, std=local)
        nn.init.zeros_(self.local.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.filter(x) + self.local(x))


def smoothed(number: int = 16, points: int = 64) -> Sample:
    """Random periodic functions; the target is the square of the function after some diffusion."""
    t = 2 * math.pi * torch.arange(points) / points
    waves = torch.stack([f(k * t) for k in (1, 2, 3) for f in (torch.sin, torch.cos)])
    damping = torch.tensor([1.0, 1.0, 0.6, 0.6, 0.3, 0.3])

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        parts = normal(g, number, 6)
        return (parts @ waves)[:, None], ((parts * damping) @ waves).square()[:, None] / 2

    return sample


@sick(
    "contact6a-operator-init",
    [("VANISHING", "blocks")],
    every(fading("blocks.0", "blocks.7", 1e-2), stuck(0.4, steps=40)),
    allow=["BOTTLENECK", "DEAD"],
    source="https://github.com/ai2cm/ace/pull/786",
    steps=60,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def operator_init(sick: bool, width: int) -> Setup:
    """The filters of a neural operator are drawn with deviation 1 / (inputs x outputs), and the maps beside
    them with a fixed 0.02, so that each block shrinks what passes. Repair: 1 / sqrt(inputs) for both."""
    even = 1 / math.sqrt(width)
    deviation, local = (1 / width**2, 0.02) if sick else (even, even)
    model = stack(
        lift=nn.Conv1d(1, width, 1),
        blocks=nn.Sequential(*(OperatorBlock(width, 12, deviation, local) for _ in range(8))),
        project=nn.Conv1d(width, 1, 1),
    )
    return setup(model, smoothed(), F.mse_loss, 1e-3)


# ------------------------------------------------------------------------------- differentiable rendering


class SoftDisc(nn.Module):
    """Places a disc and draws it: how far a pixel is inside decides how much of it is covered."""

    def __init__(self, size: int, pixels: int, sigma: float) -> None:
        super().__init__()
        self.place = nn.Linear(size, 3)
        self.coverage = nn.Sigmoid()
        self.sigma = sigma
        line = torch.linspace(-1, 1, pixels)
        self.register_buffer("grid", torch.stack(torch.meshgrid(line, line, indexing="ij")))

    def forward(self, h: Tensor) -> Tensor:
        centre, radius = self.place(h).split([2, 1], 1)
        away = (self.grid - centre[..., None, None]).square().sum(1)
        inside = (0.5 + 0.2 * radius.tanh()).square()[..., None] - away
        return self.coverage(inside / self.sigma)


def silhouettes(number: int = 16, pixels: int = 16) -> Sample:
    """Silhouettes of discs; the target is the silhouette itself."""
    line = torch.linspace(-1, 1, pixels)
    grid = torch.stack(torch.meshgrid(line, line, indexing="ij"))

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        centre = uniform(g, number, 2, 1, 1) - 0.5
        radius = 0.35 + 0.3 * uniform(g, number, 1, 1)
        mask = ((grid - centre).square().sum(1) < radius.square()).float()
        return mask, mask

    return sample


def overlap_loss(drawn: Tensor, mask: Tensor) -> Tensor:
    """Return what two silhouettes lack of covering one another."""
    both = (drawn * mask).sum((1, 2))
    return 1 - (both / ((drawn + mask - drawn * mask).sum((1, 2)) + 1e-6)).mean()


def inverse_renderer(size: int, sigma: float) -> nn.Module:
    """Return a network from a silhouette to a disc that is drawn again."""
    return stack(
        flatten=nn.Flatten(),
        encoder=nn.Sequential(nn.Linear(256, size), nn.ReLU(), nn.Linear(size, size), nn.ReLU()),
        render=SoftDisc(size, 16, sigma),
    )


@sick(
    "contact6a-render-sigma",
    [("SATURATION", "render")],
    every(flat("render.coverage", "sigmoid", 0.99), stuck(0.4)),
    allow=["DEAD", "VANISHING", "UNSTABLE"],
    source="https://github.com/ShichenLiu/SoftRas/issues/5",
    falls_to=0.6,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def render_sigma(sick: bool, width: int) -> Setup:
    """The edge of what a soft renderer draws is far thinner than a pixel, so the sigmoid of nearly every
    pixel is flat and no gradient comes back from it. Repair: an edge as wide as a few pixels."""
    return setup(inverse_renderer(width, 1e-5 if sick else 0.05), silhouettes(), overlap_loss, 3e-3)


@healthy(
    "contact6a-render-crisp",
    flat("render.coverage", "sigmoid", 0.75),
    falls_to=0.6,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def render_crisp(width: int) -> Setup:
    """A renderer whose edges are crisp, about one pixel wide: most pixels are fully covered or empty and pass
    no gradient, but each disc has an edge, and that is enough."""
    return setup(inverse_renderer(width, 0.02), silhouettes(), overlap_loss, 3e-3)


# ------------------------------------------------------------------------------- standardised convolutions


class StandardConv(nn.Conv2d):
    """A convolution with standardised filters, times a factor."""

    def __init__(self, inputs: int, outputs: int, factor: float) -> None:
        super().__init__(inputs, outputs, 3, padding=1)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        w = self.factor * w / (w.square().mean((1, 2, 3), keepdim=True) + 1e-10).sqrt()
        return F.conv2d(x, w, self.bias, padding=1)


@sick(
    "contact6a-standardised-conv",
    [("EXPLODING", "features")],
    every(growing("features.conv_1", "features.conv_4", 50.0), stuck(0.8, steps=60)),
    allow=["UNSTABLE", "SATURATION", "DEAD", "BOTTLENECK"],
    source="https://github.com/joe-siyuan-qiao/WeightStandardization/issues/23",
    steps=60,
    widths=(16,),
    dtypes=(FLOAT32,),
)
def standardised_conv(sick: bool, width: int) -> Setup:
    """Filters are standardised to a deviation of one, whatever their number of inputs, and there is no other
    normalisation: signals and gradients grow tenfold per layer. Repair: times sqrt(2 / inputs)."""
    layers: dict[str, nn.Module] = {}
    for i in range(4):
        inputs = width if i else 3
        layers[f"conv_{i + 1}"] = StandardConv(inputs, width, 1.0 if sick else math.sqrt(2 / (9 * inputs)))
        layers[f"act_{i + 1}"] = nn.ReLU()
    model = stack(
        features=stack(**layers), pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), head=nn.Linear(width, 4)
    )
    return setup(model, textures(), F.cross_entropy, sgd(0.01, 0.9))


# ---------------------------------------------------------------------------------------------- molecules


class Readout(nn.Module):
    """The sum over a graph's nodes, normalised or not."""

    def __init__(self, size: int, normalise: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size) if normalise else nn.Identity()

    def forward(self, h: Tensor, there: Tensor) -> Tensor:
        return self.norm((h * there).sum(1))


class RingNet(nn.Module):
    """Message passing on rings of atoms, and one number per ring."""

    def __init__(self, size: int, normalise: bool) -> None:
        super().__init__()
        self.atoms = nn.Linear(4, size)
        self.rounds = nn.ModuleList(nn.Linear(2 * size, size) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(size) for _ in range(2))
        self.readout = Readout(size, normalise)
        self.head = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, 1))

    def forward(self, atoms: Tensor, bonds: Tensor, there: Tensor) -> Tensor:
        h = self.atoms(atoms)
        for linear, norm in zip(self.rounds, self.norms, strict=True):
            near = bonds @ h / bonds.sum(-1, keepdim=True).clamp_min(1.0)
            h = norm(h + F.gelu(linear(torch.cat([h, near], -1))))
        return self.head(self.readout(h, there))[:, 0]


def rings(number: int = 32, largest: int = 16) -> Sample:
    """Rings of nearly the same atoms; the target grows with the number of atoms."""
    place = torch.arange(largest)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        atoms = 3 + choice(g, largest - 2, number)
        there = (place < atoms[:, None]).float()[..., None]
        after = (place[None] + 1) % atoms[:, None]
        one_way = F.one_hot(after, largest).float() * there
        kinds = torch.tensor([1.0, 0.0, 0.5, -0.5]) + 0.02 * normal(g, number, largest, 4)
        return (kinds, one_way + one_way.transpose(1, 2), there), atoms / 4

    return sample


@sick(
    "contact6a-molecule-size",
    [("BOTTLENECK", "readout")],
    every(alike("readout", 0.05), stuck(0.4)),
    source="https://github.com/pgniewko/gt-pyg/issues/110",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def molecule_size(sick: bool, width: int) -> Setup:
    """The sum over a molecule's atoms tells their number by its length, and a layer norm right behind it
    takes just that away: all molecules look the same to the head. Repair: no norm behind a sum."""
    return setup(RingNet(width, normalise=sick), rings(), F.mse_loss, 1e-3)


# ------------------------------------------------------------------------------------------------ splines


class SplineLayer(nn.Module):
    """A learned function on every edge: a linear spline on a grid, and a fixed shape that is scaled."""

    def __init__(
        self, inputs: int, outputs: int, low: float = -1.0, high: float = 1.0, knots: int = 12
    ) -> None:
        super().__init__()
        self.base = nn.Parameter(0.1 * torch.randn(outputs, inputs) / math.sqrt(inputs))
        self.coef = nn.Parameter(0.1 * torch.randn(outputs, inputs, knots))
        self.register_buffer("grid", torch.linspace(low, high, knots).repeat(inputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        step = (self.grid[:, 1] - self.grid[:, 0])[:, None]
        basis = (1 - (x[..., None] - self.grid).abs() / step).clamp_min(0.0)
        return F.silu(x) @ self.base.T + torch.einsum("oik,nik->no", self.coef, basis)

    @torch.no_grad()
    def update(self, x: Tensor) -> Tensor:
        """Spread the grid over what comes in, and return what goes out."""
        low, high = x.amin(0), x.amax(0)
        margin = 0.2 * (high - low) + 1e-3
        part = torch.linspace(0, 1, self.grid.shape[1])
        self.grid.copy_((low - margin)[:, None] + (high - low + 2 * margin)[:, None] * part)
        return self(x)


class SplineNet(nn.Module):
    """Two layers of splines."""

    def __init__(self, inputs: int, size: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([SplineLayer(inputs, size), SplineLayer(size, 1)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x[:, 0]


@sick(
    "contact6a-spline-grid",
    [("DEAD", "layers.0")],
    every(no_gradient("layers.0.coef"), stuck(0.15, steps=80)),
    allow=["BOTTLENECK"],
    source="https://github.com/KindXiaoming/pykan/issues/142",
    widths=(16,),
    dtypes=(FLOAT32,),
)
def spline_grid(sick: bool, width: int) -> Setup:
    """The splines of a network are defined between -1 and 1, and the measurements that it gets lie between 3
    and 7: every basis function is zero there, and only the fixed shapes are left. Repair: fit the grids to
    some data first."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x = 3 + 4 * uniform(g, 64, 3)
        return x, torch.sin(2.5 * x[:, 0]) + (x[:, 1] - 5).square() - 1.3

    model = SplineNet(3, width)
    if not sick:
        x = sample(seeded(65))[0]
        for layer in model.layers:
            x = layer.update(x)
    return setup(model, sample, F.mse_loss, 1e-2)


def knots_at_rest(above: float):
    """More than a share of the coefficients of the first splines gets no gradient in a step."""

    def claim(setup: Setup) -> tuple[bool, str]:
        grad = next(training(setup, 1)).grads["layers.0.coef"]
        share = 1.0 if grad is None else float((grad == 0).float().mean())
        return share > above, f"{share:.0%} of the coefficients get no gradient"

    return claim


@healthy("contact6a-spline-wide", knots_at_rest(0.7), widths=(16,), dtypes=(FLOAT32,))
def spline_wide(width: int) -> Setup:
    """Grids that are made far wider than the data, to be safe: most coefficients have nothing to do and get
    no gradient, and those in the middle fit the function."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x = 2 * uniform(g, 64, 3) - 1
        return x, torch.sin(4 * x[:, 0]) + x[:, 1].square() - 0.3

    model = SplineNet(3, width)
    model.layers[0] = SplineLayer(3, width, -6.0, 6.0, knots=41)
    model.layers[1] = SplineLayer(width, 1, -6.0, 6.0, knots=41)
    return setup(model, sample, F.mse_loss, 1e-2)
