"""ReplayBuffer: a stream of time steps."""

from collections import Counter
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch

import dqn
from dqn import Args, Learner, ReplayBuffer, UsageError, make_envs
from environments import Coded

GAMMA = 0.5  # powers of it are exact


def fill(num_envs, capacity, passes, n_step=1):
    """A buffer after so many steps of `num_envs` Coded environments, actions 0, 1, 2, 3, 0, …, and the steps taken."""
    envs = gym.vector.SyncVectorEnv([lambda number=i: Coded(number) for i in range(num_envs)])
    buffer = ReplayBuffer(capacity, num_envs, envs.single_observation_space, 4, n_step, GAMMA)
    observations, _ = envs.reset(seed=0)
    buffer.reset(observations)
    stream = []  # every real step, in order: (environment, episode, step), by pass
    ended = np.zeros(num_envs, bool)
    for i in range(passes):
        stream.append([tuple(map(int, observations[e])) for e in range(num_envs) if not ended[e]])
        actions = np.full(num_envs, i % 4)
        observations, rewards, terminated, truncated, _ = envs.step(actions)
        ended = terminated | truncated
        buffer.add(actions, rewards, terminated, ended, observations)
    return buffer, stream


def transition(environment, episode, step, known, n_step):
    """What a sample from that step must hold, worked out from the environment's definition.

    Returns:
        reward, number of the next step, discount; `known` is the set of all steps in the stream.
    """
    length = Coded.length(environment, episode)
    end = min(step + n_step, length)
    while (environment, episode, end - 1) not in known:
        end -= 1  # the stream stops here
    reward = sum(GAMMA**i * Coded.reward(environment, episode, step + i) for i in range(end - step))
    terminated = end == length and Coded.flags(episode)[0]
    return reward, end, 0.0 if terminated else GAMMA ** (end - step)


@pytest.mark.parametrize("n_step", [1, 3, 5])
@pytest.mark.parametrize(("num_envs", "capacity", "passes"), [
    (1, 50, 20), (1, 50, 50), (1, 50, 51), (1, 50, 333), (3, 50, 400), (8, 64, 5), (8, 64, 1000), (8, 8, 100),
    (64, 1000, 777), (1, 1, 40), (1, 2, 41),
])
def test_every_sample_is_a_true_transition(num_envs, capacity, passes, n_step):
    buffer, stream = fill(num_envs, capacity, passes, n_step)
    held = {step for row in stream[-(buffer.num_rows - 1):] for step in row}
    known = {step for row in stream for step in row}
    batch = buffer.sample(4000, np.random.default_rng(0))
    for observation, reward, following, discount in zip(
        batch.observations.tolist(), batch.rewards.tolist(), batch.next_observations.tolist(),
        batch.discounts.tolist(), strict=True,
    ):
        environment, episode, step = map(int, observation)
        assert (environment, episode, step) in held
        assert step < Coded.length(environment, episode), "a reset step was sampled"
        expected_reward, next_step, expected_discount = transition(environment, episode, step, known, n_step)
        assert following == [environment, episode, next_step]
        assert (reward, discount) == (expected_reward, expected_discount)


@pytest.mark.parametrize(("num_envs", "passes"), [(1, 90), (4, 20), (4, 25), (4, 26), (4, 137)])
def test_samples_are_uniform_over_all_held_transitions(num_envs, passes):
    buffer, stream = fill(num_envs, 100, passes)
    held = [step for row in stream[-(buffer.num_rows - 1):] for step in row]
    draws = 200 * len(held)
    observations = buffer.sample(draws, np.random.default_rng(1)).observations.numpy().astype(int)
    counts = Counter(map(tuple, observations))
    assert counts.keys() == set(held), "the oldest and the newest transition can be drawn"
    chi_square = sum((counts[step] - 200) ** 2 / 200 for step in held)
    freedom = len(held) - 1
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5  # mean and deviation of the distribution


@pytest.mark.parametrize(("num_envs", "held"), [(1, 100), (8, 104), (100, 300)])
def test_a_full_buffer_holds_its_capacity_in_whole_rows_and_three_at_least(num_envs, held):
    buffer = ReplayBuffer(100, num_envs, Coded.observation_space, 4)
    buffer.reset(np.zeros((num_envs, 3)))
    for _ in range(250):
        buffer.add(*np.zeros((4, num_envs), bool), np.zeros((num_envs, 3)))
    assert len(np.unique(buffer.draw(20_000, np.random.default_rng(0)))) == held


