"""Plays the rows of a comparison side by side, each in a process of a pool, and keeps what was played."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from equipoise.errors import ConfigError, EquipoiseError, InvalidInputError
from equipoise.load.trace import LoadTrace
from equipoise.replay.costs import CostModel
from equipoise.replay.grid import Candidate, Played, play, trace_digest


class ResumeFile:
    """Rows that were played, one a line; a line that was cut off is played again.

    Raises:
        ConfigError: the file cannot be read.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.rows: dict[str, dict[str, Any]] = {}
        if path is None or not path.exists():
            return
        try:
            lines = path.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"resume {path}: cannot be read: {error}", field="resume") from None
        for line in lines:
            try:
                entry = json.loads(line)
                self.rows[entry["key"]] = entry["row"]
            except (ValueError, KeyError, TypeError):
                continue

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Keeps a row.

        Raises:
            ConfigError: the file cannot be written.
        """
        self.rows[key] = row
        if self._path is None:
            return
        try:
            with self._path.open("a") as file:
                file.write(json.dumps({"key": key, "row": row}) + "\n")
        except OSError as error:
            raise ConfigError(f"resume {self._path}: cannot be written: {error.strerror}", field="resume") from error


def play_all(
    candidates: Sequence[Candidate],
    trace: LoadTrace,
    costs: CostModel,
    *,
    jobs: int | None = None,
    resume: ResumeFile | None = None,
    on_row: Callable[[], None] = lambda: None,
) -> list[Played]:
    """Plays rows side by side; in the order of the candidates.

    An algorithm that cannot plan for a topology leaves its row out, with its reason.

    Raises:
        EquipoiseError: anything else that failed.
    """
    kept = resume or ResumeFile(None)
    digest = trace_digest(trace)
    keys = [candidate.key(digest, costs) for candidate in candidates]
    found: dict[int, Played] = {}
    todo = []
    for index, (candidate, key) in enumerate(zip(candidates, keys, strict=True)):
        if key in kept.rows:
            found[index] = Played(candidate, kept.rows[key])
            on_row()
        else:
            todo.append(index)
    for index, played in _played([candidates[i] for i in todo], trace, costs, jobs or _cpus()):
        at = todo[index]
        found[at] = played
        if played.row is not None:
            kept.add(keys[at], played.row)
        on_row()
    return [found[index] for index in range(len(candidates))]


def _cpus() -> int:
    return len(os.sched_getaffinity(0))


def _played(
    candidates: Sequence[Candidate], trace: LoadTrace, costs: CostModel, jobs: int
) -> Iterator[tuple[int, Played]]:
    if jobs == 1 or len(candidates) < 2:
        for index, candidate in enumerate(candidates):
            yield index, _attempt(candidate, trace, costs)
        return
    # Spawned and not forked: numba's and torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, _receive, (trace, costs)) as pool:
        running: dict[Future[Played], int] = {
            pool.submit(_attempt_received, candidate): index for index, candidate in enumerate(candidates)
        }
        for future in as_completed(running):
            yield running[future], future.result()


_received: list[Any] = []


def _receive(trace: LoadTrace, costs: CostModel) -> None:
    torch.set_num_threads(1)  # the workers share the cores; more threads would wait for each other
    _received[:] = [trace, costs]


def _attempt_received(candidate: Candidate) -> Played:
    return _attempt(candidate, *_received)


def _attempt(candidate: Candidate, trace: LoadTrace, costs: CostModel) -> Played:
    try:
        return Played(candidate, play(candidate, trace, costs))
    except InvalidInputError as error:
        return Played(candidate, None, str(error))
    except EquipoiseError as error:
        if "cannot plan here" not in str(error):
            raise
        return Played(candidate, None, str(error))
