"""The two parts of the tests, `--part quick` and `--part rest`: every test is in one of them, and in the same one every time."""

from __future__ import annotations

from types import SimpleNamespace

from conftest import QUICK_CASES, quick_part


def item(nodeid, slow=False):
    return SimpleNamespace(nodeid=nodeid, get_closest_marker=lambda name: slow or None)


def test_the_quick_part_has_every_test_that_is_not_slow():
    items = [
        item("tests/test_a.py::test_one"),
        *(item(f"tests/test_a.py::test_many[{n}]") for n in range(50)),
        *(item(f"tests/test_b.py::test_few[{n}]") for n in range(3)),
        item("tests/test_b.py::test_long", slow=True),
    ]
    quick = quick_part(items)
    assert quick == quick_part(items[::-1])
    functions = [nodeid.partition("[")[0].partition("::")[2] for nodeid in quick]
    assert {name: functions.count(name) for name in set(functions)} == {
        "test_one": 1,
        "test_many": QUICK_CASES,
        "test_few": 3,
    }


def test_another_case_moves_at_most_one_out():
    items = [item(f"tests/test_a.py::test_many[{n}]") for n in range(50)]
    assert len(quick_part(items) - quick_part([*items, item("tests/test_a.py::test_many[new]")])) <= 1
