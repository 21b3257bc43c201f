"""Bad days: which are chosen, and what is kept of a run beside what was kept before."""

import pytest

from tenfold.bench import chaos
from tenfold.bench.chaos import ALONE, SHARED, Row, Slope, beside, claims_of

ROWS = [Row("engine gets SIGKILL under load", True, 1.5, "all well"), Row("disk full for the log", False, None, "hm")]
SLOPE = Slope(1.0, 2.5, 300, 0, [(0.0, 1, 2)])


def test_scenarios_are_chosen_by_name_and_keep_their_order():
    assert chaos.chosen([]) == [*SHARED, *ALONE]
    assert chaos.chosen(["drain", "kill"]) == ["kill", "drain"]
    assert chaos.chosen(["none"]) == []
    for wrong in (["nothing"], ["none", "kill"]):
        with pytest.raises(ValueError, match=r"^scenario is 'no[a-z]+'; allowed: kill, .*; none alone"):
            chaos.chosen(wrong)


def test_without_scenarios_and_soak_nothing_is_started():
    assert chaos.run("no model", ["none"], 0.0, pytest.fail) == ([], None)


def test_a_run_of_one_part_keeps_the_other():
    both = beside({}, ROWS, SLOPE, "commit a")
    assert [row["scenario"] for row in both["rows"]] == [row.scenario for row in ROWS]
    assert (both["soak"]["engine"], both["origin"]) == (2.5, {"rows": "commit a", "soak": "commit a"})
    soaked = beside(both, [], Slope(0.0, 0.5, 9, 0, []), "commit b")
    assert (soaked["rows"], soaked["soak"]["engine"]) == (both["rows"], 0.5)
    assert soaked["origin"] == {"rows": "commit a", "soak": "commit b"}
    days = beside(both, ROWS[:1], None, "commit c")
    assert (len(days["rows"]), days["soak"]) == (1, both["soak"])
    assert days["origin"] == {"rows": "commit c", "soak": "commit a"}
    assert both["origin"] == {"rows": "commit a", "soak": "commit a"}


def test_a_run_of_one_part_claims_no_other():
    days, soaked = claims_of(ROWS, None, 0), claims_of([], SLOPE, 30)
    assert [(c.value, c.command) for c in days] == [(1, "tenfold bench chaos --soak 0"), (1.5, days[0].command)]
    assert [(c.value, c.command) for c in soaked] == [(3.5, "tenfold bench chaos --only none --soak 30")]
    assert [c.what for c in claims_of(ROWS, SLOPE, 30)] == [c.what for c in (*days, *soaked)]
