"""Learning curves on MinAtar Breakout, dqn.py against Stable-Baselines3's DQN: one tidy CSV, a table and a figure.

    pip install -r requirements.txt -r tests/benchmarks/requirements.txt
    python tests/benchmarks/minatar_breakout.py         # under half an hour on two cores

Both have the same network (MinAtar's, Young & Tian 2019), batch, frequencies, learning rate and exploration; what
dqn.py has beyond that is in OURS. Each evaluates itself on greedy episodes, 20 at each evaluation and 100 at the end.
Writes results/minatar_breakout.csv and .svg. Runs that the CSV holds are not repeated.
"""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import figures
import gymnasium as gym
import numpy as np
import sb3_dqn
import sweep
import tyro
from learning import curve
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

ENV_ID = "minatar_envs:MinAtar/Breakout-v1"
SHARED = dict(total_timesteps=200_000, learning_rate=2.5e-4, buffer_size=100_000, learning_starts=5_000, batch_size=32,
              train_frequency=4, target_network_frequency=1_000, end_e=0.01, exploration_fraction=0.2,
              max_grad_norm=10.0)
OURS = dict(tuned=False, anneal_lr=False, layer_norm=False, hidden_sizes=(128,), loss="huber", n_step=3,
            eval_frequency=10_000, eval_episodes=20, eval_max_steps=5_000, checkpoint_frequency=0)
SYSTEMS = ("dqn.py", "Stable-Baselines3")


@dataclass
class Options(sweep.Options):
    """What to run."""

    env_ids: tuple[str, ...] = (ENV_ID,)  # environments
    seeds: tuple[int, ...] = (11, 12, 13)  # one run of each system


def do(run, prepare, tags):
    """Train and evaluate one system; return the run's rows."""
    if run.setting == "dqn.py":
        return sweep.do(run)
    args, start = run.args, time.perf_counter()
    shared = {name: getattr(args, name) for name in (*SHARED, "env_id", "seed")}
    model = sb3_dqn.make_model(sb3_dqn.Options(**shared))
    envs = make_vec_env(args.env_id, seed=1000 + args.seed, wrapper_class=gym.wrappers.TimeLimit,
                        wrapper_kwargs={"max_episode_steps": args.eval_max_steps})
    with tempfile.TemporaryDirectory() as folder:
        model.learn(args.total_timesteps, EvalCallback(envs, n_eval_episodes=args.eval_episodes, verbose=0,
                                                       eval_freq=args.eval_frequency, log_path=folder))
        log = np.load(Path(folder, "evaluations.npz"))
    steps, (final, spread) = args.total_timesteps, evaluate_policy(model, envs, sweep.dqn.FINAL_EPISODES)
    values = [(int(step), sweep.CURVE, returns.mean())
              for step, returns in zip(log["timesteps"], log["results"], strict=True)]
    values += [(steps, sweep.FINAL, final), (steps, sweep.SPREAD, spread),
               (steps, sweep.SECONDS, time.perf_counter() - start)]
    return sweep.rows_of(run, values)


def main(options):
    """Run what is missing, print a row for each run, draw each as a thin line and the means as thick ones."""
    changes = SHARED | OURS | (sweep.TRIAL if options.trial else {})
    runs = [sweep.Run(env_id, system, seed, changes)
            for env_id in options.env_ids for seed in options.seeds for system in SYSTEMS]
    path = options.results / "minatar_breakout.csv"
    rows = sweep.sweep(path, runs, do=do)
    print("| environment | system | seeds | final greedy returns | mean |\n|-|-|-|-|-|")
    with figures.panels(path.with_suffix(".svg"), options.env_ids, 1, 3.5, xlabel="environment steps",
                        ylabel="greedy return") as places:
        for axes, env_id in zip(places, options.env_ids, strict=True):
            for number, system in enumerate(SYSTEMS):
                final = sweep.last(rows, env_id, system, sweep.FINAL)
                print(f"| {env_id} | {system} | {len(final)} | {', '.join(f'{value:.2f}' for value in final)} | "
                      f"{final.mean():.2f} |")
                steps, returns = curve(rows, env_id, system)
                axes.plot(steps, returns.T, color=f"C{number}", linewidth=0.6, alpha=0.6)
                axes.plot(steps, returns.mean(0), color=f"C{number}", linewidth=2, label=f"{system}, mean")
            axes.xaxis.set_major_formatter("{x:,.0f}")


if __name__ == "__main__":
    main(tyro.cli(Options))
