"""Healthy models from vision and 3D that somebody worried about and that were found to be fine."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import Claim, training, zero_at_first
from .data import Sample, choice, discs, frozen, normal, seeded, setup, stack, uniform
from .registry import FLOAT32, Setup, call, healthy


def untouched(share: float) -> Claim:
    """More than a share of the elements of the model's output gets exactly no gradient."""

    def claim(setup: Setup) -> tuple[bool, str]:
        output = call(setup.model, setup.make_batch()).detach().requires_grad_()
        setup.loss_fn(output).backward()
        assert output.grad is not None
        seen = float((output.grad == 0).float().mean())
        return seen > share, f"{seen:.0%} of the output gets no gradient"

    return claim


def gets_negative(steps: int) -> Claim:
    """The loss is below zero after some steps."""

    def claim(setup: Setup) -> tuple[bool, str]:
        *_, last = training(setup, steps)
        return last.loss < 0, f"loss after {steps} steps = {last.loss:.3g}"

    return claim


def held(share: float) -> Claim:
    """More than a share of the parameters is frozen."""

    def claim(setup: Setup) -> tuple[bool, str]:
        sizes = [(p.numel(), p.requires_grad) for p in setup.model.parameters()]
        seen = sum(n for n, trains in sizes if not trains) / sum(n for n, _ in sizes)
        return seen > share, f"{seen:.0%} of the parameters are frozen"

    return claim


def same_rows(module: str, below: float) -> Claim:
    """The weights of a layer differ by less than a part of their size."""

    def claim(setup: Setup) -> tuple[bool, str]:
        weight = setup.model.get_submodule(module).weight
        assert isinstance(weight, Tensor)
        seen = float(weight.detach().std() / weight.detach().abs().mean())
        return seen < below, f"spread of the weights of {module} / their size = {seen:.2g}"

    return claim


# ----------------------------------------------------------------------------------------- PointNet


