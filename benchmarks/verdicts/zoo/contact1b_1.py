"""Models of vision, of molecules and of generation, re-created from public reports of training that fails.

Each is built with its illness and with the repair that the report found.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import Claim, growing, no_gradient, training
from .data import choice, normal, seeded, setup, uniform
from .registry import FLOAT32, Setup, sick

W = 16

# ------------------------------------------------------------------------- latent actions, quantized


class Quantizer(nn.Module):
    """Replaces each vector by the nearest of its codes, with the straight-through gradient."""

    def __init__(self, codes: int, size: int):
        super().__init__()
        self.codebook = nn.Embedding(codes, size)
        nn.init.uniform_(self.codebook.weight, -0.5, 0.5)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        nearest = torch.cdist(z, self.codebook.weight).argmin(-1)
        code = self.codebook(nearest)
        return z + (code - z).detach(), code, nearest


class LatentActions(nn.Module):
    """Tells from two frames which action lies between them, as a code, and predicts the second frame."""

    def __init__(self, width: int, keeps_code: bool):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 2 * width), nn.GELU())
        self.to_latent = nn.Sequential(nn.Linear(2 * width, 4), nn.LayerNorm(4))
        self.quantizer = Quantizer(8, 4)
        self.decoder = nn.Sequential(nn.Linear(12, 2 * width), nn.GELU(), nn.Linear(2 * width, 8))
        self.keeps_code = keeps_code

    def forward(self, frame: Tensor, following: Tensor) -> dict[str, Tensor]:
        z = self.to_latent(self.encoder(torch.cat([frame, following], -1)))
        passed, code, _ = self.quantizer(z)
        change = self.decoder(torch.cat([frame, passed], -1))
        return {"next": frame + change, "z": z, "code": code if self.keeps_code else passed}


@sick(
    "contact1b-generative-vq_latent_action",
    [("DEAD", "quantizer.codebook")],
    no_gradient("quantizer.codebook"),
    allow=("BOTTLENECK", "UNSTABLE"),
    source="https://github.com/showlab/Olaf-World/issues/8",
    widths=(W,),
    dtypes=(FLOAT32,),
)
def vq_latent_action(sick: bool, width: int) -> Setup:
    """The codebook's loss is taken of the straight-through output, in which the codes are detached, so that
    they stay as initialized while the prediction still improves. Repair: the loss takes the codes."""
    moves = normal(seeded(101), 5, 8)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        frame, action = normal(g, 32, 8), choice(g, 5, 32)
        following = frame + moves[action] + 0.05 * normal(g, 32, 8)
        return (frame, following), following

    def loss(out: dict[str, Tensor], following: Tensor) -> Tensor:
        codebook = F.mse_loss(out["code"], out["z"].detach())
        commitment = F.mse_loss(out["z"], out["code"].detach())
        return F.mse_loss(out["next"], following) + codebook + 0.25 * commitment

    return setup(LatentActions(width, keeps_code=not sick), sample, loss, 3e-3)


# ----------------------------------------------------------------------------- aligned scans, warped


class Aligner(nn.Module):
    """Finds the affine map that puts a scan upright, and resamples the scan with it."""

    def __init__(self, width: int, mode: str):
        super().__init__()
        self.locator = nn.Sequential(
            nn.Conv2d(1, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 2, 1)
        )
        self.to_affine = nn.Linear(9 * width, 6)
        nn.init.normal_(self.to_affine.weight, std=1e-2)
        self.to_affine.bias.data = torch.tensor([1.0, 0, 0, 0, 1, 0])
        self.mode = mode

    def forward(self, scan: Tensor) -> Tensor:
        theta = self.to_affine(F.relu(self.locator(scan)).flatten(1)).view(-1, 2, 3)
        grid = F.affine_grid(theta, list(scan.shape), align_corners=False)
        return F.grid_sample(scan, grid, mode=self.mode, align_corners=False)


class AlignedClassifier(nn.Module):
    """Aligns a scan, then classifies it."""

    def __init__(self, width: int, mode: str):
        super().__init__()
        self.aligner = Aligner(width, mode)
        self.features = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.classifier = nn.Linear(width * 9, 3)

    def forward(self, scan: Tensor) -> Tensor:
        x = F.relu(self.norm(self.features(self.aligner(scan))))
        return self.classifier(F.avg_pool2d(x, 4).flatten(1))


@sick(
    "contact1b-medical-nearest_warp",
    [("DEAD", "aligner")],
    no_gradient("aligner"),
    allow=("VANISHING",),
    source="https://github.com/Project-MONAI/MONAI/issues/8540",
    widths=(W,),
    dtypes=(FLOAT32,),
)
def nearest_warp(sick: bool, width: int) -> Setup:
    """The scan is warped with its nearest pixels, whose values do not depend on where the grid lies, so that
    the network that aligns it gets a gradient of zeros. Repair: bilinear warping."""
    rows, columns = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        kind = choice(g, 3, 24)
        y, x = (3 + 6 * uniform(g, 2, 24, 1, 1)).unbind()
        reach = torch.stack([rows - y, columns - x])
        shapes = torch.stack([reach.square().sum(0).sqrt(), reach.abs().amax(0), reach.abs().amin(0) + 1.5])
        picture = (shapes[kind, torch.arange(24)] < 2.5).float()
        return picture[:, None] + 0.2 * normal(g, 24, 1, 12, 12), kind

    model = AlignedClassifier(width, "nearest" if sick else "bilinear")
    return setup(model, sample, F.cross_entropy, 3e-3)


# ---------------------------------------------------------------------------------- Gaussian splats


class Splats(nn.Module):
    """Gaussians in the plane of a picture: place, size, angle, opacity and colour of each."""

    def __init__(self, number: int, young: int):
        super().__init__()
        cells = torch.randperm(15 * 15)[:number]
        centres = torch.stack([cells // 15, cells % 15], -1) + 1.0  # between four pixels' centres
        self.means = nn.Parameter(centres + 0.04 * torch.randn(number, 2))
        self.log_scales = nn.Parameter(torch.full((number, 2), math.log(0.3)))
        self.log_scales.data[-young:] = math.log(1.5)
        self.angles = nn.Parameter(torch.randn(number))
        self.opacities = nn.Parameter(torch.logit(torch.full((number,), 0.6)))
        self.colours = nn.Parameter(0.3 * torch.randn(number, 3))

    @torch.no_grad()
    def reset_opacity(self, first: int) -> None:
        self.opacities[first:] = self.opacities[first:].clamp(max=math.log(0.01 / 0.99))


class Scene(nn.Module):
    """Draws splats over a background, in their order, skipping whatever covers a pixel by less than 1/255."""

    def __init__(self, splats: Splats):
        super().__init__()
        self.splats = splats
        self.background = nn.Linear(1, 3, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        s = self.splats
        d = pixels[:, None] - s.means
        cos, sin = s.angles.cos(), s.angles.sin()
        turned = torch.stack([cos * d[..., 0] + sin * d[..., 1], cos * d[..., 1] - sin * d[..., 0]], -1)
        power = -0.5 * (turned / s.log_scales.exp()).square().sum(-1)
        alpha = (s.opacities.sigmoid() * power.exp()).clamp(max=0.99)
        alpha = torch.where(alpha < 1 / 255, 0.0, alpha)
        passing = torch.cumprod(torch.cat([torch.ones_like(alpha[:, :1]), 1 - alpha], -1), -1)
        colour = (alpha * passing[:, :-1]) @ s.colours.sigmoid()
        return colour + passing[:, -1:] * self.background(torch.ones(1)).sigmoid()


def idle_rows(name: str, share: float, *, after: int = 8) -> Claim:
    """More than a share of a parameter's rows gets a gradient of zeros in each of some steps."""

    def claim(setup: Setup) -> tuple[bool, str]:
        moved = None
        for step in training(setup, after):
            grad = step.grads[name]
            assert grad is not None
            on = grad.flatten(1).ne(0).any(1)
            moved = on if moved is None else moved | on
        seen = 1 - float(moved.float().mean()) if moved is not None else 0.0
        return seen > share, f"{seen:.0%} of the rows of {name} get no gradient"

    return claim


