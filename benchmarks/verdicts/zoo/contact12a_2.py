"""Cases from public reports: Chebyshev networks, flow fields, binary codes, normalisers, weather."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import not_finite
from .data import normal, setup, stack, textures, uniform
from .registry import FLOAT32, Setup, sick

# ------------------------------------------------------------- Kolmogorov-Arnold with Chebyshev's basis


class ChebyKANLayer(nn.Module):
    """Each edge has a series of Chebyshev polynomials of the squeezed input, in their trigonometric form."""

    def __init__(self, inputs: int, outputs: int, degree: int, reach: float) -> None:
        super().__init__()
        self.reach = reach
        self.coeffs = nn.Parameter(torch.randn(inputs, outputs, degree + 1) / (inputs * (degree + 1)))
        self.register_buffer("order", torch.arange(degree + 1.0))

    def forward(self, x: Tensor) -> Tensor:
        """Return the sums over the edges."""
        x = torch.tanh(x) * self.reach
        basis = (torch.acos(x[..., None]) * self.order).cos()
        return torch.einsum("bid,iod->bo", basis, self.coeffs)


class DigitKAN(nn.Module):
    """A convolutional stem and two Chebyshev layers with a normalisation between."""

    def __init__(self, width: int, reach: float) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.kan1 = ChebyKANLayer(128, width, 4, reach)
        self.norm1 = nn.LayerNorm(width)
        self.kan2 = ChebyKANLayer(width, 4, 4, reach)

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits of the classes."""
        return self.kan2(self.norm1(self.kan1(self.stem(image).flatten(1))))


