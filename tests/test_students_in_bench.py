"""Students beside samplers in one table: which network answers a budget, what is marked, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from rich.console import Console

from bench.cells import identity, resolve
from bench.cli import main
from bench.engine import run_suite
from bench.floor import TEST, Floor
from bench.network import on_device
from bench.plots import save_frontier
from bench.store import key_of
from bench.students import inputs_of, run_network
from bench.suite import StudentSpec, Suite
from bench.table import markdown
from bench.zoo import BenchModel, load_model
from distill.checkpoint import Checkpoint, save_checkpoint
from distill.network import PatchUNet
from distill.student import load_student
from samplers import make_plan, sample, schedules

COSINE = schedules.cosine()
FLOORS = (Floor(TEST, 100, 0.1),)
PHASES = {"8-steps": {"images": 1000, "minutes": 1.5}, "4-steps": {"images": 500, "minutes": 0.75}}


def checkpoint(seed: int, *calls: int, info: dict[str, Any] | None = None, **arguments: Any) -> Checkpoint:
    """A tiny network with fresh weights, and a DDIM plan to clean data for each number of calls."""
    torch.manual_seed(seed)
    network = PatchUNet(**{"widths": (16, 16), "patch": 2, **arguments}).eval()
    plans = {n: make_plan("ddim", COSINE, nfe=n, grid="sgm") for n in calls}
    return Checkpoint(network, COSINE, "v", {"phases": PHASES} if info is None else info, plans)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, and a run's students of 2 and 4 calls beside a stage without plans."""
    root = tmp_path_factory.mktemp("models")
    save_checkpoint(root / "teacher", checkpoint(0))
    save_checkpoint(root / "run/students/2-steps", checkpoint(2, 2))
    save_checkpoint(root / "run/students/4-steps", checkpoint(4, 4))
    save_checkpoint(root / "run/students/guided", checkpoint(5))
    save_checkpoint(root / "other", checkpoint(6, 2, size=16))
    save_checkpoint(root / "classes", checkpoint(6, 2, classes=3))
    return root


@pytest.fixture(scope="module")
def teacher(folders: Path) -> BenchModel:
    return load_model(str(folders / "teacher"))


def suite_of(model: Path | str, *rows: Any, **changes: Any) -> Suite:
    base = {
        "name": "tiny",
        "nfe": [2, 3, 4],
        "num_samples": 12,
        "batch_size": 5,
        "teacher": {"sampler": "ddim", "nfe": 6},
    }
    return Suite.model_validate({**base, "model": str(model), "samplers": list(rows), **changes})


def measure(suite: Suite, model: BenchModel, out: Path) -> list[dict[str, Any]]:
    return run_suite(suite, model, out, "cpu", Console(quiet=True))


def bench(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["bench", "mnist", "--dtype", "fp32", *map(str, arguments)])


def at(rows: list[dict[str, Any]], label: str) -> dict[int, dict[str, Any]]:
    return {row["budget"]: row for row in rows if row["label"] == label and row["role"] == "sampler"}


def test_each_budget_of_a_row_is_the_student_trained_for_it(folders: Path, teacher: BenchModel, tmp_path: Path) -> None:
    students = folders / "run/students"
    suite = suite_of(folders / "teacher", "ddim", {"student": str(students), "label": "progressive"})
    mine = at(measure(suite, teacher, tmp_path), "progressive")
    assert [mine[n]["status"] for n in (2, 3, 4)] == ["done", "absent", "done"]
    assert [mine[n]["model"] for n in (2, 4)] == [str(students / f"{n}-steps") for n in (2, 4)]
    assert [(mine[n]["nfe"], mine[n]["sampler"], mine[n]["options"]) for n in (2, 4)] == [
        (n, "student", {}) for n in (2, 4)
    ]
    assert mine[3]["reason"] == "trained for 2, 4 calls"
    assert "value" not in mine[3]
    assert [mine[n]["trained"] for n in (2, 3, 4)] == [True, False, True]


def test_a_students_images_are_those_of_its_own_plan_in_any_batch(folders: Path) -> None:
    folder = folders / "run/students/4-steps"
    student = load_student(folder)
    indices = torch.arange(7)
    expected = student.sample(4, shape=(7, 1, 28, 28), seed=3, indices=indices, cond={"class_labels": indices % 10})
    network = on_device("s", checkpoint(4, 4), "cpu", "fp32")
    parts = [run_network(network, network.plans[4], {}, seed=3, indices=part) for part in indices.split(3)]
    assert (torch.cat(parts) - expected).abs().max() < 1e-4


