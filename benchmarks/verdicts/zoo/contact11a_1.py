"""Language models: adapters, distillation, block expansion and weight tying, from public reports."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from .claims import huge, no_gradient, not_finite
from .data import choice, frozen, grammar, setup, token_loss
from .registry import FLOAT32, Setup, sick

WORDS = 16


class LoraLinear(nn.Module):
    """A frozen projection with a trainable low-rank path beside it."""

    def __init__(self, size: int, out: int, rank: int = 8) -> None:
        super().__init__()
        self.base_layer = frozen(nn.Linear(size, out, bias=False))
        self.lora_A = nn.Linear(size, rank, bias=False)
        self.lora_B = nn.Linear(rank, out, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Add the low-rank path to the frozen one."""
        return self.base_layer(x) + 2.0 * self.lora_B(self.lora_A(x))


class RMSNorm(nn.Module):
    """Scale to unit root mean square, with a learned weight."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class SwiGLU(nn.Module):
    """The gated feed-forward part of a decoder layer."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, 2 * size, bias=False)
        self.up_proj = nn.Linear(size, 2 * size, bias=False)
        self.down_proj = nn.Linear(2 * size, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Gate, widen and narrow."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Rotary(nn.Module):
    """Rotate pairs of features by an angle that grows with the position."""

    def __init__(self, size: int, keeps: bool = True) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / 100.0 ** (torch.arange(0, size, 2) / size))
        self.keeps = keeps

    def forward(self, x: Tensor) -> Tensor:
        """Return the rotated features of each position."""
        angle = torch.arange(x.shape[-2])[:, None] * self.inv_freq
        even, odd = x[..., 0::2], x[..., 1::2]
        cos, sin = angle.cos(), angle.sin()
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)
        return turned if self.keeps else turned.detach().clone()


class Attention(nn.Module):
    """Causal attention whose query and value projections may carry adapters."""

    def __init__(self, size: int, adapters: tuple[str, ...] = (), rotary: nn.Module | None = None) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            adapted = name in adapters
            setattr(self, name, LoraLinear(size, size) if adapted else nn.Linear(size, size, bias=False))
        self.rotary_emb = rotary or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Attend to the positions up to one's own."""
        q, k = self.rotary_emb(self.q_proj(x)), self.rotary_emb(self.k_proj(x))
        return self.o_proj(F.scaled_dot_product_attention(q, k, self.v_proj(x), is_causal=True))


class DecoderLayer(nn.Module):
    """Attention and a gated feed-forward part, each after a norm and beside a residual path."""

    def __init__(self, size: int, adapters: tuple[str, ...] = (), rotary: nn.Module | None = None) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(size)
        self.self_attn = Attention(size, adapters, rotary)
        self.post_attention_layernorm = RMSNorm(size)
        self.mlp = SwiGLU(size)

    def forward(self, x: Tensor) -> Tensor:
        """Run both parts."""
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class CausalLM(nn.Module):
    """A small decoder-only language model."""

    def __init__(self, size: int, layers: list[nn.Module], head: nn.Module | None = None) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(WORDS, size)
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(size)
        self.lm_head = nn.Linear(size, WORDS, bias=False) if head is None else head

    def hidden(self, tokens: Tensor) -> Tensor:
        """Return the normalised states of the last layer."""
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next token."""
        return self.lm_head(self.hidden(tokens))


def only(model: nn.Module, *parts: str) -> nn.Module:
    """Leave only those parameters trainable whose name has one of the parts in it."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in parts))
    return model


def copying(g: Generator) -> tuple[Tensor, Tensor]:
    """Sequences in which each target is the token two places earlier."""
    tokens = choice(g, WORDS, 16, 12)
    target = tokens.roll(2, 1)
    target[:, :2] = tokens[:, :2]
    return tokens, target


