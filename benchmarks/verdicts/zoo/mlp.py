"""Plain feed-forward networks: wiring, initialisation, depth and scale."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .claims import (
    every,
    fading,
    growing,
    no_gradient,
    rises,
    silent,
    strong,
)
from .data import Setup, clusters, setup, sgd, stack, surface, trained, two_sides
from .registry import sick


def tower(
    sizes: list[int],
    act: Callable[[], nn.Module],
    init: Callable[[Tensor], object] | None = None,
) -> nn.Sequential:
    """Return linear layers `fc0`, `fc1`, ... with an activation after each."""
    net = nn.Sequential()
    for i, (a, b) in enumerate(itertools.pairwise(sizes)):
        linear = nn.Linear(a, b)
        if init is not None:
            init(linear.weight)
        net.add_module(f"fc{i}", linear)
        net.add_module(f"act{i}", act())
    return net


def he(weight: Tensor) -> None:
    """Fill with He's initialisation."""
    nn.init.kaiming_normal_(weight, nonlinearity="relu")


# --------------------------------------------------------------------------------------------- DEAD


@sick(
    "mlp-deep-branch-never-called",
    [("DEAD", "deep")],
    no_gradient("deep"),
    source="https://arxiv.org/abs/1606.07792",
)
def branch_never_called(sick: bool, width: int) -> Setup:
    """A wide-and-deep model whose forward returns the wide part's scores only; the sum of both is meant."""

    class WideAndDeep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Linear(12, 4)
            self.deep = nn.Sequential(nn.Linear(12, width), nn.ReLU(), nn.Linear(width, 4))

        def forward(self, x: Tensor) -> Tensor:
            scores = self.wide(x)
            return scores if sick else scores + self.deep(x)

    return setup(WideAndDeep(), clusters(12, 4), F.cross_entropy, 1e-2)


