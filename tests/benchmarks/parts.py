"""Where the time of a pass of the training loop goes: acting, stepping, learning.

    python tests/benchmarks/parts.py --env-id ALE/Pong-v5 --num-envs 8 --total-timesteps 6000    # any flags of dqn.py

A pass is one step of every environment. Means over all passes after --learning-starts. `environment` is what stepping,
with storing, takes on top of learning: where environments move while the network learns, what is not hidden. On a GPU
work is only handed over in `learning`; whoever needs its results first, acting as a rule, waits for it.
"""

import contextlib
import io
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

import dqn

PARTS = ("environment", "acting", "learning", "rest", "pass")


def timed(function: Callable, seconds: list[float]) -> Callable:
    """A method that also notes how long each of its calls took."""

    def method(*arguments, **settings):
        start = time.perf_counter()
        result = function(*arguments, **settings)
        seconds.append(time.perf_counter() - start)
        return result

    return method


def measure(args: dqn.Args) -> dict[str, float]:
    """Microseconds of a pass by part."""
    starts, acting, learning, stepping = [], [], [], []
    act = timed(dqn.Learner.act, acting)

    def begin_pass(*arguments):
        starts.append(time.perf_counter())
        return act(*arguments)

    dqn.Learner.act = begin_pass
    dqn.Learner.learn = timed(dqn.Learner.learn, learning)
    dqn.Rollout.step = timed(dqn.Rollout.step, stepping)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        dqn.train(args)
    first, passes = args.learning_starts // args.num_envs + 2, len(starts) - 1
    taken = {"pass": np.diff(starts), "acting": np.array(acting[:passes]), "learning": np.array(learning[:passes])}
    taken["environment"] = np.array(stepping[:passes]) - taken["learning"]
    taken["rest"] = taken["pass"] - taken["acting"] - taken["learning"] - taken["environment"]
    return {name: taken[name][first:].mean() * 1e6 for name in PARTS}


if __name__ == "__main__":
    for name, cost in measure(dqn.parse_args()).items():
        print(f"{name:11}{cost:12,.1f} µs")
