"""Run a scenario: what is finished stays, what is missing is done, then tables and report."""

import errno
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType

from pandas import DataFrame
from rich.console import Console

from fedmi.runs.attacking import attack
from fedmi.runs.collect import Results, publish
from fedmi.runs.directory import (
    RunDirectory,
    RunError,
    read_marker,
    replace_text,
    write_json,
)
from fedmi.runs.environment import environment
from fedmi.runs.pool import Finished, Inline, Pool, RayPool
from fedmi.runs.progress import Board
from fedmi.runs.provenance import made_by
from fedmi.runs.training import judge, pretrain, serve, train
from fedmi.scenario.cells import (
    AttackCell,
    JudgeCell,
    Plan,
    PretrainingCell,
    ServedCell,
    TrainingCell,
    plan,
)
from fedmi.scenario.loading import load, to_toml
from fedmi.scenario.schema import Scenario

__all__ = ["DataFrame", "Results", "rebuild", "run"]

Cell = PretrainingCell | TrainingCell | ServedCell | JudgeCell | AttackCell
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


def run(
    scenario: Scenario,
    out: Path | str | None = None,
    jobs: int | None = None,
    ray_address: str | None = None,
    quiet: bool = False,
) -> Results:
    """Do every cell that `out` does not hold yet; return the tables.

    jobs: processes at once (default: all cores); 0 runs everything in this process without Ray.
    Raises RunError if the directory is in use or cannot be written. A cell that fails becomes a
    failed row and is tried again by the next run.
    """
    logging.getLogger("flwr").setLevel(logging.ERROR)  # its rounds are told by the board
    todo = plan(scenario)
    path = Path(out or Path("runs") / f"{scenario.name}-{todo.key}")
    with RunDirectory(path).locked() as directory, _room():
        _say(_before(directory, to_toml(scenario)), quiet)
        replace_text(path / "scenario.toml", to_toml(scenario))
        write_json(path / "environment.json", environment())
        failures, interrupted = _work_off(todo, directory, jobs, ray_address, quiet)
        write_json(path / "failures.json", dict(failures))
        return publish(todo, directory, failures, interrupted)


@contextmanager
def _room() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise no_room(error) from error
        raise


def _before(directory: RunDirectory, text: str) -> str:
    """A word on what the directory held: nothing, this scenario, or another one."""
    kept = directory.path / "scenario.toml"
    if not kept.is_file() or kept.read_text(encoding="utf-8") == text:
        return ""
    return f"{directory.path} held another scenario: its cells stay, its tables are replaced"


def _say(text: str, quiet: bool) -> None:
    if text and not quiet:
        Console(stderr=True).print(f"fedmi: {text}", markup=False, highlight=False)


def rebuild(path: Path | str) -> Results:
    """Tables and report again from a run directory, without running anything."""
    path = Path(path)
    if not (path / "scenario.toml").is_file():
        raise RunError(f"{path} is not a run directory: it has no scenario.toml")
    with RunDirectory(path).locked() as directory:
        return publish(plan(load(path / "scenario.toml")), directory, None, False)


def _work_off(
    todo: Plan, directory: RunDirectory, jobs: int | None, address: str | None, quiet: bool
) -> tuple[dict[str, str], bool]:
    cells: list[Cell] = [*todo.pretrainings, *todo.trainings]
    cells += [*todo.served, *todo.judges, *todo.attacks]
    if stale := [cell for cell in cells if _stale(cell, directory)]:
        _say(f"{len(stale)} cells were made by other code and are done anew", quiet)
        for cell in stale:
            directory.forget(cell.key)
    missing = {cell.key: cell for cell in cells if not directory.finished(cell.key)}
    if len(missing) < len(cells):
        _say(f"{len(cells) - len(missing)} of {len(cells)} cells are already there", quiet)
    if not missing:
        return {}, False
    count = (os.cpu_count() or 1) if jobs is None else jobs
    pool: Pool = RayPool(count, address) if count else Inline()
    swept = _titles(todo)
    titles = {key: title(cell, swept) for key, cell in missing.items()}
    groups = {key: group(cell) for key, cell in missing.items()}
    with Board(directory, groups, titles, pool.jobs, quiet) as board:
        queue = Queue(pool, board, directory, missing, inline=not count)
        try:
            queue.work_off()
        except KeyboardInterrupt:
            return queue.failures, True
        finally:
            pool.close()
    return queue.failures, False


def _titles(todo: Plan) -> dict[str, str]:
    """By key of a training or a service: the first deployment that it belongs to."""
    found: dict[str, str] = {}
    for attacked in reversed(todo.attacks):
        for cell in attacked.needs:
            if not isinstance(cell, JudgeCell):
                found[cell.key] = attacked.deployment_title
    return found


