"""Labelled models from public reports: reinforcement learning, audio, world models, text and time series."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import Claim, every, huge, no_gradient, training, weak
from .data import Sample, choice, frozen, grammar, normal, seeded, setup, stack, token_loss
from .registry import FLOAT32, Setup, sick


def unreached(module: str, share: float, *, steps: int) -> Claim:
    """After some steps the gradient of more than a share of a module's outputs is exactly zero."""

    def claim(setup: Setup) -> tuple[bool, str]:
        *_, last = training(setup, steps, (module,))
        grad = last.outputs[module].grad
        seen = 1.0 if grad is None else float((grad == 0).float().mean())
        return seen > share, f"{seen:.0%} of the outputs of {module} get no gradient"

    return claim


def at_ends(module: str, share: float, *, steps: int) -> Claim:
    """After some steps more than a share of a module's outputs is within 0.01 of 0 or of 1."""

    def claim(setup: Setup) -> tuple[bool, str]:
        *_, last = training(setup, steps, (module,))
        y = last.outputs[module].detach()
        seen = float(((y.abs() < 0.01) | ((y - 1).abs() < 0.01)).float().mean())
        return seen > share, f"{seen:.0%} of {module} is at 0 or 1"

    return claim


def swells(module: str, times: float, *, steps: int) -> Claim:
    """Within some steps a recurrent module's state is at its last step above a multiple of its second."""

    def claim(setup: Setup) -> tuple[bool, str]:
        worst = 0.0
        for step in training(setup, steps, (module,)):
            size = step.outputs[module].detach().double().square().mean((0, 2)).sqrt()
            worst = max(worst, float(size[-1] / size[1].clamp_min(1e-12)))
        return worst > times, f"state of {module} grows {worst:.3g} times along the sequence"

    return claim