@pytest.mark.parametrize("passes", [1, 2, 3, 5, 6, 7, 12, 40])
@pytest.mark.parametrize("n_step", [1, 3])
def test_a_reset_of_all_environments_truncates_what_was_under_way(passes, n_step):
    """Ring of 20 rows, episodes of length 1 to 6: the resets meet first, middle and last steps, and reset steps."""
    envs = gym.vector.SyncVectorEnv([lambda i=i: Coded(i) for i in range(3)])
    buffer = ReplayBuffer(60, 3, envs.single_observation_space, 4, n_step, 0.5)
    buffer.reset(envs.reset()[0])
    last = []
    for i in range(1, 60):
        observations, rewards, terminated, truncated, _ = envs.step(np.zeros(3, int))
        buffer.add(np.zeros(3, int), rewards, terminated, terminated | truncated, observations)
        if i % passes == 0:
            last = [*last, *map(tuple, buffer.newest().int().tolist())]
            buffer.reset(envs.reset()[0])
    batch = buffer.sample(3000, np.random.default_rng(0))
    for (number, episode, step), (_, after, end), discount in zip(
            batch.observations.int().tolist(), batch.next_observations.int().tolist(), batch.discounts, strict=True):
        assert step < Coded.length(number, episode), "a reset step was sampled"
        assert (number, episode, step) not in last, "the step to a new beginning was sampled"
        assert after == episode, "a walk crossed a reset"
        whole = end == Coded.length(number, episode)
        terminated = whole and Coded.flags(episode)[0]
        assert discount == (0 if terminated else 0.5 ** (end - step))
        assert end - step == n_step or whole or (number, episode, end) in last or i == 59


def stacks(newest, frames):
    """The stacks that end with the frames (B, 3) of Coded environments, worked out from what the frames say."""
    stacked = np.repeat(newest[:, None], frames, axis=1)
    stacked[:, :, 2] -= np.arange(frames - 1, -1, -1)
    stacked[stacked[:, :, 2] < 0] = 0  # before the episode's first frame
    return stacked


@pytest.mark.parametrize("reset_every", [1000, 9, 4])
@pytest.mark.parametrize("n_step", [1, 3])
@pytest.mark.parametrize("frames", [2, 3, 4])
@pytest.mark.parametrize(("num_envs", "rows"), [(1, 12), (3, 3), (3, 7), (3, 100)])
def test_stacks_are_gymnasiums_and_those_of_every_held_step_can_be_sampled(num_envs, rows, frames, n_step, reset_every):
    """Up to ten times around the ring; resets of a running stream meet steps of all kinds."""
    envs = gym.vector.SyncVectorEnv([  # numbers from 1: no frame is blank
        lambda i=i: gym.wrappers.FrameStackObservation(Coded(1 + i), frames, padding_type="zero")
        for i in range(num_envs)])
    buffer = ReplayBuffer(num_envs * rows, num_envs, envs.single_observation_space, 4, n_step, GAMMA, frames)
    rng, stream = np.random.default_rng(0), []  # of each row the frames that a real step began with
    observations, _ = envs.reset()
    buffer.reset(observations)
    ended = np.zeros(num_envs, bool)
    for i in range(1, 61):
        taken = observations[~ended, -1]
        _, rewards, terminated, truncated, _ = step = envs.step(np.zeros(num_envs, int))
        observations, ended = step[0], terminated | truncated
        buffer.add(np.zeros(num_envs), rewards, terminated, ended, observations)
        stream.append(taken)
        if i % reset_every == 0:
            observations, _ = envs.reset()
            ended[:] = False
            buffer.reset(observations)
            stream.append(taken[:0])
        assert np.array_equal(buffer.newest(), observations)
        held = np.unique(np.concatenate(stream[-rows:]), axis=0)
        if len(held):
            batch = buffer.sample(20 * len(held), rng)
            sampled, following = batch.observations.numpy(), batch.next_observations.numpy()
            assert np.array_equal(np.unique(sampled[:, -1], axis=0), held)
            assert np.array_equal(sampled, stacks(sampled[:, -1], frames))
            assert np.array_equal(following, stacks(following[:, -1], frames))
    known = {tuple(step) for row in stream for step in row.astype(int).tolist()}
    for start, reward, end, discount in zip(sampled[:, -1].astype(int).tolist(), batch.rewards.tolist(),
                                            following[:, -1].tolist(), batch.discounts.tolist(), strict=True):
        expected_reward, next_step, expected_discount = transition(*start, known, n_step)
        assert end == [*start[:2], next_step]
        assert (reward, discount) == (expected_reward, expected_discount)


