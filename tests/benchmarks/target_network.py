"""Why is the TD target not computed with the network being optimised? Measured on plain Q-learning with a network.

    pip install -r requirements.txt -r tests/benchmarks/requirements.txt
    python tests/benchmarks/target_network.py                # all runs that results/target_network.csv lacks
    python tests/benchmarks/target_network.py --seeds 11     # of one seed

Prints a table and draws results/target_network.svg: how far the TD targets of a fixed batch move in each gradient step,
how large |Q| becomes, and what it is good for. "Solved, then lost" counts seeds. Within a group, settings differ in
the target network alone (and in LayerNorm, where the name says so).
"""

from dataclasses import dataclass

import figures
import numpy as np
import sweep
import torch
import tyro
from sweep import Run, dqn

PLAIN = dict(tuned=False, num_envs=8, learning_starts=2_000, train_frequency=4, learning_rate=1e-3, anneal_lr=False,
             buffer_size=50_000, batch_size=64, gamma=0.99, n_step=1, double_q=False, dueling=False, layer_norm=False,
             loss="mse", hidden_sizes=(120, 84), exploration_fraction=0.2, end_e=0.05, eval_frequency=25_000,
             eval_episodes=20, checkpoint_frequency=0)
STEPS = {"CartPole-v1": 100_000, "LunarLander-v3": 150_000}
NONE = dict(target_network_frequency=4, tau=1.0)  # after each gradient step, before the next one
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


class Agent(dqn.Agent):
    """Adds up how far the TD targets of a fixed batch move whenever the target network does.

    So a target that swings to and fro counts as moving. (With double_q the Q-network would move them, too.)
    """

    batch = None  # there is none before the first entry of the log

    def watch(self, batch, step):
        self.batch, self.targets, self.path, self.step = batch, self.td_target(batch), 0.0, step

    def sync_target(self):
        super().sync_target()
        if self.batch:
            old, self.targets = self.targets, self.td_target(self.batch)
            self.path += (self.targets - old).abs().mean().item()


class Log(dqn.Log):
    """Logs how far targets moved in each gradient step since the last entry, and the largest |Q| in 256 states."""

    @torch.no_grad()
    def learning(self, values, agent, replay, step):
        rng = np.random.default_rng(step)
        if agent.batch:
            gradient_steps = (step - agent.step) / self.args.train_frequency
            largest = agent.q_network(replay.sample(256, rng).observations).abs().max()
            values |= {"target/path": agent.path / gradient_steps, "q/largest": largest}
        agent.watch(agent.batch or replay.sample(64, rng), step)
        super().learning(values, agent, replay, step)


def prepare(run):
    """Have dqn.train use both."""
    dqn.Agent, dqn.Log, dqn.LOG_FREQUENCY = Agent, Log, 5_000


@dataclass
class Options(sweep.Options):
    """What to run."""

    env_ids: tuple[str, ...] = tuple(STEPS)  # environments


def runs(options):
    """List all runs, seed by seed, so that what is there early can be compared."""
    return [Run(env_id, name, seed, PLAIN | dict(total_timesteps=STEPS[env_id]) | changes
                | (sweep.TRIAL if options.trial else {}))
            for seed in options.seeds for env_id in options.env_ids
            for name, changes in (SETTINGS | (HARSH_SETTINGS if env_id == "CartPole-v1" else {})).items()]


# Title -> tag, and how a run's values become one
SHOWN = {
    "return": (sweep.FINAL, np.max),
    "target movement": ("target/path", np.mean),
    "largest |Q|": ("q/largest", np.max),
    "best": (sweep.CURVE, np.max),
}


def report(rows, options):
    """Print the table, draw the figure."""
    def values(env_id, name, title):
        tag, reduce = SHOWN[title]
        return np.array([reduce(list(each.values())) for each in sweep.table(rows, env_id, name, tag).values()])

    done = {row[:2] for row in rows}
    there = [(env_id, name) for env_id in options.env_ids for name in SETTINGS | HARSH_SETTINGS
             if (env_id, name) in done]
    print("| environment | target network | final return: IQM (95% interval) | lowest to highest seed | solved | "
          "solved, then lost | TD targets move by | largest abs(Q): median (highest) | beyond any return |\n"
          "|-|-|-|-|-|-|-|-|-|")
    for env_id, name in there:
        final, path, largest, best = (values(env_id, name, title) for title in SHOWN)
        low, high = sweep.interval(final)
        solved = final >= SOLVED[env_id]
        print(f"| {env_id} | {name} | {sweep.iqm(final):.1f} ({low:.1f} to {high:.1f}) | {final.min():.1f} to "
              f"{final.max():.1f} | {solved.sum()} of {len(final)} | {(~solved & (best >= SOLVED[env_id])).sum()} | "
              f"{np.median(path):.3g} | {np.median(largest):,.0f} ({largest.max():,.0f}) | "
              f"{(largest > BOUND[env_id]).sum()} of {len(final)} |")
    titles = list(SHOWN)[:3]
    panels = [(env_id, title) for env_id in options.env_ids for title in titles]
    path = options.results / "target_network.svg"
    with figures.panels(path, ["\n".join(panel) for panel in panels], 3, 3.6) as places:
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


def main(options):
    """Run what is missing, then report."""
    rows = sweep.sweep(options.results / "target_network.csv", runs(options), prepare, ("target/path", "q/largest"))
    report(rows, options)


if __name__ == "__main__":
    main(tyro.cli(Options))
