"""Reports on custom layers, quantised weights, metric heads and physics-informed networks."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import no_gradient, not_finite
from .data import Sample, normal, setup, stack, textures
from .registry import FLOAT32, Setup, sick

# --------------------------------------------------------------------------- deep cross attention


class GRN(nn.Module):
    """Weights of the outputs of all earlier layers, by what the latest of them holds."""

    def __init__(self, width: int, layers: int, spread: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.to_aggregate = nn.Linear(width, layers, bias=False)
        nn.init.normal_(self.to_aggregate.weight, std=spread)
        base = torch.zeros(layers)
        base[-1] = 1.0
        self.register_buffer("base", base)

    def forward(self, history: list[Tensor]) -> Tensor:
        """Return the weighted sum of the outputs so far."""
        weights = F.relu(self.to_aggregate(self.norm(history[-1]))) + torch.as_tensor(self.base)
        return (torch.stack(history, -1) * weights[..., None, :]).sum(-1)


class CrossLayer(nn.Module):
    """Attention and feed-forward whose inputs are aggregates, without further skips."""

    def __init__(self, width: int, before: int, spread: float) -> None:
        super().__init__()
        self.grn_attn = GRN(width, before, spread)
        self.attn = nn.MultiheadAttention(width, 2, batch_first=True)
        self.grn_ff = GRN(width, before + 1, spread)
        self.ff = stack(
            norm=nn.LayerNorm(width),
            up=nn.Linear(width, 2 * width),
            act=nn.GELU(),
            down=nn.Linear(2 * width, width),
        )

    def forward(self, history: list[Tensor]) -> list[Tensor]:
        """Return the outputs so far with two more."""
        h = self.grn_attn(history)
        history = [*history, self.attn(h, h, h, need_weights=False)[0]]
        return [*history, self.ff(self.grn_ff(history))]


class DeepCrossAttention(nn.Module):
    """A classifier of patches whose layers read the outputs of all earlier layers."""

    def __init__(self, width: int, depth: int, spread: float) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 2, stride=2)
        self.layers = nn.ModuleList(CrossLayer(width, 1 + 2 * i, spread) for i in range(depth))
        self.final_grn = GRN(width, 1 + 2 * depth, spread)
        self.classes = stack(norm=nn.LayerNorm(width), out=nn.Linear(width, 12))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of pictures."""
        history = [self.embed(x).flatten(2).transpose(1, 2)]
        for layer in self.layers:
            history = layer(history)
        return self.classes(self.final_grn(history).mean(1))


