"""What dqn.py learns from pixels: one tidy CSV, a table and learning curves.

    python tests/benchmarks/pixels.py                                       # MinAtar's five games
    python tests/benchmarks/pixels.py --env-ids MinAtar/Breakout-v1 --seeds 11 --steps 200000

MinAtar's games (Young & Tian 2019) are registered with minatar.gym.register_envs(); in a module of your own, say
minatar_envs.py, that line is enough for --env-id minatar_envs:MinAtar/Breakout-v1.
"""

from dataclasses import dataclass

import sweep
import tyro
from learning import draw_curves, table

MINATAR = tuple(f"MinAtar/{game}-v1" for game in ("Asterix", "Breakout", "Freeway", "Seaquest", "SpaceInvaders"))
SETTINGS = dict(
    tuned=False, hidden_sizes=(128,), layer_norm=False, learning_rate=2.5e-4, anneal_lr=False, buffer_size=100_000,
    learning_starts=5_000, batch_size=32, train_frequency=4, n_step=3, target_network_frequency=1_000, loss="huber",
    max_grad_norm=10.0, exploration_fraction=0.2, end_e=0.01, eval_frequency=50_000, eval_max_steps=5_000,
    checkpoint_frequency=0,
)


@dataclass
class Options(sweep.Options):
    """What to run."""

    env_ids: tuple[str, ...] = MINATAR  # environments
    seeds: tuple[int, ...] = (11, 12, 13)  # one run each
    steps: int = 1_000_000  # of a run


def prepare(run):
    """Register MinAtar's games, which Gymnasium does not know."""
    import minatar.gym

    minatar.gym.register_envs()


def main(options):
    """Run what is missing, then report."""
    setting, changes = f"{options.steps:,} steps", SETTINGS | dict(total_timesteps=options.steps)
    runs = [sweep.Run(env_id, setting, seed, changes) for seed in options.seeds for env_id in options.env_ids]
    rows = sweep.sweep("pixels", runs, prepare)
    table(rows, [(env_id, setting) for env_id in options.env_ids])
    draw_curves("pixels", rows, setting, options.env_ids, 3)


if __name__ == "__main__":
    main(tyro.cli(Options))