@sick(
    "contact12a-kan-arccosine",
    [("NUMERICAL", "*")],
    not_finite(4, loss=False),
    source="https://github.com/SynodicMonth/ChebyKAN/issues/11",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def kan_arccosine(sick: bool, width: int) -> Setup:
    """The layer takes the arc cosine of a hyperbolic tangent that rounds to exactly one for large inputs,
    where the derivative is infinite and the gradient not a number; shrinking the tangent to 0.99 repairs
    it."""
    draw = textures()

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        image, kind = draw(g)
        return image + 40.0 * (uniform(g, *image.shape) > 0.99), kind

    return setup(DigitKAN(width, 1.0 if sick else 0.99), sample, F.cross_entropy, 5e-3)


# ----------------------------------------------------------------------------------- fields of flow


class FlowWarp(nn.Module):
    """A network that predicts a field of displacements for a picture and warps it by bilinear sampling."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = stack(
            conv1=nn.Conv2d(2, width, 3, padding=1),
            act1=nn.LeakyReLU(0.1),
            conv2=nn.Conv2d(width, width, 3, padding=1),
            act2=nn.LeakyReLU(0.1),
        )
        self.flow_head = nn.Conv2d(width, 2, 3, padding=1)
        nn.init.zeros_(self.flow_head.weight)
        nn.init.zeros_(self.flow_head.bias)
        axis = torch.linspace(-1, 1, 12)
        self.register_buffer("grid", torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1))

    def forward(self, moving: Tensor, fixed: Tensor) -> tuple[Tensor, Tensor]:
        """Return the warped picture and the field."""
        flow = self.flow_head(self.encoder(torch.cat([moving, fixed], 1)))
        grid = self.grid + flow.permute(0, 2, 3, 1)
        return F.grid_sample(moving, grid, align_corners=True), flow


@sick(
    "contact12a-flow-smoothness",
    [("NUMERICAL", "*")],
    not_finite(4, loss=False),
    source="https://github.com/rakutentech/stAdv/issues/3",
    falls_to=0.5,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def flow_smoothness(sick: bool, width: int) -> Setup:
    """The penalty on the field's differences is the root of a sum of squares without anything added, and a
    field that is constant has the root's infinite slope at zero times zero; a small number inside repairs
    it."""
    floor = 0.0 if sick else 1e-6
    axis = torch.linspace(-1, 1, 12)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        at = uniform(g, 16, 2, 1, 1) - 0.5
        shift = torch.tensor([0.3, -0.2])[:, None, None]

        def blob(place: Tensor) -> Tensor:
            far = (axis[:, None] - place[:, 0]).square() + (axis[None, :] - place[:, 1]).square()
            return (-far / 0.1).exp()[:, None]

        moving, fixed = blob(at), blob(at + shift)
        return (moving, fixed), fixed

    def loss(output: tuple[Tensor, Tensor], fixed: Tensor) -> Tensor:
        warped, flow = output
        down, across = flow.diff(dim=2)[..., :-1], flow.diff(dim=3)[:, :, :-1]
        rough = (down.square().sum(1) + across.square().sum(1) + floor).sqrt()
        return 100 * F.mse_loss(warped, fixed) + 0.5 * rough.mean()

    return setup(FlowWarp(width), sample, loss, 3e-3)


# ------------------------------------------------------------------------------------- binary codes


class BinaryTokenizer(nn.Module):
    """An autoencoder with binary codes and a loss of entropy over the codebook, computed in half
    precision."""

    def __init__(self, width: int, bits: int, eps: float) -> None:
        super().__init__()
        self.encoder = stack(
            conv1=nn.Conv2d(3, width, 3, stride=2, padding=1),
            act1=nn.GELU(),
            conv2=nn.Conv2d(width, width, 3, padding=1),
            act2=nn.GELU(),
        )
        self.project_in = nn.Conv2d(width, bits, 1)
        self.decoder = stack(
            conv1=nn.Conv2d(bits, width, 3, padding=1),
            act1=nn.GELU(),
            up=nn.ConvTranspose2d(width, 3, 4, stride=2, padding=1),
        )
        numbers = torch.arange(2**bits)[:, None] >> torch.arange(bits)
        self.register_buffer("codebook", 2.0 * (numbers & 1) - 1)
        self.eps = eps

    def entropy(self, prob: Tensor) -> Tensor:
        """Return the entropy of distributions over the last axis."""
        return -(prob * prob.clamp(min=self.eps).log()).sum(-1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return the reconstruction and the entropy and commitment losses."""
        z = self.project_in(self.encoder(image))
        near = z.permute(0, 2, 3, 1).flatten(0, 2).half() @ self.codebook.half().T
        prob = (20.0 * near).softmax(-1)
        spread = self.entropy(prob).float().mean() - self.entropy(prob.mean(0)).float()
        hard = torch.where(z > 0, 1.0, -1.0)
        return self.decoder(z + (hard - z).detach()), spread + 10 * F.mse_loss(z, hard)


@sick(
    "contact12a-codes-entropy",
    [("NUMERICAL", "*")],
    not_finite(4, loss=True),
    source="https://github.com/lucidrains/vector-quantize-pytorch/pull/85",
    falls_to=0.6,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def codes_entropy(sick: bool, width: int) -> Setup:
    """The floor inside the logarithm is 1e-20, which half precision rounds to zero, so that probabilities
    that underflow give zero times minus infinity; a floor of 1e-5, which half precision has, repairs it."""
    draw = textures()

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        image = draw(g)[0]
        return image, image

    def loss(output: tuple[Tensor, Tensor], image: Tensor) -> Tensor:
        return F.mse_loss(output[0], image) + 0.02 * output[1]

    return setup(BinaryTokenizer(width, 6, 1e-20 if sick else 1e-5), sample, loss, 4e-3)


# --------------------------------------------------------------------------------- action normalisers


class DiffusionPolicy(nn.Module):
    """Predicts the noise on a normalised chunk of actions from the normalised state, with its own
    statistics."""

    def __init__(self, width: int, low: Tensor, high: Tensor, eps: float) -> None:
        super().__init__()
        self.register_buffer("low", low)
        self.register_buffer("high", high)
        self.eps = eps
        self.state_encoder = nn.Linear(6, width)
        self.time_encoder = stack(fc1=nn.Linear(1, width), act=nn.Mish(), fc2=nn.Linear(width, width))
        self.conv_in = nn.Conv1d(6, width, 3, padding=1)
        self.film = nn.Linear(width, 2 * width)
        self.conv_mid = nn.Conv1d(width, width, 3, padding=1)
        self.conv_out = nn.Conv1d(width, 6, 3, padding=1)

    def normalize(self, x: Tensor) -> Tensor:
        """Return values between -1 and 1 by the smallest and largest of the data."""
        return 2 * (x - self.low) / (self.high - self.low + self.eps) - 1

    def forward(self, state: Tensor, actions: Tensor, time: Tensor, noise: Tensor) -> Tensor:
        """Return the predicted noise, of shape (batch, steps, 6)."""
        clean = self.normalize(actions)
        mixed = (1 - time)[..., None] * clean + time[..., None] * noise
        code = self.state_encoder(self.normalize(state)) + self.time_encoder(time)
        scale, shift = self.film(F.mish(code))[..., None].chunk(2, 1)
        hidden = F.mish(self.conv_in(mixed.transpose(1, 2)) * (1 + scale) + shift)
        return self.conv_out(F.mish(self.conv_mid(hidden) + hidden)).transpose(1, 2)


@sick(
    "contact12a-robot-ranges",
    [("NUMERICAL", "*")],
    not_finite(2, loss=True),
    source="https://github.com/huggingface/lerobot/issues/211",
    falls_to=0.6,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def robot_ranges(sick: bool, width: int) -> Setup:
    """Two of the joints never move in the recorded data, so the normaliser divides zero by zero in them and
    every loss is not a number; a small number added to the range repairs it."""
    moves = torch.tensor([1.0, 0.7, 0.0, 1.2, 0.0, 0.4])
    rest = torch.tensor([0.1, -0.3, 0.5, 0.0, -1.0, 0.2])

    def sample(g: Generator) -> tuple[tuple[Tensor, ...], Tensor]:
        state = rest + moves * (2 * uniform(g, 32, 6) - 1)
        goal = rest + moves * torch.tanh(3 * (state.flip(1) - rest))
        path = torch.linspace(0, 1, 8)[:, None]
        actions = (1 - path) * state[:, None] + path * goal[:, None]
        noise = normal(g, 32, 8, 6)
        return (state, actions, 0.3 + 0.7 * uniform(g, 32, 1), noise), noise

    policy = DiffusionPolicy(width, rest - moves, rest + moves, 0.0 if sick else 1e-8)
    return setup(policy, sample, F.mse_loss, 3e-3)


# -------------------------------------------------------------------------------------- weather states


class Forecaster(nn.Module):
    """Steps a weather grid forward several times; each step's change is added before a bounded map."""

    def __init__(self, width: int, steps: int, margin: float) -> None:
        super().__init__()
        self.steps, self.margin = steps, margin
        self.encoder = nn.Conv2d(3, width, 3, padding=1)
        self.processor = nn.Conv2d(width, width, 3, padding=1)
        self.decoder = nn.Conv2d(width, 2, 3, padding=1)

    def unbounded(self, state: Tensor) -> Tensor:
        """Return the inverse of the sigmoid."""
        inside = state.clamp(self.margin, 1 - self.margin)
        return inside.log() - (1 - inside).log()

    def forward(self, state: Tensor, forcing: Tensor) -> Tensor:
        """Return the states, of shape (batch, steps, 2, height, width)."""
        states = []
        for step in range(self.steps):
            hidden = F.silu(self.encoder(torch.cat([state, forcing[:, step]], 1)))
            hidden = hidden + F.silu(self.processor(hidden))
            state = torch.sigmoid(self.unbounded(state) + self.decoder(hidden))
            states.append(state)
        return torch.stack(states, 1)


@sick(
    "contact12a-weather-bounds",
    [("NUMERICAL", "*")],
    not_finite(4),
    source="https://github.com/mllam/neural-lam/issues/119",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def weather_bounds(sick: bool, width: int) -> Setup:
    """Bounded variables go through a sigmoid and back through its inverse, and a state that sits on its bound
    makes the inverse infinite; with more than one step the gradient passes there and is not a number. Keeping
    the state a little inside its bounds before the inverse repairs it."""

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        wave = F.interpolate(normal(g, 8, 2, 3, 3), 8, mode="bilinear")
        forcing = normal(g, 8, 2, 1, 1, 1).expand(8, 2, 1, 8, 8)
        states = [(0.5 + 0.6 * wave).clamp(0, 1)]
        for step in range(2):
            wave = wave.roll(1, 3) + 0.5 * forcing[:, step]
            states.append((0.5 + 0.6 * wave).clamp(0, 1))
        return (states[0], forcing), torch.stack(states[1:], 1)

    return setup(Forecaster(width, 2, 0.0 if sick else 1e-3), sample, F.mse_loss, 3e-3)
