"""Deep Q-Network (DQN) in one file, to be read from top to bottom.

    python dqn.py --env-id CartPole-v1                    # train; leaves a folder under runs/
    python dqn.py --env-id ALE/Pong-v5                    # from pixels
    python dqn.py --resume runs/NAME                      # go on with a run that was stopped
    python dqn.py --evaluate runs/NAME --capture-video    # record its best network
    torchrun --standalone --nproc-per-node 2 dqn.py       # one run by two processes
    tensorboard --logdir runs                             # look at it

A Q-network learns Q(s, a), the discounted return of taking action a in state s and acting greedily
from there on. It is fitted to a target that an older copy of itself, the target network, computes:

    td_target = r + gamma * max_a' Q_target(s', a')

On the command line, TUNED replaces the defaults of Args for the environments that it lists, such as
CartPole-v1. There, plain DQN is --no-tuned --no-double-q --no-layer-norm --no-anneal-lr.

Settings come first, then what learns (environments, network, replay buffer, agent), then the loop,
`train`. All that follows serves the loop: log, evaluation, files, processes, the command line.

Mnih et al. 2015, "Human-level control through deep reinforcement learning" (DQN)
van Hasselt et al. 2016, "Deep reinforcement learning with double Q-learning"
Wang et al. 2016, "Dueling network architectures for deep reinforcement learning"
Sutton 1988, "Learning to predict by the methods of temporal differences" (n-step returns)
Lillicrap et al. 2016, "Continuous control with deep reinforcement learning" (soft target updates)
Pardo et al. 2018, "Time limits in reinforcement learning" (truncation is not termination)
Young & Tian 2019, "MinAtar" (a network for small images)
"""

# `uv run dqn.py` installs these; the same as in requirements.txt.
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "filelock==4.3.1",
#     "gymnasium[atari,box2d,classic-control,toy-text]==1.4.0",
#     "moviepy==2.2.1",
#     "numpy==2.4.6",
#     "opencv-python-headless==5.0.0.93",
#     "psutil==7.2.2",
#     "tensorboard==2.21.0",
#     "tqdm==4.70.1",
#     "tyro==1.0.17",
# ]
# ///

import atexit
import contextlib
import copy
import importlib.util
import json
import math
import os
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import filelock
import gymnasium as gym
import numpy as np
import psutil
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# torchrun starts several processes. Each has its part of the environments, the buffer and every
# batch, and gradients are averaged. Without torchrun, this process is the only one.
RANK = int(os.environ.get("RANK", 0))  # this process; 0 also evaluates, and logs its own episodes
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))  # how many processes there are
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))  # the same two for this machine alone
LOCAL_WORLD_SIZE = int(os.environ.get("LOCAL_WORLD_SIZE", 1))


class UsageError(ValueError):
    """A setting that cannot work: the message names the flag, its value and what would be right."""


class TrainingError(RuntimeError):
    """A run that cannot go on: the message says at which step, or which file, and why."""


# ---------------------------------------------------------------------------------------- settings

@dataclass(kw_only=True)
class Args:
    """All settings. On the command line, TUNED (below) replaces defaults where it has others.

    Frequencies, like the length of a run, count the steps of all environments together.
    """

    # the experiment
    env_id: str = "CartPole-v1"  # Gymnasium id; "module:Id-v0" imports the module first
    env_kwargs: dict[str, bool | int | float | str] = field(default_factory=dict)  # its arguments
    num_envs: int = 1  # environments stepped side by side
    async_envs: bool = False  # each environment in a process of its own, for slow ones
    frame_stack: int = 1  # newest frames that make up an observation
    clip_rewards: bool = False  # learn from rewards clipped to [-1, 1]; logged ones are not clipped
    total_timesteps: int = 500_000  # length of the run
    seed: int = 1  # of all random numbers
    tuned: bool = True  # on the command line, begin with TUNED; flags that are given still win

    # the network
    convolutions: tuple[tuple[int, int, int], ...] = ()  # channels, kernel, stride; default: MNIH
    hidden_sizes: tuple[int, ...] = (120, 84)  # units of the hidden layers; may be empty
    dueling: bool = False  # the last layer gives a state value and advantages
    layer_norm: bool = True  # normalise before each activation

    # learning
    learning_rate: float = 1e-3  # step size of the optimiser
    anneal_lr: bool = True  # the learning rate falls linearly to zero
    buffer_size: int = 100_000  # transitions in the replay buffer
    learning_starts: int = 2_000  # steps before the first gradient step
    batch_size: int = 128  # transitions in a gradient step
    train_frequency: int = 10  # steps between two gradient steps
    gamma: float = 0.99  # discount factor
    n_step: int = 1  # rewards summed before the target bootstraps
    double_q: bool = True  # the Q-network picks a', the target network values it
    target_network_frequency: int = 500  # steps between two updates of the target network
    tau: float = 1.0  # how far the target network moves in an update: 1 is a copy
    loss: Literal["mse", "huber"] = "mse"  # between Q(s, a) and the target
    max_grad_norm: float = math.inf  # longer gradients are scaled down to this norm

    # exploration
    start_e: float = 1.0  # epsilon at the first step
    end_e: float = 0.05  # epsilon after the decay
    exploration_fraction: float = 0.2  # share of total_timesteps that the decay takes

    # evaluation, saving, logging
    eval_frequency: int = 25_000  # steps between two greedy evaluations; 0: only at the end
    eval_episodes: int = 20  # episodes of an evaluation, played side by side
    eval_max_steps: int = 10_000  # an episode of an evaluation is cut after so many steps
    stop_return: float = math.inf  # end the run once an evaluation reaches this mean return
    checkpoint_frequency: int = 50_000  # steps between checkpoints, see `restart`; 0: at the end
    save_model: bool = True  # write model.pt, the best network by greedy evaluation
    capture_video: bool = False  # record greedy episodes at the end
    exp_name: str = "dqn"  # part of the run folder's name
    track: bool = False  # mirror the log to Weights & Biases
    wandb_project_name: str = "dqn"  # W&B project
    wandb_entity: str | None = None  # W&B team
    cuda: bool = True  # use a GPU where there is one
    compile: bool = False  # compile the networks, which takes a minute
    torch_deterministic: bool = True  # have cuDNN use deterministic kernels only

    # instead of a new run
    resume: str | None = None  # folder of a run to go on with; missing or empty: a new one
    evaluate: str | None = None  # folder of a run whose best network plays