@sick(
    "contact11a-lora-rotary",
    [("DEAD", "layers.0.self_attn.q_proj")],
    no_gradient("layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"),
    source="https://github.com/paiml/aprender/pull/2092",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def lora_rotary(sick: bool, width: int) -> Setup:
    """Fine-tuning with low-rank adapters on queries and values: the rotary embedding hands back a fresh
    tensor without history, so that the adapters of the queries never get a gradient and only those of the
    values train. A rotation with a backward pass repairs it."""
    layers = [DecoderLayer(width, ("q_proj", "v_proj"), Rotary(width, keeps=not sick)) for _ in range(2)]
    model = only(CausalLM(width, layers), "lora_", "lm_head")
    return setup(model, copying, token_loss, 1e-2)


class FusedHeadLM(CausalLM):
    """A language model whose loss path multiplies by the head's stored matrix itself."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next token."""
        base = getattr(self.lm_head, "base_layer", self.lm_head)
        return F.linear(self.hidden(tokens), base.weight)


@sick(
    "contact11a-lora-fusedhead",
    [("DEAD", "lm_head")],
    no_gradient("lm_head"),
    source="https://github.com/unslothai/unsloth/pull/9331",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def lora_fusedhead(sick: bool, width: int) -> Setup:
    """The output head is listed as a target of low-rank adapters, but the fused loss reads the head's raw
    matrix and never calls the wrapped module: its adapters get no gradient at all. Training a full copy of
    the head, whose matrix is what the loss reads, repairs it."""
    head = LoraLinear(width, WORDS) if sick else nn.Linear(width, WORDS, bias=False)
    model = FusedHeadLM(width, [DecoderLayer(width, ("q_proj",)) for _ in range(2)], head)
    return setup(only(model, "lora_", "lm_head.weight"), grammar(WORDS), token_loss, 1e-2)


@sick(
    "contact11a-llamapro-norm",
    [("DEAD", "layers.1.mlp")],
    no_gradient("layers.1.mlp", "layers.1.post_attention_layernorm"),
    source="https://github.com/TencentARC/LLaMA-Pro/issues/28",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def llamapro_norm(sick: bool, width: int) -> Setup:
    """Block expansion: the inserted decoder layer is made an identity by setting the weights of its norms to
    zero. The gated feed-forward part then multiplies two zeros, and neither it nor its norm ever gets a
    gradient. Setting the output projections to zero instead repairs it."""
    model = CausalLM(width, [DecoderLayer(width) for _ in range(3)])
    added = model.layers[1]
    if sick:
        nn.init.zeros_(added.input_layernorm.weight)
        nn.init.zeros_(added.post_attention_layernorm.weight)
    else:
        nn.init.zeros_(added.self_attn.o_proj.weight)
        nn.init.zeros_(added.mlp.down_proj.weight)
    return setup(only(model, "layers.1."), grammar(WORDS), token_loss, 1e-2)


class Distiller(nn.Module):
    """A student beside its fixed teacher; both see the same tokens."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.student = CausalLM(size, [DecoderLayer(size)])
        self.teacher = CausalLM(2 * size, [DecoderLayer(2 * size) for _ in range(2)])
        nn.init.normal_(self.student.lm_head.weight, std=0.35)
        frozen(self.teacher)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of student and teacher."""
        return self.student(tokens), self.teacher(tokens)


@sick(
    "contact11a-distill-reverse",
    [("NUMERICAL", "*")],
    not_finite(3, loss=False),
    allow=["SATURATION"],
    source="https://github.com/MakazhanAlpamys/Soup/issues/719",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def distill_reverse(sick: bool, width: int) -> Setup:
    """Reverse-KL distillation at a low temperature: the student's probabilities are the target of the KL
    divergence and underflow to zero, where the derivative for the target is infinite; the loss is finite
    and the gradients are NaN. The same divergence from log-probabilities repairs it."""
    model, temperature = Distiller(width), 0.05

    def loss(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        own, other = output
        reference = F.log_softmax(other / temperature, -1).flatten(0, -2)
        if sick:
            chances = F.softmax(own / temperature, -1).flatten(0, -2)
            gap = F.kl_div(reference, chances, reduction="batchmean")
        else:
            logs = F.log_softmax(own / temperature, -1).flatten(0, -2)
            gap = (logs.exp() * (logs - reference)).sum(-1).mean()
        return token_loss(own, target) + temperature**2 * gap

    return setup(model, grammar(WORDS), loss, 1e-2)


class XLSTMBlock(nn.Module):
    """A recurrent cell between a norm and a gated projection, beside a residual path."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.xlstm_norm = nn.LayerNorm(size)
        self.cell = nn.LSTM(size, size, batch_first=True)
        self.proj_up = nn.Linear(size, 2 * size)
        self.proj_down = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        """Mix over time, then gate."""
        gate, value = self.proj_up(self.cell(self.xlstm_norm(x))[0]).chunk(2, -1)
        return x + self.proj_down(F.silu(gate) * value)


class XLSTMLM(nn.Module):
    """A recurrent language model whose input and output share one matrix."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(WORDS, size)
        self.blocks = nn.ModuleList([XLSTMBlock(size) for _ in range(2)])
        self.post_blocks_norm = nn.LayerNorm(size)
        self.lm_head = nn.Linear(size, WORDS, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next token."""
        x = self.token_embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.post_blocks_norm(x))


@sick(
    "contact11a-xlstm-tied",
    [("EXPLODING", "*")],
    huge("*", 20.0),
    allow=["SATURATION", "UNSTABLE"],
    source="https://github.com/NX-AI/xlstm/issues/83",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def xlstm_tied(sick: bool, width: int) -> Setup:
    """Tied weights in an xLSTM language model: the shared matrix is the one with the wide initial spread, so
    that the logits are enormous and the first loss and gradients are tens of times what they should be. Tying
    the other way round, so that the small initial values of the embedding are kept, repairs it."""
    model = XLSTMLM(width)
    nn.init.normal_(model.lm_head.weight, std=8.0)
    nn.init.normal_(model.token_embedding.weight, std=math.sqrt(2 / (5 * width)))
    if sick:
        model.token_embedding.weight = model.lm_head.weight
    else:
        model.lm_head.weight = model.token_embedding.weight
    return setup(model, grammar(WORDS), token_loss, 5e-3)


class RewardModel(nn.Module):
    """A decoder with a scalar head that scores both answers of a pair at their last token."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.rwtransformer = CausalLM(size, [DecoderLayer(size) for _ in range(2)], nn.Identity())
        self.v_head = nn.Linear(size, 1, bias=False)
        nn.init.normal_(self.v_head.weight, std=10.0)

    def forward(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Return by how much the chosen answer's score is above the other's."""
        scores = self.v_head(self.rwtransformer.hidden(torch.cat((chosen, rejected))))[:, -1, 0]
        good, bad = scores.chunk(2)
        return good - bad


def pairs(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Pairs of sequences; the chosen one ends in the lower half of the vocabulary."""
    both = choice(g, WORDS, 2, 32, 8)
    both[:, :, -1] //= 2
    both[1, :, -1] += WORDS // 2
    return (both[0], both[1]), torch.ones(32)


@sick(
    "contact11a-reward-logsigmoid",
    [("NUMERICAL", "*")],
    not_finite(3, loss=True),
    allow=["SATURATION"],
    source="https://github.com/deepspeedai/DeepSpeedExamples/issues/423",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def reward_logsigmoid(sick: bool, width: int) -> Setup:
    """Pairwise loss of a reward model as the logarithm of a sigmoid: for a wrongly ordered pair with a wide
    gap the sigmoid underflows to zero and the loss is infinite. The fused log-sigmoid repairs it."""

    def loss(gap: Tensor, target: Tensor) -> Tensor:
        return -torch.log(torch.sigmoid(gap)).mean() if sick else -F.logsigmoid(gap).mean()

    return setup(RewardModel(width), pairs, loss, 1e-2)
