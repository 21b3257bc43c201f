"""`tenfold classify`: what a text, a picture, or both feel like."""

import json
from pathlib import Path

from tenfold.engine.classifier import Classifier, Feeling, Post
from tenfold.serve.cli.terminal import columns


def classify(named: str, text: str, image: Path | None, device: str, as_json: bool) -> None:
    """Raises ValueError for a post that holds nothing, a picture that cannot be read, or a classifier that is none."""
    with Classifier(named, device=device) as classifier:
        (found,) = classifier.classify(Post(text, image))
    print(json.dumps({"label": found.label, "probabilities": found.probabilities}) if as_json else described(found))


def described(found: Feeling) -> str:
    """Every label with its probability, the likeliest first."""
    ordered = sorted(found.probabilities.items(), key=lambda item: -item[1])
    return columns([(label, f"{probability:.4f}") for label, probability in ordered])
