"""Language models and text embeddings that look sick and are not."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from . import data
from .claims import Claim, training, zero_at_first
from .contact7b_1 import ONE, Attention, CausalLM, FeedForward, TopOneMoE, small_lm
from .registry import Setup, healthy

# ------------------------------------------------------------------------------- mixtures of experts


def some_idle_at_first(prefix: str) -> Claim:
    """In the first step at least one of the experts under a prefix gets no gradient."""

    def claim(setup: Setup) -> tuple[bool, str]:
        names = [n for n, _ in setup.model.get_submodule(prefix).named_children()]
        step = next(training(setup, 1))
        idle = [n for n in names if step.norm(f"{prefix}.{n}") == 0]
        return bool(idle), f"{len(idle)} of {len(names)} experts get no gradient in the first step"

    return claim


@healthy(
    "contact7b-moe-fewtokens",
    some_idle_at_first("layers.1.mlp.experts"),
    source="https://github.com/huggingface/transformers/pull/35587",
    **ONE,
)
def fewtokens(width: int) -> Setup:
    """With few tokens in a batch a top-one mixture does not use all its experts, so some have no gradient in
    a single step. Which ones changes from batch to batch, and all of them learn."""
    moe = TopOneMoE(width, 8, norm_topk_prob=False)
    model = CausalLM(16, width, [FeedForward(width, 2 * width), moe])
    return data.setup(model, data.grammar(number=2, length=8), data.token_loss, 3e-3)


# ------------------------------------------------------------------------------------------ attention


def unmoved(part: str, other: str, below: float) -> Claim:
    """One parameter's gradient is a tiny part of another's."""

    def claim(setup: Setup) -> tuple[bool, str]:
        step = next(training(setup, 1))
        ratio = step.norm(part) / step.norm(other)
        return ratio < below, f"gradient {part} / {other} = {ratio:.2g}"

    return claim


@healthy(
    "contact7b-llm-keybias",
    unmoved("layers.0.self_attn.k_proj.bias", "layers.0.self_attn.q_proj.bias", 1e-3),
    source="https://github.com/microsoft/unilm/issues/510",
    **ONE,
)
def keybias(width: int) -> Setup:
    """The bias of the key projection adds the same to all scores of a query, which the softmax takes out
    again, so its gradient is nothing but rounding. With or without it the model is the same."""
    return data.setup(small_lm(16, width, bias=True), data.grammar(), data.token_loss, 3e-3)


# --------------------------------------------------------------------------------------- fine-tuning


class LoRAEmbedding(nn.Module):
    """A frozen embedding with a low-rank change whose first factor starts at zero."""

    def __init__(self, base: nn.Embedding, rank: int) -> None:
        super().__init__()
        self.base = data.frozen(base)
        self.lora_A = nn.Parameter(torch.zeros(rank, base.num_embeddings))
        self.lora_B = nn.Parameter(torch.randn(base.embedding_dim, rank))
        self.scaling = 1 / rank

    def forward(self, ids: Tensor) -> Tensor:
        return self.base(ids) + F.embedding(ids, self.lora_A.T) @ self.lora_B.T * self.scaling


class LoRALinear(nn.Module):
    """A frozen linear layer with a low-rank change whose second factor starts at zero."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = data.frozen(base)
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.lora_A.T @ self.lora_B.T


@healthy(
    "contact7b-lora-embedding",
    zero_at_first("embed_tokens.lora_B", "lm_head.lora_A"),
    source="https://github.com/microsoft/LoRA/issues/98",
    **ONE,
)
def loraembedding(width: int) -> Setup:
    """The adapter of an embedding starts with its first factor at zero and the second one random, the other
    way round than the paper says. It makes no difference which one is zero: that one gets a gradient at once,
    the other one from the second step on."""
    words = 16
    model = small_lm(words, width)
    data.trained(data.setup(model, data.grammar(words), data.token_loss, 3e-3), 80)
    data.frozen(model)
    model.embed_tokens = LoRAEmbedding(model.embed_tokens, 8)
    model.lm_head = LoRALinear(model.lm_head, 8)
    other = torch.randperm(words, generator=data.seeded(31))

    def domain(g: Generator) -> tuple[Tensor, Tensor]:
        ids = data.choice(g, words, 16, 1)
        for _ in range(12):
            sure = data.uniform(g, 16, 1) < 0.9
            ids = torch.cat([ids, torch.where(sure, other[ids[:, -1:]], data.choice(g, words, 16, 1))], 1)
        return ids[:, :-1], ids[:, 1:]

    return data.setup(model, domain, data.token_loss, 1e-2)


