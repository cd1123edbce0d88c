"""What the benchmarks share: runs over seeds into one tidy CSV, the statistics of what they returned, a timer.

A CSV has a row for each value: env_id, setting (a name), key (a checksum of all settings), seed, step, tag, value. A
run is in it as a whole or not at all, and is not run again as long as its settings are the same.
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
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

TESTS = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("results")
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import dqn  # noqa: E402
from conftest import scalars  # noqa: E402

CURVE = "eval/episodic_return"
FINAL, SPREAD, BEST, STEPS, SECONDS = "final/return", "final/spread", "final/best", "final/steps", "final/seconds"
TRIAL = dict(total_timesteps=3_000, learning_starts=1_500, buffer_size=5_000, eval_frequency=1_500, eval_episodes=2,
             eval_max_steps=50)


@dataclasses.dataclass
class Options:
    """What to run."""

    env_ids: tuple[str, ...]  # environments
    seeds: tuple[int, ...] = tuple(range(11, 21))  # one run each of every setting
    trial: Path | None = None  # folder for the results of tiny runs that learn nothing

    @property
    def results(self):
        return self.trial or RESULTS


class Run(NamedTuple):
    """One run of dqn.py."""

    env_id: str
    setting: str  # a name for `changes`
    seed: int
    changes: dict[str, Any]  # settings of dqn.Args

    @property
    def args(self):
        """All settings; as on the command line, TUNED comes before the plain defaults."""
        tuned = dqn.tuned_settings(self.env_id) if self.changes.get("tuned", True) else {}
        return dqn.Args(**tuned | self.changes | dict(env_id=self.env_id, seed=self.seed))

    @property
    def key(self):
        """A checksum of the settings."""
        return f"{zlib.crc32(repr(self.args).encode()):08x}"


class Row(NamedTuple):
    """One value of one run."""

    env_id: str
    setting: str
    key: str
    seed: int
    step: int
    tag: str
    value: float


@contextlib.contextmanager
def quiet_folder():
    """Work in an empty folder, with nothing printed."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        yield


def timer(function, seconds):
    """Make a function that also notes how long each of its calls takes."""
    def call(*given, **named):
        start = time.perf_counter()
        result = function(*given, **named)
        seconds.append(time.perf_counter() - start)
        return result

    return call


@contextlib.contextmanager
def timed(*places):
    """Collect the seconds of every call of functions, each given as (owner, name)."""
    seconds = []
    with contextlib.ExitStack() as stack:
        for owner, name in places:
            stack.enter_context(mock.patch.object(owner, name, timer(getattr(owner, name), seconds)))
        yield seconds


def rows_of(run, values):
    """Make rows of (step, tag, value)."""
    identity = (run.env_id, run.setting, run.key, run.seed)
    return [Row(*identity, step, tag, float(f"{value:.6g}")) for step, tag, value in values]


def do(run, prepare=None, tags=()):
    """Train, and let the best network play 100 episodes that it was not chosen by; return the run's rows.

    `prepare(run)` may change dqn before, to log more; `tags` are what is kept of that. Use a process for each call.
    """
    if prepare:
        prepare(run)
    play, final = dqn.play, []
    dqn.play = lambda *given: final.append(play(*given)) or final[-1]  # what the run itself plays at its end
    with quiet_folder():
        start = time.perf_counter()
        run_dir = dqn.train(run.args)
        seconds = time.perf_counter() - start
        best = play(dqn.load(run_dir), run.args, dqn.FINAL_EPISODES)
        shown = scalars(run_dir)
    values = [(step, tag, value) for tag in (CURVE, *tags) for step, value in shown[tag]]
    steps = shown[CURVE][-1][0]
    values += [(steps, FINAL, final[0].mean()), (steps, SPREAD, final[0].std()), (steps, BEST, best.mean()),
               (steps, STEPS, steps), (steps, SECONDS, seconds)]
    return rows_of(run, values)


def read(path):
    """Read all rows of a CSV; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [Row(r["env_id"], r["setting"], r["key"], int(r["seed"]), int(r["step"]), r["tag"], float(r["value"]))
                for r in csv.DictReader(file)]


def write(path, rows):
    """Replace a CSV, whole."""
    partial = path.with_suffix(".tmp")
    with partial.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows(sorted(rows, key=lambda row: row[:2] + row[3:6]))
    partial.replace(path)


def sweep(path, runs, prepare=None, tags=(), do=do):
    """Do the runs that are not in the CSV yet, one process a core, one thread each; return the rows of all."""
    os.environ["OMP_NUM_THREADS"] = "1"
    path.parent.mkdir(exist_ok=True, parents=True)
    wanted = {(run.env_id, run.setting, run.key, run.seed): run for run in runs}
    rows = read(path)
    done = {row[:4] for row in rows}
    names = {key[:2] + key[3:] for key in wanted}  # with another key they are out of date
    rows = [row for row in rows if row[:4] in wanted or row[:2] + row[3:4] not in names]
    with ProcessPoolExecutor(os.cpu_count(), max_tasks_per_child=1) as executor:
        tasks = [executor.submit(do, run, prepare, tags) for key, run in wanted.items() if key not in done]
        for number, task in enumerate(as_completed(tasks), 1):
            new = task.result()
            rows += new
            write(path, rows)
            final = {row.tag: row.value for row in new}
            print(f"{number} of {len(tasks)}: {new[0].env_id} {new[0].setting} seed {new[0].seed}: final return "
                  f"{final[FINAL]:.1f} ± {final[SPREAD]:.1f}, {final[SECONDS]:.0f} s", flush=True)
    return [row for row in read(path) if row[:4] in wanted]


def table(rows, env_id, setting, tag):
    """Collect the values of one tag: seed -> step -> value."""
    values = {}
    for row in rows:
        if (row.env_id, row.setting, row.tag) == (env_id, setting, tag):
            values.setdefault(row.seed, {})[row.step] = row.value
    return dict(sorted(values.items()))


def last(rows, env_id, setting, tag):
    """Collect the last value of a tag in each run, in the order of the seeds."""
    return np.array([values[max(values)] for values in table(rows, env_id, setting, tag).values()])


def iqm(scores, axis=0):
    """Compute the interquartile mean: a quarter of the scores, rounded down, is left out at each end."""
    scores = np.sort(scores, axis=axis)
    cut = scores.shape[axis] // 4
    return scores.take(range(cut, scores.shape[axis] - cut), axis).mean(axis)


def interval(scores, statistic=iqm, repetitions=2000, seed=0):
    """Compute a 95% percentile interval of a statistic of scores (runs,) by bootstrap (Agarwal et al. 2021)."""
    drawn = np.random.default_rng(seed).integers(len(scores), size=(repetitions, len(scores)))
    low, high = np.percentile(statistic(np.asarray(scores)[drawn], axis=1), (2.5, 97.5))
    return float(low), float(high)
