"""Checkpoints: what is saved comes back, what does not fit is refused with its name, nothing is unpickled, no kill hurts."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill import checkpoint as checkpoints
from distill.checkpoint import (
    Checkpoint,
    CheckpointError,
    build_network,
    load_checkpoint,
    read_json,
    read_tensors,
    recover_folder,
    save_checkpoint,
    write_folder,
)
from distill.network import PatchUNet
from samplers import schedule as schedules

TINY = {"class": "PatchUNet", "size": 8, "patch": 2, "widths": [16, 16], "classes": 3}
INFO = {"images": 12, "note": "tiny"}


@pytest.fixture(scope="module")
def network() -> PatchUNet:
    torch.manual_seed(0)
    return build_network(TINY).eval()


@pytest.fixture
def saved(network: PatchUNet, tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "model", Checkpoint(network, schedules.flow(), "v", INFO))
    return tmp_path / "model"


def output(network: PatchUNet) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(4, 1, 8, 8, generator=generator), torch.rand(4, generator=generator)
    with torch.no_grad():
        return network(x, t, torch.tensor([0, 1, 2, 3]))


def edit(file: Path, change: Callable[[Any], Any]) -> None:
    """Change a JSON document."""
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def reweigh(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the weights of a checkpoint."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


# what is saved comes back --------------------------------------------------------------------------------------------


def test_a_loaded_checkpoint_computes_the_same(network: PatchUNet, saved: Path) -> None:
    loaded = load_checkpoint(str(saved))
    torch.testing.assert_close(output(loaded.network), output(network), rtol=0, atol=0)
    assert not loaded.network.training
    assert loaded.network.arguments == network.arguments
    assert (loaded.schedule, loaded.predicts, loaded.info) == (schedules.flow(), "v", INFO)
    assert sorted(p.name for p in saved.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("schedule", [schedules.cosine(0.01), schedules.from_betas([0.1, 0.2, 1.0])])
def test_the_schedule_comes_back(schedule: schedules.Schedule, network: PatchUNet, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model", Checkpoint(network, schedule, "eps", {}))
    assert load_checkpoint(tmp_path / "model").schedule == schedule


def test_half_precision_halves_the_file_and_loads_as_fp32(network: PatchUNet, saved: Path, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "half", Checkpoint(network, schedules.flow(), "v", INFO), torch.float16)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (tmp_path / "half", saved)]
    assert sizes[0] < 0.6 * sizes[1]
    loaded = load_checkpoint(tmp_path / "half").network
    for name, value in network.state_dict().items():
        assert loaded.state_dict()[name].dtype == torch.float32
        assert torch.equal(loaded.state_dict()[name], value.half().float()), name
    torch.testing.assert_close(output(loaded), output(network), rtol=0, atol=2e-2)
    assert not torch.equal(output(loaded), output(network))


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (1e6, torch.float16, r"weight 'unet.conv_in.bias' is NaN, Inf, or too large for torch.float16"),
        (float("nan"), torch.float32, r"weight 'unet.conv_in.bias' is NaN"),
        (0.0, torch.int8, r"dtype must be a floating type .* got torch.int8"),
    ],
)
def test_weights_that_a_file_cannot_hold_are_refused(
    value: float, dtype: torch.dtype, message: str, saved: Path
) -> None:
    network = build_network(TINY)
    torch.nn.init.constant_(network.unet.conv_in.bias, value)
    before = (saved / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=message):
        save_checkpoint(saved, Checkpoint(network, schedules.flow(), "v", {}), dtype)
    assert (saved / "model.safetensors").read_bytes() == before


# what does not fit is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_truncated_weights_are_refused(kept: float, saved: Path) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(kept * file.stat().st_size)])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or not safetensors"):
        load_checkpoint(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("unet.conv_in.bias"), r"it has no tensor 'unet\.conv_in\.bias'"),
        (lambda w: w.update(extra=torch.zeros(2)), r"the network has no tensor 'extra'"),
        (lambda w: w.update({"unet.conv_in.bias": torch.zeros(8)}), r"'unet\.conv_in\.bias' is \(8,\).*\(16,\)"),
        (
            lambda w: w.update({"unet.conv_in.bias": torch.zeros(16, dtype=torch.int32)}),
            r"'unet\.conv_in\.bias' is torch\.int32",
        ),
    ],
    ids=["missing", "extra", "wrong shape", "wrong type"],
)
def test_weights_of_another_architecture_are_refused(change: Callable[[Any], Any], message: str, saved: Path) -> None:
    reweigh(saved, change)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is of another architecture: " + message):
        load_checkpoint(saved)


def test_refused_weights_leave_the_network_untouched(saved: Path) -> None:
    network = build_network(TINY)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    weights = {name: value + 1 for name, value in before.items()} | {"extra": torch.zeros(1)}
    with pytest.raises(CheckpointError):
        checkpoints.load_weights(network, weights, saved)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {**c, "format": 2}, r"format must be 1, got 2"),
        (lambda c: [c], r"format must be 1, got 'list'"),
        (lambda c: {**c, "network": {**c["network"], "class": "Patchunet"}}, r"unknown network class.*'PatchUNet'"),
        (lambda c: {**c, "network": {**c["network"], "wdths": [8]}}, r"'wdths'; did you mean 'widths'"),
        (lambda c: {**c, "network": {**c["network"], "size": 9}}, r"size must be a multiple of .* got size=9"),
        (lambda c: {**c, "network": {**c["network"], "widths": 8}}, r"config\.json"),
        (lambda c: {**c, "network": "PatchUNet"}, r"network must be a dictionary"),
        (lambda c: {**c, "schedule": {"name": "cosin"}}, r"schedule name must be one of.*got 'cosin'"),
        (lambda c: {**c, "predicts": "x1"}, r"unknown predicts 'x1'; did you mean 'x0'"),
        (lambda c: {k: v for k, v in c.items() if k != "schedule"}, r"the key 'schedule' is missing"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(change: Callable[[Any], Any], message: str, saved: Path) -> None:
    edit(saved / "config.json", change)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(saved)
    assert str(saved / "config.json") in str(caught.value)


def test_missing_and_unreadable_files_are_named(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere/config\.json does not exist"):
        load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a file; give the folder"):
        load_checkpoint(saved / "model.safetensors")
    with pytest.raises(CheckpointError, match="model does not exist"):
        read_tensors(saved)
    (saved / "config.json").write_text("{'format': 1")
    with pytest.raises(CheckpointError, match=r"config\.json is not JSON"):
        load_checkpoint(saved)
    (saved / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match=r"config\.json is not JSON"):
        read_json(saved / "config.json")
    (saved / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        load_checkpoint(saved)


# nothing is unpickled ------------------------------------------------------------------------------------------------


class Trap:
    """Unpickling it creates the file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("pickler", ["pickle", "torch"])
