"""Deep Q-Network (DQN) in one file, to be read from top to bottom.

    python dqn.py --env-id CartPole-v1                      # train, evaluate, leave a run under runs/
    python dqn.py --env-id LunarLander-v3 --capture-video   # the same with an mp4 of greedy episodes
    python dqn.py --env-id CartPole-v1 --no-tuned           # plain DQN: one step, hard target, MSE
    tensorboard --logdir runs                               # look at it

A Q-network learns Q(s, a), the discounted return of taking action a in state s and acting greedily from there on,
by regression on a TD target that an older copy of itself, the target network, computes:

    td_target = r + gamma * max_a' Q_target(s', a')

Papers, cited by their first author below: Watkins & Dayan 1992, "Q-learning"; Mnih et al. 2015, "Human-level control
through deep reinforcement learning" (DQN); van Hasselt et al. 2016, "Deep reinforcement learning with Double
Q-learning"; Wang et al. 2016, "Dueling network architectures"; Sutton 1988, "Learning to predict by the methods of
temporal differences" (n-step returns); Lillicrap et al. 2016, "Continuous control with deep reinforcement learning"
(soft target updates); Pardo et al. 2018, "Time limits in reinforcement learning" (truncation is not termination).
"""

import contextlib
import copy
import dataclasses
import difflib
import importlib
import importlib.util
import io
import itertools
import math
import os
import re
import signal
import sys
import textwrap
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import gymnasium as gym
import numpy as np
import torch
import tyro
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

FINAL_EPISODES = 100  # greedy episodes behind the verdict
VIDEO_EPISODES = 3
NATIVE_FROM = 5  # environments from which Gymnasium's vectorised CartPole outruns SyncVectorEnv (measured)


class UsageError(ValueError):
    """A setting that cannot work. The message names the flag, its value and what would be right."""


class TrainingError(RuntimeError):
    """A run that cannot go on: the environment or the loss stopped being finite."""


@dataclass(kw_only=True)
class Environment:
    """What is learned, and for how long."""

    env_id: str = "CartPole-v1"  # Gymnasium id; 'module:Id-v0' for an environment that a module registers
    tuned: bool = True  # begin with what TUNED holds for this environment; flags given still win
    total_timesteps: int = 500_000  # environment steps of the whole run, over all environments
    num_envs: int = 1  # environments stepped side by side
    vectorization: Literal["auto", "sync", "async", "native"] = "auto"  # in turn, in processes, or by their own code
    seed: int = 1  # seed of every random generator: one seed, one machine, one result


@dataclass(kw_only=True)
class Learning:
    """Replay buffer, TD target and optimiser. Frequencies count environment steps."""

    learning_rate: float = 2.5e-4  # step size of Adam
    anneal_lr: bool = False  # let the learning rate fall linearly to zero over the run
    buffer_size: int = 10_000  # transitions that the replay buffer holds
    learning_starts: int = 10_000  # steps before the first gradient step
    batch_size: int = 128  # transitions in a gradient step
    train_frequency: int = 10  # steps between two train events
    gradient_steps: int = 1  # gradient steps in a train event
    gamma: float = 0.99  # discount factor
    n_step: int = 1  # rewards summed before the TD target bootstraps
    double_q: bool = False  # the online network picks the action that the target network rates (Double DQN)
    target_network_frequency: int = 500  # steps between two updates of the target network
    tau: float = 1.0  # share of the online network in such an update; 1 is a hard copy
    loss: Literal["mse", "huber"] = "mse"  # between Q(s, a) and the TD target
    max_grad_norm: float = 0.0  # longer gradients are scaled down to this length, 0 = never


@dataclass(kw_only=True)
class Network:
    """The Q-network."""

    hidden_sizes: tuple[int, ...] = (120, 84)  # units of the hidden layers; with none Q is linear, or a table
    dueling: bool = False  # state value and advantages from separate outputs
    layer_norm: bool = False  # LayerNorm before each activation


@dataclass(kw_only=True)
class Exploration:
    """Epsilon-greedy acting: epsilon falls linearly, then stays."""

    start_e: float = 1.0  # epsilon at the first step
    end_e: float = 0.05  # epsilon at the end of the decay
    exploration_fraction: float = 0.5  # share of total-timesteps that the decay takes


@dataclass(kw_only=True)
class Reporting:
    """What is measured, shown and kept."""

    eval_frequency: int = 25_000  # steps between two greedy evaluations, 0 = only at the end
    eval_episodes: int = 20  # episodes of such an evaluation; the verdict at the end always plays 100
    eval_max_steps: int = 10_000  # steps after which a greedy episode is cut, should the environment have no limit
    stop_return: float = math.inf  # end the run once a greedy evaluation reaches this mean return
    log_frequency: int = 1_000  # steps between two entries of losses and diagnostics in TensorBoard
    save_model: bool = True  # write model.pt: the best network by greedy evaluation, and these settings
    capture_video: bool = False  # record greedy episodes of the best network as mp4 at the end
    exp_name: str = Path(__file__).stem  # part of the run folder's name
    track: bool = False  # mirror TensorBoard to Weights & Biases (pip install wandb)
    wandb_project_name: str = "dqn"  # project there
    wandb_entity: str | None = None  # team there
    cuda: bool = True  # use a GPU where there is one
    torch_deterministic: bool = True  # have cuDNN use deterministic kernels only


