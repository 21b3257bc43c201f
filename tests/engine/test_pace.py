"""When steps are planned, by a clock of the test's own."""

from dataclasses import dataclass, field

import pytest

from tenfold.engine.pace import HEADROOM, KEPT, POLL, SLACK, Pace

STEP, HOST = 0.010, 0.001


@dataclass
class Time:
    now: float = 0.0
    slept: list[float] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert 0 < seconds <= POLL
        self.slept.append(seconds)
        self.now += seconds


class Device:
    """Steps of given lengths that are launched ahead and read in order."""

    def __init__(self) -> None:
        self.time = Time()
        self.pace = Pace(self.time, self.time.sleep)
        self.begins = [0.0]
        self.ends = [0.0]
        self.waited = 0.0  # seconds in which nothing ran

    def step(self, seconds: float = STEP, host: float = HOST) -> float:
        """Rest, plan and launch a step, read the one before it: seconds before the end of that one, at which this one
        was planned.
        """
        self.pace.rest(lambda: self.time.now >= self.ends[-1])
        planned = self.time.now
        self.time.now += host
        self.pace.launched()
        before = self.ends[-1]
        self.waited += max(0.0, self.time.now - before)
        self.begins.append(max(before, self.time.now))
        self.ends.append(self.begins[-1] + seconds)
        self.time.now = max(self.time.now, before)
        self.pace.read(followed=True)
        return before - planned


@pytest.fixture
def device() -> Device:
    device = Device()
    for _ in range(3):
        device.step()
    device.waited = 0.0
    return device


def test_steps_are_planned_just_before_the_one_under_way_ends(device: Device) -> None:
    for _ in range(5):
        before = device.step()
        assert HEADROOM * HOST <= before <= HEADROOM * HOST + SLACK + POLL
    assert device.waited == 0.0


def test_what_was_slow_of_late_is_given_time(device: Device) -> None:
    device.step(host=4 * HOST)
    for _ in range(KEPT - 1):
        assert device.step() >= HEADROOM * 4 * HOST
    device.waited = 0.0
    device.step()
    assert device.step() < 4 * HOST
    assert device.waited == 0.0


def test_longer_steps_are_planned_for_the_shortest_of_late(device: Device) -> None:
    device.step(3 * STEP)
    assert device.step() >= 2 * STEP
    assert device.waited == 0.0


def test_a_shorter_step_is_noticed_when_it_ends(device: Device) -> None:
    device.step(STEP / 4)
    device.step()
    assert device.waited <= HOST + POLL + 1e-9


def test_nothing_is_waited_for_before_a_step_was_seen() -> None:
    time = Time()
    pace = Pace(time, time.sleep)
    pace.rest(lambda: False)
    pace.launched()
    pace.read(followed=False)
    pace.rest(lambda: False)
    assert not time.slept


def test_time_in_which_nothing_ran_is_no_step(device: Device) -> None:
    device.time.now = device.ends[-1]
    device.pace.read(followed=False)
    device.time.now += 100.0
    device.pace.read(followed=True)  # the first after a pause
    device.begins.append(device.time.now)
    device.ends.append(device.time.now + STEP)
    assert device.step() <= HEADROOM * HOST + SLACK + POLL
