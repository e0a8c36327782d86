"""Speech, audio and reinforcement learning, from public reports."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from .claims import huge, no_gradient, not_finite, rank_below, rises
from .data import normal, seeded, setup, uniform
from .registry import FLOAT32, Setup, sick

# ------------------------------------------------------------------------------------------- beat tracking


class NonCausalTemporalLayer(nn.Module):
    """Two dilated convolutions over time beside a residual path."""

    def __init__(self, size: int, dilation: int, both: bool) -> None:
        super().__init__()
        self.conv1 = nn.utils.parametrizations.weight_norm(
            nn.Conv1d(size, size, 5, padding=2 * dilation, dilation=dilation)
        )
        self.conv2 = nn.utils.parametrizations.weight_norm(
            nn.Conv1d(size, size, 5, padding=2 * dilation, dilation=dilation)
        )
        self.both = both

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of each frame with more context."""
        y = F.elu(self.conv1(x)) if self.both else x
        y = F.elu(self.conv2(y))
        return x + y


class BeatNet(nn.Module):
    """A convolution over the spectrogram, temporal layers and the activation of a beat in each frame."""

    def __init__(self, size: int, both: bool) -> None:
        super().__init__()
        self.frontend = nn.Conv1d(8, size, 3, padding=1)
        layers = [NonCausalTemporalLayer(size, 2**n, both) for n in range(2)]
        self.tcn = nn.Sequential(*layers)
        self.out = nn.Conv1d(size, 1, 1)

    def forward(self, spectrogram: Tensor) -> Tensor:
        """Return a logit for each frame."""
        return self.out(self.tcn(F.elu(self.frontend(spectrogram))))[:, 0]


def beats(g: Generator) -> tuple[Tensor, Tensor]:
    """Spectrograms with onsets; a frame is a beat if onsets lie on both sides at a distance of ten."""
    onset = (uniform(g, 16, 60) < 0.4).float()
    colour = normal(seeded(31), 8, 1)
    target = onset.roll(10, 1) * onset.roll(-10, 1)
    return colour * onset[:, None] + 0.2 * normal(g, 16, 8, 60), target


