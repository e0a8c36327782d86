"""Labelled models from public reports: contrastive and generative models, series and depth.

Each case re-creates, small and in its own code, what somebody reported, and what repaired it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import Claim, every, no_gradient, not_finite, stuck, tiny, training
from .data import choice, normal, seeded, setup, stack, trained, uniform
from .registry import FLOAT32, Setup, healthy, sick

ONE: tuple[int, ...] = (32,)


class Critic(nn.Module):
    """Two encoders, and as energy the cosine between a state with action and a goal."""

    def __init__(self, width: int, whole: bool) -> None:
        super().__init__()
        self.dim = None if whole else -1
        self.sa_encoder, self.g_encoder = self.encoder(10, width), self.encoder(6, width)
        if not whole:
            self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @staticmethod
    def encoder(size: int, width: int) -> nn.Sequential:
        """Return a network from observations to representations."""
        first = nn.Sequential(nn.Linear(size, width), nn.LayerNorm(width), nn.SiLU())
        second = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.SiLU())
        return stack(first=first, second=second, out=nn.Linear(width, 16))

    def unit(self, x: Tensor) -> Tensor:
        """Return the representations over their norm."""
        return x / (torch.linalg.vector_norm(x, dim=self.dim, keepdim=True) + 1e-6)

    def forward(self, state_action: Tensor, goal: Tensor) -> Tensor:
        """Return the energy of every pair."""
        logits = self.unit(self.sa_encoder(state_action)) @ self.unit(self.g_encoder(goal)).T
        return logits if self.dim is None else self.logit_scale.exp() * logits


def both_ways(logits: Tensor, own: Tensor) -> Tensor:
    """Return the contrastive loss over rows and over columns."""
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


@sick(
    "contact9b-crl-energy",
    expect=[("VANISHING", "*")],
    claim=every(tiny("*", 0.1), stuck(3.3)),
    source="https://github.com/MichalBortkiewicz/JaxGCRL/pull/64",
    widths=ONE,
    dtypes=(FLOAT32,),
)
def contrastive_energy(sick: bool, width: int) -> Setup:
    """A contrastive critic for reaching goals, with the cosine as energy, learned nothing: the norm that
    divides the representations was taken over the whole batch, so all logits are next to zero, the softmax
    over the goals is flat whatever the encoders do, and hardly any gradient comes back. The norm of each
    representation, and a learned scale for the logits, repair it."""
    leads = normal(seeded(51), 10, 6) / 10**0.5

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        now = normal(g, 32, 10)
        return (now, now @ leads + 0.2 * normal(g, 32, 6)), torch.arange(32)

    return setup(Critic(width, whole=sick), sample, both_ways, 3e-3)


class LoRA(nn.Module):
    """A frozen linear layer with a low-rank adapter."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.org = base.requires_grad_(False)
        self.lora_down = nn.Linear(base.in_features, rank, bias=False)
        self.lora_up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output with the adapter's added."""
        return self.org(x) + self.lora_up(self.lora_down(x))


class JointBlock(nn.Module):
    """Attention and a network for text and video rows alike, with a modulation for each of the two."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.adaln_video, self.adaln_text = nn.Linear(width, 6 * width), nn.Linear(width, 6 * width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.limit = math.inf

    def modulation(self, time: Tensor, text: int, video: int) -> tuple[Tensor, ...]:
        """Return shift, scale and gate of every row for both halves, as half precision holds them."""
        both = [self.adaln_text(time).expand(-1, text, -1), self.adaln_video(time).expand(-1, video, -1)]
        parts = torch.cat(both, 1).clamp(-self.limit, self.limit).half().float()
        return parts.chunk(6, -1)

    def forward(self, x: Tensor, time: Tensor, text: int) -> Tensor:
        """Return the next rows, of which the first are text."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(time, text, x.shape[1] - text)
        parts = self.qkv(self.norm(x) * (1 + scale1) + shift1).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in parts)
        x = x + gate1 * self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + gate2 * self.fc2(F.gelu(self.fc1(self.norm(x) * (1 + scale2) + shift2)))


