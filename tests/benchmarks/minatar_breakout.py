"""Learning curves on MinAtar Breakout, dqn.py against Stable-Baselines3's DQN: one tidy CSV and a figure.

    pip install -r requirements.txt -r tests/benchmarks/requirements.txt
    python tests/benchmarks/minatar_breakout.py         # under half an hour on two cores
    python tests/benchmarks/minatar_breakout.py --steps 20000 --seeds 1 --results /tmp/trial

Both have the same network (MinAtar's, Young & Tian 2019), batch, frequencies, learning rate and exploration; what
dqn.py has beyond that is in OURS. Each evaluates itself on greedy episodes, 20 at each evaluation and 100 at the end.
Writes minatar.csv (a row for each evaluation, the last one's 100 episodes last) and minatar.svg, and prints a row for
each run. What the CSV holds is not run again.
"""

import csv
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import figures
import gymnasium as gym
import numpy as np
import sb3_dqn
import sweep
import tyro
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

ENV_ID = "minatar_envs:MinAtar/Breakout-v1"
SHARED = dict(learning_rate=2.5e-4, buffer_size=100_000, learning_starts=5_000, batch_size=32, train_frequency=4,
              target_network_frequency=1_000, end_e=0.01, exploration_fraction=0.2, max_grad_norm=10.0)
EPISODES, FINAL_EPISODES, MAX_STEPS = 20, 100, 5_000
OURS = dict(tuned=False, anneal_lr=False, layer_norm=False, hidden_sizes=(128,), loss="huber", n_step=3,
            eval_episodes=EPISODES, eval_max_steps=MAX_STEPS, checkpoint_frequency=0)
COLUMNS = ("system", "seed", "step", "greedy_return")


@dataclass
class Options:
    """What to run."""

    steps: int = 200_000  # environment steps of a run
    evaluations: int = 20  # during it
    seeds: tuple[int, ...] = (11, 12, 13)  # one run of each system
    processes: int = 2  # runs at a time, one thread each
    results: Path = sweep.RESULTS  # folder of the CSV and the figure


def run_dqn(seed, steps, frequency):
    """Return steps and greedy returns of dqn.py."""
    changes = SHARED | OURS | dict(total_timesteps=steps, eval_frequency=frequency)
    rows = sweep.do(sweep.Run(ENV_ID, "", seed, changes))
    values = [(row.step, row.value) for row in rows if row.tag == sweep.CURVE]
    return [*values[:-1], *((steps, row.value) for row in rows if row.tag == sweep.FINAL)]


def run_sb3(seed, steps, frequency):
    """Return the same of Stable-Baselines3."""
    model = sb3_dqn.make_model(sb3_dqn.Options(env_id=ENV_ID, seed=seed, total_timesteps=steps, **SHARED))
    envs = make_vec_env(ENV_ID, seed=1000 + seed, wrapper_class=gym.wrappers.TimeLimit,
                        wrapper_kwargs={"max_episode_steps": MAX_STEPS})
    with tempfile.TemporaryDirectory() as folder:
        evaluations = EvalCallback(envs, n_eval_episodes=EPISODES, eval_freq=frequency, log_path=folder, verbose=0)
        model.learn(steps, evaluations)
        log = np.load(Path(folder, "evaluations.npz"))
    values = zip(log["timesteps"].tolist(), log["results"].mean(1).tolist(), strict=True)
    return [*list(values)[:-1], (steps, float(evaluate_policy(model, envs, FINAL_EPISODES)[0]))]


SYSTEMS = {"dqn.py": run_dqn, "Stable-Baselines3": run_sb3}


def run(system, seed, steps, frequency):
    """Return the rows of one run for the CSV, and the minutes that it took."""
    start = time.perf_counter()
    rows = [(system, seed, *point) for point in SYSTEMS[system](seed, steps, frequency)]
    return rows, (time.perf_counter() - start) / 60


def draw(rows, path):
    """Draw each run as a thin line, the mean over the seeds as a thick one."""
    with figures.panels(path, [""], 1, 3.5, xlabel="environment steps", ylabel="greedy return") as (axes,):
        for colour, system in zip(("C0", "C1"), SYSTEMS, strict=True):
            curves = {}
            for _, seed, step, value in (row for row in rows if row[0] == system):
                curves.setdefault(seed, []).append((step, value))
            for points in curves.values():
                axes.plot(*zip(*points, strict=True), color=colour, linewidth=0.6, alpha=0.6)
            steps, means = np.mean(list(curves.values()), axis=0).T
            axes.plot(steps, means, color=colour, linewidth=2, label=f"{system}, mean of {len(curves)} seeds")
        axes.xaxis.set_major_formatter("{x:,.0f}")


def main(options):
    """Run what the CSV lacks, print a row for each run, draw the figure."""
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / "minatar.csv"
    saved = list(csv.reader(path.open(newline="")))[1:] if path.exists() else []
    rows = [(system, int(seed), int(step), float(value)) for system, seed, step, value in saved]
    done = {(system, seed): step for system, seed, step, _ in rows}
    if set(done.values()) - {options.steps}:
        sys.exit(f"{path} is of other --steps; give other --results")
    os.environ["OMP_NUM_THREADS"] = "1"
    print("| system | seed | final greedy return | best evaluation | minutes |\n|-|-|-|-|-|")
    with ProcessPoolExecutor(options.processes, max_tasks_per_child=1) as pool:
        tasks = [pool.submit(run, system, seed, options.steps, options.steps // options.evaluations)
                 for seed in options.seeds for system in SYSTEMS if (system, seed) not in done]
        for task in as_completed(tasks):
            points, minutes = task.result()
            system, seed, _, final = points[-1]
            best = max(value for *_, value in points)
            print(f"| {system} | {seed} | {final:.2f} | {best:.2f} | {minutes:.1f} |", flush=True)
            rows = sorted([*rows, *points])
            with path.open("w", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(COLUMNS)
                writer.writerows(rows)
    draw(rows, path.with_suffix(".svg"))


if __name__ == "__main__":
    main(tyro.cli(Options))