# Settings by family of environments ("ALE/"), and by environment: these go on top of its family's.
TUNED: dict[str, dict] = {
    "CartPole-v1": dict(
        total_timesteps=80_000, num_envs=8, learning_rate=2e-3, buffer_size=80_000,
        learning_starts=1_000, gamma=0.995, n_step=10, double_q=False, exploration_fraction=0.3,
        eval_frequency=5_000, eval_episodes=100, stop_return=500.0,
    ),
    "Acrobot-v1": dict(
        total_timesteps=100_000, num_envs=8, hidden_sizes=(256, 256), learning_rate=6e-4,
        learning_starts=1_000, train_frequency=2, n_step=3, double_q=False,
        target_network_frequency=250, exploration_fraction=0.12,
    ),
    "MountainCar-v0": dict(
        total_timesteps=120_000, num_envs=8, buffer_size=120_000, learning_starts=1_000,
        train_frequency=4, n_step=3, double_q=False, target_network_frequency=4, tau=0.03,
        loss="huber", exploration_fraction=0.1, end_e=0.0,
    ),
    "LunarLander-v3": dict(
        total_timesteps=200_000, num_envs=8, hidden_sizes=(256, 256), learning_rate=2e-3,
        buffer_size=50_000, train_frequency=4, n_step=3, exploration_fraction=0.15, end_e=0.01,
    ),
    "CarRacing-v3": dict(env_kwargs={"continuous": False}, frame_stack=4),  # not tuned
    "MinAtar/": dict(  # not tuned
        total_timesteps=1_000_000, num_envs=8, hidden_sizes=(128,), learning_rate=3e-4,
        learning_starts=5_000, batch_size=32, train_frequency=4, n_step=3,
        target_network_frequency=1_000, loss="huber", max_grad_norm=10.0, end_e=0.01,
        eval_frequency=100_000, eval_max_steps=5_000,
    ),
    "ALE/": dict(  # for two cores without a GPU: a small network, few gradient steps
        total_timesteps=2_000_000, num_envs=8, frame_stack=4, clip_rewards=True,
        convolutions=((8, 3, 2), (16, 3, 2), (32, 3, 2)), hidden_sizes=(256,), dueling=True,
        learning_rate=3e-4, learning_starts=5_000, batch_size=32, train_frequency=8, n_step=5,
        double_q=False, target_network_frequency=1_000, loss="huber", max_grad_norm=10.0,
        exploration_fraction=0.05, eval_frequency=100_000, eval_episodes=10,
        checkpoint_frequency=100_000,
    ),
    "ALE/Pong-v5": dict(total_timesteps=1_200_000, learning_rate=1e-3),
}


# ------------------------------------------------------------------------------------ environments

class WithoutInfo(gym.Wrapper):
    """Drop info, which DQN does not read and Gymnasium cannot always batch."""

    def reset(self, **kwargs):
        return self.env.reset(**kwargs)[0], {}

    def step(self, action):
        return *self.env.step(action)[:4], {}


def wrap(env, args, video_folder, main_pid):
    """Wrap one environment: its observations become numbers (*shape), or (frames, *shape)."""
    if os.getpid() != main_pid:  # a process of async_envs leaves Ctrl-C to the main one
        on_stop(signal.SIG_IGN)
    if video_folder:
        env = gym.wrappers.RecordVideo(env, video_folder, episode_trigger=lambda episode: True)
    if "ALE/" in args.env_id:
        env = gym.wrappers.AtariPreprocessing(env)
    if not isinstance(env.observation_space, gym.spaces.Box):
        check_numbers(args, "observation", env.observation_space)
        env = gym.wrappers.FlattenObservation(env)
    if args.frame_stack > 1:
        env = gym.wrappers.FrameStackObservation(env, args.frame_stack, padding_type="zero")
    return gym.wrappers.RecordEpisodeStatistics(WithoutInfo(env))


def make_envs(args, num_envs, async_envs=False, video_folder=""):
    """Make environments that step together: observations (N, *shape), or (N, frames, *shape).

    After an episode has ended, the next step ignores its action and only resets that environment
    (Gymnasium's NEXT_STEP autoreset). With `video_folder`, every episode is recorded there.

    Raises UsageError if there is no such environment, or DQN cannot learn it.
    """
    main_pid = os.getpid()
    is_atari = "ALE/" in args.env_id
    is_cartpole = args.env_id == "CartPole-v1" and args.frame_stack == 1 and num_envs > 4
    has_own_vector = (is_atari or is_cartpole) and not (async_envs or video_folder)
    if has_own_vector:  # built in and faster (CartPole's from five environments on)
        options = dict(vectorization_mode="vector_entry_point")
        if is_atari:  # scales, turns gray, skips and stacks frames, as `wrap` does; whole games
            options |= dict(stack_num=args.frame_stack, reward_clipping=False, use_fire_reset=False)
    else:
        options = dict(
            vectorization_mode="async" if async_envs else "sync",
            wrappers=[lambda env: wrap(env, args, video_folder, main_pid)],
            disable_env_checker=True,
        )
        if is_atari:
            options |= dict(frameskip=1)  # AtariPreprocessing skips frames
        if video_folder:
            options |= dict(render_mode="rgb_array")
    try:
        if is_atari:
            import ale_py  # noqa: F401  (registers the games)
        envs = gym.make_vec(args.env_id, num_envs, **options, **args.env_kwargs)
    except (ImportError, gym.error.Error) as error:
        raise UsageError(f"{flag(args, 'env_id')}: {error}; is it installed?") from error
    except TypeError as error:
        if "keyword argument" not in str(error):
            raise
        raise UsageError(f"{flag(args, 'env_kwargs')}: {error}") from error
    if not isinstance(envs.single_action_space, gym.spaces.Discrete):
        space = envs.single_action_space
        raise UsageError(f"{flag(args, 'env_id')}: DQN needs Discrete actions, not {space}")
    return gym.wrappers.vector.RecordEpisodeStatistics(envs) if has_own_vector else envs


# ----------------------------------------------------------------------------------------- network

