"""Cases from public reports: classification and segmentation of pictures."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .claims import every, fading, flat, huge, not_finite, stuck
from .contact6b_1 import ONE, digits
from .data import choice, discs, normal, seeded, setup, textures, trained, uniform
from .registry import Setup, healthy, sick

# ----------------------------------------------------------------------------------- classification


class _Layer(nn.Module):
    """A block of a vision transformer, normalized before its parts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class _VolumeViT(nn.Module):
    """Sorts volumes by their class token; the head may squash its logits."""

    def __init__(self, width: int, kinds: int, squashed: bool) -> None:
        super().__init__()
        self.patches = nn.Conv3d(1, width, 4, 4)
        self.token, self.place = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.zeros(9, width))
        nn.init.trunc_normal_(self.place, std=0.02)
        self.layers = nn.Sequential(_Layer(width), _Layer(width))
        self.norm = nn.LayerNorm(width)
        last = nn.Linear(width, kinds)
        self.head = nn.Sequential(last, nn.Tanh()) if squashed else nn.Sequential(last)

    def forward(self, volume: Tensor) -> Tensor:
        x = self.patches(volume).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.place
        return self.head(self.norm(self.layers(x))[:, 0])


def _volumes(g: torch.Generator) -> tuple[Tensor, Tensor]:
    kinds = 20
    shapes = normal(seeded(63), kinds, 1, 8, 8, 8)
    kind = choice(g, kinds, 32)
    return shapes[kind] + 1.5 * normal(g, 32, 1, 8, 8, 8), kind


@sick(
    "contact6b-volumes-squashed-logits",
    [("SATURATION", "head")],
    every(flat("head", "tanh", 0.5, steps=1), stuck(1.2)),
    source="https://github.com/Project-MONAI/tutorials/issues/464",
    **ONE,
)
def volumes_squashed_logits(sick: bool, width: int) -> Setup:
    """A vision transformer for volumes has a tanh after its last layer: the logits that the cross entropy
    asks for are out of reach, the layer below grows until the tanh is flat where it is right and where it is
    wrong, and the loss stays above a floor. Handed over after 150 steps. Repaired by leaving the tanh out."""
    ready = setup(_VolumeViT(2 * width, 20, squashed=sick), _volumes, F.cross_entropy, 1.5e-2)
    return trained(ready, 150) if sick else ready


class _Vgg(nn.Module):
    """Thirteen convolutions in five stages and a classifier, without normalization."""

    def __init__(self, width: int, kinds: int, scaled: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for stage, number in enumerate((2, 2, 3, 3, 3)):
            for _ in range(number):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            if stage < 4:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, kinds)
        )
        for layer in self.modules():
            if scaled and isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_uniform_(layer.weight, a=0)

    def forward(self, picture: Tensor) -> Tensor:
        return self.classifier(self.features(picture).flatten(1))


@sick(
    "contact6b-vgg-default-start",
    [("VANISHING", "features")],
    every(fading("features.0", "features.28", 1e-6), stuck(1.2, steps=150)),
    source="https://forums.fast.ai/t/broken-default-cnn-behaviour/48936",
    steps=150,
    **ONE,
)
def vgg_default_start(sick: bool, width: int) -> Setup:
    """A deep stack of convolutions without normalization keeps the library's default weights, which are too
    small for a ReLU: signal and gradient lose more than half at each layer, and it does not learn at all.
    Repaired by weights of the size that the ReLU asks for."""
    return setup(_Vgg(2 * width, 4, scaled=not sick), textures(number=16, size=16), F.cross_entropy, 1e-4)


# ------------------------------------------------------------------------------------- segmentation


class _UNet(nn.Module):
    """Two levels with a skip between them; the last layer may end in a sigmoid."""

    def __init__(self, width: int, squashed: bool = False) -> None:
        super().__init__()
        self.down1 = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU())
        self.down2 = nn.Sequential(nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU())
        self.up = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.join = nn.Sequential(nn.Conv2d(2 * width, width, 3, padding=1), nn.ReLU())
        last = nn.Conv2d(width, 1, 1)
        self.out = nn.Sequential(last, nn.Sigmoid()) if squashed else nn.Sequential(last)

    def forward(self, picture: Tensor) -> Tensor:
        top = self.down1(picture)
        low = self.up(self.down2(F.max_pool2d(top, 2)))
        return self.out(self.join(torch.cat([top, low], 1)))


