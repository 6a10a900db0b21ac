"""A run that two processes share, whole networks (DDP) or divided ones (FSDP), is the run of one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import Phased, Stopped, data, phased_config, stop_before
from torch import Tensor

from distill.checkpoint import load_checkpoint
from distill.trainer import Trainer

KINDS = ("ddp", "fsdp")


def work(folder: Path) -> None:
    """What each of the two processes does: for each kind a run that is stopped within its second phase, and resumed."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    torch.set_num_threads(1)
    for kind, port in zip(KINDS, os.environ["PORTS"].split(","), strict=True):
        os.environ["MASTER_PORT"] = port
        if kind == "fsdp":  # accelerate divides weights on accelerators only, so it is told that this is one
            os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
            PartialState(cpu=True)
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        with pytest.MonkeyPatch.context() as patch:
            stop_before(patch, 6)
            with pytest.raises(Stopped):
                Trainer(Phased(phased_config()), folder / kind, evaluate=mean_weight).run(*data(), quiet=True)
        resumed = Trainer(Phased(phased_config(accumulate=2)), folder / kind, evaluate=mean_weight)
        about = {
            "processes": resumed.accelerator.num_processes,
            "wrapped": type(resumed.weights.model).__name__,
            "step": resumed.step,
            "shares": sum(weight.numel() for weight in resumed.weights.averages[0]),
        }
        resumed.run(*data(), quiet=True)
        (folder / f"{kind}-{os.environ['RANK']}.json").write_text(json.dumps(about))
        AcceleratorState._reset_state(reset_partial_state=True)


def mean_weight(checkpoint: Any, step: int) -> dict[str, float]:
    return {"figure": float(sum(p.detach().abs().sum() for p in checkpoint.network.parameters()))}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of the same settings in one process ("one"), and in two of each kind."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as a, socket.socket() as b:
        for listener in (a, b):
            listener.bind(("127.0.0.1", 0))
        ports = f"{a.getsockname()[1]},{b.getsockname()[1]}"
    here = Path(__file__).parent
    common = {**os.environ, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "PORTS": ports}
    common |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{here.parent}{os.pathsep}{here}"}
    command = "import sys, pathlib, test_trainer_processes as t; t.work(pathlib.Path(sys.argv[1]))"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", command, str(folder)],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        Trainer(Phased(phased_config()), folder / "one", evaluate=mean_weight).run(*data(), quiet=True)
        torch.set_num_threads(before)
        said = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_divide_the_work_and_resume(kind: str, runs: Path) -> None:
    about = [json.loads((runs / f"{kind}-{rank}.json").read_text()) for rank in range(2)]
    whole = sum(p.numel() for p in load_checkpoint(runs / "one/model").network.parameters())
    assert all((process["processes"], process["step"]) == (2, 6) for process in about)
    assert all(process["wrapped"].startswith({"ddp": "Distributed", "fsdp": "FSDP"}[kind]) for process in about)
    shares = [process["shares"] for process in about]
    assert shares == [whole, whole] if kind == "ddp" else sum(shares) == whole
    assert max(shares) < whole or kind == "ddp"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_give_the_run_of_one(kind: str, runs: Path) -> None:
    one, two = (json.loads((runs / name / "checkpoints/step-00000008/log.json").read_text()) for name in ("one", kind))
    for name in ("step", "phase", "images", "learning_rate"):
        assert [row[name] for row in one] == [row[name] for row in two]
    for name in ("loss", "figure"):
        expected = pytest.approx([row[name] for row in one if name in row], rel=1e-5)
        assert [row[name] for row in two if name in row] == expected
    for model in ("model", "students/a", "students/b"):
        expected, found = (load_checkpoint(runs / name / model).network.state_dict() for name in ("one", kind))
        assert_close(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_one_process_goes_on_where_two_stopped(kind: str, runs: Path) -> None:
    resumed, expected = (Trainer(Phased(phased_config()), runs / name) for name in (kind, "one"))
    assert resumed.step == 8
    found, wanted = resumed.weights.state(), expected.weights.state()
    assert found.keys() == wanted.keys()
    for name in found:
        assert_close(found[name], wanted[name])


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal to rounding, which Adam makes a step of where a weight has next to no gradient (the bias of a key has none)."""
    assert found.keys() == expected.keys()
    far = torch.cat([(found[name] - value).abs().flatten() for name, value in expected.items()])
    assert (far > 1e-5).double().mean() < 1e-3
    assert far.max() < 5e-4
