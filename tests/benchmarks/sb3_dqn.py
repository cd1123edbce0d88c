"""Stable-Baselines3's DQN with dqn.py's flags, to measure against.

    python tests/benchmarks/sb3_dqn.py --env-id CartPole-v1 --num-envs 8 --total-timesteps 100000

Prints the steps per second of learn(). With --stop-return it evaluates as dqn.py does, 100 greedy episodes side by
side, ends once they reach that mean, and prints the return of 100 others.
"""

import math
import time
from dataclasses import dataclass

import tyro
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import EvalCallback, StopTrainingOnRewardThreshold
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy


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
    gradient_steps: int = 1  # at a time, for each environment: SB3 counts train_frequency in passes of all
    gamma: float = 0.99
    target_network_frequency: int = 500
    end_e: float = 0.05
    exploration_fraction: float = 0.5
    hidden_sizes: tuple[int, ...] = (120, 84)
    eval_frequency: int = 5_000
    max_grad_norm: float = math.inf
    stop_return: float = math.inf


def main(options):
    """Train, and evaluate where asked."""
    envs = make_vec_env(options.env_id, options.num_envs, seed=options.seed)
    model = DQN(
        "MlpPolicy", envs, learning_rate=options.learning_rate, buffer_size=options.buffer_size,
        learning_starts=options.learning_starts, batch_size=options.batch_size, gamma=options.gamma,
        train_freq=options.train_frequency, gradient_steps=options.gradient_steps * options.num_envs,
        target_update_interval=options.target_network_frequency, exploration_fraction=options.exploration_fraction,
        exploration_final_eps=options.end_e, max_grad_norm=options.max_grad_norm,
        policy_kwargs={"net_arch": options.hidden_sizes}, seed=options.seed, device="cpu",
    )
    evaluates = options.stop_return < math.inf
    callback = None
    if evaluates:
        eval_envs = make_vec_env(options.env_id, 100, seed=1000 + options.seed)
        stop = StopTrainingOnRewardThreshold(options.stop_return)
        callback = EvalCallback(eval_envs, stop, n_eval_episodes=100, eval_freq=options.eval_frequency, verbose=0)
    start = time.perf_counter()
    model.learn(options.total_timesteps, callback)
    print("steps", model.num_timesteps, "steps/s", model.num_timesteps / (time.perf_counter() - start))
    if evaluates:
        print("return", evaluate_policy(model, eval_envs, 100)[0])


if __name__ == "__main__":
    main(tyro.cli(Options))
