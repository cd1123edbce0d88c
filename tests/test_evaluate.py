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


class Seeded(Coded):
    """Its episode's number is the seed of the reset."""

    def reset(self, *, seed=None, options=None):
        self.episode = self.episode if seed is None else seed - 1
        return super().reset(seed=seed)


@pytest.mark.parametrize(("num_envs", "episodes"), [(1, 5), (2, 5), (3, 7), (8, 3)])
def test_each_episode_counts_once_and_what_follows_its_end_for_nothing(num_envs, episodes):
    envs = gym.vector.SyncVectorEnv([lambda: Seeded(0)] * num_envs)
    gamma, expected = 0.5, []
    for episode in range(10, 10 + episodes):
        rewards = [Coded.reward(0, episode, step) for step in range(Coded.length(0, episode))]
        discounted = sum(gamma**step * reward for step, reward in enumerate(rewards))
        expected.append((sum(rewards), len(rewards), 7.0 - discounted))
    result = evaluate(Constant(), envs, episodes, seed=10, gamma=gamma)
    assert list(zip(*result, strict=True)) == expected


def test_an_atari_episode_is_a_whole_game_with_its_own_score(no_noops):
    """Whatever is learned from: the same game without any vectorization, clipping and preprocessing."""
    args = Args(env_id="ALE/SpaceInvaders-v5", sticky_actions=0.0, episodic_life=True)
    assert args.clip_rewards
    envs = make_envs(args, 2)  # registers the games
    game = gym.make("ALE/SpaceInvaders-v5", frameskip=4, repeat_action_probability=0.0)
    game.reset(seed=0)
    score, length, lives, over = 0.0, 0, set(), False
    while not over:
        _, reward, terminated, truncated, info = game.step(1)  # fire
        score, length, over = score + reward, length + 1, terminated or truncated
        lives.add(info["lives"])
    assert lives == {3, 2, 1, 0}
    result = evaluate(Constant(), envs, 2, seed=0)
    assert result.returns.tolist() == [score] * 2
    assert result.lengths.tolist() == [length] * 2


def test_an_episode_without_an_end_is_cut():
    class Middle(Constant):
        def forward(self, observations):
            return torch.tensor([0.0, 1.0, 0.0]).expand(len(observations), 3)  # action 6 of 5, 6, 7: reward 1

    result = evaluate(Middle(), make_envs(Args(env_id="environments:Endless-v0"), 3), 8, seed=0, max_steps=7)
    assert result.lengths.tolist() == result.returns.tolist() == [7] * 8


def test_the_same_seed_gives_the_same_episodes():
    args = Args(env_id="CartPole-v1")
    envs = make_envs(args, 4)
    first, again, other = (evaluate(Constant(), envs, 20, seed) for seed in (1, 1, 2))
    assert np.array_equal(first.returns, again.returns)
    assert not np.array_equal(first.returns, other.returns)


def test_an_interrupt_ends_an_evaluation():
    assert evaluate(Constant(), make_envs(Args(), 1), 5, seed=0, interrupted=[2]) is None
