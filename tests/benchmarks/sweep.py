"""What the benchmarks share: runs over seeds into one tidy CSV, the statistics of what they returned, and tables.

A CSV has a row for each value: env_id, setting (a name), commit (of the dqn.py that ran), seed, step, tag, value. A run
is in it as a whole or not at all, and is not run again: to have it measured with another dqn.py, delete its rows.
"""

import contextlib
import dataclasses
import io
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

TESTS = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("results")
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import dqn  # noqa: E402
from conftest import scalars, verdict  # noqa: E402

COLUMNS = ["env_id", "setting", "commit", "seed", "step", "tag", "value"]
CURVE = "eval/episodic_return"
FINAL, SPREAD, BEST, STEPS, SECONDS = "final/return", "final/spread", "final/best", "final/steps", "final/seconds"


@dataclasses.dataclass
class Options:
    """What to run."""

    env_ids: tuple[str, ...]  # environments
    seeds: tuple[int, ...] = tuple(range(11, 21))  # one run each of every setting


class Run(NamedTuple):
    """One run of dqn.py."""

    env_id: str
    setting: str  # a name for `changes`
    seed: int
    changes: dict[str, Any]  # settings of dqn.Args

    @property
    def args(self):
        """All settings; as on the command line, TUNED comes before the plain defaults."""
        tuned = [] if self.changes.get("tuned", True) else ["--no-tuned"]
        return dataclasses.replace(dqn.parse_args(["--env-id", self.env_id, *tuned]), seed=self.seed, **self.changes)


@contextlib.contextmanager
def quiet_folder():
    """Work in an empty folder, with nothing printed."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        yield


def log_more(measure, Log=dqn.Log, learn=dqn.learn):  # noqa: N803
    """Have dqn.train log what `measure(agent, replay, step)` returns, too, whenever it logs losses."""
    class LogMore(Log):
        def record(self, infos, epsilon, metrics, steps):
            if metrics:
                metrics = metrics | measure(self.agent, self.replay, steps[-1])
            super().record(infos, epsilon, metrics, steps)

    def learn_more(args, envs, eval_envs, agent, replay, log, *rest):
        log.agent, log.replay = agent, replay
        learn(args, envs, eval_envs, agent, replay, log, *rest)

    dqn.Log, dqn.learn = LogMore, learn_more


def rows_of(run, values):
    """Make rows of (step, tag, value)."""
    git = ["git", "log", "-1", "--format=%h", "--", dqn.__file__]  # the last commit that changed the file
    commit = subprocess.run(git, cwd=TESTS, capture_output=True, text=True, check=True).stdout.strip()
    return pd.DataFrame([(*run[:2], commit, run.seed, step, tag, float(f"{value:.6g}"))
                         for step, tag, value in values], columns=COLUMNS)


def do(run, prepare=None, tags=()):
    """Train, and let the best network play 100 episodes that it was not chosen by; return the run's rows.

    `prepare(run)` may change dqn before, to log more; `tags` are what is kept of that. Use a process for each call.
    """
    with quiet_folder():
        if prepare:
            prepare(run)
        start = time.perf_counter()
        run_dir = dqn.train(run.args)
        seconds = time.perf_counter() - start
        best = dqn.play(dqn.load(run_dir), run.args, 100)
        final, shown = verdict(run_dir), scalars(run_dir)
    values = [(step, tag, value) for tag in (CURVE, *tags) for step, value in shown.get(tag, ())]
    steps = shown[CURVE][-1][0]
    values += [(steps, FINAL, final["mean"]), (steps, SPREAD, final["std"]), (steps, BEST, best.mean()),
               (steps, STEPS, steps), (steps, SECONDS, seconds)]
    return rows_of(run, values)


def read(path):
    """Read all rows of a CSV; none where there is no file."""
    return pd.read_csv(path, dtype={"commit": str}) if path.exists() else pd.DataFrame(columns=COLUMNS)


def sweep(name, runs, prepare=None, tags=(), do=do, threads=1):
    """Do the runs that are not in a CSV yet, as many at a time as there are cores for; return the rows of all."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    path = RESULTS / f"{name}.csv"
    wanted = {run[:3]: run for run in runs}  # by environment, setting and seed
    rows = read(path)
    done = set(zip(rows.env_id, rows.setting, rows.seed, strict=True))
    with ProcessPoolExecutor(os.cpu_count() // threads, max_tasks_per_child=1) as executor:
        tasks = [executor.submit(do, run, prepare, tags) for name, run in wanted.items() if name not in done]
        for number, task in enumerate(as_completed(tasks), 1):
            new = task.result()
            rows = pd.concat([rows, new]) if len(rows) else new
            rows = rows.sort_values(["env_id", "setting", "seed", "step", "tag"])
            rows.to_csv(path.with_suffix(".tmp"), index=False)
            path.with_suffix(".tmp").replace(path)
            final = new.set_index("tag").value
            print(f"{number} of {len(tasks)}: {new.env_id[0]} {new.setting[0]} seed {new.seed[0]}: final return "
                  f"{final[FINAL]:.1f} ± {final[SPREAD]:.1f}, {final[SECONDS]:.0f} s", flush=True)
    return rows[[name in wanted for name in zip(rows.env_id, rows.setting, rows.seed, strict=True)]]


def table(rows, env_id, setting, tag):
    """Collect the values of one tag, by step and seed."""
    chosen = rows[(rows.env_id == env_id) & (rows.setting == setting) & (rows.tag == tag)]
    return chosen.pivot(index="step", columns="seed", values="value")


def last(rows, env_id, setting, tag):
    """Collect the last value of a tag in each run, in the order of the seeds."""
    return table(rows, env_id, setting, tag).ffill().iloc[-1].to_numpy()


def commits(rows, env_id, setting):
    """Name the dqn.py that a setting was measured with."""
    return ", ".join(sorted(set(rows.commit[(rows.env_id == env_id) & (rows.setting == setting)])))


def head(*titles):
    """Print the head of a Markdown table."""
    line(*titles)
    print("|" + "-|" * len(titles))


def line(*cells):
    """Print a line of a Markdown table."""
    print("|", " | ".join(map(str, cells)), "|", flush=True)


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
