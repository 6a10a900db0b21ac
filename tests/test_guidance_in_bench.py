"""Guidance in a benchmark: suites that describe it, cells that are told apart by it, and what it costs, counted and claimed."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from rich.console import Console

import bench.measure as bench_measure
from bench.bench_cli import bench as bench_command
from bench.cells import identity, resolve
from bench.dry_run import dry_run
from bench.engine import Run
from bench.guidance import Autoguidance, ClassifierFree, PlusPlus, Projected, weight_of
from bench.measure import Running
from bench.meter import Meter
from bench.plots import save_frontier
from bench.ranking import beyond_model
from bench.results import read_rows
from bench.suite import Suite, load_suite
from bench.table import frame, markdown
from bench.zoo import BenchModel, load_model
from samplers import EpsModel, guidance, run_plan
from samplers.noise import standard_normal

BASE: dict[str, Any] = {
    "name": "tiny",
    "model": "gmm",
    "nfe": [4],
    "num_samples": 8,
    "batch_size": 5,
    "samplers": ["ddim"],
    "teacher": {"sampler": "ddim", "nfe": 6},
}


def suite(samplers: list[Any] | None = None, **changes: Any) -> Suite:
    return Suite.model_validate({**BASE, **({} if samplers is None else {"samplers": samplers}), **changes})


@pytest.fixture(scope="module")
def labelled() -> BenchModel:
    """The mixture's problem with a network of three classes and a null class, whose classes are shifts of the mixture."""
    gmm = load_model("gmm")
    inner, shifts = gmm.meter.net, torch.tensor([[0.0, 0.3], [0.3, 0.0], [-0.3, -0.3], [0.0, 0.0]])

    def net(x: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor, **weights: torch.Tensor) -> torch.Tensor:
        moved = shifts[class_labels] * (1 + weights["guidance"][:, None] if weights else 1)
        return inner(x - moved, t)

    judge = replace(gmm.judge, classify=lambda samples: (samples[:, 0] > 0).long().numpy())
    model = EpsModel(Meter(net), gmm.model.schedule)
    return replace(gmm, model=model, judge=judge, classes=3, null_label=3)


def measured(described: Suite, model: BenchModel, out: Path, **how: Any) -> list[dict[str, Any]]:
    return Run(described, model, out, Running("cpu", 5, **how), Console(quiet=True)).rows()


KINDS: list[tuple[dict[str, Any], int, int]] = [  # and evaluations of a sample by four calls of ddim, of which guided
    ({"scale": 2.0}, 8, 8),
    ({"scale": 1.0}, 4, 0),
    ({"scale": 2.0, "batched": False}, 8, 8),
    ({"kind": "cfg", "scale": 2.0, "interval": [0.1, 10.0], "rescale": 0.5}, 6, 4),
    ({"kind": "apg", "scale": 3.0, "eta": 0.5, "norm_threshold": 2.0, "momentum": -0.5}, 8, 8),
    ({"kind": "cfg++", "scale": 0.6}, 8, 8),
    ({"kind": "autoguidance", "scale": 2.0, "weaker": "gmm"}, 8, 8),
    ({"kind": "none"}, 4, 0),
]


def test_every_kind_is_sampled_as_by_hand_and_counted(labelled: BenchModel, tmp_path: Path) -> None:
    rows = [{"sampler": "ddim", "label": str(i), "guidance": kind} for i, (kind, _, _) in enumerate(KINDS[:6])]
    run = Run(suite(rows), labelled, tmp_path, Running("cpu", 5), Console(quiet=True))
    by_hand = [
        lambda m, plan: guidance.classifier_free(m, 2.0, {"class_labels": 3}),
        lambda m, plan: m,
        lambda m, plan: guidance.classifier_free(m, 2.0, {"class_labels": 3}, batched=False),
        lambda m, plan: guidance.classifier_free(m, 2.0, {"class_labels": 3}, interval=(0.1, 10.0), rescale=0.5),
        lambda m, plan: guidance.apg(m, 3.0, {"class_labels": 3}, eta=0.5, norm_threshold=2.0, momentum=-0.5),
        lambda m, plan: guidance.cfg_plus_plus(m, 0.6, {"class_labels": 3}, plan),
    ]
    found = run.rows()
    for i, (wrap, (_, evaluations, of_which)) in enumerate(zip(by_hand, KINDS, strict=False)):
        cell, row = run.cells[i], found[i]
        assert row["status"] == "done", row["reason"]
        x_T = standard_normal(0, torch.arange(8), 0, (2,)).mul_(cell.plan.sigma_T)
        expected = run_plan(cell.plan, wrap(labelled.model, cell.plan), x_T, cond={"class_labels": torch.arange(8) % 3})
        got = run_plan(cell.plan, cell.model.model, x_T, cond={"class_labels": torch.arange(8) % 3})
        assert torch.equal(got, expected)
        assert row["evaluations"] == evaluations
        assert row["sequential_calls"] == 4
        assert row["guided_evaluations"] == of_which
        assert row["nfe"] == (8 if KINDS[i][0].get("batched") is False else 4)
    assert "guidance" not in found[-1]
    assert len({row["value"] for row in found[:6]}) == 5  # one batched call or two are the same samples


