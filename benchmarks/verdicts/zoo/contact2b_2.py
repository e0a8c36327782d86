"""Models that public reports say do not train: graphs, worlds, generated weights, points, control."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from .claims import Claim, flat, no_gradient, not_finite, strong, training
from .data import normal, seeded, setup, trained, uniform
from .registry import FLOAT32, Setup, sick

# ------------------------------------------------------------------------------ heterogeneous graphs

Edge = tuple[str, str, str]
EDGES: list[Edge] = [
    ("user", "buys", "item"),
    ("item", "bought", "user"),
    ("tag", "labels", "item"),
    ("item", "labelled", "tag"),
]


class EdgeAttention(nn.Module):
    """Attention of the destinations of one kind of edge over their sources."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)

    def forward(self, source: Tensor, target: Tensor, index: Tensor) -> Tensor:
        """Return what the targets receive, (targets, dim), along the edges (2, edges)."""
        src, dst = index
        q, k, v = self.query(target)[dst], self.key(source)[src], self.value(source)[src]
        weight = ((q * k).sum(-1, keepdim=True) / math.sqrt(k.shape[-1])).clamp(-8, 8).exp()
        total = torch.zeros(len(target), 1).index_add(0, dst, weight)
        mixed = torch.zeros(len(target), v.shape[-1]).index_add(0, dst, weight * v)
        return mixed / (total + 1e-9)


class HeteroGraphTransformer(nn.Module):
    """Two layers of attention by kind of edge; node types that nothing points to drop out on the way."""

    def __init__(self, sizes: dict[str, int], dim: int, kinds: int, edges: list[Edge]) -> None:
        super().__init__()
        self.edges = edges
        self.inputs = nn.ModuleDict({name: nn.Linear(size, dim) for name, size in sizes.items()})
        into_items = [e for e in edges if e[2] == "item"]
        self.convs = nn.ModuleList(
            nn.ModuleDict({"__".join(e): EdgeAttention(dim) for e in part}) for part in (edges, into_items)
        )
        self.roots = nn.ModuleList(nn.Linear(dim, dim) for _ in range(2))
        self.head = nn.Linear(dim, kinds)

    def forward(self, x: dict[str, Tensor], index: dict[str, Tensor]) -> Tensor:
        """Return the logits of the items."""
        h = {name: self.inputs[name](value).relu() for name, value in x.items()}
        for convs, root in zip(self.convs, self.roots, strict=True):
            out: dict[str, Tensor] = {}
            for name, conv in convs.items():  # type: ignore[operator]
                src, _, dst = name.split("__")
                if src in h and dst in h:
                    out[dst] = out.get(dst, root(h[dst])) + conv(h[src], h[dst], index[name])
            h = {name: value.relu() for name, value in out.items()}
        return self.head(h["item"])


@sick(
    "contact2b-hetero-source",
    [("DEAD", "convs.1.tag__labels__item")],
    no_gradient("convs.1.tag__labels__item"),
    source="https://github.com/pyg-team/pytorch_geometric/issues/7234",
    widths=(16,),
    dtypes=(FLOAT32,),
)
def hetero_source(sick: bool, width: int) -> Setup:
    """A heterogeneous graph transformer where tags are only ever sources: after the first layer they have no
    representation, so the second layer's attention over them is skipped in silence. Repair: reverse edges."""
    edges = EDGES[:3] if sick else EDGES
    model = HeteroGraphTransformer({"user": 6, "item": 8, "tag": 5}, width, 4, edges)
    tags = 2 * normal(seeded(32), 4, 5)

    def sample(g: Generator) -> tuple[dict[str, Any], Tensor]:
        kind = torch.randint(0, 4, (40,), generator=g)
        buys = torch.stack(
            [torch.randint(0, 20, (120,), generator=g), torch.randint(0, 40, (120,), generator=g)]
        )
        noisy = torch.where(uniform(g, 40) < 0.9, kind, torch.randint(0, 4, (40,), generator=g))
        labels = torch.stack([3 * noisy + torch.randint(0, 3, (40,), generator=g), torch.arange(40)])
        index = {"__".join(EDGES[0]): buys, "__".join(EDGES[1]): buys.flip(0)}
        index |= {"__".join(EDGES[2]): labels, "__".join(EDGES[3]): labels.flip(0)}
        x = {"user": normal(g, 20, 6), "item": normal(g, 40, 8)}
        x["tag"] = tags.repeat_interleave(3, 0) + 0.3 * normal(g, 12, 5)
        return {"x": x, "index": index}, kind

    return setup(model, sample, F.cross_entropy, 5e-3)


# ------------------------------------------------------------------------------ world model


class LatentWorldModel(nn.Module):
    """Encodes observations, and predicts the next encoding from the present one and the action."""

    def __init__(self, size: int, width: int, dim: int, actions: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(size, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, dim)
        )
        self.action = nn.Embedding(actions, dim)
        self.predictor = nn.Sequential(nn.Linear(2 * dim, width), nn.GELU(), nn.Linear(width, dim))

    def forward(self, now: Tensor, action: Tensor, then: Tensor) -> dict[str, Tensor]:
        """Return the encodings, and the prediction, of shape (batch, dim)."""
        z, after = self.encoder(now), self.encoder(then)
        return {"z": z, "then": after, "predicted": self.predictor(torch.cat([z, self.action(action)], -1))}


