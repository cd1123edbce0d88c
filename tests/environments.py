"""Environments made for the tests; importing this module registers them ("environments:Walk-v0")."""

import multiprocessing
import os
import random
import signal
import time

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class Walk(gym.Env):
    """A walk of ten steps over any observation space, on actions that do not count from zero.

    `fault` names what goes wrong at step 700 of the environment's life, in the middle of training; "stuck" takes a
    minute for step 300, "dying" kills the second process that an AsyncVectorEnv started then.
    """

    action_space = spaces.Discrete(3, start=5)

    def __init__(self, space=None, fault=None, limit=10, render_mode=None):
        self.observation_space = spaces.Box(-1, 1, (2,), np.float32) if space is None else space
        self.fault, self.limit, self.life, self.render_mode = fault, limit, 0, render_mode

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
        if self.fault == "stuck" and self.life == 300:
            time.sleep(60)
        if self.fault == "dying" and self.life == 300 and multiprocessing.current_process().name.endswith("-1"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.life == 700:
            if self.fault == "observation":
                observation = np.full((2,), np.nan, np.float32)
            elif self.fault == "reward":
                reward = 1e39  # more than float32 holds
            elif self.fault == "raise":
                raise OSError("the motor is broken")
        return observation, reward, self.steps == self.limit, False, {}


class Unpainted(Walk):
    """Would render, if only a package were there."""

    metadata = Walk.metadata | {"render_modes": ["rgb_array"]}

    def render(self):
        raise gym.error.DependencyNotInstalled("a_painter_nobody_has is not installed")


class Catch(gym.Env):
    """A ball falls between two walls, the paddle below is to catch it: reward 1 for a catch, -1 for a miss.

    An episode is one ball of twelve steps. The ball goes 9 pixels to the side with each, and bounces off the walls;
    which way it goes only its movement shows. The paddle waits in the middle until the ball has fallen nine steps and
    is above it; the last three can take it 9 pixels to a side each. The ball comes down three such moves from the
    middle, so only three to the right side catch it, and one frame does not tell which side that is.
    """

    observation_space = spaces.Box(0, 255, (42, 42), np.uint8)  # every other pixel
    action_space = spaces.Discrete(3)  # left, stay, right

    def observe(self):
        frame = np.zeros((84, 84), np.uint8)
        frame[6 * self.fallen : 6 * self.fallen + 6, self.ball - 2 : self.ball + 3] = 255
        frame[80:, self.paddle - 4 : self.paddle + 5] = 255
        return frame[::2, ::2]

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


class Five(gym.Env):
    """Five steps of reward 1."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def observe(self):
        return np.full(self.observation_space.shape, min(self.t, 1), self.observation_space.dtype)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observe(), {}

    def step(self, action):
        self.t += 1
        return self.observe(), 1.0, self.t >= 5, False, {}


class Cam(Five):
    """Only `goal` matters; the camera is noise, in bytes."""

    observation_space = spaces.Dict(cam=spaces.Box(0, 255, (16, 16, 3), np.uint8), goal=spaces.Box(-1, 1, (1,)))

    def observe(self):
        self.goal = self.np_random.choice([-1, 1])
        cam = self.np_random.integers(0, 256, (16, 16, 3), np.uint8)
        return {"cam": cam, "goal": np.array([self.goal], np.float32)}

    def step(self, action):
        reward = float((action == 1) == (self.goal == 1))
        self.t += 1
        return self.observe(), reward, False, self.t >= 20, {}


class Winner(Five):
    """Its info has a value that is a number or None."""

    def reset(self, *, seed=None, options=None):
        observation, info = super().reset(seed=seed)
        self.length = int(self.np_random.integers(3, 9))
        return observation, info

    def step(self, action):
        self.t += 1
        end = self.t >= self.length
        return self.observe(), 1.0, end, False, {"winner": int(action) if end else None}


class Trail(Five):
    """Its info has an array that grows."""

    def step(self, action):
        return (*super().step(action)[:4], {"path": np.arange(self.t + self.np_random.integers(3))})


class Words(spaces.Space):
    def sample(self, mask=None, probability=None):
        return "go"

    def contains(self, x):
        return isinstance(x, str)


class Mission(Five):
    """A part of its observations is no number."""

    observation_space = spaces.Dict(
        image=spaces.Box(0, 255, (7, 7, 3), np.uint8), task=spaces.Dict(mission=Words(), direction=spaces.Discrete(4))
    )

    def observe(self):
        return {"image": np.zeros((7, 7, 3), np.uint8), "task": {"mission": "go", "direction": 0}}


class Blank(Five):
    """Its observations are bounded by 0 and 0."""

    observation_space = spaces.Box(0, 0, (1,), np.uint8)


class Clock(Five):
    """A reward of 1 for ever, cut after five steps; with `both` it ends there too."""

    observation_space = spaces.Box(0, 5, (1,), np.float32)

    def __init__(self, both=False):
        self.both = both

    def observe(self):
        return np.array([self.t], np.float32)

    def step(self, action):
        self.t += 1
        end = self.t >= 5
        return self.observe(), 1.0, end and self.both, end, {}


class Negative(gym.Env):
    """States from -2 on and actions from -1 on, which arrive as integers."""

    observation_space = spaces.Discrete(5, start=-2)
    action_space = spaces.Discrete(3, start=-1)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.t = 0, 0
        return self.x, {}

    def step(self, action):
        {-1: "left", 0: "stay", 1: "right"}[action]  # raises for anything but these integers
        self.x, self.t = int(np.clip(self.x + action, -2, 2)), self.t + 1
        return self.x, float(self.x == 2), self.x == 2, self.t >= 20, {}


class Never(Five):
    """Ends with action 1 only, which costs."""

    def step(self, action):
        return self.observe(), -float(action), bool(action), False, {}


class InPlace(Five):
    """All that it ever shows is one array, which it changes in place."""

    metadata = Five.metadata | {"render_modes": ["rgb_array"]}
    observation_space = spaces.Box(0, 255, (4, 5, 3), np.uint8)

    def __init__(self, render_mode=None):
        self.screen, self.render_mode = np.zeros((4, 5, 3), np.uint8), render_mode

    def observe(self):
        self.screen[:] = self.t
        return self.screen

    def render(self):
        return self.screen


class Dice(Five):
    """Draws from all generators that it does not own."""

    def __init__(self):
        self.action_space, self.observation_space = spaces.Discrete(2), spaces.Box(0, 1, (2,))

    def observe(self):
        return np.array([np.random.random(), random.random()], np.float32)

    def step(self, action):
        observation, _, *ends, info = super().step(action)
        reward = float(self.action_space.sample() + self.observation_space.sample()[0])
        return observation, reward, *ends, info


class One(Five):
    """Only one can be there at a time."""

    alive = False

    def __init__(self):
        assert not One.alive, "at most one simulator at once"
        One.alive = True

    def close(self):
        One.alive = False


class Allowed(gym.Env):
    """Two of four actions are allowed at a time, none after the end; right is the one that is observed as larger."""

    action_space = spaces.Discrete(4)
    observation_space = spaces.Box(0, 1, (4,), np.float32)

    def observe(self):
        self.mask = self.np_random.permutation([0, 0, 1, 1]).astype(np.int8) * (self.t < 10)
        self.sizes = self.np_random.random(4).astype(np.float32)
        return self.sizes, {"action_mask": self.mask, "what vectors cannot merge": {"t": [self.t] * self.t}}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observe()

    def step(self, action):
        assert self.mask[action], f"{action} is forbidden"
        reward = float(self.sizes[action] == (self.sizes * self.mask).max())
        self.t += 1
        observation, info = self.observe()
        return observation, reward, self.t == 10, False, info


class Signs(gym.Env):
    """A plus or a cross somewhere in a picture, and a number that says which of them asks for which action."""

    action_space = spaces.Discrete(2)
    observation_space = spaces.Dict(number=spaces.Box(-1, 1, (1,), np.float32),
                                    picture=spaces.Box(0, 255, (12, 12, 1), np.uint8))

    def observe(self):
        shape, number = self.np_random.integers(2, size=2)
        row, column = self.np_random.integers(10, size=2)
        picture = self.np_random.integers(100, size=(12, 12, 1), dtype=np.uint8)
        plus = np.uint8([[0, 255, 0], [255, 255, 255], [0, 255, 0]])
        cross = np.uint8([[255, 0, 255], [0, 255, 0], [255, 0, 255]])
        picture[row:row + 3, column:column + 3, 0] = cross if shape else plus
        self.right = shape ^ number
        return {"number": np.float32([2 * number - 1]), "picture": picture}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observe(), {}

    def step(self, action):
        reward = float(action == self.right)
        self.t += 1
        return self.observe(), reward, self.t == 20, False, {}


SPACES = {
    "float64": spaces.Box(-np.inf, np.inf, (3,), np.float64),
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
    "sequence": spaces.Sequence(spaces.Discrete(3)),
}

# Shape of an image and the (channels, height, width) that it means.
BOARDS = {
    (4, 4, 16): (16, 4, 4), (8, 8, 12): (12, 8, 8), (12, 8, 8): (12, 8, 8), (16, 4, 4): (16, 4, 4),
    (6, 7, 42): (42, 6, 7), (6, 7, 2): (2, 6, 7), (10, 10, 4): (4, 10, 10), (210, 160, 3): (3, 210, 160),
    (4, 128, 64): (4, 128, 64), (84, 84, 1): (1, 84, 84), (2, 40, 36): (2, 40, 36), (64, 256, 3): (3, 64, 256),
    (3, 240, 60): (3, 240, 60), (84, 84): (1, 84, 84), (4, 42, 36, 3): (12, 42, 36), (2, 3, 42, 36): (6, 42, 36),
}  # fmt: skip

for each in (Walk, Unpainted, Catch, Cam, Winner, Trail, Mission, Blank, Clock, Negative, Never, One, InPlace, Dice,
             Allowed, Signs):
    gym.register(f"{each.__name__}-v0", entry_point=each)
gym.register("Unversioned", entry_point=Walk)
gym.register("SCALE/Walk-v0", entry_point=Walk)
gym.register("Both-v0", entry_point=Clock, kwargs={"both": True})
gym.register("Lake-v0", entry_point="gymnasium.envs.toy_text.frozen_lake:FrozenLakeEnv", max_episode_steps=20,
             kwargs={"desc": ["SF", "FG"], "is_slippery": False})
gym.register("Short-v0", entry_point=Walk, kwargs={"limit": 1})
gym.register("Endless-v0", entry_point=Walk, kwargs={"limit": -1})
gym.register("Unbuilt-v0", entry_point="a_simulator_nobody_has:Env")
for fault in ("observation", "reward", "raise", "stuck", "dying"):
    gym.register(f"Faulty-{fault}-v0", entry_point=Walk, kwargs={"fault": fault})
for name, space in SPACES.items():
    gym.register(f"Space-{name}-v0", entry_point=Walk, kwargs={"space": space})
