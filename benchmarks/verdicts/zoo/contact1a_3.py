"""Healthy models in the fields of the sick ones of this round, which look suspicious."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import Claim, alike, training, zero_at_first
from .data import choice, frozen, grammar, normal, seeded, setup, token_loss, uniform
from .registry import FLOAT32, Setup, healthy

ONLY = (FLOAT32,)


class LoRALinear(nn.Module):
    """A frozen linear layer and a product of rank 4 beside it, of which one factor starts at zero."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = frozen(base)
        self.lora_A = nn.Parameter(torch.randn(4, base.in_features) / math.sqrt(base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * x @ self.lora_A.T @ self.lora_B.T


@healthy(
    "contact1a-adapter-zerob",
    zero_at_first("q.lora_A", "fc1.lora_A", "fc2.lora_A"),
    source="https://github.com/microsoft/LoRA/issues/59",
    steps=250,
    widths=(32,),
    dtypes=ONLY,
)
def zero_b(width: int) -> Setup:
    """Adapters on frozen layers: no gradient reaches the A factors as long as the B factors are zero,
    which is the first step only."""

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte = frozen(nn.Embedding(16, width))
            self.q = LoRALinear(nn.Linear(width, width))
            self.fc1, self.fc2 = LoRALinear(nn.Linear(width, 64)), LoRALinear(nn.Linear(64, width))
            self.head = frozen(nn.Linear(width, 16))

        def forward(self, idx: Tensor) -> Tensor:
            x = self.wte(idx)
            x = x + F.scaled_dot_product_attention(self.q(x), x, x, is_causal=True)
            return self.head(x + self.fc2(F.gelu(self.fc1(F.layer_norm(x, x.shape[-1:])))))

    return setup(Adapted(), grammar(), token_loss, 1e-2)


class FlowBlock(nn.Module):
    """A residual block whose shift, scale and gate come from the time by a layer that starts at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.adaln = nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        nn.init.zeros_(self.adaln.weight)
        nn.init.zeros_(self.adaln.bias)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate = self.adaln(F.silu(c)).chunk(3, -1)
        return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)


class Velocity(nn.Module):
    """The velocity of a flow at a point and a time; its last layer starts at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.x_embed, self.t_embed = nn.Linear(2, width), nn.Linear(16, width)
        self.blocks = nn.ModuleList(FlowBlock(width) for _ in range(4))
        self.final = nn.Linear(width, 2)
        nn.init.zeros_(self.final.weight)
        nn.init.zeros_(self.final.bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angle = t[:, None] * torch.arange(1, 9)
        h, c = self.x_embed(x), self.t_embed(torch.cat([angle.sin(), angle.cos()], -1))
        for block in self.blocks:
            h = block(h, c)
        return self.final(h)


@healthy(
    "contact1a-flow-adalnzero",
    zero_at_first("x_embed", "t_embed", "blocks"),
    source="https://github.com/SWivid/F5-TTS/issues/793",
    steps=200,
    falls_to=0.7,
    widths=(32,),
    dtypes=ONLY,
)
def adaln_zero(width: int) -> Setup:
    """Flow matching with gates and last layer zero at first: one layer alone has a gradient then, the
    gates follow, and then the rest."""
    centres = 3 * normal(seeded(7), 5, 2)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        data, noise = centres[choice(g, 5, 128)] + 0.1 * normal(g, 128, 2), normal(g, 128, 2)
        t = uniform(g, 128)
        return ((1 - t[:, None]) * noise + t[:, None] * data, t), data - noise

    return setup(Velocity(width), sample, F.mse_loss)


# ------------------------------------------------------------------------------- positions drown words


class Drowned(nn.Module):
    """A language model whose words are small against the sinusoids that tell their positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        angle = torch.arange(12)[:, None] / 10_000 ** (torch.arange(0, width, 2) / width)
        self.register_buffer("pe", torch.stack([angle.sin(), angle.cos()], -1).flatten(1))
        self.drop = nn.Dropout(0.1)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.decoder = nn.Linear(width, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.drop(self.embedding(tokens) + self.pe)
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return self.decoder(self.encoder(x, mask=mask, is_causal=True))


@healthy(
    "contact1a-lm-positions",
    alike("drop", 0.5),
    source="https://github.com/VHellendoorn/ICLR20-Great/issues/10",
    widths=(64,),
    dtypes=ONLY,
)
def positions(width: int) -> Setup:
    """Words of length one plus positions of length five: most of what enters is the same for all
    sentences, and yet it learns quickly."""
    return setup(Drowned(width), grammar(), token_loss)


# ---------------------------------------------------------------------- few of the rows of a table


def idle_rows(module: str, share: float) -> Claim:
    """Claim: more than a share of a table's rows gets no gradient in a step."""

    def claim(ready: Setup) -> tuple[bool, str]:
        step = next(training(ready, 1))
        grad = step.grads[module + ".weight"]
        seen = 1.0 if grad is None else float((grad == 0).all(1).float().mean())
        return seen > share, f"{seen:.0%} of the rows of {module} have no gradient"

    return claim


class TwoTowers(nn.Module):
    """Users and items as vectors of length one, and all their products, by a temperature."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(1000, width), nn.Embedding(400, width)
        self.user_tower, self.item_tower = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        u = F.normalize(self.user_tower(self.user(user)), dim=-1)
        return u @ F.normalize(self.item_tower(self.item(item)), dim=-1).T / 0.1


@healthy(
    "contact1a-recommend-towers",
    idle_rows("user", 0.9),
    source="https://github.com/huggingface/sentence-transformers/issues/3469",
    steps=300,
    widths=(32,),
    dtypes=ONLY,
)
def towers(width: int) -> Setup:
    """Two towers with the batch's other items as negatives: in each step nine in ten users have no
    gradient at all, as their turn has not come."""

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        user = choice(g, 1000, 64)
        return (user, user % 20 * 20 + choice(g, 20, 64)), torch.arange(64)

    return setup(TwoTowers(width), sample, F.cross_entropy, 1e-2)


# ------------------------------------------------------------------- a network for an equation


class Beam(nn.Module):
    """A network of sines for u'' = f on [0, 1], zero at both ends by construction; returns u and u''."""

    def __init__(self, width: int) -> None:
        super().__init__()
        first = nn.Linear(1, width)
        nn.init.uniform_(first.weight, -6, 6)
        self.hidden = nn.ModuleList([first, nn.Linear(width, width), nn.Linear(width, width)])
        self.out = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        with torch.enable_grad():
            x = x.requires_grad_()
            h = x
            for layer in self.hidden:
                h = torch.sin(layer(h))
            u = x * (1 - x) * self.out(h)
            u_x = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
            u_xx = torch.autograd.grad(u_x.sum(), x, create_graph=True)[0]
        return {"u": u, "u_xx": u_xx}


def loss_above(value: float) -> Claim:
    """Claim: the first loss is above a value."""

    def claim(ready: Setup) -> tuple[bool, str]:
        loss = next(training(ready, 1)).loss
        return loss > value, f"the first loss is {loss:.3g}"

    return claim


@healthy(
    "contact1a-physics-beam",
    loss_above(100),
    source="https://github.com/Photon-AI-Research/NeuralSolvers/pull/50",
    steps=200,
    widths=(32,),
    dtypes=ONLY,
)
def beam(width: int) -> Setup:
    """A physics-informed network: its loss is on second derivatives, its gradients go through them, and
    both are large at first, since the forcing is; with the sines it trains all the same."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x = uniform(g, 64, 1)
        return x, -((2 * math.pi) ** 2) * torch.sin(2 * math.pi * x)

    return setup(Beam(width), sample, lambda o, f: F.mse_loss(o["u_xx"], f))
