"""A tiny random classifier, and a tokenizer of a few words for it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from tenfold.models.sentiment.config import ImageShape, Parts, SentimentConfig, TextShape
from tenfold.models.sentiment.folder import Classifier, save
from tenfold.models.sentiment.model import SentimentModel
from tenfold.models.sentiment.prepare import Reader

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "a",
    "good",
    "bad",
    "day",
    "is",
    "the",
    "not",
    "very",
    "rain",
    "sun",
    ".",
    "!",
]
LABELS = ("negative", "neutral", "positive")
IMAGE = ImageShape("small", 24)


def tokenizer(words: list[str] = WORDS) -> Tokenizer:
    made = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return made


def config(width: int = 32, image: ImageShape = IMAGE, **parts: object) -> SentimentConfig:
    text = TextShape(len(WORDS), width, 2, 2, 2 * width, positions=64)
    return SentimentConfig(LABELS, text, image, replace(Parts(), **parts), max_tokens=64)  # type: ignore[arg-type]


def classifier(seed: int = 0, **parts: Any) -> Classifier:
    torch.manual_seed(seed)
    shape = config(**parts)
    model = SentimentModel(shape).eval().requires_grad_(False)
    for module in model.modules():  # statistics that a norm could have learnt
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)  # type: ignore[union-attr, operator]
    return Classifier(model, Reader(shape, tokenizer()), temperature=1.5, card={"data": "none"})


def folder(path: Path, **parts: Any) -> Path:
    save(path, classifier(**parts))
    return path