def _stale(cell: Cell, directory: RunDirectory) -> bool:
    if not directory.finished(cell.key):
        return False
    return read_marker(directory.cell(cell.key)).get("code") != made_by(cell)


@dataclass
class Queue:
    """Cells in order of need: a cell starts when what it builds on is there and cores are free."""

    pool: Pool
    board: Board
    directory: RunDirectory
    waiting: dict[str, Cell]
    inline: bool
    failures: dict[str, str] = field(default_factory=dict)
    running: dict[str, int] = field(default_factory=dict)
    built_on: dict[str, Mapping[str, Cell]] = field(default_factory=dict)

    def work_off(self) -> None:
        while self.waiting or self.running:
            self._start_ready()
            if self.running:
                for ended in self.pool.finished(0.2):
                    self._end(ended)
                self.board.refresh()

    def _start_ready(self) -> None:
        for key in list(self.waiting):
            cell = self.waiting[key]
            needed = self._needed(key)
            lost = [need for need in needed if need in self.failures]
            if lost:
                del self.waiting[key]
                self.failures[key] = f"{title(needed[lost[0]])} failed: {self.failures[lost[0]]}"
            elif all(self.directory.finished(need) for need in needed):
                workers = self._workers(cell)
                if sum(self.running.values()) + max(1, workers) <= self.pool.jobs:
                    self._start(key, workers)

    def _needed(self, key: str) -> Mapping[str, Cell]:
        """What a waiting cell builds on, by key; making a key is dear, so it is made once."""
        if key not in self.built_on:
            self.built_on[key] = {need.key: need for need in self.waiting[key].needs}
        return self.built_on[key]

    def _start(self, key: str, workers: int) -> None:
        cell = self.waiting.pop(key)
        self.running[key] = max(1, workers)
        self.board.started(key)
        self.pool.start(key, work(cell, self.directory, workers), max(1, workers))

    def _workers(self, cell: Cell) -> int:
        """Processes for one cell: few where many cells can run beside one another."""
        if self.inline:
            return 0
        if not isinstance(cell, TrainingCell):
            return 1
        rivals = sum(isinstance(other, TrainingCell) for other in self.waiting.values())
        return max(1, min(cell.deployment.parallelism, self.pool.jobs // max(1, rivals)))

    def _end(self, ended: Finished) -> None:
        self.running.pop(ended.key)
        self.board.ended(ended.key, ended.error)
        if isinstance(ended.cause, OSError) and ended.cause.errno in NO_ROOM:
            raise no_room(ended.cause)
        if ended.error:
            self.failures[ended.key] = ended.error


def no_room(error: OSError) -> RunError:
    return RunError(
        f"cannot write the run: {error.strerror}; finished cells are kept, run the same command "
        "again when there is room"
    )


def work(cell: Cell, directory: RunDirectory, workers: int) -> Callable[[], None]:
    if isinstance(cell, PretrainingCell):
        return partial(pretrain, cell, directory)
    if isinstance(cell, TrainingCell):
        return partial(train, cell, directory, workers)
    if isinstance(cell, ServedCell):
        return partial(serve, cell, directory)
    if isinstance(cell, JudgeCell):
        return partial(judge, cell, directory)
    return partial(attack, cell, directory)


def title(cell: Cell, swept: Mapping[str, str] = MappingProxyType({})) -> str:
    """What the cell does; `swept` has the titles of trainings that a sweep tells apart."""
    if isinstance(cell, TrainingCell):
        twin = "" if cell.twin == "none" else f" ({cell.twin} twin)"
        return f"train {swept.get(cell.key, cell.deployment.name)}{twin}, seed {cell.seed}"
    if isinstance(cell, ServedCell):
        training = cell.training
        twin = "" if training.twin == "none" else f" ({training.twin} twin)"
        return f"serve {swept.get(cell.key, training.deployment.name)}{twin}, seed {training.seed}"
    if isinstance(cell, PretrainingCell):
        return f"pretrain {cell.model.kind}, seed {cell.seed}"
    if isinstance(cell, JudgeCell):
        return f"train evaluator, seed {cell.seed}"
    where = f"{cell.deployment_title}, {cell.attack.channel}"
    return f"{cell.attack_title} on {where}, seed {cell.training.seed}"


def group(cell: Cell) -> str:
    """Cells of one group take about the same time."""
    if isinstance(cell, TrainingCell):
        return f"train {cell.deployment.name}"
    if isinstance(cell, ServedCell):
        return f"serve {cell.training.deployment.name}"
    if isinstance(cell, PretrainingCell):
        return f"pretrain {cell.model.kind}"
    if isinstance(cell, JudgeCell):
        return "judge"
    return f"{cell.attack_title} on {cell.deployment_title}, {cell.attack.channel}"