@dataclass(kw_only=True)
class Args(Reporting, Exploration, Network, Learning, Environment):
    """All settings of a run. A value that is given wins, then TUNED for its env_id, then the plain default."""

    def __new__(cls, **given: Any) -> Self:
        args = super().__new__(cls)
        args._given = frozenset(given)
        return args

    def __post_init__(self) -> None:
        for name, value in (TUNED.get(self.env_id, {}) if self.tuned else {}).items():
            if name not in self._given:
                setattr(self, name, value)


SECTIONS = tuple(reversed(Args.__bases__))

TUNED: dict[str, dict[str, Any]] = {
    "CartPole-v1": dict(
        total_timesteps=80_000, num_envs=8, learning_rate=2e-3, anneal_lr=True, buffer_size=80_000,
        learning_starts=1_000, gamma=0.995, n_step=10, layer_norm=True, exploration_fraction=0.3,
        eval_frequency=2_500, eval_episodes=100, stop_return=500.0,
    ),
    "Acrobot-v1": dict(
        total_timesteps=100_000, num_envs=8, learning_rate=1e-3, anneal_lr=True, buffer_size=100_000,
        learning_starts=1_000, train_frequency=5, n_step=5, target_network_frequency=200, layer_norm=True,
        exploration_fraction=0.2, eval_frequency=10_000,
    ),
    "MountainCar-v0": dict(
        total_timesteps=120_000, num_envs=8, learning_rate=1e-3, anneal_lr=True, buffer_size=120_000,
        learning_starts=2_000, train_frequency=4, n_step=20, layer_norm=True, exploration_fraction=0.3, end_e=0.1,
        eval_frequency=10_000,
    ),
    "LunarLander-v3": dict(
        total_timesteps=200_000, num_envs=8, learning_rate=5e-4, anneal_lr=True, buffer_size=200_000,
        learning_starts=2_000, train_frequency=2, n_step=3, double_q=True, hidden_sizes=(256, 256), layer_norm=True,
        exploration_fraction=0.3, eval_frequency=20_000,
    ),
}

# (what is right, its test, the settings it holds for)
LIMITS = (
    ("must be at least 1", lambda v: v >= 1,
     ("total_timesteps", "num_envs", "buffer_size", "batch_size", "train_frequency", "gradient_steps", "n_step",
      "target_network_frequency", "eval_episodes", "eval_max_steps", "log_frequency")),
    ("must be 0 or more", lambda v: v >= 0, ("seed", "learning_starts", "eval_frequency", "max_grad_norm")),
    ("must lie in [0, 1]", lambda v: 0 <= v <= 1, ("gamma", "start_e", "end_e", "exploration_fraction")),
    ("must lie in (0, 1]", lambda v: 0 < v <= 1, ("tau",)),
    ("must be a finite number above 0", lambda v: 0 < v < math.inf, ("learning_rate",)),
    ("must be a number", lambda v: not math.isnan(v), ("stop_return",)),
    ("must all be at least 1", lambda v: all(size >= 1 for size in v), ("hidden_sizes",)),
)
# (the setting to change, the one it is held against, what is right, its test)
RELATIONS = (
    ("end_e", "start_e", "must not be above", lambda end, start: end <= start),
    ("buffer_size", "batch_size", "must be at least", lambda buffer, batch: buffer >= batch),
    ("buffer_size", "num_envs", "must be at least", lambda buffer, envs: buffer >= envs),
    ("n_step", "buffer_size", "must not be above", lambda steps, buffer: steps <= buffer),
    ("learning_starts", "total_timesteps", "would never learn; must be below", lambda start, end: start < end),
)


def flag(args: Args, name: str) -> str:
    """The command line's spelling of a setting, "--tau 0.5"."""
    value = getattr(args, name)
    return f"--{name.replace('_', '-')} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"


def validate(args: Args) -> None:
    """Raise UsageError for the first setting that cannot work."""
    for right, holds, names in LIMITS:
        for name in names:
            if not holds(getattr(args, name)):
                raise UsageError(f"{flag(args, name)}: {right}")
    wandb = importlib.util.find_spec("wandb") if args.track else None
    if args.track and (wandb is None or wandb.origin is None):  # without origin: a mere folder of that name
        raise UsageError("--track: wandb is not installed; pip install wandb")
    for name, other, right, holds in RELATIONS:
        if not holds(getattr(args, name), getattr(args, other)):
            raise UsageError(f"{flag(args, name)}: {right} {flag(args, other)}")


def derive_seed(seed: int, *path: int) -> int:
    """A seed below 2^31 for one purpose of a run; different paths and different run seeds give unrelated streams."""
    return int(np.random.SeedSequence((seed, *path)).generate_state(1)[0] >> 1)


TRAIN_ENVS, EVAL_ENVS, NETWORK, REPLAY, ACTIONS, PROBE, VIDEO = range(7)  # the purposes


