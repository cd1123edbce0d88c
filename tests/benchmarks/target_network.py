"""Why is the TD target not computed with the network being optimised? Measured on plain Q-learning with a network.

    python tests/benchmarks/target_network.py                # all runs that results/target_network.csv lacks
    python tests/benchmarks/target_network.py --seeds 11     # of one seed

Prints a table and draws results/target_network_*.svg: how far the TD targets of a fixed batch move in each gradient
step, how large |Q| becomes, and what it is good for. "Solved, then lost" counts seeds. Within a group, settings differ
in the target network alone (and in LayerNorm, where the name says so).
"""

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
# Does a long period arrive where a short one does, if it is given ten times the steps? The fourth is the control.
LONG = {f"{steps // 1000:,}k steps: hard, {period:,}": dict(total_timesteps=steps, target_network_frequency=period)
        for steps, period in ((100_000, 50), (100_000, 500), (100_000, 5_000), (1_000_000, 500), (1_000_000, 5_000))}
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


@torch.no_grad()
def measure(agent, replay, step):
    """Tell how far targets moved in each gradient step since the last entry, and the largest |Q| in 256 states."""
    rng, values = np.random.default_rng(step), {}
    if agent.batch:
        gradient_steps = (step - agent.step) / agent.args.train_frequency
        largest = agent.q_network(replay.sample(256, rng).observations).abs().max()
        values = {"target/path": agent.path / gradient_steps, "q/largest": largest}
    agent.watch(agent.batch or replay.sample(64, rng), step)
    return values


def prepare(run):
    """Have dqn.train use both."""
    sweep.log_more(measure)
    dqn.Agent, dqn.LOG_FREQUENCY = Agent, min(5_000, run.args.total_timesteps // 20)


def long_runs(options):
    """List the runs of ten times the steps and those that they are held against, of three seeds on CartPole-v1."""
    return [Run("CartPole-v1", name, seed, PLAIN | changes) for seed in options.seeds[:3]
            for name, changes in LONG.items()]


def runs(options):
    """List all runs, seed by seed, so that what is there early can be compared."""
    return [Run(env_id, name, seed, PLAIN | dict(total_timesteps=STEPS[env_id]) | changes)
            for seed in options.seeds for env_id in options.env_ids
            for name, changes in (SETTINGS | (HARSH_SETTINGS if env_id == "CartPole-v1" else {})).items()]


SHOWN = {"return": sweep.FINAL, "target movement": "target/path", "largest |Q|": "q/largest", "best": sweep.CURVE}
LARGEST = sweep.CURVE, "q/largest"  # of their values in a run the largest counts, of the others the mean


def do(run, prepare, tags):
    """Train; return the run's rows, one for each tag."""
    by_tag = sweep.do(run, prepare, tags).groupby([*sweep.COLUMNS[:4], "tag"], as_index=False)
    means, largest = (by_tag.agg(dict(step="max", value=how)) for how in ("mean", "max"))
    return means.where(~means.tag.isin(LARGEST), largest)[sweep.COLUMNS]


def ten_times(options):
    """Run what is missing of the long runs, and print their table."""
    rows = sweep.sweep("target_network_long", long_runs(options), prepare, ("q/largest",))
    sweep.head("CartPole-v1", "commit", "final return of each seed", "solved at so many evaluations", "of",
               "largest abs(Q) at the end")
    for name in LONG:
        final, largest = (sweep.last(rows, "CartPole-v1", name, tag) for tag in (sweep.FINAL, "q/largest"))
        returns = sweep.table(rows, "CartPole-v1", name, sweep.CURVE)
        solved = (returns >= SOLVED["CartPole-v1"]).sum()
        sweep.line(name, sweep.commits(rows, "CartPole-v1", name), ", ".join(f"{value:.1f}" for value in final),
                   ", ".join(map(str, solved)), len(returns), ", ".join(f"{value:.0f}" for value in largest))


def main(options):
    """Run what is missing, print the tables, draw the figures."""
    if "CartPole-v1" in options.env_ids:
        ten_times(options)
    rows = sweep.sweep("target_network", runs(options), prepare, ("target/path", "q/largest"), do)

    def values(env_id, name, title):
        return sweep.last(rows, env_id, name, SHOWN[title])

    done = set(zip(rows.env_id, rows.setting, strict=True))
    there = [(env_id, name) for env_id in options.env_ids for name in SETTINGS | HARSH_SETTINGS
             if (env_id, name) in done]
    sweep.head("environment", "target network", "commit", "final return: IQM (95% interval)", "lowest to highest",
               "solved", "solved, then lost", "TD targets move by", "largest abs(Q): median (highest)",
               "beyond any return")
    for env_id, name in there:
        final, path, largest, best = (values(env_id, name, title) for title in SHOWN)
        low, high = sweep.interval(final)
        solved = final >= SOLVED[env_id]
        lost = ~solved & (best >= SOLVED[env_id])
        sweep.line(env_id, name, sweep.commits(rows, env_id, name), f"{sweep.iqm(final):.1f} ({low:.1f} to {high:.1f})",
                   f"{final.min():.1f} to {final.max():.1f}", f"{solved.sum()} of {len(final)}", lost.sum(),
                   f"{np.median(path):.3g}", f"{np.median(largest):,.0f} ({largest.max():,.0f})",
                   f"{(largest > BOUND[env_id]).sum()} of {len(final)}")
    titles = list(SHOWN)[:3]
    for env_id in options.env_ids:
        names = [name for each, name in there if each == env_id]
        with figures.panels(f"target_network_{env_id}", titles, 3, 3.6) as places:
            for axes, title in zip(places, titles, strict=True):
                for place, name in enumerate(names):
                    dots = values(env_id, name, title)
                    axes.plot(dots, [place] * len(dots), "o", color="C0", alpha=0.4, markersize=3, label="one seed")
                    axes.plot(sweep.iqm(dots), place, "|", color="C3", markersize=12, label="interquartile mean")
                axes.set_yticks(range(len(names)), names if title == titles[0] else [""] * len(names))
                axes.invert_yaxis()
            for axes in places[1:]:
                axes.set_xscale("log")
            places[2].set_xlim(10, 1e6)
            places[2].axvline(BOUND[env_id], color="gray", linestyle=":", label="largest possible return")


if __name__ == "__main__":
    main(tyro.cli(sweep.Options, default=sweep.Options(tuple(STEPS))))