@pytest.mark.parametrize(
    "place", ["a.pt", "a.PTH", "a.ckpt", "a.bin", "a.weights", "model/model.safetensors", "model/w.pt"]
)
def test_a_pickle_is_refused_unread(place: str, pickler: str, saved: Path, tmp_path: Path) -> None:
    planted, trace = tmp_path / place, tmp_path / "unpickled"
    if place.startswith("model/"):
        (saved / "model.safetensors").unlink()
    if pickler == "pickle":
        planted.write_bytes(pickle.dumps(Trap(trace)))
    else:
        torch.save({"w": Trap(trace)}, planted)
    named = planted.suffix not in (".weights", ".safetensors")  # the others are seen to be no safetensors
    with pytest.raises(CheckpointError, match="is a pickle.* convert it" if named else "not safetensors|is a file"):
        load_checkpoint(saved if place.startswith("model/") else planted)
    with pytest.raises(CheckpointError, match="is a pickle" if named else "not safetensors"):
        read_tensors(planted)
    assert not trace.exists()
    if pickler == "pickle":
        pickle.loads(planted.read_bytes())
    else:
        torch.load(planted.rename(tmp_path / "a.pt"), weights_only=False)
    assert trace.exists(), "the trap does not work, so the test shows nothing"


# no kill hurts -------------------------------------------------------------------------------------------------------

OLD, NEW = torch.zeros(3), torch.ones(3)


def write(folder: Path, value: torch.Tensor) -> None:
    write_folder(folder, {"a": {"x": value}, "b": {"x": value}}, {"c": value.tolist()})


