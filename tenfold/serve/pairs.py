"""Pairs of pictures and texts as a model reads them: through its own chat template, tokenizer and processor."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tenfold.base.pictures import PictureError
from tenfold.engine.sight import Layout
from tenfold.engine.text import Text
from tenfold.models.config import ModelConfig
from tenfold.models.table import model_config
from tenfold.quantize.capture import spread
from tenfold.quantize.mbq.data import Pair, PairError, Sample
from tenfold.weights.checkpoint import Checkpoint


class Reader:
    """Makes samples for one model."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.text = Text(checkpoint)
        self.config: ModelConfig = model_config(checkpoint.config)

    def samples(self, pairs: Sequence[Pair], progress: Callable[[int, int], None] | None = None) -> list[Sample]:
        """Raises PairError, which names the picture that cannot be used."""
        made = []
        for number, pair in enumerate(pairs):
            made.append(self.sample(pair))
            if progress is not None:
                progress(number + 1, len(pairs))
        return made

    def sample(self, pair: Pair) -> Sample:
        if pair.image is not None and self.text.processor is None:
            raise PairError(f"{pair.image} is a picture, and this model reads text only; give pairs without pictures.")
        try:
            pictures: list[Any] = [] if pair.image is None else [pair.image.read_bytes()]
            return self._sample(pair, pictures)
        except PictureError as error:
            raise PairError(f"{pair.image} cannot be used: {error}") from None
        except OSError as error:
            raise PairError(f"{pair.image} cannot be read: {error.strerror}.") from None

    def _sample(self, pair: Pair, pictures: Sequence[bytes]) -> Sample:
        parts = [*({"type": "image", "image": picture} for picture in pictures), {"type": "text", "text": pair.prompt}]
        asked = [{"role": "user", "content": parts if pictures else pair.prompt}]
        prompt = self.text.encode_chat_pictured(asked)
        tokens = (*prompt.tokens, *self.text.encode(self._answer(asked, pair.answer), add_special_tokens=False))
        token_id = -1 if self.text.processor is None else self.text.processor.token_id
        layout = Layout(tokens, prompt.pictures, token_id, bool(self.config.rope_sections))
        if layout.turns is None:
            positions, turns = np.arange(len(tokens), dtype=np.int32), None
        else:
            positions = layout.positions(0, len(tokens)).astype(np.int32)
            turns = layout.turns[:, layout.places].T.astype(np.int64)
        return Sample(tokens, len(prompt.tokens), prompt.pictures, layout.places, positions, turns)

    def _answer(self, asked: Sequence[dict[str, Any]], answer: str) -> str:
        """What the model is to say: the answer, and what its template writes at the end of one."""
        said = {"role": "assistant", "content": answer}
        opened = self._rendered(asked)
        whole = self._rendered([*asked, said], add_generation_prompt=False)
        return whole[len(opened) :].rstrip("\n") if whole.startswith(opened) else answer

    def _rendered(self, messages: Sequence[dict[str, Any]], **settings: Any) -> str:
        pictures: list[Any] | None = [] if self.text.processor is not None else None
        return self.text.render_chat(messages, pictures=pictures, **settings)


def of_text(text: str, reader: Reader, length: int, most: int) -> list[Sample]:
    """Windows of a text for a model that reads no pictures, all of whose tokens are answers but the first."""
    ids = reader.text.encode(text, add_special_tokens=False)
    windows = [tuple(ids[i : i + length]) for i in range(0, len(ids) - length + 1, length)]
    nothing = np.empty(0, dtype=np.int64)
    return [Sample(window, 1, (), nothing, np.arange(length, dtype=np.int32)) for window in spread(windows, most)]
