"""What the default commands of Atari's and MinAtar's games learn: one tidy CSV, a table and learning curves.

    python tests/benchmarks/pixels.py                                       # Pong, three seeds, one after another
    python tests/benchmarks/pixels.py --env-ids MinAtar/Breakout-v1 MinAtar/Freeway-v1 --threads 1

MinAtar's games (Young & Tian 2019) are registered with minatar.gym.register_envs(); in a module of your own, say
minatar_envs.py, that line is enough for --env-id minatar_envs:MinAtar/Breakout-v1.
"""

from dataclasses import dataclass

import sweep
import tyro
from learning import draw_curves, table


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
    runs = [sweep.Run(env_id, "pixels", seed, {}) for env_id in options.env_ids for seed in options.seeds]
    rows = sweep.sweep("pixels", runs, prepare, threads=options.threads)
    table(rows, [(env_id, "pixels") for env_id in options.env_ids])
    draw_curves(options.name, rows, "pixels", options.env_ids, 3)


if __name__ == "__main__":
    main(tyro.cli(Options))