def make_envs(args: Args, num_envs: int, video_dir: Path | None = None) -> gym.vector.VectorEnv:
    """Create `num_envs` environments that step together: observations (N, *shape), actions (N,).

    Spaces other than Box pass through Gymnasium's FlattenObservation. With `video_dir` every episode is recorded.

    Raises UsageError where the id is unknown, something is not installed, or DQN cannot learn the environment.
    """
    module, _, env_id = args.env_id.rpartition(":")
    named, spaces = flag(args, "env_id"), gym.spaces
    try:
        if module or env_id.startswith("ALE/"):
            importlib.import_module(module or "ale_py")  # registers its environments
        spec = gym.spec(env_id)
    except ImportError as error:
        raise UsageError(f"{named}: {error}; name a module that is installed") from None
    except gym.error.Error as error:
        near = difflib.get_close_matches(env_id, gym.registry, n=1)
        reason = f"did you mean {':'.join(filter(None, (module, near[0])))}?" if near else str(error)
        raise UsageError(f"{named}: no such environment; {reason}") from None

    def wrap(env: gym.Env) -> gym.Env:
        if video_dir is not None:
            env = gym.wrappers.RecordVideo(env, str(video_dir), episode_trigger=lambda episode: True)
        return env if isinstance(env.observation_space, spaces.Box) else gym.wrappers.FlattenObservation(env)

    native = spec.vector_entry_point
    mode = args.vectorization if video_dir is None else "sync"
    if mode == "auto":  # another package's own version may be another environment, with other observations
        mode = "native" if str(native).startswith("gymnasium.") and num_envs >= NATIVE_FROM else "sync"
    if mode == "native" and native is None:
        raise UsageError(f"{flag(args, 'vectorization')}: {env_id} has no vectorised version; use sync, async or auto")
    try:
        if mode == "native":
            envs = gym.make_vec(env_id, num_envs, vectorization_mode="vector_entry_point")
            if not isinstance(envs.single_observation_space, spaces.Box):
                envs = gym.wrappers.vector.FlattenObservation(envs)
        else:
            settings = {} if video_dir is None else {"render_mode": "rgb_array"}
            # The replay buffer copies what it is given, so the environments need not.
            envs = gym.make_vec(env_id, num_envs, vectorization_mode=mode, vector_kwargs={"copy": False},
                                wrappers=[wrap], disable_env_checker=True, **settings)
    except (gym.error.DependencyNotInstalled, ImportError) as error:
        raise UsageError(f"{named}: {' '.join(str(error).split())}; install what is missing") from None

    actions, observations = envs.single_action_space, envs.single_observation_space
    autoreset = envs.metadata.get("autoreset_mode")
    fault = None
    if not isinstance(actions, spaces.Discrete):
        fault = f"DQN needs a Discrete action space, this one is {actions}"
    elif not isinstance(observations, spaces.Box):
        fault = f"observations {observations} cannot be flattened to numbers"
    elif autoreset != gym.vector.AutoresetMode.NEXT_STEP:
        fault = f"resets itself in mode {autoreset}; only AutoresetMode.NEXT_STEP keeps the stream of transitions whole"
    if fault:
        envs.close()
        raise UsageError(f"{named}: {fault}")
    return envs


class QNetwork(nn.Module):
    """Q(s, ·) as a multi-layer perceptron over flattened observations.

    Without hidden layers Q is linear in the observation. `dueling` reads a state value V and advantages A from the
    last layer, Q = V + A - mean(A) (Wang, equation 9).
    """

    def __init__(self, observation_shape: Sequence[int], num_actions: int, hidden_sizes: Sequence[int] = (120, 84),
                 dueling: bool = False, layer_norm: bool = False) -> None:
        super().__init__()
        sizes = (math.prod(observation_shape), *hidden_sizes)
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), *([nn.LayerNorm(outputs)] if layer_norm else []), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], num_actions + dueling))
        self.dueling = dueling

    def forward(self, observations: Tensor) -> Tensor:
        """Action values (B, actions) of a batch of observations (B, *shape) of any dtype."""
        x = observations.reshape(len(observations), -1).float()
        for layer in self.layers:
            x = layer.forward(x)  # calling the layer itself would look for hooks: a third of the time to act
        return x[:, :1] + x[:, 1:] - x[:, 1:].mean(1, keepdim=True) if self.dueling else x


def flatten_parameters(module: nn.Module) -> nn.Parameter:
    """Move a module's parameters, and their gradients, into one vector each; return that of the parameters.

    The module goes on with views into the two vectors, so that Adam, a target update and a gradient norm become one
    operation each instead of one per layer.
    """
    parameters = list(module.parameters())
    flat = nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in parameters]))
    flat.grad = torch.zeros_like(flat)
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, data, grad in zip(parameters, flat.data.split(sizes), flat.grad.split(sizes), strict=True):
        parameter.data = data.view_as(parameter)
        parameter.grad = grad.view_as(parameter)
    return flat


