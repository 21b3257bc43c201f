"""Bad days: which are chosen, and what is kept of a run beside what was kept before."""

import pytest
from typer.testing import CliRunner

from tenfold.bench import chaos, cli, cpu
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
    every = [*ROWS, *[Row("another", True, None, "well")] * (len(SHARED) + len(ALONE) - len(ROWS))]
    days, soaked = claims_of(every, None, 0, "default", "days"), claims_of([], SLOPE, 30, "default", "soak")
    assert [(c.value, c.unit, c.command) for c in days] == [(9, "of 10", "days"), (1.5, "s", "days")]
    assert [(c.value, c.command) for c in soaked] == [(3.5, "soak")]
    assert [c.what for c in claims_of(every, SLOPE, 30, "default", "")] == [c.what for c in (*days, *soaked)]


def test_some_scenarios_are_no_total():
    assert [c.what for c in claims_of(ROWS, None, 0, "default", "")] == ["recovery, engine gets SIGKILL under load"]


def test_another_model_replaces_no_claim_of_the_bundled_one():
    own, other = (
        {c.what for c in claims_of(ROWS, SLOPE, 30, model, "")} for model in ("default", "/models/other.gguf")
    )
    assert other == {f"{what}, other.gguf" for what in own}


@pytest.mark.parametrize(
    ("given", "command", "place"),
    [
        (["--only", "kill"], "tenfold bench chaos --only kill", "chaos-kill"),
        (["--only", "none", "--soak", "30"], "tenfold bench chaos --soak 30 --only none", "chaos"),
    ],
)
def test_what_was_left_out_is_recorded_apart(given, command, place, monkeypatch):
    found, kept = [], {}
    rows, slope = (ROWS[:1], None) if "kill" in given else ([], SLOPE)
    monkeypatch.setattr(chaos, "run", lambda *rest: (rows, slope))
    monkeypatch.setattr(cli, "header", lambda: None)
    monkeypatch.setattr(cli, "record", found.extend)
    monkeypatch.setattr(cpu, "save", kept.__setitem__)
    monkeypatch.setattr(cpu, "kept", lambda name: {})
    done = CliRunner().invoke(cli.app, ["chaos", *given, "--record"])
    assert done.exit_code == 0, done.output
    assert [c.command for c in found] == [command]
    assert list(kept) == [place]
