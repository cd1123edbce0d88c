"""What the default commands learn, seed by seed: one tidy CSV, a table and a figure.

    python tests/benchmarks/learning.py                                          # hours on two cores
    python tests/benchmarks/learning.py --experiments tuned --env-ids ALE/Pong-v5 --seeds 11 --threads 2 --name pong

`tuned` runs `python dqn.py --env-id ENV`, `ablation` adds one part at a time to plain Q-learning. Runs that
results/learning.csv holds are not repeated, so the script can be stopped and started again.
"""

from dataclasses import dataclass
from typing import Literal

import figures
import numpy as np
import sweep
import tyro
from sweep import BEST, CURVE, FINAL, Run
from target_network import HARD, PLAIN, SETTINGS, STEPS

CONTROL = ("CartPole-v1", "Acrobot-v1", "MountainCar-v0", "LunarLander-v3")

# One part at a time, added to the plain Q-learning of target_network.py with its hard sync every 500 steps.
ABLATIONS = {
    "nothing added": {},
    "three steps": {"n_step": 3},
    "Double DQN": {"double_q": True},
    "dueling": {"dueling": True},
    "LayerNorm": {"layer_norm": True},
    "soft sync": SETTINGS["soft, 0.05"],
}


@dataclass
class Options(sweep.Options):
    """What to run."""

    env_ids: tuple[str, ...] = CONTROL  # environments; the ablation has two of them
    seeds: tuple[int, ...] = tuple(range(31, 41))  # one run each
    experiments: tuple[Literal["tuned", "ablation"], ...] = ("tuned", "ablation")
    threads: int = 1  # of a run; as many run at a time as there are cores for
    name: str = "tuned"  # of the figure


def prepare(run):
    """Register MinAtar's games, which Gymnasium does not know."""
    if run.env_id.startswith("MinAtar/"):
        import minatar.gym

        minatar.gym.register_envs()


def settings(options):
    """List environment, name and changes of all settings that are asked for."""
    lists = {
        "tuned": [(env_id, "tuned", {}) for env_id in options.env_ids],
        "ablation": [(env_id, name, PLAIN | HARD | dict(total_timesteps=STEPS[env_id]) | changes)
                     for env_id in options.env_ids if env_id in STEPS for name, changes in ABLATIONS.items()],
    }
    return [setting for experiment in options.experiments for setting in lists[experiment]]


def curve(rows, env_id, setting):
    """Collect steps (T,) of the evaluations and returns (seeds, T); a run that has ended keeps its last value."""
    returns = sweep.table(rows, env_id, setting, CURVE).ffill().bfill()
    return returns.index.to_numpy(), returns.to_numpy().T


def draw_curves(name, rows, setting, env_ids, columns):
    """Draw every seed over the steps, their interquartile mean and its interval, in a panel for each environment."""
    with figures.panels(name, env_ids, columns, xlabel="environment steps", ylabel="greedy return") as places:
        for axes, env_id in zip(places, env_ids, strict=True):
            steps, returns = curve(rows, env_id, setting)
            few = len(returns) < 4  # of so few the interval would be the range, and the IQM is the mean
            for line in returns:
                axes.plot(steps, line, color="gray", alpha=0.7 if few else 0.35, linewidth=0.7, label="one seed")
            middle = "mean" if few else "interquartile mean, 95% interval"
            axes.plot(steps, sweep.iqm(returns), color="C0", label=middle)
            if not few:
                band = np.array([sweep.interval(column) for column in returns.T])
                axes.fill_between(steps, *band.T, color="C0", alpha=0.2, linewidth=0)
            axes.xaxis.set_major_formatter(lambda step, _: f"{step / 1000:g}k")


def number(value):
    """Write a number with three digits or more."""
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def table(rows, shown):
    """Print a line for each environment and setting."""
    sweep.head("environment", "setting", "commit", "final: IQM (95% interval)", "mean", "lowest", "best network",
               "steps", "time")
    for env_id, setting in shown:
        final, best, steps, seconds = (sweep.last(rows, env_id, setting, tag)
                                       for tag in (FINAL, BEST, sweep.STEPS, sweep.SECONDS))
        low, high = map(number, sweep.interval(final))
        sweep.line(env_id, setting, sweep.commits(rows, env_id, setting),
                   f"{number(sweep.iqm(final))} ({low} to {high})", number(final.mean()), number(final.min()),
                   number(best.mean()), f"{steps.mean():,.0f}", f"{np.median(seconds):.0f} s")


def main(options):
    """Run what is missing, print the table and draw the curves of the default commands."""
    asked = settings(options)
    runs = [Run(env_id, name, seed, changes) for env_id, name, changes in asked for seed in options.seeds]
    rows = sweep.sweep("learning", runs, prepare, threads=options.threads)
    table(rows, [(env_id, name) for env_id, name, _ in asked])
    if "tuned" in options.experiments:
        draw_curves(options.name, rows, "tuned", options.env_ids, 2)


if __name__ == "__main__":
    main(tyro.cli(Options))
