"""What the learning benchmarks share: runs over seeds into one tidy CSV, and the statistics of what they returned.

A CSV has a row for each value: env_id, setting (a name), key (a checksum of all that the setting means), seed, step,
tag, value. A run is in it as a whole or not at all, and is not run again as long as its settings are the same.
"""

import contextlib
import csv
import dataclasses
import io
import os
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("results")
sys.path.insert(0, str(ROOT))

import dqn  # noqa: E402

FINAL, SPREAD, BEST, STEPS, SECONDS = "final/return", "final/spread", "final/best", "final/steps", "final/seconds"


class Run(NamedTuple):
    """One run of dqn.py."""

    env_id: str
    setting: str  # a name for `changes`
    seed: int
    changes: dict[str, Any]  # settings of dqn.Args

    @property
    def args(self) -> dqn.Args:
        """All settings."""
        given = {"env_id": self.env_id, "seed": self.seed, "checkpoint_frequency": 0}
        return dqn.Args(**given | self.changes)

    @property
    def key(self) -> str:
        """A checksum of the settings that decide what is learned and evaluated; those the environment has, too."""
        sections = (dqn.Environment, dqn.Learning, dqn.Network, dqn.Exploration)
        names = [field.name for section in sections for field in dataclasses.fields(section) if field.name != "seed"]
        names += ["eval_frequency", "eval_episodes", "stop_return"]
        values = [getattr(self.args, name) for name in names] + [dqn.find_environment(self.args).kwargs]
        return f"{zlib.crc32(repr(values).encode()):08x}"


class Row(NamedTuple):
    """One value of one run."""

    env_id: str
    setting: str
    key: str
    seed: int
    step: int
    tag: str
    value: float


Watch = Callable[[int, dqn.Learner], dict[str, float]]  # values to record, by tag, whenever dqn.py logs


def do(run: Run, watcher: Callable[[Run], Watch] | None = None) -> list[Row]:
    """Train, and let the best network play 100 episodes that it was not chosen by; the run's rows."""
    start, values = time.perf_counter(), []
    watch = watcher(run) if watcher else None

    def record(step: int, learner: dqn.Learner) -> None:
        values.extend((step, tag, value) for tag, value in watch(step, learner).items())

    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        result = dqn.train(run.args, record if watch else None)
        seconds, best = time.perf_counter() - start, result.final_returns
        if run.args.eval_frequency:
            best = dqn.play(dqn.Args(evaluate=str(result.run_dir), eval_episodes=dqn.FINAL_EPISODES)).returns
    values += [(step, "eval/episodic_return", value) for step, value in result.evaluations]
    final, steps = result.final_returns, result.global_step
    values += [(steps, FINAL, final.mean()), (steps, SPREAD, final.std()), (steps, BEST, best.mean()),
               (steps, STEPS, steps), (steps, SECONDS, seconds)]
    identity = (run.env_id, run.setting, run.key, run.seed)
    return [Row(*identity, step, tag, float(f"{value:.6g}")) for step, tag, value in values]


def read(path: Path) -> list[Row]:
    """All rows of a CSV; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [Row(r["env_id"], r["setting"], r["key"], int(r["seed"]), int(r["step"]), r["tag"], float(r["value"]))
                for r in csv.DictReader(file)]


def write(path: Path, rows: Iterable[Row]) -> None:
    """Replace a CSV, whole."""
    partial = path.with_suffix(".tmp")
    with partial.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows(sorted(rows, key=lambda row: row[:2] + row[3:6]))
    partial.replace(path)


def sweep(path: Path, runs: Iterable[Run], watcher: Callable[[Run], Watch] | None = None) -> list[Row]:
    """Do the runs that are not in the CSV yet, one process a core, one thread each; the rows of all."""
    os.environ["OMP_NUM_THREADS"] = "1"
    path.parent.mkdir(exist_ok=True)
    wanted = {(run.env_id, run.setting, run.key, run.seed): run for run in runs}
    rows = read(path)
    done = {row[:4] for row in rows}
    names = {key[:2] + key[3:] for key in wanted}  # with another key they are out of date
    rows = [row for row in rows if row[:4] in wanted or row[:2] + row[3:4] not in names]
    with ProcessPoolExecutor(os.cpu_count(), max_tasks_per_child=1) as executor:
        tasks = [executor.submit(do, run, watcher) for key, run in wanted.items() if key not in done]
        for number, task in enumerate(as_completed(tasks), 1):
            new = task.result()
            rows += new
            write(path, rows)
            final = {row.tag: row.value for row in new}
            print(f"{number} of {len(tasks)}: {new[0].env_id} {new[0].setting} seed {new[0].seed}: final return "
                  f"{final[FINAL]:.1f} ± {final[SPREAD]:.1f}, {final[SECONDS]:.0f} s", flush=True)
    return [row for row in read(path) if row[:4] in wanted]


def table(rows: Iterable[Row], env_id: str, setting: str, tag: str) -> dict[int, dict[int, float]]:
    """Values of one tag: seed -> step -> value."""
    values: dict[int, dict[int, float]] = {}
    for row in rows:
        if (row.env_id, row.setting, row.tag) == (env_id, setting, tag):
            values.setdefault(row.seed, {})[row.step] = row.value
    return dict(sorted(values.items()))


def last(rows: Iterable[Row], env_id: str, setting: str, tag: str) -> np.ndarray:
    """The last value of a tag in each run, in the order of the seeds."""
    return np.array([values[max(values)] for values in table(rows, env_id, setting, tag).values()])


def iqm(scores: np.ndarray, axis: int | None = None) -> np.ndarray:
    """Interquartile mean: a quarter of the scores, rounded down, left out at each end (Agarwal et al. 2021)."""
    scores = np.sort(scores, axis=axis)
    if axis is None:
        axis = 0
    cut = scores.shape[axis] // 4
    return scores.take(range(cut, scores.shape[axis] - cut), axis).mean(axis)


def interval(scores: np.ndarray, statistic: Callable[..., np.ndarray] = iqm, repetitions: int = 2000,
             seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of a statistic of scores (runs,) or (runs, strata) by stratified bootstrap.

    In each repetition every stratum (a task, say) draws as many of its own runs as it has, with replacement, and the
    statistic is taken over all that were drawn (Agarwal et al. 2021).
    """
    scores = scores.reshape(len(scores), -1)
    drawn = np.random.default_rng(seed).integers(len(scores), size=(repetitions, *scores.shape))
    samples = np.take_along_axis(scores[None], drawn, axis=1).reshape(repetitions, -1)
    low, high = np.percentile(statistic(samples, axis=1), (2.5, 97.5))
    return float(low), float(high)
