"""Rows: what the device knows of each running sequence between steps, and how a plan becomes a `Step`.

A sequence owns one row from admission until its last step was read. The inputs of a step live in buffers used in turn,
so those of a step in flight are never overwritten; their tensors are made anew only when the shape of a step changes,
so that a steady decode step costs a handful of vector operations on the host.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from tenfold.cache.store import KVStore
from tenfold.engine.plan import Entry
from tenfold.engine.speculate.verify import draws
from tenfold.nn.step import Step
from tenfold.ops.kernels import Separate

ALIGN = 64  # bytes between the beginnings of input tensors

Shape = tuple[int, int, int, int, int]  # tokens, requests, page columns, logits, sampled


Bucket = Callable[[int, int], tuple[int, int]]


strides = Separate().bucket  # where kernels do not say


class Place:
    """Memory of a device for the inputs of steps. Steps take turns in it, in the order of the stream, so steps of one
    shape find their inputs at one place: what a captured graph needs.
    """

    def __init__(self, device: torch.device) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8, device=device)
        self.pinned = device.type == "cuda"  # whether what comes here does from pinned memory

    def reserve(self, size: int) -> None:
        """Room for so many bytes; what finds it there stays where it is."""
        if self._memory.numel() < size:
            with torch.inference_mode(False):  # so that it can be written whatever the mode of a later step
                self._memory = torch.empty(size, dtype=torch.uint8, device=self._memory.device)

    def put(self, host: Tensor) -> Tensor:
        """Start to copy a host array of bytes here."""
        if self._memory.numel() < host.numel():
            self.reserve(2 * host.numel())
        return self._memory[: host.numel()].copy_(host, non_blocking=True)


class Buffer:
    """Host arrays for the inputs of one step, and the tensors the model sees: the same memory on a CPU, on a device a
    copy in `place`, made in one piece.
    """

    def __init__(self, place: Place | None) -> None:
        self.place = place
        self.shape: Shape | None = None
        self._host = torch.empty(0, dtype=torch.uint8)

    def reshape(self, shape: Shape) -> None:
        """Arrays and tensors for a step of this shape; the memory grows when it must."""
        requests = shape[1]
        self._spans, self._size = _spans(shape)
        if self._host.numel() < self._size:
            pinned = self.place is not None and self.place.pinned
            self._host = torch.empty(2 * self._size, dtype=torch.uint8, pin_memory=pinned)
        self._parts = self._cut(self._host, requests)
        self.positions, self.slots, self.page_table, self.query_start, self.kv_lengths, self.rooms = (
            part.numpy() for part in self._parts[:6]
        )
        self.token_ids, self.logits_rows, self.rows = (part.numpy() for part in self._parts[6:])
        self.shape = shape

    def tensors(self) -> tuple[Tensor, ...]:
        """positions, slots, page_table, query_start, kv_lengths, rooms, token_ids, logits_rows, rows."""
        if self.place is None:
            return self._parts
        return self._cut(self.place.put(self._host[: self._size]), len(self.kv_lengths))

    def _cut(self, memory: Tensor, requests: int) -> tuple[Tensor, ...]:
        types = (torch.int32,) * 6 + (torch.int64,) * 3
        positions, slots, table, *rest = (memory[a:b].view(type) for type, (a, b) in zip(types, self._spans))
        return (positions, slots, table.view(requests, -1), *rest)


def _spans(shape: Shape) -> tuple[list[tuple[int, int]], int]:
    """Bytes of the parts of a step's inputs, which lie one after the other, each aligned; and the size of all."""
    tokens, requests, columns, logits, sampled = shape
    fours = (tokens, tokens, requests * columns, requests + 1, requests, requests)
    spans, start = [], 0
    for size in (*(4 * n for n in fours), *(8 * n for n in (tokens, logits, sampled))):
        spans.append((start, start + size))
        start += -(-size // ALIGN) * ALIGN
    return spans, start


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """A step ready to run. sampled: the entries whose last logits (and those before their drafts) give a token; rows
    [S] int64, on the device: their rows.

    picks: places of those logits among the step's, None where they are all of them in order.
    """

    step: Step
    entries: tuple[Entry, ...]
    sampled: tuple[Entry, ...]
    picks: list[int] | None
    rows: Tensor


class Rows:
    """Page tables, rooms and last tokens of up to `max_batch` running sequences of up to `max_pages` pages.

    last_token [max_batch] int64, on the device: what each row sampled last, for steps planned before it is read
    (lookahead > 0). beside: rows of another model over the same pages, whose page tables these are too. bucket: what
    steps of decodes only are padded to, requests and page columns; an idle request has length 0 and slot -1.

    apart: a token and its drafts are given to the model as so many decodes of one row, each a token longer than the one
    before, rather than as a chunk: all K and V of a step are written before any is read. So steps with drafts have the
    shapes of decodes, and on a GPU their kernels and graphs.

    turned: whether tokens after pictures turn by other positions than their place in the sequence.
    """

    def __init__(
        self,
        max_batch: int,
        max_pages: int,
        kv: KVStore,
        device: torch.device,
        lookahead: int,
        beside: "Rows | None" = None,
        bucket: Bucket = strides,
        turned: bool = False,
    ) -> None:
        self.kv = kv
        self.turned = turned
        self.bucket = bucket
        self.lookahead = lookahead
        self.max_pages = max_pages
        self.page_size = kv.spec.page_size
        own = np.zeros((max_batch, max_pages), dtype=np.int32)
        self.tables: np.ndarray = own if beside is None else beside.tables
        self.rooms = np.zeros(max_batch, dtype=np.int32)
        self.last_token = torch.zeros(max_batch, dtype=torch.int64, device=device)
        # A plan is at most two batches (see Runner.forward).
        place = None if device.type == "cpu" else Place(device)
        self._buffers = [Buffer(place) for _ in range(2 * (lookahead + 1))]
        self._turn = 0
        self.apart = device.type != "cpu"

    def twin(self, kv: KVStore | None = None, device: torch.device | None = None) -> "Rows":
        """The same rows for steps of another lane, whose inputs must not be overwritten by those of this one; on
        another device over a store of its own, whose page numbers mean the same.
        """
        other = copy.copy(self)
        if kv is not None and device is not None:
            other.kv, other.last_token = kv, torch.zeros_like(self.last_token, device=device)
        place = None if self._buffers[0].place is None else Place(other.last_token.device)
        other._buffers = [Buffer(place) for _ in self._buffers]
        return other

    def reserve(self, tokens: int) -> None:
        """Memory for the inputs of steps of up to so many tokens: a captured step finds its inputs where they were when
        it was captured, so what it was captured for must not move.
        """
        place, rows = self._buffers[0].place, len(self.tables)
        if place is not None:
            place.reserve(_spans((tokens, rows, self.max_pages, tokens, tokens))[1])

    def idle(self, requests: int, pages: int) -> Step:
        """A step of decodes that are nobody's, in the shape and the place of one of so many requests in page tables of
        so many pages. Of the cache it reads and writes nothing.
        """
        buffer = self._next()
        padded = self._shape_decodes(buffer, requests, pages, 0)
        for part in (buffer.positions, buffer.page_table, buffer.kv_lengths, buffer.rooms, buffer.token_ids):
            part[:] = 0
        buffer.slots[:] = -1
        return self._batch(buffer, (), (), None, 0, 1, 1, padded).step

    def gather(self, entries: tuple[Entry, ...], decodes: int) -> Batch:
        """Inputs for these entries, of which the first `decodes` are single sampled tokens."""
        for entry in entries:
            if entry.sequence.synced != len(entry.sequence.pages):
                self._sync(entry)
        buffer = self._next()
        known = entries[decodes:]
        if all(_decodes(e) or (self.apart and e.drafts) for e in known):
            drawn = draws(entries) if any(e.drafts for e in known) else entries
            return self._gather_decodes(entries, drawn, decodes, buffer)
        return self._gather_mixed(entries, decodes, buffer)

    def _next(self) -> Buffer:
        """The buffer that was used longest ago."""
        self._turn = (self._turn + 1) % len(self._buffers)
        return self._buffers[self._turn]

    def _shape_decodes(self, buffer: Buffer, requests: int, pages: int, sampled: int) -> int:
        """Bring a buffer to the shape of a step of decodes; the requests to which it is padded."""
        padded, columns = self.bucket(requests, pages)
        shape = (padded, padded, min(columns, self.max_pages), padded, sampled)
        if buffer.shape != shape:
            buffer.reshape(shape)
            buffer.query_start[:] = np.arange(padded + 1)
            buffer.logits_rows[:] = np.arange(padded)
        return padded

    def keep(self, rows: Tensor, tokens: Tensor) -> None:
        """Remember what rows sampled."""
        if self.lookahead:
            self.last_token[rows] = tokens

    def _sync(self, entry: Entry) -> None:
        """Bring a row's page table up to date with its sequence's pages."""
        self.rooms[entry.row] = entry.sequence.room
        pages, start = entry.sequence.pages, entry.sequence.synced
        self.tables[entry.row, start : len(pages)] = pages[start:]
        entry.sequence.synced = len(pages)

    def _gather_decodes(
        self, entries: tuple[Entry, ...], drawn: tuple[Entry, ...], decodes: int, buffer: Buffer
    ) -> Batch:
        """drawn: the single tokens of which the entries are made, see `draws`."""
        count = len(drawn)
        positions = [e.start + e.length - 1 for e in drawn]
        longest = max(positions) + 1
        padded = self._shape_decodes(buffer, count, -(-longest // self.page_size), len(entries))
        buffer.rows[:] = [e.row for e in entries]
        buffer.positions[:count] = positions
        np.add(buffer.positions, 1, out=buffer.kv_lengths)
        ondevice = decodes if self.lookahead else 0
        buffer.token_ids[ondevice:count] = [
            e.drafts[-1] if e.drafts else e.sequence.tokens[e.start] for e in drawn[ondevice:]
        ]
        rows = buffer.rows if drawn is entries else np.array([e.row for e in drawn])
        if padded != count:
            rows = np.pad(rows, (0, padded - count))
            buffer.positions[count:] = 0
            buffer.token_ids[count:] = 0
        self._place(buffer, rows, rows)
        if self.turned:
            buffer.positions[:count] += [e.sequence.layout.shift if e.sequence.layout else 0 for e in drawn]
        buffer.kv_lengths[count:] = 0
        buffer.slots[count:] = -1
        return self._batch(buffer, entries, entries, None, ondevice, 1, longest, padded, count > len(entries))

    def _gather_mixed(self, entries: tuple[Entry, ...], decodes: int, buffer: Buffer) -> Batch:
        counts = np.array([e.length for e in entries])
        ends = np.cumsum(counts)
        lengths = np.array([e.start + e.length for e in entries])
        rows = np.array([e.row for e in entries])
        logits, picks = _wanted(entries, ends)
        sampled = tuple(e for e in entries if e.sample)
        longest = int(lengths.max())
        columns = min(strides(0, -(-longest // self.page_size))[1], self.max_pages)
        buffer.reshape((int(ends[-1]), len(entries), columns, len(logits), len(sampled)))
        buffer.rows[:] = [e.row for e in sampled]
        buffer.positions[:] = np.arange(ends[-1]) + np.repeat(lengths - ends, counts)
        buffer.kv_lengths[:] = lengths
        buffer.query_start[0] = 0
        buffer.query_start[1:] = ends
        buffer.logits_rows[:] = logits
        ondevice = decodes if self.lookahead else 0
        known = chain.from_iterable(e.tokens() for e in entries[ondevice:])
        buffer.token_ids[ondevice:] = list(known)
        self._place(buffer, rows, np.repeat(rows, counts))
        if self.turned:
            self._set_turns(buffer, entries, ends.tolist())
        return self._batch(buffer, entries, sampled, picks, ondevice, int(counts.max()), longest, decodes)

    def _set_turns(self, buffer: Buffer, entries: tuple[Entry, ...], ends: list[int]) -> None:
        """From here on positions say what tokens turn by, and no longer where they go."""
        for entry, end in zip(entries, ends):
            layout = entry.sequence.layout
            if layout is not None:
                buffer.positions[end - entry.length : end] = layout.positions(entry.start, entry.start + entry.length)

    def _place(self, buffer: Buffer, rows: np.ndarray, token_rows: np.ndarray) -> None:
        """The page tables of the requests' rows, and each token's slot in its row's pages."""
        np.take(self.tables[:, : buffer.page_table.shape[1]], rows, axis=0, out=buffer.page_table, mode="clip")
        np.take(self.rooms, rows, out=buffer.rooms, mode="clip")
        pages, offsets = np.divmod(buffer.positions, self.page_size)
        np.multiply(self.tables[token_rows, pages], self.page_size, out=buffer.slots)
        np.add(buffer.slots, offsets, out=buffer.slots)

    def _batch(
        self,
        buffer: Buffer,
        entries: tuple[Entry, ...],
        sampled: tuple[Entry, ...],
        picks: list[int] | None,
        ondevice: int,
        max_query: int,
        max_kv: int,
        decodes: int,
        shared: bool = False,
    ) -> Batch:
        """decodes, shared: as `Contexts` has them; idle requests of a padded step count as decodes."""
        positions, slots, page_table, query_start, kv_lengths, rooms, token_ids, logits_rows, rows = buffer.tensors()
        if ondevice:
            torch.index_select(self.last_token, 0, rows[:ondevice], out=token_ids[:ondevice])
        step = Step(
            *(positions, slots, page_table, query_start, kv_lengths, max_query, max_kv),
            decodes=decodes,
            shared=shared,
            rooms=rooms if self.kv.rooms else None,
            token_ids=token_ids,
            logits_rows=logits_rows,
            kv=self.kv,
        )
        return Batch(step, entries, sampled, picks, rows)


def _decodes(entry: Entry) -> bool:
    """Whether an entry of text that is known is computed as a decode is, and in the same shapes: the one token of a
    prompt that the prefix cache does not have. In a prompt with pictures its position would be another, and what is
    pooled is not padded.
    """
    own = entry.sequence
    return entry.length == 1 and entry.sample and own.layout is None and own.request.pool is None


def _wanted(entries: tuple[Entry, ...], ends: np.ndarray) -> tuple[list[int], list[int] | None]:
    """Tokens whose logits are wanted, and the places among them that are sampled (None: all)."""
    logits: list[int] = []
    picks: list[int] = []
    for entry, end in zip(entries, ends.tolist()):
        drawn = len(entry.drafts) + 1 if entry.sample else 0
        if entry.sequence.want_prompt_logprobs:
            logits += range(end - entry.length, end)
        else:
            logits += range(end - drawn, end)
        picks += range(len(logits) - drawn, len(logits))
    return logits, None if len(picks) == len(logits) else picks
