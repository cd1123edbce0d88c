"""Bytes that a transition takes in the replay buffers of dqn.py and Stable-Baselines3, as JSON.

    python tests/benchmarks/memory.py --env-id ALE/Pong-v5 --buffer-size 20000      # flags of sb3_dqn.py

What the arrays hold, over --buffer-size, with four frames stacked where the game is Atari's.
"""

import contextlib
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import torch
import tyro
from sb3_dqn import Options, make_model

sys.path.insert(0, str(Path(__file__).parents[2]))

import dqn


def held(buffer: object) -> int:
    """Bytes of the arrays of a replay buffer."""
    return sum(value.nbytes for value in vars(buffer).values() if isinstance(value, np.ndarray | torch.Tensor))


def main(options: Options) -> None:
    """Print them."""
    args = dqn.Args(env_id=options.env_id, tuned=False, frame_stack=4 if options.env_id.startswith("ALE/") else 1,
                    buffer_size=options.buffer_size)
    sizes = {}
    with contextlib.closing(dqn.make_envs(args, 1)) as envs:
        replay = dqn.Learner(args, envs, dqn.Ranks()).replay
        sizes["dqn.py"] = held(replay) - replay.host.nbytes  # the same memory as its frames
    for name, optimize in (("Stable-Baselines3", False), ("Stable-Baselines3, optimize_memory_usage", True)):
        model = make_model(dataclasses.replace(options, optimize_memory=optimize))
        sizes[name] = held(model.replay_buffer)
        model.env.close()
    print(json.dumps({name: size / options.buffer_size for name, size in sizes.items()}))


if __name__ == "__main__":
    main(tyro.cli(Options))