class VideoTransformer(nn.Module):
    """Velocity of noisy video rows, given the time and some rows of text."""

    def __init__(self, width: int, size: int = 4, rows: int = 6) -> None:
        super().__init__()
        self.text_in, self.video_in = nn.Embedding(4, 3 * width), nn.Linear(size, width)
        self.time_in = stack(fc1=nn.Linear(1, width), act=nn.SiLU(), fc2=nn.Linear(width, width))
        self.position = nn.Parameter(0.5 * torch.randn(rows, width))
        self.blocks = nn.ModuleList(JointBlock(width) for _ in range(3))
        self.norm_out, self.proj_out = nn.LayerNorm(width), nn.Linear(width, size)
        for block in self.blocks:
            for modulation in (block.adaln_text, block.adaln_video):
                modulation.bias.data.view(6, -1)[[2, 5]] = 1.0

    def forward(self, video: Tensor, time: Tensor, prompt: Tensor) -> Tensor:
        """Return the velocity of the video's rows; what became of the text's is not used."""
        text = self.text_in(prompt).unflatten(-1, (3, -1))
        x = torch.cat([text, self.video_in(video) + self.position], 1)
        for block in self.blocks:
            x = block(x, self.time_in(time), text.shape[1])
        return self.proj_out(self.norm_out(x[:, text.shape[1] :]))


class SkippingAdamW(torch.optim.AdamW):
    """AdamW that leaves out the steps whose gradients are not finite."""

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the parameters if every gradient is finite."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        if all(p.grad is None or bool(p.grad.isfinite().all()) for p in parameters):
            return super().step(closure)
        return None


def videos(seed: int) -> Callable[[Generator], tuple[tuple[Tensor, Tensor, Tensor], Tensor]]:
    """Return a source of noisy videos with time and prompt, and of the velocity to the clean ones."""
    clean = 1.5 * normal(seeded(seed), 4, 6, 4)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        prompt = choice(g, 4, 16)
        noise, time = normal(g, 16, 6, 4), uniform(g, 16, 1, 1)
        return ((1 - time) * noise + time * clean[prompt], time, prompt), clean[prompt] - noise

    return sample


@sick(
    "contact9b-diffusion-adaln",
    expect=[("NUMERICAL", "blocks")],
    claim=not_finite(loss=False),
    source="https://github.com/ostris/ai-toolkit/pull/1046",
    widths=ONE,
    dtypes=(FLOAT32,),
)
def video_adapters(sick: bool, width: int) -> Setup:
    """Adapters on a video transformer never learned, although every loss was finite: in its last block the
    modulation of the text rows is beyond what half precision holds and becomes infinite. These rows are not
    used, so their gradient is zero, but zero times infinity is not a number, and all adapters get it; the
    steps are left out. Clamping the modulation to the range of half precision repairs it."""
    model = VideoTransformer(width)
    trained(setup(model, videos(52), F.mse_loss, 5e-3), 60)
    model.requires_grad_(False)
    model.blocks[-1].adaln_text.bias.view(6, -1)[5] = 9e4
    for block in model.blocks:
        block.limit = math.inf if sick else torch.finfo(torch.float16).max
        for name in ("qkv", "proj", "fc1", "fc2"):
            setattr(block, name, LoRA(getattr(block, name), 8))
    return setup(model, videos(53), F.mse_loss, lambda p: SkippingAdamW(p, lr=1e-2))


