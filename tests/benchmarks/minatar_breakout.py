"""Learning curves on MinAtar Breakout, dqn.py against Stable-Baselines3's DQN: one tidy CSV and a figure.

    pip install -r requirements.txt -r tests/benchmarks/requirements.txt
    python tests/benchmarks/minatar_breakout.py         # under half an hour on two cores
    python tests/benchmarks/minatar_breakout.py --steps 20000 --seeds 1 --name trial

Both have the same network (MinAtar's, Young & Tian 2019), batch, frequencies, learning rate and exploration; what
dqn.py has beyond that is in OURS. Each evaluates itself on greedy episodes, 20 at each evaluation and 100 at the end.
Writes results/NAME.csv (a row for each evaluation, the last one's 100 episodes last) and results/NAME.svg, and prints
a row for each run. What the CSV holds is not run again.
"""

import csv
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

ROOT, HERE = Path(__file__).parents[2], Path(__file__).parent
SHARED = ("--env-id minatar_envs:MinAtar/Breakout-v1 --no-cuda --learning-rate 2.5e-4 --buffer-size 100000 "
          "--learning-starts 5000 --batch-size 32 --train-frequency 4 --target-network-frequency 1000 --end-e 0.01 "
          "--exploration-fraction 0.2 --max-grad-norm 10").split()
OURS = "--no-tuned --no-anneal-lr --no-layer-norm --hidden-sizes 128 --loss huber --compile --n-step 3".split()
EPISODES, FINAL_EPISODES, MAX_STEPS = 20, 100, 5_000
COLUMNS = ("system", "seed", "step", "greedy_return")


@dataclass
class Options:
    """What to run."""

    steps: int = 200_000  # environment steps of a run
    evaluations: int = 20  # during it
    seeds: tuple[int, ...] = (11, 12, 13)  # one run of each system
    processes: int = 2  # runs at a time, one thread each
    name: str = "minatar"  # of the files in results/


def run_dqn(seed: int, steps: int, frequency: int) -> Iterator[tuple[int, float]]:
    """Steps and greedy returns of dqn.py, from its command line."""
    flags = [*SHARED, *OURS, "--seed", seed, "--total-timesteps", steps, "--eval-frequency", frequency,
             "--eval-episodes", EPISODES, "--eval-max-steps", MAX_STEPS]
    with tempfile.TemporaryDirectory() as folder:
        out = subprocess.run([sys.executable, str(ROOT / "dqn.py"), *map(str, flags)], cwd=folder, capture_output=True,
                             text=True, check=True, env=os.environ | {"PYTHONPATH": str(HERE)}).stdout
    for step, value in re.findall(r"^step ([\d,]+): greedy return ([\d.]+)", out, re.MULTILINE):
        yield int(step.replace(",", "")), float(value)


def run_sb3(seed: int, steps: int, frequency: int) -> Iterator[tuple[int, float]]:
    """The same of Stable-Baselines3."""
    import gymnasium as gym
    from sb3_dqn import Options, make_model
    from stable_baselines3.common.callbacks import EvalCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy

    model = make_model(tyro.cli(Options, args=[*SHARED, "--seed", str(seed), "--total-timesteps", str(steps)]))
    envs = make_vec_env(SHARED[1], seed=1000 + seed, wrapper_class=gym.wrappers.TimeLimit,
                        wrapper_kwargs={"max_episode_steps": MAX_STEPS})
    with tempfile.TemporaryDirectory() as folder:
        evaluations = EvalCallback(envs, n_eval_episodes=EPISODES, eval_freq=frequency, log_path=folder, verbose=0)
        model.learn(steps, evaluations)
        log = np.load(Path(folder, "evaluations.npz"))
    yield from zip(log["timesteps"][:-1].tolist(), log["results"][:-1].mean(1).tolist(), strict=True)
    yield steps, float(evaluate_policy(model, envs, FINAL_EPISODES)[0])


SYSTEMS = {"dqn.py": run_dqn, "Stable-Baselines3": run_sb3}


def run(system: str, seed: int, steps: int, frequency: int) -> tuple[list[tuple], float]:
    """The rows of one run for the CSV, and the seconds that it took."""
    sys.path.insert(0, str(HERE))
    start = time.perf_counter()
    rows = [(system, seed, *point) for point in SYSTEMS[system](seed, steps, frequency)]
    return rows, time.perf_counter() - start


def draw(rows: list[tuple], path: Path) -> None:
    """Each run as a thin line, the mean over the seeds as a thick one."""
    import figures

    curves = defaultdict(dict)
    for system, seed, step, value in rows:
        curves[system].setdefault(int(seed), []).append((int(step), float(value)))
    with figures.figure(path, xlabel="environment steps", ylabel="greedy return") as axes:
        for colour, (system, runs) in zip(("C0", "C1"), curves.items(), strict=False):
            for run in runs.values():
                axes.plot(*zip(*run, strict=True), color=colour, linewidth=0.6, alpha=0.6)
            steps = [step for step, _ in next(iter(runs.values()))]
            means = np.mean([[value for _, value in run] for run in runs.values()], axis=0)
            axes.plot(steps, means, color=colour, linewidth=2, label=f"{system}, mean of {len(runs)} seeds")
        axes.xaxis.set_major_formatter("{x:,.0f}")


def main(options: Options) -> None:
    """Run what the CSV lacks, print a row for each run, draw the figure."""
    path = HERE / "results" / f"{options.name}.csv"
    rows = list(csv.reader(path.open(newline="")))[1:] if path.exists() else []
    done = {(system, int(seed)): int(step) for system, seed, step, _ in rows}
    if set(done.values()) - {options.steps}:
        sys.exit(f"{path} is of other --steps; give another --name")
    missing = [(system, seed) for seed in options.seeds for system in SYSTEMS if (system, seed) not in done]
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    print("| system | seed | final greedy return | best evaluation | minutes |\n|-|-|-|-|-|")
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
        frequency = options.steps // options.evaluations
        running = {pool.submit(run, *each, options.steps, frequency): each for each in missing}
        for each in as_completed(running):
            (system, seed), (points, seconds) = running[each], each.result()
            returns = [value for *_, value in points]
            print(f"| {system} | {seed} | {returns[-1]:.2f} | {max(returns):.2f} | {seconds / 60:.1f} |", flush=True)
            rows += points
            with path.open("w", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(COLUMNS)
                writer.writerows(sorted(rows, key=lambda row: (row[0], int(row[1]), int(row[2]))))
    draw(sorted(rows, key=lambda row: (row[0], int(row[1]), int(row[2]))), path.with_suffix(".svg"))


if __name__ == "__main__":
    main(tyro.cli(Options))