@sick(
    "contact1b-splatting-opacity_reset",
    [("DEAD", "splats")],
    idle_rows("splats.means", 0.5),
    allow=("VANISHING", "SATURATION"),
    source="https://github.com/nerfstudio-project/gsplat/issues/1011",
    widths=(W,),
    dtypes=(FLOAT32,),
)
def opacity_reset(sick: bool, width: int) -> Setup:
    """The opacities of all Gaussians have just been reset to 0.01, which puts the small, mature ones below
    the cutoff of 1/255 at every pixel, so that nothing about them gets a gradient any more. Repair: only the
    youngest are reset, which are large."""
    splats = Splats(4 * width, young=width // 2)
    splats.reset_opacity(0 if sick else 4 * width - width // 2)
    axis = torch.arange(16) + 0.5
    pixels = torch.cartesian_prod(axis, axis)
    waves = torch.stack(
        [torch.sin(0.8 * pixels[:, 0]), torch.cos(0.5 * pixels.sum(-1)), pixels[:, 1] / 8 - 1], -1
    )

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        return pixels, 0.5 + 0.4 * waves + 0.02 * normal(g, 256, 3)

    return setup(Scene(splats), sample, F.l1_loss, 2e-2)


# ------------------------------------------------------------------------------------- molecules


class EquivariantLayer(nn.Module):
    """Messages between all pairs of atoms move these along their lines, and change their features."""

    def __init__(self, width: int, bounded: bool):
        super().__init__()
        self.edge_mlp = nn.Sequential(
            nn.Linear(2 * width + 1, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)
        )
        self.coor_mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, 1))
        self.node_mlp = nn.Sequential(nn.Linear(2 * width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
        self.bounded = bounded

    def forward(self, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        n = h.shape[1]
        lines = x[:, :, None] - x[:, None]
        apart = lines.square().sum(-1, keepdim=True)
        pairs = [h[:, :, None].expand(-1, -1, n, -1), h[:, None].expand(-1, n, -1, -1), apart]
        message = F.silu(self.edge_mlp(torch.cat(pairs, -1)))
        pull = self.coor_mlp(message)
        if self.bounded:
            pull, lines = pull.tanh() / n, lines / (apart + 1e-8).sqrt().clamp(min=1e-2)
        x = x + (pull * lines).sum(2)
        return h + self.node_mlp(torch.cat([h, message.sum(2)], -1)), x


class Denoiser(nn.Module):
    """Puts the disturbed atoms of a molecule back to where they belong."""

    def __init__(self, width: int, depth: int, bounded: bool):
        super().__init__()
        self.atoms = nn.Embedding(5, width)
        self.layers = nn.ModuleList(EquivariantLayer(width, bounded) for _ in range(depth))

    def forward(self, kinds: Tensor, x: Tensor) -> Tensor:
        h = self.atoms(kinds)
        for layer in self.layers:
            h, x = layer(h, x)
        return x


@sick(
    "contact1b-molecule-unbounded_egnn",
    [("EXPLODING", "layers")],
    growing("layers.0.coor_mlp", "layers.3.coor_mlp", 30.0),
    allow=("NUMERICAL", "UNSTABLE"),
    source="https://github.com/lucidrains/egnn-pytorch/issues/9",
    widths=(W,),
    dtypes=(FLOAT32,),
)
def unbounded_egnn(sick: bool, width: int) -> Setup:
    """Each layer adds to the coordinates a sum over all atoms of distances times unbounded weights, which
    themselves grow with the squared distances, so that they and the gradients explode with the depth.
    Repair: lines of unit length, and weights through a tanh."""
    shape = 0.9 * normal(seeded(104), 9, 3)
    kinds = choice(seeded(105), 5, 9).expand(8, 9)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        turn = torch.linalg.qr(normal(g, 8, 3, 3)).Q
        place = shape @ turn
        return (kinds, 1.5 * place + 0.1 * normal(g, 8, 9, 3)), place

    return setup(Denoiser(width, 4, bounded=not sick), sample, F.mse_loss, 3e-3)


# ------------------------------------------------------------------------------------- key points


class SoftArgmax(nn.Module):
    """The mean place under a softmax over each heat map."""

    def __init__(self, sharpness: float):
        super().__init__()
        self.sharpness = sharpness

    def forward(self, heat: Tensor) -> Tensor:
        axis = torch.linspace(-1, 1, heat.shape[-1])
        weights = (self.sharpness * heat).flatten(2).softmax(-1).view_as(heat)
        return torch.stack([(weights.sum(3) * axis).sum(2), (weights.sum(2) * axis).sum(2)], -1)


class KeyPoints(nn.Module):
    """A map of scores for each joint, and the place that it tells."""

    def __init__(self, width: int, sharpness: float):
        super().__init__()
        self.scores = nn.Conv2d(width, 2, 1)
        nn.init.normal_(self.scores.weight, std=1.0)
        self.soft_argmax = SoftArgmax(sharpness)

    def forward(self, x: Tensor) -> Tensor:
        return self.soft_argmax(self.scores(x))


class PoseNet(nn.Module):
    """Finds the joints in a picture."""

    def __init__(self, width: int, sharpness: float):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.keypoints = KeyPoints(width, sharpness)

    def forward(self, picture: Tensor) -> Tensor:
        return self.keypoints(F.relu(self.norm(self.conv2(F.relu(self.conv1(picture))))))


def one_hot(scores: str, share: float) -> Claim:
    """More than a share of the softmaxes over the places of a map of scores is at one place by 99 %."""

    def claim(setup: Setup) -> tuple[bool, str]:
        *_, last = training(setup, 3, (scores,))
        alpha = next(m.sharpness for m in setup.model.modules() if isinstance(m, SoftArgmax))
        peaks = (alpha * last.outputs[scores].detach()).flatten(2).softmax(-1).amax(-1)
        seen = float((peaks > 0.99).float().mean())
        return seen > share, f"{seen:.0%} of the softmaxes (sharpness {alpha}) are at one place"

    return claim


@sick(
    "contact1b-pose-soft_argmax",
    [("SATURATION", "keypoints")],
    one_hot("keypoints.scores", 0.5),
    allow=("VANISHING", "DEAD"),
    source="https://github.com/Fdevmsy/PyTorch-Soft-Argmax/issues/3",
    widths=(W,),
    dtypes=(FLOAT32,),
)
def soft_argmax(sick: bool, width: int) -> Setup:
    """The heat map is multiplied by 1000 before the softmax, to come close to the true argmax; so the softmax
    is flat, and hardly any gradient comes through it. Repair: no factor."""
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 12), torch.linspace(-1, 1, 12), indexing="ij")

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        joints = 1.6 * uniform(g, 16, 2, 2) - 0.8
        away = (rows - joints[..., 0, None, None]) ** 2 + (columns - joints[..., 1, None, None]) ** 2
        spots = torch.exp(-away / 0.05)
        picture = torch.stack([spots[:, 0], spots[:, 1], spots.sum(1)], 1)
        return picture + 0.1 * normal(g, 16, 3, 12, 12), joints

    return setup(PoseNet(width, 1000.0 if sick else 1.0), sample, F.mse_loss, 3e-3)
