"""Building the kernels: the cache, and every way a machine can fail to have a compiler. Small sources keep it quick."""

import ctypes
import os
import stat
import threading

import pytest

from tenfold.ops.cpu import build as builder
from tenfold.ops.cpu import lib
from tenfold.ops.cpu.build import Build, build

if builder.find_compiler() is None:
    pytest.skip("no C compiler here", allow_module_level=True)


@pytest.fixture
def sources(tmp_path):
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "one.c").write_text('#include "one.h"\nint answer(void) { return ANSWER; }\n')
    (folder / "one.h").write_text('#define ANSWER 42\n__attribute__((visibility("default"))) int answer(void);\n')
    export = '__attribute__((visibility("default"))) '
    named = f"#define NAMED(isa) {export}int width_##isa(void) {{ return 1; }}\n"
    (folder / "two_simd.c").write_text(named + "#define EACH(isa) NAMED(isa)\nEACH(TF_ISA)\n")
    return folder


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path, monkeypatch):
    spare = tmp_path / "tmp"
    spare.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(spare))


def compiler_script(tmp_path, text):
    """A compiler made of shell; $REAL is the real one."""
    path = tmp_path / "mycc"
    real = " ".join(builder.find_compiler().command)
    path.write_text(f'#!/bin/sh\nREAL="{real}"\n{text}\n')
    path.chmod(0o755)
    return str(path)


def answer(result: Build) -> int:
    assert result.path is not None, result.reason
    return ctypes.CDLL(str(result.path)).answer()


def test_builds_once(sources, tmp_path):
    first = build(sources, tmp_path / "cache")
    second = build(sources, tmp_path / "cache")
    assert answer(first) == 42
    assert not first.cached
    assert second.cached
    assert second.path == first.path
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".so"]


def test_changed_header_builds_anew(sources, tmp_path):
    build(sources, tmp_path / "cache")
    (sources / "one.h").write_text((sources / "one.h").read_text().replace("42", "43"))
    assert answer(build(sources, tmp_path / "cache")) == 43


@pytest.mark.parametrize("damage", [b"", b"not a library", None])
def test_damaged_file_is_built_anew(sources, tmp_path, damage):
    path = build(sources, tmp_path / "cache").path
    path.write_bytes(path.read_bytes()[:-1] + b"?" if damage is None else damage)
    again = build(sources, tmp_path / "cache")
    assert not again.cached
    assert answer(again) == 42