def _lesions(g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noisy pictures of one small bright spot in a few of the places where one could be."""
    rows, columns = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    centre = 2 + 12 * uniform(g, 16, 2, 1, 1)
    mask = ((rows - centre[:, 0]) ** 2 + (columns - centre[:, 1]) ** 2 < 3).float()[:, None]
    return 1.5 * mask + 0.5 * normal(g, 16, 1, 16, 16), mask


@sick(
    "contact6b-lesions-twice-squashed",
    [("SATURATION", "out")],
    every(flat("out", "sigmoid", 0.99, steps=1), stuck(0.3)),
    allow=("VANISHING", "DEAD"),
    source="https://github.com/avBuffer/UNet3plus_pth/issues/23",
    **ONE,
)
def lesions_twice_squashed(sick: bool, width: int) -> Setup:
    """A segmentation network ends in a sigmoid, and its loss takes the sigmoid again: a probability of zero
    counts as a half, so the background pulls the first sigmoid to its flat end everywhere. Handed over after
    80 steps. Repaired by giving the loss the logits."""
    ready = setup(_UNet(width, squashed=sick), _lesions, F.binary_cross_entropy_with_logits, 1e-2)
    return trained(ready, 80) if sick else ready


@sick(
    "contact6b-masks-of-255",
    [("EXPLODING", "*")],
    huge("*", 30.0),
    allow=("UNSTABLE", "SATURATION", "NUMERICAL"),
    source="https://github.com/milesial/Pytorch-UNet/issues/65",
    **ONE,
)
def masks_of_255(sick: bool, width: int) -> Setup:
    """The masks are read from files as 0 and 255 and not divided: the binary cross entropy has no lower bound
    then, its gradient is hundreds of times too large, and the logits run away. Repaired by masks of 0 and
    1."""
    top = 255 if sick else 1
    return setup(
        _UNet(width), discs(), lambda output, mask: F.binary_cross_entropy_with_logits(output, top * mask)
    )


def _scans(g: torch.Generator) -> tuple[Tensor, Tensor]:
    picture, mask = discs()(g)
    return 1000 * (picture - 1), mask


def _focal(output: Tensor, mask: Tensor, *, apart: bool) -> Tensor:
    """The focal loss, from the logarithms of the sigmoids or from the sigmoids themselves."""
    on, off = output.sigmoid(), (-output).sigmoid()
    log_on, log_off = (on.log(), off.log()) if apart else (F.logsigmoid(output), F.logsigmoid(-output))
    return -(0.75 * off**2 * mask * log_on + 0.25 * on**2 * (1 - mask) * log_off).mean()


@sick(
    "contact6b-scans-focal-log",
    [("NUMERICAL", "*")],
    not_finite(20),
    source="https://github.com/kornia/kornia/issues/2115",
    **ONE,
)
def scans_focal_log(sick: bool, width: int) -> Setup:
    """The focal loss takes the logarithm of a sigmoid: where a scan that is not normalized makes a logit of
    more than a hundred, this is minus infinity, times a zero of the mask. Repaired by the logarithm of the
    sigmoid in one piece."""
    return setup(_UNet(width), _scans, lambda output, mask: _focal(output, mask, apart=sick), 1e-3)


class _Rare(nn.Module):
    """Small things in pictures; the last bias is set so that all starts as background."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = _UNet(width)
        nn.init.constant_(self.net.out[0].bias, -4.6)

    def forward(self, picture: Tensor) -> Tensor:
        return self.net(picture)


@healthy("contact6b-lesions-prior-bias", flat("net.out", "sigmoid of", 0.3, steps=1), **ONE)
def lesions_prior_bias(width: int) -> Setup:
    """Segmentation of rare spots by the focal loss, from a bias that makes nearly every pixel background with
    a sigmoid that is all but flat: that keeps the many easy pixels out of the way, and it learns."""
    return setup(_Rare(width), _lesions, lambda output, mask: _focal(output, mask, apart=False), 3e-3)


# ------------------------------------------------------------------------------------ reconstruction


class _DigitCoder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 4 * width), nn.ReLU(), nn.Linear(4 * width, 6)
        )
        self.decoder = nn.Sequential(nn.Linear(6, 4 * width), nn.ReLU(), nn.Linear(4 * width, 64))

    def forward(self, picture: Tensor) -> Tensor:
        return self.decoder(self.encoder(picture)).view_as(picture)


def _both(g: torch.Generator) -> tuple[Tensor, Tensor]:
    picture, _ = digits(g)
    return picture, picture


@healthy("contact6b-digits-empty-border", flat("decoder", "sigmoid of", 0.1, steps=150), steps=150, **ONE)
def digits_empty_border(width: int) -> Setup:
    """An autoencoder of digits: the pixels at the border are always empty, so that their weights get no
    gradient in and their outputs go to the flat end of the sigmoid, where they belong."""
    return setup(_DigitCoder(width), _both, F.binary_cross_entropy_with_logits, 1e-2)
