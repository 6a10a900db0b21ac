"""Run a suite: every cell is sampled, judged and saved before the next begins."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench.blocks import Blocks
from bench.cells import Cell, Row, identity, resolve
from bench.judging import Arrays
from bench.measure import Advance, OutOfTimeError, Running, measure, sampled
from bench.pictures import are_there, of_first_samples, save_pictures
from bench.results import unknown_figure
from bench.store import Store, key_of
from bench.suite import Suite
from bench.table import value_text
from bench.zoo import BenchModel
from samplers import SamplingError
from samplers.errors import ToleranceError

_WAIT = 1.0  # seconds between two looks at a cell that another process measures


def run_suite(suite: Suite, model: BenchModel, out: Path, device: str, console: Console) -> list[Row]:
    """Measure every cell of a suite that is not yet in `out`, and return all rows; see `Run`."""
    return Run(suite, model, out, Running(device, suite.batch_size), console).rows()


@dataclass
class Run:
    """A run of a suite in one folder.

    Args:
        suite: what to measure.
        model: loaded on `running.device`.
        out: results folder; `cells/` holds what is finished, `work/` what is not, `samples/` a picture of each cell.
        running: how.
        console: where progress is shown.
        shard: (i, n), which measures every n-th cell only, from i on, i < n.

    Attributes:
        cells: of the suite, in the order in which they are measured.
        cost: seconds of this process so far: `wall` of the run, `whole` of measuring cells, of which `sampling` and `judging`;
            and the number of `cells` that it measured.
    """

    suite: Suite
    model: BenchModel
    out: Path
    running: Running
    console: Console
    shard: tuple[int, int] = (0, 1)
    cells: list[Cell] = field(init=False)
    cost: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        """Resolve the cells.

        Raises:
            ValueError: a shard that there is not; or a student that cannot be loaded, or does not fit the model.
        """
        i, n = self.shard
        if not 0 <= i < n:
            raise ValueError(f"shard must be i/n with 0 <= i < n, got {i}/{n}")
        self.cells = resolve(self.suite, self.model, self.running.device)
        self.cost = dict.fromkeys(("wall", "whole", "sampling", "judging", "cells"), 0.0)
        self._tell: Callable[[str], None] = lambda text: self.console.print(text, soft_wrap=True, highlight=False)
        self._store = Store(self.out, self._tell)
        self._solutions: dict[int, Arrays | SamplingError] = {}  # by seed
        self._found: dict[int, Row] = {}  # by number of the cell

    def rows(self) -> list[Row]:
        """Measure every cell of the shard that is not yet in the folder, and return the rows of all that are known.

        Returns:
            Rows in the order of the cells, the teacher's last; one that failed has `status` "failed" and a `reason`, one that
            the budget rules out "absent" (the sampler needs more calls, or no student was trained for so few), and one of
            another shard that is not there yet "missing".

        Raises:
            bench.workers.WorkerLostError: another process of the run is gone; nothing that was measured is lost.
            bench.measure.OutOfTimeError: `running.deadline` came before the last batch; likewise.
            ValueError: processes of the run do not see one results folder.
        """
        (i, n), began = self.shard, time.perf_counter()
        self.running.workers.check_shared(self.out)
        found: dict[int, Row] = {}
        with self._progress() as (progress, task):
            queue = [number for number in range(len(self.cells)) if number % n == i]
            while queue:
                waiting = [number for number in queue if not self._measured(number, found, progress, task)]
                if len(waiting) == len(queue):  # other processes have all of them
                    if time.monotonic() > self.running.deadline:
                        raise OutOfTimeError("the run's time is over, and other processes have the cells that are left")
                    time.sleep(_WAIT)
                queue = waiting
        self._found = found
        rows = self.known()
        self._clean(rows)
        self.cost["wall"] += time.perf_counter() - began
        return rows

    def known(self) -> list[Row]:
        """As `rows`, of what is measured by now, by other shards too; nothing is measured."""
        order = sorted(range(len(self.cells)), key=lambda number: (self.cells[number].role == "teacher", number))
        return [self._found.get(number) or self._stored(self.cells[number]) for number in order]

    @property
    def overhead(self) -> float | None:
        """What the engine took beside sampling and judging, as a share; None where nothing was measured, or side by side."""
        useful, alone = self.cost["sampling"] + self.cost["judging"], self.running.workers.size == 1
        return self.cost["whole"] / useful - 1.0 if useful and alone and not self.running.overlap else None

    @property
    def record(self) -> Row:
        """What this process did, for the provenance; {} where it measured nothing."""
        if not self.cost["cells"]:
            return {}
        names = {"wall": "wall_seconds", "sampling": "sampling_seconds", "judging": "judging_seconds"}
        seconds = {name: round(self.cost[part], 3) for part, name in names.items()}
        overhead = None if self.overhead is None else round(self.overhead, 4)
        return {"measured_cells": int(self.cost["cells"]), "cells": len(self.cells), **seconds, "overhead": overhead}

    def _measured(self, number: int, found: dict[int, Row], progress: Progress, task: TaskID) -> bool:
        """Whether a cell's row is in `found` now; False where another process measures it."""
        cell, workers = self.cells[number], self.running.workers
        made_by = identity(cell, self.running.device)
        title = f"[{number + 1}/{len(self.cells)}] {cell.spec.label} at {cell.nfe} calls"
        title += f", seed {cell.seed}" if len(self.suite.seeds) > 1 else ""
        progress.update(task, description=title)
        before = progress.tasks[task].completed
        with self._store.claim(made_by) if workers.leads else nullcontext(True) as mine:
            record = self._store.get(made_by) if workers.leads else None
            record, mine = workers.agreed((record, mine))
            if record is None and not mine:
                return False
            if record is None:
                record = workers.agreed(self._outcome(cell, made_by, partial(progress.advance, task)))
            elif mine:
                if workers.leads and not cell.is_solution:
                    self._store.blocks(made_by).remove()  # of a process that was killed between record and removal
                self._show_again(cell, made_by)
        if not cell.problem:  # also where it took fewer calls than it might
            progress.update(task, completed=before + cell.calls * cell.num_samples)
        found[number] = self._row(cell, record)
        if not self.console.is_terminal and workers.leads:
            self.console.print(_line(title, found[number]), highlight=False, soft_wrap=True)
        return True

    def _outcome(self, cell: Cell, made_by: Row, advance: Advance) -> Row:
        """Measure a cell, and save it where that went well."""
        if cell.problem:
            return {**made_by, **cell.without}
        try:
            solution = self._solution(cell)
        except SamplingError as error:
            return self._off_the_path(cell, str(error), advance)
        began, blocks = time.perf_counter(), self._store.blocks(made_by)
        try:
            outcome, arrays = measure(cell, self.running, blocks, advance, solution)
        except SamplingError as error:
            status = "absent" if isinstance(error, ToleranceError) else "failed"
            return {**made_by, "status": status, "reason": str(error)}
        finally:
            cell.model.metered.compiled.clear()  # a loop is compiled for one plan, and no other cell has it
        if not outcome:  # the leading process has it
            return {}
        save_pictures(cell, arrays, self.out / "samples", key_of(made_by))
        record = self._store.put(made_by, outcome)
        figures = outcome["judging_seconds"] - blocks.total("judging_seconds")
        if not cell.is_solution:
            blocks.remove()
        self._add_cost(began, blocks, figures)
        self.cost["cells"] += 1
        return record

    def _show_again(self, cell: Cell, made_by: Row) -> None:
        """Make the pictures of a measured cell where they are gone, or are those of another cell of its label and budget."""
        folder, key, few = self.out / "samples", key_of(made_by), of_first_samples(cell)
        if cell.problem or self.running.workers.agreed(are_there(cell, folder, key)):
            return
        blocks = self._store.blocks(identity(few, self.running.device))
        arrays = sampled(few, self.running, blocks)
        if self.running.workers.leads:
            save_pictures(few, arrays, folder, key)
            blocks.remove()

    def _add_cost(self, began: float, blocks: Blocks, figures: float = 0.0) -> None:
        """Count the time since `began`, in which these blocks, and figures in so many seconds, were made."""
        self.cost["whole"] += time.perf_counter() - began
        self.cost["sampling"] += blocks.added.get("seconds", 0.0)  # and none of a run that was stopped
        self.cost["judging"] += blocks.added.get("judging_seconds", 0.0) + figures

    def _stored(self, cell: Cell) -> Row:
        """The row of a cell that this process was not to measure."""
        made_by = identity(cell, self.running.device)
        left = cell.without if cell.problem else {"status": "missing", "reason": "left to another shard"}
        return self._row(cell, self._store.get(made_by) or {**made_by, **left})

    def _off_the_path(self, cell: Cell, reason: str, advance: Advance) -> Row:
        """Measure what of a cell does not compare with the many-step run.

        It is kept as the cell that asks for no more, so that another run tries the rest again.
        """
        rest, workers = cell.off_the_path, self.running.workers
        made_by = identity(rest, self.running.device)
        with self._store.claim(made_by, wait=True) if workers.leads else nullcontext():
            record = workers.agreed(self._store.get(made_by) if workers.leads else None)
            record = record or self._outcome(rest, made_by, advance)
        if record.get("status") != "done":
            return record
        lost = {metric.name: unknown_figure(reason) for metric in cell.further if metric.follows_the_path}
        return {**record, "metrics": {**(record.get("metrics") or {}), **lost}}

    def _solution(self, cell: Cell) -> Arrays | None:
        """The many-step run that a cell is compared with, sampled again where its samples are no longer there.

        Raises:
            SamplingError: that run failed.
        """
        if not cell.follows:
            return None
        if cell.seed not in self._solutions:
            many = next(other for other in self.cells if other.is_solution and other.seed == cell.seed)
            made_by, leads = identity(many, self.running.device), self.running.workers.leads
            self._store.use(made_by)  # other processes leave its blocks alone
            with self._store.claim(made_by, wait=True) if leads else nullcontext():
                began, blocks = time.perf_counter(), self._store.blocks(made_by)
                try:
                    self._solutions[cell.seed] = sampled(many, self.running, blocks)
                except SamplingError as error:  # not tried again for every cell
                    self._solutions[cell.seed] = error
                self._add_cost(began, blocks)
        found = self._solutions[cell.seed]
        if isinstance(found, SamplingError):
            raise SamplingError(f"the many-step run failed: {found}")
        return found

    def _clean(self, rows: list[Row]) -> None:
        self._solutions.clear()
        for model in {id(cell.model): cell.model for cell in self.cells}.values():
            model.meter.forget()
        if self.running.workers.leads and all(row["status"] != "missing" for row in rows):
            for cell in self.cells:
                if cell.is_solution:
                    self._store.remove(identity(cell, self.running.device))
            self._store.tidy()

    def _row(self, cell: Cell, record: Row) -> Row:
        return {
            "role": cell.role,
            "label": cell.spec.label,
            **record,
            **cell.resolved,
            **cell.remarks,
            **cell.tuning,
        }

    @contextmanager
    def _progress(self) -> Iterator[tuple[Progress, TaskID]]:
        i, n = self.shard
        mine = [cell for number, cell in enumerate(self.cells) if number % n == i and not cell.problem]
        columns = (
            *(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%")),
            *(TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()),
        )
        hidden = not self.running.workers.leads
        with Progress(*columns, console=self.console, speed_estimate_period=120.0, disable=hidden) as progress:
            total = sum(cell.calls * cell.num_samples for cell in mine)
            yield progress, progress.add_task(self.suite.name, total=total)


def _line(title: str, row: Row) -> str:
    if row["status"] != "done":
        return f"{title}: {row['status']}: {row['reason']}"
    return f"{title}: {row['metric']} {value_text(row)} in {row['seconds']:.1f} s"
