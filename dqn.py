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

(With --double-q, the Q-network picks a'. With --n-step, r is a sum of several rewards.)

In reading order: settings, network, replay buffer, agent, and the loop, `learn`. You can stop there
and know DQN. What follows serves it: `train`, which makes all that the loop needs; environments,
log, evaluation, files, processes, checks; the command line with TUNED, settings by environment.

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
#     "torch==2.13.0", "filelock==4.3.1", "gymnasium[atari,box2d,classic-control,toy-text]==1.4.0",
#     "moviepy==2.2.1", "numpy==2.4.6", "opencv-python-headless==5.0.0.93", "psutil==7.2.2",
#     "tensorboard==2.21.0", "tqdm==4.70.1", "tyro==1.0.17",
# ]
# ///

import ast
import copy
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
from collections import deque
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Literal, NamedTuple

import ale_py  # noqa: F401  (registers the games of Atari)
import filelock
import gymnasium as gym
import numpy as np
import psutil
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import tyro
from gymnasium import spaces, wrappers
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# torchrun starts several processes. Each has its part of the environments, the buffer and every
# batch, and gradients are averaged. Without torchrun, this process is the only one.
IS_LAUNCHED = {"WORLD_SIZE", "RANK", "MASTER_ADDR"} <= os.environ.keys()
WORLD_SIZE = int(os.environ["WORLD_SIZE"]) if IS_LAUNCHED else 1  # how many processes there are
RANK = int(os.environ["RANK"]) if IS_LAUNCHED else 0  # this one; 0 evaluates and logs


# ---------------------------------------------------------------------------------------- settings
@dataclass(kw_only=True)
class Args:
    """All settings, and their defaults.

    On the command line some environments, such as CartPole-v1, have other defaults, tuned for them.
    Textbook DQN is --no-tuned --no-double-q --no-layer-norm --no-anneal-lr.
    A frequency is a number of steps between two events. Steps of all environments are counted.
    """

    # the experiment
    env_id: str = "CartPole-v1"  # Gymnasium id; "module:Id-v0" imports the module first
    env_kwargs: dict[str, str] = field(default_factory=dict)  # e.g. map_name 8x8 is_slippery false
    num_envs: int = 1  # environments stepped side by side
    async_envs: bool = False  # each environment in a process of its own, for slow ones
    frame_stack: int = 1  # newest frames that make up an observation
    clip_rewards: bool = False  # learn from rewards clipped to [-1, 1]; logged ones are not clipped
    total_timesteps: int = 500_000  # length of the run
    seed: int = 1  # of all random numbers
    tuned: bool = True  # begin with settings tuned for the environment; flags that are given win
    # the network
    convolutions: tuple[tuple[int, int, int], ...] = ()  # channels, kernel, stride; or by size
    hidden_sizes: tuple[int, ...] = (120, 84)  # units of the hidden layers; may be empty
    dueling: bool = False  # the last layer gives a state value and advantages
    layer_norm: bool = True  # normalise before each activation
    # learning
    learning_rate: float = 1e-3  # step size of the optimiser
    anneal_lr: bool = True  # the learning rate falls linearly to zero
    buffer_size: int = 100_000  # transitions in the replay buffer
    learning_starts: int = 2_000  # steps before the first gradient step
    batch_size: int = 128  # transitions in a gradient step
    train_frequency: int = 4  # steps between two gradient steps
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
    eval_episodes: int = 20  # episodes of an evaluation, played side by side; 0: no evaluations
    eval_max_steps: int = 10_000  # an episode of an evaluation is cut after so many steps
    eval_epsilon: float = 0.0  # probability of a random action in an evaluation; 0 is greedy
    final_episodes: int = 100  # episodes of the last network at the end; 0: none
    stop_return: float = math.inf  # end the run once an evaluation reaches this mean return
    checkpoint_frequency: int = 50_000  # steps between checkpoints, which cut episodes; 0: at end
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


# ----------------------------------------------------------------------------------------- network
# Convolutions if --convolutions is not given: channels, kernel, stride of each layer.
LARGE_IMAGES = (32, 8, 4), (64, 4, 2), (64, 3, 1)  # Mnih
SMALL_IMAGES = ((16, 3, 1),)  # below 36 x 36: Young & Tian


def frame_shape(args, envs):
    """Tell the shape of a frame: an observation, or one of a stack that makes it up.

    `make_envs` gives images, (..., H, W), of bytes or booleans, and vectors for all else.
    """
    shape = envs.single_observation_space.shape
    return shape[1:] if args.frame_stack > 1 else shape


def input_scale(space, is_small_image):
    """Compute factors that bring bytes to [0, 1], entries bounded by less than 0.1 to [-1, 1]."""
    # Such entries would be lost beside larger ones (MountainCar's velocity, at most 0.07). So would
    # symbols from 0 to 10, declared as bytes (MiniGrid): bytes of a small image come to [0, 16].
    bound = torch.as_tensor(np.maximum(-np.float32(space.low), np.float32(space.high)))
    scale = torch.where((bound > 0) & (bound < 0.1), 1 / bound, 1.0)
    scale[bound == 255] = 1 / 16 if is_small_image else 1 / 255
    return scale


class QNetwork(nn.Module):
    """Q(s, ·): a multi-layer perceptron, behind convolutions if observations are images."""

    def __init__(self, args, envs):
        super().__init__()
        self.dueling = args.dueling
        frame = frame_shape(args, envs)
        self.is_image = len(frame) > 1  # see `wrap`
        self.input_shape = (-1, *frame[-2:]) if self.is_image else (-1,)
        is_small = self.is_image and min(frame[-2:]) < 36
        by_size = SMALL_IMAGES if is_small else LARGE_IMAGES
        self.convolutions = (args.convolutions or by_size) if self.is_image else ()
        layers = []
        for channels, kernel, stride in self.convolutions:
            layers += [nn.LazyConv2d(channels, kernel, stride)]
            layers += [nn.GroupNorm(1, channels)] if args.layer_norm else []
            layers += [nn.ReLU()]
        layers += [nn.Flatten()] if self.is_image else []
        for units in args.hidden_sizes:
            layers += [nn.LazyLinear(units)]
            layers += [nn.LayerNorm(units)] if args.layer_norm else []
            layers += [nn.ReLU()]
        self.num_actions = int(envs.single_action_space.n)
        layers += [nn.LazyLinear(self.num_actions + args.dueling)]  # one more for a state value
        self.layers = nn.Sequential(*layers)
        space = envs.single_observation_space
        self.register_buffer("scale", input_scale(space, is_small), persistent=False)
        self(torch.zeros(1, *space.shape))  # lazy layers take input sizes from a first pass

    def forward(self, observations):
        """Compute the action values (B, actions)."""
        x = observations.float() * self.scale
        x = x.reshape(x.shape[0], *self.input_shape)  # the frames of a stack become channels
        x = self.layers(x)
        if self.dueling:
            value, advantages = x[:, :1], x[:, 1:]
            x = value + advantages - advantages.mean(1, keepdim=True)  # Wang, equation 9
        return x

    @torch.no_grad()
    def act(self, observations, epsilon, rng):
        """Choose epsilon-greedy actions (N,), counted from 0."""
        explores = rng.random(len(observations)) < epsilon
        actions = rng.integers(self.num_actions, size=len(observations))
        if not explores.all():
            q_values = self(torch.from_numpy(observations).to(self.scale.device))
            actions = np.where(explores, actions, q_values.cpu().numpy().argmax(1))
        return actions


# ----------------------------------------------------------------------------------- replay buffer
class Batch(NamedTuple):
    """B transitions of m steps each: m = n_step, or fewer if the episode ended before."""

    observations: Tensor  # (B, *shape)
    actions: Tensor  # (B,) int64, from 0
    rewards: Tensor  # (B,) r_0 + gamma r_1 + ... + gamma^(m-1) r_(m-1)
    next_observations: Tensor  # (B, *shape) m steps after observations
    discounts: Tensor  # (B,) gamma^m, or 0 if the episode terminated within the m steps


def before_end(is_last):
    """Tell which places (B, n) come before the first end of an episode: F F T F gives T T F F."""
    return ~np.logical_or.accumulate(is_last, axis=1)


class ReplayBuffer:
    """The stream of time steps as it came: a ring of rows (time) and columns (N environments).

    A row holds an observation of each environment, and action and reward of the step from there.
    The observation that the step led to is in the next row. For example an episode of two steps
    that terminates (o0 to o2), one that a time limit truncates (p0 to p2), and a third:

        row          0    1    2    3    4    5    6    7
        frame        -    o0   o1   o2   p0   p1   p2   q0    observation, or newest of a stack
        action       -    a0   a1   -    b0   b1   -    ?     taken in it; not yet in the newest row
        reward       -    r0   r1   -    s0   s1   -    ?     of this action
        is_last      yes  no   no   yes  no   no   yes  no    the observation ended its episode
        is_terminal  no   no   no   yes  no   no   no   no    nothing follows it: its value is 0

    The step from a last row ignores its action and resets the environment (Gymnasium's NEXT_STEP
    autoreset): no transition begins there. Row 0 is a dummy, so that a last row comes before each
    episode, where stacks of frames stop.
    """

    ARRAYS = "frames", "actions", "rewards", "is_last", "is_terminal"

    def __init__(self, args, envs, device):
        """Allocate. Raises UsageError if there is too little memory."""
        self.args = args
        self.device = device
        self.num_envs = envs.num_envs  # of this process; args.num_envs counts those of all
        # Extra rows: the newest n cannot be drawn yet, the oldest lack their stack.
        self.num_rows = args.buffer_size // args.num_envs + args.n_step + args.frame_stack
        ring = self.num_rows, self.num_envs
        frame = frame_shape(args, envs)
        dtype = torch.as_tensor(envs.single_observation_space.low).dtype
        dtype = dtype if dtype.itemsize == 1 else torch.float32  # bytes and booleans stay such
        frame_bytes = math.prod(frame) * dtype.itemsize
        check_memory(args, math.prod(ring) * (frame_bytes + 14), device)  # 8 + 4 + 1 + 1: below
        # Frames are on the device that trains; the rest is NumPy's, which is faster at indexing.
        # The last row of frames stays blank, for stacks at the beginning of an episode.
        shape = self.num_rows + 1, self.num_envs, *frame
        self.frames = torch.zeros(shape, dtype=dtype, device=device)
        self.actions = np.zeros(ring, np.int64)
        self.rewards = np.zeros(ring, np.float32)
        self.is_last = np.zeros(ring, bool)
        self.is_terminal = np.zeros(ring, bool)
        self.row = 0  # of the newest observations
        self.size = 0  # rows before it that are filled

    def begin_episodes(self, observations):
        """Store first observations (N, *shape); episodes that were under way end as truncated."""
        self.is_last[self.row] = True
        self.begin_row(observations, False, False)

    def add(self, actions, rewards, terminated, truncated, next_observations):
        """Store a step: actions (N,), what came of them, and the observations (N, *shape) after."""
        # `row` is that of the observations that were acted on; what they led to begins the next.
        self.actions[self.row] = actions
        self.rewards[self.row] = np.clip(rewards, -1, 1) if self.args.clip_rewards else rewards
        self.begin_row(next_observations, terminated | truncated, terminated)

    def begin_row(self, observations, is_last, is_terminal):
        """Begin a row with observations (N, *shape), and say which of them end their episodes."""
        self.row = (self.row + 1) % self.num_rows
        self.size = min(self.size + 1, self.num_rows - 1)
        newest = observations[:, -1] if self.args.frame_stack > 1 else observations
        self.frames[self.row] = torch.from_numpy(newest)
        self.is_last[self.row] = is_last
        self.is_terminal[self.row] = is_terminal

    def sample(self, batch_size, rng):
        """Draw transitions uniformly, with returns over n steps (Sutton).

        For n = 1 without stacks: s = frames[row], s' = frames[row + 1], and the discount is gamma,
        or 0 if is_terminal[row + 1].
        """
        rows, columns = self.draw(batch_size, rng)
        again = self.is_last[rows, columns]  # no transition begins there: draw those once more
        while again.any():
            rows[again], columns[again] = self.draw(again.sum(), rng)
            again = self.is_last[rows, columns]
        rewards, next_rows, discounts = self.n_step_returns(rows, columns)
        return Batch(
            self.observations_at(rows, columns),
            torch.from_numpy(self.actions[rows, columns]).to(self.device),
            torch.from_numpy(np.float32(rewards)).to(self.device),
            self.observations_at(next_rows, columns),
            torch.from_numpy(np.float32(discounts)).to(self.device),
        )

    def draw(self, count, rng):
        """Draw rows and columns: with a whole stack before them, and n whole steps after."""
        oldest = self.row - self.size + self.args.frame_stack - 1  # below 0: from the ring's end
        newest = self.row - self.args.n_step  # 5 in the drawing, if n is 2
        rows = rng.integers(oldest, newest, count, endpoint=True) % self.num_rows
        return rows, rng.integers(self.num_envs, size=count)

    def n_step_returns(self, rows, columns):
        """Follow n steps, or to the end of the episode; return rewards, next rows, discounts (B,).

        The target bootstraps from the next row, also where the episode was truncated (Pardo, 2.2).
        Where it terminated, the discount is 0.
        """
        steps = np.arange(self.args.n_step)  # 0, ..., n - 1
        window = (rows[:, None] + steps) % self.num_rows, columns[:, None]  # (B, n)
        in_episode = before_end(self.is_last[window])  # with n = 3: F F T gives T T F, so m = 2
        rewards = (self.rewards[window] * self.args.gamma**steps * in_episode).sum(1)
        m = in_episode.sum(1)
        next_rows = (rows + m) % self.num_rows
        discounts = np.where(self.is_terminal[next_rows, columns], 0.0, self.args.gamma**m)
        return rewards, next_rows, discounts

    def observations_at(self, rows, columns):
        """Look up observations: frames (B, *frame), or stacks of them (B, frames, *frame)."""
        if self.args.frame_stack == 1:
            return self.frames[rows, columns]
        # For example a stack of 4 in row 5 of the drawing: blank, blank, p0, p1.
        back = np.arange(self.args.frame_stack)  # 0, 1, 2, 3
        stack = (rows[:, None] - back) % self.num_rows  # (B, frames), the newest first
        in_episode = before_end(self.is_last[stack[:, 1:], columns[:, None]])  # back in time
        stack[:, 1:] = np.where(in_episode, stack[:, 1:], self.num_rows)  # the blank row
        stack = stack[:, ::-1].copy()  # the oldest first; torch cannot index with a reversed view
        return self.frames[stack, columns[:, None]]

    def state_dict(self):
        """Collect all that changes, as tensors that share the buffer's memory."""
        state = {name: torch.as_tensor(getattr(self, name)) for name in self.ARRAYS}
        return state | {"row": self.row, "size": self.size}

    def load_state_dict(self, state):
        """Restore what `state_dict` collected."""
        for name in self.ARRAYS:
            torch.as_tensor(getattr(self, name)).copy_(state[name])
        self.row = state["row"]
        self.size = state["size"]


# ---------------------------------------------------------------------------------------- learning
def linear_schedule(start, end, duration, step):
    """Go from `start` to `end` in `duration` steps, then stay there."""
    return end if step >= duration else start + (end - start) * step / duration


def epsilon_at(args, step):
    """Compute the probability of a random action."""
    decay_steps = args.exploration_fraction * args.total_timesteps
    return linear_schedule(args.start_e, args.end_e, decay_steps, step)


def learning_rate_at(args, step):
    """Compute the step size of the optimiser."""
    final_rate = 0.0 if args.anneal_lr else args.learning_rate
    return linear_schedule(args.learning_rate, final_rate, args.total_timesteps, step)


class Agent:
    """The Q-network, its target network and the optimiser."""

    def __init__(self, args, envs, device):
        self.args = args
        self.q_network = QNetwork(args, envs).to(device).eval()  # `update` trains it
        self.target_network = copy.deepcopy(self.q_network).requires_grad_(False)
        parameters = self.q_network.parameters()
        self.optimizer = torch.optim.Adam(parameters, lr=args.learning_rate, fused=True)
        if args.compile:
            self.q_network.compile(dynamic=False)
            self.target_network.compile(dynamic=False)
        self.training_network = self.q_network
        if dist.is_initialized():  # the same network, which averages gradients over the processes
            self.training_network = nn.parallel.DistributedDataParallel(
                self.q_network, forward_sync_buffers=False
            )

    @torch.no_grad()
    def td_target(self, batch):
        """Compute r + gamma * max_a' Q_target(s', a') (B,).

        With double_q the Q-network picks a' (van Hasselt, equation 4). gamma is in `discounts`,
        which the replay buffer computes: gamma^m for m steps, 0 if nothing follows.
        """
        next_q = self.target_network(batch.next_observations)  # (B, actions)
        if self.args.double_q:
            next_actions = self.q_network(batch.next_observations).argmax(1)
            next_values = next_q.gather(1, next_actions[:, None]).squeeze(1)
        else:
            next_values = next_q.max(1).values
        return batch.rewards + batch.discounts * next_values

    def update(self, batch, learning_rate):
        """Take one gradient step that brings Q(s, a) closer to its target; return what to log."""
        td_target = self.td_target(batch)
        self.training_network.train()  # for layers such as dropout
        q_values = self.training_network(batch.observations)  # (B, actions)
        q_values = q_values.gather(1, batch.actions[:, None]).squeeze(1)
        loss_function = F.mse_loss if self.args.loss == "mse" else F.huber_loss
        loss = loss_function(q_values, td_target)
        self.training_network.eval()
        self.optimizer.zero_grad()
        loss.backward()
        if self.args.max_grad_norm < math.inf:
            nn.utils.clip_grad_norm_(self.q_network.parameters(), self.args.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        metrics = {"losses/td_loss": loss.detach(), "losses/q_values": q_values.detach().mean()}
        return metrics | {"charts/learning_rate": learning_rate}

    @torch.no_grad()
    def sync_target(self):
        """Move the target network: θ⁻ ← τθ + (1-τ)θ⁻ (Lillicrap); tau = 1 copies (Mnih)."""
        parameters = zip(self.target_network.parameters(), self.q_network.parameters(), strict=True)
        for target, online in parameters:
            target.lerp_(online, self.args.tau)


# --------------------------------------------------------------------------------------- the loop
ENVIRONMENTS, ACTIONS_AND_SAMPLES, EVALUATION, PLAY = range(4)  # keys for derive_seed


def derive_seed(seed, *key):
    """Make a seed below 2^31; different keys give unrelated random numbers."""
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1)[0] >> 1)


