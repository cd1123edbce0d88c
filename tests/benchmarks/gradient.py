"""The cost of one gradient step on CartPole-v1: as CleanRL's dqn.py writes it, by dqn.py, and by dqn.py compiled.

    python tests/benchmarks/gradient.py                 # about two minutes

All three have the same network, batch and transitions, and draw their batch themselves. They take turns in one process
with one thread; a figure is the median over the chunks, a ratio is taken chunk by chunk.
"""

import contextlib
import io
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import gymnasium as gym
import numpy as np
import torch
import tyro
from stable_baselines3.common.buffers import ReplayBuffer
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

import dqn


@dataclass
class Options:
    """How long to measure."""

    chunks: int = 60  # turns of each kind
    size: int = 500  # gradient steps in a turn


def cleanrl(args: dqn.Args, envs: gym.vector.VectorEnv, transitions: dqn.Batch) -> Callable[[], None]:
    """The gradient step of CleanRL's dqn.py, line by line."""

    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 2))

    q_network, target_network = network(), network()
    target_network.load_state_dict(q_network.state_dict())
    optimizer = torch.optim.Adam(q_network.parameters(), lr=args.learning_rate)
    replay = ReplayBuffer(args.buffer_size, envs.single_observation_space, envs.single_action_space, "cpu",
                          handle_timeout_termination=False)
    for observation, action, reward, next_observation, discount in zip(*map(np.asarray, transitions), strict=True):
        replay.add(observation, next_observation, action, reward, discount == 0, [{}])

    def step() -> None:
        data = replay.sample(args.batch_size)
        with torch.no_grad():
            target_max, _ = target_network(data.next_observations).max(dim=1)
            td_target = data.rewards.flatten() + args.gamma * target_max * (1 - data.dones.flatten())
        old_value = q_network(data.observations).gather(1, data.actions).squeeze()
        loss = F.mse_loss(td_target, old_value)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def main(options: Options) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    # CleanRL's settings
    args = dqn.Args(tuned=False, learning_rate=2.5e-4, buffer_size=10_000, double_q=False, layer_norm=False)
    envs = dqn.make_envs(args, 1)
    eager, compiled = (dqn.Learner(args, envs, dqn.Ranks()) for _ in range(2))
    compiled.replay = eager.replay
    rollout = dqn.Rollout(args, envs, eager.replay, dqn.Ranks())
    rollout.reset()
    while rollout.global_step < args.buffer_size:
        rollout.step(eager.act(eager.replay.newest(), 1.0), meanwhile=lambda: None)
    with contextlib.redirect_stdout(io.StringIO()):
        compiled.compile()
    steps = {"CleanRL": cleanrl(args, envs, eager.replay.sample(args.buffer_size, np.random.default_rng(1))),
             "dqn.py": eager.gradient_step, "dqn.py --compile": compiled.gradient_step}
    costs = {name: [] for name in steps}
    for _ in range(options.chunks + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(options.size):
                step()
            costs[name].append((time.perf_counter() - start) / options.size * 1e6)
    print("| one gradient step, batch 128 | cost (lowest–highest) | CleanRL's over it (lowest–highest) |\n|-|-|-|")
    for name, (_, *values) in costs.items():  # the first turn warms up
        ratios = sorted(a / b for a, b in zip(costs["CleanRL"][1:], values, strict=True))
        print(f"| {name} | {median(values):,.0f} µs ({min(values):,.0f}–{max(values):,.0f}) | "
              f"{median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f}) |")


if __name__ == "__main__":
    main(tyro.cli(Options))
