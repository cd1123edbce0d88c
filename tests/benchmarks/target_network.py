"""Why is the TD target not computed with the network being optimised? Measured on plain Q-learning with a network.

    pip install -r requirements.txt -r tests/benchmarks/requirements.txt
    python tests/benchmarks/target_network.py                # all runs that results/target_network.csv lacks
    python tests/benchmarks/target_network.py --seeds 11     # of one seed

Prints a table and draws results/target_network.svg: how far the TD targets of a fixed batch move in each gradient step,
how large |Q| becomes, and what it is good for. "Solved, then lost" counts seeds. Within a group, settings differ in
the target network alone (and in LayerNorm, where the name says so).
"""

from collections.abc import Callable
from dataclasses import dataclass

import figures
import numpy as np
import sweep
import tyro
from sweep import RESULTS, Row, Run, dqn

PLAIN = dict(tuned=False, num_envs=8, learning_starts=2_000, train_frequency=4, learning_rate=1e-3, anneal_lr=False,
             buffer_size=50_000, batch_size=64, gamma=0.99, n_step=1, double_q=False, dueling=False, layer_norm=False,
             loss="mse", max_grad_norm=0.0, hidden_sizes=(120, 84), exploration_fraction=0.2, end_e=0.05,
             eval_frequency=25_000, eval_episodes=20, log_frequency=5_000)
STEPS = {"CartPole-v1": 100_000, "LunarLander-v3": 150_000}
NONE = dict(target_network_frequency=1, tau=1.0)
HARD = dict(target_network_frequency=500, tau=1.0)
SETTINGS = {
    "none": NONE,
    "hard, 50": dict(target_network_frequency=50, tau=1.0),
    "hard, 500": HARD,
    "hard, 5,000": dict(target_network_frequency=5_000, tau=1.0),
    "soft, 0.05": dict(target_network_frequency=4, tau=0.05),  # after each gradient step
    "soft, 0.005": dict(target_network_frequency=4, tau=0.005),
    "none, LayerNorm": NONE | dict(layer_norm=True),
    "hard, 500, LayerNorm": HARD | dict(layer_norm=True),
}
HARSH = dict(learning_rate=1e-2, buffer_size=1_000)
HARSH_SETTINGS = {f"harsh: {name}": SETTINGS[name] | HARSH
                  for name in ("none", "hard, 500", "none, LayerNorm", "hard, 500, LayerNorm")}
# No return is larger: 1 / (1 - gamma) with a reward of 1 a step; what the lander's shaping can give, and 100 to land.
BOUND = {"CartPole-v1": 100.0, "LunarLander-v3": 400.0}
SOLVED = {"CartPole-v1": 475.0, "LunarLander-v3": 200.0}  # Gymnasium's reward thresholds


def watcher(run: Run) -> Callable[[int, dqn.Learner], dict[str, float]]:
    """Measure, between two entries of the log, how far the TD targets of a fixed batch move in a gradient step.

    TD targets of one step move only when the target network does: with each of its updates the mean absolute change is
    added up, and the sum divided by the gradient steps since the last entry. So a target that swings to and fro counts
    as moving. Also: the largest |Q| of 256 observations from the replay buffer, and the lag.
    """
    args, sync_target = run.args, dqn.sync_target
    rng = np.random.default_rng(0)
    held: dict[str, object] = {"path": 0.0, "learner": None, "targets": None, "step": 0}

    def targets() -> object:
        learner = held["learner"]
        return dqn.td_target(held["batch"], learner.q_network, learner.target_network)

    def watched_sync(target: object, online: object, tau: float) -> None:
        sync_target(target, online, tau)
        if held["learner"]:
            old, held["targets"] = held["targets"], targets()
            held["path"] += (held["targets"] - old).abs().mean().item()

    def watch(step: int, learner: dqn.Learner) -> dict[str, float]:
        if learner.loss is None:
            return {}
        if held["learner"] is None:
            held.update(learner=learner, batch=learner.replay.sample(64, rng), step=step)
            held["targets"] = targets()
            return {}
        steps = (step - held["step"]) / args.train_frequency * args.gradient_steps
        observations = learner.replay.sample(256, rng).observations
        values = {
            "target/path": held["path"] / steps,
            "q/largest": learner.q_network(observations).abs().max().item(),
            "target/lag": ((learner.parameters - learner.target_parameters).norm() / learner.parameters.norm()).item(),
        }
        held.update(path=0.0, step=step)
        return values

    dqn.sync_target = watched_sync  # in this process, which does this one run
    return watch


