"""A batch is judged while the next one is sampled: the same results in another order, and nothing lost when either half fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from test_engine_work import stop_in_the_third_batch

from bench import measure as bench_measure
from bench import overlap
from bench.blocks import Blocks
from bench.cli import main
from bench.engine import Run
from bench.measure import Running
from bench.overlap import SamplingStream, pipelined
from bench.suite import Suite
from bench.zoo import BenchModel, load_model

SUITE = Suite.model_validate(
    {
        "name": "tiny",
        "model": "gmm",
        "nfe": [3, 60],
        "num_samples": 24,
        "batch_size": 8,
        "metrics": ["rmse", "feature_error"],
        "samplers": ["ddpm", {"sampler": "rk45", "options": {"rtol": 0.1, "atol": 0.1}}],
        "teacher": {"sampler": "heun", "nfe": 20, "grid": "logsnr"},
    }
)
ONE = SUITE.changed(["ddim"], nfe=[4], metrics=[], num_samples=40, teacher={"sampler": "heun", "nfe": 6})
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def gmm() -> BenchModel:
    return load_model("gmm")


def a_run(suite: Suite, model: BenchModel, out: Path, **how: Any) -> Run:
    return Run(suite, model, out, Running("cpu", suite.batch_size, **how), Console(quiet=True))


def figures(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    names = ("label", "budget", "status", "reason", "nfe", "evaluations", "value", "low", "high", "metrics")
    return [tuple(row.get(name) for name in names) for row in rows]


def judging(model: BenchModel, features: Callable[[torch.Tensor], np.ndarray]) -> BenchModel:
    """The model with other features."""
    return replace(model, judge=replace(model.judge, features=features))


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_items_are_begun_and_finished_in_order_and_one_waits_at_most(count: int, ahead: bool) -> None:
    done: list[str] = []
    under_way: list[int] = []

    def begin(item: int) -> int:
        under_way.append(
            len([text for text in done if text[0] == "b"]) - len([text for text in done if text[0] == "f"])
        )
        done.append(f"b{item}")
        return item

    queue = list(range(count))
    pipelined(queue, begin, lambda item: done.append(f"f{item}"), ahead)
    if ahead:
        middle = [text for i in range(1, count) for text in (f"b{i}", f"f{i - 1}")]
        assert done == ["b0", *middle, f"f{count - 1}"][: 2 * count]
    else:
        assert done == [text for i in range(count) for text in (f"b{i}", f"f{i}")]
    assert max(under_way, default=0) == (ahead and count > 1)
    assert not queue


@pytest.mark.parametrize("ahead", [False, True])
def test_items_that_are_put_back_are_taken_again(ahead: bool) -> None:
    queue, finished, whole = [4, 4], list[int](), list[int]()

    def begin(item: int) -> int | None:
        if item > 2:
            queue[:0] = [item // 2, item // 2]
            return None
        return item

    def finish(item: int) -> None:
        whole.append(item)
        if item == 2:
            queue[:0] = [1, 1]
        else:
            finished.append(item)

    pipelined(queue, begin, finish, ahead)
    assert finished == [1] * 8
    assert whole.count(2) == 4


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_what_waits_is_finished_before_an_error_of_the_next_goes_on(error: BaseException) -> None:
    finished: list[int] = []

    def begin(item: int) -> int:
        if item == 2:
            raise error
        return item

    with pytest.raises(type(error)):
        pipelined([0, 1, 2, 3], begin, finished.append, ahead=True)
    assert finished == [0, 1]


def test_an_error_of_the_second_half_goes_on_at_once() -> None:
    begun: list[int] = []

    def finish(item: int) -> None:
        if item == 1:
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        pipelined([0, 1, 2, 3], lambda item: begun.append(item) or item, finish, ahead=True)
    assert begun == [0, 1, 2]


@pytest.mark.parametrize("how", [{}, {"share_first_call": True}])
def test_results_are_those_of_taking_turns(gmm: BenchModel, tmp_path: Path, how: dict[str, Any]) -> None:
    in_turn = a_run(SUITE, gmm, tmp_path / "a", **how)
    beside = a_run(SUITE, gmm, tmp_path / "b", overlap=True, **how)
    rows = beside.rows()
    assert figures(rows) == figures(in_turn.rows())
    assert [row["status"] for row in rows].count("absent") == 1  # rk45 in 3 calls
    assert all(row["overlapped"] for row in rows if row["status"] == "done")
    assert all("energy_joules" not in row for row in rows)
    assert in_turn.overhead is not None
    assert beside.overhead is None


def test_the_next_batch_is_begun_before_one_is_judged(gmm: BenchModel, tmp_path: Path, monkeypatch: Any) -> None:
    done: list[str] = []
    real = bench_measure.run_network

    def samples(*args: Any, indices: torch.Tensor, **options: Any) -> torch.Tensor:
        done.append(f"sample {int(indices[0])}")
        return real(*args, indices=indices, **options)

    def features(samples: torch.Tensor) -> np.ndarray:
        done.append("judge")
        return gmm.judge.features(samples)

    monkeypatch.setattr(bench_measure, "run_network", samples)
    suite = ONE.changed(num_samples=24)
    a_run(suite, judging(gmm, features), tmp_path, overlap=True).rows()
    assert done[:6] == ["sample 0", "sample 8", "judge", "sample 16", "judge", "judge"]


def test_ctrl_c_while_a_batch_is_sampled_loses_that_one_only(gmm: BenchModel, tmp_path: Path, monkeypatch: Any) -> None:
    expected = figures(a_run(ONE, gmm, tmp_path / "whole").rows())
    starts = stop_in_the_third_batch(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        a_run(ONE, gmm, tmp_path / "run", overlap=True).rows()
    assert len(list((tmp_path / "run" / "work").glob("*/*.npz"))) == 2
    assert figures(a_run(ONE, gmm, tmp_path / "run", overlap=True).rows()) == expected
    assert starts[3:6] == [16, 24, 32]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_error_while_a_batch_is_judged_loses_it_and_the_one_on_its_way(
    gmm: BenchModel, tmp_path: Path, error: BaseException
) -> None:
    judged: list[int] = []

    def features(samples: torch.Tensor) -> np.ndarray:
        judged.append(len(samples))
        if len(judged) == 3:
            raise error
        return gmm.judge.features(samples)

    with pytest.raises(type(error)):
        a_run(ONE, judging(gmm, features), tmp_path / "run", overlap=True).rows()
    (folder,) = (tmp_path / "run" / "work").iterdir()
    assert Blocks(folder).missing(40, 8) == [range(16, 24), range(24, 32), range(32, 40)]
    expected = figures(a_run(ONE, gmm, tmp_path / "whole").rows())
    assert figures(a_run(ONE, gmm, tmp_path / "run", overlap=True).rows()) == expected


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("half", ["sampling", "judging"])
def test_a_batch_that_does_not_fit_is_halved_in_either_half(
    gmm: BenchModel, tmp_path: Path, monkeypatch: Any, half: str, overlap: bool
) -> None:
    expected = figures(a_run(ONE, gmm, tmp_path / "whole").rows())
    sizes: list[int] = []
    real = bench_measure.run_network

    def small(work: Callable[..., Any], count: int, *args: Any, **options: Any) -> Any:
        sizes.append(count)
        if count > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return work(*args, **options)

    model = gmm
    if half == "sampling":
        fake = lambda *args, **options: small(real, len(options["indices"]), *args, **options)  # noqa: E731
        monkeypatch.setattr(bench_measure, "run_network", fake)
    else:
        model = judging(gmm, lambda samples: small(gmm.judge.features, len(samples), samples))
    assert figures(a_run(ONE, model, tmp_path / "small", overlap=overlap).rows()) == expected
    assert max(sizes) == 8
    assert sizes.count(2) == 2 * 20  # two cells in batches of two


@pytest.mark.parametrize("overlap", [False, True])
def test_a_network_that_gives_nan_is_a_row_that_names_the_step(
    gmm: BenchModel, tmp_path: Path, monkeypatch: Any, overlap: bool
) -> None:
    net, calls = gmm.meter.net, []

    def breaks_in_the_second_batch(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        calls.append(float(t[0]))
        return net(x, t) * (np.nan if len(calls) > 6 else 1.0)

    monkeypatch.setattr(gmm.meter, "net", breaks_in_the_second_batch)
    rows = a_run(ONE.changed(num_samples=16), gmm, tmp_path, overlap=overlap).rows()
    assert {row["status"] for row in rows} == {"failed"}
    assert rows[0]["reason"].startswith("NaN or Inf in step 1 of 4 of sampler 'ddim': the network's output at t=")
    assert len(list((tmp_path / "work").glob("*/000000000-000000008.npz"))) == 1


def test_nan_that_does_not_come_again_is_told_of(gmm: BenchModel, tmp_path: Path, monkeypatch: Any) -> None:
    real, runs = bench_measure.run_network, []

    def once(*args: Any, **options: Any) -> torch.Tensor:
        runs.append(options["check"])
        return real(*args, **options) * (np.nan if len(runs) == 1 else 1.0)

    monkeypatch.setattr(bench_measure, "run_network", once)
    rows = a_run(ONE, gmm, tmp_path).rows()
    assert rows[0]["reason"] == "ddim gave NaN or Inf, and a second run from the same noise did not"
    assert runs[:2] == [False, True]


def test_on_a_stream_of_its_own_the_copy_is_timed_and_waited_for(monkeypatch: Any) -> None:
    """The order of calls on a stand-in for torch.cuda."""
    done: list[Any] = []

    class Stream:
        def __init__(self, device: str, priority: int) -> None:
            done.append((device, priority))

        def wait_stream(self, other: str) -> None:
            done.append(f"wait for {other}")

        def synchronize(self) -> None:
            done.append("end")

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            done.append("event")

        def synchronize(self) -> None:
            done.append("arrived")

        def elapsed_time(self, after: Event) -> float:
            return 1500.0

    @contextmanager
    def within(stream: Stream) -> Iterator[None]:
        done.append("in")
        yield
        done.append("out")

    for name, value in (("Stream", Stream), ("Event", Event), ("stream", within)):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"current of {device}")
    monkeypatch.setattr(overlap, "_on_the_way", lambda samples: done.append("copy") or samples)
    with SamplingStream("cuda:1", beside=True) as stream:
        fetch = stream.begin(lambda: done.append("work") or torch.ones(3))
        assert done[2:] == ["in", "event", "work", "copy", "event", "out"]
        samples, seconds = fetch()
        assert done[-1] == "arrived"
    assert done[:2] == [("cuda:1", -1), "wait for current of cuda:1"]
    assert done[-1] == "end"
    assert (samples.tolist(), seconds) == ([1.0] * 3, 1.5)


@pytest.mark.parametrize(("device", "beside"), [("cpu", True), ("cpu", False), ("cuda", False)])
def test_without_a_stream_the_work_is_done_when_it_was_begun(device: str, beside: bool) -> None:
    done = []
    with SamplingStream(device, beside) as stream:
        fetch = stream.begin(lambda: done.append(1) or torch.ones(2))
        assert done == [1]
        samples, seconds = fetch()
    assert samples.tolist() == [1.0, 1.0]
    assert 0 <= seconds < 60
    assert fetch()[1] == seconds


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("gmm", "--overlap"), "device must be cuda, got 'cpu'"),
        (("mnist", "--dtype", "fp16"), "dtype 'fp16' needs an accelerator, got device 'cpu'"),
    ],
)
def test_what_a_processor_cannot_do_is_refused(given: tuple[str, ...], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["bench", *given, "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.gpu
@CUDA
def test_on_a_gpu_begin_returns_before_the_samples_are_there() -> None:
    with SamplingStream("cuda", beside=True) as stream:
        ones = torch.ones(4, device="cuda")

        def work() -> torch.Tensor:
            torch.cuda._sleep(2_000_000_000)  # cycles: about a second
            return 2 * ones

        stream.begin(lambda: ones)()  # makes what the first use of a stream makes
        fetch = stream.begin(work)
        busy = torch.cuda.Event()
        busy.record(stream._stream)
        assert not busy.query()
        assert torch.ones(2, device="cuda").sum().item() == 2  # what runs elsewhere does not wait for it
        assert not busy.query()
        samples, seconds = fetch()
    assert samples.is_pinned()
    assert samples.tolist() == [2.0] * 4
    assert seconds > 0.1


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize("how", [{}, {"compile": "graph"}])
def test_on_a_gpu_results_are_those_of_taking_turns(tmp_path: Path, how: dict[str, Any]) -> None:
    suite = SUITE.changed(["ddim", "ddpm"], model="mnist", nfe=[4], num_samples=120, batch_size=40, metrics=[])
    model = load_model("mnist", "cuda", "fp16")
    runs = {
        beside: Run(
            suite, model, tmp_path / str(beside), Running("cuda", 40, overlap=beside, **how), Console(quiet=True)
        )
        for beside in (False, True)
    }
    in_turn, beside = (runs[flag].rows() for flag in (False, True))
    for one, other in zip(in_turn, beside, strict=True):
        assert other["status"] == "done"
        assert other["value"] == pytest.approx(one["value"], rel=1e-3)
        assert other["images_per_second"] > 0
