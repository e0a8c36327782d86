"""Images and embeddings from public reports: segmentation, faces, sentences, detection, pruning."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from . import data
from .claims import no_gradient, not_finite, strong, training, zero_at_first
from .registry import FLOAT32, Setup, healthy, sick

# ------------------------------------------------------------------------------------ segmentation


class InstanceNorm(nn.Module):
    """Each channel of each sample less its mean, over its spread, then scaled and shifted."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        gap = x - x.mean((2, 3), keepdim=True)
        return self.weight * gap / ((gap**2).mean((2, 3), keepdim=True) + 1e-5).sqrt() + self.bias


class ImagePool(nn.Module):
    """The branch of an atrous pyramid that sees the mean of the whole picture."""

    def __init__(self, channels: int, norm: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.relu(self.norm(self.conv(x.mean((2, 3), keepdim=True))))
        return pooled.expand(-1, -1, *x.shape[2:])


class Pyramid(nn.Module):
    """Parallel branches over the same features, and their projection."""

    def __init__(self, channels: int, pool_norm: nn.Module) -> None:
        super().__init__()
        point = nn.Conv2d(channels, channels, 1, bias=False)
        self.point = nn.Sequential(point, nn.BatchNorm2d(channels), nn.ReLU())
        wide = nn.Conv2d(channels, channels, 3, padding=2, dilation=2, bias=False)
        self.atrous = nn.Sequential(wide, nn.BatchNorm2d(channels), nn.ReLU())
        self.image_pool = ImagePool(channels, pool_norm)
        self.project = nn.Sequential(
            nn.Conv2d(3 * channels, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.project(torch.cat([self.point(x), self.atrous(x), self.image_pool(x)], 1))


class DeepLab(nn.Module):
    """A small segmentation network with an atrous pyramid."""

    def __init__(self, channels: int, pool_norm: nn.Module) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        )
        self.aspp = Pyramid(channels, pool_norm)
        self.classifier = nn.Conv2d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.classifier(self.aspp(self.backbone(x)))
        return F.interpolate(scores, size=x.shape[2:], mode="bilinear", align_corners=False)


@sick(
    "contact8b-segmentation-imagepool",
    [("DEAD", "aspp.image_pool")],
    no_gradient("aspp.image_pool"),
    allow=("BOTTLENECK",),
    source="https://github.com/pytorch/pytorch/issues/19250",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def image_pool(sick: bool, width: int) -> Setup:
    """The report: instance normalisation over a single element gives zeros without any error, which keeps
    that part from learning. The pooled branch is one pixel wide, so it is silent and gets no gradient; a norm
    that has several values to work on (here over the batch) repairs it."""
    channels = width // 2
    norm = InstanceNorm(channels) if sick else nn.BatchNorm2d(channels)
    model = DeepLab(channels, norm)
    return data.setup(model, data.discs(8), F.binary_cross_entropy_with_logits, 3e-3)


# ---------------------------------------------------------------------------- faces and embeddings


class ArcMargin(nn.Module):
    """Scaled cosines to the class centres, with an angle added to that of the true class."""

    def __init__(self, size: int, classes: int, inside: float) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(size, classes))
        self.scale, self.margin, self.inside = 10.0, 0.2, inside

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        cosine = (F.normalize(x) @ F.normalize(self.kernel, dim=0)).clamp(-1, 1)
        sine = torch.sqrt(1 - cosine**2 + self.inside)
        turned = cosine * math.cos(self.margin) - sine * math.sin(self.margin)
        own = F.one_hot(label, cosine.shape[1]).bool()
        return self.scale * torch.where(own, turned, cosine)


class FaceNet(nn.Module):
    """A small embedder with a margin head; it takes the labels, as such heads do."""

    def __init__(self, channels: int, size: int, classes: int, inside: float) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.PReLU(channels),
            nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.PReLU(channels),
            nn.Flatten(),
            nn.Linear(16 * channels, size),
        )
        self.arcface = ArcMargin(size, classes, inside)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.arcface(self.backbone(x), label)


@sick(
    "contact8b-faces-arcface",
    [("NUMERICAL", "arcface")],
    not_finite(20, loss=None),
    source="https://github.com/TreB1eN/InsightFace_Pytorch/issues/93",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def arcface(sick: bool, width: int) -> Setup:
    """The report: the loss is fine, but after the backward pass and one update the kernel of the margin head
    is NaN. Where an embedding points along a class centre the sine is the square root of zero, whose
    slope is infinite; a small number under the root repairs it. Embeddings have two dimensions, as for
    plotting."""
    model = FaceNet(width // 4, 2, 8, 0.0 if sick else 1e-8)
    pictures = data.textures(8, number=96)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        x, label = pictures(g)
        return (x, label), label

    return data.setup(model, sample, F.cross_entropy, 3e-3)


class SentenceEncoder(nn.Module):
    """Word vectors, their mean over the sentence, and a dense layer; for two sentences at a time."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.word_embedding = nn.Embedding(words, width)
        self.mix = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.dense = nn.Linear(width, width)

    def encode(self, tokens: Tensor) -> Tensor:
        vectors = self.word_embedding(tokens)
        return self.dense((vectors + self.mix(vectors)).mean(1))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return F.cosine_similarity(self.encode(first), self.encode(second))


def paraphrases(share: float, topics: int = 12, number: int = 48, length: int = 8) -> data.Sample:
    """Pairs of sentences from one topic (target 1); a share of them from two (target 0)."""

    def words(g: Generator, topic: Tensor) -> Tensor:
        common = data.uniform(g, number, length) < 0.3
        own = 8 * topic[:, None] + data.choice(g, 8, number, length)
        return torch.where(common, 8 * topics + data.choice(g, 8, number, length), own)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        topic = data.choice(g, topics, number)
        other = (topic + 1 + data.choice(g, topics - 1, number)) % topics
        apart = data.uniform(g, number) < share
        return (words(g, topic), words(g, torch.where(apart, other, topic))), (~apart).float()

    return sample


def one_point(setup: Setup) -> tuple[bool, str]:
    """After twenty steps sentences of any topics have the same embedding, up to its length."""
    for _ in training(setup, 20):
        pass
    first, second = setup.make_batch()
    code = F.normalize(setup.model.encode(torch.cat([first, second])))
    likeness = float((code @ code.T).mean())
    return likeness > 0.97, f"mean cosine of any two sentences {likeness:.3f}"


@sick(
    "contact8b-sentences-positives",
    [("BOTTLENECK", "*")],
    one_point,
    allow=("VANISHING",),
    source="https://github.com/huggingface/sentence-transformers/issues/326",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def only_positives(sick: bool, width: int) -> Setup:
    """The report wants to train with the cosine loss on pairs of similar sentences only. With nothing to
    hold them apart all sentences get the same embedding within a few steps; pairs of unlike sentences,
    put together at random as the answer says, repair it."""
    model = SentenceEncoder(13 * 8, width)
    return data.setup(model, paraphrases(0.0 if sick else 0.5), F.mse_loss, 1e-2)


# --------------------------------------------------------------------------------------- detection


class Detector(nn.Module):
    """A grid detector with one anchor; it gives a box (x, y, w, h) in cells and an objectness per cell."""

    def __init__(self, channels: int, bounded: bool, anchor: float = 2.0) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, channels, 3, stride=2, padding=1),
            nn.LeakyReLU(0.1),
            nn.Conv2d(channels, channels, 3, stride=2, padding=1),
            nn.LeakyReLU(0.1),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.LeakyReLU(0.1),
        )
        self.head = nn.Conv2d(channels, 5, 1)
        self.bounded, self.anchor = bounded, anchor
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        raw = self.head(self.backbone(x)).permute(0, 2, 3, 1)
        centre, shape = raw[..., :2].sigmoid(), raw[..., 2:4]
        shape = (2 * shape.sigmoid()) ** 2 if self.bounded else shape.exp()
        return torch.cat([centre, self.anchor * shape, raw[..., 4:]], -1)


def boxes(number: int = 16, size: int = 24) -> data.Sample:
    """Noisy pictures of one bright box; the target has, cell by cell of 4 x 4 pixels, the box and whether."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        middle, shape = 6 + 12 * data.uniform(g, number, 2), 6 + 8 * data.uniform(g, number, 2)
        at = torch.arange(size) + 0.5
        inside = (at[None, None] - middle[..., None]).abs() < shape[..., None] / 2  # (number, 2, size)
        picture = (inside[:, 1, :, None] & inside[:, 0, None, :]).float()[:, None]
        target = torch.zeros(number, size // 4, size // 4, 5)
        cell = (middle / 4).long()
        rows = torch.arange(number)
        target[rows, cell[:, 1], cell[:, 0]] = torch.cat(
            [middle / 4 - cell, shape / 4, torch.ones(number, 1)], 1
        )
        return 3 * picture - 0.75 + 0.2 * data.normal(g, number, 1, size, size), target

    return sample


def box_loss(output: Tensor, target: Tensor) -> Tensor:
    """Return squared errors of the boxes where there is one, and the cross entropy of the objectness."""
    has = target[..., 4] > 0
    place = F.mse_loss(output[has][:, :4], target[has][:, :4])
    return place + 5 * F.binary_cross_entropy_with_logits(output[..., 4], target[..., 4])


@sick(
    "contact8b-detection-yolobox",
    [("EXPLODING", "head")],
    strong("head", 20.0),
    allow=("UNSTABLE", "NUMERICAL"),
    source="https://github.com/ultralytics/yolov5/issues/471",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def box_size(sick: bool, width: int) -> Setup:
    """The report: width and height are the exponential of what the head gives, with nothing to bound them,
    which leads to runaway gradients, instability and NaN losses. The bounded form, the square of twice a
    sigmoid, repairs it."""
    model = Detector(width // 2, bounded=not sick)
    return data.setup(model, boxes(), box_loss, data.sgd(2e-3, 0.9))


# ----------------------------------------------------------------------------------------- pruning


class MaskedConv2d(nn.Conv2d):
    """A convolution of which some weights are pruned."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1, bias=False)
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")
        self.register_buffer("mask", torch.ones_like(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.mask, padding=1)


class PrunedVGG(nn.Module):
    """A plain convolutional network, to be pruned at initialisation."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        sizes = (3, channels, 2 * channels, 8 * channels, 2 * channels)
        self.features = nn.Sequential()
        for i, (inputs, outputs) in enumerate(pairwise(sizes), 1):
            self.features.add_module(f"conv{i}", MaskedConv2d(inputs, outputs))
            self.features.add_module(f"norm{i}", nn.BatchNorm2d(outputs))
            self.features.add_module(f"relu{i}", nn.ReLU())
        self.classifier = nn.Linear(sizes[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))

    def prune(self, share: float, everywhere: bool) -> None:
        """Mask the smallest weights: of all layers together, or of each layer by itself."""
        convs = [m for m in self.modules() if isinstance(m, MaskedConv2d)]
        size = torch.cat([c.weight.detach().abs().flatten() for c in convs])
        for conv in convs:
            own = conv.weight.detach().abs()
            conv.mask.copy_(own > torch.quantile(size if everywhere else own.flatten(), share))


@sick(
    "contact8b-pruning-layercollapse",
    [("DEAD", "features")],
    no_gradient("features"),
    source="https://arxiv.org/abs/2006.05467",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def layer_collapse(sick: bool, width: int) -> Setup:
    """The paper: pruning by size over all layers at once removes every weight of the layer with the most
    inputs, whose weights are smallest, and nothing can be trained any more. Pruning each layer by the
    same share leaves a way through."""
    model = PrunedVGG(width // 4, 4)
    model.prune(0.8, everywhere=sick)
    return data.setup(model, data.textures(4), F.cross_entropy, 3e-3)


# ------------------------------------------------------------------------------------ healthy ones


class Block(nn.Module):
    """A residual block whose last norm begins at zero, so that the block begins as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


@healthy(
    "contact8b-resnet-zerogamma",
    zero_at_first("layer1.0.conv1", "layer1.1.conv2"),
    source="https://github.com/google-deepmind/sonnet/issues/185",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def zero_gamma(width: int) -> Setup:
    """The report asks why the last norm of every residual block begins with a scale of zero. The
    convolutions of the block get no gradient in the first step for that, but the scale moves at once and
    they follow; the answer is that it eases the beginning of the training."""
    channels = width // 2
    model = data.stack(
        stem=nn.Sequential(
            nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
        ),
        layer1=nn.Sequential(Block(channels), Block(channels)),
        pool=nn.AdaptiveAvgPool2d(1),
        flat=nn.Flatten(),
        fc=nn.Linear(channels, 6),
    )
    return data.setup(model, data.textures(6, number=24), F.cross_entropy, data.sgd(0.05, 0.9))