@dataclass
class Options:
    """What to run."""

    env_ids: tuple[str, ...] = tuple(STEPS)  # environments
    seeds: tuple[int, ...] = tuple(range(11, 21))  # one run each of every setting


def runs(options: Options) -> list[Run]:
    """All runs, seed by seed, so that what is there early can be compared."""
    return [Run(env_id, name, seed, PLAIN | dict(total_timesteps=STEPS[env_id]) | changes)
            for seed in options.seeds for env_id in options.env_ids
            for name, changes in (SETTINGS | (HARSH_SETTINGS if env_id == "CartPole-v1" else {})).items()]


# Title -> tag, and how a run's values become one
SHOWN = {
    "return": (sweep.FINAL, np.max),
    "target movement": ("target/path", np.mean),
    "largest |Q|": ("q/largest", np.max),
    "lag": ("target/lag", np.mean),
    "best": ("eval/episodic_return", np.max),
}


def report(rows: list[Row], options: Options) -> None:
    """Print the table, draw the figure."""
    def values(env_id: str, name: str, title: str) -> np.ndarray:
        tag, reduce = SHOWN[title]
        return np.array([reduce(list(each.values())) for each in sweep.table(rows, env_id, name, tag).values()])

    done = {row[:2] for row in rows}
    there = [(env_id, name) for env_id in options.env_ids for name in SETTINGS | HARSH_SETTINGS
             if (env_id, name) in done]
    print("| environment | target network | final return: IQM (95% interval) | lowest to highest seed | solved | "
          "solved, then lost | TD targets move by | largest abs(Q): median (highest) | beyond any return | lag |\n"
          "|-|-|-|-|-|-|-|-|-|-|")
    for env_id, name in there:
        final, path, largest, lag, best = (values(env_id, name, title) for title in SHOWN)
        low, high = sweep.interval(final)
        solved = final >= SOLVED[env_id]
        print(f"| {env_id} | {name} | {sweep.iqm(final):.1f} ({low:.1f} to {high:.1f}) | {final.min():.1f} to "
              f"{final.max():.1f} | {solved.sum()} of {len(final)} | {(~solved & (best >= SOLVED[env_id])).sum()} | "
              f"{np.median(path):.3g} | {np.median(largest):,.0f} ({largest.max():,.0f}) | "
              f"{(largest > BOUND[env_id]).sum()} of {len(final)} | {np.median(lag):.3f} |")
    titles = list(SHOWN)[:3]
    panels = [(env_id, title) for env_id in options.env_ids for title in titles]
    with figures.panels(RESULTS / "target_network.svg", ["\n".join(panel) for panel in panels], 3, 3.6) as places:
        for axes, (env_id, title) in zip(places, panels, strict=True):
            names = [name for each, name in there if each == env_id]
            for place, name in enumerate(names):
                dots = values(env_id, name, title)
                axes.plot(dots, [place] * len(dots), "o", color="C0", alpha=0.4, markersize=3, label="one seed")
                axes.plot(sweep.iqm(dots), place, "|", color="C3", markersize=12, label="interquartile mean")
            if title != titles[0]:
                axes.set_xscale("log")
            if title == titles[2]:
                axes.set_xlim(10, 1e6)
                axes.axvline(BOUND[env_id], color="gray", linestyle=":", label="largest possible return")
            axes.set_yticks(range(len(names)), names if title == titles[0] else [""] * len(names))
            axes.invert_yaxis()


def main(options: Options) -> None:
    """Run what is missing, then report."""
    report(sweep.sweep(RESULTS / "target_network.csv", runs(options), watcher), options)


if __name__ == "__main__":
    main(tyro.cli(Options))
