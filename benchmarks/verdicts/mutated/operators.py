"""What is broken in a small transformer: operators after the kinds of fault that research on mutation testing
of neural networks and of transformers describes, each at all blocks or at one of them.

An operator changes a model in place, before it is trained. `expect` holds the pairs (issue type, layer
prefix) of which a right report has at least one; types are the nearest of the seven.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .models import HEADS, WIDTH, Attention, Block, FusedAttention, Transformer

ONE, ALL = 2, None  # which block is broken
Break = Callable[[Transformer], None]


@dataclass(frozen=True)
class Operator:
    """A way to break a model."""

    name: str
    kinds: tuple[str, ...]
    expect: tuple[tuple[str, str], ...]
    apply: Break


OPERATORS: list[Operator] = []


def operator(name: str, kinds: str, *expect: str) -> Callable[[Break], Break]:
    """Register an operator; `expect` holds texts such as `DEAD blocks.2`."""

    def register(apply: Break) -> Break:
        pairs = tuple((e.split()[0], e.split()[1]) for e in expect)
        OPERATORS.append(Operator(name, tuple(kinds.split()), pairs, apply))
        return apply

    return register


def blocks(model: Transformer, which: int | None) -> list[Block]:
    """Return the blocks that are broken."""
    found = [b for b in model.blocks if isinstance(b, Block)]
    return found if which is ALL else [found[which]]


def projection(attn: nn.Module, part: str) -> Tensor:
    """Return the weights that make queries, keys or values, or of the output; of a fused one its rows."""
    if part == "out" or not isinstance(attn, FusedAttention):
        return getattr(attn, part).weight
    return attn.qkv.weight[WIDTH * "qkv".index(part) : WIDTH * ("qkv".index(part) + 1)]


def prefix(which: int | None) -> str:
    """Return the prefix of the layers that are broken."""
    return "blocks" if which is ALL else f"blocks.{which}"


ANY = "gpt bert llama"
WHICH = [("all", ALL), ("one", ONE)]

for place, which in WHICH:
    where = prefix(which)
    for part in ("q", "k", "v", "out"):

        @operator(f"zeroed-held-{part}-{place}", "llama", f"DEAD {where}")
        def zeroed(model: Transformer, part: str = part, which: int | None = which) -> None:
            """A projection is zero, and is not trained."""
            for each in blocks(model, which):
                nn.init.zeros_(getattr(each.attn, part).weight).requires_grad_(False)

    @operator(f"zeroed-values-and-output-{place}", "gpt llama", f"DEAD {where}")
    def zeroed_pair(model: Transformer, which: int | None = which) -> None:
        """Values and the output projection both start at zero, so neither ever gets a gradient."""
        with torch.no_grad():
            for each in blocks(model, which):
                projection(each.attn, "v").zero_()
                projection(each.attn, "out").zero_()

    @operator(f"frozen-branch-{place}", "gpt llama", f"DEAD {where}")
    def frozen_branch(model: Transformer, which: int | None = which) -> None:
        """The second branch stays as it was drawn."""
        for each in blocks(model, which):
            each.mlp.requires_grad_(False)

    @operator(f"frozen-attention-{place}", "gpt llama", f"DEAD {where}")
    def frozen_attention(model: Transformer, which: int | None = which) -> None:
        """Attention stays as it was drawn."""
        for each in blocks(model, which):
            each.attn.requires_grad_(False)

    for factor, kind in ((0.05, "VANISHING"), (5.0, "EXPLODING")):

        @operator(f"norm-gain-{factor:g}-{place}", "gpt bert", f"{kind} {where}", f"VANISHING {where}")
        def norm_gain(model: Transformer, factor: float = factor, which: int | None = which) -> None:
            """The gain of a norm layer is off."""
            for each in blocks(model, which):
                nn.init.constant_(each.norm1.weight, factor)

    @operator(f"norm-gain-held-at-zero-{place}", "gpt llama", f"DEAD {where}", f"VANISHING {where}")
    def norm_held(model: Transformer, which: int | None = which) -> None:
        """The gain of a norm layer is next to nothing, and is not trained."""
        for each in blocks(model, which):
            nn.init.constant_(each.norm2.weight, 1e-3).requires_grad_(False)

    @operator(f"norm-bias-10-{place}", "gpt bert", f"BOTTLENECK {where}", f"SATURATION {where}")
    def norm_bias(model: Transformer, which: int | None = which) -> None:
        """The bias of a norm layer dwarfs what it normalises, so all rows are alike."""
        for each in blocks(model, which):
            nn.init.constant_(each.norm1.bias, 10.0)

    for epsilon in (1.0, 1e3):

        @operator(f"norm-epsilon-{epsilon:g}-{place}", "gpt llama", f"VANISHING {where}")
        def norm_epsilon(model: Transformer, epsilon: float = epsilon, which: int | None = which) -> None:
            """What a norm layer adds to the variance is more than the variance."""
            for each in blocks(model, which):
                each.norm1.eps = each.norm2.eps = epsilon

    @operator(f"norm-missing-{place}", ANY, f"EXPLODING {where}", f"UNSTABLE {where}", f"BOTTLENECK {where}")
    def norm_missing(model: Transformer, which: int | None = which) -> None:
        """Norm layers are left out."""
        for each in blocks(model, which):
            each.norm1, each.norm2 = nn.Identity(), nn.Identity()

    @operator(f"tied-heads-{place}", "gpt llama", f"BOTTLENECK {where}")
    def tied_heads(model: Transformer, which: int | None = which) -> None:
        """All heads start as copies of the first one, and what becomes of them too, so they stay copies."""
        size = WIDTH // HEADS
        with torch.no_grad():
            for each in blocks(model, which):
                for part in "qkv":
                    weight = projection(each.attn, part)
                    weight.copy_(weight[:size].repeat(HEADS, 1))
                out = projection(each.attn, "out")
                out.copy_(out[:, :size].repeat(1, HEADS))

    @operator(f"constant-attention-{place}", "gpt bert", f"BOTTLENECK {where}")
    def constant_attention(model: Transformer, which: int | None = which) -> None:
        """All weights of attention start at one value."""
        for each in blocks(model, which):
            for parameter in each.attn.parameters():
                nn.init.constant_(parameter, 0.05)

    @operator(f"constant-branch-{place}", "gpt llama", f"BOTTLENECK {where}")
    def constant_branch(model: Transformer, which: int | None = which) -> None:
        """All weights of the second branch start at one value."""
        for each in blocks(model, which):
            for parameter in each.mlp.parameters():
                nn.init.constant_(parameter, 0.05)

    @operator(f"mask-causal-missing-{place}", "gpt llama", f"BOTTLENECK {where}")
    def not_causal(model: Transformer, which: int | None = which) -> None:
        """Positions see what comes after them, which is what they are asked for."""
        for each in blocks(model, which):
            each.attn.causal = False

    @operator(f"mask-padding-missing-{place}", "bert", f"BOTTLENECK {where}")
    def not_padded(model: Transformer, which: int | None = which) -> None:
        """Padding is attended to like words."""
        for each in blocks(model, which):
            each.attn.padded = False

    @operator(f"mask-causal-where-none-belongs-{place}", "bert", f"BOTTLENECK {where}")
    def needlessly_causal(model: Transformer, which: int | None = which) -> None:
        """The first position, which is read out, sees itself alone."""
        for each in blocks(model, which):
            each.attn.causal = True

    @operator(f"unscaled-{place}", "gpt llama", f"SATURATION {where}")
    def unscaled(model: Transformer, which: int | None = which) -> None:
        """Scores are not divided by the root of the size of a head, and weights are usual for that."""
        for each in blocks(model, which):
            if isinstance(each.attn, Attention):
                each.attn.scaled = False

    for skip in (0.0, 0.1):

        @operator(f"residual-{skip:g}-{place}", "gpt bert", f"VANISHING {where}", f"BOTTLENECK {where}")
        def residual_off(model: Transformer, skip: float = skip, which: int | None = which) -> None:
            """What goes past the branches is lost, or next to lost."""
            for each in blocks(model, which):
                each.skip = skip

    for share, kind in ((0.02, "VANISHING"), (20.0, "EXPLODING")):

        @operator(f"branches-{share:g}-{place}", "gpt llama", f"{kind} {where}")
        def branches_off(model: Transformer, share: float = share, which: int | None = which) -> None:
            """What the branches add is scaled."""
            for each in blocks(model, which):
                each.share = share

    @operator(f"dropout-in-eval-{place}", ANY, f"UNSTABLE {where}")
    def in_eval(model: Transformer, which: int | None = which) -> None:
        """Dropout is called as a function, and stays on when the model is used."""
        for each in blocks(model, which):
            each.always = 0.5

    @operator(f"dropout-0.9-{place}", "gpt llama", f"UNSTABLE {where}", f"VANISHING {where}")
    def heavy_dropout(model: Transformer, which: int | None = which) -> None:
        """Nine of ten are dropped."""
        for each in blocks(model, which):
            each.drop.p = 0.9

    for factor, kind in ((20.0, "EXPLODING"),):
        for part in ("q", "v", "out"):

            @operator(
                f"scale-{factor:g}-{part}-{place}", "gpt llama", f"{kind} {where}", f"SATURATION {where}"
            )
            def scaled(
                model: Transformer, part: str = part, factor: float = factor, which: int | None = which
            ) -> None:
                """A projection of attention starts off scale."""
                with torch.no_grad():
                    for each in blocks(model, which):
                        projection(each.attn, part).mul_(factor)

        @operator(f"scale-{factor:g}-down-{place}", "gpt llama", f"{kind} {where}")
        def scaled_down(model: Transformer, factor: float = factor, which: int | None = which) -> None:
            """The last projection of the second branch starts off scale."""
            with torch.no_grad():
                for each in blocks(model, which):
                    each.mlp.down.weight.mul_(factor)


@operator("positions-missing", "gpt bert", "DEAD position", "BOTTLENECK blocks")
def positions_missing(model: Transformer) -> None:
    """Positions are not told."""
    model.positioned = False


@operator("embedding-zeroed", ANY, "DEAD embed", "BOTTLENECK embed")
def zeroed_embedding(model: Transformer) -> None:
    """All words start at zero."""
    nn.init.zeros_(model.embed.weight)


@operator("embedding-zeroed-held", ANY, "DEAD embed", "BOTTLENECK embed")
def zeroed_embedding_held(model: Transformer) -> None:
    """All words stay at zero."""
    nn.init.zeros_(model.embed.weight).requires_grad_(False)


@operator("embedding-copied", ANY, "BOTTLENECK embed")
def copied_embedding(model: Transformer) -> None:
    """All words start as one, and at a scale at which that lasts."""
    with torch.no_grad():
        model.embed.weight.copy_(model.embed.weight[:1].expand_as(model.embed.weight) * 50)


@operator("embedding-large", ANY, "EXPLODING embed", "SATURATION *")
def large_embedding(model: Transformer) -> None:
    """Words start fifty times as large as is usual."""
    with torch.no_grad():
        model.embed.weight.mul_(500.0)


@operator("head-zeroed-held", ANY, "DEAD head")
def zeroed_head(model: Transformer) -> None:
    """The head is zero and is not trained."""
    nn.init.zeros_(model.head.weight).requires_grad_(False)
