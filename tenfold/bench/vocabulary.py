"""A vocabulary where there is no tokenizer, or none is worth loading."""


class Bytes:
    """The 256 bytes, as the first tokens of any model: the same texts as with another vocabulary."""

    special_ids: frozenset[int] = frozenset()
    vocab_size = 256

    def certain_bytes(self, token: int) -> bytes:
        return bytes([token])

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())
