"""Cases re-created from public reports of 2022 to 2026: graphs, contrastive pretraining, healthy ones."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from .claims import Claim, flat, not_finite, training, zero_at_first
from .contact4a_1 import AsrModel, noised, utterances
from .data import Sample, discs, normal, seeded, setup, trained, uniform
from .registry import FLOAT32, Setup, healthy, sick

# ------------------------------------------------------------------------------------------ graphs


class SageLayer(nn.Module):
    """A node and the mean of its neighbours, through one matrix."""

    def __init__(self, size: int, width: int, least: float) -> None:
        super().__init__()
        self.least = least
        self.weight = nn.Parameter(torch.empty(width, 2 * size))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        """(nodes, size) and (nodes, nodes), to (nodes, width)."""
        neighbours = adjacency.sum(1, keepdim=True).clamp(min=self.least)
        mean = adjacency.div(neighbours).mm(x)
        return F.relu(F.linear(torch.cat([x, mean], dim=1), self.weight))


class SpotExpression(nn.Module):
    """Attention over the spots of a slide, layers over the graph of near spots, and the genes of each."""

    def __init__(self, size: int, width: int, genes: int, least: float) -> None:
        super().__init__()
        self.patch = nn.Linear(size, width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.sage = nn.ModuleList([SageLayer(width, width, least) for _ in range(2)])
        self.gene_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, genes))

    def forward(self, spots: Tensor, adjacency: Tensor) -> Tensor:
        """(spots, size) and (spots, spots), to (spots, genes)."""
        x = self.patch(spots)[None]
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])[0]
        jumped = []
        for layer in self.sage:
            x = layer(x, adjacency)
            jumped.append(x)
        return self.gene_head(torch.stack(jumped).mean(0))


def slide(size: int, genes: int, near: float = 0.13, number: int = 40) -> Sample:
    """Spots on a slide that are neighbours when near, where the last two lie apart from all; the target is a
    map of a spot's features and of its place."""
    g0 = seeded(43)
    mix, place_mix = normal(g0, size, genes) / math.sqrt(size), 2 * normal(g0, 2, genes)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        place = uniform(g, number, 2)
        adjacency = (torch.cdist(place, place) < 2 * near).float()
        adjacency.fill_diagonal_(0.0)
        adjacency[-2:], adjacency[:, -2:] = 0.0, 0.0
        x = normal(g, number, size)
        x[:, :2] = 3 * place
        return (x, adjacency), torch.tanh(x @ mix) + place @ place_mix

    return sample


@sick(
    "contact4a-graph-isolated_spots",
    [("NUMERICAL", "sage.0")],
    not_finite(loss=True),
    source="https://github.com/biomed-AI/Hist2ST/pull/7",
    widths=(24,),
    dtypes=(FLOAT32,),
)
def isolated_spots(sick: bool, width: int) -> Setup:
    """Two spots of every slide have no neighbour, and the mean over neighbours divides zero by zero there:
    the output and the loss are NaN. A number of neighbours of at least one repairs it."""
    model = SpotExpression(10, width, 6, 0.0 if sick else 1.0)
    return setup(model, slide(10, 6), F.mse_loss, 3e-3)


# ------------------------------------------------------------------------------- joint embeddings