def test_a_weaker_model_is_counted_beside(tmp_path: Path) -> None:
    row = {"sampler": "ddim", "label": "auto", "guidance": {"kind": "autoguidance", "scale": 2.0, "weaker": "gmm"}}
    plain, auto, _ = measured(suite(["ddim", row]), load_model("gmm"), tmp_path)
    assert auto["value"] == pytest.approx(plain["value"], rel=1e-4)  # away from itself is nowhere
    told = [(row["nfe"], row["sequential_calls"], row["evaluations"]) for row in (plain, auto)]
    assert told == [(4, 4, 4), (8, 4, 8)]
    assert auto["model_hash"] != plain["model_hash"]  # the weaker model is part of it


def test_cells_are_told_apart_by_guidance(labelled: BenchModel) -> None:
    rows = [{"sampler": "ddim", "label": str(i), "guidance": kind} for i, (kind, _, _) in enumerate(KINDS)]
    rows = [row for row in rows if row["guidance"].get("kind") != "autoguidance"]
    keys = [identity(cell, "cpu") for cell in resolve(suite(["ddim", *rows]), labelled, "cpu")]
    texts = [key.get("guidance", "") for key in keys]
    assert texts[:3] == ["", "cfg(scale=2.0)", "cfg(scale=1.0)"]
    assert texts[-1] == ""
    assert keys[0] == keys[-2]  # kind none is no guidance
    assert len(set(texts)) == len(texts) - 2


def test_guidance_of_a_suite_is_that_of_every_row_and_of_the_model_itself(labelled: BenchModel) -> None:
    rows = ["ddim", {"sampler": "heun", "guidance": {"kind": "none"}}, {"sampler": "euler", "guidance": {"scale": 4}}]
    described = suite(rows, guidance={"scale": 2.0}, metrics=["rmse"])
    cells = resolve(described, labelled, "cpu")
    told = {cell.spec.label if cell.role == "sampler" else "teacher": cell for cell in cells}
    assert [told[name].guidance and told[name].guidance.text for name in ("teacher", "ddim", "heun", "euler")] == [
        "cfg(scale=2.0)",
        "cfg(scale=2.0)",
        None,
        "cfg(scale=4.0)",
    ]
    assert [told[name].follows for name in ("ddim", "heun", "euler")] == [True, False, False]


def test_a_network_that_takes_a_weight_is_called_once(labelled: BenchModel, tmp_path: Path) -> None:
    student = replace(labelled, scalars=("guidance",))
    rows = measured(suite(guidance={"kind": "cfg", "scale": 3.0}), student, tmp_path)
    same = measured(suite(guidance=2.0), student, tmp_path)
    assert [row["inputs"] for row in rows] == [{"guidance": 2.0}] * 2
    assert [row["evaluations"] for row in rows] == [4, 6]
    assert rows == same
    with pytest.raises(
        ValueError, match=r"guidance must be a weight, or kind cfg with a scale alone.*got apg\(scale=3.0\)"
    ):
        resolve(suite(guidance={"kind": "apg", "scale": 3.0}), student, "cpu")


def test_weights() -> None:
    assert weight_of(None) is None
    assert weight_of(2.5) == 2.5
    assert weight_of(ClassifierFree(scale=3.5)) == 2.5
    for other in (ClassifierFree(scale=2, rescale=0.5), Projected(scale=2), PlusPlus(scale=0.5)):
        with pytest.raises(ValueError, match="must be a weight"):
            weight_of(other)
    assert Autoguidance(scale=2, weaker="gmm").text == "autoguidance(scale=2.0, weaker=gmm)"


