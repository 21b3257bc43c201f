"""The table of choices: what is picked, what is kept on disk, and which files are ignored."""

import json
import logging

import pytest

from tenfold.ops.choose import Key, Table, batch_bucket

KEY = Key("linear", 960, 576, "q4_1", 8, 2)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "choices" / "cpu.json"


@pytest.mark.parametrize(
    ("batch", "bucket"), [(0, 1), (1, 1), (3, 3), (4, 4), (5, 8), (8, 8), (9, 16), (65, 128), (512, 512), (9999, 512)]
)
def test_batch_buckets(batch, bucket):
    assert batch_bucket(batch) == bucket


@pytest.mark.parametrize(
    ("times", "arm", "source", "second"),
    [
        ({}, "flat", "rule", None),
        ({"flat": 10.0, "tiled": 8.0, "gemv": 9.0}, "tiled", "measured", "gemv"),
        ({"flat": 10.0, "tiled": 9.9}, "flat", "measured", "tiled"),  # within noise the rule stays
        ({"gemv": 5.0}, "gemv", "measured", None),
    ],
)
def test_pick(path, times, arm, source, second):
    table = Table("cpu", "v", path)
    if times:
        table.record(KEY, times)
    choice = table.pick(KEY, rule="flat")
    assert (choice.arm, choice.source, choice.runner_up) == (arm, source, second)
    assert choice.microseconds == times.get(arm)
    assert arm in str(choice)
    assert source in str(choice)


def test_saved_rows_come_back_and_those_of_others_are_kept(path):
    one, two = Table("cpu", "v", path), Table("cpu", "v", path)
    one.record(KEY, {"flat": 1.5})
    one.save()
    other = Key("linear", 1, 2, "f32", 1, 1)
    two.record(other, {"gemv": 2.0})
    two.save()
    again = Table("cpu", "v", path)
    assert (again.times(KEY), again.times(other), len(again)) == ({"flat": 1.5}, {"gemv": 2.0}, 2)
    assert [p.name for p in path.parent.iterdir()] == ["cpu.json"]


def saved(path):
    table = Table("cpu", "v", path)
    table.record(KEY, {"flat": 1.5})
    table.save()
    return json.loads(path.read_text())


def test_files_of_another_device_or_version_are_ignored(path, caplog):
    saved(path)
    assert len(Table("other", "v", path)) == 0
    assert len(Table("cpu", "w", path)) == 0
    assert {r.levelno for r in caplog.records} == {logging.WARNING}
    assert all("tenfold tune MODEL" in r.message for r in caplog.records)
    assert [("another device" in r.message, "other kernels" in r.message) for r in caplog.records] == [
        (True, False),
        (False, True),
    ]


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["choices"][0].update(rows=-1),
        lambda c: c["choices"][0].update(rows="960"),
        lambda c: c["choices"][0].update(rows=True),
        lambda c: c["choices"][0].update(extra=1),
        lambda c: c["choices"][0].pop("format"),
        lambda c: c["choices"][0].update(microseconds={"flat": "fast"}),
        lambda c: c["choices"][0].update(microseconds={"flat": float("nan")}),
        lambda c: c["choices"][0].update(microseconds={"flat": 10**400}),
        lambda c: c["choices"].append(None),
        lambda c: c.update(choices={}),
        lambda c: c.update(schema=99),
    ],
)
def test_malformed_rows_void_the_file_with_one_line(path, caplog, change):
    content = saved(path)
    change(content)
    path.write_text(json.dumps(content))
    table = Table("cpu", "v", path)
    assert len(table) == 0
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert table.ignored in caplog.text
    table.save()  # reads the file again, which is no second warning
    assert (table.ignored, len(caplog.records)) == ("", 1)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"[" * 100000, b"\x00", b'"\xed\xa0\x80"'])
def test_broken_files_are_ignored_and_replaced(path, text):
    path.parent.mkdir()
    path.write_bytes(text)
    assert len(Table("cpu", "v", path)) == 0
    saved(path)
    assert len(Table("cpu", "v", path)) == 1


def test_device_names_make_safe_file_names(monkeypatch, tmp_path):
    monkeypatch.setenv("TENFOLD_HOME", str(tmp_path))
    table = Table("cpu ../../etc/pass wd / (R) 3.0GHz", "v")
    assert table.path.parent == tmp_path / "choices"
    table.save()
    assert table.path.exists()
