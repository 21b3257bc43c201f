"""A step is what a long run has more than a short one, divided by the steps between."""

from tenfold.bench import profile
from tenfold.bench.profile import Kernel


def test_a_step_is_the_difference_of_runs() -> None:
    short = profile.added_up([("prefill", 100.0), ("linear", 5.0), ("linear", 7.0)])
    assert short == {"prefill": Kernel(1, 100.0), "linear": Kernel(2, 12.0)}
    long = profile.added_up([("prefill", 100.0), *[("linear", 6.0)] * 10, ("decode", 2.0), ("decode", 4.0)])
    assert profile.a_step(long, short, 4) == {
        "prefill": Kernel(0.0, 0.0),
        "linear": Kernel(2.0, 12.0),
        "decode": Kernel(0.5, 1.5),
    }


def test_the_longest_come_first_and_what_ran_no_time_is_left_out() -> None:
    told = profile.lines({"a": Kernel(2, 3.0), "b": Kernel(1, 5.0), "c": Kernel(0.0, 0.0)}, 6.5)
    assert [line.split()[-1] for line in told] == ["clock", "b", "a"]
    assert told[0].strip() == "8.0 us in all, 6.5 us by the clock"
    assert "1.50" in told[2]