@sick(
    "contact11a-beat-tcn",
    [("DEAD", "tcn.0.conv1")],
    no_gradient("tcn.0.conv1", "tcn.1.conv1"),
    source="https://github.com/ben-hayes/beat-tracking-tcn/issues/1",
    falls_to=0.8,
    steps=200,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def beat_tcn(sick: bool, width: int) -> Setup:
    """Beat tracking: a slip in the temporal layer feeds its input straight to the second convolution, and
    the first is built but never used, so that it never trains. Calling it repairs the layer."""
    loss = F.binary_cross_entropy_with_logits
    return setup(BeatNet(width, not sick), beats, loss, 5e-3)


# -------------------------------------------------------------------------------------- source separation


class MaskNet(nn.Module):
    """Separation in a learned basis: a recurrent net gives one mask for each source."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.encoder = nn.Conv1d(1, size, 8, stride=4, bias=False)
        self.lstm = nn.LSTM(size, size, batch_first=True, bidirectional=True)
        self.mask = nn.Linear(2 * size, 2 * size)
        self.decoder = nn.ConvTranspose1d(size, 1, 8, stride=4, bias=False)

    def forward(self, mixture: Tensor) -> Tensor:
        """Return the two sources, of shape (batch, 2, time)."""
        code = F.relu(self.encoder(mixture[:, None]))
        masks = torch.sigmoid(self.mask(self.lstm(code.transpose(1, 2))[0])).transpose(1, 2)
        return torch.cat([self.decoder(code * mask) for mask in masks.chunk(2, 1)], 1)


def songs(g: Generator) -> tuple[Tensor, Tensor]:
    """Mixtures of a slow and a fast tone; in some the fast one does not play."""
    time = torch.arange(84) / 84
    rates = torch.tensor([3.0, 17.0])[:, None]
    sources = torch.sin(6.283 * (rates * time + uniform(g, 16, 2, 1)))
    sources[:, 1] *= (uniform(g, 16, 1) < 0.85).float()
    return sources.sum(1), sources


@sick(
    "contact11a-separation-sisdr",
    [("NUMERICAL", "*")],
    not_finite(4),
    source="https://github.com/csteinmetz1/auraloss/issues/25",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def separation_sisdr(sick: bool, width: int) -> Setup:
    """Scale-invariant distortion ratio as the loss of a separator: where a source is silent its energy is
    zero and the optimal scale is zero by zero, NaN. A small number in the denominators repairs it."""
    eps = 0.0 if sick else 1e-8

    def loss(output: Tensor, target: Tensor) -> Tensor:
        scale = (output * target).sum(-1, keepdim=True) / (target.square().sum(-1, keepdim=True) + eps)
        part = scale * target
        rest = output - part
        ratio = part.square().sum(-1) / (rest.square().sum(-1) + eps)
        return -10 * torch.log10(ratio + eps).mean()

    return setup(MaskNet(width), songs, loss, 3e-3)


# --------------------------------------------------------------------------------------- voice conversion


class ContentEncoder(nn.Module):
    """Convolutions and a recurrent net whose states are kept only every few frames."""

    def __init__(self, size: int, neck: int, freq: int) -> None:
        super().__init__()
        self.convolutions = nn.Conv1d(20 + 4, size, 5, padding=2)
        self.norm = nn.GroupNorm(4, size)
        self.lstm = nn.LSTM(size, neck, batch_first=True, bidirectional=True)
        self.neck, self.freq = neck, freq

    def forward(self, mel: Tensor, speaker: Tensor) -> Tensor:
        """Return the codes, of shape (batch, kept frames, 2 * neck)."""
        x = torch.cat((mel, speaker[:, None].expand(-1, mel.shape[1], -1)), -1).transpose(1, 2)
        out = self.lstm(F.relu(self.norm(self.convolutions(x))).transpose(1, 2))[0]
        ahead, back = out[..., : self.neck], out[..., self.neck :]
        return torch.cat((ahead[:, self.freq - 1 :: self.freq], back[:, :: self.freq]), -1)


class AutoVC(nn.Module):
    """An autoencoder of speech whose code says what is spoken and whose speaker vector says by whom."""

    def __init__(self, size: int, neck: int, freq: int) -> None:
        super().__init__()
        self.encoder = ContentEncoder(size, neck, freq)
        self.decoder = nn.LSTM(2 * neck + 4, size, batch_first=True)
        self.linear_projection = nn.Linear(size, 20)

    def forward(self, mel: Tensor, speaker: Tensor) -> Tensor:
        """Return the reconstructed spectrogram."""
        code = self.encoder(mel, speaker).repeat_interleave(self.encoder.freq, 1)
        x = torch.cat((code, speaker[:, None].expand(-1, mel.shape[1], -1)), -1)
        return self.linear_projection(self.decoder(x)[0])


def utterances(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Spectrograms of four syllables each, by speakers who differ in colour."""
    syllables, voices = normal(seeded(32), 12, 20), normal(seeded(33), 4, 20)
    spoken = torch.randint(0, 12, (16, 4), generator=g)
    who = torch.randint(0, 4, (16,), generator=g)
    mel = syllables[spoken].repeat_interleave(4, 1) + 0.3 * voices[who][:, None]
    return (mel, F.one_hot(who, 4).float()), mel


@sick(
    "contact11a-autovc-neck",
    [("BOTTLENECK", "encoder")],
    rank_below("encoder", 2.5, steps=10),
    source="https://github.com/auspicious3000/autovc/issues/61",
    steps=200,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def autovc_neck(sick: bool, width: int) -> Setup:
    """Voice conversion by an autoencoder whose code is too narrow, one unit each way and one frame for the
    whole utterance, so that what is spoken cannot pass. Tuning the width of the code and how often it is
    kept, as the author advises, repairs it."""
    model = AutoVC(width, 1, 16) if sick else AutoVC(width, 16, 4)
    return setup(model, utterances, F.mse_loss, 1e-2)


# --------------------------------------------------------------------------------- reinforcement learning


class Normalizer(nn.Module):
    """Observations in units of their running mean and spread."""

    def __init__(self, mean: Tensor, spread: Tensor) -> None:
        super().__init__()
        self.register_buffer("running_mean", mean)
        self.register_buffer("running_std", spread)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised and clamped observations."""
        return ((x - self.running_mean) / self.running_std).clamp(-5, 5)


class NetworkBody(nn.Module):
    """The encoder that actor and critic have one each of."""

    def __init__(self, size: int, normalizer: nn.Module) -> None:
        super().__init__()
        self.normalizer = normalizer
        self.encoder = nn.Sequential(nn.Linear(4, size), nn.SiLU(), nn.Linear(size, size), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        """Return the encoded observations."""
        return self.encoder(self.normalizer(x))


class PPOAgent(nn.Module):
    """Separate networks for the policy and for the value, as the optimizer holds the critic."""

    def __init__(self, size: int, critic_normalizer: nn.Module, normalizer: nn.Module) -> None:
        super().__init__()
        self.actor = NetworkBody(size, normalizer)
        self.action_head = nn.Linear(size, 3)
        self.critic = NetworkBody(size, critic_normalizer)
        self.value_head = nn.Linear(size, 1)

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of the actions and the value."""
        return self.action_head(self.actor(observation)), self.value_head(self.critic(observation))[:, 0]


SPREAD = torch.tensor([2000.0, 1000.0, 1.0, 0.5])
OFFSET = torch.tensor([3000.0, 0.0, 0.0, 0.0])


def rollout(g: Generator) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Observations in metres and radians, with actions, their advantages and returns."""
    plain = normal(g, 64, 4)
    action = torch.randint(0, 3, (64,), generator=g)
    best = (plain[:, 2] > 0).long() + (plain[:, 3] > 0).long()
    returns = torch.tanh(plain[:, 0]) + plain[:, 2]
    advantage = (action == best).float() - 1 / 3
    return plain * SPREAD + OFFSET, (action, advantage, returns)


def ppo_loss(output: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Return the clipped loss of the policy, whose old one is uniform, and half the squared value error."""
    logits, value = output
    action, advantage, returns = target
    ratio = 3 * logits.softmax(-1).gather(1, action[:, None])[:, 0]
    policy = -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
    return policy + 0.5 * F.mse_loss(value, returns)


@sick(
    "contact11a-ppo-critic",
    [("EXPLODING", "critic")],
    huge("critic", 1000.0),
    allow=["UNSTABLE"],
    source="https://github.com/Unity-Technologies/ml-agents/issues/5583",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def ppo_critic(sick: bool, width: int) -> Setup:
    """Proximal policy optimisation after the critic got a network of its own: only the actor's observations
    are normalised, and the critic sees distances of thousands beside angles of about one; its values and
    gradients are enormous. Normalising the critic's observations too repairs it."""
    plain = Normalizer(OFFSET, SPREAD)
    return setup(PPOAgent(width, nn.Identity() if sick else plain, plain), rollout, ppo_loss, 3e-3)


class DQNTrainer(nn.Module):
    """A Q-network with a copy that follows it, and the targets that the copy gives."""

    def __init__(self, size: int, rate: float) -> None:
        super().__init__()
        self.q_network = nn.Sequential(nn.Linear(6, size), nn.ReLU(), nn.Linear(size, size), nn.ReLU())
        self.q_head = nn.Linear(size, 4)
        self.target_network = nn.Sequential(nn.Linear(6, size), nn.ReLU(), nn.Linear(size, size), nn.ReLU())
        self.target_head = nn.Linear(size, 4)
        self.target_network.load_state_dict(self.q_network.state_dict())
        self.target_head.load_state_dict(self.q_head.state_dict())
        self.target_network.requires_grad_(False)
        self.target_head.requires_grad_(False)
        self.rate = rate

    def forward(self, state: Tensor, action: Tensor, reward: Tensor, following: Tensor) -> Tensor:
        """Return the temporal-difference error of each transition."""
        with torch.no_grad():
            for own, new in zip(self.target_network.parameters(), self.q_network.parameters(), strict=True):
                own.lerp_(new, self.rate)
            for own, new in zip(self.target_head.parameters(), self.q_head.parameters(), strict=True):
                own.lerp_(new, self.rate)
            best = self.target_head(self.target_network(following)).amax(1)
        value = self.q_head(self.q_network(state)).gather(1, action[:, None])[:, 0]
        return value - reward - 0.99 * best


def transitions(g: Generator) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Logged transitions of a drifting process; the actions are those of another policy."""
    state = normal(g, 64, 6)
    action = torch.randint(0, 4, (64,), generator=g)
    following = 2.5 * state + 0.3 * normal(g, 64, 6)
    reward = 2 * state[:, 0] + (action == 0).float()
    return (state, action, reward, following), torch.zeros(64)


@sick(
    "contact11a-dqn-targetrate",
    [("UNSTABLE", "*")],
    rises(5.0),
    allow=["EXPLODING"],
    source="https://github.com/facebookresearch/ReAgent/issues/189",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def dqn_targetrate(sick: bool, width: int) -> Setup:
    """Offline Q-learning whose target network follows at a rate of 0.2: it chases its own bootstrapped
    values and the error grows step by step by orders of magnitude. A far smaller rate repairs it."""
    model = DQNTrainer(width, 0.2 if sick else 0.001)
    return setup(model, transitions, F.mse_loss, 0.05)