@sick(
    "contact11b-dca-aggregate",
    [("DEAD", "layers"), ("DEAD", "final_grn")],
    no_gradient("layers.0.grn_attn", "layers.2.grn_ff", "final_grn"),
    allow=("VANISHING", "BOTTLENECK"),
    source="https://github.com/lucidrains/deep-cross-attention/issues/2",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def dca_aggregate(sick: bool, width: int) -> Setup:
    """The linear layers of the aggregation start at zero, have no bias and feed a rectifier, whose slope at
    zero is zero, so they never move and no skip forms; the repair starts them at small random values."""
    model = DeepCrossAttention(width, 8, 0.0 if sick else 0.2)
    return setup(model, textures(12), F.cross_entropy, 1e-3)


# ----------------------------------------------------------------------------- binary convolutions


class Through(torch.autograd.Function):
    """The sign, with the gradient of a clamp."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        """Return the sign."""
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:  # type: ignore[override]
        """Return the gradient where the argument is small."""
        return grad * (ctx.saved_tensors[0].abs() <= 1)  # type: ignore[attr-defined]


class ABCConv(nn.Module):
    """A convolution by several binary bases of one filter, with trainable shifts and scales."""

    def __init__(self, inputs: int, outputs: int, bases: int, through: bool) -> None:
        super().__init__()
        self.filters = nn.Parameter(0.2 * torch.randn(outputs, inputs, 3, 3))
        self.shift_parameters = nn.Parameter(torch.linspace(-1, 1, bases))
        self.alphas = nn.Parameter(torch.full((bases,), 1 / (3 * inputs * bases) ** 0.5))
        self.beta = nn.Parameter(torch.zeros(1))
        self.norm = nn.BatchNorm2d(inputs)
        self.through = through

    def sign(self, x: Tensor) -> Tensor:
        """Return the signs of a tensor."""
        return Through.apply(x) if self.through else x.sign()  # type: ignore[no-any-return,no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of the binary convolutions of the binary input."""
        signs = self.sign(self.norm(x) + self.beta)
        centred = self.filters - self.filters.mean()
        parts = zip(self.alphas, self.shift_parameters, strict=True)
        weight = sum(a * self.sign(centred + u * centred.std().detach()) for a, u in parts)
        assert isinstance(weight, Tensor)
        return F.conv2d(signs, weight, padding=1)


class ABCNet(nn.Module):
    """Two binary convolutions and two dense layers in full precision."""

    def __init__(self, width: int, through: bool) -> None:
        super().__init__()
        self.conv1, self.conv2 = ABCConv(3, width, 3, through), ABCConv(width, width, 3, through)
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, 6)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of pictures."""
        h = F.avg_pool2d(self.conv2(F.max_pool2d(self.conv1(x), 2)), 4).flatten(1)
        return self.fc2(F.relu(self.fc1(h)))


@sick(
    "contact11b-abcnet-sign",
    [("DEAD", "conv1"), ("DEAD", "conv2")],
    no_gradient("conv1", "conv2.filters", "conv2.shift_parameters", "conv2.beta"),
    source="https://github.com/layog/Accurate-Binary-Convolution-Network/issues/6",
    steps=200,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def abcnet_sign(sick: bool, width: int) -> Setup:
    """Filters, shifts and inputs go through a plain sign, whose slope is zero, so the binary layers stay
    constant and only the dense ones learn; the repair gives the sign the gradient of a clamp."""
    return setup(ABCNet(width // 8, not sick), textures(6, 32), F.cross_entropy, 5e-3)


# -------------------------------------------------------------------------------- quantised weights


class QConv(nn.Conv2d):
    """A convolution whose weights are rounded to a fixed number of fractional bits."""

    def __init__(self, inputs: int, outputs: int, size: int, bits: int) -> None:
        super().__init__(inputs, outputs, size, padding=size // 2)
        assert self.bias is not None
        nn.init.zeros_(self.bias)
        self.step = 2.0**-bits

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution with rounded weights, whose gradient passes the rounding."""
        w = self.weight
        rounded = w + (torch.round(w / self.step) * self.step - w).detach()
        return F.conv2d(x, rounded, self.bias, padding=self.padding)


