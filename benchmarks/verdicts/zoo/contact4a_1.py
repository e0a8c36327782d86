"""Cases re-created from public reports of 2022 to 2026: language models, segmentation, speech, diffusion."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from .claims import Claim, every, flat, no_gradient, not_finite, training
from .data import Sample, choice, discs, grammar, normal, seeded, setup, token_loss, uniform
from .registry import FLOAT32, Setup, sick

# ---------------------------------------------------------------------------------- language model


class RootNorm(nn.Module):
    """Normalisation by the root mean square, without a shift."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to the same shape."""
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class T5Block(nn.Module):
    """Causal self-attention and a gated feed-forward part, each behind its own normalisation."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.attn_norm, self.ff_norm = RootNorm(width), RootNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.o = nn.Linear(width, width, bias=False)
        self.wi = nn.Linear(width, 4 * width, bias=False)
        self.wo = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, width) to the same shape."""
        q, k, v = self.qkv(self.attn_norm(x)).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        gate, value = self.wi(self.ff_norm(x)).chunk(2, dim=-1)
        return x + self.wo(F.gelu(gate) * value)


class T5LM(nn.Module):
    """A decoder whose untied head reads the normalised stream without any further scale."""

    def __init__(self, words: int, width: int, head_std: float) -> None:
        super().__init__()
        self.shared = nn.Embedding(words, width)
        self.block = nn.ModuleList([T5Block(width) for _ in range(2)])
        self.final_layer_norm = RootNorm(width)
        self.lm_head = nn.Linear(width, words, bias=False)
        nn.init.normal_(self.lm_head.weight, std=head_std)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        """(batch, time) to the logits, (batch, time, words)."""
        x = self.shared(tokens)
        for block in self.block:
            x = block(x)
        return {"logits": self.lm_head(self.final_layer_norm(x))}


def _first_loss(words: int, times: float) -> Claim:
    """The first loss is a multiple of that of a guess."""

    def claim(ready: Setup) -> tuple[bool, str]:
        loss = next(training(ready, 1)).loss
        return loss > times * math.log(words), f"first loss {loss:.3g}, of a guess {math.log(words):.3g}"

    return claim


@sick(
    "contact4a-lm-unscaled_head",
    [("SATURATION", "lm_head")],
    every(flat("lm_head", "softmax of", 0.25, steps=1), _first_loss(32, 3.0)),
    allow=("EXPLODING", "UNSTABLE"),
    source="https://github.com/huggingface/transformers/pull/26441",
    widths=(192,),
    dtypes=(FLOAT32,),
)
def unscaled_head(sick: bool, width: int) -> Setup:
    """The head of a T5-like model starts with weights of variance 1, so that the logits have a variance of
    the width, the softmax is one-hot at a wrong word and the first loss is many times that of a guess; a
    variance of one over the width repairs it."""
    model = T5LM(32, width, 1.0 if sick else width**-0.5)
    return setup(model, grammar(words=32), lambda out, y: token_loss(out["logits"], y), 1e-3)


# ------------------------------------------------------------------------------------ segmentation


class SmallUnet(nn.Module):
    """An encoder and a decoder with one skip connection, with a sigmoid at the end."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(2 * width)
        self.up = nn.Conv2d(3 * width, width, 3, padding=1)
        self.segmentation_head = nn.Conv2d(width, 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        """(batch, 1, size, size) to the probability of the mask, of the same shape."""
        skip = F.relu(self.stem(image))
        deep = F.relu(self.norm(self.down(skip)))
        deep = F.interpolate(deep, scale_factor=2, mode="nearest")
        x = F.relu(self.up(torch.cat([deep, skip], dim=1)))
        return torch.sigmoid(self.segmentation_head(x))


def _binarised(prediction: Tensor, threshold: float | None) -> Tensor:
    if threshold is None:
        return prediction
    return (prediction > threshold).to(prediction.dtype).requires_grad_()


def _dice(prediction: Tensor, mask: Tensor, threshold: float | None, eps: float = 1.0) -> Tensor:
    prediction = _binarised(prediction, threshold)
    hits = (prediction * mask).sum()
    false, missed = prediction.sum() - hits, mask.sum() - hits
    return 1 - (2 * hits + eps) / (2 * hits + false + missed + eps)


@sick(
    "contact4a-segmentation-dice_threshold",
    [("DEAD", "*")],
    no_gradient("*"),
    source="https://github.com/qubvel-org/segmentation_models.pytorch/pull/611",
    widths=(8,),
    dtypes=(FLOAT32,),
)
def dice_threshold(sick: bool, width: int) -> Setup:
    """The Dice loss compares a map that a threshold has made binary; the new tensor was made to require a
    gradient to silence the error of backward, so backward runs and nothing of it gets to the network. The
    loss of the probabilities themselves repairs it."""
    threshold = 0.5 if sick else None
    return setup(SmallUnet(width), discs(), lambda out, y: _dice(out, y, threshold), 5e-3)


# ------------------------------------------------------------------------------------------ speech


class Subsampling(nn.Module):
    """Two convolutions that leave a quarter of the frames."""

    def __init__(self, bands: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(bands, width, 3, stride=2, padding=1)
        self.conv2 = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(width)

    def forward(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, time, bands) and lengths, to (batch, time / 4, width) and a quarter of the lengths."""
        x = F.silu(self.conv1(frames.transpose(1, 2)))
        x = F.silu(self.conv2(x)).transpose(1, 2)
        return self.norm(x), (lengths + 3) // 4


