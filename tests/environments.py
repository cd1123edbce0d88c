"""Environments made for the tests; importing this module registers them ("environments:Coded-v0")."""

import itertools
import time

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class Coded(gym.Env):
    """Its observation says which transition it is: (environment, episode, step).

    Episodes last 1 to 6 steps. Even ones terminate, odd ones are truncated, every fifth claims both.
    """

    numbers = itertools.count()
    observation_space = spaces.Box(0, 1e6, (3,), np.float64)
    action_space = spaces.Discrete(4)

    def __init__(self, number=None):
        self.number = next(self.numbers) if number is None else number
        self.episode = -1

    @staticmethod
    def length(number, episode):
        return 1 + (7 * number + 3 * episode) % 6

    @staticmethod
    def reward(number, episode, step):
        return 100.0 * number + 10.0 * (episode % 7) + step

    @staticmethod
    def flags(episode):
        """(terminated, truncated) of the episode's last step."""
        return episode % 2 == 0 or episode % 5 == 0, episode % 2 == 1

    def observe(self):
        return np.array([self.number, self.episode, self.step_number], np.float64)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.step_number = self.episode + 1, 0
        return self.observe(), {}

    def step(self, action):
        reward = self.reward(self.number, self.episode, self.step_number)
        self.step_number += 1
        last = self.step_number == self.length(self.number, self.episode)
        terminated, truncated = self.flags(self.episode) if last else (False, False)
        return self.observe(), reward, terminated, truncated, {}


class Walk(gym.Env):
    """A walk of ten steps over any observation space, on actions that do not count from zero.

    `fault` names what goes wrong at step 700 of the environment's life, which is in the middle of training; "stuck"
    takes a minute for step 300, "slow" a twentieth of a second for each.
    """

    action_space = spaces.Discrete(3, start=5)

    def __init__(self, space=None, fault=None, limit=10, render_mode=None):
        self.observation_space = spaces.Box(-1, 1, (2,), np.float32) if space is None else space
        self.fault, self.limit, self.life = fault, limit, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        assert 5 <= action <= 7, f"{action} is not an action"
        self.steps, self.life = self.steps + 1, self.life + 1
        observation, reward = self.observation_space.sample(), float(action == 6)
        if self.life == 300 and self.fault == "stuck":
            time.sleep(60)
        if self.fault == "slow":
            time.sleep(0.05)
        if self.life == 700:
            if self.fault == "observation":
                observation = np.full((2,), np.nan, np.float32)
            elif self.fault == "reward":
                reward = np.inf
            elif self.fault == "raise":
                raise RuntimeError("the motor is broken")
        return observation, reward, self.steps == self.limit, False, {}


class SameStep(gym.vector.SyncVectorEnv):
    """A native vectorisation that resets in the step that ends an episode."""

    def __init__(self, num_envs=1, **kwargs):
        super().__init__([Walk] * num_envs, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)


class Catch(gym.Env):
    """A ball falls between two walls, the paddle below is to catch it: reward 1 for a catch, -1 for a miss.

    An episode is one ball of twelve steps. The ball goes 9 pixels to the side with each, and bounces off the walls;
    which way it goes only its movement shows. The paddle waits in the middle until the ball has fallen nine steps and
    is above it; the last three can take it 9 pixels to a side each. The ball comes down three such moves from the
    middle, so only three to the right side catch it, and one frame does not tell which side that is.
    """

    observation_space = spaces.Box(0, 255, (84, 84), np.uint8)
    action_space = spaces.Discrete(3)  # left, stay, right

    def observe(self):
        frame = np.zeros((84, 84), np.uint8)
        frame[6 * self.fallen : 6 * self.fallen + 6, self.ball - 2 : self.ball + 3] = 255
        frame[80:, self.paddle - 4 : self.paddle + 5] = 255
        return frame

    @property
    def ball(self):
        side = self.offset + self.direction * 9 * (self.fallen - 9)  # of the middle, were there no walls
        return 42 + (side if abs(side) <= 39 else 78 * np.sign(side) - side)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.offset, self.direction = self.np_random.integers(-4, 5), self.np_random.choice([-1, 1])
        self.fallen, self.paddle = 0, 42
        return self.observe(), {}

    def step(self, action):
        if self.fallen >= 9:
            self.paddle += 9 * (action - 1)
        self.fallen += 1
        landed = self.fallen == 12
        caught = landed and abs(self.paddle - self.ball) <= 4
        return self.observe(), float(landed and 2 * caught - 1), landed, False, {}


