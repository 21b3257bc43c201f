"""Steps that are made up: they read whatever the pages of a KV store hold, and write nothing. Kernels are compiled with
them before somebody waits for it, and whole steps measured.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch

from tenfold.base.log import logger
from tenfold.engine.runner import Runner
from tenfold.nn.step import Step
from tenfold.ops.gpu import graphs, pieces

Size = tuple[int, int, int]  # requests, new tokens of each, tokens of its context
CONTEXTS = (128, 1024, 4096, 16384)  # tokens of each that decodes: attention runs in other ways as they grow


def made_up(runner: Runner, requests: int, new: int, length: int, each: Sequence[int] = ()) -> Step:
    """A step of requests with `new` tokens each, at the end of contexts of `length`, in pages of their own for as far
    as the store has them. Tokens are random, so that experts are picked evenly. each: lengths where contexts differ, up
    to `length`.
    """
    lengths = list(each) or [length] * requests
    size, device = runner.kv.spec.page_size, runner.device
    count = requests * new

    def numbers(values: list[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    columns = -(-length // size)
    if new == 1:
        _, columns = runner.rows.bucket(requests, columns)
    draw = torch.Generator().manual_seed(count)
    ids = torch.randint(runner.model.config.vocab_size, (count,), generator=draw)
    pages = torch.arange(requests * columns, dtype=torch.int32, device=device) % runner.kv.pages
    return Step(
        token_ids=ids.to(device),
        positions=numbers([at for end in lengths for at in range(end - new, end)]),
        slots=torch.full((count,), -1, dtype=torch.int32, device=device),
        page_table=pages.view(requests, columns),
        query_start=torch.arange(0, count + 1, new, dtype=torch.int32, device=device),
        kv_lengths=numbers(lengths),
        logits_rows=numbers(list(range(new - 1, count, new)), torch.int64),
        max_query=new,
        max_kv=length,
        decodes=requests if new == 1 else 0,
        kv=runner.kv,
        rooms=torch.zeros(requests, dtype=torch.int32, device=device) if runner.kv.rooms else None,
    )


def decodes(max_batch: int, max_len: int, held: int, contexts: Iterable[int] = CONTEXTS) -> Iterator[Size]:
    """Steps of decodes that between them want every kernel of an engine of this size. held: tokens that its store has
    room for; steps of more never come, but for the shortest contexts.
    """
    padded = dict.fromkeys(graphs.bucket(n, 1)[0] for n in range(1, min(max_batch, graphs.LARGEST) + 1))
    lengths = sorted({min(context, max_len) for context in contexts})
    yield from ((n, 1, length) for length in lengths for n in padded if length == lengths[0] or n * length <= held)


def chunks(most: int) -> Iterator[Size]:
    """Likewise of prompts of up to so many tokens."""
    padded = dict.fromkeys(pieces.bucket(n) for n in range(2, min(most, pieces.MOST_TOKENS) + 1))
    yield from ((1, n, n) for n in dict.fromkeys((*(n for n in padded if n <= most), most)) if n > 1)


def shapes(runner: Runner, max_batch: int, contexts: Sequence[int] = ()) -> list[tuple[int, int]]:
    """Requests and pages of every step of decodes that is captured, the largest first, whose memory serves all.
    contexts: tokens of the longest that count, where not all do.
    """
    padded = sorted({graphs.bucket(n, 1)[0] for n in range(1, min(max_batch, graphs.LARGEST) + 1)}, reverse=True)
    most, size = runner.rows.max_pages, runner.kv.spec.page_size
    wanted = [min(-(-tokens // size), most) for tokens in contexts] or range(1, most + 1)
    columns = sorted({graphs.bucket(1, pages)[1] for pages in wanted}, reverse=True)
    return [(requests, min(pages, most)) for pages in columns for requests in padded]


def capture(runner: Runner, tokens: int, sizes: Iterable[tuple[int, int]]) -> bool:
    """Compile what steps of decodes of these sizes want, and capture them, before somebody waits for it; whether all
    are. tokens: of the largest steps of all. What is not captured runs plainly; where it fails, the log says so.
    """
    runner.rows.reserve(tokens)
    for requests, pages in sizes:
        made = graphs.MADE.graphs
        try:
            runner.capture(requests, pages)
        except Exception as error:  # a compiler's complaint may be of any class
            _tell(error, "capturing a step of %d requests and %d pages failed", requests, pages)
            return False
        if graphs.MADE.graphs == made and runner.device.type == "cuda":
            return False
    return True


def rehearse(runner: Runner, sizes: Iterable[Size], record: bool = False) -> None:
    """Run a step of each size. record: as steps run of which parts are recorded, so that these are; others without a
    graph. What cannot run is left to the request that wants it.
    """
    layers = range(runner.model.config.layers)
    with torch.inference_mode():
        for size in sizes:
            try:
                step = made_up(runner, *size)
                if record and len(step.token_ids) <= pieces.MOST_TOKENS:
                    for _ in range(2):  # the second time is recorded
                        runner.model.forward(step)
                else:
                    runner.model.part(step, None, layers)
            except Exception as error:  # a compiler's complaint may be of any class
                _tell(error, "a rehearsal of %d requests with %d of %d tokens failed", *size)
                return


def _tell(error: Exception, what: str, *sizes: int) -> None:
    logger.warning(f"{what}: %s", *sizes, (str(error) or repr(error)).splitlines()[0])