# What --convolutions is for images, if not given: channels, kernel, stride of each layer.
MNIH = (32, 8, 4), (64, 4, 2), (64, 3, 1)
YOUNG = ((16, 3, 1),)  # below 36 x 36


class QNetwork(nn.Module):
    """Q(s, ·): a multi-layer perceptron, behind convolutions if observations are images.

    Images are bytes or booleans: (H, W), (C, H, W) or (H, W, C).
    """

    def __init__(self, args, envs):
        super().__init__()
        self.dueling = args.dueling
        space = envs.single_observation_space
        frame_shape = space.shape[1:] if args.frame_stack > 1 else space.shape

        # Height and width are the two neighbours with the smaller ratio: (84, 84, 3), (3, 84, 84).
        ratios = [max(pair) / min(pair) for pair in pairwise(frame_shape)]
        self.channels_last = len(frame_shape) == 3 and ratios[0] <= ratios[1]
        sides = frame_shape[:2] if self.channels_last else frame_shape[-2:]
        is_pixels = space.dtype in (np.uint8, np.bool_)
        self.is_image = is_pixels and len(frame_shape) in (2, 3) and min(sides) >= 3

        # Scale bytes to [0, 1], and entries bounded by less than 0.1 to [-1, 1]: they would be lost
        # beside larger ones (MountainCar's velocity, at most 0.07).
        bound = np.maximum(np.abs(np.float32(space.low)), np.abs(np.float32(space.high)))
        is_scaled = (bound == 255) | ((bound > 0) & (bound < 0.1))
        scale = np.where(is_scaled, 1 / np.maximum(bound, 1e-8), 1.0)
        self.register_buffer("scale", torch.tensor(np.float32(scale)), persistent=False)

        layers = []
        if self.is_image:
            by_size = MNIH if min(sides) >= 36 else YOUNG
            for channels, kernel, stride in args.convolutions or by_size:
                layers += [nn.LazyConv2d(channels, kernel, stride)]
                layers += [nn.GroupNorm(1, channels)] if args.layer_norm else []
                layers += [nn.ReLU()]
            layers += [nn.Flatten()]
        for units in args.hidden_sizes:
            layers += [nn.LazyLinear(units)]
            layers += [nn.LayerNorm(units)] if args.layer_norm else []
            layers += [nn.ReLU()]
        num_actions = int(envs.single_action_space.n)
        layers += [nn.LazyLinear(num_actions + 1 if args.dueling else num_actions)]
        self.layers = nn.Sequential(*layers)
        try:
            self(torch.zeros(1, *space.shape))  # lazy layers take input sizes from a first pass
        except RuntimeError as error:
            raise UsageError(f"{flag(args, 'convolutions')}: {error}; try smaller ones") from error

    def forward(self, observations):
        """Compute the action values (B, actions)."""
        x = observations.float() * self.scale
        if self.is_image:  # (B, channels, height, width), where the frames of a stack are channels
            x = x.movedim(-1, -3) if self.channels_last else x
            x = x.reshape(len(x), -1, *x.shape[-2:])
        else:
            x = x.reshape(len(x), -1)
        x = self.layers(x)
        if self.dueling:
            value, advantages = x[:, :1], x[:, 1:]
            x = value + advantages - advantages.mean(1, keepdim=True)  # Wang, equation 9
        return x


# ----------------------------------------------------------------------------------- replay buffer

class Batch(NamedTuple):
    """B transitions of m steps each: m = n_step, or fewer if the episode ended before."""

    observations: Tensor  # (B, *shape)
    actions: Tensor  # (B,) int64, from 0
    rewards: Tensor  # (B,) r_0 + gamma r_1 + ... + gamma^(m-1) r_(m-1)
    next_observations: Tensor  # (B, *shape) m steps after observations
    discounts: Tensor  # (B,) gamma^m, or 0 if the episode terminated within the m steps


