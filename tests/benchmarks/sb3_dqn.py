"""Stable-Baselines3's DQN on CartPole-v1 with CleanRL's hyper-parameters, for speed.py to measure against.

    python sb3_dqn.py TOTAL_TIMESTEPS NUM_ENVS

With several environments SB3 counts train_freq in passes, so that gradient_steps = num_envs keeps one gradient step
in ten environment steps. Prints the steps per second of learn().
"""

import sys
import time

import torch
from stable_baselines3 import DQN
from stable_baselines3.common.env_util import make_vec_env

if __name__ == "__main__":
    total_timesteps, num_envs = map(int, sys.argv[1:])
    torch.set_num_threads(1)  # as dqn.py does for a network of this size
    model = DQN(
        "MlpPolicy", make_vec_env("CartPole-v1", n_envs=num_envs, seed=1), learning_rate=2.5e-4, buffer_size=10_000,
        learning_starts=10_000, batch_size=128, tau=1.0, gamma=0.99, train_freq=10, gradient_steps=num_envs,
        target_update_interval=500, exploration_fraction=0.5, exploration_initial_eps=1.0, exploration_final_eps=0.05,
        max_grad_norm=float("inf"), policy_kwargs={"net_arch": [120, 84]}, seed=1, device="cpu",
    )
    start = time.perf_counter()
    model.learn(total_timesteps)
    print(total_timesteps / (time.perf_counter() - start))
