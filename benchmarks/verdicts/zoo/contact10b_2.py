"""Labelled models from public reports: fine-tuning by rewards, recurrent units, and models that are fine."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import Claim, every, fades_in_time, huge, no_gradient, training
from .data import (
    Sample,
    choice,
    factors,
    frozen,
    grammar,
    normal,
    seeded,
    series,
    setup,
    token_loss,
    trained,
    uniform,
)
from .registry import FLOAT32, Setup, healthy, sick


def loss_between(low: float, high: float, *, steps: int = 20) -> Claim:
    """The loss of the last of some steps lies between two values."""

    def claim(ready: Setup) -> tuple[bool, str]:
        *_, last = training(ready, steps)
        return low < last.loss < high, f"loss of step {steps} = {last.loss:.3g}"

    return claim


# ---------------------------------------------------------------------------- rewards through adapters


class LoRALinear(nn.Module):
    """A frozen linear layer and a low-rank change that can be switched off."""

    def __init__(self, linear: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.linear = frozen(linear)
        self.lora_a = nn.Linear(linear.in_features, rank, bias=False)
        self.lora_b = nn.Linear(rank, linear.out_features, bias=False)
        nn.init.zeros_(self.lora_b.weight)
        self.active = True

    def forward(self, x: Tensor) -> Tensor:
        """Return the changed output."""
        return self.linear(x) + 2.0 * self.lora_b(self.lora_a(x)) if self.active else self.linear(x)


class Block(nn.Module):
    """A decoder block of one attention head."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(size, size) for _ in range(4))
        self.up_proj, self.down_proj = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sequence after attention and the feed-forward part."""
        y = self.norm1(x)
        q, k, v = (p(y)[:, None] for p in (self.q_proj, self.k_proj, self.v_proj))
        x = x + self.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0])
        return x + self.down_proj(F.silu(self.up_proj(self.norm2(x))))


class LanguageModel(nn.Module):
    """Embedding, blocks, and a head."""

    def __init__(self, words: int, size: int, layers: int = 2) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(words, size)
        self.layers = nn.ModuleList(Block(size) for _ in range(layers))
        self.norm = nn.LayerNorm(size)
        self.lm_head = nn.Linear(size, words, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next token."""
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


def _log_probs(logits: Tensor, tokens: Tensor, prompt: int) -> Tensor:
    chosen = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    return chosen[:, prompt - 1 :]


class Policy(nn.Module):
    """A language model with adapters, that also tells what it says without them."""

    def __init__(self, model: LanguageModel, prompt: int) -> None:
        super().__init__()
        self.prompt = prompt
        self.model = frozen(model)
        for layer in model.layers:
            for name in ("q_proj", "v_proj", "up_proj"):
                setattr(layer, name, LoRALinear(getattr(layer, name)))

    def _switch(self, active: bool) -> None:
        for module in self.modules():
            if isinstance(module, LoRALinear):
                module.active = active

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-probabilities of the completion's tokens, of the policy and of the reference."""
        self._switch(False)
        with torch.no_grad():
            reference = _log_probs(self.model(tokens), tokens, self.prompt)
        self._switch(True)
        return _log_probs(self.model(tokens), tokens, self.prompt), reference


@torch.no_grad()
def _completions(model: LanguageModel, words: int, prompt: int, length: int, groups: int) -> Tensor:
    g = seeded(104)
    tokens = choice(g, words, groups, prompt).repeat_interleave(8, 0)
    for _ in range(length):
        chances = (model(tokens)[:, -1] / 1.5).softmax(-1)
        tokens = torch.cat((tokens, torch.multinomial(chances, 1, generator=g)), 1)
    return tokens


def _pretrained(words: int, size: int) -> LanguageModel:
    model = LanguageModel(words, size)
    trained(setup(model, grammar(words=words, certain=0.5), token_loss, 1e-2), 60)
    return model