class ActorCritic(nn.Module):
    """A recurrent policy with a value head, which writes short sequences and is paid for every token."""

    def __init__(self, tokens: int, width: int, length: int, plain: bool) -> None:
        super().__init__()
        self.length, self.plain = length, plain
        self.embed = nn.Embedding(tokens, width)
        self.rnn = nn.GRUCell(width, width)
        self.policy = nn.Linear(width, tokens)
        self.critic = nn.Linear(width, 1)
        g = seeded(911)
        self.follow = torch.randperm(tokens, generator=g)
        self.worth = 1 + 0.7 * normal(g, tokens)

    def forward(self, token: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the log probabilities, values, rewards and entropies of a batch of rollouts."""
        state = token.new_zeros(token.shape[0], self.rnn.hidden_size, dtype=self.embed.weight.dtype)
        rows: list[list[Tensor]] = [[], [], [], []]
        for _ in range(self.length):
            state = self.rnn(self.embed(token), state)
            logs = self.policy(state).log_softmax(-1)
            value = self.critic(state)[:, 0]
            action = torch.multinomial(logs.detach().exp(), 1)[:, 0]
            reward = (action == self.follow[token]).float() + self.worth[token]
            rows[0].append(logs.gather(1, action[:, None])[:, 0])
            rows[1].append(value.detach() if self.plain else value)
            rows[2].append(reward)
            rows[3].append(-(logs.exp() * logs).sum(-1))
            token = action
        log_probs, values, rewards, entropies = (torch.stack(row, 1) for row in rows)
        return log_probs, values, rewards, entropies


def gae_loss(output: tuple[Tensor, Tensor, Tensor, Tensor], target: Tensor) -> Tensor:
    """Return the loss of the policy and of the value head with generalised advantages."""
    log_probs, values, rewards, entropies = output
    known = values.detach()
    ahead = torch.cat([known[:, 1:], torch.zeros_like(known[:, :1])], 1)
    errors = rewards + 0.95 * ahead - known
    rows: list[Tensor] = []
    total = torch.zeros_like(errors[:, 0])
    for t in reversed(range(errors.shape[1])):
        total = errors[:, t] + 0.95 * 0.95 * total
        rows.insert(0, total)
    advantages = torch.stack(rows, 1)
    scaled = (advantages - advantages.mean()) / (advantages.std() + 1e-6)
    value_loss = F.mse_loss(values, advantages + known)
    return -(log_probs * scaled).mean() + 0.5 * value_loss - 0.01 * entropies.mean()


@sick(
    "contact9a-rl-values",
    expect=[("DEAD", "critic")],
    claim=no_gradient("critic"),
    source="https://github.com/jsboige/CoursIA/pull/15256",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def rl_values(sick: bool, width: int) -> Setup:
    """Generalised advantages in a toy environment: the rollout stores the value head's predictions as plain
    numbers, and the value loss is computed from those, so the head gets no gradient and its weights never
    change. Repair: keep the predictions in the graph, and detach them for the advantages only."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        token = choice(g, 8, 24)
        return token, token

    return setup(ActorCritic(8, width, 6, plain=sick), sample, gae_loss, 5e-3)


class PosEncoding(nn.Module):
    """Sines and cosines of the time at doubling frequencies."""

    bands: Tensor

    def __init__(self, frequencies: int) -> None:
        super().__init__()
        self.register_buffer("bands", math.pi * 2.0 ** torch.arange(frequencies))

    def forward(self, coords: Tensor) -> Tensor:
        """Return the encoded times."""
        angles = coords * self.bands
        return torch.cat([coords, angles.sin(), angles.cos()], -1)


def waveform(number: int = 192) -> Sample:
    """Times in a short recording and its amplitudes there, which span -1 to 1."""
    g0 = seeded(912)
    pitches = torch.tensor([2.0, 4.0, 6.0, 11.0])
    phases, sizes = 6.3 * torch.rand(4, generator=g0), torch.tensor([1.0, 0.7, 0.5, 0.3])
    grid = torch.linspace(-1, 1, 768)[:, None]
    sound = (sizes * torch.sin(math.pi * pitches * grid + phases)).sum(-1, keepdim=True)
    sound = 0.98 * sound / sound.abs().max()

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        index = choice(g, grid.shape[0], number)
        return grid[index], sound[index]

    return sample


@sick(
    "contact9a-audio-implicit",
    expect=[("SATURATION", "net")],
    allow=["VANISHING", "DEAD"],
    claim=at_ends("net.out_act", 0.25, steps=20),
    source="https://github.com/xmindflow/INCODE/issues/2",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def audio_implicit(sick: bool, width: int) -> Setup:
    """An implicit representation with encoded positions was written for pictures and ends in a sigmoid.
    Fitted to audio, whose amplitudes lie between -1 and 1, the negative half cannot be reached: there the
    sigmoid is driven to its flat end at 0. Repair: no sigmoid for audio."""
    net = stack(
        in_layer=nn.Linear(17, width),
        act1=nn.ReLU(),
        hidden1=nn.Linear(width, width),
        act2=nn.ReLU(),
        hidden2=nn.Linear(width, width),
        act3=nn.ReLU(),
        out_layer=nn.Linear(width, 1),
        out_act=nn.Sigmoid() if sick else nn.Identity(),
    )
    model = stack(positional_encoding=PosEncoding(8), net=net)
    return setup(model, waveform(), F.mse_loss, 1e-2)


class LatentWorldModel(nn.Module):
    """Predicts the code of the next observation from that of this one and the action."""

    def __init__(self, observed: int, actions: int, latent: int, width: int, bounded: bool) -> None:
        super().__init__()
        self.bounded, self.actions = bounded, actions
        self.max_latent_delta = 1.0
        self.encoder = nn.Linear(observed, latent)
        nn.init.normal_(self.encoder.weight, std=3 / math.sqrt(observed))
        frozen(self.encoder)
        self.trunk = nn.Sequential(
            nn.Linear(latent + actions, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        self.latent_head = nn.Linear(width, latent)

    def forward(self, now: Tensor, action: Tensor, then: Tensor) -> tuple[Tensor, Tensor]:
        """Return the predicted and the true code of the next observation."""
        taken = F.one_hot(action, self.actions).to(now.dtype)
        ahead = self.latent_head(self.trunk(torch.cat([self.encoder(now), taken], -1)))
        if self.bounded:
            ahead = ahead.clamp(-self.max_latent_delta, self.max_latent_delta)
        return ahead, self.encoder(then)


def transitions(observed: int, actions: int, number: int = 48) -> Sample:
    """Observations, actions and next observations of a linear system."""
    g0 = seeded(913)
    turn = torch.linalg.qr(normal(g0, observed, observed))[0]
    push = 0.8 * normal(g0, actions, observed)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        now, action = normal(g, number, observed), choice(g, actions, number)
        then = 0.9 * now @ turn + push[action]
        return (now, action, then), action

    return sample


@sick(
    "contact9a-worldmodel-latents",
    expect=[("SATURATION", "latent_head")],
    allow=["DEAD", "VANISHING"],
    claim=unreached("latent_head", 0.4, steps=20),
    source="https://github.com/SlopDotCash/asi/pull/2969",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def worldmodel_latents(sick: bool, width: int) -> Setup:
    """A world model clips its head to the bound that is meant for changes of the latents also where the head
    predicts the next latents themselves. These are codes without such a bound: the head stalls wherever it
    passes the bound, since a clip has no gradient there. Repair: clip changes only."""
    model = LatentWorldModel(10, 4, 8, width, bounded=sick)
    return setup(model, transitions(10, 4), lambda output, _: F.mse_loss(*output), 1e-2)


class RmsNorm(nn.Module):
    """Division by the root mean square."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised tokens."""
        return self.weight * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


class SelfAttention(nn.Module):
    """Causal attention."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.v_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the tokens attend to."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class SwiGlu(nn.Module):
    """A gated feed-forward layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, 2 * width, bias=False)
        self.up_proj = nn.Linear(width, 2 * width, bias=False)
        self.down_proj = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class TransformerBlock(nn.Module):
    """Attention and feed-forward layer, each with a residual."""

    def __init__(self, width: int, partial: bool) -> None:
        super().__init__()
        self.partial = partial
        self.input_norm, self.post_attn_norm = RmsNorm(width), RmsNorm(width)
        self.self_attn, self.ffn = SelfAttention(width), SwiGlu(width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens after both."""
        residual1 = x + self.self_attn(self.input_norm(x))
        carried = residual1.detach() if self.partial else residual1
        return carried + self.ffn(self.post_attn_norm(residual1))


@sick(
    "contact9a-text-residual",
    expect=[("VANISHING", "*")],
    claim=weak("layers.0", "layers.7", 1e-3),
    source="https://github.com/paiml/entrenar/issues/313",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def text_residual(sick: bool, width: int) -> Setup:
    """A hand-written backward pass of a transformer block adds the gradient of the first residual, round the
    attention, but forgets that of the second, round the feed-forward layer: the gradient goes on through the
    feed-forward layer only, and is several times smaller with every block, until the first ones get nothing
    to speak of. Repair: add the gradient of the second residual too."""
    model = stack(
        embed_tokens=nn.Embedding(16, width),
        layers=nn.Sequential(*[TransformerBlock(width, partial=sick) for _ in range(8)]),
        norm=RmsNorm(width),
        lm_head=nn.Linear(width, 16, bias=False),
    )
    return setup(model, grammar(16, 10, 8), token_loss, 3e-3)


class Lstm(nn.Module):
    """A long short-term memory with a choice of the activation of its candidates and its output."""

    def __init__(self, inputs: int, units: int, activation: str) -> None:
        super().__init__()
        self.act = torch.relu if activation == "relu" else torch.tanh
        self.kernel = nn.Linear(inputs, 4 * units)
        self.recurrent = nn.Linear(units, 4 * units, bias=False)
        nn.init.xavier_uniform_(self.kernel.weight)
        nn.init.zeros_(self.kernel.bias)
        nn.init.ones_(self.kernel.bias[units : 2 * units])
        nn.init.orthogonal_(self.recurrent.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the state at every step."""
        state = cell = x.new_zeros(x.shape[0], self.recurrent.in_features)
        given, states = self.kernel(x), []
        for t in range(x.shape[1]):
            take, keep, new, show = (given[:, t] + self.recurrent(state)).chunk(4, -1)
            cell = keep.sigmoid() * cell + take.sigmoid() * self.act(new)
            state = show.sigmoid() * self.act(cell)
            states.append(state)
        return torch.stack(states, 1)


class ConvnLstmn(nn.Module):
    """Convolutions over time, a long short-term memory, and a classifier of its last state."""

    def __init__(self, features: int, kinds: int, width: int, activation: str) -> None:
        super().__init__()
        first, second = nn.Conv1d(features, width, 3, padding=1), nn.Conv1d(width, width, 3, padding=1)
        for conv in (first, second):
            nn.init.xavier_uniform_(conv.weight)
        self.convs = nn.Sequential(first, nn.ReLU(), second, nn.ReLU())
        self.lstm = Lstm(width, width, activation)
        self.dense = nn.Linear(width, kinds)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of the classes."""
        return self.dense(self.lstm(self.convs(x.transpose(1, 2)).transpose(1, 2))[:, -1])


def sensors(length: int = 40, features: int = 3, number: int = 16) -> Sample:
    """Readings of sensors in their own units, whose rhythm tells the class."""
    rhythms = torch.tensor([0.3, 0.7, 1.2])

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        kind = choice(g, 3, number)
        phase = 6.3 * torch.rand(number, 1, features, generator=g)
        x = torch.sin(rhythms[kind, None, None] * torch.arange(length)[:, None] + phase)
        return 40 * x + 6 * normal(g, number, length, features), kind

    return sample


@sick(
    "contact9a-timeseries-convlstm",
    expect=[("EXPLODING", "lstm")],
    allow=["UNSTABLE"],
    claim=every(huge("lstm", 1e3), swells("lstm", 30, steps=5)),
    source="https://github.com/AlexanderVNikitin/tsgm/issues/59",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def timeseries_convlstm(sick: bool, width: int) -> Setup:
    """A classifier of time series passes convolutions into a long short-term memory whose activation was set
    to relu. The loss jumps to enormous values, since nothing bounds the state that is fed back. It does so
    sometimes, and more often with larger readings; these initial weights are among those. Repair: tanh."""
    torch.manual_seed(2)
    return setup(ConvnLstmn(3, 3, width, "relu" if sick else "tanh"), sensors(), F.cross_entropy, 3e-3)