class QNet(nn.Module):
    """Three quantised convolutions and a quantised classifier."""

    def __init__(self, width: int, bits: int) -> None:
        super().__init__()
        self.q1 = QConv(3, width, 3, bits)
        self.q2, self.q3 = (QConv(width, width, 3, bits) for _ in range(2))
        self.out = QConv(width, 4, 1, bits)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of pictures."""
        h = F.relu(self.q3(F.relu(self.q2(F.relu(self.q1(x))))))
        return self.out(h).mean((2, 3))


@sick(
    "contact11b-hgq-bits",
    [("DEAD", "*")],
    no_gradient("q1", "q2", "q3", "out.weight"),
    allow=("NUMERICAL",),
    source="https://github.com/calad0i/HGQ2/issues/13",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def hgq_bits(sick: bool, width: int) -> Setup:
    """With one fractional bit every initial weight rounds to zero, so signal and gradients of all kernels
    are zero although rounding passes gradients; the repair starts with more fractional bits."""
    return setup(QNet(width, 1 if sick else 6), textures(), F.cross_entropy, 3e-3)


# ------------------------------------------------------------------------------------ margin header


class Cosines(nn.Module):
    """Cosines between embeddings and the centres of classes."""

    def __init__(self, width: int, kinds: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(kinds, width))

    def forward(self, x: Tensor) -> Tensor:
        """Return the cosines."""
        return F.normalize(x) @ F.normalize(self.weight).T


class ArcMarginNet(nn.Module):
    """A backbone of faces, and a header that adds a margin to the angle of the true class."""

    def __init__(self, width: int, kinds: int, outer: bool) -> None:
        super().__init__()
        self.backbone = stack(
            conv1=nn.Conv2d(3, width, 3, stride=2, padding=1),
            bn1=nn.BatchNorm2d(width),
            relu=nn.ReLU(),
            flat=nn.Flatten(),
            fc=nn.Linear(width * 16, 4 * width),
            bn2=nn.BatchNorm1d(4 * width),
        )
        self.linear = Cosines(4 * width, kinds)
        self.outer = outer

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        """Return the scaled logits with the margin."""
        cosine = self.linear(self.backbone(x))
        theta = (
            torch.acos(cosine).clamp(-1, 1) if self.outer else torch.acos(cosine.clamp(-0.999999, 0.999999))
        )
        return 16 * torch.cos(theta + 0.3 * F.one_hot(label, cosine.shape[1]))


def labelled(sample: Sample) -> Sample:
    """The same task where the model is given the class as well."""

    def both(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        x, kind = sample(g)
        return (x, kind), kind

    return both


@sick(
    "contact11b-arcface-clamp",
    [("SATURATION", "*")],
    no_gradient("backbone", "linear"),
    allow=("DEAD",),
    source="https://github.com/jonasgrebe/pt-femb-face-embeddings/issues/3",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def arcface_clamp(sick: bool, width: int) -> Setup:
    """The angle itself is clamped to -1..1 although angles near a right one are 1.57, so every logit is a
    constant; the repair clamps the cosine before the arc cosine."""
    return setup(ArcMarginNet(width, 6, sick), labelled(textures(6, 32)), F.cross_entropy, 3e-3)


# ------------------------------------------------------------------------------------- rotations


class RelativePose(nn.Module):
    """The rotation between two views of the same points, by two columns made orthogonal."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.point = stack(
            fc1=nn.Linear(18, width), relu1=nn.ReLU(), fc2=nn.Linear(width, width), relu2=nn.ReLU()
        )
        self.rot = nn.Linear(width, 6)
        nn.init.zeros_(self.rot.weight)
        self.rot.bias.data = torch.tensor([1.0, 0, 0, 0, 1, 0])

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        """Return rotation matrices."""
        moments = torch.einsum("bni,bnj->bij", after, before) / before.shape[1]
        spread = torch.einsum("bni,bnj->bij", before, before) / before.shape[1]
        six = self.rot(self.point(torch.cat([moments, spread], -1).flatten(1)))
        a = F.normalize(six[:, :3], dim=-1)
        b = F.normalize(six[:, 3:] - (a * six[:, 3:]).sum(-1, keepdim=True) * a, dim=-1)
        return torch.stack([a, b, torch.linalg.cross(a, b)], -1)


def views(number: int = 32, points: int = 24) -> Sample:
    """Point clouds and their rotated copies, an eighth of them not rotated; the target is the rotation."""

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        before = normal(g, number, points, 3)
        axis = normal(g, number, 3) * (torch.arange(number) % 8 > 0)[:, None] * 0.8
        zero = torch.zeros(number)
        x, y, z = axis.unbind(-1)
        skew = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).view(-1, 3, 3)
        rotation = torch.matrix_exp(skew)
        return (before, before @ rotation.transpose(1, 2)), rotation

    return sample


@sick(
    "contact11b-rotation-acos",
    [("NUMERICAL", "*")],
    not_finite(4),
    allow=("EXPLODING",),
    source="https://github.com/pytorch/pytorch/issues/8069",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def rotation_acos(sick: bool, width: int) -> Setup:
    """The angle between predicted and true rotation is an arc cosine clamped to exactly -1..1, whose slope
    at one is infinite; the repair clamps a little further in."""
    edge = 1.0 if sick else 1 - 1e-6

    def loss(rotation: Tensor, target: Tensor) -> Tensor:
        trace = (rotation * target).sum((1, 2))
        return torch.acos(((trace - 1) / 2).clamp(-edge, edge)).mean()

    return setup(RelativePose(width), views(), loss, 5e-3)
