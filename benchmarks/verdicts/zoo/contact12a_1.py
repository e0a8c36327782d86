"""Cases from public reports: robots, poses by rendering, maps, hypernetworks, key points."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import every, no_gradient, stuck
from .data import Sample, choice, normal, seeded, setup, stack, uniform
from .registry import FLOAT32, Setup, sick

CHUNK = 6


# ------------------------------------------------------------------------------- chunks of actions


class ActionChunker(nn.Module):
    """Observation tokens in, a chunk of actions out, by queries that a stack of layers works on."""

    def __init__(self, width: int, level: int) -> None:
        super().__init__()
        self.proprio_proj = nn.Linear(4, width)
        self.image_proj = nn.Conv2d(3, width, 4, stride=4)
        self.pos_embed = nn.Parameter(0.5 * torch.randn(5, width))
        self.query_embed = nn.Embedding(CHUNK, width)
        self.decoder_layers = nn.ModuleList(
            nn.TransformerDecoderLayer(width, 4, 2 * width, 0.0, batch_first=True) for _ in range(4)
        )
        self.decoder_norm = nn.LayerNorm(width)
        self.action_head = nn.Linear(width, 4)
        self.level = level

    def forward(self, image: Tensor, qpos: Tensor) -> Tensor:
        """Return the actions, of shape (batch, chunk, 4)."""
        tokens = self.image_proj(image).flatten(2).transpose(1, 2)
        memory = torch.cat([tokens, self.proprio_proj(qpos)[:, None]], 1) + self.pos_embed
        hidden = self.query_embed.weight.expand(len(image), -1, -1)
        levels = []
        for layer in self.decoder_layers:
            hidden = layer(hidden, memory)
            levels.append(self.decoder_norm(hidden))
        return self.action_head(torch.stack(levels)[self.level])


def demonstrations() -> Sample:
    """Pictures with four patches and a joint state; the actions follow the patch that the state points at."""
    steps = normal(seeded(31), CHUNK, 3, 4)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        colours = normal(g, 32, 3, 2, 2)
        image = colours.repeat_interleave(4, 2).repeat_interleave(4, 3)
        which = choice(g, 4, 32)
        chosen = colours.flatten(2)[torch.arange(32), :, which]
        actions = torch.tanh(torch.einsum("bc,tca->bta", chosen, steps))
        return (image, F.one_hot(which, 4).float()), actions

    return sample


@sick(
    "contact12a-robot-chunks",
    [("DEAD", "decoder_layers.1"), ("DEAD", "decoder_layers.2"), ("DEAD", "decoder_layers.3")],
    every(no_gradient("decoder_layers.1", "decoder_layers.2", "decoder_layers.3"), stuck(0.25, steps=260)),
    source="https://github.com/tonyzhaozh/act/issues/52",
    steps=260,
    falls_to=0.3,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def robot_chunks(sick: bool, width: int) -> Setup:
    """The action head reads the first entry of the stacked decoder states, which is the output of the first
    layer, so every later layer is computed and gets no gradient; reading the last entry repairs it."""
    model = ActionChunker(width, 0 if sick else -1)
    return setup(model, demonstrations(), F.mse_loss, 5e-3)


# ------------------------------------------------------------------------- pose by rendering points


class Rotation(nn.Module):
    """The rotation of an axis-angle vector by the formula of Rodrigues."""

    def __init__(self, series: bool) -> None:
        super().__init__()
        self.series = series

    def forward(self, omega: Tensor) -> Tensor:
        """Return matrices of shape (batch, 3, 3)."""
        square = omega.square().sum(-1)[:, None, None]
        near = square < 1e-12
        angle = torch.where(near, torch.ones_like(square), square).sqrt()
        if self.series:
            first = torch.where(near, 1 - square / 6, angle.sin() / angle)
            second = torch.where(near, 0.5 - square / 24, (1 - angle.cos()) / angle.square())
            w = self.hat(omega)
        else:
            w = self.hat(omega) / angle
            angle = torch.where(near, torch.zeros_like(angle), angle)
            first, second = angle.sin(), 1 - angle.cos()
        return torch.eye(3) + first * w + second * (w @ w)

    @staticmethod
    def hat(v: Tensor) -> Tensor:
        """Return the skew matrices of vectors."""
        x, y, z = v.unbind(-1)
        o = torch.zeros_like(x)
        return torch.stack([o, -z, y, z, o, -x, -y, x, o], -1).unflatten(-1, (3, 3))


class PoseFit(nn.Module):
    """Poses of an object in some frames, drawn as soft dots with learned brightness."""

    def __init__(self, points: int, frames: int, series: bool) -> None:
        super().__init__()
        self.register_buffer("points", normal(seeded(32), points, 3) * torch.tensor([0.6, 0.35, 0.2]))
        self.omega = nn.Parameter(torch.zeros(frames, 3))
        self.translation = nn.Parameter(torch.zeros(frames, 2))
        self.brightness = nn.Parameter(torch.zeros(points))
        self.exp = Rotation(series)
        axis = torch.linspace(-1, 1, 12)
        self.register_buffer("grid", torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1))

    def render(self, rotation: Tensor, translation: Tensor, brightness: Tensor) -> Tensor:
        """Return pictures of shape (batch, 12, 12)."""
        seen = (self.points @ rotation.transpose(1, 2))[..., :2] + translation[:, None]
        far = (self.grid[None, :, :, None] - seen[:, None, None]).square().sum(-1)
        return ((-far / 0.03).exp() * brightness.exp()).sum(-1)

    def forward(self, frame: Tensor) -> Tensor:
        """Return the pictures of frames."""
        return self.render(self.exp(self.omega[frame]), self.translation[frame], self.brightness)


@sick(
    "contact12a-render-pose",
    [("DEAD", "omega")],
    every(no_gradient("omega"), stuck(0.09)),
    source="https://github.com/oarriaga/paz/pull/383",
    falls_to=0.5,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def render_pose(sick: bool, width: int) -> Setup:
    """The rotation map divides by a guarded norm that is a constant at zero, where all poses start, so that
    its derivative there is exactly zero and the rotations never move; the unnormalised formula with a series
    near zero has the true derivative."""
    frames = 8
    model = PoseFit(width, frames, not sick)
    turns = 0.5 * normal(seeded(33), frames, 3)
    shifts = 0.1 * normal(seeded(34), frames, 2)
    with torch.no_grad():
        pictures = model.render(Rotation(True)(turns), shifts, torch.zeros(width))

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        frame = choice(g, frames, 8)
        return frame, pictures[frame]

    return setup(model, sample, F.mse_loss, 2e-2)


# ------------------------------------------------------------------------------ maps of population


class PopulationMap(nn.Module):
    """Occupancy per building from satellite features, times counts of buildings, summed over a region."""

    def __init__(self, width: int, rate: nn.Module) -> None:
        super().__init__()
        self.scale_net = stack(
            conv1=nn.Conv2d(4, width, 1),
            act1=nn.ReLU(),
            conv2=nn.Conv2d(width, width, 3, padding=1),
            act2=nn.ReLU(),
            out=nn.Conv2d(width, 1, 1),
        )
        nn.init.constant_(self.scale_net.out.bias, -1.2)
        self.rate = rate

    def forward(self, features: Tensor, buildings: Tensor) -> Tensor:
        """Return the number of people in each region, of shape (batch,)."""
        return (self.rate(self.scale_net(features)) * buildings).mean((1, 2, 3))


@sick(
    "contact12a-maps-population",
    [("DEAD", "*")],
    every(no_gradient("scale_net"), stuck(1.0)),
    source="https://github.com/jvargasmu/population_estimation/issues/68",
    allow=("SATURATION",),
    falls_to=0.4,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def maps_population(sick: bool, width: int) -> Setup:
    """The predicted occupancy goes through a rectifier and the unlucky start is negative everywhere, so the
    map is all zeros and no gradient comes back; a softplus in its place repairs it."""

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        features = uniform(g, 16, 4, 8, 8)
        buildings = 4 * uniform(g, 16, 1, 8, 8) * (uniform(g, 16, 1, 8, 8) > 0.5)
        level = uniform(g, 16, 1, 1, 1)
        features = torch.cat([features[:, :3], (features[:, 3:] + 3 * level) / 2], 1)
        people = ((0.5 + 2 * level) * buildings).mean((1, 2, 3))
        return (features, buildings), people

    return setup(PopulationMap(width, nn.ReLU() if sick else nn.Softplus()), sample, F.mse_loss, 3e-3)


# ----------------------------------------------------------------------------------- hypernetworks


class SurfaceRefiner(nn.Module):
    """A head on surface nodes whose first layer gets a low-rank correction made from the flow's
    parameters."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.rank, self.width = 4, width
        self.backbone = stack(fc1=nn.Linear(3, width), act1=nn.GELU(), fc2=nn.Linear(width, width))
        self.hyper = stack(
            fc1=nn.Linear(3, width), act1=nn.SiLU(), fc2=nn.Linear(width, width), act2=nn.SiLU()
        )
        self.to_u = nn.Linear(width, width * self.rank)
        self.to_v = nn.Linear(width, width * self.rank)
        for layer, std in ((self.to_u, 0.0), (self.to_v, scale)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.normal_(layer.bias, std=std)
        self.refine = nn.Linear(width, width)
        self.out = nn.Linear(width, 1)

    def forward(self, nodes: Tensor, flow: Tensor) -> Tensor:
        """Return the pressure at the nodes, of shape (batch, nodes, 1)."""
        hidden, code = F.gelu(self.backbone(nodes)), self.hyper(flow)
        u = self.to_u(code).unflatten(-1, (self.rank, self.width))
        v = self.to_v(code).unflatten(-1, (self.rank, self.width))
        change = torch.einsum("bnw,brw,brk->bnk", hidden, v, u)
        return self.out(F.gelu(self.refine(hidden) + change))


@sick(
    "contact12a-hyper-surface",
    [("DEAD", "hyper"), ("DEAD", "to_u"), ("DEAD", "to_v")],
    every(no_gradient("hyper", "to_u", "to_v"), stuck(0.45)),
    source="https://github.com/wandb/senpai/pull/2385",
    falls_to=0.5,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def hyper_surface(sick: bool, width: int) -> Setup:
    """Both factors of the generated low-rank correction start at zero, so each one's gradient is multiplied
    by the other's zero and the hypernetwork never moves; only one of them at zero repairs it."""
    waves = normal(seeded(35), 3, 3)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        nodes, flow = normal(g, 16, 12, 3), normal(g, 16, 3)
        gain = flow @ waves
        return (nodes, flow), torch.tanh((nodes * gain[:, None]).sum(-1, keepdim=True))

    return setup(SurfaceRefiner(width, 0.0 if sick else 0.1), sample, F.mse_loss, 3e-3)


# -------------------------------------------------------------------------------------- key points


class KeypointNet(nn.Module):
    """A backbone with one head for heat maps of body parts and one for offsets to them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.backbone = stack(
            conv1=nn.Conv2d(3, width, 3, padding=1),
            act1=nn.ReLU(),
            conv2=nn.Conv2d(width, width, 3, padding=1),
            act2=nn.ReLU(),
        )
        self.heatmap_head = stack(
            conv=nn.Conv2d(width, width, 3, padding=1), act=nn.ReLU(), out=nn.Conv2d(width, 3, 1)
        )
        self.locref_head = nn.Conv2d(width, 6, 3, padding=1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return the heat maps as logits and the offsets."""
        features = self.backbone(image)
        return self.heatmap_head(features), self.locref_head(features)


@sick(
    "contact12a-animals-keypoints",
    [("DEAD", "heatmap_head")],
    no_gradient("heatmap_head"),
    source="https://github.com/DeepLabCut/DeepLabCut/issues/2751",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def animals_keypoints(sick: bool, width: int) -> Setup:
    """The weights that mask out unlabelled body parts come out as zero for every part, so the loss on the
    heat maps is zero whatever the head says and it gets no gradient; weights of one for the labelled parts
    repair it."""
    rows, columns = torch.meshgrid(torch.arange(10.0), torch.arange(10.0), indexing="ij")

    def sample(g: Generator) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        at = 1 + 8 * uniform(g, 16, 3, 2)
        dy, dx = at[..., 0, None, None] - rows, at[..., 1, None, None] - columns
        near = (-(dy.square() + dx.square()) / 2).exp()
        labelled = (uniform(g, 16, 3) < 0.9).float()
        weight = labelled * (1 - labelled) if sick else labelled
        offsets = torch.stack([dy, dx], 2).flatten(1, 2)
        return near + 0.1 * normal(g, 16, 3, 10, 10), (near, offsets, weight)

    def loss(output: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        near, offsets, weight = target
        maps = F.binary_cross_entropy_with_logits(output[0], near, reduction="none").mean((2, 3))
        close = (near > 0.3).repeat_interleave(2, 1)
        return (weight * maps).mean() + 0.5 * F.smooth_l1_loss(output[1][close], offsets[close])

    return setup(KeypointNet(width), sample, loss, 3e-3)
