"""What Atari's default command and MinAtar's games learn from pixels: one tidy CSV, a table and learning curves.

    python tests/benchmarks/pixels.py                                       # Pong, three seeds, one after another
    python tests/benchmarks/pixels.py --env-ids MinAtar/Breakout-v1 MinAtar/Freeway-v1 --threads 1

MinAtar's games (Young & Tian 2019) are registered with minatar.gym.register_envs(); in a module of your own, say
minatar_envs.py, that line is enough for --env-id minatar_envs:MinAtar/Breakout-v1.
"""

from dataclasses import dataclass

import sweep
import tyro
from learning import draw_curves, table

MINATAR = dict(  # one setting for all its games, not tuned
    tuned=False, total_timesteps=1_000_000, hidden_sizes=(128,), layer_norm=False, learning_rate=2.5e-4,
    anneal_lr=False, learning_starts=5_000, batch_size=32, train_frequency=4, n_step=3, target_network_frequency=1_000,
    loss="huber", max_grad_norm=10.0, end_e=0.01, eval_frequency=50_000, eval_max_steps=5_000, checkpoint_frequency=0,
)


@dataclass
class Options(sweep.Options):
    """What to run."""

    env_ids: tuple[str, ...] = ("ALE/Pong-v5",)  # environments
    seeds: tuple[int, ...] = (11, 12, 13)  # one run each
    threads: int = 2  # of a run; as many run at a time as there are cores for
    name: str = "pong"  # of the figure


def prepare(run):
    """Register MinAtar's games, which Gymnasium does not know."""
    import minatar.gym

    minatar.gym.register_envs()


def main(options):
    """Run what is missing, then report."""
    runs = [sweep.Run(env_id, "pixels", seed, MINATAR if env_id.startswith("MinAtar/") else {})
            for env_id in options.env_ids for seed in options.seeds]
    rows = sweep.sweep("pixels", runs, prepare, threads=options.threads)
    table(rows, [(env_id, "pixels") for env_id in options.env_ids])
    draw_curves(options.name, rows, "pixels", options.env_ids, 3)


if __name__ == "__main__":
    main(tyro.cli(Options))