class Unpainted(Walk):
    """Would render, if only a package were there."""

    metadata = Walk.metadata | {"render_modes": ["rgb_array"]}

    def render(self):
        raise gym.error.DependencyNotInstalled("a_painter_nobody_has is not installed")


class Lives(gym.Env):
    """Games of three lives, which end with steps 4, 8 and 12; the rewards of a game are 3, 2, 1, …, -8.

    Its observation says which transition it is: (game, counted from 1, step).
    """

    observation_space = spaces.Box(0, 1e6, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self):
        self.game = 0

    def observe(self):
        return np.array([self.game, self.taken], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.game, self.taken = self.game + 1, 0
        return self.observe(), {"lives": 3}

    def step(self, action):
        self.taken += 1
        return self.observe(), 4.0 - self.taken, self.taken == 12, False, {"lives": 3 - self.taken // 4}


class Halves(gym.vector.SyncVectorEnv):
    """A native vectorisation of CartPole whose step has two halves."""

    def __init__(self, num_envs=1, **kwargs):
        super().__init__([lambda: gym.make("CartPole-v1")] * num_envs)

    def send(self, actions):
        self.sent = actions.copy()

    def recv(self):
        return super().step(self.sent)

    def step(self, actions):
        self.send(actions)
        return self.recv()


SPACES = {
    "float64": spaces.Box(-np.inf, np.inf, (3,), np.float64),
    "positive": spaces.Box(1, 2, (3,), np.float32),
    "float16": spaces.Box(-1, 1, (3,), np.float16),
    "uint8": spaces.Box(0, 255, (4, 5, 3), np.uint8),
    "int16": spaces.Box(-300, 300, (2, 2), np.int16),
    "uint16": spaces.Box(0, 60_000, (2,), np.uint16),
    "int64": spaces.Box(-5, 5, (2,), np.int64),
    "bool": spaces.Box(0, 1, (6,), np.bool_),
    "scalar": spaces.Box(-1, 1, (), np.float32),
    "discrete": spaces.Discrete(7, start=-3),
    "multibinary": spaces.MultiBinary((2, 3)),
    "multidiscrete": spaces.MultiDiscrete([2, 5]),
    "tuple": spaces.Tuple((spaces.Discrete(3), spaces.Box(-1, 1, (2,), np.float32))),
    "dict": spaces.Dict({"at": spaces.Box(-1, 1, (2, 2), np.float32), "key": spaces.MultiBinary(2)}),
}

gym.register("Catch-v0", entry_point=Catch)
gym.register("Coded-v0", entry_point=Coded)
gym.register("Walk-v0", entry_point=Walk)
gym.register("Endless-v0", entry_point=Walk, kwargs={"limit": -1})
gym.register("ALE/Lives-v0", entry_point=Lives)  # a name that lets it have the settings of Atari games
gym.register("Halves-v0", entry_point=lambda: gym.make("CartPole-v1"), vector_entry_point=Halves)
gym.register("Stuck-v0", entry_point=Walk, kwargs={"fault": "stuck"})
gym.register("Slow-v0", entry_point=Walk, kwargs={"fault": "slow"})
gym.register("SameStep-v0", entry_point=Walk, vector_entry_point=SameStep)
gym.register("Sentence-v0", entry_point=Walk, kwargs={"space": spaces.Sequence(spaces.Discrete(3))})
gym.register("Unpainted-v0", entry_point=Unpainted)
gym.register("Unbuilt-v0", entry_point="a_simulator_nobody_has:Env")
for fault in ("observation", "reward", "raise"):
    gym.register(f"Faulty-{fault}-v0", entry_point=Walk, kwargs={"fault": fault})
for name, space in SPACES.items():
    gym.register(f"Space-{name}-v0", entry_point=Walk, kwargs={"space": space})
