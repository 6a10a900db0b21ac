"""The rolling set of a run's checkpoints: what is kept, what a damaged one costs, and what a full disk does."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_teacher import config

from distill import checkpoint as checkpoints
from distill.checkpoint import CheckpointError, read_tensors, write_folder, write_text
from distill.run_folder import RunFolder, State


def state(step: int, size: int = 3) -> State:
    tensors = {name: {"x": torch.full((size,), float(step))} for name in ("network", "optimizer", "average-64")}
    return State(step, tensors, 0.5, 1, [{"step": step, "loss": 0.25}])


class Folder(RunFolder):
    """One that remembers what it told."""

    def __init__(self, path: Path, **changes: Any) -> None:
        self.told: list[str] = []
        super().__init__(path, config(**changes), self.told.append)

    def steps(self) -> list[str]:
        return sorted(path.name for path in (self.path / "checkpoints").iterdir())


def filled(path: Path, *steps: int, **changes: Any) -> Folder:
    folder = Folder(path, keep=3, **changes)
    for step in steps:
        folder.save(state(step))
    return folder


def test_the_newest_state_comes_back(tmp_path: Path) -> None:
    filled(tmp_path, 0, 10, 20)
    folder = Folder(tmp_path)
    found = folder.load()
    assert found is not None
    assert (found.step, found.rate_factor, found.rollbacks, found.log) == (20, 0.5, 1, [{"step": 20, "loss": 0.25}])
    assert {name: value["x"].tolist() for name, value in found.tensors.items()} == {
        name: [20.0] * 3 for name in ("network", "optimizer", "average-64")
    }
    assert folder.told == []
    assert Folder(tmp_path / "new").load() is None


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_the_newest_few_are_kept(keep: int, tmp_path: Path) -> None:
    folder = Folder(tmp_path, keep=keep)
    for step in range(0, 90, 10):
        folder.save(state(step))
    assert folder.steps() == [f"step-{step:08d}" for step in range(0, 90, 10)][-keep:]
    assert (tmp_path / "config.yaml").read_text() == folder.config.to_yaml()
    assert json.loads((tmp_path / "log.jsonl").read_text()) == {"step": 80, "loss": 0.25}


DAMAGES: dict[str, tuple[str, Callable[[bytes], bytes] | None, str]] = {
    "truncated tensors": ("network.safetensors", lambda old: old[:-1], "network.safetensors is truncated"),
    "truncated average": ("average-64.safetensors", lambda old: old[:20], "average-64.safetensors is truncated"),
    "truncated moments": ("optimizer.safetensors", lambda old: b"", "optimizer.safetensors is truncated"),
    "no tensors": ("network.safetensors", None, "network.safetensors does not exist"),
    "half a document": ("state.json", lambda old: old[: len(old) // 2], "state.json is not JSON"),
    "bytes": ("state.json", lambda old: b"\xff\xfe", "state.json is not JSON"),
    "a list": ("state.json", lambda old: b"[]", "is not the state of a training run"),
    "no config": (
        "state.json",
        lambda old: b'{"step": 3}',
        r"is not the state of a training run: KeyError\('config'\)",
    ),
    "a null": ("state.json", lambda old: old.replace(b"0.5", b"null"), "is not the state of a training run"),
    "no log": ("log.json", None, "log.json does not exist"),
    "another log": ("log.json", lambda old: b'{"step": 3}', "is not the state of a training run"),
}


def damage(folder: Path, kind: str) -> str:
    name, spoil, message = DAMAGES[kind]
    if spoil is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(spoil((folder / name).read_bytes()))
    return message


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_the_user_told(kind: str, tmp_path: Path) -> None:
    filled(tmp_path, 0, 10, 20)
    message = damage(tmp_path / "checkpoints/step-00000020", kind)
    folder = Folder(tmp_path)
    found = folder.load()
    assert found is not None
    assert found.step == 10
    (sentence,) = folder.told
    assert re.search(f"step-00000020.*{message}" if "is not the" not in message else message, sentence)
    assert sentence.endswith(f"; going on from {tmp_path / 'checkpoints/step-00000010'}")


def test_of_several_damaged_ones_each_is_told_and_of_all_none_is_used(tmp_path: Path) -> None:
    filled(tmp_path, 0, 10, 20)
    for step in (20, 10):
        damage(tmp_path / f"checkpoints/step-{step:08d}", "truncated tensors")
    folder = Folder(tmp_path)
    found = folder.load()
    assert found is not None
    assert found.step == 0
    assert ["step-00000020" in folder.told[0], "step-00000010" in folder.told[1], len(folder.told)] == [True, True, 2]
    damage(tmp_path / "checkpoints/step-00000000", "half a document")
    with pytest.raises(CheckpointError, match="no checkpoint in .* can be read: .*step-00000020.*step-00000000"):
        Folder(tmp_path).load()


def test_a_damaged_one_never_takes_the_place_of_a_good_one(tmp_path: Path) -> None:
    """The run goes on from step 10: what it saves at 15 is newer than the damaged one at 20, whatever the names say."""
    filled(tmp_path, 0, 10, 20)
    damage(tmp_path / "checkpoints/step-00000020", "truncated tensors")
    folder = Folder(tmp_path, keep=1)
    folder.save(state(15))
    assert folder.steps() == ["step-00000015"]
    found = Folder(tmp_path).load()
    assert found is not None
    assert found.step == 15


def test_a_checkpoint_of_another_run_is_refused_and_never_passed_over(tmp_path: Path) -> None:
    filled(tmp_path, 0, 10)
    filled(tmp_path, 20, learning_rate=0.5)
    with pytest.raises(CheckpointError, match=r"step-00000020 is another run: learning_rate was 0\.5, now 0\.001"):
        Folder(tmp_path).load()
    damage(tmp_path / "checkpoints/step-00000020", "truncated tensors")  # its settings can still be read
    with pytest.raises(CheckpointError, match="is another run: learning_rate"):
        Folder(tmp_path).load()


CHANGES: dict[str, Any] = {
    "network": {"class": "PatchUNet", "size": 8, "patch": 2, "widths": [16, 24], "classes": 3},
    "schedule": {"name": "vp_linear"},
    "predicts": "eps",
    "batch_size": 8,
    "learning_rate": 1e-4,
    "weight_decay": 0.1,
    "grad_clip": 2.0,
    "ema_half_lives": (10,),
    "drop_label": 0.2,
    "dtype": "bf16",
    "seed": 1,
    "log_every": 10,
    "mirror": True,
}
FREE: dict[str, Any] = {
    "images": 1000,
    "warmup": 0,
    "cooldown": 0,
    "init": "elsewhere",
    "accumulate": 2,
    "compile": True,
    "save_every": 20,
    "keep": 5,
    "evaluate_every": 10,
    "rollbacks": 0,
    "tensorboard": True,
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_setting_is_refused_with_its_name(name: str, tmp_path: Path) -> None:
    filled(tmp_path, 10)
    value = list(CHANGES[name]) if name == "ema_half_lives" else CHANGES[name]
    with pytest.raises(CheckpointError, match=f"is another run: {name} was .*, now ") as caught:
        Folder(tmp_path, **{name: CHANGES[name]}).load()
    assert repr(value) in str(caught.value)


def test_every_other_setting_may_change(tmp_path: Path) -> None:
    filled(tmp_path, 10)
    assert Folder(tmp_path, **FREE).load() is not None
    assert type(config()).model_fields.keys() == CHANGES.keys() | FREE.keys() | {"method"}
    assert FREE.keys() == config().may_change


# a full disk ---------------------------------------------------------------------------------------------------------


@contextmanager
def full_after(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: the system refuses to write on, as it does on a full disk."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def whole(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("size", [0, 100, 10_000])
def test_a_full_disk_leaves_the_old_checkpoints_whole(size: int, tmp_path: Path) -> None:
    folder = filled(tmp_path, 0, 10)
    before = whole(tmp_path)
    with full_after(size), pytest.raises(CheckpointError, match="step-00000020 cannot be written: .*before is whole"):
        folder.save(state(20, size=10_000))
    assert whole(tmp_path) == before
    assert folder.steps() == ["step-00000000", "step-00000010"]
    found = Folder(tmp_path).load()
    assert found is not None
    assert found.step == 10
    folder.save(state(20, size=10_000))  # there is room again
    assert folder.steps()[-1] == "step-00000020"


@pytest.mark.parametrize("call", range(1, 10))
def test_a_failure_at_any_moment_leaves_the_old_folder_or_the_new_one(
    call: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_folder(tmp_path / "f", {"a": {"x": torch.zeros(2)}}, {"b": 0})
    calls = 0

    def failing(original: Callable[..., Any]) -> Callable[..., Any]:
        def attempt(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*args, **kwargs)

        return attempt

    failures = ((checkpoints, "save_file"), (Path, "write_text"), (Path, "rename"), (Path, "mkdir"), (os, "fsync"))
    with monkeypatch.context() as patch:
        for owner, name in failures:
            patch.setattr(owner, name, failing(getattr(owner, name)))
        with pytest.raises(CheckpointError, match=r"f cannot be written: \[Errno 28\] No space left on device"):
            write_folder(tmp_path / "f", {"a": {"x": torch.ones(2)}}, {"b": 1})
    assert sorted(path.name for path in tmp_path.iterdir()) in (["f"], ["f", "f.old"])
    value = json.loads((tmp_path / "f/b.json").read_text())
    assert read_tensors(tmp_path / "f/a.safetensors")["x"].tolist() == [value, value]
    write_folder(tmp_path / "f", {"a": {"x": torch.full((2,), 2.0)}}, {"b": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_a_text_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    write_text(file, "old\n")
    with full_after(10), pytest.raises(CheckpointError, match="log.jsonl cannot be written: .*File too large"):
        write_text(file, "new\n" * 10_000)
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]
    assert file.read_text() == "old\n"
