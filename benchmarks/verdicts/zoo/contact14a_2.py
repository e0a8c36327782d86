"""Failed trainings of graphs, audio, video, reinforcement learning, distillation, experts and metrics,
re-created small after public reports."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from .claims import Claim, every, flat, no_gradient, not_finite, rises, stuck, training, weak
from .data import choice, clusters, frozen, normal, seeded, setup, stack, textures, trained, uniform
from .registry import FLOAT32, Setup, sick

_ONE = {"widths": (32,), "dtypes": (FLOAT32,)}


# ----------------------------------------------------------------------------------------- graphs


class Sage(nn.Module):
    """A layer that joins a node's features with the mean of its neighbours'."""

    def __init__(self, size: int, width: int, least: float) -> None:
        super().__init__()
        self.least = least
        self.lin = nn.Linear(2 * size, width)

    def forward(self, h: Tensor, links: Tensor) -> Tensor:
        degree = links.sum(1, keepdim=True).clamp_min(self.least)
        return self.lin(torch.cat([h, links @ h / degree], -1))


class SageNet(nn.Module):
    """Two layers on a fixed graph of which three nodes have no neighbours."""

    def __init__(self, width: int, least: float) -> None:
        super().__init__()
        kinds = torch.arange(30) % 3
        links = (uniform(seeded(31), 30, 30) < torch.where(kinds[:, None] == kinds, 0.4, 0.03)).float()
        links = ((links + links.T) > 0).float().fill_diagonal_(0)
        links[[4, 11, 18]] = 0
        links[:, [4, 11, 18]] = 0
        self.register_buffer("links", links)
        self.first = Sage(8, width, least)
        self.second = Sage(width, 3, least)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x, self.links)), self.links)


def _nodes(g: Generator) -> tuple[Tensor, Tensor]:
    kinds = torch.arange(30) % 3
    return normal(seeded(32), 3, 8)[kinds] + 1.5 * normal(g, 30, 8), kinds


@sick(
    "contact14a-graph-isolated",
    [("NUMERICAL", "first")],
    not_finite(loss=True),
    source="https://github.com/MrLeeeee/GCN-GAT-and-Graphsage/issues/3",
    **_ONE,
)
def isolated(sick: bool, width: int) -> Setup:
    """The sum over a node's neighbours is divided by their number, which is zero for isolated nodes: 0/0 is
    NaN, and so is the loss. Repair: at least one in the denominator."""
    return setup(SageNet(width, 0.0 if sick else 1.0), _nodes, F.cross_entropy, 1e-2)


# ------------------------------------------------------------------------------------------ audio


class Masker(nn.Module):
    """Predicts a mask for a noisy waveform and returns the masked waveform."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter = nn.Conv1d(1, width, 9, padding=4)
        self.middle = nn.Conv1d(width, width, 9, padding=4)
        self.leave = nn.Conv1d(width, 1, 9, padding=4)

    def forward(self, x: Tensor) -> Tensor:
        mask = self.leave(F.relu(self.middle(F.relu(self.enter(x)))))
        return (x * mask)[:, 0]


def _clips(g: Generator) -> tuple[Tensor, Tensor]:
    t = torch.arange(96)
    tone = torch.sin((0.2 + 0.3 * uniform(g, 12, 1)) * t + 6.3 * uniform(g, 12, 1))
    sound = (t < 48 + choice(g, 40, 12)[:, None]).float()
    return ((tone + 0.3 * normal(g, 12, 96)) * sound)[:, None], tone * sound


def magnitudes(wave: Tensor, least: float) -> Tensor:
    """Return the size of the short-time spectrum, the root of its power."""
    window = torch.hann_window(16, dtype=wave.dtype)
    spectrum = torch.stft(wave, 16, 8, window=window, center=False, return_complex=True)
    return (spectrum.real.square() + spectrum.imag.square() + least).sqrt()