def due(frequency, steps):
    """Tell if one of the steps is a multiple of `frequency`; never if that is 0."""
    return frequency > 0 and any(step % frequency == 0 for step in steps)


@dataclass
class Progress:
    """How far a run is; the same in all processes."""

    global_step: int = 0  # steps that all environments took
    best_return: float = -math.inf  # mean of the best evaluation

    def finished(self, args):
        return self.global_step >= args.total_timesteps or self.best_return >= args.stop_return


def restart(args, envs, replay, step):
    """Reset all environments and random numbers, with seeds that follow from (seed, step, rank).

    Environments cannot be saved. So a run restarts them after each checkpoint, interrupted or not:
    one that was killed repeats what came after its last checkpoint, and ends equal to the last bit
    with the same settings on the same machine. The price is a truncation at each checkpoint:
    --checkpoint-frequency is part of the experiment. (Ctrl-C and --stop-return save at a step of
    their own: a run that goes on from there is not equal to one left alone.)
    """
    observations, _ = envs.reset(seed=derive_seed(args.seed, ENVIRONMENTS, step, RANK))
    replay.begin_episodes(observations)
    seed = derive_seed(args.seed, ACTIONS_AND_SAMPLES, step, RANK)
    torch.manual_seed(seed)  # for networks that draw, such as with dropout
    return observations, np.random.default_rng(seed)