class AsrModel(nn.Module):
    """Subsampling, a recurrent encoder and the head of a CTC loss."""

    def __init__(self, bands: int, width: int, words: int) -> None:
        super().__init__()
        self.encoder_embed = Subsampling(bands, width)
        self.encoder = nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.ctc_output = nn.Linear(2 * width, words)

    def forward(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, time, bands) and lengths, to log-probabilities (batch, time / 4, words) and lengths."""
        x, lengths = self.encoder_embed(frames, lengths)
        x, _ = self.encoder(x)
        return self.ctc_output(x).log_softmax(-1), lengths


def utterances(words: int, bands: int, *, crowded: float, number: int = 12, time: int = 48) -> Sample:
    """Sequences of sounds, each some frames long; a part of them carries about as many words as there are
    frames after a subsampling by 4, with repeated words among them."""
    sounds = normal(seeded(41), words, bands)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        full = uniform(g, number) < crowded
        counts = torch.where(full, time // 4, 4)
        targets = 1 + choice(g, words - 1, number, time // 4)
        frames = torch.stack(
            [sounds[t[:n]].repeat_interleave(time // int(n), 0) for t, n in zip(targets, counts, strict=True)]
        )
        lengths = torch.full((number,), time)
        return (frames + 0.3 * normal(g, *frames.shape), lengths), (targets, counts)

    return sample


def _ctc(output: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor], filtered: bool) -> Tensor:
    (log_probs, frames), (words, counts) = output, target
    if filtered:
        keep = frames - 2 >= counts
        log_probs, frames, words, counts = log_probs[keep], frames[keep], words[keep], counts[keep]
    loss = F.ctc_loss(log_probs.transpose(0, 1), words, frames, counts, reduction="sum")
    return loss / counts.sum()


@sick(
    "contact4a-speech-crowded_utterances",
    [("NUMERICAL", "*")],
    not_finite(loss=True),
    source="https://github.com/k2-fsa/icefall/pull/1713",
    widths=(24,),
    dtypes=(FLOAT32,),
)
def crowded_utterances(sick: bool, width: int) -> Setup:
    """Some utterances carry as many words as frames are left after the subsampling, and with a repeated word
    no alignment exists: the CTC loss is infinite and its gradient is NaN. A filter that leaves out those of
    fewer than two spare frames repairs it."""
    sample = utterances(8, 10, crowded=0.25)
    return setup(AsrModel(10, width, 8), sample, lambda out, y: _ctc(out, y, not sick), 5e-3)


# --------------------------------------------------------------------------------------- diffusion


class LoraLinear(nn.Module):
    """A frozen linear map with an update of low rank beside it."""

    def __init__(self, base: nn.Linear, rank: int = 8) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return self.base(x) + 2.0 * self.lora_B(self.lora_A(x))


class DenoiserBlock(nn.Module):
    """Attention over the patches, and a feed-forward part, both shifted by the time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out, self.ff = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, when: Tensor) -> Tensor:
        """(batch, patches, width) and (batch, 1, width), to the first's shape."""
        y = self.norm1(x) + when
        x = x + self.to_out(F.scaled_dot_product_attention(self.to_q(y), self.to_k(y), self.to_v(y)))
        return x + self.ff(F.gelu(self.norm2(x) + when))


class VideoDenoiser(nn.Module):
    """A diffusion transformer that is tuned by updates of low rank alone."""

    def __init__(self, patch: int, width: int, depth: int = 2) -> None:
        super().__init__()
        self.x_embedder, self.t_embedder = nn.Linear(patch, width), nn.Linear(2, width)
        self.blocks = nn.ModuleList([DenoiserBlock(width) for _ in range(depth)])
        self.final_layer = nn.Linear(width, patch)
        self.requires_grad_(False)

    def add_lora(self) -> None:
        """Put an update of low rank beside every map of the blocks."""
        for block in self.blocks:
            for name, child in list(block.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(block, name, LoraLinear(child))

    def init_weights(self) -> None:
        """Draw the weights of the base anew; a matrix that it does not know starts at zero."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                if name.split(".")[-1] in ("lora_A", "lora_B"):
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)

    def forward(self, noisy: Tensor, t: Tensor) -> Tensor:
        """(batch, patches, patch) and times (batch, 1, 1), to the noise."""
        x = self.x_embedder(noisy)
        when = self.t_embedder(torch.cat([torch.cos(3 * t), torch.sin(3 * t)], dim=-1))
        for block in self.blocks:
            x = block(x, when)
        return self.final_layer(x)


def noised(patch: int, patches: int = 6, number: int = 16) -> Sample:
    """Patches of a few patterns with noise of a random size; the target is the noise."""
    patterns = normal(seeded(42), 3, patches, patch)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        clean, t = patterns[choice(g, 3, number)], uniform(g, number, 1, 1)
        noise = normal(g, number, patches, patch)
        return (torch.cos(1.5 * t) * clean + torch.sin(1.5 * t) * noise, t), noise

    return sample


@sick(
    "contact4a-diffusion-lora_zeroed",
    [("DEAD", "blocks")],
    no_gradient("*"),
    source="https://github.com/nvidia-cosmos/cosmos-predict2.5/pull/15",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def lora_zeroed(sick: bool, width: int) -> Setup:
    """The updates of low rank are put in before the model's weights are initialised, which also sets their
    first matrix to zero: with both at zero neither gets a gradient, and all else is frozen. To put them in
    afterwards repairs it."""
    model = VideoDenoiser(8, width)
    if sick:
        model.add_lora()
        model.init_weights()
    else:
        model.init_weights()
        model.add_lora()
    return setup(model, noised(8), F.mse_loss, 5e-3)