class TimesBlock(nn.Module):
    """Folds a series by its strongest periods, and convolves what is a picture then."""

    def __init__(self, width: int, top: int = 2) -> None:
        super().__init__()
        self.top = top
        first, second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.conv = stack(conv1=first, act=nn.GELU(), conv2=second)

    def forward(self, x: Tensor) -> Tensor:
        """Return the series with what was found in each period."""
        strength = torch.fft.rfft(x, dim=1).abs().mean(-1)
        chosen = strength.detach().mean(0)[1:].topk(self.top).indices + 1
        found = []
        for frequency in chosen.tolist():
            period = max(x.shape[1] // frequency, 2)
            padded = F.pad(x, (0, 0, 0, -x.shape[1] % period))
            y = self.conv(padded.unflatten(1, (-1, period)).permute(0, 3, 1, 2))
            found.append(y.permute(0, 2, 3, 1).flatten(1, 2)[:, : x.shape[1]])
        weights = strength[:, chosen].softmax(-1)
        return x + (torch.stack(found, -1) * weights[:, None, None]).sum(-1)


class TimesNet(nn.Module):
    """Completes series after normalising each by its observed values."""

    def __init__(self, width: int, features: int, small: float) -> None:
        super().__init__()
        self.small = small
        self.enc_embedding = nn.Linear(features, width)
        self.model = nn.ModuleList(TimesBlock(width) for _ in range(2))
        self.layer_norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, features)

    def forward(self, x: Tensor, observed: Tensor) -> Tensor:
        """Return the series without gaps."""
        number = observed.sum(1, keepdim=True) + self.small
        mean = (x * observed).sum(1, keepdim=True) / number
        deviation = (((x - mean) * observed).square().sum(1, keepdim=True) / number + 1e-5).sqrt()
        y = self.enc_embedding((x - mean) * observed / deviation)
        for block in self.model:
            y = self.layer_norm(block(y))
        return self.projection(y) * deviation + mean


