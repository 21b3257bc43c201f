"""What one API key may use: requests under way, requests a minute, tokens a minute.

Invariant: memory is bounded by the number of keys, and only a monotonic clock is read, so setting the machine's clock
neither locks anyone out nor lets anyone in.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from tenfold.serve.errors import ApiError
from tenfold.serve.settings import ServeConfig

MINUTE = 60.0
ROUNDING = 1e-6  # what sums of small refills may be short of


class Bucket:
    """A token bucket that holds a minute's worth and fills evenly. It may be overdrawn: what a request costs is known
    only when it is over, and the debt is waited for."""

    def __init__(self, size: int, now: float) -> None:
        self.size = size
        self._level = float(size)
        self._at = now

    def level(self, now: float) -> float:
        self._level = min(self.size, self._level + (now - self._at) * self.size / MINUTE)
        self._at = now
        return self._level

    def take(self, amount: float, now: float) -> None:
        self._level = self.level(now) - amount

    def wait(self, amount: float, now: float) -> float:
        """Seconds until `amount` is there; 0 where it is."""
        lacking = amount - self.level(now)
        return lacking * MINUTE / self.size if lacking > ROUNDING else 0.0


@dataclass(slots=True)
class Account:
    """Of one key: what is under way, and what it used in the minute that began at `since`."""

    requests: Bucket | None
    tokens: Bucket | None
    since: float
    running: int = 0
    sent: int = 0
    used: int = 0

    def turn(self, now: float) -> None:
        """Begin a new minute if the last one is over."""
        if now - self.since >= MINUTE:
            self.since, self.sent, self.used = now, 0, 0


class Ticket:
    """One admitted request. It is under way until everyone who holds it has closed it: the response, and work that may
    outlive the response."""

    __slots__ = ("_holders", "_limits", "key")

    def __init__(self, limits: "Limits", key: str) -> None:
        self._limits = limits
        self._holders = 1
        self.key = key

    def hold(self) -> None:
        """One more holder; also of a ticket that all others have closed, for work in the background."""
        if self._holders == 0:
            self._limits.enter(self.key)
        self._holders += 1

    def close(self, tokens: int = 0) -> None:
        """Once for the ticket and once for each `hold`, with the tokens that were used meanwhile."""
        if tokens:
            self._limits.charge(self.key, tokens)
        self._holders -= 1
        if self._holders == 0:
            self._limits.leave(self.key)


class Limits:
    """The accounts of all keys; 0 means no limit. `key` is a public name, "" for everybody where no key is needed."""

    def __init__(
        self, concurrency: int = 0, requests: int = 0, tokens: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._concurrency = concurrency
        self._requests = requests
        self._tokens = tokens
        self._clock = clock
        self._accounts: dict[str, Account] = {}

    @classmethod
    def of(cls, settings: ServeConfig) -> "Limits":
        return cls(settings.key_concurrency, settings.key_requests_per_minute, settings.key_tokens_per_minute)

    def admit(self, key: str, exempt: bool = False) -> Ticket:
        """Count a request in. exempt: counted, never refused. Raises ApiError (429) that says when to come back."""
        now = self._clock()
        account = self._account(key, now)
        if not exempt:
            self._check(account, now)
        account.turn(now)
        account.sent += 1
        if account.requests:
            account.requests.take(1, now)
        self.enter(key)
        return Ticket(self, key)

    def charge(self, key: str, tokens: int) -> None:
        """Tokens of prompt and answer that the key used."""
        now = self._clock()
        account = self._account(key, now)
        account.turn(now)
        account.used += tokens
        if account.tokens:
            account.tokens.take(tokens, now)

    def enter(self, key: str) -> None:
        self._accounts[key].running += 1

    def leave(self, key: str) -> None:
        self._accounts[key].running -= 1

    def headers(self, key: str) -> list[tuple[bytes, bytes]]:
        """The x-ratelimit headers that OpenAI's clients read, for those limits that are set."""
        if not (self._requests or self._tokens):
            return []
        now = self._clock()
        account = self._account(key, now)
        buckets = (("requests", account.requests), ("tokens", account.tokens))
        return [
            (f"x-ratelimit-{what}-{name}".encode(), value.encode())
            for name, bucket in buckets
            if bucket
            for what, value in _standing(bucket, now)
        ]

    def usage(self, key: str) -> dict[str, int]:
        """Requests under way, and requests and tokens of this minute."""
        account = self._account(key, now := self._clock())
        account.turn(now)
        return {"under_way": account.running, "requests_this_minute": account.sent, "tokens_this_minute": account.used}

    def _check(self, account: Account, now: float) -> None:
        if self._concurrency and account.running >= self._concurrency:
            raise _refusal(f"has {account.running} requests under way, as many as it may (--key-concurrency)", 1.0)
        if account.requests and (wait := account.requests.wait(1, now)):
            raise _refusal(f"has sent its {self._requests} requests a minute (--key-requests-per-minute)", wait)
        if account.tokens and (wait := account.tokens.wait(1, now)):
            raise _refusal(f"has used its {self._tokens} tokens a minute (--key-tokens-per-minute)", wait)

    def _account(self, key: str, now: float) -> Account:
        account = self._accounts.get(key)
        if account is None:
            requests = Bucket(self._requests, now) if self._requests else None
            tokens = Bucket(self._tokens, now) if self._tokens else None
            account = self._accounts[key] = Account(requests, tokens, now)
        return account


def _refusal(why: str, wait: float) -> ApiError:
    seconds = max(1, math.ceil(wait))
    message = f"This API key {why}. Try again in {seconds} s."
    return ApiError(429, message, code="rate_limit_exceeded", headers={"retry-after": str(seconds)})


def _standing(bucket: Bucket, now: float) -> tuple[tuple[str, str], ...]:
    """Limit, what is left of it, and when all of it is there again."""
    left = max(0, math.floor(bucket.level(now)))
    return ("limit", str(bucket.size)), ("remaining", str(left)), ("reset", _duration(bucket.wait(bucket.size, now)))


def _duration(seconds: float) -> str:
    """As OpenAI writes it: "120ms", "59s", "6m0s"."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    whole = math.ceil(seconds)
    return f"{whole}s" if whole < 60 else f"{whole // 60}m{whole % 60}s"
