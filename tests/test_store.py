"""Finished cells on disk: damage is told of, claims exclude other processes and die with theirs."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

import pytest

from bench import store as store_module
from bench.store import Store, key_of

IDENTITY = {"sampler": "ddim", "budget": 5, "options": {"eta": 0.0}}


def test_a_record_comes_back_and_no_other(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.get(IDENTITY) is None
    record = store.put(IDENTITY, {"value": 1.5})
    assert store.get(IDENTITY) == record == {**IDENTITY, "value": 1.5}
    assert store.get({**IDENTITY, "budget": 6}) is None
    with pytest.raises(ValueError, match="Out of range float values are not JSON compliant"):
        store.put({**IDENTITY, "budget": 7}, {"value": float("nan")})
    assert store.get({**IDENTITY, "budget": 7}) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"sampler": "ddim", "bud', "cannot be read"),
        ("", "cannot be read"),
        ("[1]", "is not the cell that its name says: sampler differs"),
        (json.dumps({**IDENTITY, "options": {"eta": 1.0}, "value": 2}), "options differs"),
    ],
)
def test_a_damaged_record_is_told_of_and_measured_again(tmp_path: Path, content: str, message: str) -> None:
    told: list[str] = []
    store = Store(tmp_path, told.append)
    store.put(IDENTITY, {"value": 1.5})
    (tmp_path / "cells" / f"{key_of(IDENTITY)}.json").write_text(content)
    assert store.get(IDENTITY) is None
    assert len(told) == 1
    assert message in told[0]


HOLD = """
import sys, time
from pathlib import Path
from bench.store import Store
with Store(Path(sys.argv[1])).claim({"cell": 1}) as mine:
    print(mine, flush=True)
    time.sleep(float(sys.argv[2]))
"""


def holder(folder: Path, seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", HOLD, str(folder), str(seconds)], stdout=subprocess.PIPE, text=True)


def test_a_claim_excludes_other_processes_until_its_own_is_killed(tmp_path: Path) -> None:
    with holder(tmp_path, 600) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "True\n"
        with holder(tmp_path, 0) as second:
            assert second.communicate(timeout=60)[0] == "False\n"
        with Store(tmp_path).claim({"cell": 2}) as mine:  # another cell is free
            assert mine
        first.kill()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with Store(tmp_path).claim({"cell": 1}) as mine:
            if mine:
                return
        time.sleep(0.05)
    pytest.fail("the claim outlived its process")


LEAVE_NUMBERS_ALONE = (
    *("samplers/solvers/*", "samplers/plan.py"),  # the hash of the plan covers what they make
    *("*/__init__.py", "samplers/errors.py", "samplers/plugins.py", "distill/config.py", "distill/documents.py"),
    *("bench/cells.py", "bench/suite.py", "bench/store.py"),  # what they resolve is the key itself
    *(
        "bench/floor.py",
        "bench/provenance.py",
        "bench/results.py",
        "bench/tuning.py",
        "bench/columns.py",
    ),  # beside the number
)


def test_every_source_that_a_number_hangs_on_is_in_its_key() -> None:
    root, sources = Path(store_module.__file__).parents[1], set(store_module._SOURCES)
    missing = {file for name in sources for file in imported(root, name)} - sources
    assert {name for name in missing if not any(fnmatch(name, known) for known in LEAVE_NUMBERS_ALONE)} == set()
    assert "samplers/registry.py" in sources  # it says how an error-controlled sampler is integrated


def imported(root: Path, name: str) -> list[str]:
    """The project's files that a file imports, anywhere in it."""
    modules = []
    for node in ast.walk(ast.parse((root / name).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            modules += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    files = [f"{module.replace('.', '/')}{end}" for module in modules for end in (".py", "/__init__.py")]
    return [file for file in files if file.startswith(("bench/", "samplers/", "distill/")) and (root / file).is_file()]
