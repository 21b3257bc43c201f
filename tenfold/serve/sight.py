"""Pictures in conversations: parts of messages that name one, whatever API spelt them, and their way to the engine.

Invariant: what a client sends is a URL and nothing else; no text of a client ever names a file of this machine. Only
users' messages have pictures.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, TypeVar

from tenfold.base.pictures import PictureError
from tenfold.serve.errors import ApiError, invalid
from tenfold.serve.fetch import Fetcher, together
from tenfold.serve.service import Served

T = TypeVar("T")
Part = dict[str, Any]
Content = str | list[Part]

# Decoding takes memory and time that texts must not wait for: never more than two requests' pictures at a time.
PREPARING = ThreadPoolExecutor(2, "tenfold-pictures")


def picture(url: Any, where: str) -> Part:
    """A part that shows the picture at a URL. Raises ApiError."""
    if not isinstance(url, str) or not url:
        raise invalid(f"{where} must be the URL of a picture, a text.", where, "invalid_type")
    return {"type": "image", "url": url, "where": where}


def text(text: str) -> Part:
    return {"type": "text", "text": text}


def content(parts: list[Part]) -> Content:
    """Content of these parts: text where there is nothing else, joined by newlines."""
    if any(part["type"] == "image" for part in parts):
        return parts
    return "\n".join(part["text"] for part in parts)


def joined(before: Content, part: Part) -> Content:
    """Content with one more part; texts that follow each other are joined by a newline."""
    if isinstance(before, str) and part["type"] == "text":
        return "\n".join(filter(None, (before, part["text"])))
    parts = [text(before)] if isinstance(before, str) and before else [] if isinstance(before, str) else before
    return [*parts, part]


def shown(messages: list[dict[str, Any]]) -> list[Part]:
    """The pictures of a conversation."""
    contents = [message.get("content") for message in messages]
    return [part for parts in contents if isinstance(parts, list) for part in parts if part["type"] == "image"]


async def fetch(messages: list[dict[str, Any]], served: Served) -> bool:
    """Put the bytes of each picture beside its URL; whether there are any. Raises ApiError (400)."""
    parts = shown(messages)
    if not parts:
        return False
    first = parts[0]["where"]
    if not getattr(served.llm, "sees", False):
        raise invalid(f"{first} is an image; this model reads text only.", first, "unsupported_content")
    most = served.settings.max_images
    if len(parts) > most:
        raise invalid(f"{first} and others are {len(parts)} images; allowed: up to {most} (--max-images).", first)
    fetcher = Fetcher.of(served.settings)
    await together([_fetch(part, fetcher) for part in parts if "image" not in part])
    return True


async def _fetch(part: Part, fetcher: Fetcher) -> None:
    try:
        part["image"] = await fetcher.fetch(part["url"])
    except PictureError as error:
        raise refused(error, part["where"]) from None


async def aside(pictured: bool, work: Callable[..., T], *given: Any) -> T:
    """What `work` gives, off the event loop; pictured: where others that prepare pictures wait for each other."""
    if not pictured:
        return await asyncio.to_thread(work, *given)
    run = copy_context().run
    return await asyncio.get_running_loop().run_in_executor(PREPARING, lambda: run(work, *given))


def refused(error: ValueError, where: str) -> ApiError:
    """What a client is told of a picture that cannot be taken."""
    return invalid(str(error), where, "invalid_image")
