"""Stable-Baselines3's DQN with dqn.py's flags, to measure against.

    python tests/benchmarks/sb3_dqn.py --env-id CartPole-v1 --num-envs 8 --total-timesteps 100000
    python tests/benchmarks/sb3_dqn.py --env-id ALE/Pong-v5 --batch-size 32 --train-frequency 4 --total-timesteps 6000

Prints the steps per second of learn(). The flags have dqn.py's names, and its plain defaults. With several environments
SB3 counts train_freq in passes, so that gradient_steps = num_envs keeps the gradient steps per environment step.
"""

import time
from dataclasses import dataclass

import gymnasium as gym
import torch
import tyro
from stable_baselines3 import DQN
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecFrameStack
from torch import Tensor, nn


@dataclass
class Options:
    """Settings; the first two are SB3's own."""

    processes: bool = False  # each environment in a process of its own
    optimize_memory: bool = False  # store observations once; SB3 cannot tell a time limit from a termination then
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
    n_step: int = 1
    target_network_frequency: int = 500
    max_grad_norm: float = 0.0
    start_e: float = 1.0
    end_e: float = 0.05
    exploration_fraction: float = 0.5
    cuda: bool = True


class MinAtarExtractor(BaseFeaturesExtractor):
    """What dqn.py's network has below its output on MinAtar: a convolution and a hidden layer."""

    def __init__(self, observation_space: gym.spaces.Box, features_dim: int = 128) -> None:
        super().__init__(observation_space, features_dim)
        height, width, channels = observation_space.shape
        self.layers = nn.Sequential(nn.Conv2d(channels, 16, 3), nn.ReLU(), nn.Flatten(),
                                    nn.Linear(16 * (height - 2) * (width - 2), features_dim), nn.ReLU())

    def forward(self, observations: Tensor) -> Tensor:
        return self.layers(observations.permute(0, 3, 1, 2))


def make_envs(options: Options) -> VecEnv:
    """The environments; Atari games with SB3's own wrapper, and as in dqn.py four frames a step and sticky actions."""
    settings = {"n_envs": options.num_envs, "seed": options.seed,
                "vec_env_cls": SubprocVecEnv if options.processes else DummyVecEnv}
    if options.env_id.startswith("ALE/"):
        return VecFrameStack(make_atari_env(f"ale_py:{options.env_id}", env_kwargs={"frameskip": 1}, **settings), 4)
    return make_vec_env(options.env_id, **settings)


def make_model(options: Options) -> DQN:
    """SB3's DQN with these settings, and the network that dqn.py has for the environment."""
    policy, network = "MlpPolicy", {"net_arch": [120, 84]}
    if options.env_id.startswith("ALE/"):
        policy, network = "CnnPolicy", {}
    elif "MinAtar/" in options.env_id:
        network = {"features_extractor_class": MinAtarExtractor, "net_arch": []}
    model = DQN(
        policy, make_envs(options), learning_rate=options.learning_rate, buffer_size=options.buffer_size,
        learning_starts=options.learning_starts, batch_size=options.batch_size, gamma=options.gamma,
        train_freq=options.train_frequency, gradient_steps=options.num_envs, n_steps=options.n_step,
        optimize_memory_usage=options.optimize_memory,
        replay_buffer_kwargs={"handle_timeout_termination": False} if options.optimize_memory else None,
        target_update_interval=options.target_network_frequency, exploration_fraction=options.exploration_fraction,
        exploration_initial_eps=options.start_e, exploration_final_eps=options.end_e,
        max_grad_norm=options.max_grad_norm or float("inf"), policy_kwargs=network, seed=options.seed,
        device="auto" if options.cuda else "cpu",
    )
    if sum(parameter.numel() for parameter in model.q_net.parameters()) * options.batch_size < 2**24:
        torch.set_num_threads(1)  # as dqn.py does for networks of this size
    return model


if __name__ == "__main__":
    chosen = tyro.cli(Options)
    model = make_model(chosen)
    start = time.perf_counter()
    model.learn(chosen.total_timesteps)
    print(chosen.total_timesteps / (time.perf_counter() - start))
