"""The picture side: a ResNet or a vision transformer to a token for each region and one for the whole.

ResNet is that of He et al. 2015 (arXiv 1512.03385) with torchvision's names of weights; the transformer is ViT
(arXiv 2010.11929).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold.models.sentiment.attention import Block
from tenfold.models.sentiment.text import renamed

# Kind: blocks of each stage, channels of the first, whether blocks are bottlenecks, and whether the stem is that of
# ImageNet's large pictures.
RESNETS: dict[str, tuple[tuple[int, ...], int, bool, bool]] = {
    "small": ((1, 1, 1), 16, False, False),
    "resnet18": ((2, 2, 2, 2), 64, False, True),
    "resnet50": ((3, 4, 6, 3), 64, True, True),
}
KINDS = (*RESNETS, "vit")
WIDENING = 4  # of a bottleneck
LARGEST = 1024  # pixels of a side
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as weights of ResNets expect


@dataclass(frozen=True, slots=True)
class ImageShape:
    """kind: as in KINDS. size: pixels of each side of the square that is seen. Those after it are a transformer's."""

    kind: str = "small"
    size: int = 56
    patch: int = 16
    width: int = 384
    layers: int = 6
    heads: int = 6
    inner: int = 1536

    @property
    def stride(self) -> int:
        """Pixels of a side of a region."""
        return {"vit": self.patch, "small": 8}.get(self.kind, 32)

    @property
    def tokens(self) -> int:
        """Regions, and one for the whole."""
        return (self.size // self.stride) ** 2 + 1

    def check(self) -> None:
        """Raises ValueError."""
        if self.kind not in KINDS:
            raise ValueError(f"image encoder is {self.kind!r}; allowed: {', '.join(KINDS)}.")
        for name, least in (("patch", 1), ("width", 1), ("layers", 0), ("heads", 1), ("inner", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} of the image encoder is {getattr(self, name)}; allowed: from {least}.")
        if self.width % self.heads:
            raise ValueError(
                f"width of the image encoder is {self.width}; allowed: a multiple of its heads ({self.heads})."
            )
        if not self.stride <= self.size <= LARGEST or self.size % self.stride:
            raise ValueError(f"size of pictures is {self.size}; allowed: a multiple of {self.stride}, up to {LARGEST}.")


def tokens_of(map: Tensor) -> Tensor:
    """A feature map [B, C, H, W] as H * W tokens of C channels, row by row, [B, H * W, C]. Channels last first: a
    reshape without it would mix places and channels.
    """
    return map.permute(0, 2, 3, 1).flatten(1, 2)


class Basic(nn.Module):
    """Two 3x3 convolutions with a residual. Names as in torchvision."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = shortcut(before, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with a residual; the stride is that of the 3x3."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * WIDENING, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * WIDENING)
        self.downsample = shortcut(before, width * WIDENING, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.downsample(x))


def shortcut(before: int, after: int, stride: int) -> nn.Module:
    """What a residual passes: nothing where sizes stay."""
    if before == after and stride == 1:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))


class ResNet(nn.Module):
    """[B, 3, S, S] to [B, S / stride squared, channels]."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        blocks, width, is_bottleneck, is_large = RESNETS[kind]
        size, padding = (7, 3) if is_large else (3, 1)
        self.conv1 = nn.Conv2d(3, width, size, 2, padding, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if is_large else nn.Identity()
        make, widening = (Bottleneck, WIDENING) if is_bottleneck else (Basic, 1)
        self.channels, self.stages = width, len(blocks)
        for i, count in enumerate(blocks):
            own = width << i
            strides = [1 if i == 0 else 2] + [1] * (count - 1)
            stage = []
            for stride in strides:
                stage.append(make(self.channels, own, stride))
                self.channels = own * widening
            self.add_module(f"layer{i + 1}", nn.Sequential(*stage))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, pictures: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(pictures))))
        for i in range(self.stages):
            x = self.get_submodule(f"layer{i + 1}")(x)
        return tokens_of(x)