def completed(output: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean error on what was observed and on what was hidden."""
    truth, observed = target
    error = (output - truth).abs()
    return (error * observed).sum() / observed.sum() + (error * (1 - observed)).sum() / (1 - observed).sum()


@sick(
    "contact9b-series-timesnetnorm",
    expect=[("NUMERICAL", "*")],
    claim=not_finite(),
    source="https://github.com/WenjieDu/PyPOTS/issues/265",
    steps=150,
    widths=ONE,
    dtypes=(FLOAT32,),
)
def timesnet_norm(sick: bool, width: int) -> Setup:
    """TimesNet gave a loss that is not a number on series with many gaps: it normalises every feature by the
    number of its observed values, and where a window has none of a feature that is a division by zero.
    Adding a small number to the divisor repairs it."""
    waves = normal(seeded(54), 4, 6)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        time = torch.arange(24)[:, None] / 24
        phase = 2 * math.pi * (torch.tensor([2.0, 4.0]) * time + uniform(g, 16, 1, 2))
        truth = torch.cat([phase.sin(), phase.cos()], -1) @ waves + 1.0
        observed = (uniform(g, 16, 24, 6) > 0.85).float()
        return (truth * observed, observed), (truth, observed)

    return setup(TimesNet(width, 6, 0.0 if sick else 1e-9), sample, completed, 3e-3)


class DepthNet(nn.Module):
    """Convolutions down and up again, and a depth of every pixel within limits."""

    def __init__(self, width: int, floor: float) -> None:
        super().__init__()
        self.floor = floor
        self.conv1, self.conv2 = nn.Conv2d(3, width, 3, 2, 1), nn.Conv2d(width, width, 3, 2, 1)
        self.deconv1 = nn.ConvTranspose2d(width, width, 2, 2)
        self.deconv2 = nn.ConvTranspose2d(width, width, 2, 2)
        self.depth = nn.Conv2d(width, 1, 1)
        nn.init.xavier_normal_(self.depth.weight)
        nn.init.constant_(self.depth.bias, 1.0 - floor)

    def forward(self, picture: Tensor) -> Tensor:
        """Return the depth."""
        x = F.relu(self.conv2(F.relu(self.conv1(picture))))
        x = F.relu(self.deconv2(F.relu(self.deconv1(x))))
        return self.depth(x).clamp(self.floor, 100.0)


class SfmNet(nn.Module):
    """Depth of one picture, and the camera's motion between two."""

    def __init__(self, width: int, floor: float) -> None:
        super().__init__()
        self.depth_net = DepthNet(width, floor)
        first, second = nn.Conv2d(6, width, 3, 2, 1), nn.Conv2d(width, width, 3, 2, 1)
        down = nn.Sequential(first, nn.ReLU(), second, nn.ReLU())
        self.motion_net = stack(down=down, flatten=nn.Flatten(), camera=nn.Linear(9 * width, 2))

    def forward(self, picture: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
        """Return depth and motion."""
        return self.depth_net(picture), self.motion_net(torch.cat([picture, following], 1))


def depth_and_motion(output: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
    """Return the error of the depth and of the motion."""
    return F.l1_loss(output[0], target[0]) + F.mse_loss(output[1], target[1])


@sick(
    "contact9b-depth-cliprelu",
    expect=[("SATURATION", "depth_net")],
    allow=["DEAD", "VANISHING"],
    claim=no_gradient("depth_net"),
    source="https://github.com/waxz/sfm_net/issues/1",
    widths=ONE,
    dtypes=(FLOAT32,),
)
def clipped_depth(sick: bool, width: int) -> Setup:
    """The depth of every pixel was always one: it is clipped to lie between 1 and 100, the last convolution
    starts with small weights and no bias, so all its outputs are below and no gradient passes. Clipping at
    zero, with a bias of one, repairs it."""
    rows, columns = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        slope, moves = 0.2 * normal(g, 16, 2, 1, 1), normal(g, 16, 2)
        depth = (5 + slope[:, 0] * (rows - 5.5) + slope[:, 1] * (columns - 5.5)).clamp(2, 8)[:, None]
        picture = torch.tensor([1.0, -1.0, 0.5])[:, None, None] * (depth - 5) / 3
        shift = torch.stack([moves[:, 0], moves[:, 1], moves.sum(1)], 1)[..., None, None] / 2
        noise = [0.05 * normal(g, 16, 3, 12, 12) for _ in range(2)]
        return (picture + noise[0], picture + shift + noise[1]), (depth, moves)

    return setup(SfmNet(width, 1.0 if sick else 0.0), sample, depth_and_motion, 3e-3)


class Coupling(nn.Module):
    """One half of the features scales and shifts the other, within soft limits."""

    def __init__(self, width: int, size: int, order: Tensor, limit: float = 3.0) -> None:
        super().__init__()
        self.limit = limit
        self.order: Tensor
        self.register_buffer("order", order)
        self.subnet = stack(fc1=nn.Linear(size // 2, width), act=nn.ReLU(), fc2=nn.Linear(width, size))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features and the log determinant."""
        kept, changed = x[:, self.order].chunk(2, 1)
        scale, shift = self.subnet(kept).chunk(2, 1)
        scale = self.limit * 0.636 * torch.atan(scale / self.limit)
        return torch.cat([changed * scale.exp() + shift, kept], 1), scale.sum(1)


class Flow(nn.Module):
    """Couplings one after the other; the output is the latent and the log determinant."""

    def __init__(self, width: int, size: int = 8) -> None:
        super().__init__()
        self.nodes = nn.ModuleList(Coupling(width, size, torch.randperm(size)) for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the latent and the log determinant."""
        total = x.new_zeros(len(x))
        for node in self.nodes:
            x, part = node(x)
            total = total + part
        return x, total


def likelihood(output: tuple[Tensor, Tensor], size: int) -> Tensor:
    """Return the negative log likelihood per feature, without its constant."""
    return (output[0].square().sum(1) / 2 - output[1]).mean() / size


def below_zero(after: int = 20) -> Claim:
    """The loss is negative after some steps."""

    def claim(ready: Setup) -> tuple[bool, str]:
        losses = [step.loss for step in training(ready, after)]
        return losses[-1] < 0, f"loss goes from {losses[0]:.3g} to {losses[-1]:.3g}"

    return claim


@healthy(
    "contact9b-flow-negnll",
    looks=below_zero(),
    source="https://github.com/marco-rudolph/cs-flow/issues/28",
    widths=ONE,
    dtypes=(FLOAT32,),
)
def negative_likelihood(width: int) -> Setup:
    """Somebody asked whether a normalising flow is broken whose loss falls below zero. It is not: the loss is
    the logarithm of a density, which is above one where the data lie close together."""
    mix = 0.1 * normal(seeded(55), 4, 8)

    def sample(g: Generator) -> tuple[Tensor, int]:
        return torch.tanh(normal(g, 64, 4)) @ mix + 0.02 * normal(g, 64, 8), 8

    return setup(Flow(width), sample, likelihood, 2e-3)
