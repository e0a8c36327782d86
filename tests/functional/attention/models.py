"""Models with attention written in every way that is seen, all computing the same; and Hugging Face's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.functional import attention
from gradflow.records import FlowRecord

WAYS = ("sdpa", "mask", "module", "einsum", "ellipsis", "in place", "right", "merged", "merged late")


class Attention(nn.Module):
    """Causal self-attention of two heads, as a handwritten GPT has it, in one of several spellings."""

    def __init__(self, way: str = "module", width: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.way, self.dropout = way, dropout
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.softmax, self.drop = nn.Softmax(-1), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = (t.view(batch, time, 2, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mask = torch.ones(time, time, dtype=torch.bool).tril()
        scale = 1 / math.sqrt(q.shape[-1])
        way = self.way
        if way == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout, is_causal=True)
        elif way == "mask":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        elif way == "module":
            p = self.softmax((q @ k.transpose(-2, -1) * scale).masked_fill(~mask, -math.inf))
            y = self.drop(p.to(torch.float64)).to(x.dtype) @ v
        elif way == "einsum":
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            s = torch.einsum("bqhd,bkhd->bqhk", q, k) * scale
            p = s.masked_fill(~mask[:, None], -1e9).softmax(-1)
            y = torch.einsum("bqhk,bkhd->bqhd", p, v).transpose(1, 2)
        elif way == "ellipsis":
            p = (torch.einsum("...id,...jd->...ij", q, k) * scale).masked_fill(~mask, -1e9).softmax(-1)
            y = torch.einsum("...ij, ...jd -> ...id", p, v)
        elif way == "in place":
            s = q @ k.mT
            s *= scale
            s.masked_fill_(~mask, torch.finfo(s.dtype).min)
            y = torch.matmul(F.softmax(s, dim=-1), v)
        elif way == "right":
            p = torch.softmax((q @ k.mT * scale).masked_fill(~mask, -math.inf), -1)
            y = (v.mT @ p.permute(0, 1, 3, 2)).mT
        elif way == "merged":
            q, k, v = (t.reshape(batch * 2, time, -1) for t in (q, k, v))
            added = torch.zeros(batch * 2, time, time).masked_fill(~mask, -1e9)
            p = torch.baddbmm(added.to(q.dtype), q, k.transpose(1, 2), alpha=scale).softmax(-1)
            y = torch.bmm(F.dropout(p, self.dropout, self.training), v).view(batch, 2, time, -1)
        else:
            p = ((q @ k.mT) * scale).masked_fill(~mask, -1e9).softmax(-1)
            y = torch.bmm(p.view(-1, time, time), v.reshape(batch * 2, time, -1)).view(batch, 2, time, -1)
        return self.out(y.transpose(1, 2).reshape(batch, time, width))


class Block(nn.Module):
    """A block of a handwritten GPT."""

    def __init__(self, way: str, width: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(way, width, dropout)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class GPT(nn.Module):
    """A language model of two blocks."""

    def __init__(self, way: str = "sdpa", width: int = 8, dropout: float = 0.0, blocks: int = 2) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(11, width), nn.Embedding(16, width)
        self.h = nn.ModuleList(Block(way, width, dropout) for _ in range(blocks))
        self.ln_f, self.head = nn.LayerNorm(width), nn.Linear(width, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.h:
            x = block(x)
        return self.head(self.ln_f(x))


def gpt(way: str = "sdpa", dropout: float = 0.0, *, sharper: float = 3.0, **fields: Any) -> GPT:
    """Return the model, the same for every way, with attention that is not all but uniform."""
    torch.manual_seed(0)
    model = GPT(way, dropout=dropout, **fields)
    with torch.no_grad():
        for block in model.h:
            block.attn.qkv.weight.mul_(sharper)
    return model


def tokens(batch: int = 3, time: int = 6) -> Tensor:
    """Return a batch of tokens, always the same one."""
    return torch.randint(0, 11, (batch, time), generator=torch.Generator().manual_seed(1))


def token_loss(scores: Tensor) -> Tensor:
    """Return the cross entropy against the next number of each token."""
    return F.cross_entropy(scores.flatten(0, 1), (scores.detach().argmax(-1).flatten() + 1) % 11)


HUGGING_FACE = ("gpt2", "bert", "llama", "t5", "vit", "mixtral")


def hugging_face(name: str, attention: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a model of `transformers` from a small configuration, at its own initialisation, and a batch."""
    import transformers as hf  # type: ignore[import-not-found]

    common: dict[str, Any] = {"attn_implementation": attention}
    words: dict[str, Any] = {
        **common,
        "vocab_size": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    sizes: dict[str, Any] = {
        "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64,
    }  # fmt: skip
    models: dict[str, Callable[[], nn.Module]] = {
        "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**words, n_embd=32, n_head=4, n_layer=2)),
        "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**words, **sizes)),
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**words, **sizes, num_key_value_heads=2)),
        "t5": lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(**words, d_model=32, d_kv=8, num_heads=4, num_layers=2, d_ff=64,
                        decoder_start_token_id=0)
        ),
        "vit": lambda: hf.ViTForImageClassification(
            hf.ViTConfig(**common, **sizes, image_size=16, patch_size=4, num_labels=3)
        ),
        "mixtral": lambda: hf.MixtralForCausalLM(
            hf.MixtralConfig(**words, **sizes, num_key_value_heads=2, num_local_experts=4)
        ),
    }  # fmt: skip
    torch.manual_seed(0)
    model = models[name]()
    g = torch.Generator().manual_seed(1)
    if name == "vit":
        return model, {"pixel_values": torch.randn(3, 3, 16, 16, generator=g), "labels": torch.arange(3)}
    ids = torch.randint(3, 64, (3, 7), generator=g)
    mask = torch.ones_like(ids)
    if name in ("bert", "t5"):
        mask[1, 5:] = mask[2, 3:] = 0
    return model, {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}


def measured(model: nn.Module, batch: Any, loss: Any = token_loss, **options: Any) -> FlowRecord:
    return gf.analyze(model, [batch], loss, measurements=[attention()], **options)