class ReplayBuffer:
    """The stream of time steps as it came: a ring of rows (time) and columns (N environments).

    A row holds an observation of each environment and what came of the step from there: action,
    reward, end. The observation that the step led to is in the next row. For example an episode
    of two steps that terminates (o0 to o2), one that a time limit truncates (p0 to p2), a third:

        row          0    1    2    3    4    5    6    7
        frame        -    o0   o1   o2   p0   p1   p2   q0    the newest of a stack of frames
        action       -    a0   a1   -    b0   b1   -    c0
        is_reset     yes  no   no   yes  no   no   yes  no    the step only reset: never sampled
        terminated   no   no   yes  no   no   no   no   no
        age          -    0    1    2    0    1    2    0     frames of the same episode before it

    Row 0 is made up, so that each episode begins behind a reset. The truncated episode differs in
    `terminated` only: its final observation, p2, is there to bootstrap from, as any other is.
    """

    STATE = "frames", "actions", "rewards", "terminated", "is_reset", "age", "resets_next"

    def __init__(self, args, envs, device):
        """Take the memory. Raises UsageError if there is too little."""
        self.args = args
        self.device = device
        self.num_envs = envs.num_envs  # of this process; args.num_envs counts those of all
        # Rows that `sample` skips are added.
        self.num_rows = args.buffer_size // args.num_envs + args.n_step + args.frame_stack
        ring = self.num_rows, self.num_envs
        space = envs.single_observation_space
        frame_shape = space.shape[1:] if args.frame_stack > 1 else space.shape
        dtypes = {np.uint8: torch.uint8, np.bool_: torch.bool}
        dtype = dtypes.get(space.dtype.type, torch.float32)
        frame_bytes = math.prod(frame_shape) * dtype.itemsize
        check_memory(args, math.prod(ring) * (frame_bytes + 18), device)  # 18: the arrays below

        # Frames are on the device that trains; the rest is NumPy's, which is faster at indexing.
        # The last row of frames stays blank, for stacks at the beginning of an episode.
        shape = self.num_rows + 1, self.num_envs, *frame_shape
        self.frames = torch.zeros(shape, dtype=dtype, device=device)
        self.actions = np.zeros(ring, np.int64)
        self.rewards = np.zeros(ring, np.float32)
        self.terminated = np.zeros(ring, bool)
        self.is_reset = np.zeros(ring, bool)
        self.age = np.zeros(ring, np.int32)
        self.resets_next = np.zeros(self.num_envs, bool)  # the next step of these is only a reset
        self.row = 0  # of the newest observations
        self.size = 0  # rows before it that are filled

    def begin_episodes(self, observations):
        """Store first observations (N, *shape); an episode that was under way is truncated."""
        self.resets_next[:] = True
        nothing = np.zeros(self.num_envs, bool)
        self.add(nothing, nothing, nothing, nothing, observations)

    def add(self, actions, rewards, terminated, truncated, next_observations):
        """Store a step: its outcome, (N,) each, and the next observations (N, *shape)."""
        row = self.row  # its observations, which were acted on, are there already
        next_row = (row + 1) % self.num_rows
        self.actions[row] = actions
        self.rewards[row] = np.clip(rewards, -1, 1) if self.args.clip_rewards else rewards
        self.terminated[row] = terminated
        self.is_reset[row] = self.resets_next
        newest = next_observations[:, -1] if self.args.frame_stack > 1 else next_observations
        self.frames[next_row] = torch.from_numpy(newest)
        self.age[next_row] = np.where(self.resets_next, 0, self.age[row] + 1)
        self.resets_next = terminated | truncated
        self.row = next_row
        self.size = min(self.size + 1, self.num_rows - 1)

    def observations_at(self, rows, columns):
        """Look up observations (B, *shape), or stacks of frames (B, frames, *shape)."""
        if self.args.frame_stack == 1:
            return self.frames[rows, columns]
        back = np.arange(self.args.frame_stack - 1, -1, -1)  # 3, 2, 1, 0
        in_episode = back <= self.age[rows, columns][:, None]  # (B, frames)
        rows = np.where(in_episode, (rows[:, None] - back) % self.num_rows, self.num_rows)
        return self.frames[rows, columns[:, None]]

    def sample(self, batch_size, rng):
        """Draw transitions uniformly, with returns over n steps (Sutton).

        If the episode ends within the n steps, so does the return. If it terminated, nothing is
        added; if it was truncated, the target bootstraps from its final observation (Pardo, 2.2).
        """
        # Skip the newest rows, whose returns are not complete yet, and the oldest, whose stacks are
        # not complete any more. Rows below 0 count from the ring's end.
        newest = self.row - self.args.n_step
        oldest = self.row - self.size + self.args.frame_stack - 1
        rows = rng.integers(oldest, newest, batch_size, endpoint=True)
        columns = rng.integers(self.num_envs, size=batch_size)
        while self.is_reset[rows, columns].any():  # draw those again
            again = self.is_reset[rows, columns]
            rows[again] = rng.integers(oldest, newest, again.sum(), endpoint=True)
            columns[again] = rng.integers(self.num_envs, size=again.sum())
        rows %= self.num_rows

        # Follow each transition to the end of its episode. With n = 4 and an end after two steps,
        # is_reset = F F T F, so same_episode = T T F F (False from the first reset on), m = 2.
        steps = np.arange(self.args.n_step)  # 0, ..., n - 1
        window = (rows[:, None] + steps) % self.num_rows, columns[:, None]  # n steps, (B, n)
        same_episode = ~np.logical_or.accumulate(self.is_reset[window], axis=1)
        m = same_episode.sum(1)  # (B,)
        last_rows = (rows + m - 1) % self.num_rows
        next_rows = (rows + m) % self.num_rows
        rewards = (self.rewards[window] * self.args.gamma**steps * same_episode).sum(1)
        discounts = np.where(self.terminated[last_rows, columns], 0.0, self.args.gamma**m)
        arrays = self.actions[rows, columns], np.float32(rewards), np.float32(discounts)
        actions, rewards, discounts = [torch.from_numpy(a).to(self.device) for a in arrays]
        observations = self.observations_at(rows, columns)
        next_observations = self.observations_at(next_rows, columns)
        return Batch(observations, actions, rewards, next_observations, discounts)

    def state_dict(self):
        """Collect all that changes, as tensors that share the buffer's memory."""
        state = {name: torch.as_tensor(getattr(self, name)) for name in self.STATE}
        return state | {"row": self.row, "size": self.size}

    def load_state_dict(self, state):
        """Restore what `state_dict` collected."""
        for name in self.STATE:
            torch.as_tensor(getattr(self, name)).copy_(state[name])
        self.row = state["row"]
        self.size = state["size"]


# ---------------------------------------------------------------------------------------- learning

def linear_schedule(start, end, duration, step):
    """Go from `start` to `end` in `duration` steps, then stay there."""
    return end if step >= duration else start + (end - start) * step / duration


class Agent:
    """The Q-network, its target network and the optimiser."""

    def __init__(self, args, envs, device):
        self.args = args
        self.num_actions = envs.single_action_space.n
        self.device = device
        self.q_network = QNetwork(args, envs).to(device)
        self.target_network = copy.deepcopy(self.q_network).requires_grad_(False)
        parameters = self.q_network.parameters()
        self.optimizer = torch.optim.Adam(parameters, lr=args.learning_rate, fused=True)
        if args.compile:
            self.q_network.compile(dynamic=False)
            self.target_network.compile(dynamic=False)
        # The same network; with torchrun in a wrapper that averages gradients over the processes.
        self.training_network = self.q_network
        if dist.is_initialized():
            self.training_network = nn.parallel.DistributedDataParallel(
                self.q_network, forward_sync_buffers=False
            )

    @torch.no_grad()
    def act(self, observations, epsilon, rng):
        """Choose epsilon-greedy actions (N,), counted from 0."""
        explores = rng.random(len(observations)) < epsilon
        actions = rng.integers(self.num_actions, size=len(observations))
        if not explores.all():
            q_values = self.q_network(torch.from_numpy(observations).to(self.device))
            actions = np.where(explores, actions, q_values.cpu().numpy().argmax(1))
        return actions

    @torch.no_grad()
    def td_target(self, batch):
        """Compute r + gamma * max_a' Q_target(s', a') (B,).

        With double_q the Q-network picks a' (van Hasselt, equation 4). gamma is in `discounts`,
        which the replay buffer computes: gamma^m for m steps, 0 if nothing follows.
        """
        next_q = self.target_network(batch.next_observations)  # (B, actions)
        picking_q = self.q_network(batch.next_observations) if self.args.double_q else next_q
        next_actions = picking_q.argmax(1)
        next_values = next_q.gather(1, next_actions[:, None]).squeeze(1)
        return batch.rewards + batch.discounts * next_values

    def update(self, batch, learning_rate):
        """Take one gradient step that brings Q(s, a) closer to its target; return what to log."""
        td_target = self.td_target(batch)
        q_values = self.training_network(batch.observations)  # (B, actions)
        q_values = q_values.gather(1, batch.actions[:, None]).squeeze(1)
        loss_function = F.mse_loss if self.args.loss == "mse" else F.huber_loss
        loss = loss_function(q_values, td_target)
        self.optimizer.zero_grad()
        loss.backward()
        if self.args.max_grad_norm < math.inf:
            nn.utils.clip_grad_norm_(self.q_network.parameters(), self.args.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        return {"losses/td_loss": loss.detach(), "losses/q_values": q_values.detach().mean()}

    @torch.no_grad()
    def sync_target(self):
        """Move the target network: θ⁻ ← τθ + (1-τ)θ⁻ (Lillicrap); tau = 1 copies (Mnih)."""
        parameters = zip(self.target_network.parameters(), self.q_network.parameters(), strict=True)
        for target, online in parameters:
            target.lerp_(online, self.args.tau)


# ---------------------------------------------------------------------------------------- training

LOG_FREQUENCY = 1_000  # steps between two entries in the log, or a twentieth of a shorter run
ENVIRONMENTS, ACTIONS_AND_SAMPLES, EVALUATION, PLAY, PROBE = range(5)  # keys for derive_seed


def derive_seed(seed, *key):
    """Make a seed below 2^31; different keys give unrelated random numbers."""
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1)[0] >> 1)


