"""What is to be judged, whatever API it came by: a text, pictures by URL, and where in the request they stood."""

from collections.abc import Sequence
from dataclasses import dataclass

from tenfold.serve.errors import invalid


@dataclass(frozen=True, slots=True)
class Linked:
    """A picture by its URL, which may be a data: URL."""

    url: str
    where: str


@dataclass(frozen=True, slots=True)
class Given:
    text: str
    pictures: tuple[Linked, ...] = ()
    where: str = "input"


def text_only(given: Given) -> str:
    """For models that read text. Raises ApiError (400) for a picture."""
    if given.pictures:
        where = given.pictures[0].where
        raise invalid(f"{where} is an image; this model reads text.", where, "unsupported_content")
    return given.text


def check_pictures(given: Sequence[Given], most: int) -> None:
    """Raises ApiError (400) for more than a request may have."""
    count = sum(len(one.pictures) for one in given)
    if count > most:
        raise invalid(f"input has {count} images; allowed: up to {most} in one request (--max-images).", "input")