def content(folder: Path) -> list[list[float]]:
    """What a folder holds, each file as a list; all three are equal in a complete one."""
    return [
        read_tensors(folder / "a.safetensors")["x"].tolist(),
        read_tensors(folder / "b.safetensors")["x"].tolist(),
        read_json(folder / "c.json"),
    ]


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.fixture
def kill_before(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[str]]:
    """Make the n-th call that changes the disk raise Killed instead; returns the list of the calls so far."""

    def arm(n: int) -> list[str]:
        calls: list[str] = []

        def armed(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                calls.append(name)
                if len(calls) == n:
                    raise Killed
                return original(*args, **kwargs)

            return call

        for owner, name in (
            (checkpoints, "save_file"),
            (Path, "write_text"),
            (Path, "rename"),
            (Path, "mkdir"),
            (shutil, "rmtree"),
            (os, "fsync"),
        ):
            monkeypatch.setattr(owner, name, armed(name, getattr(owner, name)))
        return calls

    return arm


def test_a_kill_at_any_moment_leaves_the_old_folder_or_the_new_one(
    kill_before: Callable[[int], list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = []
    for n in range(1, 100):
        folder = tmp_path / str(n) / "state"
        write(folder, OLD)
        calls = kill_before(n)
        try:
            write(folder, NEW)
        except Killed:
            monkeypatch.undo()
        else:
            monkeypatch.undo()
            break
        found.append(content(recover_folder(folder)))
        assert found[-1] in ([OLD.tolist()] * 3, [NEW.tolist()] * 3), calls
        write(folder, NEW)  # and the next write is not disturbed by what is left
        assert content(folder) == [NEW.tolist()] * 3
        assert [p.name for p in folder.parent.iterdir()] == ["state"]
    assert calls.count("rename") == 2
    assert len(found) == len(calls) >= 12
    assert found[0] == [OLD.tolist()] * 3
    assert found[-1] == [NEW.tolist()] * 3


def test_a_second_kill_does_not_hurt_either(
    kill_before: Callable[[int], list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for n in range(1, 100):
        folder = tmp_path / str(n) / "state"
        write(folder, OLD)
        folder.rename(folder.with_name("state.old"))  # a first kill between the renames
        kill_before(n)
        try:
            write(folder, NEW)
        except Killed:
            monkeypatch.undo()
        else:
            monkeypatch.undo()
            break
        assert content(recover_folder(folder)) in ([OLD.tolist()] * 3, [NEW.tolist()] * 3)
    assert n > 12


def test_a_checkpoint_is_read_between_the_renames_without_touching_them(network: PatchUNet, saved: Path) -> None:
    old = saved.with_name("model.old")
    saved.rename(old)
    torch.testing.assert_close(output(load_checkpoint(saved).network), output(network), rtol=0, atol=0)
    assert old.exists()
    assert not saved.exists()


def test_a_document_with_nan_leaves_the_folder_untouched(tmp_path: Path) -> None:
    write(tmp_path / "state", OLD)
    with pytest.raises(ValueError, match="JSON"):
        write_folder(tmp_path / "state", {"a": {"x": NEW}}, {"c": float("nan")})
    assert content(tmp_path / "state") == [OLD.tolist()] * 3


def test_tensors_of_any_layout_are_written(tmp_path: Path) -> None:
    value = torch.arange(6.0, requires_grad=True).view(2, 3)
    write_folder(tmp_path / "deep" / "folder", {"a": {"x": value.T, "y": value[:, 1]}}, {})
    read = read_tensors(tmp_path / "deep" / "folder" / "a.safetensors")
    torch.testing.assert_close(read["x"], value.detach().T)
    torch.testing.assert_close(read["y"], value.detach()[:, 1])


# the network ---------------------------------------------------------------------------------------------------------


def test_large_weights_are_written_in_parts_and_read_as_one(
    network: PatchUNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 8_000
    monkeypatch.setattr(checkpoints, "PART_BYTES", limit)
    made = Checkpoint(network, schedules.cosine(), "v", {})
    save_checkpoint(tmp_path / "many", made)
    files = sorted((tmp_path / "many").glob("model*.safetensors"))
    assert [file.name for file in files[:2]] == ["model.part10.safetensors", "model.part11.safetensors"]
    largest = max(value.nbytes for value in network.state_dict().values())
    assert all(file.stat().st_size < max(limit, largest) + 4_000 for file in files)
    assert torch.equal(output(load_checkpoint(tmp_path / "many").network), output(network))
    files[0].unlink()
    with pytest.raises(CheckpointError, match=r"model\.part10\.safetensors does not exist"):
        load_checkpoint(tmp_path / "many")
    monkeypatch.undo()
    save_checkpoint(tmp_path / "many", made)  # a folder is replaced whole, so no part of the old one stays
    assert [file.name for file in (tmp_path / "many").glob("model*")] == ["model.safetensors"]


def test_the_null_class_is_the_one_after_the_last(network: PatchUNet) -> None:
    generator = torch.Generator().manual_seed(2)
    x, t = torch.randn(2, 1, 8, 8, generator=generator), torch.tensor([0.2, 0.7])
    with torch.no_grad():
        torch.testing.assert_close(network(x, t), network(x, t, torch.tensor([3, 3])), rtol=0, atol=0)
        assert not torch.equal(network(x, t), network(x, t, torch.tensor([0, 3])))
        both = network(x, t)
        torch.testing.assert_close(network(x[1:], t[1:]), both[1:], rtol=1e-5, atol=1e-5)
    assert both.shape == x.shape


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 27}, r"size must be a multiple of patch \* 2 \*\* \(levels - 1\) = 4, got size=27"),
        ({"widths": [64, 64, 64]}, r"= 8, got size=28, patch=2 and 3 levels"),
        ({"widths": [12]}, r"widths must be multiples of 8.*got \[12\]"),
        ({"widths": [64, 48]}, r"the last at most 32 or a multiple of it, got \[64, 48\]"),
        ({"widths": []}, r"at least one level"),
        ({"widths": [0]}, r"widths must be positive, got 0"),
        ({"patch": 0}, r"patch must be positive, got 0"),
        ({"classes": -1}, r"classes \+ 1 must be positive, got 0"),
        ({"chanels": 1}, r"unknown argument of network PatchUNet 'chanels'; did you mean 'channels'"),
    ],
)
def test_network_arguments_that_do_not_fit_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_network({"class": "PatchUNet", **arguments})


def test_tensors_are_as_readable_as_other_files(tmp_path: Path) -> None:
    """The library's own mode lets nobody but the owner read them, which a package or a shared folder must."""
    write_folder(tmp_path / "made", {"model": {"a": torch.ones(2)}}, {"config": {}})
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "made").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]
