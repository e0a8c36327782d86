"""Codes of tokenizers after public reports: one that collapses, and two that learn without a gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .claims import no_gradient, rank_below
from .data import factors, frozen, seeded, setup, uniform
from .registry import FLOAT32, Setup, healthy, sick

ONE = {"widths": (32,), "dtypes": (FLOAT32,)}

# -------------------------------------------------------------------------------- speech: codes by averages


class Averaged(nn.Module):
    """The nearest of some codes, each the moving average of the vectors that it took; no gradient.

    They begin as the first vectors, or as small numbers that have nothing to do with them.
    """

    def __init__(self, size: int, number: int, small: bool = False) -> None:
        super().__init__()
        begin = (2 * uniform(seeded(156), number, size) - 1) / number
        self.register_buffer("codes", begin)
        self.register_buffer("count", torch.ones(number) if small else torch.zeros(number))

    @torch.no_grad()
    def forward(self, z: Tensor) -> Tensor:
        number = len(self.codes)
        if self.training:
            if not self.count.any():
                self.codes.copy_(z[:number])
                self.count.fill_(1.0)
            which = F.one_hot(torch.cdist(z, self.codes).argmin(-1), number).to(z)
            total = self.codes * self.count[:, None] * 0.9 + 0.1 * which.T @ z
            self.count.mul_(0.9).add_(0.1 * which.sum(0)).clamp_min_(1e-3)
            self.codes.copy_(total / self.count[:, None])
        return self.codes[torch.cdist(z, self.codes).argmin(-1)]


class Codec(nn.Module):
    """Encode, take the nearest code, decode; the encoder learns straight through."""

    def __init__(self, width: int, quantizer: nn.Module) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(12, width), nn.GELU(), nn.Linear(width, 6))
        self.quantizer = quantizer
        self.decoder = nn.Sequential(nn.Linear(6, width), nn.GELU(), nn.Linear(width, 12))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encoder(x)
        code = self.quantizer(z.detach())
        return self.decoder(z + (code - z).detach()), (z - code.detach()).square().mean()


def rebuild(output: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    """Return the error and a part of the distance to the codes."""
    return F.mse_loss(output[0], x) + 0.25 * output[1]


@healthy(
    "contact15b-healthy-averages",
    no_gradient("quantizer"),
    source="https://github.com/ZhangXInFD/SpeechTokenizer/issues/10",
    **ONE,
)
def averages(width: int) -> Setup:
    """The codes of a speech tokenizer get no gradient since they follow moving averages, and the encoder
    learns straight through them. Meant to be so."""
    return setup(Codec(width, Averaged(6, 32)), factors(12, 4), rebuild, 5e-3)


class Fixed(nn.Module):
    """The nearest of some codes that stay as they are."""

    def __init__(self, size: int, number: int) -> None:
        super().__init__()
        self.codes = nn.Embedding(number, size)
        nn.init.normal_(self.codes.weight)

    def forward(self, z: Tensor) -> Tensor:
        return self.codes(torch.cdist(z, self.codes.weight).argmin(-1))


@healthy(
    "contact15b-healthy-codebook",
    no_gradient("quantizer"),
    source="https://github.com/fishaudio/Bert-VITS2/pull/116",
    **ONE,
)
def codebook(width: int) -> Setup:
    """The codebook is not trained, on purpose; the parts before and after it learn to use it."""
    return setup(Codec(width, frozen(Fixed(6, 64))), factors(12, 4), rebuild, 5e-3)


@sick(
    "contact15b-codes-collapse",
    [("BOTTLENECK", "quantizer")],
    rank_below("quantizer", 1.4, steps=20),
    allow=("DEAD",),
    source="https://github.com/bytedance/1d-tokenizer/issues/27",
    **ONE,
)
def codes_collapse(sick: bool, width: int) -> Setup:
    """A tokenizer learns from nothing: its codes begin as small numbers round zero, and the vectors of the
    untrained encoder lie together far from there, so that one or two codes take all inputs and follow them,
    and the others are never chosen. Repair: take the first codes from the encoder's vectors."""
    model = Codec(width, Averaged(6, 32, small=sick))
    nn.init.normal_(model.encoder[2].bias, std=2.0)
    return setup(model, factors(12, 4), rebuild, 5e-3)
