"""API keys: where they come from, and whose a request's credentials are.

Invariant: after reading, a key itself is nowhere in memory, in a log or in a metric; only its SHA-256 digest and its
public name are. A fast hash is right here, where it would be wrong for passwords: a key is random (128 bits and more),
so there is nothing to guess from a digest however fast guesses are, while a slow hash would let anyone keep the server
busy with wrong keys.
"""

import hashlib
import hmac
import logging
import os
import re
import stat
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tenfold.serve.settings import ServeConfig

logger = logging.getLogger("tenfold.serve")

ADMIN = "admin"  # the public name of the admin key
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
SENDABLE = re.compile(r"[\x21-\x7e]+")  # what a header carries unchanged
SHORT = 16  # characters; a random key of fewer can be guessed
RECHECK = 2.0  # seconds between looks at the key file
ADVICE = "Make one with: python -c 'import secrets; print(secrets.token_urlsafe(32))'"


@dataclass(frozen=True, slots=True)
class Key:
    """name: public, for metrics and logs. salt: of the prefix cache, so that keys never share pages. weak: short enough
    to be guessed."""

    name: str
    digest: bytes
    salt: str
    admin: bool = False
    weak: bool = False

    @classmethod
    def of(cls, secret: str, name: str = "", admin: bool = False) -> "Key":
        """The key for a secret; without a name it is called by the first digits of its digest."""
        digest = hashlib.sha256(secret.encode()).digest()
        salt = hashlib.sha256(b"salt" + digest).hexdigest()
        return cls(name or digest.hex()[:8], digest, salt, admin, len(secret) < SHORT)


class Keys:
    """All keys of a server. Without `--api-key` and `--api-key-file` the API is open; /admin never is."""

    def __init__(self, given: Iterable[Key], file: str = "", clock: Callable[[], float] = time.monotonic) -> None:
        """file: of more keys, read now and again when it changes. Raises ValueError for a file of no use, and for an
        admin key that is an API key, too."""
        self._given = tuple(given)
        self._file = Path(file) if file else None
        self._clock = clock
        self._looked = clock()
        self._seen = self._stamp()
        self._all = self._read()

    @classmethod
    def of(cls, settings: ServeConfig) -> "Keys":
        """The keys a server is set up with. Raises ValueError for one that no client could send, for a file that cannot
        be read, and where keys are asked for and none is there."""
        texts = [text.strip() for text in settings.api_key.split(",")] if settings.api_key else []
        given = [Key.of(_usable(text, "--api-key")) for text in texts if text]
        if texts and not given:
            raise ValueError(f"api_key is given but has no key in it. {ADVICE}")
        if settings.admin_key:
            given.append(Key.of(_usable(settings.admin_key, "--admin-key"), ADMIN, admin=True))
        return cls(given, settings.api_key_file)

    @property
    def required(self) -> bool:
        """Whether the API needs a key."""
        return self._file is not None or any(not key.admin for key in self._all)

    @property
    def has_admin(self) -> bool:
        return any(key.admin for key in self._all)

    def warn(self) -> None:
        """Say in the log where keys are handled carelessly."""
        if weak := [key.name for key in self._all if key.weak]:
            logger.warning("keys of fewer than %d characters can be guessed: %s. %s", SHORT, ", ".join(weak), ADVICE)
        if self._file is not None and stat.S_IMODE(os.stat(self._file).st_mode) & stat.S_IROTH:
            logger.warning("%s can be read by every user of this machine; chmod 600 it.", self._file)

    def names(self) -> list[str]:
        """The public names, in the order given. Several keys may share one: a tenant that changes its key."""
        return list(dict.fromkeys(key.name for key in self._all))

    def find(self, secret: bytes) -> Key | None:
        """Whose key this is. Every key is compared whichever one fits, so the time taken tells nothing about them."""
        self._renew()
        given = hashlib.sha256(secret).digest()
        found = None
        for key in self._all:
            if hmac.compare_digest(given, key.digest):
                found = key
        return found

    def _renew(self) -> None:
        """Read the file again if it changed. One of no use changes nothing: keys in use stay."""
        now = self._clock()
        if self._file is None or now - self._looked < RECHECK:
            return
        self._looked = now
        seen = self._stamp()
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._all = self._read()
            logger.warning("%s was read again: %d keys", self._file, len(self._all) - len(self._given))
        except ValueError as error:
            logger.error("the API keys stay as they were: %s", error)

    def _stamp(self) -> tuple[int, int, int] | None:
        if self._file is None:
            return None
        try:
            found = os.stat(self._file)
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _read(self) -> tuple[Key, ...]:
        keys = self._given + self._from_file()
        admins = {key.digest for key in keys if key.admin}
        if any(key.digest in admins for key in keys if not key.admin):
            raise ValueError(f"admin_key is also an API key; allowed: a key of its own. {ADVICE}")
        return keys

    def _from_file(self) -> tuple[Key, ...]:
        if self._file is None:
            return ()
        try:
            text = self._file.read_text("utf-8", "replace")
        except OSError as error:
            raise ValueError(f"api_key_file {self._file} cannot be read: {error.strerror or error}.") from None
        keys = tuple(read_keys(text, str(self._file)))
        if not keys:
            raise ValueError(f"api_key_file {self._file} has no key in it. Write one a line. {ADVICE}")
        return keys


def read_keys(text: str, where: str) -> Iterable[Key]:
    """Keys of a file: one a line, after it optionally its name; lines that begin with # do not count. Raises ValueError
    with the number of a wrong line, never with what is in it."""
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        place = f"{where} line {number}"
        name = words[1] if len(words) > 1 and not words[1].startswith("#") else ""
        if len(words) > 2 and not words[1].startswith("#") and not words[2].startswith("#"):
            raise ValueError(f"{place} has more than a key and a name.")
        if name and (not NAME.fullmatch(name) or name == ADMIN):
            raise ValueError(f"{place} has a name that is not allowed: up to 64 of A-Z a-z 0-9 . _ -, and not {ADMIN}.")
        yield Key.of(_usable(words[0], place), name)


def _usable(secret: str, where: str) -> str:
    """`secret` if a client can send it in a header. Raises ValueError, which does not say it."""
    if not SENDABLE.fullmatch(secret):
        raise ValueError(
            f"{where} has a key with spaces or characters outside ASCII, which no header carries. {ADVICE}"
        )
    return secret
