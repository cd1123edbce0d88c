"""What torchrun starts in test_processes.py: dqn.py whose rank 1 dies once at a step, or without flags one update."""

import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

import dqn


def one_update():
    """Take a gradient step; leave behind this rank's batch and the parameters before and after."""
    settings = dict(tuned=False, num_envs=4, buffer_size=400, batch_size=32, n_step=3, max_grad_norm=0.1)
    args = dqn.Args(**settings)
    device = dqn.start_processes(args, ExitStack())
    envs = dqn.make_envs(args, 2)
    agent, replay = dqn.Agent(args, envs, device), dqn.ReplayBuffer(args, envs, device)
    observations, rng = dqn.restart(args, envs, replay, 0)
    for _ in range(50):
        actions = agent.q_network.act(observations, 1.0, rng)
        observations, rewards, terminated, truncated, _ = envs.step(actions)
        replay.add(actions, rewards, terminated, truncated, observations)
    batch = replay.sample(args.batch_size // 2, np.random.default_rng(dqn.RANK))
    before = [parameter.detach().clone() for parameter in agent.q_network.parameters()]
    agent.update(batch, 0.1)
    after = [parameter.detach() for parameter in agent.q_network.parameters()]
    torch.save(dict(settings=settings, batch=list(batch), before=before, after=after), f"step{dqn.RANK}.pt")


def die_once(args, step, epsilon_at=dqn.epsilon_at):
    """Stand in for epsilon_at."""
    if dqn.RANK == 1 and step == 700 and not Path("died").exists():
        Path("died").touch()
        os._exit(1)
    return epsilon_at(args, step)


if __name__ == "__main__":
    if sys.argv[1:]:
        dqn.epsilon_at = die_once
        if Path("died").exists():
            time.sleep(3 * dqn.RANK)  # rank 0 looks for rank 1 before that can say where it is
        dqn.main()
    else:
        one_update()
