"""`Checkpoint`: a model on disk, whatever its file format, spoken of in Hugging Face's names."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from tenfold.ops.matrix import RawTensor


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: says which file, what is wrong with it and what to do."""


class Checkpoint(Protocol):
    """config has the keys of Hugging Face's config.json and tensors its names, also for GGUF files (translated, with
    the query and key rows of Llama-family files back in Hugging Face's order and 1 taken off Gemma's norms).

    tokenizer: a `tokenizers.Tokenizer` that encodes without adding special tokens unless asked
    (`add_special_tokens=True` then adds what the model's own post-processor adds). chat_template: Jinja source or
    None. special: names ("bos_token", "eos_token", "pad_token", "unk_token") to strings. eos_ids: tokens that end an
    answer.
    """

    path: Path
    config: dict[str, Any]
    chat_template: str | None
    special: dict[str, str]
    eos_ids: tuple[int, ...]

    def names(self) -> Iterable[str]: ...

    def __contains__(self, name: str) -> bool: ...

    def tensor(self, name: str) -> RawTensor:
        """Raises CheckpointError when there is no such tensor."""
        ...

    def tokenizer(self) -> Any: ...
