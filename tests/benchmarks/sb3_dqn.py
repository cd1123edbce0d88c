"""Stable-Baselines3's DQN with dqn.py's flags, to measure against.

    python tests/benchmarks/sb3_dqn.py --env-id CartPole-v1 --num-envs 8 --total-timesteps 100000

Prints the steps per second of learn(). With several environments SB3 counts train_freq in passes, so that
gradient_steps = num_envs keeps the gradient steps per environment step.
"""

import math
import time
from dataclasses import dataclass

import tyro
from stable_baselines3 import DQN
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecFrameStack
from torch import nn


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
    max_grad_norm: float = math.inf
    start_e: float = 1.0
    end_e: float = 0.05
    exploration_fraction: float = 0.5


class MinAtarExtractor(BaseFeaturesExtractor):
    """What dqn.py's network has below its output on MinAtar: a convolution and a hidden layer."""

    def __init__(self, observation_space, features_dim=128):
        super().__init__(observation_space, features_dim)
        height, width, channels = observation_space.shape
        self.layers = nn.Sequential(nn.Conv2d(channels, 16, 3), nn.ReLU(), nn.Flatten(),
                                    nn.Linear(16 * (height - 2) * (width - 2), features_dim), nn.ReLU())

    def forward(self, observations):
        return self.layers(observations.permute(0, 3, 1, 2))


def make_model(options):
    """Make SB3's DQN with these settings, and the network that dqn.py has for the environment."""
    policy, network, settings = "MlpPolicy", {"net_arch": [120, 84]}, {"n_envs": options.num_envs, "seed": options.seed}
    if options.env_id.startswith("ALE/"):  # SB3's own wrapper, but as in dqn.py four frames a step and sticky actions
        policy, network = "CnnPolicy", {}
        envs = VecFrameStack(make_atari_env(f"ale_py:{options.env_id}", env_kwargs={"frameskip": 1}, **settings), 4)
    else:
        envs = make_vec_env(options.env_id, **settings)
    if "MinAtar/" in options.env_id:
        network = {"features_extractor_class": MinAtarExtractor, "net_arch": []}
    return DQN(
        policy, envs, learning_rate=options.learning_rate, buffer_size=options.buffer_size,
        learning_starts=options.learning_starts, batch_size=options.batch_size, gamma=options.gamma,
        train_freq=options.train_frequency, gradient_steps=options.num_envs,
        target_update_interval=options.target_network_frequency, exploration_fraction=options.exploration_fraction,
        exploration_initial_eps=options.start_e, exploration_final_eps=options.end_e,
        max_grad_norm=options.max_grad_norm, policy_kwargs=network, seed=options.seed, device="cpu",
    )


if __name__ == "__main__":
    chosen = tyro.cli(Options)
    model = make_model(chosen)
    start = time.perf_counter()
    model.learn(chosen.total_timesteps)
    print(chosen.total_timesteps / (time.perf_counter() - start))