class TNet(nn.Module):
    """A small network that predicts a 3x3 transform, the identity at first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(3, width, 1), nn.Conv1d(width, 2 * width, 1)
        self.fc1, self.fc2 = nn.Linear(2 * width, width), nn.Linear(width, 9)
        nn.init.zeros_(self.fc2.weight)
        self.fc2.bias.data = torch.eye(3).flatten()

    def forward(self, x: Tensor) -> Tensor:
        """Return a matrix for each cloud."""
        h = F.relu(self.conv2(F.relu(self.conv1(x)))).amax(-1)
        return self.fc2(F.relu(self.fc1(h))).view(-1, 3, 3)


class PointNet(nn.Module):
    """Alignment of points, shared layers, the maximum over points, and a classifier."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.tnet = TNet(width)
        self.conv1, self.bn1 = nn.Conv1d(3, width, 1), nn.BatchNorm1d(width)
        self.conv2, self.bn2 = nn.Conv1d(width, 2 * width, 1), nn.BatchNorm1d(2 * width)
        self.fc = nn.Linear(2 * width, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of clouds of shape (batch, 3, points)."""
        h = F.relu(self.bn1(self.conv1(self.tnet(x) @ x)))
        return self.fc(F.relu(self.bn2(self.conv2(h))).amax(-1))


def clouds(number: int = 16, points: int = 32) -> Sample:
    """Clouds stretched along axes by their class and turned a little round one axis."""
    stretch = 0.3 + 1.5 * uniform(seeded(41), 4, 3, 1)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        kind, angle = choice(g, 4, number), 0.8 * uniform(g, number)
        c, s, o, i = angle.cos(), angle.sin(), torch.zeros(number), torch.ones(number)
        turn = torch.stack([c, -s, o, s, c, o, o, o, i], -1).view(-1, 3, 3)
        return turn @ (stretch[kind] * normal(g, number, 3, points)), kind

    return sample


@healthy(
    "contact11b-pointnet-tnet",
    zero_at_first("tnet.conv1", "tnet.conv2", "tnet.fc1"),
    source="https://github.com/charlesq34/pointnet/issues/44",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def pointnet_tnet(width: int) -> Setup:
    """The last layer of the alignment network is zero with the identity as its bias, so that its other
    layers get no gradient at first; one step later they do, from the classifier's loss alone."""
    return setup(PointNet(width), clouds(), F.cross_entropy, 3e-3)


# ------------------------------------------------------------------------------------- depth with holes


class DepthNet(nn.Module):
    """Encoder and decoder with a skip, and a scaled sigmoid at the end."""

    def __init__(self, width: int, outputs: int, deepest: float) -> None:
        super().__init__()
        self.enc1 = stack(conv=nn.Conv2d(3, width, 3, padding=1), bn=nn.BatchNorm2d(width), act=nn.ELU())
        self.enc2 = stack(
            conv=nn.Conv2d(width, width, 3, stride=2, padding=1), bn=nn.BatchNorm2d(width), act=nn.ELU()
        )
        self.dec = stack(conv=nn.Conv2d(2 * width, width, 3, padding=1), act=nn.ELU())
        self.get_depth = nn.Conv2d(width, outputs, 3, padding=1)
        self.deepest = deepest

    def forward(self, x: Tensor) -> Tensor:
        """Return depth, and what else there is, of every pixel."""
        e1 = self.enc1(x)
        h = self.dec(torch.cat([e1, F.interpolate(self.enc2(e1), scale_factor=2.0)], 1))
        out = self.get_depth(h)
        return torch.cat([self.deepest * torch.sigmoid(out[:, :1]), out[:, 1:]], 1)


def scenes(valid: float, number: int = 8, size: int = 16) -> Sample:
    """Pictures that tell depth; the target is depth and, below it, where a sensor saw it."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        smooth = F.interpolate(normal(g, number, 1, 4, 4), size=(size, size), mode="bicubic")
        depth = 3 * torch.exp(0.6 * smooth)
        picture = torch.cat([smooth, smooth.sin(), smooth.cos()], 1) + 0.1 * normal(g, number, 3, size, size)
        return picture, torch.cat([depth, (uniform(g, number, 1, size, size) < valid).float()], 1)

    return sample


@healthy(
    "contact11b-bts-sparse",
    untouched(0.9),
    source="https://github.com/cleinc/bts/issues/113",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def bts_sparse(width: int) -> Setup:
    """The sensor sees one pixel in twenty and the logarithmic loss leaves the others out, so most of the
    output gets no gradient in a step; other pixels are seen in the next, and weights are shared."""

    def loss(depth: Tensor, target: Tensor) -> Tensor:
        mask = target[:, 1:] > 0
        d = torch.log(depth[mask]) - torch.log(target[:, :1][mask])
        return 10 * torch.sqrt(d.square().mean() - 0.85 * d.mean().square() + 1e-6)

    return setup(DepthNet(width // 2, 1, 12.0), scenes(0.05), loss, 3e-3)


@healthy(
    "contact11b-depthprior-nll",
    gets_negative(120),
    source="https://github.com/barbararoessle/dense_depth_priors_nerf/issues/26",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def depthprior_nll(width: int) -> Setup:
    """The Gaussian likelihood of depth has a learned spread, and the loss gets negative as densities pass
    one; its logarithm allows that."""

    def loss(output: Tensor, target: Tensor) -> Tensor:
        spread = F.softplus(output[:, 1:]) + 0.02
        return F.gaussian_nll_loss(output[:, :1], 0.2 * target[:, :1], spread.square())

    return setup(DepthNet(width // 2, 2, 3.0), scenes(1.0), loss, 3e-3)


# -------------------------------------------------------------------------------- masked autoencoder


class MaskedAutoencoder(nn.Module):
    """An encoder of visible patches and a decoder of all patches, in small."""

    def __init__(self, width: int, patches: int, size: int) -> None:
        super().__init__()
        self.patch_embed = nn.Linear(size, width)
        self.pos_embed = nn.Parameter(0.3 * torch.randn(patches, width))
        layer = {"dim_feedforward": 2 * width, "dropout": 0.0, "batch_first": True, "norm_first": True}
        self.blocks = nn.TransformerEncoderLayer(width, 2, **layer)  # type: ignore[arg-type]
        self.mask_token = nn.Parameter(0.02 * torch.randn(width))
        self.decoder_pos_embed = nn.Parameter(0.3 * torch.randn(patches, width))
        self.decoder_blocks = nn.TransformerEncoderLayer(width, 2, **layer)  # type: ignore[arg-type]
        self.decoder_pred = nn.Linear(width, size)

    def forward(self, patches: Tensor, keep: Tensor) -> Tensor:
        """Return all patches from those at the places to keep."""
        index = keep[..., None]
        h = self.patch_embed(patches) + self.pos_embed
        h = self.blocks(h.gather(1, index.expand(-1, -1, h.shape[-1])))
        full = self.mask_token.expand(*patches.shape[:2], -1)
        full = full.scatter(1, index.expand(-1, -1, h.shape[-1]), h) + self.decoder_pos_embed
        return self.decoder_pred(self.decoder_blocks(full))


def patched(number: int = 16, side: int = 4, kept: int = 10) -> Sample:
    """Pictures of waves in patches, with places to keep; the target is patches and a mask of the others."""
    rows, columns = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        wave = 0.25 * normal(g, number, 2, 1, 1)
        picture = torch.sin(wave[:, 0] * rows + wave[:, 1] * columns) + 0.5 * normal(g, number, 1, 1)
        patches = picture.unfold(1, side, side).unfold(2, side, side).flatten(3).flatten(1, 2)
        keep = torch.rand(number, patches.shape[1], generator=g).argsort(1)[:, :kept]
        mask = torch.ones(number, patches.shape[1]).scatter(1, keep, 0.0)
        return (patches, keep), (patches, mask)

    return sample


@healthy(
    "contact11b-mae-visible",
    untouched(0.6),
    source="https://github.com/facebookresearch/mae/issues/146",
    steps=250,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def mae_visible(width: int) -> Setup:
    """The loss is taken over hidden patches only, so the decoder's output for visible ones gets no gradient
    and looks worse; it is meant so, and the same weights make both."""

    def loss(output: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        patches, mask = target
        return ((output - patches).square().mean(-1) * mask).sum() / mask.sum()

    return setup(MaskedAutoencoder(width, 16, 16), patched(), loss, 3e-3)


# ------------------------------------------------------------------------------- signed distances


class SDFNetwork(nn.Module):
    """A network of distances that starts as about a sphere, by the statistics of its weights."""

    def __init__(self, width: int, radius: float) -> None:
        super().__init__()
        self.lin0, self.lin1, self.lin2 = nn.Linear(3, width), nn.Linear(width, width), nn.Linear(width, 1)
        for lin in (self.lin0, self.lin1):
            nn.init.normal_(lin.weight, std=math.sqrt(2 / width))
            nn.init.zeros_(lin.bias)
        nn.init.normal_(self.lin2.weight, mean=math.sqrt(math.pi / width), std=1e-4)
        nn.init.constant_(self.lin2.bias, -radius)

    def forward(self, x: Tensor) -> Tensor:
        """Return the distances of points."""
        h = F.softplus(self.lin0(x), beta=100)
        return self.lin2(F.softplus(self.lin1(h), beta=100))


def box_distances(number: int = 128) -> Sample:
    """Points round a box; the target is the signed distance to it."""
    half = torch.tensor([0.7, 0.4, 0.3])

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x = 0.8 * normal(g, number, 3)
        away = x.abs() - half
        return x, (away.clamp_min(0).norm(dim=1) + away.amax(1).clamp_max(0))[:, None]

    return sample


@healthy(
    "contact11b-sdf-geometric",
    same_rows("lin2", 0.01),
    source="https://github.com/autonomousvision/sdfstudio/issues/228",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def sdf_geometric(width: int) -> Setup:
    """All weights of the last layer are nearly one positive number and its bias is minus a radius, which
    makes the start a sphere; the units before it differ, so the layer is no bottleneck."""
    return setup(SDFNetwork(2 * width, 0.5), box_distances(), F.l1_loss, 2e-3)


# ------------------------------------------------------------------------------- texture transfer


class TextureSR(nn.Module):
    """A super-resolution network and a fixed feature network that its pictures are compared by."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.main_net = stack(
            head=nn.Conv2d(1, width // 4, 3, padding=1),
            relu=nn.ReLU(),
            tail=nn.Conv2d(width // 4, 1, 3, padding=1),
        )
        vgg = stack(
            c1=nn.Conv2d(1, width, 3, padding=1), r1=nn.ReLU(), c2=nn.Conv2d(width, width, 3, padding=1)
        )
        self.vgg19 = frozen(vgg)

    def forward(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the picture, its features, and those of the true one."""
        picture = low + self.main_net(low)
        return picture, self.vgg19(picture), self.vgg19(high).detach()


def pairs() -> Sample:
    """Noisy pictures of discs with the clean ones; the target is the clean one."""
    inner = discs(16)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        low, high = inner(g)
        return (low, high), high

    return sample


@healthy(
    "contact11b-ttsr-frozen",
    held(0.8),
    source="https://github.com/researchmm/TTSR/issues/28",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def ttsr_frozen(width: int) -> Setup:
    """Most parameters belong to a feature network that is frozen, and the features of the true picture are
    detached; gradients still pass through it to the network that trains."""

    def loss(output: tuple[Tensor, Tensor, Tensor], high: Tensor) -> Tensor:
        picture, ours, theirs = output
        return F.l1_loss(picture, high) + F.mse_loss(ours, theirs)

    return setup(TextureSR(width), pairs(), loss, 3e-3)
