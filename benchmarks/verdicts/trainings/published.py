"""Trainings of published models of the transformers library, built new and small from their configs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor, nn

from .data import choice, mean_loss, passages, scheduled, text, token_loss, training, uniform
from .registry import Training, healthy


class Logits(nn.Module):
    """A published model, of whose output only the logits are wanted."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits."""
        return self.model(tokens).logits


def published(name: str, **options: Any) -> nn.Module:
    """Return a model of the transformers library, new, from its config."""
    import transformers

    kind, config = (getattr(transformers, f"{name}{part}") for part in options.pop("parts"))
    return kind(config(**options))


@healthy("attention-published-gpt2", 250, at_most=2.5)
def gpt2() -> Training:
    """GPT-2 of the transformers library, new and small, on letters, whose loss is its own."""
    model = published(
        "GPT2", parts=("LMHeadModel", "Config"), vocab_size=text()[1], n_positions=32, n_embd=48, n_layer=2,
        n_head=4, bos_token_id=0, eos_token_id=0, loss_type="ForCausalLM",
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    sample = passages(24, 16)

    def both(g: Generator) -> tuple[dict[str, Tensor], Tensor]:
        tokens, target = sample(g)
        return {"input_ids": tokens, "labels": tokens}, target

    def loss(output: Any, target: Tensor) -> Tensor:
        return output.loss

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    return training(model, both, loss, optimizer, mean_loss(both, loss), clip=1.0)


@healthy("attention-published-llama", 200, at_most=2.6)
def llama() -> Training:
    """Llama of the transformers library: rotary places, gated units, root mean square norms."""
    model = Logits(
        published(
            "Llama",
            parts=("ForCausalLM", "Config"),
            vocab_size=text()[1],
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    sample = passages(24, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95))
    return training(model, sample, token_loss, optimizer, mean_loss(sample, token_loss), clip=1.0)


@healthy("attention-published-bert-masked", 300, at_most=1.0)
def bert() -> Training:
    """BERT of the transformers library fills in masked tokens, each of which follows from the last."""
    words = 12
    model = Logits(
        published(
            "Bert",
            parts=("ForMaskedLM", "Config"),
            vocab_size=words + 1,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=16,
            hidden_dropout_prob=0.05,
            initializer_range=0.08,
            attention_probs_dropout_prob=0.0,
        )
    )

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        tokens = 1 + (choice(g, words, 32, 1) + 5 * torch.arange(12)) % words
        masked = uniform(g, 32, 12) < 0.2
        return tokens.masked_fill(masked, 0), tokens.masked_fill(~masked, -100)

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    after = scheduled(optimizer, lambda step: min(1.0, (step + 1) / 50))
    return training(model, sample, token_loss, optimizer, mean_loss(sample, token_loss), after=after)