def test_a_model_without_a_null_condition(labelled: BenchModel) -> None:
    without = replace(labelled, null_label=None)
    with pytest.raises(ValueError, match=r"row 'ddim': guidance needs a null condition: model gmm has no condition"):
        resolve(suite(guidance={"scale": 2.0}), without, "cpu")
    never = replace(labelled, info={"training": {"drop_label": 0}})
    with pytest.raises(
        ValueError, match=r"row 'ddim': guidance needs a null condition, and model gmm was trained with"
    ):
        resolve(suite(guidance={"scale": 2.0}), never, "cpu")
    with pytest.raises(ValueError, match=r"row 'x': guidance must be a mapping, such as \{kind: cfg, scale: 3\}"):
        resolve(suite([{"sampler": "ddim", "label": "x", "guidance": 2.0}]), labelled, "cpu")


def test_cfg_plus_plus_needs_a_grid(labelled: BenchModel) -> None:
    row = {"sampler": "rk45", "guidance": {"kind": "cfg++", "scale": 0.5}}
    [cell, _] = resolve(suite([row]), labelled, "cpu")
    assert "'cfg++' goes with the steps of a grid" in cell.problem


def test_an_error_controlled_sampler_is_counted(labelled: BenchModel, tmp_path: Path) -> None:
    row = {"sampler": "rk45", "options": {"rtol": 0.1, "atol": 0.1}, "guidance": {"scale": 2.0}}
    [found, _] = measured(suite([row], nfe=[200]), labelled, tmp_path)
    assert found["evaluations"] == 2 * found["sequential_calls"]
    assert found["nfe"] == found["sequential_calls"]
    assert "guided_evaluations" not in found


