"""The whole forward: text and picture to tokens, spliced, through CNN, CBAM and cross-attention to one vector and
labels.

Invariant: whatever else is in a batch and however it is padded, a post gets the same logits, but for rounding. So the
picture's tokens, of which there is always the same number, come first, the text's after them, and padding last.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold.models.sentiment.attention import Block, across
from tenfold.models.sentiment.cbam import LOWEST, Cbam
from tenfold.models.sentiment.config import Parts, SentimentConfig
from tenfold.models.sentiment.image import Regions
from tenfold.models.sentiment.text import Bert, BiLstm

HEAD = 64  # channels of an attention head of the cross-attention
CONTRAST = 128  # channels that a contrastive loss compares
PICTURE_CHANNELS = 16  # of the layout "picture"


@dataclass(frozen=True, slots=True)
class Posts:
    """A batch. ids [B, L] int64, from 0 where padded; lengths [B] int64 on the CPU, from 1; pictures [P, 3, S, S] uint8
    of the posts that have one; rows [P] int64: which those are. shown [P] bool: which pictures are looked at, None for
    all.
    """

    ids: Tensor
    lengths: Tensor
    pictures: Tensor
    rows: Tensor
    shown: Tensor | None = None

    def to(self, device: torch.device | str) -> "Posts":
        """On a device; lengths stay where the LSTM's packing wants them."""
        names = ("ids", "pictures", "rows", "shown")
        own = {name: x for name in names if (x := getattr(self, name)) is not None}
        return replace(self, **{name: x.to(device, non_blocking=True) for name, x in own.items()})


@dataclass(frozen=True, slots=True)
class Told:
    """logits [B, labels]; contrast [B, CONTRAST], of length 1, where the model has that head."""

    logits: Tensor
    contrast: Tensor | None


class SentimentModel(nn.Module):
    """CB-BiLSTM. config: checked."""

    def __init__(self, config: SentimentConfig) -> None:
        super().__init__()
        self.config = config
        parts, width = config.parts, config.width
        self.text = Bert(config.text, config.dropout)
        self.bilstm = BiLstm(width, parts.bilstm, config.dropout) if parts.bilstm else None
        self.image = Regions(config.image, width)
        self.fusion = Fusion(width, parts, config.dropout, config.image.tokens)
        self.pool = AttentionPool(width)
        # A mean over many tokens is small, and what two modalities have together smaller.
        self.norm = nn.LayerNorm(width)
        self.head = nn.Sequential(
            nn.Dropout(config.dropout),
            nn.Linear(width, width // 2),
            nn.GELU(),
            nn.Linear(width // 2, len(config.labels)),
        )
        self.contrast = nn.Linear(width, CONTRAST) if parts.contrastive else None

    def forward(self, posts: Posts) -> Told:
        x, real = self.splice(posts)
        pooled = self.norm(self.pool(self.fusion(x, real), real))
        contrast = None if self.contrast is None else F.normalize(self.contrast(pooled), dim=-1)
        return Told(self.head(pooled), contrast)

    def splice(self, posts: Posts) -> tuple[Tensor, Tensor]:
        """Tokens [B, T, d] with the picture's first, and which of them are real [B, T]."""
        count, length = posts.ids.shape
        modalities = self.config.parts.modalities
        where = posts.ids.device
        lengths = posts.lengths.to(where, non_blocking=True)
        read = torch.arange(length, device=where) < lengths[:, None]
        seen = torch.zeros(count, self.config.image.tokens, dtype=torch.bool, device=where)
        text = self.read(posts, read) if modalities != "image" else None
        regions = None
        if modalities != "text" and len(posts.rows):
            shown = torch.ones_like(posts.rows, dtype=torch.bool) if posts.shown is None else posts.shown
            seen = seen.index_copy(0, posts.rows, shown[:, None].expand(-1, seen.shape[1]))
            regions = self.image(posts.pictures) * shown[:, None, None]
        if text is None:
            kind = self.image.project.weight.dtype if regions is None else regions.dtype
            text = torch.zeros(count, length, self.config.width, dtype=kind, device=where)
            read = torch.zeros_like(read)
        blank = text.new_zeros(count, self.config.image.tokens, self.config.width)
        picture = blank if regions is None else blank.index_copy(0, posts.rows, regions.to(text.dtype))
        return torch.cat([picture, text], 1), torch.cat([seen, read], 1)

    def read(self, posts: Posts, real: Tensor) -> Tensor:
        x: Tensor = self.text(posts.ids, real)
        if self.bilstm is not None:
            x = self.bilstm(x, posts.lengths)
        return x * real[..., None]


class Fusion(nn.Module):
    """[B, T, d] to [B, T, d]: a convolution, CBAM, and cross-attention, each where it is switched on. Norms are over
    the channels of a token: statistics over a batch would count padding.
    """

    def __init__(self, width: int, parts: Parts, dropout: float, image_tokens: int) -> None:
        super().__init__()
        self.image_tokens = image_tokens
        self.layout = parts.layout
        if parts.layout == "picture":
            self.gate: nn.Module = AsPicture(parts)
        else:
            self.gate = AsTokens(width, parts)
        heads = max(1, width // HEAD)
        self.cross = nn.ModuleList(Block(width, heads, 2 * width, 1e-5, dropout) for _ in range(parts.cross))

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        x = self.gate(x, real)
        if self.cross:
            sees = across(real, self.image_tokens)
            for block in self.cross:
                x = block(x, sees)
        return x * real[..., None]


class AsTokens(nn.Module):
    """Layout "tokens": places are tokens, d channels each."""

    def __init__(self, width: int, parts: Parts) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, 3, padding=1) if parts.cnn else None
        self.norm = nn.LayerNorm(width) if parts.cnn else None
        self.cbam = Cbam(width, parts.cbam, dims=1)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        if self.conv is not None and self.norm is not None:
            x = F.relu(self.norm(self.conv(x.transpose(1, 2)).transpose(1, 2))) * real[..., None]
        return self.cbam(x.transpose(1, 2), real[:, None]).transpose(1, 2)


class AsPicture(nn.Module):
    """Layout "picture": places are tokens times d, with a few channels that the CNN makes; what comes of them is added
    to x. Without a CNN there is one channel.
    """

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        channels = PICTURE_CHANNELS if parts.cnn else 1
        self.conv = nn.Conv2d(1, channels, 3, padding=1) if parts.cnn else None
        self.cbam = Cbam(channels, parts.cbam, dims=2)
        self.merge = nn.Conv2d(channels, 1, 1)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        there = real[:, None, :, None]
        maps = x[:, None]
        if self.conv is not None:
            maps = F.relu(self.conv(maps)) * there
        return x + (self.merge(self.cbam(maps, there)) * there)[:, 0]


class AttentionPool(nn.Module):
    """The mean of all real tokens, weighed by what a small network makes of each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Sequential(nn.Linear(width, width // 2), nn.Tanh(), nn.Linear(width // 2, 1))

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """x [B, T, d], real [B, T] -> [B, d]; zeros where nothing is real."""
        scores = self.score(x)[..., 0].masked_fill(~real, LOWEST)
        weights = scores.softmax(-1) * real
        return (weights[:, None] @ x)[:, 0]
