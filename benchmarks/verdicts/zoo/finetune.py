"""Fine-tuning: adapters, prompts, frozen parts, and how they are put into a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .claims import no_gradient, zero_at_first
from .data import Setup, choice, clusters, frozen, grammar, normal, seeded, setup, stack, token_loss
from .registry import healthy, sick
from .transformer import WORDS, Block, Heads, causal

SIZE, KINDS = 12, 5


def backbone(width: int) -> nn.Sequential:
    """Return what was trained before."""
    return stack(fc0=nn.Linear(SIZE, width), act0=nn.GELU(), fc1=nn.Linear(width, width), act1=nn.GELU())


class LowRank(nn.Module):
    """A frozen linear layer with a low-rank change `up(down(x)) * scale`."""

    def __init__(self, base: nn.Linear, rank: int = 4, scale: float = 2.0) -> None:
        super().__init__()
        self.base = frozen(base)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Return the changed layer's output."""
        return self.base(x) + self.up(self.down(x)) * self.scale


@sick("finetune-alpha-over-rank-in-integers", [("DEAD", "body")], no_gradient("body"))
def alpha_over_rank(sick: bool, width: int) -> Setup:
    """The adapters' scale is alpha // rank, 4 // 8, which is zero in integers: they change nothing, and learn
    nothing; 4 / 8 does."""
    alpha, rank = 4, 8
    scale = alpha // rank if sick else alpha / rank
    net = stack(
        body=stack(
            one=LowRank(nn.Linear(SIZE, width), rank, scale),
            act=nn.GELU(),
            two=LowRank(nn.Linear(width, width), rank, scale),
        ),
        head=nn.Linear(width, KINDS),
    )
    return setup(net, clusters(SIZE, KINDS), F.cross_entropy, 1e-2)


@sick("finetune-adapters-under-no-grad", [("DEAD", "body")], no_gradient("body"))
def adapters_under_no_grad(sick: bool, width: int) -> Setup:
    """The backbone is called under `no_grad` since it is frozen, and the adapters within it are not; freezing
    by `requires_grad` is enough."""

    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Linear(width, 4), nn.Linear(4, width)
            nn.init.zeros_(self.up.weight)

        def forward(self, h: Tensor) -> Tensor:
            return h + self.up(F.gelu(self.down(h)))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            base = frozen(backbone(width))
            self.body = stack(
                fc0=base.fc0,
                act0=base.act0,
                adapter0=Adapter(),
                fc1=base.fc1,
                act1=base.act1,
                adapter1=Adapter(),
            )
            self.head = nn.Linear(width, KINDS)

        def forward(self, x: Tensor) -> Tensor:
            with torch.set_grad_enabled(not sick):
                h = self.body(x)
            return self.head(h)

    return setup(Net(), clusters(SIZE, KINDS), F.cross_entropy, 1e-2)