@pytest.mark.slow
def test_the_model_itself_may_be_a_student(folders: Path, tmp_path: Path) -> None:
    folder = folders / "run/students/4-steps"
    given = "--model", folder, "--samplers", "ddim,dpmpp-2m", "--nfe", "2,4", "--num-samples", 12, "--out", tmp_path
    result = bench(*given)
    assert result.exit_code == 0, result.output
    table = pd.read_csv(tmp_path / "table.csv")
    assert list(table["label"][:3]) == ["student", "ddim", "dpmpp-2m"]
    mine = table[table["label"] == "student"].set_index("budget")
    assert mine["trained"].tolist() == [False, True]
    assert mine["sampler"].tolist() == ["ddim", "student"]
    assert mine["grid"].fillna("").tolist() == ["uniform", ""]
    assert table[table["label"] != "student"]["trained"].isna().all()
    text = (tmp_path / "table.md").read_text()
    line = next(line for line in text.splitlines() if "| student |" in line)
    assert [cell.count("†") for cell in line.split("|")[2:4]] == [1, 0]
    assert "- † The student was not trained for" in text
    assert "†" in result.output


def test_an_untrained_budget_is_its_plans_sampler_on_the_uniform_grid(folders: Path, tmp_path: Path) -> None:
    folder = folders / "run/students/4-steps"
    row = {"sampler": "ddim", "grid": "uniform", "label": "same"}
    suite = suite_of(folder, {"student": str(folder), "untrained": True, "label": "s"}, row, nfe=[3])
    rows = measure(suite, load_model(str(folder)), tmp_path)
    assert at(rows, "s")[3]["value"] == pytest.approx(at(rows, "same")[3]["value"], rel=1e-6)


@pytest.mark.slow
def test_costs_are_columns_and_a_table(folders: Path, teacher: BenchModel, tmp_path: Path) -> None:
    given = "--model", folders / "teacher", "--samplers", "ddim", "--nfe", "2,3", "--num-samples", 12, "--out", tmp_path
    result = bench(*given, "--student", f"progressive={folders / 'run/students'}")
    assert result.exit_code == 0, result.output
    table = pd.read_csv(tmp_path / "table.csv").set_index(["label", "budget"])
    assert table.loc[("progressive", 2), "train_images"] == 1500
    assert table.loc[("progressive", 2), "train_minutes"] == pytest.approx(2.25)
    assert table["train_images"].drop(("progressive", 2)).isna().all()
    text = (tmp_path / "table.md").read_text()
    assert "| progressive | 2 | 1500 | 2.25 | 8-steps: 1000 images, 1.5 min; 4-steps: 500 images, 0.75 min |" in text
    assert "- Not measured: progressive at 3; trained for 2, 4 calls." in text
    assert "Failed" not in text


def test_a_table_without_students_has_none_of_their_columns(teacher: BenchModel, tmp_path: Path) -> None:
    rows = measure(suite_of("teacher", "ddim", nfe=[2]), teacher, tmp_path)
    assert not {"trained", "train_images", "inputs"} & set().union(*rows)
    assert "Training" not in markdown(rows, (), "t")


def test_the_committed_rows_are_known_by_the_fields_that_a_sampler_has_today(teacher: BenchModel) -> None:
    suite = suite_of("teacher", "ddim")
    fields = set(identity(resolve(suite, teacher, "cpu")[0], "cpu"))
    paths = list((Path(__file__).parent.parent / "results/mnist/cells").glob("*.json"))
    records = {path.stem: json.loads(path.read_text()) for path in paths}
    assert [key_of({name: record[name] for name in fields}) for record in records.values()] == list(records)
    assert len(records) > 20