@sick(
    "contact14a-audio-silence",
    [("NUMERICAL", "*")],
    not_finite(loss=False),
    source="https://github.com/pytorch/audio/issues/993",
    **_ONE,
)
def silence(sick: bool, width: int) -> Setup:
    """A loss on spectral magnitudes takes the root of a power that is exactly zero where the clip is padded
    with silence: the root's gradient there is not finite. Repair: a small number under the root."""
    least = 0.0 if sick else 1e-7
    return setup(
        Masker(width), _clips, lambda o, t: F.l1_loss(magnitudes(o, least), magnitudes(t, least)), 2e-3
    )


# ------------------------------------------------------------------------------------------ video


class Anticipator(nn.Module):
    """Says at every frame whether an accident is near, from the frames so far."""

    def __init__(self, width: int, carried: bool) -> None:
        super().__init__()
        self.carried = carried
        self.features = nn.Linear(6, width)
        self.cell = nn.GRUCell(width, width)
        self.head = nn.Linear(width, 1)

    def forward(self, frames: Tensor) -> Tensor:
        begin = frames.new_zeros(len(frames), self.cell.hidden_size)
        hidden, answers = begin, []
        for frame in frames.unbind(1):
            hidden = self.cell(F.relu(self.features(frame)), hidden if self.carried else begin)
            answers.append(self.head(hidden))
        return torch.cat(answers, 1)


def _drift(g: Generator) -> tuple[Tensor, Tensor]:
    steps = normal(g, 24, 12, 6)
    return steps, (steps[..., 0].cumsum(1) > 0).float()


@sick(
    "contact14a-video-hidden",
    [("DEAD", "cell")],
    no_gradient("cell.weight_hh"),
    allow=("BOTTLENECK",),
    source="https://github.com/JWFanggit/LOTVS-CAP/issues/9",
    **_ONE,
)
def hidden(sick: bool, width: int) -> Setup:
    """The loop over frames gives the recurrent cell the same zero state at every frame, so nothing is
    remembered and the state's weights get no gradient. Repair: carry the state on."""
    return setup(Anticipator(width, not sick), _drift, F.binary_cross_entropy_with_logits, 5e-3)


# ------------------------------------------------------------------------- reinforcement learning


class SoftActorCritic(nn.Module):
    """Actor, critic, the critic's slow copy and the temperature, for four actions; returns the losses."""

    def __init__(self, width: int, wanted: float) -> None:
        super().__init__()
        self.wanted = wanted
        self.actor = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 4))
        self.critic = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 4))
        self.slow = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 4))
        self.slow.load_state_dict(self.critic.state_dict())
        self.slow.requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.zeros(1))

    def forward(self, state: Tensor, action: Tensor, reward: Tensor, after: Tensor) -> Tensor:
        with torch.no_grad():
            for slow, fast in zip(self.slow.parameters(), self.critic.parameters(), strict=True):
                slow.lerp_(fast, 0.05)
            log_next = self.actor(after).log_softmax(-1)
            worth = self.slow(after) - self.log_alpha.exp() * log_next
            target = reward + 0.9 * (log_next.exp() * worth).sum(-1)
        values = self.critic(state)
        critic = F.mse_loss(values.gather(1, action[:, None])[:, 0], target)
        log_policy = self.actor(state).log_softmax(-1)
        policy = log_policy.exp()
        actor = (policy * (self.log_alpha.exp().detach() * log_policy - values.detach())).sum(-1).mean()
        entropy = -(policy * log_policy).sum(-1).mean().detach()
        return torch.cat([critic[None], actor[None], self.log_alpha * (entropy - self.wanted)])


def _moves(g: Generator) -> tuple[tuple[Tensor, ...], None]:
    state, action = normal(g, 64, 8), choice(g, 4, 64)
    goal = normal(seeded(33), 8, 4)
    reward = 3 * torch.tanh((state @ goal).gather(1, action[:, None])[:, 0])
    return (state, action, reward, normal(g, 64, 8)), None


