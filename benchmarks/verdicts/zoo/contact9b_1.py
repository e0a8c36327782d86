"""Labelled models from public reports: language models, vision-language models and their fine-tuning."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import Claim, alike, every, no_gradient, stuck, training
from .data import choice, grammar, normal, seeded, setup, stack, textures, token_loss, trained
from .registry import FLOAT32, Setup, healthy, sick

ONE: tuple[int, ...] = (32,)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """Return multi-head attention of (batch, tokens, width) queries, keys and values."""
    parts = [t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v)]
    return F.scaled_dot_product_attention(*parts, is_causal=causal).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Attention with separate projections, of a context if there is one."""

    def __init__(self, width: int, heads: int = 4, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return what the tokens read."""
        c = x if context is None else context
        return self.o_proj(attend(self.q_proj(x), self.k_proj(c), self.v_proj(c), self.heads, self.causal))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, causal: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attn = Attention(width, causal=causal)
        self.mlp = stack(fc1=nn.Linear(width, 2 * width), act=nn.GELU(), fc2=nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Return the next hidden states."""
        x = x + self.self_attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTower(nn.Module):
    """Patches of a picture to features; whether it is tuned decides if the graph is kept."""

    def __init__(self, width: int, tuned: bool) -> None:
        super().__init__()
        self.tuned = tuned
        self.patch_embedding = nn.Conv2d(3, width, 4, 4)
        self.position = nn.Parameter(0.1 * torch.randn(4, width))
        self.encoder = nn.Sequential(Block(width), Block(width))

    def forward(self, pictures: Tensor) -> Tensor:
        """Return one feature vector per patch."""
        with torch.set_grad_enabled(self.tuned and torch.is_grad_enabled()):
            return self.encoder(self.patch_embedding(pictures).flatten(2).transpose(1, 2) + self.position)


class LanguageModel(nn.Module):
    """A causal language model that takes embeddings."""

    def __init__(self, width: int, words: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(words, width)
        self.layers = nn.Sequential(Block(width, causal=True), Block(width, causal=True))
        self.norm, self.lm_head = nn.LayerNorm(width), nn.Linear(width, words)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Return the logits of the word after the last one."""
        return self.lm_head(self.norm(self.layers(embeddings))[:, -1])


class MultimodalModel(nn.Module):
    """A vision tower, a connector and a language model."""

    def __init__(self, width: int, tuned: bool) -> None:
        super().__init__()
        self.vision_tower = VisionTower(width, tuned)
        self.connector = stack(fc1=nn.Linear(width, width), act=nn.GELU(), fc2=nn.Linear(width, width))
        self.language_model = LanguageModel(width, 12)

    def forward(self, pictures: Tensor, prompt: Tensor) -> Tensor:
        """Return the logits of the answer's first word."""
        seen = self.connector(self.vision_tower(pictures))
        return self.language_model(torch.cat([seen, self.language_model.embed_tokens(prompt)], 1))


PICTURES = textures(4, 16)


def asked(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return pictures with a prompt, and the answers."""
    x, kind = PICTURES(g)
    return (x, torch.tensor([8, 9, 10]).expand(len(x), 3)), kind


@sick(
    "contact9b-vlm-tunetower",
    expect=[("DEAD", "vision_tower")],
    claim=no_gradient("vision_tower"),
    source="https://github.com/TinyLLaVA/TinyLLaVA_Factory/issues/17",
    widths=ONE,
    dtypes=(FLOAT32,),
)
def tune_tower(sick: bool, width: int) -> Setup:
    """The training arguments offer to tune the vision tower too, and its parameters go to the optimizer, but
    its forward pass is still wrapped in no_grad, as in the code that it comes from, where the tower is
    frozen: no gradient ever reaches it. Removing the wrapper repairs it."""
    return setup(MultimodalModel(width, tuned=not sick), asked, F.cross_entropy, 2e-3)


@healthy(
    "contact9b-vlm-projectoronly",
    looks=no_gradient("vision_tower", "language_model"),
    source="https://github.com/haotian-liu/LLaVA/issues/195",
    widths=ONE,
    dtypes=(FLOAT32,),
)
def projector_only(width: int) -> Setup:
    """In the first stage only the connector trains: vision tower and language model, nearly all there is,
    have no gradient. Somebody asked if the words' embeddings have to be tuned along; that makes no
    difference, the author says."""
    model = MultimodalModel(width, tuned=True)
    trained(setup(model, asked, F.cross_entropy, 2e-3), 40)
    model.requires_grad_(False)
    model.connector = stack(fc1=nn.Linear(width, width), act=nn.GELU(), fc2=nn.Linear(width, width))
    return setup(model, asked, F.cross_entropy, 2e-3, seed=1)


class LoRALinear(nn.Module):
    """A frozen linear layer with a low-rank adapter."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), alpha / rank
        self.lora_A = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output with the adapter's added."""
        return self.base(x) + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


class MtpBlock(nn.Module):
    """The attention block for predicting several tokens at once, which the checkpoint leaves at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.self_attn = Attention(width, causal=True)
        for parameter in self.self_attn.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Return the hidden states with what the block adds."""
        return x + self.self_attn(self.norm(x))


class Needle(nn.Module):
    """A small decoder with a stack of layers and a block for multi-token prediction."""

    def __init__(self, width: int, words: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.stack = nn.ModuleDict({"layers": nn.ModuleList(Block(width, causal=True) for _ in range(2))})
        self.mtp_block = MtpBlock(width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, words)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of every next token."""
        x = self.embedding(tokens)
        for layer in self.stack["layers"]:
            x = layer(x)
        return self.head(self.norm(self.mtp_block(x)))


def idle_trainables(after: int = 8) -> Claim:
    """Some parameters that are meant to train still get no gradient at all after some steps."""

    def claim(ready: Setup) -> tuple[bool, str]:
        *_, last = training(ready, after + 1)
        idle = [n for n, g in last.grads.items() if g is None or not bool(g.any())]
        return bool(idle), f"{len(idle)} of {len(last.grads)} trainable parameters get no gradient"

    return claim


@sick(
    "contact9b-lora-mtpblock",
    expect=[("DEAD", "mtp_block")],
    claim=idle_trainables(),
    source="https://github.com/cactus-compute/needle/pull/59",
    steps=150,
    widths=ONE,
    dtypes=(FLOAT32,),
)
def mtp_block(sick: bool, width: int) -> Setup:
    """Fine-tuning puts adapters on every attention projection whose name fits, and half of these belong to
    the block for multi-token prediction, all of whose weights are zero in the checkpoint. What goes into its
    output projection is zero, and so is what comes back, so its adapters never get a gradient. Adapting only
    projections of the stack, where the weights are, repairs it."""
    model = Needle(width)
    model.mtp_block.self_attn.requires_grad_(False)
    trained(setup(model, grammar(16, 12, 16), token_loss, 5e-3), 60)
    model.requires_grad_(False)
    homes = [layer.self_attn for layer in model.stack["layers"]]
    homes += [model.mtp_block.self_attn] if sick else []
    for home in homes:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(home, name, LoRALinear(getattr(home, name), 8, 16.0))
    follow = torch.randperm(16, generator=seeded(41))

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        tokens = choice(g, 16, 16, 1)
        for _ in range(12):
            tokens = torch.cat([tokens, follow[tokens[:, -1:]]], 1)
        return tokens[:, :-1], tokens[:, 1:]

    return setup(model, sample, token_loss, 1e-2)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a weight that starts at one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised states, computed in float32."""
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * self.weight


class DraftLayer(nn.Module):
    """A decoder layer of the draft model, with normalised queries and keys."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(width), RMSNorm(width)
        self.q_norm, self.k_norm = RMSNorm(width), RMSNorm(width)
        self.qkv_proj, self.o_proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.mlp = stack(up=nn.Linear(width, 2 * width), act=nn.SiLU(), down=nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Return the next hidden states."""
        q, k, v = self.qkv_proj(self.input_layernorm(x)).chunk(3, -1)
        x = x + self.o_proj(attend(self.q_norm(q), self.k_norm(k), v, self.heads, causal=True))
        return x + self.mlp(self.post_attention_layernorm(x))


class DraftModel(nn.Module):
    """A draft model for speculative decoding: it guesses from the large model's hidden states."""

    def __init__(self, width: int, words: int = 16, verifier: int = 48) -> None:
        super().__init__()
        self.fc = nn.Linear(verifier, width, bias=False)
        self.hidden_norm, self.norm = RMSNorm(width), RMSNorm(width)
        self.layers = nn.ModuleList(DraftLayer(width) for _ in range(2))
        self.lm_head = nn.Linear(width, words, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the logits of every next token, in float32."""
        x = self.hidden_norm(self.fc(hidden.to(self.fc.weight.dtype)))
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x)).float()


def norms_stay(steps: int = 20) -> Claim:
    """The weights of all norms get gradients, and are after some steps bit by bit what they were."""

    def claim(ready: Setup) -> tuple[bool, str]:
        norms = {n: m.weight for n, m in ready.model.named_modules() if isinstance(m, RMSNorm)}
        before = {n: w.detach().clone() for n, w in norms.items()}
        *_, last = training(ready, steps)
        pulled = sum(last.norm(n) > 0 for n in norms)
        still = sum(bool(torch.equal(w, before[n])) for n, w in norms.items())
        told = f"of {len(norms)} norms {pulled} get a gradient and {still} never moved"
        return still == len(norms) == pulled, told

    return claim


@sick(
    "contact9b-lm-draftmodel",
    expect=[("NUMERICAL", "*")],
    allow=["VANISHING"],
    claim=norms_stay(),
    source="https://github.com/vllm-project/speculators/pull/765",
    widths=ONE,
    dtypes=(FLOAT32,),
)
def draft_model(sick: bool, width: int) -> Setup:
    """Draft models that were trained wholly in bfloat16 all came out with norm weights of exactly one: near
    one the next numbers are 0.004 and 0.008 away, every step of the optimizer is smaller, and rounding takes
    it back. The linear layers, whose weights are small, do move. Parameters in float32 repair it."""
    code = normal(seeded(42), 16, 48)
    words = grammar(16, 12, 16)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        tokens, following = words(g)
        return code[tokens] + 0.5 * normal(g, 16, 12, 48), following

    model = DraftModel(width)
    if sick:
        model.to(torch.bfloat16)
    return setup(model, sample, token_loss, 1e-3)


class PerceiverLayer(nn.Module):
    """Latents read the context and themselves."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input_latents_norm, self.input_context_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attn = Attention(width)
        self.post_attention_layernorm = nn.LayerNorm(width)
        self.mlp = stack(up=nn.Linear(width, 2 * width), act=nn.SiLU(), down=nn.Linear(2 * width, width))

    def forward(self, latents: Tensor, context: Tensor) -> Tensor:
        """Return the next latents."""
        x = self.input_latents_norm(latents)
        latents = latents + self.self_attn(x, torch.cat([self.input_context_norm(context), x], 1))
        return latents + self.mlp(self.post_attention_layernorm(latents))


class PerceiverResampler(nn.Module):
    """A fixed number of latents that gather what the picture's features hold."""

    def __init__(self, width: int, number: int, equal: bool) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.ones(number, width) if equal else torch.randn(number, width))
        self.layers = nn.ModuleList(PerceiverLayer(width) for _ in range(2))
        self.norm = nn.LayerNorm(width)

    def forward(self, context: Tensor) -> Tensor:
        """Return the latents of every picture."""
        latents = self.latents.expand(len(context), -1, -1)
        for layer in self.layers:
            latents = layer(latents, context)
        return self.norm(latents)


class Connected(nn.Module):
    """A vision model, a resampler, and text that asks the latents about each part of the picture."""

    def __init__(self, width: int, equal: bool) -> None:
        super().__init__()
        self.vision_model = nn.Conv2d(3, width, 2, 2)
        self.position_embedding = nn.Parameter(torch.randn(16, width))
        self.perceiver_resampler = PerceiverResampler(width, 16, equal)
        self.text_embedding = nn.Parameter(torch.randn(16, width))
        self.text_attn = Attention(width)
        self.text_mlp = stack(fc1=nn.Linear(width, 2 * width), act=nn.GELU(), fc2=nn.Linear(2 * width, width))
        self.lm_head = nn.Linear(width, 3)

    def forward(self, pictures: Tensor) -> Tensor:
        """Return an answer for every part of the picture."""
        seen = self.vision_model(pictures).flatten(2).transpose(1, 2) + self.position_embedding
        text = self.text_embedding.expand(len(pictures), -1, -1)
        text = text + self.text_attn(text, self.perceiver_resampler(seen))
        return self.lm_head(text + self.text_mlp(text))


@sick(
    "contact9b-vlm-resampler",
    expect=[("BOTTLENECK", "perceiver_resampler")],
    claim=every(alike("perceiver_resampler", 1e-3, dim=1), stuck(0.8, steps=300)),
    source="https://github.com/huggingface/transformers/pull/31151",
    steps=300,
    widths=ONE,
    dtypes=(FLOAT32,),
)
def resampler(sick: bool, width: int) -> Setup:
    """The latents of the resampler between picture and text were all set to ones, so that training from
    scratch was unstable. They all ask the same, read the same and are changed alike, and so stay one vector
    however many there are: all that is seen must pass through it. Drawing them at random repairs it."""
    colours = 1.5 * normal(seeded(43), 3, 3)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        kind = choice(g, 3, 16, 16)
        parts = colours[kind].transpose(1, 2).unflatten(2, (4, 4))
        pictures = parts.repeat_interleave(2, 2).repeat_interleave(2, 3)
        return pictures + 0.3 * normal(g, 16, 3, 8, 8), kind

    return setup(Connected(width, equal=sick), sample, token_loss, 3e-3)