class LatentWorld(nn.Module):
    """An encoder of pictures of a world, and a predictor of the next embedding by an action."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(size, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.action_encoder = nn.Linear(1, width)
        self.predictor = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, pixels: Tensor, action: Tensor) -> dict[str, Tensor]:
        """(batch, time, size) and (batch, time - 1, 1), to embeddings of all steps and their predictions."""
        emb = self.encoder(pixels)
        pred = self.predictor(emb[:, :-1] + self.action_encoder(action))
        return {"emb": emb, "pred_emb": pred, "tgt_emb": emb[:, 1:]}


def _gaussian_distance(emb: Tensor, directions: Tensor) -> Tensor:
    """Return how far embeddings, (number, width), are from a standard normal along some directions."""
    t = torch.linspace(0.2, 3.0, 12)
    angles = (emb @ directions)[..., None] * t
    real, imaginary = angles.cos().mean(0) - torch.exp(-(t**2) / 2), angles.sin().mean(0)
    return (real.square() + imaginary.square()).mean()


def turning_world(size: int, number: int = 24, time: int = 4) -> Sample:
    """Pictures of two points that turn by an action with some chance in it; there is no other target."""
    view = normal(seeded(44), 4, size)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        action = normal(g, number, time - 1, 1)
        turn = torch.cumsum(torch.cat([3 * normal(g, number, 1, 1), 0.7 * action], dim=1), dim=1)
        other = 0.5 * normal(g, number, time, 1) + turn / 2
        state = torch.cat([turn.cos(), turn.sin(), other.cos(), other.sin()], dim=-1)
        return (state @ view + 0.2 * normal(g, number, time, size), action), action

    return sample


def _same_embedding(below: float, steps: int) -> Claim:
    """After some steps what differs between the embeddings of a batch is a small part of them, and in
    absolute terms too."""

    def claim(ready: Setup) -> tuple[bool, str]:
        *_, last = training(ready, steps, ("encoder",))
        z = last.outputs["encoder"].detach().flatten(0, 1)
        spread = float((z - z.mean(0)).square().mean().sqrt())
        share = spread / float(z.square().mean().sqrt())
        holds = share < below and spread < below
        return holds, f"spread of embeddings {spread:.3g}, part of them {share:.3g}, loss {last.loss:.3g}"

    return claim


@sick(
    "contact4a-contrastive-no_spread_term",
    [("BOTTLENECK", "*")],
    _same_embedding(0.15, 60),
    allow=("VANISHING", "DEAD"),
    source="https://github.com/lucas-maes/le-wm/issues/44",
    widths=(24,),
    dtypes=(FLOAT32,),
)
def no_spread_term(sick: bool, width: int) -> Setup:
    """Embeddings that are trained only to be predicted, with the gradient through the prediction and the
    target, become the same for every picture, and the loss nears zero; it is seen after a while of training.
    The thread's remedy is a term that keeps the embeddings near a standard normal along random directions."""
    directions = F.normalize(normal(seeded(46), width, 64), dim=0)

    def loss(out: dict[str, Tensor], _: Tensor) -> Tensor:
        prediction = (out["pred_emb"] - out["tgt_emb"]).square().mean()
        if sick:
            return prediction
        return prediction + 20.0 * _gaussian_distance(out["emb"].flatten(0, 1), directions)

    ready = setup(LatentWorld(12, width), turning_world(12), loss, 2e-3)
    return trained(ready, 400) if sick else ready


# ----------------------------------------------------------------------------------------- healthy


class AdaptiveBlock(nn.Module):
    """A block whose scale, shift and gate come from the time through a map that starts at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.mix = nn.Linear(width, width)
        self.ada = nn.Linear(width, 3 * width)
        nn.init.zeros_(self.ada.weight)
        nn.init.zeros_(self.ada.bias)

    def forward(self, x: Tensor, when: Tensor) -> Tensor:
        """(batch, patches, width) and (batch, 1, width), to the first's shape."""
        shift, scale, gate = self.ada(F.silu(when)).chunk(3, dim=-1)
        return x + gate * F.gelu(self.mix(self.norm(x) * (1 + scale) + shift))