@sick(
    "contact10b-rlhf-grpo",
    expect=[("DEAD", "model.layers")],
    claim=no_gradient("model", after=15),
    source="https://github.com/Goekdeniz-Guelmez/mlx-lm-lora/issues/55",
    falls_to=0.9,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def rlhf_grpo(sick: bool, width: int) -> Setup:
    """GRPO of a language model through LoRA with the trainer's default settings. With no level of importance
    sampling chosen the log-ratio is replaced by zeros, so the term that carries the reward is a constant;
    what is left is the divergence from the reference, whose gradient is exactly zero where the adapters
    start. Loss and rewards look plausible, and lora_B stays zero for ever. The ratio of each token repairs
    it."""
    words, prompt, length, groups = 16, 4, 8, 16
    base = _pretrained(words, width)
    bank = _completions(base, words, prompt, length, groups)
    with torch.no_grad():
        old = _log_probs(base(bank), bank, prompt)
    rewards = (bank[:, prompt:] < words // 2).float().mean(1).view(groups, 8)
    advantages = ((rewards - rewards.mean(1, True)) / (rewards.std(1, keepdim=True) + 1e-4)).view(-1)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        rows = (8 * torch.randperm(groups, generator=g)[:4, None] + torch.arange(8)).view(-1)
        return bank[rows], rows

    def loss(output: tuple[Tensor, Tensor], rows: Tensor) -> Tensor:
        policy, reference = output
        log_ratio = policy - old[rows]
        ratio = (torch.zeros_like(log_ratio) if sick else log_ratio).exp()
        gain = advantages[rows, None]
        surrogate = torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain)
        apart = reference - policy
        return (0.04 * (apart.exp() - apart - 1) - surrogate).mean()

    return setup(Policy(base, prompt), sample, loss, 3e-3)


# ------------------------------------------------------------------------- independent recurrent units


class IndRNN(nn.Module):
    """A layer of recurrent units that each see only their own past."""

    def __init__(self, inputs: int, size: int) -> None:
        super().__init__()
        self.input_kernel = nn.Linear(inputs, size)
        self.recurrent_kernel = nn.Parameter(torch.empty(size).uniform_(-1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the states of all steps of a sequence (batch, time, features)."""
        state, states = x.new_zeros(()), []
        for part in self.input_kernel(x).unbind(1):
            state = torch.relu(part + self.recurrent_kernel * state)
            states.append(state)
        return torch.stack(states, 1)


class ActionRecognizer(nn.Module):
    """Recurrent layers over the frames of an action, classified by the last state."""

    def __init__(self, inputs: int, size: int, kinds: int) -> None:
        super().__init__()
        self.cells = nn.ModuleList((IndRNN(inputs, size), IndRNN(size, size)))
        self.output = nn.Linear(size, kinds)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the kind of action."""
        for cell in self.cells:
            x = cell(x)
        return self.output(x[:, -1])


@sick(
    "contact10b-frames-indrnn",
    expect=[("VANISHING", "cells")],
    allow=("DEAD",),
    claim=fades_in_time("cells.0", 0.002, sound=8),
    source="https://github.com/batzner/indrnn/issues/9",
    widths=(16,),
    dtypes=(FLOAT32,),
)
def frames_indrnn(sick: bool, width: int) -> Setup:
    """An IndRNN of few units with all recurrent weights drawn uniformly. Only the last state of the last
    layer is read, and to carry the beginning that far a unit's weight must be close to 1, which hardly one of
    them is: the gradient of the early frames vanishes. Starting the last layer's recurrent weights at 1
    repairs it, as the method's author told."""
    model = ActionRecognizer(4, width, 3)
    with torch.no_grad():
        model.cells[0].recurrent_kernel.abs_().mul_(0.9)
        model.cells[1].input_kernel.bias.zero_()
        if not sick:
            model.cells[1].recurrent_kernel.fill_(1.0)
            model.cells[1].input_kernel.weight.normal_(0, 0.005)
    return setup(model, series(length=60), F.cross_entropy, 3e-3)


# -------------------------------------------------------------------------------------- fine as they are


class SigmaVAE(nn.Module):
    """An autoencoder whose decoder has one learned deviation for all pixels."""

    def __init__(self, inputs: int, size: int, latent: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(inputs, size), nn.ReLU(), nn.Linear(size, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, size), nn.ReLU(), nn.Linear(size, inputs))
        self.log_sigma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the reconstruction, the deviation, and the posterior."""
        mu, logvar = self.encoder(x).chunk(2, -1)
        z = mu + torch.randn_like(mu) * (0.5 * logvar).exp()
        log_sigma = -6 + F.softplus(self.log_sigma + 6)
        return self.decoder(z), log_sigma, mu, logvar


def _elbo(output: tuple[Tensor, Tensor, Tensor, Tensor], target: Tensor) -> Tensor:
    mean, log_sigma, mu, logvar = output
    rec = 0.5 * ((target - mean) / log_sigma.exp()) ** 2 + log_sigma + 0.919
    divergence = -0.5 * (1 + logvar - mu**2 - logvar.exp())
    return (rec.sum() + divergence.sum()) / len(target)


@healthy(
    "contact10b-vae-sigma",
    looks=loss_between(-1e4, 0.0, steps=1),
    source="https://github.com/orybkin/sigma-vae-pytorch/issues/4",
    steps=200,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def vae_sigma(width: int) -> Setup:
    """A VAE with a learned deviation of its decoder, whose loss falls below zero and goes on falling. The
    author's answer: the decoder is a density of continuous values and may be more than 1, so this is
    expected."""
    model = SigmaVAE(32, width, 6)
    ready = setup(model, factors(32, 4, noise=0.03), _elbo, 1e-3)
    return trained(ready, 250, torch.optim.Adam(model.parameters(), 1e-2))


class Retriever(nn.Module):
    """One encoder for queries and targets; similarities of unit vectors, sharpened."""

    def __init__(self, words: int, size: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.embed = nn.EmbeddingBag(words, size, mode="mean")
        self.encoder = nn.Sequential(nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, size))

    def forward(self, query: Tensor, target: Tensor) -> Tensor:
        """Return the similarity of every query with every target, over the temperature."""
        q, t = (F.normalize(self.encoder(self.embed(text)), dim=-1) for text in (query, target))
        return q @ t.T / self.temperature


def _pairs(words: int = 60, number: int = 32) -> Sample:
    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        text = choice(g, words, number, 12)
        return (text[:, :7], text[:, 5:]), torch.arange(number)

    return sample


@healthy(
    "contact10b-retrieval-gradnorm",
    looks=huge("*", 20.0),
    source="https://github.com/TIGER-AI-Lab/VLM2Vec/issues/137",
    steps=200,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def retrieval_gradnorm(width: int) -> Setup:
    """Contrastive training of an embedding model at a temperature of 0.02, where the norm of the gradient is
    large at the beginning and then comes down. Told to be normal: the similarities are divided by the
    temperature."""
    return setup(Retriever(60, width, 0.02), _pairs(), F.cross_entropy, 3e-3)


@healthy(
    "contact10b-selfplay-ppo",
    looks=loss_between(-100.0, 0.0, steps=1),
    source="https://github.com/Linear95/SPAG/issues/15",
    falls_to=0.97,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def selfplay_ppo(width: int) -> Setup:
    """Self-play fine-tuning with the clipped objective on won games only, whose loss is negative all the
    time. The author's answer: all advantages are positive there, so the loss, which maximizes them, must be
    negative."""
    words, prompt = 16, 4
    model = _pretrained(words, width)
    bank = _completions(model, words, prompt, 8, 8)
    won = bank[(bank[:, prompt:] < words // 2).float().mean(1) >= 0.5]
    gains = 0.5 + uniform(seeded(105), len(won))
    with torch.no_grad():
        old = _log_probs(model(won), won, prompt)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randperm(len(won), generator=g)[:16]
        return won[rows], rows

    def loss(logits: Tensor, rows: Tensor) -> Tensor:
        ratio = (_log_probs(logits, won[rows], prompt) - old[rows]).exp()
        gain = gains[rows, None]
        return -torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain).mean()

    return setup(model, sample, loss, 1e-3)


class ActorOfTD3(nn.Module):
    """The actor's turn: its action goes through a critic that stays as it is."""

    def __init__(self, states: int, actions: int, size: int, critic: nn.Module) -> None:
        super().__init__()
        self.actor = nn.Sequential(
            nn.Linear(states, size),
            nn.ReLU(),
            nn.Linear(size, size),
            nn.ReLU(),
            nn.Linear(size, actions),
            nn.Tanh(),
        )
        self.critic = frozen(critic)

    def forward(self, state: Tensor) -> Tensor:
        """Return the value of what the actor does."""
        return self.critic(torch.cat((state, self.actor(state)), -1))


@healthy(
    "contact10b-td3-actor",
    looks=every(loss_between(-1e4, -10.0, steps=20), no_gradient("critic")),
    source="https://github.com/DLR-RM/stable-baselines3/issues/937",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def td3_actor(width: int) -> Setup:
    """The loss of a TD3 actor, far below zero and sinking, which worries a user whose agent solves its task.
    It is minus the critic's value, so it grows with the return. The critic gets no gradient in the actor's
    step."""
    aim = normal(seeded(106), 6, 2)

    def value(state: Tensor, action: Tensor) -> Tensor:
        return 50 - 20 * (action - torch.tanh(state @ aim / 2)).square().sum(-1, keepdim=True)

    def played(g: Generator) -> tuple[Tensor, Tensor]:
        state, action = normal(g, 128, 6), 2 * uniform(g, 128, 2) - 1
        return torch.cat((state, action), -1), value(state, action)

    critic = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    trained(setup(critic, played, F.mse_loss, 1e-2), 300)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        state = normal(g, 64, 6)
        return state, state

    return setup(ActorOfTD3(6, 2, width, critic), sample, lambda q, _: -q.mean(), 1e-3)