class Vit(nn.Module):
    """[B, 3, S, S] to [B, regions, width]; the class token is left out, as the mean stands for the whole."""

    def __init__(self, shape: ImageShape) -> None:
        super().__init__()
        self.channels = shape.width
        self.patches = nn.Conv2d(3, shape.width, shape.patch, shape.patch)
        self.first = nn.Parameter(torch.zeros(1, 1, shape.width))
        self.places = nn.Parameter(torch.randn(1, shape.tokens, shape.width) * 0.02)
        self.blocks = nn.ModuleList(
            Block(shape.width, shape.heads, shape.inner, 1e-12, 0.0, before=True) for _ in range(shape.layers)
        )
        self.norm = nn.LayerNorm(shape.width, eps=1e-12)

    def forward(self, pictures: Tensor) -> Tensor:
        x = tokens_of(self.patches(pictures))
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1) + self.places
        for block in self.blocks:
            x = block(x, None)
        out: Tensor = self.norm(x)
        return out[:, 1:]


class Normal(nn.Module):
    """Pictures of 8 bits to what encoders expect, in the module's type; on a GPU channels last, as its convolutions
    like it.
    """

    def __init__(self) -> None:
        super().__init__()
        for name, numbers in (("average", MEAN), ("deviation", DEVIATION)):
            self.register_buffer(name, 255 * torch.tensor(numbers).view(1, 3, 1, 1), persistent=False)

    def forward(self, pictures: Tensor) -> Tensor:
        average, deviation = self.get_buffer("average"), self.get_buffer("deviation")
        made = ((pictures.float() - average.float()) / deviation.float()).to(average.dtype)
        return made.contiguous(memory_format=torch.channels_last) if made.is_cuda else made


class Regions(nn.Module):
    """Pictures [B, 3, S, S] uint8 to [B, tokens, d]: the regions row by row, then their mean."""

    def __init__(self, shape: ImageShape, width: int) -> None:
        super().__init__()
        self.normal = Normal()
        self.encoder: ResNet | Vit = Vit(shape) if shape.kind == "vit" else ResNet(shape.kind)
        self.project = nn.Linear(self.encoder.channels, width)

    def forward(self, pictures: Tensor) -> Tensor:
        regions = self.encoder(self.normal(pictures))
        both = torch.cat([regions, regions.mean(1, keepdim=True)], 1)
        return F.gelu(self.project(both))


# Names of a Hugging Face ViT to ours.
VIT_RENAMES = (
    (r"^(vit|model)\.", ""),
    (r"^embeddings\.cls_token$", "first"),
    (r"^embeddings\.position_embeddings$", "places"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patches."),
    (r"^(encoder\.layer|layers)\.(\d+)\.", r"blocks.\2."),
    (r"\.attention\.attention\.(query|key|value)\.", r".\1."),
    (r"\.attention\.q_proj\.", ".query."),
    (r"\.attention\.k_proj\.", ".key."),
    (r"\.attention\.v_proj\.", ".value."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attended."),
    (r"\.layernorm_before\.", ".attention_norm."),
    (r"\.layernorm_after\.", ".mlp_norm."),
    (r"\.(intermediate\.dense|mlp\.fc1)\.", ".up."),
    (r"\.(output\.dense|mlp\.fc2)\.", ".down."),
    (r"^layernorm\.", "norm."),
)


def from_image_weights(kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of an encoder from torchvision's weights of a ResNet, or those of a Hugging Face ViT; what it has no
    place for, such as the classes of ImageNet, is left out.
    """
    if kind == "vit":
        found = {renamed(name, VIT_RENAMES): tensor for name, tensor in tensors.items()}
        own: tuple[str, ...] = ("patches.", "first", "places", "blocks.", "norm.")
    else:
        found, own = dict(tensors), ("conv1.", "bn1.", "layer")
    return {name: tensor for name, tensor in found.items() if name.startswith(own)}