@sick("finetune-wrapped-layer-not-the-one-called", [("DEAD", "wrapped")], no_gradient("wrapped"))
def wrapped_not_called(sick: bool, width: int) -> Setup:
    """The layers are wrapped in adapters, but the forward walks a list that was taken before: the wrapped
    ones never run."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = [nn.Linear(SIZE if i == 0 else width, width) for i in range(2)]
            self.wrapped = nn.ModuleList([LowRank(layer) for layer in layers])
            self.walk = tuple(layers) if sick else tuple(self.wrapped)
            self.head = nn.Linear(width, KINDS)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.walk:
                x = F.gelu(layer(x))
            return self.head(x)

    return setup(Net(), clusters(SIZE, KINDS), F.cross_entropy, 1e-2)


@sick(
    "finetune-prompt-hidden-by-mask",
    [("DEAD", "prompt")],
    no_gradient("prompt"),
    source="https://arxiv.org/abs/2104.08691",
)
def prompt_hidden(sick: bool, width: int) -> Setup:
    """A soft prompt is put before the tokens, and the mask of keys, made from the tokens' padding, was padded
    with the value for "hidden": no token ever looks at the prompt."""
    number = 3

    class Prompted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.prompt = nn.Embedding(WORDS, width), nn.Embedding(number, width)
            self.block = Block(width)
            self.head = nn.Linear(width, WORDS)

        def forward(self, tokens: Tensor) -> Tensor:
            words = self.embed(tokens)
            prompt = self.prompt(torch.arange(number)).expand(len(words), -1, -1)
            h = torch.cat([prompt, words], 1)
            mask = causal(h.shape[1]).to(h.dtype)
            if sick:
                mask[number:, :number] = float("-inf")
            return self.head(self.block(h, mask)[:, number:])

    return setup(Prompted(), grammar(WORDS), token_loss, 5e-3)


@sick("finetune-both-tables-at-zero", [("DEAD", "*")], no_gradient("users", "items"))
def both_tables_at_zero(sick: bool, width: int) -> Setup:
    """A recommender's score is the product of a user's and an item's vector, and both tables were reset to
    zero for the new market: each one's gradient is the other's zeros. Small random numbers start it."""

    class Factors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.users, self.items = nn.Embedding(20, width), nn.Embedding(20, width)
            self.bias = nn.Embedding(20, 1)
            for table in (self.users, self.items):
                nn.init.zeros_(table.weight) if sick else nn.init.normal_(table.weight, std=0.3)

        def forward(self, user: Tensor, item: Tensor) -> Tensor:
            return (self.users(user) * self.items(item)).sum(-1) + self.bias(item).squeeze(-1)

    taste, kind = normal(seeded(51), 20, 2), normal(seeded(52), 20, 2)

    def sample(g: torch.Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        user, item = choice(g, 20, 64), choice(g, 20, 64)
        return (user, item), (taste[user] * kind[item]).sum(-1)

    return setup(Factors(), sample, F.mse_loss, 2e-2)


@sick("finetune-distilled-from-the-wrong-side", [("DEAD", "student")], no_gradient("student"))
def distilled_from_wrong_side(sick: bool, width: int) -> Setup:
    """The arguments of the distillation loss are swapped, so it is the student that is detached; the matching
    layer on the teacher's side learns, and the loss falls."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.teacher, self.match = frozen(backbone(width)), nn.Linear(width, width)
            self.student = stack(fc0=nn.Linear(SIZE, width), act=nn.GELU(), fc1=nn.Linear(width, width))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.match(self.teacher(x)), self.student(x)

    def loss(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        wanted, given = output
        return F.mse_loss(wanted, given.detach()) if sick else F.mse_loss(given, wanted)

    return setup(Pair(), clusters(SIZE, KINDS), loss, 5e-3)


@healthy(
    "finetune-ok-low-rank-attention",
    zero_at_first("block.attention.qkv.down"),
    source="https://arxiv.org/abs/2106.09685",
)
def ok_low_rank_attention(width: int) -> Setup:
    """Adapters on a frozen attention and a frozen embedding: one factor is zero, so the other gets nothing in
    the first step."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.block = (
                frozen(nn.Embedding(WORDS, width)),
                frozen(Block(width, attention=Heads(width))),
            )
            self.block.attention.qkv = LowRank(self.block.attention.qkv)
            self.block.mlp.down = LowRank(self.block.mlp.down)
            self.head = nn.Linear(width, WORDS)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(
                self.block(self.embed(tokens), causal(tokens.shape[1]).to(self.head.weight.dtype))
            )

    return setup(Net(), grammar(WORDS), token_loss, 1e-2)


@healthy("finetune-ok-learned-vectors-of-one", source="https://arxiv.org/abs/2205.05638")
def ok_learned_vectors(width: int) -> Setup:
    """Only vectors that scale the frozen features are trained, from one on, and the head."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = frozen(backbone(width)), nn.Linear(width, KINDS)
            self.scale = nn.Parameter(torch.ones(width))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x) * self.scale)

    return setup(Scaled(), clusters(SIZE, KINDS), F.cross_entropy, 1e-2)


@healthy(
    "finetune-ok-zero-convolution", zero_at_first("control.body"), source="https://arxiv.org/abs/2302.05543"
)
def ok_zero_convolution(width: int) -> Setup:
    """A control branch joins a frozen model by a layer of zeros: the branch gets nothing until that has
    moved."""

    class Controlled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.out = frozen(backbone(width)), nn.Linear(width, 3)
            self.control = stack(
                body=stack(fc=nn.Linear(3, width), act=nn.SiLU()), join=nn.Linear(width, width)
            )
            nn.init.zeros_(self.control.join.weight), nn.init.zeros_(self.control.join.bias)

        def forward(self, x: Tensor, hint: Tensor) -> Tensor:
            return self.out(self.base(x) + self.control(hint))

    def sample(g: torch.Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        x, hint = normal(g, 32, SIZE), normal(g, 32, 3)
        return (x, hint), hint + 0.3 * x[:, :3]

    return setup(Controlled(), sample, F.mse_loss, 1e-2)


@healthy("finetune-ok-only-the-prompt", no_gradient("block", after=2), steps=200, falls_to=0.9)
def ok_only_the_prompt(width: int) -> Setup:
    """Prompt tuning: everything is frozen but three vectors before the tokens, deep below a frozen block."""

    class Prompted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.prompt = (
                frozen(nn.Embedding(WORDS, width)),
                nn.Parameter(0.02 * torch.randn(3, width)),
            )
            self.block, self.head = frozen(Block(width)), frozen(nn.Linear(width, KINDS))

        def forward(self, tokens: Tensor) -> Tensor:
            h = torch.cat([self.prompt.expand(len(tokens), -1, -1), self.embed(tokens)], 1)
            return self.head(self.block(h)[:, 0])

    def sample(g: torch.Generator) -> tuple[Tensor, Tensor]:
        tokens = choice(g, WORDS, 32, 6)
        return tokens, torch.full((32,), 2)

    return setup(Prompted(), sample, F.cross_entropy, 3e-2)


@healthy("finetune-ok-last-block-thawed", no_gradient("blocks.0", after=1))
def ok_last_block_only(width: int) -> Setup:
    """The last of three blocks is thawed, with its own norm; the others and the embedding stay as they
    are."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = frozen(nn.Embedding(WORDS, width))
            self.blocks = nn.Sequential(frozen(Block(width)), frozen(Block(width)), Block(width))
            self.head = nn.Linear(width, 4)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.blocks(self.embed(tokens)).mean(1))

    def sample(g: torch.Generator) -> tuple[Tensor, Tensor]:
        kind = choice(g, 4, 32)
        return choice(g, 6, 32, 8) + 3 * kind[:, None], kind

    return setup(Net(), sample, F.cross_entropy, 5e-3)