def due(frequency, step, num_envs):
    """Tell if one of the last `num_envs` steps is a multiple of `frequency`; never if that is 0."""
    return frequency > 0 and step % frequency < num_envs


def restart(args, envs, replay, step):
    """Reset all environments and random numbers, with seeds that follow from (seed, step, rank).

    A checkpoint cannot hold the state of an environment, so every run resets them right after it.
    A run that was killed resumes from there, and so it ends as if nothing had happened, equal to
    the last bit with the same settings on the same machine. The price: checkpoint_frequency is part
    of the experiment, and the buffer sees a truncation. (Ctrl-C and stop_return save at a step of
    their own: a run that goes on from there is not equal to one left alone.)
    """
    observations, _ = envs.reset(seed=derive_seed(args.seed, ENVIRONMENTS, step, RANK))
    replay.begin_episodes(observations)
    rng = np.random.default_rng(derive_seed(args.seed, ACTIONS_AND_SAMPLES, step, RANK))
    return observations, rng


def train(args, signals=()):
    """Train, or go on with a run that was stopped; return its folder.

    Once there is something in `signals`, the run finishes its step, saves and ends. Raises
    UsageError for a setting that cannot work, and TrainingError if the run cannot go on.
    """
    validate(args)
    device = start_processes(args)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic

    envs = make_envs(args, args.num_envs // WORLD_SIZE, args.async_envs)
    atexit.register(envs.close)
    agent = Agent(args, envs, device)
    if not agent.q_network.is_image:
        torch.set_num_threads(1)  # for small layers several threads are slower
    replay = ReplayBuffer(args, envs, device)
    if args.capture_video:
        check_video(args)
    run_dir, lock = open_run_dir(args)
    state = {  # all that learning changes
        "q_network": agent.q_network, "target_network": agent.target_network,
        "optimizer": agent.optimizer, "replay": replay,
    }
    global_step, best_return = load_checkpoint(run_dir, state)

    def finished():
        return global_step >= args.total_timesteps or best_return >= args.stop_return

    if finished():
        say(f"{run_dir} is finished; to go on, give a higher --total-timesteps or --stop-return")
        return run_dir
    log = Log(args, run_dir, global_step) if RANK == 0 else None
    observations, rng = restart(args, envs, replay, global_step)
    decay_steps = args.exploration_fraction * args.total_timesteps
    final_rate = 0.0 if args.anneal_lr else args.learning_rate
    metrics = {}  # of the last gradient step
    while True:
        # Act epsilon-greedily in all environments. A step that only resets its environment counts.
        epsilon = linear_schedule(args.start_e, args.end_e, decay_steps, global_step)
        actions = agent.act(observations, epsilon, rng)
        outcome = envs.step(actions + envs.single_action_space.start)
        next_observations, rewards, terminated, truncated, infos = outcome
        global_step += args.num_envs
        check_finite(global_step, observation=next_observations, reward=rewards)
        replay.add(actions, rewards, terminated, truncated, next_observations)
        observations = next_observations

        # Learn once in train_frequency steps, of all environments: look at each step just taken.
        for step in range(global_step - args.num_envs + 1, global_step + 1):
            if step > args.learning_starts and step % args.train_frequency == 0:
                learning_rate = linear_schedule(
                    args.learning_rate, final_rate, args.total_timesteps, step
                )
                batch = replay.sample(args.batch_size // WORLD_SIZE, rng)
                metrics = agent.update(batch, learning_rate)
                check_finite(step, loss=metrics["losses/td_loss"].item())
            if step % args.target_network_frequency == 0:
                agent.sync_target()

        # Log and evaluate, in the first process; the others wait for what it finds.
        if log:
            log.progress(infos, epsilon, global_step)
            if metrics and due(log.frequency, global_step, args.num_envs):
                schedules = {"charts/epsilon": epsilon, "charts/learning_rate": learning_rate}
                log.learning(schedules | metrics, agent, replay, global_step)
        last = global_step >= args.total_timesteps
        if due(args.eval_frequency, global_step, args.num_envs) or last:
            if log:
                best_return = log.evaluation(agent.q_network, best_return, global_step)
            best_return = from_rank_0(best_return)

        # Save, then restart, as a run that is resumed from here does.
        stop = finished() or bool(signals)
        if due(args.checkpoint_frequency, global_step, args.num_envs) or stop:
            if log:
                log.before_checkpoint()
            save_checkpoint(run_dir, state, global_step, best_return)
            if stop:
                break
            observations, rng = restart(args, envs, replay, global_step)
            metrics = {}  # a resumed run has none, and this one logs what that would

    envs.close()
    if log:
        log.finish(agent.q_network, interrupted=not finished())
    lock.release()
    if dist.is_initialized():
        dist.destroy_process_group()
    return run_dir


FLOAT32_MAX = np.finfo(np.float32).max


def check_finite(step, **values):
    """Raise TrainingError for what float32 cannot hold, or is NaN; say who is to blame."""
    for name, value in values.items():
        if not (np.abs(value) <= FLOAT32_MAX).all():
            blamed = "try a lower --learning-rate" if name == "loss" else "fix the environment"
            raise TrainingError(f"step {step:,}: {name} not finite in float32; {blamed}")


# ----------------------------------------------------------------------------------------- logging

FINAL_EPISODES = 100  # of the last network, at the end
VIDEO_EPISODES = 3


class Log:
    """What the user sees of a run: TensorBoard, progress, evaluations and their best network."""

    def __init__(self, args, run_dir, step):
        self.args = args
        self.run_dir = run_dir
        say(f"{run_dir}: {f'goes on at step {step:,}' if step else 'a new run'}")
        if step and load_args(run_dir).total_timesteps != args.total_timesteps:
            say(f"{flag(args, 'total_timesteps')} is new: epsilon and learning rate follow it now")
        save(run_dir / "args.json", asdict(args) | {"resume": None})
        if args.track:
            import wandb

            wandb.init(
                project=args.wandb_project_name, entity=args.wandb_entity, name=run_dir.name,
                id=run_dir.name, resume="allow", config=asdict(args), sync_tensorboard=True,
            )
        # purge_step hides what was logged after the checkpoint that this run goes on from.
        with writing(run_dir):
            self.writer = SummaryWriter(str(run_dir), purge_step=step + 1, flush_secs=10)
            rows = "\n".join(f"|{name}|{value}|" for name, value in vars(args).items())
            self.writer.add_text("hyperparameters", f"|setting|value|\n|-|-|\n{rows}", step)
        atexit.register(self.close_writer)
        self.bar = tqdm(  # on a terminal only
            total=args.total_timesteps, initial=step, unit=" steps", file=sys.stdout, disable=None
        )
        self.eval_envs = make_envs(args, args.eval_episodes)
        self.line_frequency = max(args.total_timesteps // 20, 1)
        self.frequency = min(LOG_FREQUENCY, self.line_frequency)
        self.start_time = time.time()
        self.start_step = step
        self.probe = None  # a batch, kept until the next checkpoint to see how its targets move
        self.probe_targets = None  # what they were at the last entry
        self.returns = deque(maxlen=20)  # of the last training episodes

    def scalars(self, values, step):
        """Log values by tag."""
        with writing(self.run_dir):
            for tag, value in values.items():
                self.writer.add_scalar(tag, value, step)

    def before_checkpoint(self):
        """Write what is pending, and forget the probe, which a resumed run does not have."""
        with writing(self.run_dir):
            self.writer.flush()
        self.probe = None
        self.probe_targets = None

    def progress(self, infos, epsilon, step):
        """Show how far training is, and log the episodes that have just ended."""
        if "episode" in infos:  # log the mean of those that end together
            ended = infos["_episode"]
            mean_return = infos["episode"]["r"][ended].mean()
            mean_length = infos["episode"]["l"][ended].mean()
            values = {"charts/episodic_return": mean_return, "charts/episodic_length": mean_length}
            self.scalars(values, step)
            self.returns.append(mean_return)
        self.bar.update(step - self.bar.n)
        if due(self.line_frequency, step, self.args.num_envs):
            recent = np.mean(self.returns) if self.returns else math.nan
            status = f"return {recent:.1f}, epsilon {epsilon:.2f}"
            self.bar.set_postfix_str(status)
            if self.bar.disable:
                say(f"step {step:,} of {self.args.total_timesteps:,}: {status}")

    def learning(self, values, agent, replay, step):
        """Log the last gradient step, and how far a batch's targets moved since the last entry."""
        if self.probe is None:
            seed = derive_seed(self.args.seed, PROBE)
            self.probe = replay.sample(128, np.random.default_rng(seed))
        td_target = agent.td_target(self.probe)
        if self.probe_targets is not None:
            values["target/drift"] = (td_target - self.probe_targets).abs().mean()
        self.probe_targets = td_target
        values["charts/SPS"] = (step - self.start_step) / (time.time() - self.start_time)
        self.scalars(values, step)

    def evaluation(self, q_network, best_return, step):
        """Play greedy episodes, keep the network if it is the best; return the best mean return."""
        seed = derive_seed(self.args.seed, EVALUATION, step)
        returns = greedy_returns(q_network, self.eval_envs, seed, self.args.eval_max_steps)
        self.scalars({"eval/episodic_return": returns.mean()}, step)
        say(f"step {step:,}: greedy return {describe(returns)}")
        if returns.mean() >= best_return and self.args.save_model:
            save(self.run_dir / "model.pt", q_network.state_dict())
        return max(best_return, float(returns.mean()))

    def close_writer(self):
        """Write what is pending, however the process ends."""
        with contextlib.suppress(OSError):
            self.writer.close()

    def finish(self, q_network, interrupted):
        """Play the last network, unless the run was interrupted; say how to go on."""
        self.bar.close()
        self.eval_envs.close()
        self.close_writer()
        if interrupted:
            say(f"interrupted; to go on: python dqn.py --resume {self.run_dir}")
            return
        say(f"at the end: return {describe(play(q_network, self.args, FINAL_EPISODES))}")
        if self.args.capture_video:
            record(q_network, self.args, f"{self.run_dir}/videos/last")
        say(f"look at it: tensorboard --logdir {self.run_dir.parent}")


def say(text):
    """Print a line at once, above the progress bar; in the first process only."""
    if RANK == 0:
        with writing(Path("standard output")):
            tqdm.write(text)
            sys.stdout.flush()


# -------------------------------------------------------------------------------------- evaluation

@torch.no_grad()
def greedy_returns(q_network, envs, seed, max_steps):
    """Play one greedy episode in each environment (seed, seed + 1, ...); return returns (N,)."""
    device = next(q_network.parameters()).device
    observations, _ = envs.reset(seed=seed)
    returns = np.zeros(envs.num_envs)
    running = np.ones(envs.num_envs, bool)
    for _ in range(max_steps):
        actions = q_network(torch.from_numpy(observations).to(device)).argmax(1).cpu().numpy()
        observations, rewards, terminated, truncated, _ = envs.step(
            actions + envs.single_action_space.start
        )
        returns += rewards * running
        running &= ~(terminated | truncated)
        if not running.any():
            return returns
    say(f"{running.sum()} of {len(running)} episodes were cut by --eval-max-steps {max_steps}")
    return returns


def play(q_network, args, episodes):
    """Play fresh greedy episodes side by side; return their returns (episodes,)."""
    envs = make_envs(args, episodes)
    seed = derive_seed(args.seed, PLAY, 0)
    returns = greedy_returns(q_network, envs, seed, args.eval_max_steps)
    envs.close()
    return returns


def record(q_network, args, folder):
    """Record greedy episodes as mp4."""
    with writing(Path(folder)):
        envs = make_envs(args, 1, video_folder=folder)
        for episode in range(VIDEO_EPISODES):
            seed = derive_seed(args.seed, PLAY, episode)
            greedy_returns(q_network, envs, seed, args.eval_max_steps)
        envs.close()
    say(f"videos: {folder}")


def load(run_dir):
    """Load the best network of a run."""
    args = load_args(run_dir)
    envs = make_envs(args, 1)
    q_network = QNetwork(args, envs)
    q_network.load_state_dict(read(Path(run_dir, "model.pt")))
    envs.close()
    return q_network


def describe(returns):
    """Put returns in words."""
    return f"{returns.mean():.1f} ± {returns.std():.1f} over {len(returns)} episodes"


# ------------------------------------------------------------------------------------------- files

@contextlib.contextmanager
def writing(path):
    """Turn the system's error in a write, such as a full disk, into a TrainingError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error
        while cause.__context__:  # torch.save hides the system's error behind its own
            cause = cause.__context__
        if not isinstance(cause, OSError):
            raise
        raise TrainingError(f"{path} cannot be written: {cause}") from error


def report_thread_error(error):
    """Print a thread's error, but not a failed write of TensorBoard, which raises it again."""
    if not issubclass(error.exc_type, OSError):
        threading.__excepthook__(error)


def save(path, content):
    """Write a file whole or not at all: what was there stays until the new one is complete."""
    partial = path.with_name(f".{path.name}.tmp")
    try:
        with writing(path):
            with partial.open("wb") as file:
                if path.suffix == ".json":
                    file.write(json.dumps(content, indent=2).encode())
                else:
                    torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read(path):
    """Read tensors and numbers that `save` wrote; weights_only: a file cannot run code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise UsageError(f"{path} cannot be read: {error!s:.200}") from error


def save_checkpoint(run_dir, state, step, best_return):
    """Save this process's part; remove the one before when all processes have saved theirs.

    Environments and random numbers are not in it: see `restart`.
    """
    path = run_dir / f"checkpoint-{step}-{RANK}-of-{WORLD_SIZE}.pt"
    parts = {name: part.state_dict() for name, part in state.items()}
    save(path, parts | {"global_step": step, "best_return": best_return})
    if dist.is_initialized():
        dist.barrier()
    for old in run_dir.glob(f"checkpoint-*-{RANK}-of-{WORLD_SIZE}.pt"):
        if old != path:
            old.unlink()


def load_checkpoint(run_dir, state):
    """Restore the newest checkpoint of which all parts are there; return its step, best return."""
    paths = run_dir.glob(f"checkpoint-*-of-{WORLD_SIZE}.pt")
    steps = [int(path.name.split("-")[1]) for path in paths]
    whole = [step for step in steps if steps.count(step) == WORLD_SIZE]
    if not steps and any(run_dir.glob("checkpoint-*.pt")):
        raise UsageError(f"--resume {run_dir}: {WORLD_SIZE} processes are not as many as before")
    if not whole:
        return 0, -math.inf
    saved = read(run_dir / f"checkpoint-{max(whole)}-{RANK}-of-{WORLD_SIZE}.pt")
    saved["optimizer"] = copy.deepcopy(saved["optimizer"])  # or it would keep the file mapped
    for name, part in state.items():
        part.load_state_dict(saved[name])
    return saved["global_step"], saved["best_return"]


def load_args(run_dir):
    """Read the settings of a run."""
    try:
        saved = json.loads(Path(run_dir, "args.json").read_text())
        convolutions = tuple(tuple(layer) for layer in saved["convolutions"])
        hidden_sizes = tuple(saved["hidden_sizes"])
        return Args(**saved | {"convolutions": convolutions, "hidden_sizes": hidden_sizes})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{run_dir} is not the folder of a run of this dqn.py: {error}") from error


def open_run_dir(args):
    """Make or open the run folder, the same for all processes; only one run may write there."""
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time():.3f}-{os.getpid()}"
    name = name.replace("/", "-").replace(":", "-")
    run_dir = Path(from_rank_0(args.resume or f"runs/{name}"))
    with writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(run_dir / f".lock-{RANK}")
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise UsageError(f"--resume {run_dir}: another process trains there; wait for it") from None
    return run_dir, lock


# --------------------------------------------------------------------------------------- processes

def start_processes(args):
    """Join the other processes, if torchrun started several; return the device of this one."""
    if WORLD_SIZE > 1:
        # torchrun's store outlives processes that it starts again: the prefix keeps them apart.
        store, rank, world_size = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        patience = timedelta(hours=2)  # the others wait while rank 0 evaluates
        dist.init_process_group(store=store, rank=rank, world_size=world_size, timeout=patience)
    if args.cuda and torch.cuda.is_available():
        torch.cuda.set_device(LOCAL_RANK)
        return torch.device("cuda", LOCAL_RANK)
    return torch.device("cpu")


def from_rank_0(value):
    """Give all processes the value that the first one has."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def on_stop(handler):
    """Set what is done about Ctrl-C, and about what Slurm or Kubernetes sends."""
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, handler)


def catch_signals():
    """Collect signals, so that training can finish its step; a second one ends the process."""
    caught = []

    def handler(number, frame):
        caught.append(number)
        on_stop(signal.SIG_DFL)

    on_stop(handler)
    return caught


# ------------------------------------------------------------------------------------------ checks

NUMERIC = gym.spaces.Box, gym.spaces.Discrete, gym.spaces.MultiBinary, gym.spaces.MultiDiscrete


def check_numbers(args, name, space):
    """Raise UsageError that names the part of an observation that is not numeric."""
    if isinstance(space, gym.spaces.Dict | gym.spaces.Tuple):
        is_dict = isinstance(space, gym.spaces.Dict)
        for key, part in space.items() if is_dict else enumerate(space):
            check_numbers(args, f"{name}[{key!r}]", part)
    elif not isinstance(space, NUMERIC):
        raise UsageError(f"{flag(args, 'env_id')}: {name} is not numeric, {space}; leave it out")


def check_memory(args, needed, device):
    """Raise UsageError if the replay buffer will not fit."""
    free = psutil.virtual_memory().available / LOCAL_WORLD_SIZE
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    if needed > free:
        problem = f"takes {needed / 2**30:,.1f} GiB of memory, {free / 2**30:,.1f} GiB are free"
        raise UsageError(f"{flag(args, 'buffer_size')}: {problem}; make it smaller")


def check_video(args):
    """Raise UsageError if episodes cannot be recorded: before a run, not after it."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            envs = make_envs(args, 1, video_folder=f"{folder}/videos")
            envs.reset()
            envs.close()
    except Exception as error:
        raise UsageError(f"{flag(args, 'capture_video')}: {error}; leave it out") from error


# ------------------------------------------------------------------------------------ command line

LIMITS = (
    ("at least 1", lambda value: value >= 1, (
        "num_envs", "frame_stack", "batch_size", "train_frequency", "n_step",
        "target_network_frequency", "eval_episodes", "eval_max_steps")),
    ("0 or more", lambda value: value >= 0, (
        "seed", "learning_starts", "eval_frequency", "checkpoint_frequency")),
    ("between 0 and 1", lambda value: 0 <= value <= 1, (
        "gamma", "start_e", "end_e", "exploration_fraction")),
    ("above 0 and at most 1", lambda value: 0 < value <= 1, ("tau",)),
    ("above 0", lambda value: value > 0, ("max_grad_norm",)),
    ("above 0 and finite", lambda value: 0 < value < math.inf, ("learning_rate",)),
    ("all at least 1", lambda values: np.min(values, initial=1) >= 1, (
        "convolutions", "hidden_sizes")),
)

# What may differ when a run goes on; anything else would make it another experiment.
MAY_CHANGE = {
    "resume", "evaluate", "total_timesteps", "stop_return", "eval_frequency", "eval_episodes",
    "eval_max_steps", "save_model", "capture_video", "track", "wandb_project_name",
    "wandb_entity", "cuda", "compile",
}


def flag(args, name):
    """Write a setting as on the command line, "--tau 0.5"."""
    return f"--{name.replace('_', '-')} {getattr(args, name)}"


def validate(args):
    """Raise UsageError for the first setting that cannot work."""
    for words, holds, names in LIMITS:
        for name in names:
            if not holds(getattr(args, name)):
                raise UsageError(f"{flag(args, name)}: must be {words}")
    for low, high in (
        ("end_e", "start_e"), ("batch_size", "buffer_size"), ("learning_starts", "total_timesteps")
    ):
        if getattr(args, low) > getattr(args, high):
            raise UsageError(f"{flag(args, low)}: must not be above {flag(args, high)}")
    for name in "num_envs", "batch_size":
        if getattr(args, name) % WORLD_SIZE:
            raise UsageError(f"{flag(args, name)}: must be a multiple of {WORLD_SIZE} processes")
    if args.track and not importlib.util.find_spec("wandb"):
        raise UsageError(f"{flag(args, 'track')}: needs wandb; pip install wandb")
    may_change = MAY_CHANGE | ({"seed", "env_kwargs"} if args.evaluate else set())
    for name, value in vars(saved_args(args) or args).items():
        if name not in may_change and getattr(args, name) != value:
            raise UsageError(f"{flag(args, name)}: the run has {value} and keeps it")
    least = args.num_envs * (args.n_step + args.frame_stack + 2)  # of these some can be sampled
    for name in "learning_starts", "buffer_size":
        if getattr(args, name) < least:
            raise UsageError(f"{flag(args, name)}: must be at least {least}")


def saved_args(args):
    """Read the settings of the run to go on with, or to evaluate; None if a new one is to begin."""
    run_dir = args.evaluate or args.resume
    is_new = run_dir is None or not any(Path(run_dir).glob("[!.]*"))
    return None if is_new else load_args(run_dir)


def tuned_settings(env_id):
    """Look an environment up in TUNED."""
    name = env_id.split(":")[-1]
    return TUNED.get(name.split("/")[0] + "/", {}) | TUNED.get(name, {})


def parse_args(argv=None):
    """Read the command line: flags win, then the settings of a run or TUNED, then Args."""
    # A first pass finds the flags that decide the defaults of the second.
    given, _ = tyro.cli(Args, args=argv, return_unknown_args=True, add_help=False)
    tuned = tuned_settings(given.env_id) if given.tuned else {}
    defaults = saved_args(given) or Args(**tuned)
    # tyro makes a flag of each key that a dict has by default, so begin with an empty one.
    args = tyro.cli(Args, args=argv, default=replace(defaults, env_kwargs={}))
    args.env_kwargs = defaults.env_kwargs | args.env_kwargs
    return args


def main():
    """Run the command line: exit status 2 for a setting that cannot work, 1 for a failed run."""
    threading.excepthook = report_thread_error
    try:
        args = parse_args()
        if args.evaluate is not None:
            validate(args)
            device = start_processes(args)
            q_network = load(args.evaluate).to(device)
            if args.capture_video:
                check_video(args)
                record(q_network, args, f"{args.evaluate}/videos/best")
            say(f"return {describe(play(q_network, args, args.eval_episodes))}")
        else:
            signals = [] if WORLD_SIZE > 1 else catch_signals()  # torchrun heeds them itself
            train(args, signals)
            if signals:
                sys.exit(128 + signals[0])
    except (UsageError, TrainingError) as error:
        print("dqn.py: error:", *str(error).split(), file=sys.stderr)  # on one line
        sys.exit(2 if isinstance(error, UsageError) else 1)


if __name__ == "__main__":
    main()