def test_blank_frames_are_gymnasiums_where_zero_is_no_observation():
    args = Args(env_id="environments:Space-positive-v0", frame_stack=3)
    envs = make_envs(args, 2)
    buffer = ReplayBuffer(50, 2, envs.single_observation_space, 3, frame_stack=3)
    observations, _ = envs.reset(seed=0)
    buffer.reset(observations)
    for _ in range(25):
        assert np.array_equal(buffer.newest(), observations)
        observations, rewards, terminated, truncated, _ = envs.step(np.full(2, 5))
        buffer.add(np.zeros(2), rewards, terminated, terminated | truncated, observations)


@pytest.mark.parametrize("game", ["Pong", "Breakout"])
def test_stacks_are_those_of_ale_pys_own_vectors(game):
    """Nine times around the ring; with random actions Breakout is over after some two hundred steps."""
    envs = make_envs(Args(env_id=f"ALE/{game}-v5"), 2)
    assert envs.single_observation_space.shape == (4, 84, 84)
    buffer = ReplayBuffer(90, 2, envs.single_observation_space, 6, frame_stack=4)
    rng, steps, ends = np.random.default_rng(0), [], 0  # steps: the two observations of each real one, by row
    observations, _ = envs.reset(seed=1)
    buffer.reset(observations)
    ended = np.zeros(2, bool)
    for _ in range(400):
        before, real = observations.copy(), ~ended
        actions = rng.integers(envs.single_action_space.n, size=2)
        observations, rewards, terminated, truncated, _ = envs.step(actions)
        ended = terminated | truncated
        buffer.add(actions, rewards, terminated, ended, observations)
        assert torch.equal(buffer.newest(), torch.from_numpy(observations))
        steps.append({(a.tobytes(), b.tobytes()) for a, b in zip(before[real], observations[real], strict=True)})
        ends += ended.sum()
        batch = buffer.sample(16, rng)
        held = set().union(*steps[-45:])
        assert all((a.tobytes(), b.tobytes()) in held
                   for a, b in zip(batch.observations.numpy(), batch.next_observations.numpy(), strict=True))
    assert ends >= 2 or game == "Pong"
    envs.close()


def test_the_action_of_a_transition_is_kept():
    envs = gym.vector.SyncVectorEnv([lambda: Coded(0)])
    buffer = ReplayBuffer(100, 1, envs.single_observation_space, 4)
    buffer.reset(envs.reset()[0])
    taken = {}
    for i in range(60):
        action = i * 7 % 4
        taken[tuple(buffer.newest()[0].tolist())] = action
        observations, rewards, terminated, truncated, _ = envs.step(np.array([action]))
        buffer.add(np.array([action]), rewards, terminated, terminated | truncated, observations)
    batch = buffer.sample(500, np.random.default_rng(0))
    assert batch.actions.tolist() == [taken[tuple(observation)] for observation in batch.observations.tolist()]


@pytest.mark.parametrize(("dtype", "stored"), [("float64", "float32"), ("float16", "float32"), ("uint8", "uint8"),
                                               ("int64", "int64"), ("bool", "bool"), ("uint16", "uint16")])
def test_only_floats_change_their_dtype(dtype, stored):
    space = gym.spaces.Box(0, 1, (2,), np.dtype(dtype).type)
    buffer = ReplayBuffer(10, 1, space, 2)
    buffer.reset(np.ones((1, 2), dtype))
    buffer.add(*np.zeros((4, 1), bool), np.ones((1, 2), dtype))
    assert str(buffer.frames.dtype) == f"torch.{stored}"
    assert buffer.sample(3, np.random.default_rng(0)).observations.sum() == 6


