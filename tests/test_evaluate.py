"""Greedy evaluation."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn

from dqn import Args, evaluate, make_envs
from environments import Coded


class Constant(nn.Module):
    """Values 3 and 7 in every state: action 1 is greedy."""

    def __init__(self):
        super().__init__()
        self.values = nn.Parameter(torch.tensor([3.0, 7.0]))

    def forward(self, observations):
        return self.values.expand(len(observations), 2)


@pytest.mark.parametrize(("num_envs", "episodes"), [(1, 5), (2, 5), (3, 7), (8, 3)])
def test_each_environment_plays_its_share_and_reset_steps_count_for_nothing(num_envs, episodes):
    envs = gym.vector.SyncVectorEnv([lambda number=i: Coded(number) for i in range(num_envs)])
    gamma = 0.5
    result = evaluate(Constant(), envs, episodes, seed=0, gamma=gamma)
    expected = []
    for environment in range(num_envs):
        for episode in range(episodes // num_envs + (environment < episodes % num_envs)):
            length = Coded.length(environment, episode)
            rewards = [Coded.reward(environment, episode, step) for step in range(length)]
            discounted = sum(gamma**step * reward for step, reward in enumerate(rewards))
            expected.append((sum(rewards), length, 7.0 - discounted))
    assert sorted(zip(*result, strict=True)) == sorted(expected)


def test_an_episode_without_an_end_is_cut():
    args = Args(env_id="environments:Endless-v0", eval_max_steps=7)

    class Middle(Constant):
        def forward(self, observations):
            return torch.tensor([0.0, 1.0, 0.0]).expand(len(observations), 3)  # action 6 of 5, 6, 7: reward 1

    result = evaluate(Middle(), make_envs(args, 3, capped=True), 8, seed=0)
    assert result.lengths.tolist() == result.returns.tolist() == [7] * 8


def test_the_same_seed_gives_the_same_episodes():
    args = Args(env_id="CartPole-v1")
    envs = make_envs(args, 4, capped=True)
    first, again, other = (evaluate(Constant(), envs, 20, seed) for seed in (1, 1, 2))
    assert np.array_equal(first.returns, again.returns)
    assert not np.array_equal(first.returns, other.returns)


def test_an_interrupt_ends_an_evaluation():
    assert evaluate(Constant(), make_envs(Args(), 1), 5, seed=0, interrupted=[2]) is None