def test_a_student_is_measured_once_wherever_it_stands_and_again_with_other_weights(
    folders: Path, teacher: BenchModel, tmp_path: Path
) -> None:
    def key(folder: Path) -> str:
        suite = suite_of(folders / "teacher", {"student": str(folder)}, nfe=[4])
        return key_of(identity(resolve(suite, teacher, "cpu")[0], "cpu"))

    save_checkpoint(tmp_path / "copy", checkpoint(4, 4))
    save_checkpoint(tmp_path / "changed", checkpoint(7, 4))
    save_checkpoint(
        tmp_path / "plan", replace(checkpoint(4), plans={4: make_plan("ddim", COSINE, nfe=4, grid="logsnr")})
    )
    first = key(folders / "run/students/4-steps")
    assert key(tmp_path / "copy") == first
    assert len({first, key(tmp_path / "changed"), key(tmp_path / "plan")}) == 3


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "student 'x': there is no folder"),
        ("teacher", "holds no student, which is a checkpoint with plans"),
        (".", "holds no student"),
        ("run", "is the folder of a run; give"),
        ("other", "gives samples of shape (1, 16, 16) in 10 classes"),
        ("classes", "in 3 classes, the model"),
        ("", "--student takes LABEL=PATH"),
    ],
)
def test_what_cannot_stand_in_a_table_is_refused_before_anything_is_measured(
    folders: Path, tmp_path: Path, path: str, message: str
) -> None:
    root = tmp_path / "empty" if path == "." else folders / path
    (tmp_path / "empty").mkdir()
    student = f"x={root}" if path else "x"
    result = bench("--model", folders / "teacher", "--nfe", 2, "--student", student, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_two_students_for_one_number_of_calls_are_refused(teacher: BenchModel, tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_checkpoint(tmp_path / name, checkpoint(1, 2))
    with pytest.raises(ValueError, match="were both trained for 2 calls"):
        resolve(suite_of("teacher", {"student": str(tmp_path)}), teacher, "cpu")


def test_a_student_row_has_a_label_and_no_other_fields() -> None:
    assert StudentSpec.model_validate({"student": "runs/x/students"}).label == "x"
    assert StudentSpec.model_validate({"student": "runs/x/students/4-steps"}).label == "4-steps"
    with pytest.raises(ValueError, match="stands for two rows"):
        suite_of("mnist", {"student": "a", "label": "ddim"}, "ddim")
    with pytest.raises(ValueError, match="Extra inputs"):
        suite_of("mnist", {"student": "a", "options": {}})


# further inputs of a network -----------------------------------------------------------------------------------------


def guided() -> Checkpoint:
    made = checkpoint(3, 2, info={"student": {"guidance": [0.0, 4.0]}}, scalars=("guidance",))
    for module in made.network.unet.class_embedding.scalars.values():
        torch.nn.init.normal_(module[-1].weight, std=3.0)
    return made


def test_the_weight_of_a_guided_student_reaches_its_network(teacher: BenchModel, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "guided", guided())
    rows = [{"student": str(tmp_path / "guided"), "label": f"w{w:g}", "guidance": w} for w in (0.0, 3.0)]
    suite = suite_of("teacher", *rows, {"student": str(tmp_path / "guided"), "label": "default"}, nfe=[2])
    found = measure(suite, teacher, tmp_path / "out")
    values = {row["label"]: row["value"] for row in found if row["role"] == "sampler"}
    assert values["w0"] == values["default"] != values["w3"]
    assert at(found, "w3")[2]["inputs"] == {"guidance": 3.0}
    whole = measure(suite.changed(["default"], guidance=3.0), teacher, tmp_path / "out")
    assert at(whole, "default")[2]["value"] == values["w3"]
    with pytest.raises(ValueError, match="guidance must be in the range .* 0 to 4, got 5"):
        resolve(suite_of("teacher", {**rows[0], "guidance": 5.0}), teacher, "cpu")
    with pytest.raises(ValueError, match="guidance must be in the range .* 0 to 4, got 6"):
        resolve(suite.changed(["default"], guidance=6.0), teacher, "cpu")
    assert "- Guidance weight: w0 0, w3 3, default 0." in markdown(found, (), "t")


def test_guidance_that_no_network_takes_is_refused(folders: Path, teacher: BenchModel) -> None:
    with pytest.raises(ValueError, match="no network of suite 'tiny' takes a weight"):
        resolve(suite_of("teacher", "ddim", guidance=1.0), teacher, "cpu")
    row = {"student": str(folders / "run/students"), "guidance": 1.0}
    with pytest.raises(ValueError, match="guidance must be None for a network that does not take it, got 1"):
        resolve(suite_of("teacher", row), teacher, "cpu")


def test_samplers_run_on_a_network_with_further_inputs(tmp_path: Path) -> None:
    info = {"student": {"scalars": {"2": {"steps": 1.0}, "4": {"steps": 2.0}}}}
    save_checkpoint(tmp_path / "s", checkpoint(3, 2, 4, info=info, scalars=("steps",)))
    model = load_model(str(tmp_path / "s"))
    assert [inputs_of(model, n)["steps"] for n in (1, 2, 4, 50)] == [1.0, 1.0, 2.0, 2.0]
    suite = suite_of(tmp_path / "s", {"student": str(tmp_path / "s")}, "ddim", nfe=[2])
    assert [row["status"] for row in measure(suite, model, tmp_path / "out")] == ["done"] * 3
    untold = replace(model, info={})
    assert "does not tell the value" in measure(suite_of("s", "ddim"), untold, tmp_path / "out")[0]["reason"]


# plots ---------------------------------------------------------------------------------------------------------------


def test_the_frontier_draws_students_apart(tmp_path: Path) -> None:
    base = {"role": "sampler", "status": "done", "metric": "fd", "low": 1.0, "high": 3.0, "value": 2.0}
    rows = [{**base, "label": "ddim", "budget": n, "nfe": n} for n in (2, 4)]
    student = [{**base, "label": "s", "budget": n, "nfe": n, "trained": n == 4} for n in (2, 4)]
    save_frontier(rows + student, FLOORS, "t", tmp_path / "a.png")
    plain = [{name: value for name, value in row.items() if name != "trained"} for row in student]
    save_frontier(rows + plain, FLOORS, "t", tmp_path / "b.png")
    with Image.open(tmp_path / "a.png") as a, Image.open(tmp_path / "b.png") as b:
        assert a.size[0] > 1000
        assert a.tobytes() != b.tobytes()


def test_the_teacher_row_and_samplers_use_the_suites_model(folders: Path, teacher: BenchModel) -> None:
    students = folders / "run/students"
    cells = resolve(suite_of("teacher", "ddim", {"student": str(students), "label": "s"}), teacher, "cpu")
    assert {cell.model.hash for cell in cells if cell.spec.label == "ddim"} == {teacher.hash}
    assert sample(cells[0].model.model, "ddim", shape=(1, 1, 28, 28), nfe=1).shape == (1, 1, 28, 28)
