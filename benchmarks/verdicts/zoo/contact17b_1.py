"""Cases after reports on text models, fine-tuning and distillation that do not train."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint

from .claims import Claim, no_gradient, not_finite, rises, training
from .data import clusters, frozen, grammar, series, setup, sgd, stack, token_loss
from .registry import FLOAT32, Setup, sick

cross_entropy = nn.functional.cross_entropy


def unmoved(*, steps: int = 20) -> Claim:
    """After some steps of the optimizer every parameter is bit for bit what it was."""

    def claim(ready: Setup) -> tuple[bool, str]:
        before = [p.detach().clone() for p in ready.model.parameters()]
        for _ in training(ready, steps):
            pass
        pairs = zip(before, ready.model.parameters(), strict=True)
        moved = sum(not torch.equal(old, new.detach()) for old, new in pairs)
        return moved == 0, f"{moved} of {len(before)} parameters moved in {steps} steps"

    return claim


class Lora(nn.Module):
    """A frozen linear layer with a trainable update of low rank, zero at first."""

    def __init__(self, size: int, rank: int = 4, scale: float = 2.0) -> None:
        super().__init__()
        self.base = frozen(nn.Linear(size, size))
        self.down = nn.Linear(size, rank, bias=False)
        self.up = nn.Linear(rank, size, bias=False)
        self.scale = scale
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * self.up(self.down(x))


class LoraBlock(nn.Module):
    """Attention with adapted queries and values, and a frozen feed-forward part."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = frozen(nn.LayerNorm(width))
        self.query, self.value = Lora(width), Lora(width)
        self.key = frozen(nn.Linear(width, width))
        self.feed = frozen(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU()))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + nn.functional.scaled_dot_product_attention(self.query(y), self.key(y), self.value(y))
        return x + self.feed(x)


class SpeechEncoder(nn.Module):
    """A frozen convolution over the frames, two adapted blocks under checkpointing, and a head."""

    def __init__(self, width: int, *, inputs_need_gradient: bool) -> None:
        super().__init__()
        self.front = frozen(nn.Conv1d(4, width, 3, padding=1))
        self.blocks = nn.ModuleList([LoraBlock(width), LoraBlock(width)])
        self.head = nn.Linear(width, 3)
        self.inputs_need_gradient = inputs_need_gradient

    def forward(self, frames: Tensor) -> Tensor:
        x = nn.functional.gelu(self.front(frames.transpose(1, 2))).transpose(1, 2)
        if self.inputs_need_gradient:
            x.requires_grad_()
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=True)
        return self.head(x.mean(1))


@sick(
    "contact17b-speech-checkpoint",
    [("DEAD", "blocks")],
    no_gradient("blocks"),
    source="https://github.com/huggingface/peft/pull/617",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def speech_checkpoint(sick: bool, width: int) -> Setup:
    """Adapters in a speech encoder whose convolution is frozen: what enters the checkpointed blocks needs no
    gradient, so that reentrant checkpointing cuts them off and only the head learns. Repair: let the
    convolution's output require a gradient."""
    model = SpeechEncoder(width, inputs_need_gradient=not sick)
    return setup(model, series(24), cross_entropy, 1e-2)


class Decoder(nn.Module):
    """A small causal language model, pre-norm, from scratch."""

    def __init__(self, width: int, words: int = 16, length: int = 12) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.place = nn.Parameter(0.02 * torch.randn(length, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.head = nn.Linear(width, words)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.place[: tokens.shape[1]]
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        return self.head(x + self.feed(self.norm2(x)))


@sick(
    "contact17b-text-zerolr",
    [("UNSTABLE", "*")],
    unmoved(),
    allow=("DEAD",),
    source="https://github.com/Lightning-AI/litgpt/issues/2151",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def text_zerolr(sick: bool, width: int) -> Setup:
    """Pretraining from scratch with a warm-up that starts at a rate of zero and is advanced once an epoch, an
    epoch being millions of batches: every step has the rate 0. Repair: advance it with every step."""

    def make(parameters: object) -> Optimizer:
        optimizer = torch.optim.AdamW(parameters, lr=5e-3, weight_decay=0.1)
        scheduler = LambdaLR(optimizer, lambda count: min(1.0, count / 10))
        if not sick:
            optimizer.register_step_post_hook(lambda *_: scheduler.step())
        return optimizer

    return setup(Decoder(width), grammar(), token_loss, make)


class Half(nn.Module):
    """A language model whose weights are held, and updated, in the given precision."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner = Decoder(width).to(dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.inner(tokens).float()


@sick(
    "contact17b-finetune-half",
    [("NUMERICAL", "*")],
    not_finite(loss=True),
    source="https://github.com/google/gemma_pytorch/issues/24",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def finetune_half(sick: bool, width: int) -> Setup:
    """Full fine-tuning with the weights themselves in float16: Adam's second moments and its epsilon
    underflow to zero, it divides by zero, and the loss is NaN after one step. Repair: float32 weights."""
    model = Half(width, torch.float16 if sick else torch.float32)
    return setup(model, grammar(), token_loss, 3e-3)


class Student(nn.Module):
    """A student with a frozen teacher whose logits it is to match."""

    def __init__(self, width: int, features: int, kinds: int) -> None:
        super().__init__()
        self.teacher = frozen(stack(layer=nn.Linear(features, 64), act=nn.ReLU(), head=nn.Linear(64, kinds)))
        with torch.no_grad():
            self.teacher.head.weight.mul_(50)
        self.student = stack(
            layer1=nn.Linear(features, width),
            act1=nn.ReLU(),
            layer2=nn.Linear(width, width),
            act2=nn.ReLU(),
            head=nn.Linear(width, kinds),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            wanted = self.teacher(x)
        return self.student(x), wanted


@sick(
    "contact17b-distil-logits",
    [("UNSTABLE", "*")],
    rises(5),
    allow=("EXPLODING", "NUMERICAL"),
    source="https://github.com/AberHu/Knowledge-Distillation-Zoo/issues/13",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def distil_logits(sick: bool, width: int) -> Setup:
    """Distillation by the squared distance of the logits, at the rate 0.1 with momentum that suited the
    softened cross entropy: the student's logits run away to NaN. Repair: a rate of 0.01."""

    def loss(output: tuple[Tensor, Tensor], _: Tensor) -> Tensor:
        return nn.functional.mse_loss(*output)

    return setup(Student(width, 20, 10), clusters(20, 10, 64), loss, sgd(0.1 if sick else 0.01, 0.9))