def learn(args, envs, eval_envs, agent, replay, log, progress, signals):
    """Train from a restart to the next checkpoint.

    `train`, below, calls this and `save_checkpoint` in turn, until the run is finished.
    """
    observations, rng = restart(args, envs, replay, progress.global_step)
    metrics = {}  # of the last gradient step since the restart
    save_due = False
    while not (save_due or progress.finished(args)):
        # Act epsilon-greedily in all environments. The last observation of an episode comes as any
        # other; the step after it only resets. That step counts, but no transition begins there.
        epsilon = epsilon_at(args, progress.global_step)
        actions = agent.q_network.act(observations, epsilon, rng)
        next_observations, rewards, terminated, truncated, infos = envs.step(actions)
        progress.global_step += args.num_envs  # of all processes
        steps = range(progress.global_step - args.num_envs + 1, progress.global_step + 1)
        check_rewards(rewards, progress.global_step)
        replay.add(actions, rewards, terminated, truncated, next_observations)
        observations = next_observations

        # Look at each of the steps just taken: is it time to learn, or to move the target?
        for step in steps:
            if step > args.learning_starts and step % args.train_frequency == 0:
                batch = replay.sample(args.batch_size // WORLD_SIZE, rng)
                metrics = agent.update(batch, learning_rate_at(args, step))
            if step % args.target_network_frequency == 0:  # before learning starts, too
                agent.sync_target()

        # Now and then log, evaluate, and leave the loop to save. The loss must be finite then.
        log_due = due(LOG_FREQUENCY, steps)
        eval_due = due(args.eval_frequency, steps) or steps[-1] >= args.total_timesteps
        save_due = due(args.checkpoint_frequency, steps) or bool(signals)
        if log_due or eval_due or save_due:
            check_loss(metrics, replay, progress.global_step)
        if RANK == 0:  # the others have no log and no eval_envs
            log.record(infos, epsilon, metrics if log_due else {}, steps)
        if eval_due:  # the others wait for what it finds
            progress.best_return = evaluate(args, agent, eval_envs, log, progress, signals)


# ------------------------------------------------------------------------------------ a whole run
def train(args):
    """Train, or go on with a run that was stopped; return its folder.

    At a signal such as Ctrl-C, it finishes its step, saves, and raises KeyboardInterrupt.
    Raises UsageError for a setting that cannot work, and TrainingError if learning went wrong.
    """
    validate(args)
    with ExitStack() as at_the_end:  # give back what is taken, however the run ends
        device = start_processes(args, at_the_end)
        signals = catch_signals(at_the_end)
        envs = make_envs(args, args.num_envs // WORLD_SIZE, args.async_envs)
        at_the_end.callback(close_envs, envs)
        agent = make_agent(args, envs, device)
        replay = ReplayBuffer(args, envs, device)
        if args.capture_video:
            check_video(args)
        # Open its folder, and go on where an earlier process ended.
        run_dir = open_run_dir(args, at_the_end)
        parts = dict(q_network=agent.q_network, target_network=agent.target_network,
                     optimizer=agent.optimizer, replay=replay)  # of a checkpoint
        progress = load_checkpoint(run_dir, parts)
        done = run_dir / "result.json"  # written last
        if progress.finished(args) and done.exists():
            say(f"{run_dir}: complete; to go on, raise {json.loads(done.read_text())['ended_by']}")
            return run_dir
        step = progress.global_step
        say(f"{run_dir}: {f'goes on at step {step:,}' if step else 'a new run'}")
        log = eval_envs = None
        if RANK == 0:
            done.unlink(missing_ok=True)
            save(run_dir / "args.json", asdict(args) | {"resume": None})
            log = Log(args, run_dir, step, at_the_end)
            if args.eval_episodes:
                eval_envs = make_envs(args, args.eval_episodes)
                at_the_end.callback(close_envs, eval_envs)
        while not (progress.finished(args) or signals):
            learn(args, envs, eval_envs, agent, replay, log, progress, signals)
            if RANK == 0:
                log.writer.flush()
                if not (log.returns or signals or progress.finished(args)):
                    say_once("no episode ended: checkpoints cut them; raise --checkpoint-frequency")
            save_checkpoint(run_dir, parts, progress)
        close_envs(envs)  # with --eval-episodes 0, one simulator at a time is enough
        if RANK == 0 and not signals:
            finish(args, agent.q_network, log, progress, signals)
    if dist.is_initialized():
        dist.destroy_process_group()
    if signals and not done.exists():
        say(f"interrupted; to go on: python dqn.py --resume {run_dir}")
        raise KeyboardInterrupt(signals[0])
    return run_dir


def make_agent(args, envs, device):
    """Make the agent, and have torch use one thread if its layers are small."""
    with blame(flag(args, "convolutions"), RuntimeError, "Kernel size", "; try smaller ones"):
        agent = Agent(args, envs, device)
    if not agent.q_network.is_image:
        torch.set_num_threads(1)  # several are slower then
    say(f"network: convolutions {agent.q_network.convolutions}, hidden layers {args.hidden_sizes}")
    return agent


def finish(args, q_network, log, progress, signals):
    """Let the last network play, then write result.json; a run that lacks it comes here again."""
    if args.save_model and progress.best_return == -math.inf:  # no evaluation chose one
        save(log.run_dir / "model.pt", q_network.state_dict())
    if args.final_episodes:
        say(f"the last network plays {args.final_episodes} episodes")
        returns = play(q_network, args, args.final_episodes, signals=signals)
    if args.capture_video and not signals:
        play(q_network, args, 3, f"{log.run_dir}/videos/last", signals)
    if signals:
        return
    limit = "stop_return" if progress.best_return >= args.stop_return else "total_timesteps"
    result = asdict(progress) | dict(ended_by=flag(args, limit), gymnasium=gym.__version__,
                                     seconds=time.time() - log.start_time, torch=torch.__version__)
    if args.final_episodes:
        result |= dict(episodes=len(returns), mean=returns.mean(), std=returns.std())
        log.scalars({"eval/final_return": returns.mean()}, progress.global_step)
        say(f"at the end: return {describe(returns)}")
    strict = json.loads(json.dumps(result), parse_constant=lambda name: None)  # no NaN, Infinity
    save(log.run_dir / "result.json", strict)
    say(f"look at it: tensorboard --logdir {log.run_dir.parent}")


# ------------------------------------------------------------------------------------ environments
class Tame(gym.Wrapper):
    """Seed what an environment may draw from; drop info, which not always can be batched."""

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            for source in random, np.random, self.action_space, self.observation_space:
                source.seed(seed)
        return self.env.reset(seed=seed)[0], {}

    def step(self, action):
        return *self.env.step(action)[:4], {}

    def render(self):
        return np.copy(self.env.render())  # a video keeps it, and it may be changed in place


def wrap(env, args, is_atari, video_folder, main_pid):
    """Bring an environment into the core's form: actions from 0; images, or vectors of numbers."""
    if os.getpid() != main_pid:  # a process of async_envs leaves signals to the main one
        on_stop(signal.SIG_IGN)
    env = Tame(env)
    if video_folder:
        env = wrappers.RecordVideo(env, video_folder, episode_trigger=lambda episode: True)
    if is_atari:
        env = wrappers.AtariPreprocessing(env)  # skips frames itself, and takes grey ones
    actions, space = env.action_space, env.observation_space
    if isinstance(actions, spaces.Discrete) and actions.start != 0:
        from_0 = spaces.Discrete(actions.n)
        env = wrappers.TransformAction(env, lambda action: action + actions.start, from_0)
    if not is_image(space):
        check_numbers(args, "observation", space)
        env = wrappers.FlattenObservation(env)
    elif is_channels_last(space.shape):
        to_front = partial(np.moveaxis, source=-1, destination=-3)
        first = spaces.Box(to_front(space.low), to_front(space.high), dtype=space.dtype)
        env = wrappers.TransformObservation(env, to_front, first)
    if args.frame_stack > 1:
        # An environment may change its observation in place: copy what the stack keeps.
        env = wrappers.TransformObservation(env, np.copy, env.observation_space)
        env = wrappers.FrameStackObservation(env, args.frame_stack, padding_type="zero")
    return wrappers.RecordEpisodeStatistics(env)


def is_image(space):
    """Tell if observations are images of bytes or booleans, or stacks of them: (4, 84, 84, 3)."""
    if space.dtype not in (np.uint8, np.bool_) or not 1 < len(space.shape) < 5:
        return False
    sides = space.shape[-3:-1] if is_channels_last(space.shape) else space.shape[-2:]
    return min(sides) > max(space.shape[:-3], default=2)  # more than the frames of a stack


def is_channels_last(shape):
    """Tell (H, W, C) from (C, H, W): of neighbours, H and W are those with a ratio nearer to 1."""
    first, last = shape[-3:-1], shape[-2:]
    return len(shape) > 2 and max(first) / min(first) <= max(last) / min(last)


def make_envs(args, num_envs, async_envs=False, video_folder=""):
    """Make environments that step together: observations (N, *frame) or (N, frames, *frame).

    After an episode has ended, the next step ignores its action and only resets that environment
    (Gymnasium's NEXT_STEP autoreset). With `video_folder`, every episode is recorded there.
    Raises UsageError if there is no such environment, or DQN cannot learn it.
    """
    env_id = args.env_id.split(":")[-1]
    is_atari = env_id.startswith("ALE/")
    is_cartpole = env_id == "CartPole-v1" and args.frame_stack == 1 and num_envs > 4
    # These two have code for many environments at once, which is faster (CartPole's from five on)
    # and resets in the next step, too. Atari's does what `wrap` does, but for the modes of a game.
    needs_wrap = async_envs or video_folder or {"mode", "difficulty"} & args.env_kwargs.keys()
    has_own_vector = (is_atari or is_cartpole) and not needs_wrap
    options = dict(id=args.env_id, num_envs=num_envs)
    if not has_own_vector:
        main_pid = os.getpid()
        options |= dict(vectorization_mode="async" if async_envs else "sync",
                        disable_env_checker=True,
                        wrappers=[lambda env: wrap(env, args, is_atari, video_folder, main_pid)])
        options |= dict(render_mode="rgb_array") if video_folder else {}
        options |= dict(frameskip=1, obs_type="grayscale") if is_atari else {}
    elif is_atari:  # whole games, raw rewards
        options |= dict(stack_num=args.frame_stack, reward_clipping=False, use_fire_reset=False)
    cause = flag(args, "env_id")
    with blame(cause, (ImportError, gym.error.Error)):
        with blame(cause, gym.error.NameNotFound, "", "; a package's own is module:Id-v0"):
            with blame(flag(args, "env_kwargs"), TypeError, "keyword argument"):
                envs = gym.make_vec(**options, **args.env_kwargs)
    if envs.spec.id != env_id:  # Gymnasium takes the newest version then
        raise UsageError(f"{cause}: give its version, {envs.spec.id}")
    if envs.spec.entry_point == "ale_py.env:AtariEnv" and not is_atari:
        raise UsageError(f"{cause}: gives raw frames; use an id such as ALE/Pong-v5")
    actions = envs.single_action_space
    if not isinstance(actions, spaces.Discrete):
        raise UsageError(f"{cause}: DQN needs Discrete actions, not {actions}")
    return wrappers.vector.RecordEpisodeStatistics(envs) if has_own_vector else envs


def close_envs(envs):
    """Close environments. Raises TrainingError if a process of --async-envs has died."""
    processes = getattr(envs.unwrapped, "processes", [])
    for process in processes:
        process.join(0.1)  # what has just died may not be dead yet
    if any(process.exitcode for process in processes) and not envs.unwrapped.closed:
        for process in processes:
            process.kill()  # the others heed nothing else, see `wrap`; close() would wait for all
        envs.unwrapped.closed = True
        raise TrainingError("a process of --async-envs died; --resume goes on from the checkpoint")
    envs.close()


# --------------------------------------------------------------------------------------------- log
LOG_FREQUENCY = 500  # steps between two entries of losses


class Log:
    """What the user sees of a run: TensorBoard, and a progress bar or lines."""

    def __init__(self, args, run_dir, step, at_the_end):
        self.run_dir = run_dir
        self.returns = deque(maxlen=20)  # of the last training episodes
        self.start_time = time.time()
        self.start_step = step
        if args.track:
            import wandb
            wandb.init(project=args.wandb_project_name, entity=args.wandb_entity, name=run_dir.name,
                       id=run_dir.name, resume="allow", config=asdict(args), sync_tensorboard=True)
            at_the_end.callback(wandb.finish)
        # purge_step hides what was logged after the checkpoint that this run goes on from.
        self.writer = SummaryWriter(str(run_dir), purge_step=step + 1, flush_secs=10)
        self.bar = tqdm(total=args.total_timesteps, initial=step, unit=" steps", file=sys.stdout,
                        disable=None)  # on a terminal only
        at_the_end.callback(self.writer.close)
        at_the_end.callback(self.bar.close)

    def record(self, infos, epsilon, metrics, steps):
        """Log the episodes that have just ended, and the metrics of a gradient step if given."""
        if "episode" in infos:  # log the mean of those that end together
            ended = infos["_episode"]
            mean_return = infos["episode"]["r"][ended].mean()
            mean_length = infos["episode"]["l"][ended].mean()
            values = {"charts/episodic_return": mean_return, "charts/episodic_length": mean_length}
            self.scalars(values, steps[-1])
            self.returns.append(mean_return)
        if metrics:
            speed = (steps[-1] - self.start_step) / (time.time() - self.start_time)
            self.scalars(metrics | {"charts/epsilon": epsilon, "charts/SPS": speed}, steps[-1])
        self.bar.update(len(steps))
        if due(self.bar.total // 20 or 1, steps):
            recent = f"return {np.mean(self.returns):.1f}" if self.returns else "no episode yet"
            status = f"{recent}, epsilon {epsilon:.2f}"
            self.bar.set_postfix_str(status)
            if self.bar.disable:
                say(f"step {steps[-1]:,} of {self.bar.total:,}: {status}")

    def scalars(self, values, step):
        """Log values by tag."""
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)


def say(text):
    """Print a line at once, above the progress bar; in the first process only."""
    if RANK == 0:
        try:
            tqdm.write(text)
            sys.stdout.flush()
        except OSError:  # a closed terminal or pipe is no reason to end a run: fall silent
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


@cache
def say_once(text):
    """Print a line the first time only."""
    say(text)


# -------------------------------------------------------------------------------------- evaluation
def evaluate(args, agent, envs, log, progress, signals):
    """Play greedy episodes, keep the network if none was better; return the best mean return."""
    best_return = progress.best_return
    if envs is not None:  # the other processes wait for what the first one finds
        seed = derive_seed(args.seed, EVALUATION, progress.global_step)
        before = random.getstate(), np.random.get_state()
        returns = greedy_returns(agent.q_network, envs, seed, args, signals)
        random.setstate(before[0])  # training goes on as if there had been no evaluation
        np.random.set_state(before[1])
        if signals:  # they were cut: drop them
            return best_return
        log.scalars({"eval/episodic_return": returns.mean()}, progress.global_step)
        say(f"step {progress.global_step:,}: greedy return {describe(returns)}")
        if args.save_model and returns.mean() >= best_return:
            save(log.run_dir / "model.pt", agent.q_network.state_dict())
        best_return = max(best_return, float(returns.mean()))
    return from_rank_0(best_return)


def greedy_returns(q_network, envs, seed, args, signals=()):
    """Play an episode, greedy but for eval_epsilon, in each environment; return returns (N,)."""
    rng = np.random.default_rng(seed)
    observations, _ = envs.reset(seed=seed)
    returns = np.zeros(envs.num_envs)
    running = np.ones(envs.num_envs, bool)
    for _ in range(args.eval_max_steps):
        actions = q_network.act(observations, args.eval_epsilon, rng)
        observations, rewards, terminated, truncated, _ = envs.step(actions)
        returns += rewards * running
        running &= ~(terminated | truncated)
        if signals or not running.any():  # a signal cuts episodes
            return returns
    say(f"{running.sum()} of {len(running)} episodes were cut by {flag(args, 'eval_max_steps')}; "
        "one that goes round in circles may end with --eval-epsilon 0.01")
    return returns


def play(q_network, args, episodes, video_folder="", signals=()):
    """Play fresh greedy episodes in rounds, or on video; return their returns (episodes,)."""
    num_envs = args.num_envs if args.async_envs else args.eval_episodes or args.num_envs
    num_envs = 1 if video_folder else min(num_envs, episodes)
    first_seed = derive_seed(args.seed, PLAY, 0)
    seeds = range(first_seed, first_seed + episodes, num_envs)
    envs = make_envs(args, num_envs, args.async_envs, video_folder)
    try:
        returns = [greedy_returns(q_network, envs, seed, args, signals)
                   for seed in seeds if not signals]
    finally:
        close_envs(envs)
    if video_folder:
        say(f"videos: {video_folder}")
    return np.ravel(returns)[:episodes]


def show(args):
    """Let the best network of a run play."""
    validate(args)
    with ExitStack() as at_the_end:
        device = start_processes(args, at_the_end)
        if RANK == 0:
            q_network = load(args.evaluate).to(device)
            if args.capture_video:
                play(q_network, args, 3, f"{args.evaluate}/videos/best")
            say(f"return {describe(play(q_network, args, args.eval_episodes or 1))}")


def load(run_dir):
    """Load the best network of a run."""
    args = load_args(run_dir)
    envs = make_envs(args, 1)
    q_network = QNetwork(args, envs).eval()
    envs.close()
    q_network.load_state_dict(read_tensors(Path(run_dir, "model.pt")))
    return q_network


def describe(returns):
    """Put returns in words."""
    return f"{returns.mean():.1f} ± {returns.std():.1f} over {len(returns)} episodes"


# ------------------------------------------------------------------------------------------- files
def save(path, content):
    """Write a file whole or not at all: what was there stays until the new one is complete."""
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        with unfinished.open("wb") as file:
            if path.suffix == ".json":
                file.write(json.dumps(content, indent=2).encode())
            else:
                torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_tensors(path):
    """Read tensors and numbers that `save` wrote; weights_only: a file cannot run code."""
    with blame(f"{path} cannot be read", Exception):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def save_checkpoint(run_dir, parts, progress):
    """Save this process's part; remove the one before once all processes have saved theirs."""
    path = run_dir / f"checkpoint-{progress.global_step}-{RANK}-of-{WORLD_SIZE}.pt"
    save(path, asdict(progress) | {name: part.state_dict() for name, part in parts.items()})
    if dist.is_initialized():
        dist.barrier()
    name = f"checkpoint-*-{RANK}-of-{WORLD_SIZE}.pt"
    for old in *run_dir.glob(name), *run_dir.glob(f".{name}.tmp"):  # half-written ones, too
        if old != path:
            old.unlink()


def load_checkpoint(run_dir, parts):
    """Restore the newest checkpoint that all processes have saved; return the progress it had."""
    names = [path.stem.split("-") for path in run_dir.glob("checkpoint-*.pt")]
    steps = [int(name[1]) for name in names if name[-1] == str(WORLD_SIZE)]
    whole = [step for step in steps if steps.count(step) == WORLD_SIZE]
    if names and not steps:
        raise UsageError(f"--resume {run_dir}: needs {names[0][-1]} processes, not {WORLD_SIZE}")
    if not whole:
        return Progress()
    path = run_dir / f"checkpoint-{max(whole)}-{RANK}-of-{WORLD_SIZE}.pt"
    saved = read_tensors(path)
    saved["optimizer"] = copy.deepcopy(saved["optimizer"])  # or it would keep the file mapped
    with blame(f"{path} does not fit this dqn.py", (KeyError, RuntimeError, ValueError)):
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    return Progress(saved["global_step"], saved["best_return"])


def load_args(run_dir):
    """Read the settings of a run."""
    with blame(f"{run_dir} is not the folder of a run of this dqn.py", Exception):
        saved = json.loads(Path(run_dir, "args.json").read_text())
        saved["convolutions"] = tuple(map(tuple, saved["convolutions"]))  # JSON has lists only
        saved["hidden_sizes"] = tuple(saved["hidden_sizes"])
        return Args(**saved)


def open_run_dir(args, at_the_end):
    """Make or open the run folder, the same for all processes; only one run may write there."""
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time():.3f}-{os.getpid()}"
    name = name.replace("/", "-").replace(":", "-")
    run_dir = Path(from_rank_0(args.resume or f"runs/{name}"))
    run_dir.mkdir(parents=True, exist_ok=True)
    with blame(f"--resume {run_dir}", filelock.Timeout, "", " Another process trains there"):
        at_the_end.enter_context(filelock.FileLock(run_dir / f".lock-{RANK}", blocking=False))
    return run_dir


# --------------------------------------------------------------------------------------- processes
def start_processes(args, at_the_end):
    """Join the other processes, if torchrun started several; set torch up, return the device."""
    if WORLD_SIZE > 1:
        # torchrun's store outlives processes that it starts again: the prefix keeps them apart.
        store, rank, world_size = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        patience = timedelta(hours=2)  # the others wait while rank 0 evaluates
        dist.init_process_group(store=store, rank=rank, world_size=world_size, timeout=patience)
    torch.manual_seed(args.seed)  # the same first weights in all processes
    at_the_end.callback(torch.set_num_threads, torch.get_num_threads())
    kernels = torch.backends.cudnn.flags(enabled=True, deterministic=args.torch_deterministic)
    at_the_end.enter_context(kernels)
    if args.cuda and torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", 0)))
        return torch.accelerator.current_accelerator()
    return torch.device("cpu")


def from_rank_0(value):
    """Give all processes the value that the first one has."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def on_stop(handler):
    """Set what is done about Ctrl-C, SIGTERM and a closed terminal; return what was done before."""
    # Windows has no SIGHUP. What is ignored stays so, as under nohup.
    numbers = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}
    return {n: signal.signal(n, handler) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}


def catch_signals(at_the_end):
    """Collect signals, so that a run can finish its step; a second one ends the process."""
    caught = []

    def handler(number, frame):
        caught.append(number)
        on_stop(signal.SIG_DFL)
        with suppress(OSError):
            os.write(1, b"\nends after this step; a second signal ends it at once\n")

    if WORLD_SIZE == 1:  # torchrun heeds them itself
        with suppress(ValueError):  # outside the main thread
            for number, before in on_stop(handler).items():
                at_the_end.callback(signal.signal, number, before)
    return caught


# ------------------------------------------------------------------------------------------ checks
class UsageError(ValueError):
    """A setting that cannot work: the message names the flag, its value and what would be right."""


class TrainingError(RuntimeError):
    """A run that cannot go on: the message says at which step, and why."""


@contextmanager
def blame(cause, kinds, text="", advice=""):
    """Turn an error of some kinds, whose message contains `text`, into a UsageError."""
    try:
        yield
    except kinds as error:
        if text not in str(error):
            raise
        raise UsageError(f"{cause}: {str(error)[:200] or repr(error)}{advice}") from error


def check_numbers(args, name, space):
    """Raise UsageError for a part of an observation that is not numeric; say if one is an image."""
    parts = getattr(space, "spaces", {})  # of a Dict, or a Tuple
    for key, part in parts.items() if isinstance(parts, dict) else enumerate(parts):
        check_numbers(args, f"{name}[{key!r}]", part)
    numeric = spaces.Box, spaces.Discrete, spaces.MultiBinary, spaces.MultiDiscrete
    if not (parts or isinstance(space, numeric)):
        raise UsageError(f"{flag(args, 'env_id')}: {name} is not numeric, {space}; leave it out")
    if is_image(space):
        say_once(f"{name} is an image, but flattened; dict_images.diff has convolutions for it")


def check_memory(args, needed, device):
    """Raise UsageError if the replay buffer will not fit; a GPU says so itself."""
    free = psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if needed > free and device.type == "cpu":
        problem = f"takes {needed / 2**30:,.1f} GiB of memory, {free / 2**30:,.1f} GiB are free"
        raise UsageError(f"{flag(args, 'buffer_size')}: {problem}; make it smaller")


def check_video(args):
    """Raise UsageError if episodes cannot be recorded: before a run, not after it."""
    with tempfile.TemporaryDirectory() as folder:
        with blame(flag(args, "capture_video"), Exception, "", "; leave it out"):
            envs = make_envs(args, 1, video_folder=f"{folder}/videos")
            envs.reset()
            envs.close()


def check_rewards(rewards, step):
    """Raise TrainingError for a reward that is NaN, or that float32 cannot hold."""
    if not (np.abs(rewards) <= np.finfo(np.float32).max).all():
        raise TrainingError(f"step {step:,}: reward not finite in float32; fix the environment")


def check_loss(metrics, replay, step):
    """Raise TrainingError if the loss of the last gradient step was infinite or NaN."""
    if metrics and not math.isfinite(metrics["losses/td_loss"]):
        problem = "loss not finite; try a lower --learning-rate"
        if not math.isfinite(replay.frames.sum()):
            problem = "observation not finite; fix the environment"
        raise TrainingError(f"step {step:,}: {problem}")


# ------------------------------------------------------------------------------------ command line
# Flags that a command begins with, by family of environments ("ALE/") and by environment.
TUNED = {
    "CartPole-v1":
        "--total-timesteps 80_000 --num-envs 8 --learning-rate 2e-3 --buffer-size 10_000 "
        "--learning-starts 1_000 --train-frequency 10 --gamma 0.995 --n-step 10 "
        "--exploration-fraction 0.3 --eval-frequency 5_000 --eval-episodes 100 --stop-return 500",
    "Acrobot-v1":
        "--total-timesteps 100_000 --num-envs 8 --hidden-sizes 256 256 --learning-rate 6e-4 "
        "--learning-starts 1_000 --train-frequency 2 --n-step 3 --no-double-q "
        "--target-network-frequency 250 --exploration-fraction 0.12",
    "MountainCar-v0":
        "--total-timesteps 120_000 --num-envs 8 --buffer-size 120_000 --learning-starts 1_000 "
        "--n-step 3 --no-double-q --target-network-frequency 4 --tau 0.03 "
        "--loss huber --exploration-fraction 0.1 --end-e 0",
    "LunarLander-v3":
        "--total-timesteps 200_000 --num-envs 8 --hidden-sizes 256 256 --learning-rate 2e-3 "
        "--buffer-size 50_000 --n-step 3 --exploration-fraction 0.15 --end-e 0.01",
    "CarRacing-v3":  # not tuned
        "--frame-stack 4 --train-frequency 10 --env-kwargs continuous False",
    "MinAtar/":  # not tuned
        "--total-timesteps 1_000_000 --num-envs 8 --hidden-sizes 128 --learning-rate 3e-4 "
        "--learning-starts 5_000 --batch-size 32 --n-step 3 "
        "--target-network-frequency 1_000 --loss huber --max-grad-norm 10 --end-e 0.01 "
        "--eval-frequency 100_000 --eval-max-steps 5_000",
    "ALE/":  # for two cores without a GPU: a small network, few gradient steps
        "--total-timesteps 2_000_000 --num-envs 8 --frame-stack 4 --clip-rewards --dueling "
        "--convolutions 8 3 2 16 3 2 32 3 2 --hidden-sizes 256 --learning-rate 3e-4 "
        "--learning-starts 5_000 --batch-size 32 --train-frequency 8 --n-step 5 --no-double-q "
        "--target-network-frequency 1_000 --loss huber --max-grad-norm 10 --eval-frequency 100_000 "
        "--exploration-fraction 0.05 --eval-episodes 10 --checkpoint-frequency 100_000",
    "ALE/Pong-v5": "--total-timesteps 1_200_000 --learning-rate 1e-3",  # after those of its family
}

# Least value, largest value, and the settings that they hold for; 1e-30 stands for "above 0".
LIMITS = (
    (1, math.inf, "num_envs frame_stack convolutions hidden_sizes batch_size train_frequency "
     "n_step target_network_frequency eval_max_steps"),
    (0, math.inf, "learning_starts eval_frequency eval_episodes final_episodes "
     "checkpoint_frequency"),
    (0, 2**64 - 1, "seed"), (0, 1, "gamma start_e end_e exploration_fraction eval_epsilon"),
    (1e-30, 1, "tau"), (1e-30, math.inf, "learning_rate max_grad_norm"),
)

# What may differ when a run goes on; anything else would make it another experiment.
MAY_CHANGE = ("resume evaluate total_timesteps stop_return eval_frequency eval_episodes "
              "eval_max_steps eval_epsilon final_episodes save_model capture_video track "
              "wandb_project_name wandb_entity cuda compile")


def flag(args, name):
    """Write a setting as on the command line, "--tau 0.5"."""
    return f"--{name.replace('_', '-')} {getattr(args, name)}"


def validate(args):
    """Raise UsageError for the first setting that cannot work; say what a new length changes."""
    for low, high, names in LIMITS:
        for name in names.split():
            if not all(low <= value <= high for value in np.ravel(getattr(args, name))):
                raise UsageError(f"{flag(args, name)}: must be between {low} and {high}")
    if args.learning_starts > args.total_timesteps:
        raise UsageError(f"{flag(args, 'learning_starts')}: above {flag(args, 'total_timesteps')}")
    for name in "num_envs", "batch_size":
        if getattr(args, name) % WORLD_SIZE:
            raise UsageError(f"{flag(args, name)}: must be a multiple of {WORLD_SIZE} processes")
    if json.loads(json.dumps(args.env_kwargs, default=repr)) != args.env_kwargs:
        raise UsageError(f"{flag(args, 'env_kwargs')}: JSON cannot hold it; gym.register() can")
    if args.track:
        with blame(flag(args, "track"), ImportError, "", "; pip install wandb"):
            import wandb  # noqa: F401
    may_change = MAY_CHANGE.split() + (["seed", "env_kwargs"] if args.evaluate else [])
    saved = saved_args(args) or args  # a new run keeps its own
    for name, value in vars(saved).items():
        if name not in may_change and getattr(args, name) != value:
            raise UsageError(f"{flag(args, name)}: the run has {value} and keeps it")
    if saved.total_timesteps != args.total_timesteps:
        say(f"{flag(args, 'total_timesteps')} is new: epsilon and learning rate follow it now")
    least = args.num_envs * (args.n_step + args.frame_stack + 2)  # of these some can be sampled
    for name in "learning_starts", "buffer_size":
        if getattr(args, name) < least:
            raise UsageError(f"{flag(args, name)}: must be at least {least}, for a transition "
                             f"of {args.n_step} steps in each of {args.num_envs} environments")


def saved_args(args):
    """Read the settings of the run to go on with, or to evaluate; None if a new one is to begin."""
    run_dir = args.evaluate or args.resume  # hidden files, such as a lock, make no run
    return load_args(run_dir) if run_dir and any(Path(run_dir).glob("[!.]*")) else None


def parse_args(argv):
    """Read the command line: flags win, then the settings of a run or TUNED, then Args."""
    if argv.count("--env-kwargs") > 1:  # tyro takes the last one
        raise UsageError("--env-kwargs: give it once, as in --env-kwargs a 1 b 2")
    # A first pass finds the flags that decide the defaults of the second.
    given, _ = tyro.cli(Args, args=argv, default=Args(env_id=""), return_unknown_args=True,
                        add_help=False)
    run = saved_args(given)
    if given.resume and not (run or given.env_id):
        raise UsageError(f"{flag(given, 'resume')}: no run is there; to begin it, give --env-id")
    name = (given.env_id or Args.env_id).split(":")[-1]
    family = f"{name.split('/')[0]}/"
    tuned = f"{TUNED.get(family, '')} {TUNED.get(name, '')}".strip() if given.tuned else ""
    defaults = run or read_kwargs(tyro.cli(Args, args=tuned.split()))
    # tyro makes a flag of each key that a dict has by default, so begin with an empty one.
    args = read_kwargs(tyro.cli(Args, args=argv, default=replace(defaults, env_kwargs={})))
    args.env_kwargs = defaults.env_kwargs | args.env_kwargs
    if not run:
        say(f"settings: {f'TUNED for {name}' if tuned else 'the defaults'}")
    return args


def read_kwargs(args):
    """Read an environment's arguments as Python, "false" as False; what is no Python stays text."""
    for name, text in args.env_kwargs.items():
        with suppress(ValueError, SyntaxError):
            args.env_kwargs[name] = ast.literal_eval(text.title() if text.isalpha() else text)
    return args


def main():
    """Run the command line: exit status 2 for a setting that cannot work, 1 for a failed run."""
    sys.stdout.reconfigure(errors="replace")  # for terminals without "±"
    try:
        args = parse_args(sys.argv[1:])
        if args.evaluate is None:
            train(args)
        else:
            show(args)
    except KeyboardInterrupt as interrupt:
        sys.exit(128 + next(iter(interrupt.args), signal.SIGINT))
    except (UsageError, TrainingError) as error:
        time.sleep(5 * (RANK > 0))  # rank 0 says what all would say, and torchrun ends the others
        print("dqn.py: error:", *str(error).split(), file=sys.stderr)  # on one line
        sys.exit(2 if isinstance(error, UsageError) else 1)


if __name__ == "__main__":
    main()
