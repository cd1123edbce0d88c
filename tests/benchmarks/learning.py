"""What the default commands learn, seed by seed: one tidy CSV, a table and figures.

    pip install -r requirements.txt -r tests/benchmarks/requirements.txt
    python tests/benchmarks/learning.py                                        # hours on two cores
    python tests/benchmarks/learning.py --experiments tuned --env-ids CartPole-v1 --seeds 11 12 13
    python tests/benchmarks/learning.py --trial /tmp/trial --seeds 11 12       # everything, tiny

`tuned` runs `python dqn.py --env-id ENV`, `plain` adds `--no-tuned`, `ablation` adds one part at a time to plain
Q-learning. Runs that results/learning.csv holds are not repeated, so the script can be stopped and started again.
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
TOYS = ("FrozenLake-v1", "CliffWalking-v1", "Taxi-v4", "Blackjack-v1")

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

    env_ids: tuple[str, ...] = CONTROL + TOYS  # environments; those that an experiment does not have are left out
    experiments: tuple[Literal["tuned", "plain", "ablation"], ...] = ("tuned", "plain", "ablation")  # in this order


def runs(options):
    """List all runs that are asked for."""
    settings = {
        "tuned": [(env_id, "tuned", {}) for env_id in CONTROL],
        "plain": [(env_id, "plain", {"tuned": False}) for env_id in CONTROL + TOYS],
        "ablation": [(env_id, name, PLAIN | HARD | dict(total_timesteps=STEPS[env_id]) | changes)
                     for env_id in STEPS for name, changes in ABLATIONS.items()],
    }
    return [Run(env_id, name, seed, changes | (sweep.TRIAL if options.trial else {}))
            for experiment in options.experiments for env_id, name, changes in settings[experiment]
            if env_id in options.env_ids for seed in options.seeds]


def curve(rows, env_id, setting):
    """Collect steps (T,) of the evaluations and returns (seeds, T); a run that has ended keeps its last value."""
    seeds = sweep.table(rows, env_id, setting, CURVE).values()
    steps = sorted({step for values in seeds for step in values})
    returns = [[values[max(s for s in values if s <= step or s == min(values))] for step in steps] for values in seeds]
    return np.array(steps), np.array(returns)


def draw_curves(path, rows, setting, env_ids, columns):
    """Draw every seed over the steps, their interquartile mean and its interval, in a panel for each environment."""
    with figures.panels(path, env_ids, columns, xlabel="environment steps", ylabel="greedy return") as places:
        for axes, env_id in zip(places, env_ids, strict=True):
            steps, returns = curve(rows, env_id, setting)
            for line in returns:
                axes.plot(steps, line, color="gray", alpha=0.35, linewidth=0.7, label="one seed")
            band = np.array([sweep.interval(column) for column in returns.T])
            axes.plot(steps, sweep.iqm(returns), color="C0", label="interquartile mean, 95% interval")
            axes.fill_between(steps, *band.T, color="C0", alpha=0.2, linewidth=0)
            axes.xaxis.set_major_formatter(lambda step, _: f"{step / 1000:g}k")


def draw_finals(path, rows, shown):
    """Draw every seed, interquartile mean and its interval on a line for each setting, by environment."""
    with figures.panels(path, list(shown), xlabel="greedy return at the end") as places:
        for axes, (env_id, settings) in zip(places, shown.items(), strict=True):
            for place, setting in enumerate(settings):
                final = sweep.last(rows, env_id, setting, FINAL)
                axes.plot(final, [place] * len(final), "o", color="gray", alpha=0.4, markersize=4, label="one seed")
                axes.plot(sweep.interval(final), [place] * 2, color="C0", linewidth=4, alpha=0.4, label="95% interval")
                axes.plot(sweep.iqm(final), place, "d", color="C0", label="interquartile mean")
            axes.set_yticks(range(len(settings)), settings)
            axes.invert_yaxis()


def number(value):
    """Write a number with three digits or more."""
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def table(rows, shown):
    """Write Markdown: a line for each environment and setting."""
    lines = ["| environment | setting | final: IQM (95% interval) | mean | lowest | best network | steps | time |",
             "|-|-|-|-|-|-|-|-|"]
    for env_id, setting in shown:
        final, best, steps, seconds = (sweep.last(rows, env_id, setting, tag)
                                       for tag in (FINAL, BEST, sweep.STEPS, sweep.SECONDS))
        low, high = sweep.interval(final)
        lines.append(f"| {env_id} | {setting} | {number(sweep.iqm(final))} ({number(low)} to {number(high)}) | "
                     f"{number(final.mean())} | {number(final.min())} | {number(best.mean())} | "
                     f"{steps.mean():,.0f} | {np.median(seconds):.0f} s |")
    return "\n".join(lines)


def report(rows, folder):
    """Print the table and draw the figures for what there is."""
    done = {row[:2] for row in rows}
    there = [(env_id, name) for name in ("tuned", "plain") for env_id in CONTROL + TOYS if (env_id, name) in done]
    there += [(env_id, name) for env_id in STEPS for name in ABLATIONS if (env_id, name) in done]
    print(table(rows, there))
    for setting, columns in (("tuned", 2), ("plain", 4)):
        if env_ids := [env_id for env_id in CONTROL + TOYS if (env_id, setting) in there]:
            draw_curves(folder / f"{setting}.svg", rows, setting, env_ids, columns)
    ablations = {env_id: [name for name in ABLATIONS if (env_id, name) in there] for env_id in STEPS}
    if shown := {env_id: names for env_id, names in ablations.items() if names}:
        draw_finals(folder / "ablation.svg", rows, shown)


def main(options):
    """Run what is missing, then report."""
    report(sweep.sweep(options.results / "learning.csv", runs(options)), options.results)


if __name__ == "__main__":
    main(tyro.cli(Options))
