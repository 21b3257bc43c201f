"""A step is what a long run has more than a short one, divided by the steps between."""

from tenfold.bench import profile
from tenfold.bench.profile import Kernel


def test_a_step_is_the_difference_of_runs() -> None:
    short = profile.added_up([("prefill", 0.0, 100.0), ("linear", 100.0, 105.0), ("linear", 104.0, 111.0)])
    assert short == {"prefill": Kernel(1, 100.0, 100.0), "linear": Kernel(2, 12.0, 11.0)}
    linear = [("linear", 100.0 + 6 * i, 106.0 + 6 * i) for i in range(10)]
    long = profile.added_up([("decode", 158.0, 162.0), ("decode", 163.0, 165.0), *linear, ("prefill", 0.0, 100.0)])
    assert profile.a_step(long, short, 4) == {
        "prefill": Kernel(0.0, 0.0, 0.0),
        "linear": Kernel(2.0, 12.0, 12.25),
        "decode": Kernel(0.5, 1.5, 1.25),
    }


def test_what_a_kernel_adds_begins_where_the_one_in_front_ended() -> None:
    found = profile.added_up([("a", 0.0, 10.0), ("b", 2.0, 13.0), ("c", 20.0, 24.0)])
    assert [kernel.adds for kernel in found.values()] == [10.0, 3.0, 11.0]


def test_the_longest_come_first_and_what_ran_no_time_is_left_out() -> None:
    told = profile.lines({"a": Kernel(2, 3.0, 1.0), "b": Kernel(1, 5.0, 5.0), "c": Kernel(0.0, 0.0)}, 6.5)
    assert [line.split()[-1] for line in told] == ["clock", "b", "a"]
    assert told[0].strip() == "8.0 us in all, 6.5 us by the clock"
    assert told[2].split()[-4:] == ["1.50", "adds", "0.50", "a"]
