"""Gradients are transformers' own, in float64; batches change nothing; ratios have their floor."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tenfold.quantize.mbq.gradients import HOOKS, Magnitude, magnitudes, ratios
from tenfold.quantize.mbq.subject import Subject
from tenfold.weights.open import open_checkpoint
from tests.quantize.mbq.conftest import Seeing, samples_of
from tests.vision import SPECIAL, TINY, reference


def theirs(name: str, folder: Path, sample: Any) -> dict[tuple[str, int, str], float]:
    """Mean |gradient| of the outputs of o_proj and down_proj by transformers, given what our tower saw."""
    model = reference(folder, TINY[name].family)
    inner = model.double()
    text = inner.model.language_model if hasattr(inner.model, "language_model") else inner.model.text_model
    outputs: dict[tuple[str, int], torch.Tensor] = {}
    hooks = []

    def keep(key: tuple[str, int]) -> Any:
        def hook(_: Any, __: Any, y: torch.Tensor) -> None:
            y.retain_grad()
            outputs[key] = y

        return hook

    for i, layer in enumerate(text.layers):
        hooks.append(layer.self_attn.o_proj.register_forward_hook(keep(("attention", i))))
        hooks.append(layer.mlp.down_proj.register_forward_hook(keep(("mlp", i))))
    try:
        ids = torch.tensor([sample.tokens])
        subject = Subject(open_checkpoint(folder), dtype=torch.float64)
        embeds = text.embed_tokens(ids).detach()
        seen = torch.cat([subject.features(p) for p in sample.pictures]) if sample.pictures else None
        if seen is not None:
            embeds[0, torch.as_tensor(sample.places)] = seen
        embeds.requires_grad_()
        more: dict[str, Any] = {}
        if sample.turns is not None:
            places = torch.as_tensor(sample.positions).long().expand(3, -1).clone()
            places[:, torch.as_tensor(sample.places)] = torch.as_tensor(sample.turns).T
            more["position_ids"] = places[:, None]
        hidden = text(inputs_embeds=embeds, use_cache=False, **more).last_hidden_state
        logits = inner.lm_head(hidden)[0]
        rows = torch.arange(sample.answer - 1, len(sample.tokens) - 1)
        torch.nn.functional.cross_entropy(logits[rows], ids[0, rows + 1]).backward()
    finally:
        for hook in hooks:
            hook.remove()
        reference.cache_clear()
    masks = {"vision": ids[0] == SPECIAL[TINY[name].mark], "answer": torch.arange(ids.shape[1]) >= sample.answer}
    found = {}
    for (part, i), y in outputs.items():
        assert y.grad is not None
        for modality, mask in masks.items():
            found[part, i, modality] = float(y.grad[0, mask].abs().mean())
    return found


@pytest.mark.parametrize("name", ["llava", "qwen2-vl", "idefics3"])
def test_against_autograd_of_transformers(name: str, seeing: Seeing, pairs: Path) -> None:
    pytest.importorskip("transformers")
    folder = seeing(name)
    sample = samples_of(folder, pairs)[0]
    subject = Subject(open_checkpoint(folder), dtype=torch.float64)
    ours = magnitudes(subject, subject.batches([sample]))
    for (part, layer, modality), value in theirs(name, folder, sample).items():
        nothing = (layer, modality) == (subject.layers - 1, "vision")  # no answer looks at what comes out there
        assert (value == 0) == nothing
        assert getattr(ours[part][layer], modality) == pytest.approx(value, rel=1e-5), (part, layer, modality)


def test_batches_change_nothing(seeing: Seeing, pairs: Path) -> None:
    folder = seeing("internvl")
    samples = samples_of(folder, pairs)
    subject = Subject(open_checkpoint(folder), dtype=torch.float64)
    together = magnitudes(subject, subject.batches(samples))
    alone = magnitudes(subject, subject.batches(samples[::-1], tokens=1))
    assert len(subject.batches(samples)) < len(subject.batches(samples, tokens=1)) == len(samples)
    for part in HOOKS:
        for one, other in zip(together[part], alone[part]):
            assert one.vision == pytest.approx(other.vision, rel=1e-6)
            assert one.answer == pytest.approx(other.answer, rel=1e-6)


def test_ratios_and_their_floor() -> None:
    found = {"attention": [Magnitude(1, 10), Magnitude(3, 10), Magnitude(5, 10)], "mlp": [Magnitude(float("nan"), 1)]}
    assert ratios(found) == {"attention": [0.3, 0.3, 0.5], "mlp": [1.0]}
    assert ratios(found, "none")["attention"] == [0.1, 0.3, 0.5]
    assert ratios(found, balance=False) == {"attention": [1.0] * 3, "mlp": [1.0]}
    with pytest.raises(ValueError, match="floor is 'mean'; allowed: median, none"):
        ratios(found, "mean")
