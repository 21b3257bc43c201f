"""How deeply a JSON text is nested, found before any parser sees it.

Invariant: one pass over the bytes in C, without recursion, whatever the bytes are; chunk by chunk as they arrive, so no
body holds up the other requests for long.
"""

import numpy as np

TOLD = b'"[]{}'  # all that nesting depends on, once escapes are gone
OTHERS = bytes(set(range(256)) - set(TOLD))
QUOTE = ord('"')
STEPS = np.zeros(256, np.int8)
STEPS[list(b"[{")] = 1
STEPS[list(b"]}")] = -1


class Nesting:
    """Follows the nesting of one text."""

    def __init__(self) -> None:
        self._depth = 0
        self._within = False  # a string
        self._escape = b""  # the backslash that the last chunk ended with

    def feed(self, chunk: bytes) -> int:
        """The deepest nesting in `chunk`, which follows the chunks before. In a text that is not JSON the number means
        nothing: a parser refuses that at its first wrong byte."""
        rest = (self._escape + chunk).replace(rb"\\", b"")
        self._escape = b"\\" if rest.endswith(b"\\") else b""
        told = np.frombuffer(rest.replace(b'\\"', b"").translate(None, OTHERS), np.uint8)
        if not len(told):
            return self._depth
        within = np.logical_xor.accumulate(told == QUOTE) ^ self._within
        before = self._depth
        depths = before + np.cumsum(np.where(within, 0, STEPS[told]), dtype=np.int64)
        self._within = bool(within[-1])
        self._depth = int(depths[-1])
        return max(before, int(depths.max()))


def brackets(text: bytes) -> int:
    """No text is nested deeper than this; for most it saves the exact count."""
    return text.count(b"[") + text.count(b"{")