class Adam:
    """The optimiser of Kingma & Ba 2015 (algorithm 1) for one vector of parameters and its gradient.

    It takes half the time of torch.optim.Adam(fused=True), whose first step also imports PyTorch's compiler (1.4 s).
    """

    def __init__(self, parameters: nn.Parameter, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        self.parameters, self.betas, self.eps, self.steps = parameters, betas, eps, 0
        self.mean, self.square = torch.zeros_like(parameters.data), torch.zeros_like(parameters.data)

    def step(self, learning_rate: float) -> None:
        """Move the parameters against their gradient."""
        gradient, (beta1, beta2) = self.parameters.grad, self.betas
        self.steps += 1
        self.mean.lerp_(gradient, 1 - beta1)
        self.square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (self.square / (1 - beta2**self.steps)).sqrt_().add_(self.eps)
        self.parameters.data.addcdiv_(self.mean, root, value=-learning_rate / (1 - beta1**self.steps))


class Batch(NamedTuple):
    """B sampled transitions; with n-step returns, `rewards` and `discounts` span the m <= n steps that were walked."""

    observations: Tensor  # (B, *shape)
    actions: Tensor  # (B,) int64, from 0
    rewards: Tensor  # (B,) r_0 + gamma r_1 + ... + gamma^(m-1) r_(m-1)
    next_observations: Tensor  # (B, *shape), m steps after observations
    discounts: Tensor  # (B,) gamma^m, or 0 where the episode terminated


def available_memory() -> float:
    """Bytes of main memory that this process can still take, infinite where the system does not tell."""
    limits = [math.inf]
    with contextlib.suppress(OSError, ValueError, AttributeError):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with contextlib.suppress(OSError, IndexError):
        limits.append(int(re.findall(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[0]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # a container's limit; "max" where there is none
        group = Path("/sys/fs/cgroup")
        limits.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return min(limits)


class ReplayBuffer:
    """The last `capacity` transitions, kept as the stream of time steps they came in.

    A ring of rows (time) by N environments holds every observation once: the successor of a row is the next row.
    Under NEXT_STEP autoreset the row after an episode's end holds the final observation, and the step from there only
    resets the environment: such reset steps stay in the stream and are never sampled. The newest row is an observation
    whose step is still to come. Arrays are flat, slot = row * N + environment. They are NumPy's because on a CPU an
    operation on a batch of indices costs PyTorch several times as much.

    Raises UsageError before anything is allocated if memory does not suffice.
    """

    def __init__(self, capacity: int, num_envs: int, observation_space: gym.spaces.Box, num_actions: int,
                 n_step: int = 1, gamma: float = 0.99, device: torch.device | str = "cpu") -> None:
        # Two rows of steps at least: after a reset step comes a real one, so there is always something to sample.
        self.num_envs, self.num_rows = num_envs, max(math.ceil(capacity / num_envs), 2) + 1
        self.num_slots, self.device = self.num_rows * num_envs, device
        floating = np.issubdtype(observation_space.dtype, np.floating)
        observation = np.dtype(np.float32 if floating else observation_space.dtype)  # of all dtypes only floats change
        action = np.min_scalar_type(num_actions - 1)
        slot_bytes = observation.itemsize * math.prod(observation_space.shape) + action.itemsize + 4 + 1 + 1
        needed, free = self.num_slots * slot_bytes, available_memory()
        if needed > free:
            raise UsageError(f"--buffer-size {capacity}: the replay buffer needs {needed / 2**30:,.1f} GiB, "
                             f"{free / 2**30:,.1f} GiB are free; must be below {int(free / slot_bytes):,}")
        self.observations = np.zeros((self.num_slots, *observation_space.shape), observation)
        self.actions, self.rewards = np.zeros(self.num_slots, action), np.zeros(self.num_slots, np.float32)
        self.terminated, self.ended = np.zeros((2, self.num_slots), bool)  # ended: terminated or truncated
        self.row = 0  # of the newest observations
        self.filled = 0  # rows of complete steps, those just before `row`
        self.steps = np.arange(n_step)[:, None]  # (n, 1)
        self.strides = self.steps * num_envs
        self.powers = (gamma ** np.arange(n_step + 1)).astype(np.float32)  # (n + 1,)

    @property
    def newest(self) -> np.ndarray:
        """The newest observations (N, *shape): those to act on."""
        return self.observations[self.row * self.num_envs :][: self.num_envs]

    def reset(self, observations: np.ndarray) -> None:
        """Begin the stream with the first observations (N, *shape) of N episodes."""
        self.newest[...] = observations

    def add(self, actions: np.ndarray, rewards: np.ndarray, terminated: np.ndarray, truncated: np.ndarray,
            next_observations: np.ndarray) -> None:
        """Append what the step from the newest observations brought, (N,) each, and the observations it led to."""
        here = slice(self.row * self.num_envs, (self.row + 1) * self.num_envs)
        self.actions[here], self.rewards[here] = actions, rewards
        self.terminated[here], self.ended[here] = terminated, terminated | truncated
        self.row = (self.row + 1) % self.num_rows
        self.filled = min(self.filled + 1, self.num_rows - 1)
        self.newest[...] = next_observations

    def draw(self, size: int, rng: np.random.Generator) -> np.ndarray:
        """Uniform slots (size,) of real steps, with replacement."""
        oldest = (self.row - self.filled) * self.num_envs  # negative slots wrap around, as the ring does
        slots = rng.integers(oldest, self.row * self.num_envs, size)
        # A reset step follows an ended one. For the oldest row, the newest row tells: until its own step is added, it
        # keeps the flags of the step that came before what is now the oldest.
        while resets := np.count_nonzero(is_reset := self.ended[slots - self.num_envs]):
            slots[is_reset] = rng.integers(oldest, self.row * self.num_envs, resets)
        return slots

    def sample(self, batch_size: int, rng: np.random.Generator) -> Batch:
        """Transitions drawn uniformly from all real steps in the stream; the newest can be among them at once.

        From each, walk up to n steps and stop where the episode ended or the stream does (Sutton). Truncation, and
        the stream's end, bootstrap from the observation where the walk stopped (Pardo, section 2.2).
        """
        slots = self.draw(batch_size, rng)
        walk = slots + self.strides  # (n, B)
        stops = self.ended.take(walk, mode="wrap")
        stops |= walk >= (self.row - 1) * self.num_envs  # the newest step
        stops[-1] = True
        last = stops.argmax(0)  # (B,) number of the step that each walk stops with
        rewards = self.rewards.take(walk, mode="wrap")
        rewards *= self.powers[:-1, None]
        end = slots + last * self.num_envs
        arrays = (
            self.observations.take(slots, 0),
            self.actions[slots].astype(np.int64),
            (rewards * (self.steps <= last)).sum(0),
            self.observations.take(end + self.num_envs, 0),
            self.powers[last + 1] * ~self.terminated[end],
        )
        return Batch(*(torch.from_numpy(array).to(self.device) for array in arrays))


def linear_schedule(start: float, end: float, duration: float, step: int) -> float:
    """The value at `step` of a line that goes from `start` to `end` in `duration` steps and then stays."""
    return end if step >= duration else start + (end - start) * step / duration


def due(frequency: int, step: int, stride: int = 1) -> bool:
    """Whether one of the `stride` steps that end with `step` is a multiple of `frequency`; never if that is 0."""
    return frequency > 0 and step % frequency < stride


@torch.no_grad()
def td_target(batch: Batch, q_network: nn.Module, target_network: nn.Module, double_q: bool = False) -> Tensor:
    """What Q(s, a) should be, (B,): rewards + discounts * max_a' Q_target(s', a') (Mnih, equation 2 onwards).

    Double DQN lets the online network choose a' and the target network rate it (van Hasselt, equation 4). No gradient
    flows through the target.
    """
    next_q = target_network(batch.next_observations)  # (B, actions)
    if double_q:
        next_value = next_q.gather(1, q_network(batch.next_observations).argmax(1, keepdim=True)).squeeze(1)
    else:
        next_value = next_q.amax(1)
    return batch.rewards + batch.discounts * next_value


LOSSES = {"mse": F.mse_loss, "huber": F.huber_loss}


def sync_target(target: Tensor, online: Tensor, tau: float) -> None:
    """Move the target parameters towards the online ones, θ⁻ ← τ·θ + (1−τ)·θ⁻ (Lillicrap); τ = 1 copies (Mnih)."""
    target.lerp_(online, tau)


class Learner:
    """The two networks, the optimiser and the replay buffer: all that learning changes."""

    def __init__(self, args: Args, envs: gym.vector.VectorEnv, device: torch.device) -> None:
        self.args, self.device = args, device
        space, self.num_actions = envs.single_observation_space, int(envs.single_action_space.n)
        self.replay = ReplayBuffer(args.buffer_size, args.num_envs, space, self.num_actions, args.n_step, args.gamma,
                                   device)
        with torch.random.fork_rng(devices=[]):  # PyTorch initialises layers from its global generator only
            torch.manual_seed(derive_seed(args.seed, NETWORK))
            network = QNetwork(space.shape, self.num_actions, args.hidden_sizes, args.dueling, args.layer_norm)
        self.q_network = network.to(device)
        self.target_network = copy.deepcopy(self.q_network).requires_grad_(False)
        self.parameters = flatten_parameters(self.q_network)
        self.target_parameters = flatten_parameters(self.target_network).detach()
        self.optimizer = Adam(self.parameters)
        self.actions_rng = np.random.default_rng(derive_seed(args.seed, ACTIONS))
        self.replay_rng = np.random.default_rng(derive_seed(args.seed, REPLAY))
        self.loss = self.q_values = None  # of the last gradient step
        self.probe = self.probe_targets = None  # a fixed batch, and the TD targets it had at the last log

    def act(self, observations: np.ndarray, epsilon: float) -> np.ndarray:
        """Epsilon-greedy actions (N,), counted from 0, for observations (N, *shape); epsilon holds for each one."""
        coins, choices = self.actions_rng.random((2, len(observations)))
        actions = (choices * self.num_actions).astype(np.int64)
        greedy = coins >= epsilon
        if np.count_nonzero(greedy):
            with torch.no_grad():
                q_values = self.q_network(torch.from_numpy(observations).to(self.device))
            actions = np.where(greedy, q_values.cpu().numpy().argmax(1), actions)
        return actions

    def gradient_step(self, learning_rate: float) -> None:
        """One step of Adam on the loss between Q(s, a) and the TD targets of a batch."""
        batch = self.replay.sample(self.args.batch_size, self.replay_rng)
        targets = td_target(batch, self.q_network, self.target_network, self.args.double_q)
        q_values = self.q_network(batch.observations).gather(1, batch.actions[:, None])  # (B, 1)
        loss = LOSSES[self.args.loss](q_values, targets[:, None])
        gradient = self.parameters.grad.zero_()
        loss.backward()
        if self.args.max_grad_norm:
            gradient.mul_((self.args.max_grad_norm / gradient.norm()).clamp(max=1.0))
        self.optimizer.step(learning_rate)
        self.loss, self.q_values = loss.detach(), q_values.detach()

    def diagnostics(self) -> dict[str, float]:
        """TensorBoard's tags and values for the last gradient step; none before the first."""
        if self.loss is None:
            return {}
        if self.probe is None:
            rng = np.random.default_rng(derive_seed(self.args.seed, PROBE))
            self.probe = self.replay.sample(self.args.batch_size, rng)
        lag = (self.parameters.detach() - self.target_parameters).norm() / self.parameters.detach().norm()
        values = {"losses/td_loss": self.loss, "losses/q_values": self.q_values.mean(),
                  "losses/grad_norm": self.parameters.grad.norm(), "target/lag": lag}
        targets = self.probe_targets
        self.probe_targets = td_target(self.probe, self.q_network, self.target_network, self.args.double_q)
        if targets is not None:
            values["target/drift"] = (self.probe_targets - targets).abs().mean()
        return {tag: value.item() for tag, value in values.items()}


class Evaluation(NamedTuple):
    """Greedy episodes, (episodes,) each."""

    returns: np.ndarray  # undiscounted
    lengths: np.ndarray  # steps
    q_bias: np.ndarray  # max_a Q(s_0, a) minus the discounted return that followed


@torch.no_grad()
def evaluate(q_network: nn.Module, envs: gym.vector.VectorEnv, episodes: int, seed: int, gamma: float = 1.0,
             max_steps: int = 10_000, interrupted: Sequence[int] = ()) -> Evaluation | None:
    """Play greedy episodes, cut after `max_steps`; None if `interrupted` fills up meanwhile.

    They are played in rounds of one episode for each environment: to take whichever episodes end first would favour
    short ones.
    """
    device, rounds = next(q_network.parameters()).device, []
    for played in range(0, episodes, envs.num_envs):
        running = np.arange(envs.num_envs) < episodes - played
        wanted, start_values = running.copy(), None
        returns, discounted, lengths = np.zeros((3, envs.num_envs))
        observations, _ = envs.reset(seed=seed + played)
        for step in range(max_steps):
            if interrupted:
                return None
            values, actions = q_network(torch.as_tensor(observations).to(device)).max(1)
            if start_values is None:
                start_values = values.cpu().numpy()
            actions = actions.cpu().numpy() + envs.single_action_space.start
            observations, rewards, terminated, truncated, _ = envs.step(actions)
            rewards = np.where(running, rewards, 0.0)
            returns += rewards
            discounted += gamma**step * rewards
            lengths += running
            running &= ~(terminated | truncated)
            if not running.any():
                break
        rounds.append(np.stack((returns, lengths, start_values - discounted))[:, wanted])
    return Evaluation(*np.concatenate(rounds, axis=1))


EPISODE_TAGS = ("charts/episodic_return", "charts/episodic_length")
# TensorBoard's custom-scalars page: title -> tags drawn in one chart
CHARTS = {
    "return": ["charts/episodic_return", "eval/episodic_return"],
    "episode length": ["charts/episodic_length", "eval/episodic_length"],
    "loss and gradient": ["losses/td_loss", "losses/grad_norm"],
    "Q-values and their bias": ["losses/q_values", "eval/q_bias"],
    "target network: distance to the online one": ["target/lag"],
    "target network: drift of its TD targets": ["target/drift"],
    "epsilon": ["charts/epsilon"],
    "learning rate": ["charts/learning_rate"],
    "speed": ["charts/SPS"],
}


class Report:
    """What the user gets of a run: TensorBoard's file, a progress bar (lines where output is no terminal), model.pt."""

    def __init__(self, args: Args, run_dir: Path) -> None:
        settings = dataclasses.asdict(args)
        if args.track:
            wandb = importlib.import_module("wandb")
            try:
                wandb.init(project=args.wandb_project_name, entity=args.wandb_entity, name=run_dir.name,
                           config=settings, sync_tensorboard=True)
            except Exception as error:
                run_dir.rmdir()
                reason = " ".join(str(error).split())
                raise UsageError(f"--track: {reason}; log in to wandb or set WANDB_MODE=offline") from None
        self.args, self.run_dir = args, run_dir
        self.writer = SummaryWriter(str(run_dir), flush_secs=10)
        rows = "".join(f"|{name}|{value}|\n" for name, value in settings.items())
        self.writer.add_text("hyperparameters", f"|setting|value|\n|-|-|\n{rows}")
        columns = {name: v if isinstance(v, bool | int | float | str) else str(v) for name, v in settings.items()}
        for summary in hparams(columns, {"eval/episodic_return": 0.0}):
            self.writer.file_writer.add_summary(summary)  # add_hparams would open a second run for them
        self.writer.add_custom_scalars({"DQN": {title: ["Multiline", tags] for title, tags in CHARTS.items()}})
        self.bar = tqdm(total=args.total_timesteps, unit=" steps", unit_scale=True, disable=None, dynamic_ncols=True)
        self.recent: deque[float] = deque(maxlen=20)  # returns of the last training episodes
        self.evaluations: list[tuple[int, float]] = []  # (step, mean greedy return)
        self.best_step, self.best_return, self.best_network = 0, -math.inf, None
        self.started, self.paused = time.perf_counter(), 0.0

    def close(self) -> None:
        """Close what was opened; everything logged so far is on disk afterwards."""
        self.bar.close()
        self.writer.close()
        if self.args.track:
            importlib.import_module("wandb").finish()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log values by TensorBoard tag."""
        entries = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self.writer.file_writer.add_summary(Summary(value=entries), step)  # one event for all costs half of add_scalar

    def steps_per_second(self, step: int) -> float:
        """Speed since the start, evaluations not counted."""
        return step / (time.perf_counter() - self.started - self.paused)

    def progress(self, step: int, epsilon: float, learning_rate: float, diagnostics: dict[str, float]) -> None:
        """Log and show how far training is."""
        total, speed = self.args.total_timesteps, self.steps_per_second(step)
        values = {"charts/epsilon": epsilon, "charts/learning_rate": learning_rate, "charts/SPS": int(speed)}
        self.scalars(step, values | diagnostics)
        recent = f"{np.mean(self.recent):.1f}" if self.recent else "-"
        status = f"return {recent}, epsilon {epsilon:.2f}, loss {diagnostics.get('losses/td_loss', math.nan):.3g}"
        self.bar.set_postfix_str(status, refresh=False)
        if self.bar.disable and due(max(total // 20, 1), step, max(self.args.log_frequency, self.args.num_envs)):
            left = max(total - step, 0) / speed
            print(f"step {step:,} of {total:,}: {status}, {speed:,.0f} steps/s, {left:,.0f} s left", flush=True)

    def evaluate(self, step: int, network: QNetwork, envs: gym.vector.VectorEnv, episodes: int,
                 interrupted: Sequence[int]) -> Evaluation | None:
        """Evaluate, log, and keep the network if none was better."""
        # Other episodes each time, so that the verdict does not replay those that a run was stopped for.
        began, seed = time.perf_counter(), derive_seed(self.args.seed, EVAL_ENVS, len(self.evaluations))
        result = evaluate(network, envs, episodes, seed, self.args.gamma, self.args.eval_max_steps, interrupted)
        if result is not None:
            check_finite(step, FAULTY, evaluation=result.returns)
            mean, length, q_bias = (float(values.mean()) for values in result)
            self.scalars(step, {"eval/episodic_return": mean, "eval/episodic_length": length, "eval/q_bias": q_bias})
            self.writer.flush()
            tqdm.write(f"step {step:,}: greedy return {mean:.1f} ± {result.returns.std():.1f} over {episodes} episodes")
            sys.stdout.flush()
            self.evaluations.append((step, mean))
            if mean >= self.best_return:
                self.best_step, self.best_return, self.best_network = step, mean, copy.deepcopy(network)
                if self.args.save_model:
                    partial = self.run_dir / "model.tmp"
                    torch.save({"args": dataclasses.asdict(self.args), "q_network": network.state_dict()}, partial)
                    partial.replace(self.run_dir / "model.pt")  # so that the file is always whole
        self.paused += time.perf_counter() - began
        return result

    def verdict(self, step: int, speed: float, final: Evaluation | None) -> None:
        """Print how the run ended; `final` are the greedy episodes at the end, None after an interrupt."""
        words = {"steps": f"{step:,} in {time.perf_counter() - self.started:,.1f} s, training at {speed:,.0f} steps/s",
                 "interrupted": "so no greedy episodes at the end"}
        if final is not None:
            mean, spread, low, high = (getattr(final.returns, name)() for name in ("mean", "std", "min", "max"))
            text = f"{mean:.1f} ± {spread:.1f}, from {low:.1f} to {high:.1f}, over {FINAL_EPISODES} greedy episodes"
            words = {"steps": words["steps"], "final return": text}
        if self.evaluations:
            words["best return"] = f"{self.best_return:.1f}, evaluated at step {self.best_step:,}"
        words |= {name: self.run_dir / name for name in ("model.pt", "videos") if (self.run_dir / name).exists()}
        words |= {"run folder": self.run_dir, "look at it": f"tensorboard --logdir {self.run_dir.parent}"}
        print("\n".join(f"{name:14}{text}" for name, text in words.items()), flush=True)


def describe(args: Args) -> str:
    """The settings in force, by section; a star marks those that TUNED brought."""
    tuned = TUNED.get(args.env_id, {}) if args.tuned else {}
    lines = []
    for section in SECTIONS:
        names = (field.name for field in dataclasses.fields(section))
        words = ", ".join(flag(args, n)[2:] + "*" * ((n, getattr(args, n)) in tuned.items()) for n in names)
        lines.append(textwrap.fill(f"{section.__name__.lower():14}{words}", 110, subsequent_indent=" " * 14,
                                   break_on_hyphens=False))
    return "\n".join(lines)


def create_run_dir(args: Args) -> Path:
    """Make a folder under runs/, its own even if another run starts in this second; UsageError if that fails."""
    name = re.sub(r"[^\w.=+-]", "-", f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}")
    try:
        Path("runs").mkdir(exist_ok=True)
        for suffix in itertools.chain([""], map("_{}".format, itertools.count(2))):
            with contextlib.suppress(FileExistsError):
                (run_dir := Path("runs", name + suffix)).mkdir()
                return run_dir
    except OSError as error:
        place = Path("runs").absolute()
        raise UsageError(f"cannot write to {place}: {error.strerror}; start where runs/ can be written") from None


@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list, so that a run can end in order; a second one ends it at once."""
    received: list[int] = []
    owner = os.getpid()

    def receive(signum: int, frame: Any) -> None:
        if os.getpid() != owner:  # an environment's process: ends with ours, or when it is told to
            if signum == signal.SIGTERM:
                raise SystemExit
            return
        if received:
            raise KeyboardInterrupt
        received.append(signum)

    in_main = threading.current_thread() is threading.main_thread()  # only there does Python set handlers
    previous = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM) if in_main}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


FAULTY = "the environment returned NaN or infinity"


def check_finite(step: int, reason: str, **values: np.ndarray | float) -> None:
    """Raise TrainingError if one of the values is NaN or infinite."""
    for name, value in values.items():
        if np.count_nonzero(np.isfinite(value)) < np.size(value):  # half the time of all()
            raise TrainingError(f"{name} not finite at step {step:,}: {reason}")


@dataclass
class Result:
    """What `train` returns."""

    run_dir: Path
    global_step: int  # environment steps taken
    evaluations: list[tuple[int, float]]  # (step, mean greedy return), the verdict last
    final_returns: np.ndarray  # of the verdict's greedy episodes
    best_return: float  # highest mean among the evaluations
    steps_per_second: float  # of training, evaluations not counted


def train(args: Args) -> Result:
    """Run one experiment: train, evaluate, report.

    Raises:
        UsageError: a setting cannot work; nothing was written.
        TrainingError: observations, rewards or the loss stopped being finite.
        KeyboardInterrupt, SystemExit: SIGINT or SIGTERM came; the run ended in order before.
    """
    validate(args)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    with contextlib.ExitStack() as stack:
        interrupted = stack.enter_context(caught_signals())
        envs = make_envs(args, args.num_envs)
        stack.callback(envs.close, timeout=5)  # seconds for processes that hang
        if args.capture_video and "rgb_array" not in envs.metadata.get("render_modes", ()):
            raise UsageError(f"{flag(args, 'capture_video')}: {args.env_id} does not render to rgb_array; leave it out")
        # One environment an episode, where that does not mean as many processes.
        count = min(args.eval_episodes, FINAL_EPISODES if args.vectorization != "async" else args.num_envs)
        eval_envs = make_envs(args, count)
        stack.callback(eval_envs.close, timeout=5)
        learner = Learner(args, envs, device)
        if learner.parameters.numel() * args.batch_size < 2**24:  # too little work for one core to share it
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(1)
        run_dir = create_run_dir(args)
        print(describe(args), f"run folder    {run_dir}", sep="\n", flush=True)
        report = stack.enter_context(contextlib.closing(Report(args, run_dir)))

        global_step, learning_rate, first_action = 0, args.learning_rate, envs.single_action_space.start
        observations, _ = envs.reset(seed=derive_seed(args.seed, TRAIN_ENVS))
        learner.replay.reset(observations)
        check_finite(global_step, FAULTY, observations=learner.replay.newest)
        returns, lengths = np.zeros(args.num_envs), np.zeros(args.num_envs, int)
        ended = np.zeros(args.num_envs, bool)
        while global_step < args.total_timesteps and not interrupted:
            decay_steps = args.exploration_fraction * args.total_timesteps
            epsilon = linear_schedule(args.start_e, args.end_e, decay_steps, global_step)
            actions = learner.act(learner.replay.newest, epsilon)
            observations, rewards, terminated, truncated, _ = envs.step(actions + first_action)
            global_step += args.num_envs
            learner.replay.add(actions, rewards, terminated, truncated, observations)
            check_finite(global_step, FAULTY, observations=learner.replay.newest, rewards=rewards)
            report.bar.update(args.num_envs)

            returns += rewards
            lengths += 1
            if np.count_nonzero(ended):
                returns[ended] = lengths[ended] = 0  # there the step was a reset
            ended = terminated | truncated
            for i in np.flatnonzero(ended) if np.count_nonzero(ended) else ():
                report.recent.append(returns[i])
                report.scalars(global_step, dict(zip(EPISODE_TAGS, (returns[i], lengths[i]), strict=True)))

            # The steps of this pass one by one, so that learning keeps its ratio to acting, and its order, for any N.
            for step in range(global_step - args.num_envs + 1, global_step + 1):
                if step > args.learning_starts and due(args.train_frequency, step):
                    if args.anneal_lr:
                        learning_rate = linear_schedule(args.learning_rate, 0.0, args.total_timesteps, step)
                    for _ in range(args.gradient_steps):
                        learner.gradient_step(learning_rate)
                if due(args.target_network_frequency, step):
                    sync_target(learner.target_parameters, learner.parameters.data, args.tau)

            if due(args.log_frequency, global_step, args.num_envs) or global_step >= args.total_timesteps:
                diagnostics = learner.diagnostics()
                diverged = "learning diverged; lower --learning-rate or set --max-grad-norm"
                check_finite(global_step, diverged, loss=diagnostics.get("losses/td_loss", 0.0))
                report.progress(global_step, epsilon, learning_rate, diagnostics)
            if due(args.eval_frequency, global_step, args.num_envs) and global_step < args.total_timesteps:
                report.evaluate(global_step, learner.q_network, eval_envs, args.eval_episodes, interrupted)
                if report.best_return >= args.stop_return:
                    break

        speed = report.steps_per_second(global_step)
        report.bar.close()
        final = report.evaluate(global_step, learner.q_network, eval_envs, FINAL_EPISODES, interrupted)
        if args.capture_video and final is not None:
            with contextlib.closing(make_envs(args, 1, run_dir / "videos")) as video_envs:
                seed = derive_seed(args.seed, VIDEO)
                evaluate(report.best_network, video_envs, VIDEO_EPISODES, seed, args.gamma, args.eval_max_steps,
                         interrupted)
        report.verdict(global_step, speed, final)
    if interrupted:
        raise KeyboardInterrupt if interrupted[0] == signal.SIGINT else SystemExit(128 + interrupted[0])
    return Result(run_dir, global_step, report.evaluations, final.returns, report.best_return, speed)


def parse_args(argv: Sequence[str] | None = None) -> Args:
    """Settings from a command line; UsageError for an unknown flag or a value of the wrong type."""
    sections = dataclasses.make_dataclass("Sections", [(s.__name__.lower(), s) for s in SECTIONS])
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            chosen, _ = tyro.cli(Environment, args=argv, return_unknown_args=True, add_help=False)
            defaults = Args(env_id=chosen.env_id, tuned=chosen.tuned)
            parts = [s(**{f.name: getattr(defaults, f.name) for f in dataclasses.fields(s)}) for s in SECTIONS]
            shown = f"the TUNED settings of {chosen.env_id}" if chosen.tuned and chosen.env_id in TUNED else "plain DQN"
            parsed = tyro.cli(sections, args=argv, default=sections(*parts), config=(tyro.conf.OmitArgPrefixes,),
                              description=f"Train a deep Q-network. Defaults shown are those of {shown}.")
    except SystemExit as end:
        if not end.code:
            raise
        plain = re.sub(r"\x1b\[[\d;]*m", "", complaint.getvalue())  # without colours
        lines = [line.strip("│ ") for line in plain.splitlines() if line.startswith("│")]
        text = " ".join(itertools.takewhile(lambda line: not line.startswith("──"), lines))
        raise UsageError(f"{text.rstrip(' .')}; see --help") from None
    return Args(**{name: value for section in vars(parsed).values() for name, value in vars(section).items()})


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: exit status 2 for settings that cannot work, 1 for a failed run, 130 after Ctrl-C."""
    try:
        train(parse_args(argv))
    except (UsageError, TrainingError) as error:
        print(f"dqn.py: error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