def test_unwritable_cache_falls_back_to_a_private_folder(sources, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    result = build(sources, blocked / "cache")
    assert answer(result) == 42
    assert not stat.S_IMODE(result.path.parent.stat().st_mode) & 0o077
    assert build(sources, blocked / "cache").cached


def test_a_folder_others_can_write_is_not_loaded_from(sources, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    shared = build(sources, blocked / "cache").path.parent
    shared.chmod(0o777)
    result = build(sources, blocked / "cache")
    assert not result.cached
    assert result.path.parent != shared
    assert answer(result) == 42


def test_no_compiler(sources, tmp_path, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = build(sources, tmp_path / "cache")
    assert result.path is None
    assert "a C compiler (cc, gcc, clang) was not found" in result.reason
    assert "ziglang" in result.reason


def test_no_compiler_but_a_library_made_before(sources, tmp_path, monkeypatch):
    build(sources, tmp_path / "cache")
    monkeypatch.setenv("CC", "no-such-compiler")
    result = build(sources, tmp_path / "cache")
    assert answer(result) == 42
    assert result.cached


def test_cc_names_nothing(sources, tmp_path, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler -m64")
    result = build(sources, tmp_path / "cache")
    assert result.path is None
    assert "no-such-compiler" in result.reason


@pytest.mark.parametrize("script", ["exit 1", 'echo "fatal error: out of spoons"; exit 3', "kill -9 $$", "exit 0"])
def test_broken_compiler(sources, tmp_path, monkeypatch, script):
    monkeypatch.setenv("CC", compiler_script(tmp_path, script))
    result = build(sources, tmp_path / "cache")
    assert result.path is None
    assert "could not be compiled" in result.reason
    assert "spoons" not in script or "out of spoons" in result.reason


def test_compiler_that_does_not_start(sources, tmp_path, monkeypatch):
    script = tmp_path / "mycc"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    assert "does not run" in build(sources, tmp_path / "cache").reason


def test_cc_with_arguments(sources, tmp_path, monkeypatch):
    monkeypatch.setenv(
        "CC", compiler_script(tmp_path, '[ "$1" = --wrapped ] || exit 1; shift; exec $REAL "$@"') + " --wrapped"
    )
    assert answer(build(sources, tmp_path / "cache")) == 42


def test_unknown_instruction_set_is_left_out(sources, tmp_path, monkeypatch):
    refuse = (
        'for a in "$@"; do case "$a" in -mavx*|-march=*) echo "unknown option"; exit 1;; esac; done; exec $REAL "$@"'
    )
    monkeypatch.setenv("CC", compiler_script(tmp_path, refuse))
    result = build(sources, tmp_path / "cache")
    assert answer(result) == 42
    library = ctypes.CDLL(str(result.path))
    assert library.width_portable() == 1
    assert not hasattr(library, "width_avx2")


def test_source_that_does_not_compile(sources, tmp_path):
    (sources / "three.c").write_text("int f( {\n")
    result = build(sources, tmp_path / "cache")
    assert result.path is None
    assert "error" in result.reason
    assert not list((tmp_path / "cache").glob("*")) if (tmp_path / "cache").exists() else True


def test_many_at_once(sources, tmp_path):
    results: list[Build] = []
    threads = [threading.Thread(target=lambda: results.append(build(sources, tmp_path / "cache"))) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert [answer(r) for r in results] == [42] * 4
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TENFOLD_HOME", str(tmp_path / "home"))
    assert builder.cache_folder() == tmp_path / "home" / "kernels"
    monkeypatch.delenv("TENFOLD_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert builder.cache_folder() == tmp_path / ".cache" / "tenfold" / "kernels"


@pytest.fixture
def fresh_lib(monkeypatch):
    """lib as a new process sees it; the real library is back afterwards."""
    opened = lib._open
    monkeypatch.setattr(lib, "_open", lib.cache(opened.__wrapped__))


def test_lib_says_why_there_is_no_library(fresh_lib, monkeypatch):
    monkeypatch.setattr(lib, "build", lambda: Build(None, "mycc", "the dog ate it."))
    assert not lib.available()
    assert lib.status().reason == "the dog ate it."
    assert lib.status().isas == ()
    with pytest.raises(lib.Unavailable, match="the dog ate it"):
        lib.load()
    with pytest.raises(ValueError, match="kernels='torch'"):
        lib.set_threads(2)


def test_library_that_does_not_load(fresh_lib, monkeypatch, tmp_path):
    (tmp_path / "bad.so").write_bytes(b"nonsense")
    monkeypatch.setattr(lib, "build", lambda: Build(tmp_path / "bad.so", "mycc"))
    assert "could not be loaded" in lib.status().reason


def test_instruction_set_from_the_environment(fresh_lib, monkeypatch):
    monkeypatch.setenv("TENFOLD_CPU_ISA", "portable")
    assert lib.status().isa == "portable"
    lib.set_isa()


def test_unknown_instruction_set_in_the_environment(fresh_lib, monkeypatch):
    monkeypatch.setenv("TENFOLD_CPU_ISA", "sse9")
    assert "sse9" in lib.status().reason
    assert "portable" in lib.status().reason


def test_status_of_working_kernels():
    status = lib.status()
    assert status.reason == ""
    assert status.isa in status.isas
    assert status.isas[0] == "portable"
    assert status.threads >= 1
    with pytest.raises(ValueError, match="sse9"):
        lib.set_isa("sse9")


@pytest.mark.parametrize(
    ("files", "own", "expected"),
    [
        ({}, "", None),
        ({"cpu.max": "max 100000"}, "0::/", None),
        ({"cpu.max": "150000 100000"}, "0::/", 1.5),
        ({"cpu.max": "max 100000", "a/cpu.max": "400000 100000", "a/b/cpu.max": "200000 100000"}, "0::/a/b", 2.0),
        ({"a/cpu.max": "50000 100000", "a/b/cpu.max": "max 100000"}, "0::/a/b", 0.5),
        (
            {"cpu/x/cpu.cfs_quota_us": "300000", "cpu/x/cpu.cfs_period_us": "100000"},
            "3:cpu,cpuacct:/x\n4:memory:/y",
            3.0,
        ),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "3:cpu:/", None),
        ({"cpu.max": "garbage"}, "0::/", None),
    ],
)
def test_quota_of_the_control_group(tmp_path, files, own, expected):
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    (tmp_path / "own").write_text(own + "\n")
    assert lib._cgroup_cpus(tmp_path / "cgroup", tmp_path / "own") == expected


def test_default_threads_stay_within_the_affinity():
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert 1 <= lib.default_threads() <= allowed