@sick(
    "contact14a-rl-temperature",
    [("UNSTABLE", "*")],
    rises(3.0, steps=20),
    allow=("EXPLODING",),
    source="https://github.com/rail-berkeley/rlkit/issues/75",
    **_ONE,
)
def temperature(sick: bool, width: int) -> Setup:
    """The entropy that a soft actor-critic with discrete actions must keep is the largest that there is, the
    logarithm of their number: the temperature grows without end, and the critic's targets run away with it.
    Repair: ask for a part of it."""
    largest = 1.3863
    model = SoftActorCritic(width, largest if sick else 0.4 * largest)

    def make(parameters: list[Tensor]) -> Optimizer:
        rest = [p for p in parameters if p is not model.log_alpha]
        return torch.optim.Adam([{"params": rest, "lr": 3e-3}, {"params": [model.log_alpha], "lr": 0.1}])

    return setup(model, _moves, lambda output, _: output.sum(), make)


# ----------------------------------------------------------------------------------- distillation


class Pair(nn.Module):
    """A student with the features of a teacher beside its own."""

    def __init__(self, teacher: nn.Module, width: int) -> None:
        super().__init__()
        self.teacher = frozen(teacher)
        self.body = _body(width, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mine = self.body(x)
        return self.head(F.relu(mine).mean((2, 3))), mine, self.teacher(x)


def _body(width: int, features: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, features, 3, padding=1),
        nn.BatchNorm2d(features),
    )


@sick(
    "contact14a-distillation-sum",
    [("EXPLODING", "*")],
    weak("head", "body", 1e-3),
    allow=("UNSTABLE", "BOTTLENECK"),
    source="https://github.com/clovaai/overhaul-distillation/issues/12",
    **_ONE,
)
def distillation(sick: bool, width: int) -> Setup:
    """The squared distance of all features from the teacher's is summed and added to the classification loss
    as it is: it is thousands of times louder. Repair: divide it by the batch and a large constant."""
    teacher = _body(2 * width, 16)
    whole = stack(body=teacher, act=nn.ReLU(), pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten())
    whole.append(nn.Linear(16, 4))
    trained(setup(whole, textures(), F.cross_entropy, 3e-3), 40)

    def loss(output: tuple[Tensor, Tensor, Tensor], kind: Tensor) -> Tensor:
        answer, mine, theirs = output
        apart = (F.relu(mine) - F.relu(theirs)).square().sum()
        return F.cross_entropy(answer, kind) + apart / (1 if sick else len(kind) * 1000)

    return setup(Pair(teacher.eval(), width), textures(), loss, 3e-3)


# ---------------------------------------------------------------------------------------- experts


