"""It does not learn: what TensorBoard's tags show of the default command and of textbook DQN, broken in five ways.

    python tests/benchmarks/checklist.py

Prints a table, and draws results/checklist.svg: a healthy run beside two that are not. No run ends early.
"""

import math

import figures
import gymnasium as gym
import sweep
import tyro
from sweep import COLUMNS, CURVE, FINAL, Run
from target_network import HARD, PLAIN

RETURN, Q, LOSS = "charts/episodic_return", "losses/q_values", "losses/td_loss"
TEXTBOOK = PLAIN | HARD | dict(total_timesteps=100_000)
BREAKS = {
    "healthy": {},
    "learning rate × 30": {},  # of two rates, below
    "no target network": dict(target_network_frequency=1),
    "no exploration": dict(start_e=0.0, end_e=0.0),
    "segments of 125 steps": dict(checkpoint_frequency=1_000),  # of 8 environments
    "rewards × 1,000": dict(env_id="LargeRewards-v0"),
    "rewards × 1,000, clipped": dict(env_id="LargeRewards-v0", clip_rewards=True),
}
SETTINGS = {("CartPole-v1", f"default: {name}"): changes for name, changes in BREAKS.items()}
SETTINGS |= {("CartPole-v1", f"textbook: {name}"): TEXTBOOK | changes for name, changes in BREAKS.items()}
SETTINGS["CartPole-v1", "default: learning rate × 30"] = dict(learning_rate=30 * 2e-3)
SETTINGS["CartPole-v1", "textbook: learning rate × 30"] = TEXTBOOK | dict(learning_rate=30 * 1e-3)
SETTINGS["MountainCar-v0", "default: segments of 50 steps"] = dict(checkpoint_frequency=400)
for name in "healthy", "no exploration":
    plain = dict(tuned=False, total_timesteps=50_000, learning_starts=500, env_kwargs={"is_slippery": False})
    SETTINGS["FrozenLake8x8-v1", f"no-tuned: {name}"] = plain | BREAKS[name]
DRAWN = "healthy", "learning rate × 30", "no target network"

gym.register("LargeRewards-v0", lambda: gym.wrappers.TransformReward(gym.make("CartPole-v1"), lambda r: 1_000 * r))


def do(run, prepare, tags):
    """Train; return the run's rows, means of 5,000 steps each."""
    rows = sweep.do(run, prepare, tags)
    rows = rows.assign(step=-(-rows.step // 5_000) * 5_000).groupby(COLUMNS[:-1], as_index=False).mean()
    return rows.assign(value=[float(f"{value:.5g}") for value in rows.value])


def draw(rows):
    """Draw what three tags show of a healthy run and of two others, a line for each seed."""
    with figures.panels("checklist", (CURVE, Q, LOSS), columns=3, xlabel="environment steps") as axes:
        for place, tag in zip(axes, (CURVE, Q, LOSS), strict=True):
            for number, name in enumerate(DRAWN):
                curves = sweep.table(rows, "CartPole-v1", f"textbook: {name}", tag)
                place.plot(curves, color=f"C{number}", linewidth=1, label=[name, *[None] * (curves.shape[1] - 1)])
            place.set(yscale="linear" if tag == CURVE else "log", xticks=(0, 50_000, 100_000))


def main(options):
    """Run what is missing, print a line for each setting, draw the figure."""
    settings = {case: dict(stop_return=math.inf) | changes for case, changes in SETTINGS.items()
                if case[0] in options.env_ids}
    runs = [Run(*case, seed, changes) for seed in options.seeds for case, changes in settings.items()]
    rows = sweep.sweep("checklist", runs, tags=(RETURN, Q, LOSS), do=do)
    sweep.head("environment", "setting", RETURN, Q, LOSS, CURVE, "return at the end, by seed")
    for case in settings:
        cells = []
        for tag in (RETURN, Q, LOSS, CURVE):
            values = sweep.table(rows, *case, tag).mean(axis=1)
            cells.append(", ".join(f"{value:.4g}" for value in values.groupby((values.index - 1) // 20_000).mean()))
        finals = sweep.last(rows, *case, FINAL)
        sweep.line(*case, *cells, ", ".join(f"{value:.4g}" for value in finals))
    draw(rows)


if __name__ == "__main__":
    main(tyro.cli(sweep.Options, default=sweep.Options(tuple(dict.fromkeys(env for env, _ in SETTINGS)), (1, 2, 3))))
