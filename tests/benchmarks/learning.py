"""The default command over seeds: one tidy CSV and the figure of the README.

    pip install -r requirements.txt -r tests/benchmarks/requirements.txt
    python tests/benchmarks/learning.py --env-id CartPole-v1 --seeds 11 12 13 14 15 16 17 18 19 20

Writes results/ENV_ID.csv (a row for each evaluation of each seed, the verdict's 100 episodes last) and
results/ENV_ID.svg, and prints a row for each seed. Runs as many processes as there are cores, one thread each.
"""

import contextlib
import csv
import io
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("results")


@dataclass
class Options:
    """What to run."""

    env_id: str = "CartPole-v1"  # environment
    seeds: tuple[int, ...] = tuple(range(11, 21))  # one run each


def run(env_id: str, seed: int) -> tuple[list[tuple], str]:
    """Rows for the CSV and a line for the table, from one run of the default settings."""
    sys.path.insert(0, str(ROOT))
    import dqn

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        os.chdir(folder)
        result = dqn.train(dqn.Args(env_id=env_id, seed=seed))
        os.chdir(ROOT)
    seconds, final = time.perf_counter() - start, result.final_returns
    rows = [(env_id, seed, step, round(mean, 3)) for step, mean in result.evaluations]
    return rows, (f"| {seed} | {final.mean():.1f} ± {final.std():.1f} | {result.best_return:.1f} | "
                  f"{result.global_step:,} | {seconds:.1f} s |")


def draw(rows: list[tuple], path: Path) -> None:
    """Greedy return over steps: a thin line for each seed, a thick one for the mean of the seeds still running."""
    import matplotlib as mpl

    mpl.use("agg")
    mpl.rcParams["svg.hashsalt"] = "dqn"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    for seed in sorted({row[1] for row in rows}):
        curve = [(step, value) for _, s, step, value in rows if s == seed]
        (line,) = axes.plot(*zip(*curve, strict=True), color="tab:blue", alpha=0.45, linewidth=1)
        axes.plot(*curve[-1], "o", color="tab:blue", alpha=0.6, markersize=4)
    line.set_label("one seed, dot: the verdict")
    axes.set(xlabel="environment steps", ylabel="greedy return", title=rows[0][0])
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, metadata={"Date": None})


def main(options: Options) -> None:
    """Run, write, draw."""
    os.environ["OMP_NUM_THREADS"] = "1"
    print("| seed | final greedy return | best evaluation | steps | whole run |\n|-|-|-|-|-|")
    with ProcessPoolExecutor(os.cpu_count(), max_tasks_per_child=1) as executor:
        table = []
        for rows, line in executor.map(run, [options.env_id] * len(options.seeds), options.seeds):
            table += rows
            print(line, flush=True)
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{options.env_id}.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("env_id", "seed", "step", "greedy_return"))
        writer.writerows(table)
    draw(table, RESULTS / f"{options.env_id}.svg")


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Options))