class ZeroDenoiser(nn.Module):
    """A diffusion transformer's skeleton with all its gates and its last layer at zero."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.x_embedder, self.t_embedder = nn.Linear(patch, width), nn.Linear(2, width)
        self.blocks = nn.ModuleList([AdaptiveBlock(width) for _ in range(3)])
        self.final_layer = nn.Linear(width, patch)
        nn.init.zeros_(self.final_layer.weight)
        nn.init.zeros_(self.final_layer.bias)

    def forward(self, noisy: Tensor, t: Tensor) -> Tensor:
        """(batch, patches, patch) and times (batch, 1, 1), to the noise."""
        x = self.x_embedder(noisy)
        when = self.t_embedder(torch.cat([torch.cos(3 * t), torch.sin(3 * t)], dim=-1))
        for block in self.blocks:
            x = block(x, when)
        return self.final_layer(x)


@healthy(
    "contact4a-diffusion-zero_gates",
    zero_at_first("blocks", "x_embedder", "t_embedder"),
    source="https://github.com/facebookresearch/DiT/issues/82",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def zero_gates(width: int) -> Setup:
    """Gates and the last layer of a diffusion transformer start at zero, so that in the first step all but
    the last layer gets none; the last layer moves, then the gates, then the rest, and it trains well."""
    return setup(ZeroDenoiser(8, width), noised(8), F.mse_loss, 3e-3)


class MaskHead(nn.Module):
    """Convolutions whose last bias says that a pixel is in the mask very seldom."""

    def __init__(self, width: int, prior: float = 0.005) -> None:
        super().__init__()
        self.tower = nn.ModuleList([nn.Conv2d(c, width, 3, padding=1) for c in (1, width, width)])
        self.cls_logits = nn.Conv2d(width, 1, 3, padding=1)
        nn.init.normal_(self.cls_logits.weight, std=0.01)
        bias = self.cls_logits.bias
        assert bias is not None
        nn.init.constant_(bias, -math.log((1 - prior) / prior))

    def forward(self, image: Tensor) -> Tensor:
        """(batch, 1, size, size) to logits of the same shape."""
        for conv in self.tower:
            image = F.relu(conv(image))
        return self.cls_logits(image)


def _focal(logits: Tensor, mask: Tensor, alpha: float = 0.75, gamma: float = 2.0) -> Tensor:
    p = torch.sigmoid(logits)
    missed = torch.where(mask > 0, 1 - p, p)
    weight = torch.where(mask > 0, alpha, 1 - alpha) * missed**gamma
    raw = F.binary_cross_entropy_with_logits(logits, mask, reduction="none")
    return (weight * raw).sum() / mask.sum().clamp(min=1.0)


@healthy(
    "contact4a-segmentation-focal_prior",
    flat("cls_logits", "sigmoid of", 0.9, steps=1),
    widths=(12,),
    dtypes=(FLOAT32,),
)
def focal_prior(width: int) -> Setup:
    """The last bias starts where the sigmoid is flat, as is usual with a focal loss; the loss takes logits
    and weighs the rare class, so the bias comes back at once and the masks are learned."""
    return setup(MaskHead(width), discs(), _focal, 3e-3)


def _mostly_blank(above: float, steps: int) -> Claim:
    """After some steps most frames are most likely blank."""

    def claim(ready: Setup) -> tuple[bool, str]:
        *_, last = training(ready, steps, ("ctc_output",))
        share = float((last.outputs["ctc_output"].argmax(-1) == 0).float().mean())
        return share > above, f"{share:.0%} of frames are blank after {steps} steps"

    return claim


@healthy("contact4a-speech-blank_phase", _mostly_blank(0.6, 14), widths=(24,), dtypes=(FLOAT32,))
def blank_phase(width: int) -> Setup:
    """Early in its training a CTC model comes to say blank at most frames, as if it were collapsing; some
    steps later the words come out and the loss falls on."""

    def loss(output: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
        (log_probs, frames), (words, counts) = output, target
        return F.ctc_loss(log_probs.transpose(0, 1), words, frames, counts, zero_infinity=True)

    return setup(AsrModel(10, width, 8), utterances(8, 10, crowded=0.0), loss, 5e-3)


def captioned(sizes: tuple[int, int], number: int = 32, hidden: int = 6) -> Sample:
    """Pairs of two views of the same hidden numbers; there is no other target."""
    g0 = seeded(45)
    maps = [normal(g0, hidden, size) for size in sizes]

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        z = normal(g, number, hidden)
        one, two = (torch.tanh(z @ m) + 0.05 * normal(g, number, m.shape[1]) for m in maps)
        return (one, two), z

    return sample


class SigmoidTowers(nn.Module):
    """Two encoders of their own, unit embeddings, and a learned scale and shift of the logits."""

    def __init__(self, sizes: tuple[int, int], width: int) -> None:
        super().__init__()
        self.visual, self.text = (
            nn.Sequential(nn.Linear(size, width), nn.GELU(), nn.LayerNorm(width), nn.Linear(width, width))
            for size in sizes
        )
        self.t_prime = nn.Parameter(torch.tensor(math.log(10.0)))
        self.b = nn.Parameter(torch.tensor(-10.0))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """(batch, size) each, to the logits (batch, batch)."""
        image, text = F.normalize(self.visual(image), dim=-1), F.normalize(self.text(text), dim=-1)
        return self.t_prime.exp() * image @ text.T + self.b


def _pairwise(logits: Tensor, _: Tensor) -> Tensor:
    signs = 2 * torch.eye(len(logits)) - 1
    return -F.logsigmoid(signs * logits).sum() / len(logits)


@healthy(
    "contact4a-contrastive-sigmoid_shift",
    flat("", "sigmoid of", 0.9, steps=1),
    widths=(32,),
    dtypes=(FLOAT32,),
)
def sigmoid_shift(width: int) -> Setup:
    """A pairwise sigmoid loss whose shift starts at -10, where the sigmoid is flat for nearly all pairs: they
    are rightly told apart, the few that belong together have the whole gradient, and it trains well."""
    return setup(SigmoidTowers((16, 12), width), captioned((16, 12)), _pairwise, 2e-3)