def collapsed(below: float, *, steps: int = 20) -> Claim:
    """The spread over the samples of the encodings is a small part of that of the observations."""

    def claim(ready: Setup) -> tuple[bool, str]:
        *_, last = training(ready, steps, ("encoder",))
        spread = float(last.outputs["encoder"].detach().std(0).mean())
        return spread < below, f"spread of the encodings = {spread:.2g}"

    return claim


@sick(
    "contact2b-world-collapse",
    [("BOTTLENECK", "*")],
    collapsed(0.05),
    allow=("VANISHING", "DEAD"),
    source="https://github.com/galilai-group/lejepa/issues/31",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def world_collapse(sick: bool, width: int) -> Setup:
    """A latent world model whose target is its own encoding with its gradient: the encoder soon maps all to
    one point, and the loss is nothing; the model is met after that. Repair: keep the encodings' variance at
    one and their covariance small."""
    model = LatentWorldModel(12, width, 8, 4)
    mix, push = normal(seeded(33), 4, 12), 0.7 * normal(seeded(34), 4, 4)

    def sample(g: Generator) -> tuple[tuple[Tensor, ...], None]:
        state, action = normal(g, 64, 4), torch.randint(0, 4, (64,), generator=g)
        then = 0.9 * state + push[action]
        return (torch.tanh(state @ mix), action, torch.tanh(then @ mix)), None

    def loss(output: dict[str, Tensor], _: None) -> Tensor:
        error = F.mse_loss(output["predicted"], output["then"])
        if sick:
            return error
        z = output["z"] - output["z"].mean(0)
        covariance = z.t() @ z / (len(z) - 1)
        hinge = F.relu(1 - torch.sqrt(covariance.diagonal() + 1e-4)).mean()
        off = (covariance - covariance.diagonal().diag()).square().sum() / z.shape[1]
        return error + hinge + 0.1 * off

    ready = setup(model, sample, loss, 3e-3)
    return trained(ready, 100) if sick else ready


# ------------------------------------------------------------------------------ generated weights


class HyperLayer(nn.Module):
    """A linear layer whose weight and bias are generated from a condition, sample by sample."""

    def __init__(self, condition: int, hidden: int, inputs: int, outputs: int, scaled: bool) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.trunk = nn.Linear(condition, hidden)
        self.generate = nn.Linear(hidden, inputs * outputs + outputs)
        if scaled:  # the generated weights get the variance of an ordinary layer
            bound = math.sqrt(3 * 2 / (hidden * inputs))
            nn.init.uniform_(self.generate.weight, -bound, bound)
            nn.init.zeros_(self.generate.bias)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Map (batch, inputs), for the conditions (batch, condition), to (batch, outputs)."""
        flat_weights = self.generate(F.layer_norm(F.silu(self.trunk(c)), (self.trunk.out_features,)))
        weight = flat_weights[:, : self.inputs * self.outputs].view(-1, self.outputs, self.inputs)
        return torch.bmm(weight, x.unsqueeze(-1)).squeeze(-1) + flat_weights[:, -self.outputs :]


class GoalConditioned(nn.Module):
    """A policy of three generated layers for an observation and a goal."""

    def __init__(self, width: int, scaled: bool) -> None:
        super().__init__()
        sizes = [10, width, width, width, 2]
        pairs = itertools.pairwise(sizes)
        self.layers = nn.ModuleList(HyperLayer(6, 32, i, o, scaled) for i, o in pairs)

    def forward(self, obs: Tensor, goal: Tensor) -> Tensor:
        """Return the mean actions (batch, 2)."""
        h = obs
        for layer in self.layers[:-1]:  # type: ignore[misc]
            h = F.relu(layer(h, goal))
        return self.layers[-1](h, goal)


@sick(
    "contact2b-hypernet-init",
    [("EXPLODING", "layers")],
    strong("layers", 10.0),
    allow=("UNSTABLE", "NUMERICAL"),
    source="https://github.com/Unity-Technologies/ml-agents/pull/4990",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def hypernet_init(sick: bool, width: int) -> Setup:
    """A goal-conditioned policy whose layers are generated by networks with their default initialization: the
    generated weights ignore the fan-in of the layer that they serve, and signal and gradient grow with every
    layer. Repair: initialize the generators for the variance of the generated weights."""
    model = GoalConditioned(width, scaled=not sick)
    w = normal(seeded(35), 16, 2) / 4

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        obs, goal = normal(g, 64, 10), normal(g, 64, 6)
        return (obs, goal), torch.tanh(torch.cat([obs, goal], -1) @ w)

    return setup(model, sample, F.mse_loss, 1e-3)


# ------------------------------------------------------------------------------ point clouds


class PointCompletion(nn.Module):
    """Completes a partial cloud: guesses the missing points, then moves all points a little."""

    def __init__(self, width: int, missing: int) -> None:
        super().__init__()
        self.missing = missing
        self.point1, self.point2 = nn.Conv1d(3, width, 1), nn.Conv1d(width, 2 * width, 1)
        self.seed1, self.seed2 = nn.Linear(2 * width, 2 * width), nn.Linear(2 * width, 3 * missing)
        self.move1, self.move2 = nn.Conv1d(3 + 2 * width, width, 1), nn.Conv1d(width, 3, 1)

    def forward(self, partial: Tensor) -> Tensor:
        """Map (batch, points, 3) to the full cloud (batch, points + missing, 3)."""
        centre = partial.mean(1, keepdim=True)
        x = (partial - centre).transpose(1, 2)
        code = self.point2(F.relu(self.point1(x))).amax(-1)
        seeds = self.seed2(F.relu(self.seed1(code))).view(-1, 3, self.missing)
        coarse = torch.cat([x, seeds], -1)
        spread = code.unsqueeze(-1).expand(-1, -1, coarse.shape[-1])
        offset = self.move2(F.relu(self.move1(torch.cat([coarse, spread], 1))))
        return (coarse + 0.02 * torch.tanh(offset)).transpose(1, 2) + centre


def chamfer(a: Tensor, b: Tensor, least: float | None) -> Tensor:
    """Return the mean distance to the nearest point, both ways, of clouds (batch, points, 3)."""
    square = (
        a.square().sum(-1)[:, :, None] + b.square().sum(-1)[:, None] - 2 * torch.bmm(a, b.transpose(1, 2))
    )
    if least is not None:
        square = square.clamp_min(least)
    return (torch.sqrt(square.amin(2)).mean() + torch.sqrt(square.amin(1)).mean()) / 2


@sick(
    "contact2b-points-chamfer",
    [("NUMERICAL", "*")],
    not_finite(8),
    source="https://github.com/hrzhou2/seedformer/issues/7",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def points_chamfer(sick: bool, width: int) -> Setup:
    """Completion of scanned objects that stand tens of metres away: the squared distances, expanded into
    products, come out below zero for the points that are kept, and their root is NaN. Repair: clamp them."""
    model = PointCompletion(width, 24)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        size = 1 + 2 * uniform(g, 8, 1, 3)
        shape = F.normalize(normal(g, 8, 64, 3), dim=-1) * size
        order = shape[..., 0].argsort(1, descending=True)[..., None].expand(-1, -1, 3)
        cloud = shape.gather(1, order) + 40 * (uniform(g, 8, 1, 3) - 0.5)
        return cloud[:, :40], cloud

    def loss(output: Tensor, cloud: Tensor) -> Tensor:
        return chamfer(output, cloud, None if sick else 1e-3)

    return setup(model, sample, loss, 3e-3)


# ------------------------------------------------------------------------------ control


class DriverAgent(nn.Module):
    """An actor for steering and throttle, and a critic, on one observation."""

    def __init__(self, size: int, width: int, scale: Tensor | None) -> None:
        super().__init__()
        self.actor = nn.Sequential(
            nn.Linear(size, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, 2),
            nn.Tanh(),
        )
        self.critic = nn.Sequential(
            nn.Linear(size + 2, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)
        )
        self.scale = scale

    def forward(self, obs: Tensor, action: Tensor) -> dict[str, Tensor]:
        """Return the value of the taken action, and that of the actor's by a critic that stands still."""
        if self.scale is not None:
            obs = (obs / self.scale).clamp(-1, 1)
        still = {name: p.detach() for name, p in self.critic.named_parameters()}
        ours = torch.cat([obs, self.actor(obs)], -1)
        value = torch.func.functional_call(self.critic, still, (ours,))
        return {"q": self.critic(torch.cat([obs, action], -1)), "value": value}


def agent_loss(output: dict[str, Tensor], reward: Tensor) -> Tensor:
    """Return the critic's error and the actor's loss."""
    return F.mse_loss(output["q"], reward) - output["value"].mean()


@sick(
    "contact2b-control-saturated",
    [("SATURATION", "actor")],
    flat("actor.5", "tanh", 0.8),
    allow=("VANISHING", "DEAD", "EXPLODING", "UNSTABLE"),
    source="https://github.com/ZhihanLee/DDPG_Learning/issues/2",
    steps=300,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def control_saturated(sick: bool, width: int) -> Setup:
    """A driving agent on raw observations, in metres and kilometres per hour: the actor's tanh is at its
    bounds for both actions and stays there. Repair: scale the observations, and clip them to one."""
    scale = torch.tensor([900.0, 200.0, 120.0, 120.0, 90.0, 50.0])
    model = DriverAgent(6, width, None if sick else scale)
    w = normal(seeded(36), 6, 2)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        unit = uniform(g, 64, 6)
        action = 2 * uniform(g, 64, 2) - 1
        best = 0.7 * torch.tanh((2 * unit - 1) @ w)
        return (unit * scale, action), 1 - (action - best).square().sum(-1, keepdim=True)

    return setup(model, sample, agent_loss, 2e-3)