def test_memory_is_within_three_percent_of_what_a_transition_holds():
    space = gym.spaces.Box(-1, 1, (4,), np.float32)
    for num_envs in (1, 8, 64):
        buffer = ReplayBuffer(10_000, num_envs, space, 2)
        arrays = (buffer.frames, buffer.actions, buffer.rewards, buffer.terminated, buffer.ended)
        transition_bytes = 4 * 4 + 1 + 4 + 2
        assert sum(array.nbytes for array in arrays) <= 1.03 * 10_000 * transition_bytes


def test_a_buffer_that_does_not_fit_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr(dqn, "available_memory", lambda: 1e6)
    args = Args(tuned=False, buffer_size=100_000)
    with pytest.raises(UsageError, match=r"--buffer-size 100000.*needs.*GiB.*at most 43,477"):  # 1e6 / 23 - 1
        Learner(args, make_envs(args, 1), dqn.Ranks())


# of steps 0, 3 and 4: 5 - 2/2 + 2/4, -0.5 - 1.5/2 + 1/4, and -1.5 + 1/2 where the stream stops
@pytest.mark.parametrize(("clip", "expected"), [(False, [4.5, -1.0, -1.0]), (True, [0.75, -0.75, -0.5])])
def test_clipped_rewards_are_clipped_before_they_are_summed_and_kept_as_they_were(clip, expected):
    buffer = ReplayBuffer(100, 1, gym.spaces.Box(0, 9, (1,), np.float32), 2, 3, GAMMA, clip_rewards=clip)
    buffer.reset(np.zeros((1, 1)))
    rewards = [5.0, -2.0, 2.0, -0.5, -1.5, 1.0]
    for step, reward in enumerate(rewards, 1):
        buffer.add(np.zeros(1), np.array([reward]), np.zeros(1, bool), np.zeros(1, bool), np.full((1, 1), step))
    batch = buffer.sample(200, np.random.default_rng(0))
    sums = dict(zip(batch.observations[:, 0].tolist(), batch.rewards.tolist(), strict=True))
    assert [sums[0], sums[3], sums[4]] == expected
    assert buffer.rewards[:6].tolist() == rewards


def test_an_atari_transition_takes_7100_bytes_at_most():
    envs = make_envs(Args(env_id="ALE/Pong-v5"), 1)
    buffer = ReplayBuffer(10_000, 8, envs.single_observation_space, 6, 3, 0.99, 4)
    arrays = (buffer.frames, buffer.actions, buffer.rewards, buffer.terminated, buffer.ended)
    assert sum(array.nbytes for array in arrays) <= 7_100 * 10_000


def test_a_million_atari_transitions_need_between_6_and_7_2_gigabytes(monkeypatch):
    args = Args(env_id="ALE/Pong-v5")
    assert (args.buffer_size, args.frame_stack, args.num_envs) == (1_000_000, 4, 32)
    space, shapes = make_envs(args, 1).single_observation_space, []

    def zeros(shape, **settings):
        shapes.append(shape)
        raise MemoryError  # before anything is allocated

    monkeypatch.setattr(torch, "zeros", zeros)
    refusal = r"^--buffer-size 1000000: .*needs 6\.6 GiB, 5\.6 GiB are free; must be at most 849,\d\d\d$"
    for memory, outcome, message in ((6e9, UsageError, refusal), (7.2e9, MemoryError, None)):
        monkeypatch.setattr(dqn, "available_memory", lambda memory=memory: memory)
        with pytest.raises(outcome, match=message):
            ReplayBuffer(args.buffer_size, args.num_envs, space, 6, args.n_step, args.gamma, args.frame_stack)
    monkeypatch.setattr(dqn, "Ranks", lambda: SimpleNamespace(size=4))
    monkeypatch.setattr(dqn, "available_memory", lambda: 1.5e9)  # a quarter
    refusal = r"^--buffer-size 1000000: .*needs 1\.6 GiB for each rank, 1\.4 GiB are free; must be at most 849,\d\d\d$"
    with pytest.raises(UsageError, match=refusal):
        ReplayBuffer(args.buffer_size // 4, args.num_envs // 4, space, 6, args.n_step, args.gamma, args.frame_stack)
    assert shapes == [(1_000_129, 84, 84)], "31,250 rows of 32, four for the stack of the oldest, a blank frame"