@sick("mlp-data-attribute-between-parts", [("DEAD", "extractor")], no_gradient("extractor"))
def data_attribute(sick: bool, width: int) -> Setup:
    """`.data` of the features is passed on, to save memory: the extractor stays as it was initialised."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.extractor = tower([12, width, width], nn.GELU)
            self.classifier = nn.Linear(width, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.extractor(x)
            return self.classifier(h.data if sick else h)

    return setup(Net(), clusters(12, 4), F.cross_entropy, 1e-2)


@sick(
    "mlp-sign-activation",
    [("DEAD", "encoder")],
    no_gradient("encoder"),
    source="https://arxiv.org/abs/1308.3432",
)
def sign_activation(sick: bool, width: int) -> Setup:
    """Binary codes by `sign`, whose derivative is zero; the straight-through estimator lets it pass."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = stack(up=nn.Linear(12, width), act=nn.Tanh(), code=nn.Linear(width, width))
            self.decoder = nn.Linear(width, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.encoder(x)
            bits = torch.sign(h)
            return self.decoder(bits if sick else h.tanh() + (bits - h.tanh()).detach())

    return setup(Net(), clusters(12, 4), F.cross_entropy, 1e-2)


@sick("mlp-no-grad-left-on", [("DEAD", "features")], no_gradient("features"))
def no_grad_left_on(sick: bool, width: int) -> Setup:
    """A `no_grad` left from the days when the features were frozen; they are in the optimizer again."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = tower([12, width, width], nn.ReLU, he)
            self.head = nn.Linear(width, 1)

        def forward(self, x: Tensor) -> Tensor:
            with torch.set_grad_enabled(not sick):
                h = self.features(x)
            return self.head(h)

    return setup(Net(), surface(12), F.mse_loss, 1e-2)


@sick(
    "mlp-rectified-output",
    [("DEAD", "out")],
    every(no_gradient("*"), silent("act", 0.99)),
    allow=["SATURATION"],
)
def rectified_output(sick: bool, width: int) -> Setup:
    """A ReLU behind the last layer of a regression on negative targets: once it is off, nothing comes
    back."""
    net = stack(
        hidden=tower([10, width], nn.ReLU, he),
        out=nn.Linear(width, 1),
        act=nn.ReLU() if sick else nn.Identity(),
    )
    return trained(setup(net, surface(10, shift=-3.0), F.mse_loss, 1e-2), 60 if sick else 0)


@sick(
    "mlp-prior-bias-in-hidden-layers",
    [("DEAD", "body")],
    silent("body.act1", 0.9),
    allow=["VANISHING", "BOTTLENECK"],
)
def prior_bias_everywhere(sick: bool, width: int) -> Setup:
    """A rare-class bias of -6, meant for the last layer, is written into all: the hidden ReLUs are off."""
    net = stack(body=tower([12, width, width], nn.ReLU, he), head=nn.Linear(width, 1))
    for module in net.modules():
        if isinstance(module, nn.Linear) and (sick or module is net.head):
            nn.init.constant_(module.bias, -6.0)
    inner = two_sides(12)

    def sample(g: torch.Generator) -> tuple[Tensor, Tensor]:
        x, y = inner(g)
        return x, y * (x[:, :1] > 1)

    return setup(net, sample, F.binary_cross_entropy_with_logits, 3e-3)


@sick("mlp-norm-over-one-feature", [("DEAD", "score")], no_gradient("score"), allow=["BOTTLENECK"])
def norm_over_one_feature(sick: bool, width: int) -> Setup:
    """A layer norm over a single feature gives its bias, whatever comes in; normalise before the score."""
    net = stack(
        hidden=tower([12, width], nn.GELU),
        norm0=nn.Identity() if sick else nn.LayerNorm(width),
        score=nn.Linear(width, 1),
        norm=nn.LayerNorm(1) if sick else nn.Identity(),
    )
    return setup(net, two_sides(12), F.binary_cross_entropy_with_logits, 1e-2)


# ---------------------------------------------------------------------------------------- VANISHING


@sick(
    "mlp-twelve-sigmoids",
    [("VANISHING", "body")],
    fading("body.fc0", "body.fc11", 1e-4),
    source="https://proceedings.mlr.press/v9/glorot10a.html",
)
def twelve_sigmoids(sick: bool, width: int) -> Setup:
    """Twelve sigmoid layers: each passes at most a quarter of the gradient; GELU at He's scale does."""
    body = tower([10] + [width] * 12, nn.Sigmoid) if sick else tower([10] + [width] * 12, nn.GELU, he)
    return setup(stack(body=body, head=nn.Linear(width, 4)), clusters(10, 4), F.cross_entropy, 1e-3)


@sick(
    "mlp-tanh-tiny-weights",
    [("VANISHING", "body")],
    fading("body.fc0", "body.fc7", 1e-5),
    allow=["BOTTLENECK"],
)
def tanh_tiny_weights(sick: bool, width: int) -> Setup:
    """Eight tanh layers with weights of size 0.02, whatever their width; Xavier's scale keeps the signal."""
    init = (lambda w: nn.init.normal_(w, std=0.02)) if sick else nn.init.xavier_normal_
    net = stack(body=tower([10] + [width] * 8, nn.Tanh, init), head=nn.Linear(width, 1))
    return setup(net, surface(10), F.mse_loss, sgd(0.05, 0.9))


@sick(
    "mlp-default-init-too-deep",
    [("VANISHING", "body")],
    fading("body.fc0", "body.fc17", 1e-4),
    source="https://github.com/pytorch/pytorch/issues/18182",
    allow=["BOTTLENECK"],
)
def default_init_too_deep(sick: bool, width: int) -> Setup:
    """Eighteen ReLU layers at the default initialisation, which loses 60 percent per layer; He's does not."""
    net = stack(body=tower([10] + [width] * 18, nn.ReLU, None if sick else he), head=nn.Linear(width, 4))
    if not sick:
        for layer in net.body:
            if isinstance(layer, nn.Linear):
                nn.init.zeros_(layer.bias)
    return setup(net, clusters(10, 4, spread=0.4), F.cross_entropy, 1e-3)


@sick(
    "mlp-epsilon-sign-forgotten",
    [("VANISHING", "mix")],
    fading("mix.0.fc", "mix.4.fc", 1e-4),
    allow=["BOTTLENECK"],
)
def epsilon_sign_forgotten(sick: bool, width: int) -> Setup:
    """`LayerNorm(width, 1e3)` for 1e-3: the norm layers divide by thirty and normalise nothing."""
    layers = [
        stack(
            fc=nn.Linear(10 if i == 0 else width, width),
            norm=nn.LayerNorm(width, 1e3 if sick else 1e-3),
            act=nn.GELU(),
        )
        for i in range(5)
    ]
    net = stack(mix=nn.Sequential(*layers), head=nn.Linear(width, 4))
    return setup(net, clusters(10, 4), F.cross_entropy, 3e-3)


# ---------------------------------------------------------------------------------------- EXPLODING


@sick(
    "mlp-gain-of-five",
    [("EXPLODING", "body")],
    growing("body.fc0", "body.fc6", 1e3),
    allow=["UNSTABLE", "SATURATION", "DEAD"],
)
def gain_of_five(sick: bool, width: int) -> Setup:
    """Xavier's initialisation with a gain of 5 in each of seven leaky layers: the gradient triples in
    each."""
    gain = 5.0 if sick else nn.init.calculate_gain("leaky_relu", 0.1)
    body = tower(
        [10] + [width] * 7, lambda: nn.LeakyReLU(0.1), lambda w: nn.init.xavier_normal_(w, gain=gain)
    )
    return setup(stack(body=body, head=nn.Linear(width, 4)), clusters(10, 4), F.cross_entropy, 1e-3)


@sick(
    "mlp-residual-without-norm",
    [("EXPLODING", "blocks")],
    growing("stem", "blocks.23.out", 100.0),
    allow=["UNSTABLE"],
    source="https://arxiv.org/abs/1901.09321",
)
def residual_without_norm(sick: bool, width: int) -> Setup:
    """24 residual blocks, no normalisation, every branch at full scale: the signal doubles in each."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.out = nn.Linear(width, width), nn.Linear(width, width)
            he(self.fc.weight), nn.init.xavier_normal_(self.out.weight)
            if not sick:
                nn.init.zeros_(self.out.weight)

        def forward(self, h: Tensor) -> Tensor:
            return h + self.out(F.relu(self.fc(h)))

    net = stack(
        stem=nn.Linear(10, width),
        blocks=nn.Sequential(*[Block() for _ in range(24)]),
        head=nn.Linear(width, 1),
    )
    return setup(net, surface(10), F.mse_loss, 1e-3)


@sick(
    "mlp-prices-as-targets",
    [("EXPLODING", "*")],
    every(rises(100.0), strong("out", 1e4)),
    allow=["UNSTABLE", "NUMERICAL", "DEAD"],
)
def prices_as_targets(sick: bool, width: int) -> Setup:
    """House prices of some hundred thousand straight into a squared error with plain descent; divide them."""
    net = stack(fc=nn.Linear(10, width), act=nn.ReLU(), out=nn.Linear(width, 1))
    scale = 1e5 if sick else 1.0
    return setup(net, surface(10, scale=scale, shift=2.5 * scale), F.mse_loss, sgd(0.02))


@sick(
    "mlp-timestamp-column",
    [("EXPLODING", "*")],
    every(rises(100.0), strong("fc", 1e4)),
    allow=["UNSTABLE", "NUMERICAL", "DEAD", "SATURATION"],
)
def timestamp_column(sick: bool, width: int) -> Setup:
    """One column is in milliseconds since 1970, the others are of unit size; standardise the columns."""
    net = stack(fc=nn.Linear(10, width), act=nn.LeakyReLU(0.1), out=nn.Linear(width, 1))
    inner = surface(10)

    def sample(g: torch.Generator) -> tuple[Tensor, Tensor]:
        x, y = inner(g)
        if sick:
            x[:, 9] = 1.7e6 + 1e5 * x[:, 9]
        return x, y

    return setup(net, sample, F.mse_loss, sgd(0.02))
