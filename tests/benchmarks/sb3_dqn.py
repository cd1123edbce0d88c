"""Stable-Baselines3's DQN with dqn.py's flags, for speed.py."""

from dataclasses import dataclass

import tyro
from stable_baselines3 import DQN
from stable_baselines3.common.env_util import make_vec_env


@dataclass
class Options:
    """Settings."""

    env_id: str = "CartPole-v1"
    total_timesteps: int = 500_000
    num_envs: int = 1
    seed: int = 1
    learning_rate: float = 2.5e-4
    buffer_size: int = 10_000
    learning_starts: int = 10_000
    batch_size: int = 128
    train_frequency: int = 10
    gamma: float = 0.99
    target_network_frequency: int = 500
    end_e: float = 0.05
    exploration_fraction: float = 0.5
    hidden_sizes: tuple[int, ...] = (120, 84)


def main(options):
    """Train."""
    envs = make_vec_env(options.env_id, options.num_envs, seed=options.seed)
    model = DQN(
        "MlpPolicy", envs, learning_rate=options.learning_rate, buffer_size=options.buffer_size,
        learning_starts=options.learning_starts, batch_size=options.batch_size, gamma=options.gamma,
        train_freq=options.train_frequency, gradient_steps=options.num_envs,  # it counts in steps of all environments
        target_update_interval=options.target_network_frequency, exploration_fraction=options.exploration_fraction,
        exploration_final_eps=options.end_e, policy_kwargs={"net_arch": options.hidden_sizes}, seed=options.seed,
        device="cpu",
    )
    model.learn(options.total_timesteps)


if __name__ == "__main__":
    main(tyro.cli(Options))