class Experts(nn.Module):
    """A layer of four experts of which every token goes to one; returns the balance of the routes too."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(12, width), nn.ReLU(), nn.LayerNorm(width))
        self.context = nn.Parameter(torch.full((width,), 3.0))
        self.router = nn.Linear(width, 4, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)) for _ in range(4)
        )
        self.head = nn.Linear(width, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.embed(x) + self.context
        weights = self.router(h).softmax(-1)
        best, chosen = weights.max(-1)
        out = h
        for number, expert in enumerate(self.experts):
            mine = (chosen == number).nonzero()[:, 0]
            if len(mine):
                out = out.index_add(0, mine, best[mine, None] * expert(h[mine]))
        share = F.one_hot(chosen, 4).to(h.dtype).mean(0)
        return self.head(out), 4 * (share * weights.mean(0)).sum()


@sick(
    "contact14a-experts-unbalanced",
    [("DEAD", "experts")],
    no_gradient("experts.0", after=19),
    allow=("BOTTLENECK",),
    source="https://github.com/jingyaogong/minimind/issues/140",
    **_ONE,
)
def experts(sick: bool, width: int) -> Setup:
    """The loss that balances the experts is computed but never added, and most tokens go to the expert that
    the router liked from the start; others get none and are never trained. Repair: add it."""

    def loss(output: tuple[Tensor, Tensor], kind: Tensor) -> Tensor:
        return F.cross_entropy(output[0], kind) + (0.0 if sick else 0.2) * output[1]

    return setup(Experts(width), clusters(12, 8, number=64, spread=1.0), loss, 1e-2)


# ----------------------------------------------------------------------------------- raw features

_SCALES = (2.0, 8.0, 60.0, 300.0, 900.0, 2500.0)


@sick(
    "contact14a-tabular-raw",
    [("SATURATION", "hidden")],
    every(flat("hidden", "sigmoid", 0.8), stuck(0.8)),
    allow=("DEAD", "VANISHING", "BOTTLENECK"),
    source="https://github.com/BrainJS/brain.js/issues/98",
    **_ONE,
)
def raw_features(sick: bool, width: int) -> Setup:
    """A net of sigmoid units gets odds, counts and amounts as they are, some in the thousands: the hidden
    units are fully on or off whatever the sample. Repair: bring every feature to unit size."""
    sample = clusters(6, 3)
    scales = torch.tensor(_SCALES)

    def matches(g: Generator) -> tuple[Tensor, Tensor]:
        x, kind = sample(g)
        return (x + 4) * scales if sick else x, kind

    hidden_layer = stack(fc=nn.Linear(6, width), act=nn.Sigmoid())
    return setup(stack(hidden=hidden_layer, out=nn.Linear(width, 3)), matches, F.cross_entropy, 1e-2)


# ----------------------------------------------------------------------------- metric learning


def collapsed(module: str, below: float, *, steps: int = 20) -> Claim:
    """After some steps what differs between samples is a small part of a module's output."""

    def claim(ready: Setup) -> tuple[bool, str]:
        *_, last = training(ready, steps, (module,))
        output = last.outputs[module].detach().double()
        ratio = float((output - output.mean(0)).norm() / output.norm().clamp_min(1e-300))
        return ratio < below, f"what differs in {module} after {steps} steps = {ratio:.2g}"

    return claim


def soft_margin(embedded: Tensor, who: Tensor, hardest: bool) -> Tensor:
    """Return the soft-margin triplet loss of every sample's hardest pairs, or of all."""
    apart = (embedded[:, None] - embedded).square().sum(-1).clamp_min(1e-12).sqrt()
    same = who[:, None] == who
    if hardest:
        friend = apart.masked_fill(~same, 0.0).amax(1)
        return F.softplus(friend - apart.masked_fill(same, 1e9).amin(1)).mean()
    alike = same & ~torch.eye(len(who), dtype=torch.bool)
    mine = alike[:, :, None] & ~same[:, None, :]
    return F.softplus(apart[:, :, None] - apart[:, None, :])[mine].mean()


def _people(g: Generator) -> tuple[Tensor, Tensor]:
    who = torch.arange(32) % 8
    return 1.2 * normal(seeded(34), 8, 16)[who] + 1.5 * normal(g, 32, 16), who


@sick(
    "contact14a-reid-collapsed",
    [("BOTTLENECK", "*")],
    every(collapsed("embed", 0.2), stuck(0.68)),
    allow=("UNSTABLE", "VANISHING", "DEAD"),
    source="https://github.com/VisualComputingInstitute/triplet-reid/issues/30",
    **_ONE,
)
def reid(sick: bool, width: int) -> Setup:
    """A triplet loss of the hardest pairs with a soft margin falls to the logarithm of two and stays: the
    network, from scratch, on hard data and at this rate, puts all embeddings on one point. Repair: take all
    triplets, and a lower rate."""
    model = stack(
        fc1=nn.Linear(16, width),
        act1=nn.ReLU(),
        fc2=nn.Linear(width, width),
        act2=nn.ReLU(),
        embed=nn.Linear(width, 16),
    )
    return setup(model, _people, lambda e, who: soft_margin(e, who, sick), 3e-2 if sick else 1e-2)