def test_a_claim_that_the_meter_does_not_share_is_an_error(
    labelled: BenchModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = suite(guidance={"scale": 2.0})
    monkeypatch.setattr(ClassifierFree, "evaluations", lambda self, plan: (plan.nfe, 0))
    with pytest.raises(RuntimeError, match="ddim: guidance says 4 evaluations of a sample, the network counted 8"):
        measured(described, labelled, tmp_path / "a")
    real = bench_measure.run_network

    def more(model: Any, *args: Any, indices: torch.Tensor, **options: Any) -> torch.Tensor:
        model.metered(torch.zeros(len(indices), 2), 0.5, class_labels=indices % 3)
        return real(model, *args, indices=indices, **options)

    monkeypatch.setattr(bench_measure, "run_network", more)
    with pytest.raises(RuntimeError, match="ddim: the plan says 4 network calls, the network counted 5"):
        measured(described, labelled, tmp_path / "b")


def test_a_shared_first_call_is_that_of_the_same_guidance(labelled: BenchModel, tmp_path: Path) -> None:
    rows = [
        {"sampler": name, "label": f"{name}{i}", "guidance": kind}
        for i, kind in enumerate(({"kind": "none"}, {"scale": 2.0}, {"scale": 2.0, "batched": False}))
        for name in ("ddim", "heun")
    ]
    figures = [
        [
            (row["label"], row["value"], row["evaluations"])
            for row in measured(suite(rows), labelled, tmp_path / name, **how)
        ]
        for name, how in (("a", {}), ("b", {"share_first_call": True}))
    ]
    assert figures[0] == figures[1]


@pytest.mark.slow
def test_a_compiled_loop_is_counted_too(labelled: BenchModel, tmp_path: Path) -> None:
    net = Meter(lambda x, t, class_labels: x * t[:, None] + class_labels[:, None].to(x.dtype))
    simple = replace(labelled, model=EpsModel(net, labelled.model.schedule))
    described = suite(guidance={"scale": 2.0, "interval": [0.1, 10.0]}, nfe=[2], teacher={"sampler": "ddim", "nfe": 2})
    plain = measured(described, simple, tmp_path / "a")
    compiled = measured(described, simple, tmp_path / "b", compile="loop")
    for name in ("nfe", "evaluations", "sequential_calls", "guided_evaluations"):
        assert [row[name] for row in plain] == [row[name] for row in compiled]
    assert compiled[0]["value"] == pytest.approx(plain[0]["value"], rel=1e-4)


# what is shown -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(labelled: BenchModel, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    described = suite(["ddim", {"sampler": "ddim", "label": "guided", "guidance": {"scale": 2.0}}], nfe=[2, 4])
    return measured(described, labelled, tmp_path_factory.mktemp("rows"))


def test_the_table_says_calls_depth_and_evaluations(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    text = markdown(rows, (), "t")
    assert "Evaluations of a sample at the budgets: guided cfg(scale=2.0) 4, 8." in text
    assert "| sampler | budget | calls | sequential depth | evaluations | evaluations under guidance |" in text
    assert "| guided | 4 | 4 | 4 | 8 | 8 |" in text
    assert "| ddim | 4 | 4 | 4 | 4 |  |" in text
    agreement = text.split("## Label agreement")[1]
    assert (
        f"| guided | {100 * rows[1]['label_agreement']:.1f} % | {100 * rows[3]['label_agreement']:.1f} % |" in agreement
    )
    frame(rows).to_csv(tmp_path / "table.csv", index=False)
    assert [row.get("guidance") for row in read_rows(tmp_path)] == [None, "cfg(scale=2.0)"] * 2 + [None]


def test_a_guided_row_stands_at_its_evaluations(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    save_frontier(rows, (), "t", tmp_path / "f.svg")
    text = (tmp_path / "f.svg").read_text()
    assert "network evaluations per sample (NFE)" in text
    assert "<!-- 8 -->" in text  # a tick at four calls of two evaluations


def test_a_guided_row_is_not_compared_with_the_unguided_model(rows: list[dict[str, Any]]) -> None:
    better = [{**row, "value": row["value"] * (1e-3 if row["role"] == "sampler" else 1)} for row in rows]
    assert beyond_model(better) == {("ddim", 2), ("ddim", 4)}


def test_a_dry_run_knows_the_evaluations(labelled: BenchModel, tmp_path: Path) -> None:
    run = Run(suite(guidance={"scale": 2.0}), labelled, tmp_path, Running("cpu", 5), Console(quiet=True))
    console = Console(width=120, file=io.StringIO())
    console.print(dry_run(run))
    assert "4 (8 evaluations)" in console.file.getvalue()


# what is typed -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"kind": "cfgg", "scale": 2},
            r"tiny\.yaml, line \d+: guidance: unknown guidance kind 'cfgg'; did you mean 'cfg'",
        ),
        ({"scale": 2, "intervall": [0, 1]}, r"tiny\.yaml, line \d+: guidance\.intervall: no such field"),
        ({"scale": 2, "interval": [3, 1]}, r"guidance\.interval: must be \[low, high\] in sigma_bar"),
        ({"scale": 2, "rescale": 2}, r"guidance\.rescale: "),
        ({"kind": "cfg"}, r"guidance\.scale: "),
        ({"kind": "cfg++", "scale": 0.5, "interval": [0, 1]}, r"guidance\.interval: "),
        ({"kind": "cfg++", "scale": 0}, r"guidance\.scale: "),
        ({"kind": "apg", "scale": 2, "norm_threshold": 0}, r"guidance\.norm_threshold: "),
        ({"kind": "autoguidance", "scale": 2}, r"guidance\.weaker: "),
        ("much", r"guidance: .*got 'much'"),
    ],
)
def test_a_bad_suite_names_file_and_field(tmp_path: Path, given: Any, message: str) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**BASE, "guidance": given}))
    with pytest.raises(ValueError, match=message):
        load_suite(str(path))


def test_a_suite_with_guidance_can_be_changed() -> None:
    shipped = load_suite("guidance")
    changed = shipped.changed(["cfg-2", "apg-4"], nfe=[3])
    assert [spec.guidance for spec in changed.samplers] == [
        ClassifierFree(scale=2.0),
        next(spec.guidance for spec in shipped.samplers if spec.label == "apg-4"),
    ]
    assert changed.changed(guidance={"scale": 3}).guidance == ClassifierFree(scale=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("much", "--guidance takes a number, or a mapping such as"),
        ("{kind: cfgg, scale: 2}", "guidance: unknown guidance kind 'cfgg'; did you mean 'cfg'"),
        ("{scale: 2}", "row 'ddim': guidance needs a null condition: model gmm has no condition that stands for none"),
        ("2.0", "guidance=2 is given, but no network of suite 'gmm' takes a weight"),
    ],
)
def test_the_command_says_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    command = ["gmm", "--samplers", "ddim", "--num-samples", "4", "--guidance", text, "--out", str(tmp_path)]
    found = CliRunner().invoke(bench_command, command)
    assert found.exit_code != 0
    assert message in " ".join(found.output.split())
