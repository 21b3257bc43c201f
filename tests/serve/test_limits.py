"""What a key may use, by a clock that the test sets."""

import pytest

from tenfold.serve.errors import ApiError
from tenfold.serve.limits import Limits


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def refused(limits, key="a"):
    """Retry-After of the refusal."""
    with pytest.raises(ApiError) as caught:
        limits.admit(key)
    error = caught.value
    assert (error.status, error.code) == (429, "rate_limit_exceeded")
    assert error.payload()["error"]["type"] == "rate_limit_error"
    assert f"{error.headers['retry-after']} s" in error.message
    return int(error.headers["retry-after"])


def shown(limits, key="a"):
    return {name.decode().removeprefix("x-ratelimit-"): value.decode() for name, value in limits.headers(key)}


def test_no_limits(clock):
    limits = Limits(clock=clock)
    for _ in range(1000):
        limits.admit("a")
    assert limits.headers("a") == []
    assert limits.usage("a") == {"under_way": 1000, "requests_this_minute": 1000, "tokens_this_minute": 0}


def test_concurrency(clock):
    limits = Limits(concurrency=2, clock=clock)
    tickets = [limits.admit("a"), limits.admit("a")]
    assert refused(limits) == 1
    limits.admit("b").close()
    tickets[0].close()
    limits.admit("a")
    assert refused(limits) == 1


def test_a_ticket_is_under_way_until_the_last_who_holds_it_closes(clock):
    limits = Limits(concurrency=1, clock=clock)
    ticket = limits.admit("a")
    ticket.hold()
    ticket.close()
    assert refused(limits) == 1
    ticket.close(tokens=7)
    assert limits.usage("a") == {"under_way": 0, "requests_this_minute": 1, "tokens_this_minute": 7}
    ticket.hold()  # work in the background that begins after the response has ended
    assert refused(limits) == 1
    ticket.close()
    limits.admit("a")


def test_requests_a_minute(clock):
    limits = Limits(requests=6, clock=clock)
    for left in (5, 4, 3, 2, 1, 0):
        limits.admit("a").close()
        assert shown(limits)["remaining-requests"] == str(left)
    assert refused(limits) == 10
    limits.admit("b")
    clock.now += 9.5
    assert refused(limits) == 1
    clock.now += 0.5
    limits.admit("a")
    assert refused(limits) == 10
    clock.now += 3600
    assert shown(limits)["remaining-requests"] == "6", "no more than a minute's worth is saved up"


def test_waiting_as_long_as_told_is_enough(clock):
    limits = Limits(requests=7, tokens=1000, clock=clock)
    for _ in range(200):
        try:
            limits.admit("a").close(tokens=331)
        except ApiError as error:
            clock.now += int(error.headers["retry-after"])
            limits.admit("a").close(tokens=331)


def test_tokens_a_minute_are_charged_after_and_their_debt_waited_for(clock):
    limits = Limits(tokens=600, clock=clock)
    ticket = limits.admit("a")
    ticket.close(tokens=900)
    assert shown(limits) == {"limit-tokens": "600", "remaining-tokens": "0", "reset-tokens": "1m30s"}
    assert refused(limits) == 31  # 300 owed and one to have, at 10 a second
    clock.now += 31
    limits.admit("a")
    assert limits.usage("a")["tokens_this_minute"] == 900
    clock.now += 29
    assert limits.usage("a")["tokens_this_minute"] == 0


def test_headers_as_openai_writes_them(clock):
    limits = Limits(requests=60, tokens=6000, clock=clock)
    limits.admit("a").close(tokens=50)
    assert shown(limits) == {
        "limit-requests": "60",
        "remaining-requests": "59",
        "reset-requests": "1s",
        "limit-tokens": "6000",
        "remaining-tokens": "5950",
        "reset-tokens": "500ms",
    }


def test_the_exempt_are_counted_but_not_refused(clock):
    limits = Limits(concurrency=1, requests=1, clock=clock)
    tickets = [limits.admit("admin", exempt=True) for _ in range(3)]
    assert limits.usage("admin")["under_way"] == 3
    assert len(tickets) == 3


def test_a_refused_request_costs_nothing(clock):
    limits = Limits(concurrency=1, requests=10, clock=clock)
    limits.admit("a")
    for _ in range(50):
        refused(limits)
    assert shown(limits)["remaining-requests"] == "9"
    assert limits.usage("a")["requests_this_minute"] == 1
