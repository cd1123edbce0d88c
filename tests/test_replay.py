"""ReplayBuffer: a stream of time steps."""

from collections import Counter
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch

from dqn import Args, ReplayBuffer, UsageError, make_envs

CPU = torch.device("cpu")


def make_buffer(num_envs, space=None, **settings):
    space = gym.spaces.Box(0, 1e6, (2,), np.float32) if space is None else space
    envs = SimpleNamespace(num_envs=num_envs, single_observation_space=space)
    return ReplayBuffer(Args(num_envs=num_envs, **settings), envs, CPU)


class Stream:
    """Random steps of N environments, fed to a buffer and kept in plain lists.

    A frame is a number that occurs once, and its negative. Each environment has a list of rows: (frame, frames of the
    episode up to it, action, reward, terminated), or for a step that only resets (frame, frames, None, None, None).
    """

    def __init__(self, buffer, num_envs, frame_stack, seed):
        self.buffer, self.frame_stack, self.rng = buffer, frame_stack, np.random.default_rng(seed)
        self.rows = [[] for _ in range(num_envs)]
        self.over = np.zeros(num_envs, bool)
        self.number = 0
        self.episodes = [[] for _ in range(num_envs)]  # frames of the episode under way
        self.begin()

    def stack(self, frames):
        blank = [(0, 0)] * self.frame_stack
        return (blank + [(frame, -frame) for frame in frames])[-self.frame_stack :]

    def observe(self, env):
        self.number += 1
        self.episodes[env].append(self.number)
        stack = self.stack(self.episodes[env])
        return stack if self.frame_stack > 1 else stack[0]

    def begin(self):
        """Begin all episodes anew; from where they were, no step is taken."""
        for env, rows in enumerate(self.rows):
            rows.append(((self.episodes[env] or [0])[-1], list(self.episodes[env]), None, None, None))
            self.episodes[env] = []
        observations = [self.observe(env) for env in range(len(self.rows))]
        self.buffer.begin_episodes(np.array(observations, np.float32))
        self.over[:] = False

    def step(self):
        count = len(self.rows)
        actions, rewards = self.rng.integers(4, size=count), self.rng.normal(size=count) * 3
        terminated, truncated = self.rng.random((2, count)) < 0.15
        terminated &= ~self.over
        truncated &= ~self.over
        rewards[self.over] = 0
        observations = []
        for env, rows in enumerate(self.rows):
            frames = list(self.episodes[env])
            if self.over[env]:
                rows.append((frames[-1], frames, None, None, None))
                self.episodes[env] = []
            else:
                rows.append((frames[-1], frames, actions[env], rewards[env], terminated[env]))
            observations.append(self.observe(env))
        self.buffer.add(actions, rewards, terminated, truncated, np.array(observations, np.float32))
        self.over = terminated | truncated

    def expected(self, env, t, n_step, gamma, clip):
        """Walk from row t: (stack, action, return, stack it leads to, discount)."""
        rows = [*self.rows[env], (None, list(self.episodes[env]), None, None, None)]
        total, discount, m = 0.0, 1.0, 0
        while m < n_step and rows[t + m][2] is not None:
            reward = rows[t + m][3]
            total += gamma**m * (max(-1.0, min(1.0, reward)) if clip else reward)
            discount *= gamma
            m += 1
            if rows[t + m - 1][4]:
                discount = 0.0
                break
        return self.stack(rows[t][1]), rows[t][2], total, self.stack(rows[t + m][1]), discount


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("frame_stack", [1, 4])
@pytest.mark.parametrize("n_step", [1, 3, 10])
@pytest.mark.parametrize(("num_envs", "buffer_size"), [(1, 10), (1, 1000), (3, 60), (8, 100), (8, 24)])
def test_samples_are_those_of_a_brute_force_walk(num_envs, buffer_size, n_step, frame_stack, clip):
    """Terminations, truncations and restarts at random; before the ring is full, and many times around it."""
    space = gym.spaces.Box(-np.inf, np.inf, (frame_stack, 2) if frame_stack > 1 else (2,), np.float32)
    settings = dict(buffer_size=buffer_size, n_step=n_step, gamma=0.9, frame_stack=frame_stack, clip_rewards=clip)
    buffer = make_buffer(num_envs, space, **settings)
    stream = Stream(buffer, num_envs, frame_stack, seed=num_envs + n_step)
    rng = np.random.default_rng(0)
    for passes in range(1, 200):
        stream.step()
        if stream.rng.random() < 0.05:
            stream.begin()
        if passes < n_step + frame_stack + 3 or passes % 13:
            continue
        newest = len(stream.rows[0]) - n_step  # the row from which n steps have been taken
        oldest = max(newest - buffer_size // num_envs, frame_stack - 1)
        held = {rows[t][0]: (env, t) for env, rows in enumerate(stream.rows)
                for t in range(oldest, newest + 1) if t < len(rows) and rows[t][2] is not None}
        batch = buffer.sample(300, rng)
        for observation, action, reward, following, discount in zip(*(each.tolist() for each in batch), strict=True):
            stack = observation if frame_stack > 1 else [observation]
            env, t = held[stack[-1][0]]  # a KeyError is a reset step, or one that should be gone or is incomplete
            expected = stream.expected(env, t, n_step, 0.9, clip)
            following = following if frame_stack > 1 else [following]
            assert [tuple(frame) for frame in stack] == expected[0]
            assert action == expected[1]
            assert reward == pytest.approx(expected[2], abs=1e-5)
            assert [tuple(frame) for frame in following] == expected[3]
            assert discount == pytest.approx(expected[4], abs=1e-6)


@pytest.mark.parametrize(("num_envs", "passes"), [(1, 300), (4, 30), (4, 137)])
def test_samples_are_uniform_over_all_real_steps(num_envs, passes):
    buffer = make_buffer(num_envs, buffer_size=100, n_step=2)
    stream = Stream(buffer, num_envs, 1, seed=5)
    for _ in range(passes):
        stream.step()
    newest = len(stream.rows[0]) - 2
    held = [rows[t][0] for rows in stream.rows for t in range(max(newest - 100 // num_envs, 0), newest + 1)
            if rows[t][2] is not None]
    counts = Counter(buffer.sample(200 * len(held), np.random.default_rng(1)).observations[:, 0].int().tolist())
    assert counts.keys() == set(held), "from the oldest to the newest"
    chi_square = sum((counts[frame] - 200) ** 2 / 200 for frame in held)
    freedom = len(held) - 1
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5  # mean and deviation of the distribution


def test_the_example_of_the_docstring():
    """Episodes o and p of two steps, the first terminated, the second truncated; gamma 0.5, two steps."""
    buffer = make_buffer(1, buffer_size=20, n_step=2, gamma=0.5)
    buffer.begin_episodes(np.full((1, 2), 10.0, np.float32))  # o0

    def add(reward, terminated, truncated, frame):
        row = np.array([0]), np.array([reward]), np.array([terminated]), np.array([truncated])
        buffer.add(*row, np.full((1, 2), frame, np.float32))

    for step in ((1.0, False, False, 11), (2.0, True, False, 12), (0, False, False, 20), (4.0, False, False, 21),
                 (8.0, False, True, 22), (0, False, False, 30), (16.0, False, False, 31)):
        add(*step)
    assert buffer.is_last[:8, 0].tolist() == [True, False, False, True, False, False, True, False]
    assert buffer.is_terminal[:8, 0].tolist() == [False, False, False, True, False, False, False, False]
    batch = buffer.sample(200, np.random.default_rng(0))
    found = {observation: rest for observation, *rest in zip(
        batch.observations[:, 0].tolist(), batch.rewards.tolist(), batch.next_observations[:, 0].tolist(),
        batch.discounts.tolist(), strict=True)}
    assert found == {
        10: [1 + 0.5 * 2, 12, 0.0],  # terminated within two steps
        11: [2.0, 12, 0.0],
        20: [4 + 0.5 * 8, 22, 0.25],  # truncated: bootstraps from p2
        21: [8.0, 22, 0.5],
    }


@pytest.mark.parametrize(("dtype", "stored"), [("float64", "float32"), ("float16", "float32"), ("uint8", "uint8"),
                                               ("int64", "float32"), ("bool", "bool"), ("uint16", "float32")])
def test_bytes_and_booleans_are_stored_as_such_and_all_else_as_float32(dtype, stored):
    buffer = make_buffer(1, gym.spaces.Box(0, 1, (2,), np.dtype(dtype).type), buffer_size=10)
    buffer.begin_episodes(np.ones((1, 2), dtype))
    for _ in range(5):
        buffer.add(*np.zeros((4, 1), bool), np.ones((1, 2), dtype))
    assert str(buffer.frames.dtype) == f"torch.{stored}"
    assert buffer.sample(3, np.random.default_rng(0)).observations.sum() == 6


def held_bytes(buffer):
    return sum(array.nbytes for array in vars(buffer).values() if isinstance(array, np.ndarray | torch.Tensor))


def test_a_transition_takes_its_frame_and_14_bytes_which_are_7100_with_atari():
    for num_envs in (1, 8, 64):
        assert held_bytes(make_buffer(num_envs, buffer_size=10_000)) <= 1.03 * 10_000 * (8 + 14)
    space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    assert held_bytes(make_buffer(1, space, buffer_size=10_000, frame_stack=4, n_step=3)) <= 7_100 * 10_000


def test_a_buffer_that_does_not_fit_is_refused_before_memory_is_taken(monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2.1e6))
    make_buffer(1, buffer_size=90_000)  # of 22 bytes each
    monkeypatch.setattr(torch, "zeros", None)
    with pytest.raises(UsageError, match=r"^--buffer-size 100000: takes 0\.0 GiB of memory, .*; make it smaller$"):
        make_buffer(1, buffer_size=100_000)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # two processes share the memory
    with pytest.raises(UsageError, match=r"^--buffer-size 90000: "):
        make_buffer(1, buffer_size=90_000)


def test_a_restored_buffer_draws_the_same_samples_and_goes_on_alike():
    one, other = (make_buffer(3, buffer_size=60, n_step=3) for _ in range(2))
    stream = Stream(one, 3, 1, seed=1)
    for _ in range(50):
        stream.step()
    other.load_state_dict({name: value.clone() if isinstance(value, torch.Tensor) else value
                           for name, value in one.state_dict().items()})
    for buffer in (one, other):
        again = Stream(buffer, 3, 1, seed=2)
        for _ in range(9):
            again.step()
    samples = [buffer.sample(100, np.random.default_rng(0)) for buffer in (one, other)]
    assert all(map(torch.equal, *samples))


@pytest.mark.parametrize(("env_id", "frame_stack", "passes"), [
    ("environments:Catch-v0", 1, 60), ("environments:Catch-v0", 3, 60), ("ALE/Breakout-v5", 4, 400)])
def test_stacks_from_the_buffer_are_those_of_gymnasium_and_of_ale_py(env_id, frame_stack, passes):
    args = Args(env_id=env_id, frame_stack=frame_stack, buffer_size=1000, num_envs=2)
    envs = make_envs(args, 2)
    buffer, rng, seen, ends = ReplayBuffer(args, envs, CPU), np.random.default_rng(0), set(), 0
    observations, _ = envs.reset(seed=0)
    buffer.begin_episodes(observations)
    for _ in range(passes):
        seen |= {observation.tobytes() for observation in observations}
        actions = rng.integers(envs.single_action_space.n, size=2)
        observations, rewards, terminated, truncated, _ = envs.step(actions)
        buffer.add(actions, rewards, terminated, truncated, observations)
        ends += (terminated | truncated).sum()
    assert ends >= 2
    seen |= {observation.tobytes() for observation in observations}
    batch = buffer.sample(1000, rng)
    for stacks in (batch.observations, batch.next_observations):
        assert {stack.numpy().tobytes() for stack in stacks} <= seen
    assert batch.observations.shape[1:] == envs.single_observation_space.shape
    envs.close()