class GatedCrossAttention(nn.Module):
    """Attention of text to picture features, let in through a gate that starts shut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 4, batch_first=True)
        self.alpha_cross_attn = nn.Parameter(torch.zeros(1))
        self.mlp = FeedForward(width, 2 * width)
        self.alpha_dense = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, picture: Tensor) -> Tensor:
        seen = self.attn(self.norm(x), picture, picture, need_weights=False)[0]
        x = x + torch.tanh(self.alpha_cross_attn) * seen
        return x + torch.tanh(self.alpha_dense) * self.mlp(self.norm(x))


class VisionLanguage(nn.Module):
    """A frozen language model with a gated cross-attention block before each of its layers."""

    def __init__(self, language: CausalLM, width: int, patch: int) -> None:
        super().__init__()
        self.language = data.frozen(language)
        self.perceiver = nn.Linear(patch, width)
        self.cross = nn.ModuleList(GatedCrossAttention(width) for _ in language.layers)

    def forward(self, ids: Tensor, patches: Tensor) -> Tensor:
        picture = self.perceiver(patches)
        x = self.language.embed_tokens(ids)
        for cross, layer in zip(self.cross, self.language.layers, strict=True):
            x = layer(cross(x, picture))
        return self.language.lm_head(self.language.norm(x))


@healthy(
    "contact7b-vlm-shutgate",
    zero_at_first("cross.0.attn", "cross.1.attn", "cross.0.mlp", "perceiver"),
    source="https://github.com/huggingface/transformers/pull/26839",
    **ONE,
)
def shutgate(width: int) -> Setup:
    """The cross-attention blocks that are put into a frozen language model start with their tanh gates at
    zero, so that nothing but the gates gets a gradient in the first step. That is meant: the gates open
    during training, and the blocks learn from then on."""
    words, ways = 12, 3
    follow = torch.stack([torch.randperm(words, generator=data.seeded(40 + i)) for i in range(ways)])
    looks = data.normal(data.seeded(44), ways, 4, 8)

    def captions(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        way, ids = data.choice(g, ways, 24), data.choice(g, words, 24, 1)
        for _ in range(8):
            ids = torch.cat([ids, follow[way, ids[:, -1]][:, None]], 1)
        return (ids[:, :-1], looks[way] + 0.3 * data.normal(g, 24, 4, 8)), ids[:, 1:]

    def texts(g: Generator) -> tuple[Tensor, Tensor]:
        (ids, _), after = captions(g)
        return ids[:, :1], after[:, :1]

    language = small_lm(words, width)
    data.trained(data.setup(language, texts, data.token_loss, 3e-3), 100)
    return data.setup(VisionLanguage(language, width, 8), captions, data.token_loss, 1e-2)


# -------------------------------------------------------------------------------------- text embeddings


class TextEncoder(nn.Module):
    """Words, one attention layer, a mean over the words, unit length."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(words, width)
        self.attention = Attention(width)
        self.norm = nn.LayerNorm(width)
        self.dense = nn.Linear(width, width)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embeddings(ids)
        x = self.norm(x + self.attention(x))
        return F.normalize(self.dense(x.mean(1)), dim=-1)


class PairEncoder(nn.Module):
    """The same encoder for both texts of a pair; `common` is a direction that all texts share."""

    def __init__(self, encoder: TextEncoder, common: float) -> None:
        super().__init__()
        self.encoder = encoder
        with torch.no_grad():
            encoder.dense.bias.copy_(common * torch.ones_like(encoder.dense.bias))

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoder(left), self.encoder(right)


def info_nce(temperature: float) -> Callable[[tuple[Tensor, Tensor], Tensor], Tensor]:
    """Return the loss that picks each text's partner among all texts of the batch."""

    def loss(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        return F.cross_entropy(output[0] @ output[1].T / temperature, target)

    return loss


def similar(own: float, others: float) -> Claim:
    """Partners' mean cosine is above one number, that of other texts above another."""

    def claim(setup: Setup) -> tuple[bool, str]:
        left, right = setup.model(*setup.make_batch())
        cosine = left @ right.T
        apart = ~torch.eye(len(cosine), dtype=torch.bool)
        partners, rest = float(cosine.diagonal().mean()), float(cosine[apart].mean())
        return partners > own and rest > others, f"cosine of partners {partners:.4f}, of others {rest:.2f}"

    return claim


def topic_pairs(words: int, number: int, length: int) -> data.Sample:
    """Pairs of texts on one topic each; each topic has four words of its own."""

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        topic = 4 * torch.randperm(words // 4, generator=g)[:number, None]
        texts = [topic + data.choice(g, 4, number, length) for _ in range(2)]
        return (texts[0], texts[1]), torch.arange(number)

    return sample


@healthy(
    "contact7b-emb-lowtemperature",
    similar(0.7, 0.7),
    source="https://github.com/microsoft/unilm/issues/1588",
    **ONE,
)
def lowtemperature(width: int) -> Setup:
    """Text embeddings trained with a temperature of 0.01 all have cosines between 0.7 and one, even for texts
    that have nothing in common. That is expected: only the order counts, and the low temperature makes small
    differences large enough."""
    model = PairEncoder(TextEncoder(120, width), 1.2)
    return data.setup(model, topic_pairs(120, 30, 10), info_nce(0.01), 1e-3)


@healthy(
    "contact7b-emb-nodropout",
    similar(0.99999, -1.0),
    source="https://github.com/princeton-nlp/SimCSE/issues/35",
    **ONE,
)
def nodropout(width: int) -> Setup:
    """Each sentence is its own positive, and without dropout both embeddings are the same, so the cosine of
    every positive pair is one whatever the encoder does. Training is still meaningful: it drives the other
    sentences apart."""
    pairs = topic_pairs(120, 24, 6)

    def sentences(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        (ids, _), target = pairs(g)
        return (ids, ids), target

    return data.setup(PairEncoder(TextEncoder(120, width), 1.0), sentences, info_nce(0.05), 2e-3)
