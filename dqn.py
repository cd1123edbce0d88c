"""Deep Q-Network (DQN) in one file, to be read from top to bottom.

    python dqn.py --env-id CartPole-v1                      # train, evaluate, leave a run under runs/
    python dqn.py --env-id LunarLander-v3 --capture-video   # the same with an mp4 of greedy episodes
    python dqn.py --env-id CartPole-v1 --no-tuned           # with what an unknown environment gets
    python dqn.py --env-id ALE/Pong-v5                      # from pixels
    python dqn.py --resume runs/NAME                        # go on with a run that was stopped, to the bit
    python dqn.py --evaluate runs/NAME                      # let its best network play
    torchrun --standalone --nproc-per-node 2 dqn.py         # the same run by two processes, with a GPU each
    tensorboard --logdir runs                               # look at it

A Q-network learns Q(s, a), the discounted return of taking action a in state s and acting greedily from there on,
by regression on a TD target that an older copy of itself, the target network, computes:

    td_target = r + gamma * max_a' Q_target(s', a')

Papers, cited by their first author below: Watkins & Dayan 1992, "Q-learning"; Mnih et al. 2015, "Human-level control
through deep reinforcement learning" (DQN); van Hasselt et al. 2016, "Deep reinforcement learning with Double
Q-learning"; Wang et al. 2016, "Dueling network architectures"; Sutton 1988, "Learning to predict by the methods of
temporal differences" (n-step returns); Lillicrap et al. 2016, "Continuous control with deep reinforcement learning"
(soft target updates); Pardo et al. 2018, "Time limits in reinforcement learning" (truncation is not termination);
Young & Tian 2019, "MinAtar" (a network for small images).
"""

import os
import signal

if __name__ == "__main__":  # a signal during the slow imports, or a second one later, ends the script without a word
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, lambda number, frame: os._exit(128 + number))

import contextlib
import copy
import dataclasses
import difflib
import functools
import importlib.util
import io
import itertools
import math
import pickle
import re
import shlex
import shutil
import socket
import sys
import textwrap
import threading
import time
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, Self

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.envs.registration import EnvSpec
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.optim.adam import adam
from torch.utils.tensorboard.summary import custom_scalars, hparams, text
from tqdm import tqdm

with contextlib.suppress(ImportError):  # not on Windows, where a run folder goes without a lock
    import fcntl

FINAL_EPISODES = 100  # greedy episodes behind the verdict
VIDEO_EPISODES = 3
JOURNAL_PASSES = 10_000  # steps of each environment that a resumed run may have to repeat; tenfold for long episodes
FORMAT = 1  # of checkpoint.pt and model.pt; a file with a higher one comes from a newer dqn.py
CHECKPOINT, PREVIOUS, MODEL = "checkpoint.pt", "checkpoint.previous.pt", "model.pt"
PATIENCE = timedelta(minutes=30)  # that a rank waits for another one: longer than a round of an evaluation takes
NATIVE_FROM = 5  # environments from which Gymnasium's vectorised CartPole outruns SyncVectorEnv (measured)


class UsageError(ValueError):
    """A setting that cannot work. The message names the flag, its value and what would be right."""


class TrainingError(RuntimeError):
    """A run that cannot go on, or left something unwritten."""


@dataclass(kw_only=True)
class Environment:
    """What is learned, and for how long."""

    env_id: str = "CartPole-v1"  # Gymnasium id; 'module:Id-v0' for an environment that a module registers
    tuned: bool = True  # begin with what TUNED holds for this environment; flags given still win
    total_timesteps: int = 500_000  # environment steps of the whole run, over all environments
    num_envs: int = 1  # environments stepped side by side
    vectorization: Literal["auto", "sync", "async", "native"] = "auto"  # in turn, in processes, or by their own code
    seed: int = 1  # seed of every random generator: one seed, one machine, one result
    frame_stack: int = 1  # newest frames that make up an observation; before an episode's first frame they are zero
    clip_rewards: bool = False  # learn from rewards clipped to [-1, 1]; returns are reported as they are
    sticky_actions: float = 0.25  # Atari: probability, in each of a step's four frames, to repeat the action before
    episodic_life: bool = False  # Atari: learn that a lost life ends the future; episodes stay whole games
    full_action_space: bool = False  # Atari: all 18 actions instead of those that the game uses


@dataclass(kw_only=True)
class Learning:
    """Replay buffer, TD target and optimiser. Frequencies count environment steps."""

    learning_rate: float = 1e-3  # step size of Adam
    anneal_lr: bool = True  # let the learning rate fall linearly to zero over the run
    buffer_size: int = 100_000  # transitions that the replay buffer holds
    learning_starts: int = 2_000  # steps before the first gradient step
    batch_size: int = 128  # transitions in a gradient step
    train_frequency: int = 10  # steps between two train events
    gradient_steps: int = 1  # gradient steps in a train event
    gamma: float = 0.99  # discount factor
    n_step: int = 1  # rewards summed before the TD target bootstraps
    double_q: bool = True  # the online network picks the action that the target network rates (Double DQN)
    target_network_frequency: int = 500  # steps between two updates of the target network
    tau: float = 1.0  # share of the online network in such an update; 1 is a hard copy
    loss: Literal["mse", "huber"] = "mse"  # between Q(s, a) and the TD target
    max_grad_norm: float = 0.0  # longer gradients are scaled down to this length, 0 = never


@dataclass(kw_only=True)
class Network:
    """The Q-network."""

    hidden_sizes: tuple[int, ...] = (120, 84)  # units of the hidden layers; with none Q is linear, or a table
    dueling: bool = False  # state value and advantages from separate outputs
    layer_norm: bool = True  # LayerNorm before each activation


@dataclass(kw_only=True)
class Exploration:
    """Epsilon-greedy acting: epsilon falls linearly, then stays."""

    start_e: float = 1.0  # epsilon at the first step
    end_e: float = 0.05  # epsilon at the end of the decay
    exploration_fraction: float = 0.2  # share of total-timesteps that the decay takes


@dataclass(kw_only=True)
class Reporting:
    """What is measured, shown and kept."""

    eval_frequency: int = 25_000  # steps between two greedy evaluations, 0 = only at the end
    eval_episodes: int = 20  # episodes of such an evaluation; the verdict at the end always plays 100
    eval_max_steps: int = 10_000  # steps after which a greedy episode is cut, should the environment have no limit
    stop_return: float = math.inf  # end the run once a greedy evaluation reaches this mean return
    log_frequency: int = 1_000  # steps between two entries of losses and diagnostics in TensorBoard
    checkpoint_frequency: int = 10_000  # steps between two checkpoints, from which --resume goes on, 0 = none
    checkpoint_replay: bool = True  # the replay buffer is part of them; without it a resumed run is not the same
    save_model: bool = True  # write model.pt: the best network by greedy evaluation, and these settings
    capture_video: bool = False  # record greedy episodes of the best network as mp4 at the end
    exp_name: str = Path(__file__).stem  # part of the run folder's name
    track: bool = False  # mirror TensorBoard to Weights & Biases (pip install wandb)
    wandb_project_name: str = "dqn"  # project there
    wandb_entity: str | None = None  # team there
    cuda: bool = True  # use a GPU where there is one
    compile: bool = torch.cuda.is_available()  # compile the gradient; on a GPU it becomes one CUDA graph
    amp: bool = False  # compute all layers but the last in bfloat16
    torch_deterministic: bool = True  # have cuDNN use deterministic kernels only


@dataclass(kw_only=True)
class Existing:
    """A run that exists: go on with it, or watch it. Its own settings hold."""

    resume: str | None = None  # run folder to go on in, from its checkpoint; auto = the newest of this run, if any
    evaluate: str | None = None  # run folder whose network plays --eval-episodes, instead of training
    which: Literal["best", "last"] = "best"  # the network that plays: model.pt's or the checkpoint's
    render: bool = False  # show it in a window as it plays


@dataclass(kw_only=True)
class Args(Existing, Reporting, Exploration, Network, Learning, Environment):
    """All settings of a run. A value that is given wins, then TUNED for its env_id, then the plain default."""

    def __new__(cls, **given: Any) -> Self:
        args = super().__new__(cls)
        args._given = frozenset(given)
        return args

    def __post_init__(self) -> None:
        for name, value in tuned_settings(self).items():
            if name not in self._given:
                setattr(self, name, value)


SECTIONS = tuple(reversed(Args.__bases__))

# By environment, or by the part of its id up to the slash.
TUNED: dict[str, dict[str, Any]] = {
    "CartPole-v1": dict(
        total_timesteps=80_000, num_envs=8, learning_rate=2e-3, buffer_size=80_000, learning_starts=1_000, gamma=0.995,
        n_step=10, double_q=False, exploration_fraction=0.3, eval_frequency=5_000, eval_episodes=1_000,
        stop_return=500.0,
    ),
    "Acrobot-v1": dict(
        total_timesteps=100_000, num_envs=8, learning_rate=6e-4, learning_starts=1_000, train_frequency=2, n_step=3,
        double_q=False, target_network_frequency=250, hidden_sizes=(256, 256), exploration_fraction=0.12,
        eval_frequency=20_000,
    ),
    "MountainCar-v0": dict(
        total_timesteps=120_000, num_envs=8, buffer_size=120_000, learning_starts=1_000, train_frequency=4, n_step=3,
        double_q=False, target_network_frequency=4, tau=0.03, loss="huber", exploration_fraction=0.1, end_e=0.0,
        eval_frequency=20_000,
    ),
    "LunarLander-v3": dict(
        total_timesteps=200_000, num_envs=8, learning_rate=2e-3, buffer_size=50_000, train_frequency=4, n_step=3,
        hidden_sizes=(256, 256), exploration_fraction=0.15, end_e=0.01, eval_frequency=20_000,
    ),
    "ALE/": dict(
        total_timesteps=10_000_000, num_envs=32, frame_stack=4, clip_rewards=True, hidden_sizes=(512,),
        layer_norm=False, learning_rate=1e-4, anneal_lr=False, buffer_size=1_000_000, learning_starts=50_000,
        train_frequency=16, target_network_frequency=8_000, n_step=3, loss="huber", max_grad_norm=10.0,
        exploration_fraction=0.1, end_e=0.01, eval_frequency=250_000, eval_episodes=16, eval_max_steps=27_000,
        checkpoint_frequency=500_000,
    ),
}

# What may be changed for a run that exists; anything else would be another experiment.
OVERRIDES = {
    "resume": ("total_timesteps", "checkpoint_frequency", "checkpoint_replay", "eval_frequency", "eval_episodes",
               "eval_max_steps", "stop_return", "log_frequency", "save_model", "capture_video", "cuda", "compile",
               "track", "wandb_project_name", "wandb_entity"),
    "evaluate": ("evaluate", "which", "render", "seed", "eval_episodes", "eval_max_steps", "vectorization",
                 "capture_video", "cuda", "compile"),
}

# (what is right, its test, the settings it holds for)
LIMITS = (
    ("must be at least 1", lambda v: v >= 1,
     ("total_timesteps", "num_envs", "frame_stack", "buffer_size", "batch_size", "train_frequency", "gradient_steps",
      "n_step", "target_network_frequency", "eval_episodes", "eval_max_steps", "log_frequency")),
    ("must be 0 or more", lambda v: v >= 0,
     ("seed", "learning_starts", "eval_frequency", "checkpoint_frequency", "max_grad_norm")),
    ("must lie in [0, 1]", lambda v: 0 <= v <= 1,
     ("gamma", "start_e", "end_e", "exploration_fraction", "sticky_actions")),
    ("must lie in (0, 1]", lambda v: 0 < v <= 1, ("tau",)),
    ("must be a finite number above 0", lambda v: 0 < v < math.inf, ("learning_rate",)),
    ("must be a number above -inf", lambda v: v > -math.inf, ("stop_return",)),
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


def tuned_settings(args: Environment) -> dict[str, Any]:
    """What TUNED holds for the environment; nothing where it is not to be used."""
    name = args.env_id.rpartition(":")[2]
    return (TUNED.get(name) or TUNED.get(name.partition("/")[0] + "/") or {}) if args.tuned else {}


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
    for name, other, right, holds in RELATIONS:
        if not holds(getattr(args, name), getattr(args, other)):
            raise UsageError(f"{flag(args, name)}: {right} {flag(args, other)}")
    for name in ("sticky_actions", "episodic_life", "full_action_space"):
        if getattr(args, name) != getattr(Environment, name) and "ALE/" not in args.env_id:
            raise UsageError(f"{flag(args, name)}: only Atari games (ALE/...) have this; leave it out")
    for name, module in (("track", "wandb"), ("capture_video", "moviepy")):
        found = importlib.util.find_spec(module)
        if getattr(args, name) and (found is None or found.origin is None):  # without origin: a mere folder
            raise UsageError(f"{flag(args, name)}: {module} is not installed; pip install {module}")
    ranks = Ranks(args.cuda)
    if args.evaluate is not None and ranks.size > 1:
        raise UsageError(f"{flag(args, 'evaluate')}: needs one process only; start it without torchrun")
    for name in ("num_envs", "buffer_size", "batch_size"):
        if getattr(args, name) % ranks.size:
            raise UsageError(f"{flag(args, name)}: must be a multiple of {ranks.size}, the number of ranks")
    if ranks.device.type == "cuda" and ranks.here > torch.cuda.device_count():
        raise UsageError(f"--cuda: {ranks.here} ranks, {torch.cuda.device_count()} GPUs here; start one rank for each, "
                         "or add --no-cuda")
    blind = sys.platform == "linux" and not os.environ.keys() & {"DISPLAY", "WAYLAND_DISPLAY"}
    for wrong, reason in ((args.evaluate is None, "shows a trained network; must come with --evaluate"),
                          (args.capture_video, "cannot go with --capture-video; do one after the other"),
                          (blind, "there is no display here; --capture-video makes an mp4 instead")):
        if args.render and wrong:
            raise UsageError(f"--render: {reason}")


class Ranks:
    """The processes that torchrun started for this run, each with a share of it; without torchrun, this one alone.

    All of them go through the same calls in the same order. Raises TrainingError where another one has ended, or has
    hung for as long as PATIENCE.
    """

    def __init__(self, cuda: bool = False) -> None:
        started = distributed.is_available() and distributed.is_torchelastic_launched()
        names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}  # local: on this machine
        self.rank, self.size, self.place, self.here = (int(os.environ[name]) if started else alone
                                                       for name, alone in names.items())
        self.path = (self.rank,) if self.rank else ()  # to derive_seed: each rank has its own streams
        self.device = torch.device("cuda" if cuda and torch.cuda.is_available() else "cpu")
        self.spans: list[tuple[Any, Any]] = []  # beginning and end of each averaging that `seconds` lacks
        self.total = 0.0
        self.asked, self.asked_step, self.next_step = time.perf_counter(), math.inf, 0.0  # of `stopping`

    def __enter__(self) -> Self:
        if self.size > 1:
            with self.together():  # by gloo for what is on the CPU, by NCCL on GPUs
                distributed.init_process_group(store=self.meet(), rank=self.rank, world_size=self.size,
                                               timeout=PATIENCE)
        return self

    def meet(self) -> "distributed.Store":
        """A store of these processes only: torchrun's own outlives those that it starts again, with all they wrote.

        A rank gives itself a name that was never used and waits to be welcomed under it; rank 0 welcomes whoever is
        named, also those long gone, until all have answered.
        """
        store, name = next(distributed.rendezvous("env://", timeout=PATIENCE))[0], uuid.uuid4().hex
        if self.rank:
            store.set(f"here/{self.rank}", name)
            group = store.get(f"welcome/{name}").decode()
            store.set(f"joined/{group}/{self.rank}", name)
            return distributed.PrefixStore(group, store)
        others, deadline = set(range(1, self.size)), time.monotonic() + PATIENCE.total_seconds()
        while others := {rank for rank in others if not store.check([f"joined/{name}/{rank}"])}:
            for rank in others:
                if store.check([f"here/{rank}"]):
                    store.set(f"welcome/{store.get(f'here/{rank}').decode()}", name)
            if time.monotonic() > deadline:
                raise RuntimeError(f"ranks {others} did not come")
            time.sleep(0.01)
        return distributed.PrefixStore(name, store)

    def __exit__(self, kind: type | None, *error: object) -> None:
        if self.size > 1 and kind is None:
            distributed.destroy_process_group()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Around what needs all ranks."""
        try:
            yield
        except RuntimeError as error:
            raise TrainingError(f"another rank has ended or hangs: {error!s:.200}") from None

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        """Around what may raise UsageError: where one rank does, all do."""
        own = None
        try:
            yield
        except UsageError as error:
            own = error
        for reason in filter(None, self.gather(own and str(own))):
            raise own if str(own) == reason else UsageError(reason)

    def gather(self, value: Any) -> list[Any]:
        """What each rank gave, the same list on all."""
        values = [value]
        if self.size > 1:
            values = [None] * self.size
            with self.together():
                distributed.all_gather_object(values, value)
        return values

    def stopping(self, received: list[int], step: int | None = None) -> bool:
        """Whether one of the ranks has received a signal; then all of them have.

        With `step`, how far training is, they ask each other about once a second: in the same step, since all know how
        long the slowest took for the last ones.
        """
        if self.size == 1:
            return bool(received)
        if step is not None and step < self.next_step:
            return False
        now = time.perf_counter()
        signals, seconds = zip(*self.gather((received[:1], now - self.asked)), strict=True)
        received += max(signals)
        if step is not None:
            self.next_step = step + max((step - self.asked_step) / max(seconds), 0)
            self.asked, self.asked_step = now, step
        return bool(max(signals))

    def average(self, values: Tensor) -> None:
        """Replace a vector by its mean over the ranks, with the same bits on all."""
        if self.size > 1:
            start = self.now()
            with self.together():
                distributed.all_reduce(values)
            values /= self.size
            self.spans.append((start, self.now()))

    def now(self) -> Any:
        """A moment: on the clock, or on a GPU in the queue of its work."""
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @property
    def seconds(self) -> float:
        """Spent on averaging, with waiting for the others."""
        for start, end in self.spans:
            if self.device.type == "cuda":
                end.synchronize()
            self.total += end - start if self.device.type == "cpu" else start.elapsed_time(end) / 1000
        self.spans = []
        return self.total


def derive_seed(seed: int, *path: int) -> int:
    """A seed below 2^31 for one purpose of a run; different paths and different run seeds give unrelated streams."""
    return int(np.random.SeedSequence((seed, *path)).generate_state(1)[0] >> 1)


TRAIN_ENVS, EVAL_ENVS, NETWORK, REPLAY, ACTIONS, PROBE, VIDEO, PLAY = range(8)  # the purposes


def find_environment(args: Args) -> EnvSpec:
    """What Gymnasium knows of the environment, once the package that registers it is imported.

    Raises UsageError where the id is unknown, or its package is not installed.
    """
    module, _, env_id = args.env_id.rpartition(":")
    named = flag(args, "env_id")
    try:
        if module or env_id.startswith("ALE/"):
            importlib.import_module(module or "ale_py")  # registers its environments
        return gym.spec(env_id)
    except ImportError as error:
        raise UsageError(f"{named}: {error}; name a module that is installed") from None
    except gym.error.Error as error:
        near = difflib.get_close_matches(env_id, gym.registry, n=1)
        reason = f"did you mean {':'.join(filter(None, (module, near[0])))}?" if near else str(error)
        raise UsageError(f"{named}: no such environment; {reason}") from None


def make_envs(args: Args, num_envs: int, video: Path | None = None, render: bool = False) -> gym.vector.VectorEnv:
    """Create `num_envs` environments that step together: observations (N, *shape), actions (N,).

    Spaces other than Box pass through Gymnasium's FlattenObservation; a stack of frames is (N, frames, *shape). Atari
    games are ale-py's own vectors: gray, 84 x 84, the maximum of two frames, each action for four frames, 1 to 30
    no-ops at the start. With `video`, the beginning of the files' names, every episode is recorded; with `render` it is
    shown in a window.

    Raises UsageError where the id is unknown, something is not installed, or DQN cannot learn the environment.
    """
    spec, named, spaces, own_process = find_environment(args), flag(args, "env_id"), gym.spaces, os.getpid()

    def wrap(env: gym.Env) -> gym.Env:
        if os.getpid() != own_process:  # a signal to all must not end an environment's process before us
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
        if video:
            env = gym.wrappers.RecordVideo(env, str(video.parent), lambda episode: True, name_prefix=video.name)
        if atari:  # the same to the bit as ale-py's vectors
            env = gym.wrappers.AtariPreprocessing(env)
        if not isinstance(env.observation_space, spaces.Box):
            env = gym.wrappers.FlattenObservation(env)
        stacked = args.frame_stack > 1 or atari
        return gym.wrappers.FrameStackObservation(env, args.frame_stack, padding_type="zero") if stacked else env

    native = str(spec.vector_entry_point)
    atari = native.startswith("ale_py.")
    settings: dict[str, Any] = {"render_mode": "human" if render else "rgb_array"} if render or video else {}
    mode = "sync" if settings else args.vectorization
    if mode == "auto":  # another package's own version may be another environment, with other observations
        known = native.startswith("gymnasium.") and args.frame_stack == 1 and num_envs >= NATIVE_FROM
        mode = "native" if atari or known else "sync"
    if mode == "native" and (spec.vector_entry_point is None or (args.frame_stack > 1 and not atari)):
        stacks = " that stacks frames" * (args.frame_stack > 1)
        raise UsageError(f"{flag(args, 'vectorization')}: {spec.id} has no vectorised version{stacks}; "
                         "use sync, async or auto")
    if atari:
        settings |= {"repeat_action_probability": args.sticky_actions, "full_action_space": args.full_action_space}
        settings |= {"frameskip": 1} if mode != "native" else {
            "stack_num": args.frame_stack, "reward_clipping": False, "use_fire_reset": False}
    if spec.id.startswith("CarRacing-"):
        settings["continuous"] = False  # it has discrete actions, too
    try:
        if mode == "native":
            envs = gym.make_vec(spec.id, num_envs, vectorization_mode="vector_entry_point", **settings)
            if not isinstance(envs.single_observation_space, spaces.Box):
                envs = gym.wrappers.vector.FlattenObservation(envs)
        else:
            # The replay buffer copies what it is given, so the environments need not.
            envs = gym.make_vec(spec.id, num_envs, vectorization_mode=mode, vector_kwargs={"copy": False},
                                wrappers=[wrap], disable_env_checker=True, **settings)
    except (gym.error.DependencyNotInstalled, ImportError) as error:
        raise UsageError(f"{named}: {' '.join(str(error).split())}; install what is missing") from None

    if mode == "async":
        envs.close = functools.partial(envs.close, timeout=2)  # seconds for a process that hangs
        for process in envs.processes:
            process.terminate = process.kill
    actions, observations = envs.single_action_space, envs.single_observation_space
    autoreset = envs.metadata.get("autoreset_mode")
    for wrong, fault in (
        (not isinstance(actions, spaces.Discrete), f"DQN needs a Discrete action space, this one is {actions}"),
        (not isinstance(observations, spaces.Box), f"observations {observations} cannot be flattened to numbers"),
        (autoreset != gym.vector.AutoresetMode.NEXT_STEP,
         f"resets itself in mode {autoreset}; only AutoresetMode.NEXT_STEP keeps the stream of transitions whole"),
    ):
        if wrong:
            envs.close()
            raise UsageError(f"{named}: {fault}")
    return envs


# Smallest side of an image -> channels, kernel and stride of each convolution: Mnih's, and Young & Tian's for MinAtar.
CONVOLUTIONS = {36: ((32, 8, 4), (64, 4, 2), (64, 3, 1)), 3: ((16, 3, 1),)}

class QNetwork(nn.Module):
    """Q(s, ·) as a multi-layer perceptron, for images on top of convolutions.

    Images are observations of uint8 or bool with two or three dimensions, channels first or last, or stacks of them.
    Bytes are scaled to [0, 1], and entries bounded by less than 0.1 to [-1, 1]: MountainCar's velocity, at most 0.07,
    would hardly count otherwise. Without hidden layers Q is linear in what comes before. `dueling` reads a state value
    V and advantages A from the last layer, Q = V + A - mean(A) (Wang, equation 9).
    """

    def __init__(self, space: gym.spaces.Box, num_actions: int, hidden_sizes: Sequence[int] = (120, 84),
                 dueling: bool = False, layer_norm: bool = False, frame_stack: int = 1, amp: bool = False) -> None:
        super().__init__()
        self.dueling, self.amp = dueling, amp
        frame, inputs, convolutions = space.shape[frame_stack > 1 :], math.prod(space.shape), ()
        self.channels_last, self.image = len(frame) == 3 and frame[-1] <= frame[0], None
        if space.dtype in (np.uint8, np.bool_) and len(frame) in (2, 3):
            height, width = frame[:2] if self.channels_last else frame[-2:]
            channels = inputs // (height * width)
            convolutions = next((c for side, c in CONVOLUTIONS.items() if side <= min(height, width)), ())
            self.image = (channels, height, width) if convolutions else None

        bounds = np.maximum(*(np.abs(bound.astype(np.float32)).flatten() for bound in (space.low, space.high)))
        bounds = bounds.max() if space.dtype == np.uint8 else np.where((bounds > 0) & (bounds < 0.1), bounds, 1)
        self.register_buffer("scale", torch.tensor(1 / bounds, dtype=torch.float32), persistent=False)
        self.scaled = bool((self.scale != 1).any())

        layers: list[nn.Module] = []
        for outputs, kernel, stride in convolutions:
            norm = [nn.GroupNorm(1, outputs)] if layer_norm else []
            layers += [nn.Conv2d(channels, outputs, kernel, stride), *norm, nn.ReLU()]
            channels, height, width = outputs, (height - kernel) // stride + 1, (width - kernel) // stride + 1
            inputs = channels * height * width
        layers += [nn.Flatten()] if convolutions else []
        for outputs in hidden_sizes:
            layers += [nn.Linear(inputs, outputs), *([nn.LayerNorm(outputs)] if layer_norm else []), nn.ReLU()]
            inputs = outputs
        self.layers, self.output = nn.Sequential(*layers), nn.Linear(inputs, num_actions + dueling)

    def forward(self, observations: Tensor) -> Tensor:
        """Action values (B, actions) of a batch of observations (B, *shape) of any dtype."""
        if self.image is None:
            x = observations.reshape(len(observations), -1).float()
        else:
            x = observations.movedim(-1, -3) if self.channels_last else observations
            x = x.reshape(len(x), *self.image)
            x = x.to(torch.float32, memory_format=torch.channels_last)  # a third faster on a CPU
        if self.scaled:
            x = x * self.scale
        with torch.autocast(x.device.type, torch.bfloat16) if self.amp else contextlib.nullcontext():
            for layer in self.layers:
                x = layer.forward(x)  # calling the layer itself would look for hooks: a third of the time to act
        x = self.output.forward(x.float())
        return x[:, :1] + x[:, 1:] - x[:, 1:].mean(1, keepdim=True) if self.dueling else x


def make_network(args: Args, space: gym.spaces.Box, num_actions: int) -> QNetwork:
    """The Q-network that the settings describe."""
    return QNetwork(space, num_actions, args.hidden_sizes, args.dueling, args.layer_norm, args.frame_stack, args.amp)


def flatten_parameters(module: nn.Module) -> Tensor:
    """Move a module's parameters into one vector and return it; the module goes on with views into it.

    Adam, a target update and a norm become one operation each instead of one per layer.
    """
    flat = nn.utils.parameters_to_vector(module.parameters()).detach()
    nn.utils.vector_to_parameters(flat, module.parameters())
    return flat


class Adam:
    """The optimiser of Kingma & Ba 2015 (algorithm 1) for one vector of parameters.

    PyTorch's function in one pass; the first step of its class torch.optim.Adam imports the compiler (1.4 s).
    """

    STATE = ("steps", "mean", "square")

    def __init__(self, parameters: Tensor) -> None:
        self.parameters, self.steps = parameters, torch.zeros((), device=parameters.device)
        self.mean, self.square = torch.zeros_like(parameters), torch.zeros_like(parameters)

    def step(self, gradient: Tensor, learning_rate: Tensor) -> None:
        """Move the parameters against the gradient."""
        adam([self.parameters], [gradient], [self.mean], [self.square], [], [self.steps], fused=True, lr=learning_rate,
             beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, amsgrad=False, maximize=False)


class Batch(NamedTuple):
    """B sampled transitions; with n-step returns, `rewards` and `discounts` span the m <= n steps that were walked."""

    observations: Tensor  # (B, *shape); from ReplayBuffer.index the slots that hold them, (B,) or (B, frames)
    actions: Tensor  # (B,) int64, from 0
    rewards: Tensor  # (B,) r_0 + gamma r_1 + ... + gamma^(m-1) r_(m-1)
    next_observations: Tensor  # the same, m steps after observations
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
    return min(limits) / Ranks().here  # which share it


class ReplayBuffer:
    """The last `capacity` transitions, kept as the stream of time steps they came in.

    A ring of rows (time) by N environments holds every frame once: the successor of a row is the next row, and a stack
    is put together from the rows before. Under NEXT_STEP autoreset the row after an episode's end holds the final
    observation, and the step from there only resets the environment: such reset steps stay in the stream and are never
    sampled. The newest row is an observation whose step is still to come. Arrays are flat, slot = row * N +
    environment. Frames are on the device that learns, if they fit there. The rest is NumPy's, because on a CPU an
    operation on a batch of indices costs PyTorch several times as much.

    Raises UsageError before anything is allocated if memory does not suffice.
    """

    STATE = ("row", "filled", "frames", "actions", "rewards", "terminated", "ended")

    def __init__(self, capacity: int, num_envs: int, observation_space: gym.spaces.Box, num_actions: int,
                 n_step: int = 1, gamma: float = 0.99, frame_stack: int = 1, clip_rewards: bool = False,
                 device: torch.device | str = "cpu") -> None:
        # Three rows of steps at least: two resets can meet, then comes a real step, so there is always one to sample.
        self.num_envs, self.num_rows = num_envs, max(math.ceil(capacity / num_envs), 3) + frame_stack
        self.num_slots, self.frame_stack, self.device = self.num_rows * num_envs, frame_stack, torch.device(device)
        self.clip_rewards = clip_rewards
        shape = observation_space.shape[frame_stack > 1 :]
        floating = np.issubdtype(observation_space.dtype, np.floating)
        frame = np.dtype(np.float32 if floating else observation_space.dtype)  # of all dtypes only floats change
        action = np.min_scalar_type(num_actions - 1)
        frame_bytes, rest_bytes = frame.itemsize * math.prod(shape), action.itemsize + 4 + 1 + 1
        place = self.device
        if place.type == "cuda" and self.num_slots * frame_bytes > 0.8 * torch.cuda.mem_get_info(place)[0]:
            place = torch.device("cpu")
        slot_bytes = rest_bytes + frame_bytes * (place.type == "cpu")
        needed, free = self.num_slots * slot_bytes, available_memory()
        if needed > free:
            most, ranks = (int(free / slot_bytes) // num_envs - frame_stack) * num_envs, Ranks().size
            raise UsageError(f"--buffer-size {capacity * ranks}: the replay buffer needs {needed / 2**30:,.1f} GiB"
                             f"{' for each rank' * (ranks > 1)}, {free / 2**30:,.1f} GiB are free; must be at most "
                             f"{most * ranks:,}")
        dtype = torch.from_numpy(np.zeros(0, frame)).dtype
        self.frames = torch.zeros((self.num_slots + (frame_stack > 1), *shape), dtype=dtype, device=place)
        self.host = self.frames.numpy() if place.type == "cpu" else None  # the same memory
        self.actions, self.rewards = np.zeros(self.num_slots, action), np.zeros(self.num_slots, np.float32)
        # terminated: the TD target does not bootstrap. ended: the next step only resets.
        self.terminated, self.ended = np.zeros((2, self.num_slots), bool)
        if frame_stack > 1:
            # The last slot stays blank: what a stack has before its episode's first frame, as row 0 will be one.
            blank = gym.wrappers.utils.create_zero_array(observation_space)[0].astype(frame)
            self.frames[-1] = torch.from_numpy(np.asarray(blank))
            self.ended[-2 * num_envs : -num_envs] = True
        self.row = 0  # of the newest observations
        self.filled = 0  # rows of complete steps, those just before `row`
        self.steps = np.arange(n_step)[:, None]  # (n, 1)
        self.strides = self.steps * num_envs
        self.ages = np.arange(frame_stack - 1, -1, -1) * num_envs  # (frames,)
        self.powers = (gamma ** np.arange(n_step + 1)).astype(np.float32)  # (n + 1,)

    def newest(self) -> Tensor:
        """The newest observations (N, *shape): those to act on."""
        first = self.row * self.num_envs
        if self.frame_stack == 1:
            return self.frames[first : first + self.num_envs].to(self.device)
        return self.look_up(torch.from_numpy(self.stack(first + np.arange(self.num_envs))))

    def used(self, name: str) -> int:
        """How many slots, from the first one on, hold something and are to be saved."""
        return min((self.filled + self.frame_stack) * self.num_envs, self.num_slots)

    def reset(self, observations: np.ndarray) -> None:
        """Begin N episodes with their first observations (N, *shape); those that were under way are truncated."""
        if self.filled:
            nothing = np.zeros(self.num_envs, bool)
            self.ended[(self.row * self.num_envs + np.arange(-self.num_envs, 0)) % self.num_slots] = True
            self.add(nothing, nothing, nothing, nothing, observations)  # a reset step
        else:
            self.put(observations)

    def put(self, observations: np.ndarray) -> None:
        """Write the newest frame of each environment, from observations (N, *shape)."""
        newest = observations if self.frame_stack == 1 else observations[:, -1]
        first = self.row * self.num_envs
        if self.host is not None:
            self.host[first : first + self.num_envs] = newest
        else:
            self.frames[first : first + self.num_envs].copy_(torch.from_numpy(newest), non_blocking=True)

    def add(self, actions: np.ndarray, rewards: np.ndarray, terminated: np.ndarray, ended: np.ndarray,
            next_observations: np.ndarray) -> None:
        """Append what the step from the newest observations brought, (N,) each, and the observations it led to."""
        here = slice(self.row * self.num_envs, (self.row + 1) * self.num_envs)
        self.actions[here], self.rewards[here] = actions, rewards
        self.terminated[here], self.ended[here] = terminated, ended
        self.row = (self.row + 1) % self.num_rows
        self.filled = min(self.filled + 1, self.num_rows - self.frame_stack)
        self.put(next_observations)

    def draw(self, size: int, rng: np.random.Generator) -> np.ndarray:
        """Uniform slots (size,) of real steps, with replacement."""
        oldest = (self.row - self.filled) * self.num_envs  # negative slots wrap around, as the ring does
        slots = rng.integers(oldest, self.row * self.num_envs, size)
        # A reset step follows an ended one. For the oldest row, the newest row tells: until its own step is added, it
        # keeps the flags of the step that came before what is now the oldest.
        while resets := np.count_nonzero(is_reset := self.ended[slots - self.num_envs]):
            slots[is_reset] = rng.integers(oldest, self.row * self.num_envs, resets)
        return slots

    def stack(self, slots: np.ndarray) -> np.ndarray:
        """Of observations (B,), the slots (B, frames) of their frames, oldest first; (B,) without stacks."""
        if self.frame_stack == 1:
            return slots
        frames = slots[:, None] - self.ages
        # An episode's first frame is two rows after the step that ended the one before. What is older is blank.
        first = self.ended.take(frames[:, 1:] - 2 * self.num_envs, mode="wrap")
        older = np.logical_or.accumulate(first[:, ::-1], axis=1)[:, ::-1]
        frames %= self.num_slots
        frames[:, :-1][older] = self.num_slots
        return frames

    def look_up(self, slots: Tensor) -> Tensor:
        """The observations (B, *shape) whose frames are in slots (B,) or (B, frames)."""
        return self.frames[slots.to(self.frames.device)].to(self.device)

    def index(self, batch_size: int, rng: np.random.Generator) -> Batch:
        """A sample that still has slots for its observations.

        Transitions are drawn uniformly from all real steps in the stream; the newest can be among them at once. From
        each, walk up to n steps and stop where the future ends or the stream does (Sutton). Truncation, and the
        stream's end, bootstrap from the observation where the walk stopped (Pardo, section 2.2).
        """
        slots = self.draw(batch_size, rng)
        walk = slots + self.strides  # (n, B)
        stops = self.ended.take(walk, mode="wrap")
        stops |= self.terminated.take(walk, mode="wrap")
        stops |= walk >= (self.row - 1) * self.num_envs  # the newest step
        stops[-1] = True
        last = stops.argmax(0)  # (B,) number of the step that each walk stops with
        rewards = self.rewards.take(walk, mode="wrap")
        if self.clip_rewards:
            np.clip(rewards, -1, 1, out=rewards)
        rewards *= self.powers[:-1, None]
        end = slots + last * self.num_envs
        arrays = (
            self.stack(slots),
            self.actions[slots].astype(np.int64),
            (rewards * (self.steps <= last)).sum(0),
            self.stack(end + self.num_envs),
            self.powers[last + 1] * ~self.terminated[end],
        )
        # Not to block: on a GPU the host would wait for all that it has launched.
        return Batch(*(torch.from_numpy(array).to(self.device, non_blocking=True) for array in arrays))

    def gather(self, index: Batch) -> Batch:
        """What `index` drew, with observations in place of their slots."""
        return index._replace(observations=self.look_up(index.observations),
                              next_observations=self.look_up(index.next_observations))

    def sample(self, batch_size: int, rng: np.random.Generator) -> Batch:
        """Transitions drawn uniformly."""
        return self.gather(self.index(batch_size, rng))


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

    STATE = ("parameters", "target_parameters", "optimizer", "learning_rate", "learning_starts", "learned_step",
             "actions_rng", "replay_rng", "loss", "q_values", "gradient", "probe", "probe_targets")

    def __init__(self, args: Args, envs: gym.vector.VectorEnv, ranks: Ranks) -> None:
        self.args, self.ranks, self.device, device = args, ranks, ranks.device, ranks.device
        space, self.num_actions = envs.single_observation_space, int(envs.single_action_space.n)
        self.batch_size = args.batch_size // ranks.size  # its share of each batch
        self.replay = ReplayBuffer(args.buffer_size // ranks.size, envs.num_envs, space, self.num_actions, args.n_step,
                                   args.gamma, args.frame_stack, args.clip_rewards, device)
        with torch.random.fork_rng(devices=[]):  # PyTorch initialises layers from its global generator only
            torch.manual_seed(derive_seed(args.seed, NETWORK))
            network = make_network(args, space, self.num_actions)
        self.q_network = network.to(device)
        self.target_network = copy.deepcopy(self.q_network).requires_grad_(False)
        self.parameters = flatten_parameters(self.q_network)
        self.target_parameters = flatten_parameters(self.target_network)
        self.optimizer = Adam(self.parameters)
        self.leaves = list(self.q_network.parameters())
        self.learning_rate = torch.tensor(args.learning_rate, device=device)
        self.learning_starts, self.learned_step = args.learning_starts, 0
        self.actions_rng = np.random.default_rng(derive_seed(args.seed, ACTIONS, *ranks.path))
        self.replay_rng = np.random.default_rng(derive_seed(args.seed, REPLAY, *ranks.path))
        self.loss = self.q_values = self.gradient = None  # of the last gradient step
        self.probe = self.probe_targets = None  # a fixed batch, and the TD targets it had at the last log

    def act(self, observations: Tensor, epsilon: float) -> np.ndarray:
        """Epsilon-greedy actions (N,), counted from 0, for observations (N, *shape); epsilon holds for each one."""
        coins, choices = self.actions_rng.random((2, len(observations)))
        actions = (choices * self.num_actions).astype(np.int64)
        greedy = coins >= epsilon
        if np.count_nonzero(greedy):
            with torch.no_grad():
                q_values = self.q_network(observations)
            actions = np.where(greedy, q_values.cpu().numpy().argmax(1), actions)
        return actions

    def td_gradient(self, *index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The loss between Q(s, a) and the TD targets of what `index` drew, Q(s, a) (B, 1), and the loss's gradient."""
        batch = self.replay.gather(Batch(*index))
        targets = td_target(batch, self.q_network, self.target_network, self.args.double_q)
        q_values = self.q_network(batch.observations).gather(1, batch.actions[:, None])  # (B, 1)
        loss = LOSSES[self.args.loss](q_values, targets[:, None])
        gradients = torch.autograd.grad(loss, self.leaves)
        return loss.detach(), q_values.detach(), torch.cat([gradient.flatten() for gradient in gradients])

    def gradient_step(self) -> None:
        """Draw this rank's share of a batch, take a step of Adam on the whole; `gradient` is what Adam received."""
        index = self.replay.index(self.batch_size, self.replay_rng)
        self.loss, self.q_values, self.gradient = self.td_gradient(*index)
        self.ranks.average(self.gradient)
        if self.args.max_grad_norm:
            self.gradient *= (self.args.max_grad_norm / self.gradient.norm()).clamp(max=1.0)
        self.optimizer.step(self.gradient, self.learning_rate)

    def compile(self) -> None:
        """Make `td_gradient` one compiled function, on a GPU one CUDA graph.

        Where that fails, for want of a compiler say, the reason is printed and all stays as it is.
        """
        say("compiling     the gradient step, which can take a minute")
        import torch._dynamo

        torch._dynamo.reset()  # what an earlier run in this process compiled
        torch._dynamo.config.trace_autograd_ops = True  # the gradient belongs to the function
        slots = np.zeros(self.batch_size, np.int64)
        arrays = (self.replay.stack(slots), slots, np.float32(slots), self.replay.stack(slots), np.float32(slots))
        index = [torch.from_numpy(array).to(self.device) for array in arrays]
        torch._dynamo.mark_static_address(self.replay.frames)  # or a CUDA graph would copy all of them at each call
        compiled = torch.compile(self.td_gradient, fullgraph=True, mode="reduce-overhead")  # a CUDA graph on a GPU
        try:
            for _ in range(3):  # it is recorded in the second call and replayed from the third on
                compiled(*index)
            self.td_gradient = compiled
        except Exception as error:
            say(f"--compile: goes on without, {' '.join(str(error).split()):.200}")

    def learn(self, until: int) -> None:
        """Take the gradient steps and target updates that are due up to the environment step `until`.

        One environment step after the other, so that learning keeps its ratio to acting, and its order, for any N.
        """
        args = self.args
        for step in range(self.learned_step + 1, until + 1):
            if step > self.learning_starts and due(args.train_frequency, step):
                if args.anneal_lr:
                    self.learning_rate.fill_(linear_schedule(args.learning_rate, 0.0, args.total_timesteps, step))
                for _ in range(args.gradient_steps):
                    self.gradient_step()
            if due(args.target_network_frequency, step):
                sync_target(self.target_parameters, self.parameters, args.tau)
        self.learned_step = until

    def diagnostics(self) -> dict[str, float]:
        """TensorBoard's tags and values for the last gradient step; none before the first."""
        if self.loss is None:
            return {}
        if self.probe is None:
            rng = np.random.default_rng(derive_seed(self.args.seed, PROBE, *self.ranks.path))
            self.probe = list(self.replay.sample(self.batch_size, rng))
        lag = (self.parameters - self.target_parameters).norm() / self.parameters.norm()
        values = {"losses/td_loss": self.loss, "losses/q_values": self.q_values.mean(),
                  "losses/grad_norm": self.gradient.norm(), "target/lag": lag}
        targets = self.probe_targets
        self.probe_targets = td_target(Batch(*self.probe), self.q_network, self.target_network, self.args.double_q)
        if targets is not None:
            values["target/drift"] = (self.probe_targets - targets).abs().mean()
        means = torch.stack(list(values.values()))
        self.ranks.average(means)
        return dict(zip(values, means.tolist(), strict=True))


class Rollout:
    """The environments as training steps through them, into the replay buffer.

    What an environment is in cannot be saved in general, but it follows from the seed of its last reset and the actions
    since. The journal holds these for all environments; now and then they are reset, so that it never gets long. That
    waits for an episode as long as the journal.
    """

    STATE = ("global_step", "passes", "reset_step", "journal", "returns", "lengths", "ended", "lives")

    def __init__(self, args: Args, envs: gym.vector.VectorEnv, replay: ReplayBuffer, ranks: Ranks) -> None:
        self.seed, self.episodic_life, self.envs, self.replay = args.seed, args.episodic_life, envs, replay
        self.ranks = ranks
        halves = (("send", "recv"), ("step_async", "step_wait"))  # of a step that runs without Python's lock
        self.halves = next(((getattr(envs, a), getattr(envs, b)) for a, b in halves if hasattr(envs, a)), None)
        self.first_action = envs.single_action_space.start
        self.global_step = 0  # environment steps taken, over all environments of all ranks
        self.journal = np.zeros((10 * JOURNAL_PASSES, envs.num_envs), replay.actions.dtype)
        self.passes, self.reset_step = 0, 0  # steps of each environment since the last reset; global_step then
        self.returns, self.lengths = np.zeros((2, envs.num_envs))  # of the episodes under way
        self.ended = np.zeros(envs.num_envs, bool)  # where the next step only resets
        self.lives = np.zeros(envs.num_envs, np.int64)  # left in an Atari game

    def used(self, name: str) -> int | None:
        """How much of an array is to be saved, None = all."""
        return self.passes if name == "journal" else None

    def begin(self) -> tuple[np.ndarray, np.ndarray | int]:
        """Reset all environments with a seed that `reset_step` gives; the first observations (N, *shape), and lives."""
        seed = derive_seed(self.seed, TRAIN_ENVS, self.reset_step, *self.ranks.path)
        observations, infos = self.envs.reset(seed=seed)
        return observations, infos.get("lives", 0)

    def reset(self) -> None:
        """Begin new episodes; those under way are truncated and count in no statistic."""
        self.reset_step, self.passes = self.global_step, 0
        self.returns[:], self.lengths[:], self.ended[:] = 0, 0, False
        observations, self.lives[:] = self.begin()
        check_finite(self.global_step, observations=observations)
        self.replay.reset(observations)

    def step(self, actions: np.ndarray, meanwhile: Callable[[], None]) -> list[tuple[float, float]]:
        """Take a step with actions (N,), counted from 0; return and length of each episode that it ended.

        `meanwhile` is called while the environments move, where they can do that at the same time; it must not depend
        on what the step brings.
        """
        self.journal[self.passes] = actions
        self.passes += 1
        self.global_step += len(actions) * self.ranks.size
        shifted = actions + self.first_action
        if self.halves:
            self.halves[0](shifted)
        meanwhile()
        result = self.halves[1]() if self.halves else self.envs.step(shifted)
        observations, rewards, terminated, truncated, infos = result
        check_finite(self.global_step, observations=observations, rewards=rewards)
        ended = terminated | truncated
        if self.episodic_life:
            terminated = terminated | (infos["lives"] < self.lives)
            self.lives[:] = infos["lives"]
        self.replay.add(actions, rewards, terminated, ended, observations)
        self.returns += rewards
        self.lengths += 1
        if np.count_nonzero(self.ended):
            self.returns[self.ended] = self.lengths[self.ended] = 0  # there the step was a reset
        self.ended[:] = ended
        episodes = np.flatnonzero(self.ended) if np.count_nonzero(self.ended) else ()
        finished = [(float(self.returns[i]), float(self.lengths[i])) for i in episodes]
        if self.passes % JOURNAL_PASSES == 0 and (self.lengths.max() < self.passes or self.passes == len(self.journal)):
            self.reset()
        return finished

    def come_back(self, interrupted: Sequence[int]) -> bool:
        """Bring new environments to where the saved ones were; whether rewards and observations are the same."""
        (observations, _), same = self.begin(), True
        for age, actions in zip(range(self.passes, 0, -1), self.journal, strict=False):
            if interrupted:
                return False
            observations, rewards, *_ = self.envs.step(actions + self.first_action)
            slots = (self.replay.row - age) * len(actions) + np.arange(len(actions))
            same &= age > self.replay.filled or np.array_equal(self.replay.rewards[slots], rewards.astype(np.float32))
        newest = self.replay.newest().cpu()
        return same and torch.equal(newest, torch.from_numpy(observations).to(newest.dtype))


class Evaluation(NamedTuple):
    """Greedy episodes, (episodes,) each."""

    returns: np.ndarray  # undiscounted
    lengths: np.ndarray  # steps
    q_bias: np.ndarray  # max_a Q(s_0, a) minus the discounted return that followed


@torch.no_grad()
def evaluate(q_network: nn.Module, envs: gym.vector.VectorEnv, episodes: int, seed: int, gamma: float = 1.0,
             max_steps: int = 10_000, interrupted: Sequence[int] = (),
             before_round: Callable[[], object] = lambda: None) -> Evaluation | None:
    """Play greedy episodes, cut after `max_steps`; None if `interrupted` fills up meanwhile.

    They are played in rounds of one episode for each environment: to take whichever episodes end first would favour
    short ones.
    """
    device, rounds = next(q_network.parameters()).device, []
    for played in range(0, episodes, envs.num_envs):
        before_round()
        running = np.arange(envs.num_envs) < episodes - played
        returns, discounted, lengths = np.zeros((3, envs.num_envs))
        observations, _ = envs.reset(seed=seed + played)
        for step in range(max_steps):
            if interrupted:
                return None
            values, actions = q_network(torch.as_tensor(observations).to(device)).max(1)
            if step == 0:
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
        rounds.append(np.stack((returns, lengths, start_values - discounted))[:, : episodes - played])
    return Evaluation(*np.concatenate(rounds, axis=1))


def pack(value: Any, used: int | None = None) -> Any:
    """What an object's STATE names, as tensors (sharing memory), numbers, strings, lists and dicts.

    A checkpoint holds nothing else, and torch.load(weights_only=True) accepts nothing else: it cannot run code.
    """
    if hasattr(value, "STATE"):
        used = getattr(value, "used", lambda name: None)
        return {name: pack(getattr(value, name), used(name)) for name in value.STATE}
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()  # of a slice, PyTorch would save the whole
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value[:used] if value.ndim else value)
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    if isinstance(value, nn.Module):
        return value.state_dict()
    return [pack(item) for item in value] if isinstance(value, list) else value


def unpack(current: Any, saved: Any, device: torch.device) -> Any:
    """The reverse of `pack`: `current` with the saved content, or where there is nothing to put it in, a copy."""
    if hasattr(current, "STATE"):
        for name in current.STATE:
            setattr(current, name, unpack(getattr(current, name), saved[name], device))
    elif isinstance(current, np.ndarray | Tensor):
        place = torch.as_tensor(current)  # the same memory
        (place[: len(saved)] if saved.ndim else place).copy_(saved)
    elif isinstance(current, np.random.Generator):
        current.bit_generator.state = saved
    elif isinstance(current, nn.Module):
        current.load_state_dict(saved)
    elif isinstance(saved, list):
        return [unpack(None, item, device) for item in saved]
    else:
        return saved.to(device, copy=True) if isinstance(saved, Tensor) else saved
    return current


def write_file(path: Path, content: dict[str, Any], previous: str = "") -> None:
    """Save `content` so that a reader, even after a crash, finds the old file or the new one, whole.

    With `previous` the old file stays under that name. Raises OSError or RuntimeError where nothing could be written.
    """
    partial = path.with_suffix(".tmp")
    try:
        with partial.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        if previous:
            with contextlib.suppress(OSError, AttributeError):  # no old file, or a file system without hard links
                path.with_name(previous).unlink(missing_ok=True)
                os.link(path, path.with_name(previous))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not every system can flush a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def part_of_rank(path: Path, rank: int, number: int) -> Path:
    """Where another rank than 0 has its part of the checkpoint `path` of that number: checkpoint.8.rank1.pt."""
    return path.with_name(f"checkpoint.{number}.rank{rank}.pt")


def read_checkpoint(path: Path, verify: bool = True) -> dict[str, Any]:
    """What rank 0 saved; UsageError as in `read_file`, also for the other ranks' parts where there are as many now."""
    content, size = read_file(path, verify), Ranks().size
    for rank in range(1, size if content.get("ranks", 1) == size else 1):
        read_file(part_of_rank(path, rank, content.get("number")), verify)
    return content


def read_file(path: Path, verify: bool = True) -> dict[str, Any]:
    """What `write_file` saved, tensors mapped from disk; UsageError for any other file, or a damaged one."""
    try:
        with zipfile.ZipFile(path) as archive:
            if verify and (damaged := archive.testzip()):  # PyTorch does not look at the checksums that it writes
                raise zipfile.BadZipFile(f"{damaged} has a wrong checksum")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise UsageError(f"there is no {path}") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except pickle.UnpicklingError:
        raise UsageError(f"{path} was not written by dqn.py and could run code; not loaded") from None
    except Exception as error:
        raise UsageError(f"{path} is damaged: {error!r:.120}") from None
    number = content.get("format") if isinstance(content, dict) else None
    if not isinstance(number, int) or not isinstance(content.get("args"), dict):
        raise UsageError(f"{path} was not written by dqn.py")
    if number > FORMAT:
        raise UsageError(f"{path} has format {number}, this dqn.py reads {FORMAT}; use a newer dqn.py")
    return content


def existing_run(args: Args, verify: bool = True) -> tuple[Args, Path, dict[str, Any]]:
    """The run that --resume or --evaluate names: its settings with the changes in `args`, its file, and the content.

    Raises UsageError where the file does not serve, or a change would make another experiment.
    """
    purpose = "evaluate" if args.resume is None else "resume"
    named, path = flag(args, purpose), Path(getattr(args, purpose))
    if path.is_dir():
        path /= CHECKPOINT if purpose == "resume" or args.which == "last" else MODEL
    try:
        content = (read_checkpoint if purpose == "resume" else read_file)(path, verify)
        if purpose == "resume" and (path.name not in (CHECKPOINT, PREVIOUS) or "rollout" not in content):
            raise UsageError(f"{path} is no checkpoint; name a run folder")
    except UsageError as error:
        advice, older = "", path.with_name(PREVIOUS)
        if path.name == CHECKPOINT:
            with contextlib.suppress(UsageError, KeyError):
                step = read_checkpoint(older)["rollout"]["global_step"]
                advice = f"; the one before it, of step {step:,}, is whole: --{purpose} {older}"
        raise UsageError(f"{named}: {error}{advice}") from None
    saved = content["args"] | ({"capture_video": False, "track": False} if purpose == "evaluate" else {})
    try:
        before = Args(**saved)
        given = args._given - {"resume"}
        changed = {name: getattr(args, name) for name in given if getattr(args, name) != getattr(before, name)}
        for name in changed.keys() - OVERRIDES[purpose]:
            raise UsageError(f"{flag(args, name)}: {named} has {getattr(before, name)} and keeps it; leave it out")
        if "total_timesteps" in changed and args.total_timesteps < content["rollout"]["global_step"]:
            raise UsageError(f"{flag(args, 'total_timesteps')}: the run has taken more steps already; give more")
        return Args(**saved | changed), path, content
    except (KeyError, TypeError) as error:
        raise UsageError(f"{named}: {path} was not written by this dqn.py: {error}") from None


def restore(parts: dict[str, Any], path: Path, saved: dict[str, Any], args: Args, ranks: Ranks) -> str:
    """Put this rank's share of a checkpoint, of which rank 0's is in `saved`, into the parts of a run.

    Returns why replay and environments must begin anew, "" where they need not. Raises UsageError where it does not
    fit the environment.
    """
    size, names = saved.get("ranks", 1), set(parts)
    anew = "" if "replay" in saved else "checkpoints have no replay buffer"
    if ranks.rank and size == ranks.size:
        saved = saved | read_file(part_of_rank(path, ranks.rank, saved["number"]), verify=False)
    try:
        report, step = parts["report"], saved["rollout"]["global_step"]
        if size != ranks.size:
            anew = f"the checkpoint is of {size} ranks, now there are {ranks.size}"
            names -= {"replay", "rollout"}
            fresh = {name: pack(np.random.default_rng(derive_seed(args.seed, purpose, *ranks.path, step)))
                     for name, purpose in (("actions_rng", ACTIONS), ("replay_rng", REPLAY))}
            saved = saved | {"learner": saved["learner"] | fresh}
        for name in names & saved.keys():
            unpack(parts[name], saved[name], ranks.device)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"--resume {path}: does not fit {args.env_id} as it is here: {error!r}") from None
    parts["rollout"].global_step, report.checkpoints = step, saved.get("number", 0)
    report.seconds_before = report.seconds
    return anew


def newest_checkpoint(args: Args) -> str | None:
    """The newest whole checkpoint of a run with these settings under runs/, for --resume auto; None: there is none."""
    folders = Path("runs").glob(f"{run_name(args)}__*/")
    for folder in sorted(folders, key=lambda folder: folder.stat().st_mtime, reverse=True):
        for path in (folder / CHECKPOINT, folder / PREVIOUS):
            try:
                existing_run(dataclasses.replace(args, resume=str(path)))
                return str(path)
            except UsageError as error:
                if path.exists():
                    say(f"not resumed   {error}")
    return None


def lock(run_dir: Path) -> IO[str]:
    """Become the only process that writes to a run folder, until the file returned is closed or the process dies."""
    try:
        file = (run_dir / ".lock").open("a")
    except OSError as error:
        raise UsageError(f"cannot write to {run_dir}: {error.strerror}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UsageError(f"--resume {run_dir}: another process is training there; stop it or wait for it") from None
    except (NameError, OSError):  # this system, or this file system, has no locks
        pass
    return file


def say(text: str) -> None:
    """Print above the progress bar; a closed pipe or a full disk behind standard output does not end a run."""
    with contextlib.suppress(OSError):
        tqdm.write(text)
        sys.stdout.flush()


def summarize(returns: Sequence[float]) -> str:
    """Returns in words."""
    mean, spread, low, high = (getattr(np, name)(returns) for name in ("mean", "std", "min", "max"))
    return f"{mean:.1f} ± {spread:.1f}, min {low:.1f}, max {high:.1f}, over {len(returns)} greedy episodes"


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


class Log:
    """TensorBoard's file of a run, with Weights & Biases as its mirror, and the progress bar.

    What cannot be written is tried again later; `missing` names what is unwritten, and why.
    """

    STATE = ("log_name", "log_bytes", "wandb_id")

    def __init__(self, args: Args, ranks: Ranks) -> None:
        self.args, self.ranks, self.run_dir, self.wandb, self.wandb_id = args, ranks, Path(), None, None
        self.log_name, self.log_bytes = "", 0  # TensorBoard's file, and how much of it is this run's
        self.pending = io.BytesIO()  # events not yet in TensorBoard's file
        self.records = RecordWriter(self.pending)
        self.missing: dict[str, str] = {}

    def open(self, run_dir: Path, step: int, new_settings: bool) -> None:
        """Begin to write to `run_dir`, or go on there; other ranks than 0 write nothing."""
        self.run_dir, settings = run_dir, dataclasses.asdict(self.args)
        if not run_dir.is_dir():
            raise UsageError(f"{run_dir.absolute()} is not there for rank {self.ranks.rank}; start all nodes in a "
                             "folder that they share")
        if self.args.track and self.ranks.rank == 0:
            wandb = importlib.import_module("wandb")
            try:
                self.wandb = wandb.init(project=self.args.wandb_project_name, entity=self.args.wandb_entity,
                                        name=run_dir.name, id=self.wandb_id, resume="allow", config=settings)
            except Exception as error:
                if not (run_dir / CHECKPOINT).exists():  # a new run
                    shutil.rmtree(run_dir)
                reason = " ".join(str(error).split())
                raise UsageError(f"--track: {reason}; log in to wandb or set WANDB_MODE=offline") from None
            self.wandb_id = self.wandb.id
        log = run_dir / Path(self.log_name).name
        if not log.is_file() or log.stat().st_size < self.log_bytes:  # the file was lost, or its end was
            log, self.log_bytes = run_dir / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}", 0
        self.log_name = log.name
        if not self.log_bytes:
            self.record(Event(file_version="brain.Event:2"))
            layout = {"DQN": {title: ["Multiline", tags] for title, tags in CHARTS.items()}}
            columns = {name: v if isinstance(v, bool | int | float | str) else str(v) for name, v in settings.items()}
            for summary in (custom_scalars(layout), *hparams(columns, {"eval/episodic_return": 0.0})):
                self.record(Event(summary=summary))
        if new_settings or not self.log_bytes:
            rows = "".join(f"|{name}|{value}|\n" for name, value in settings.items())
            self.record(Event(summary=text("hyperparameters", f"|setting|value|\n|-|-|\n{rows}"), step=step))
        self.bar = tqdm(total=self.args.total_timesteps, initial=step, unit=" steps", unit_scale=True,
                        disable=None if self.ranks.rank == 0 else True, dynamic_ncols=True)

    def close(self) -> None:
        """Close what was opened; everything logged so far is on disk afterwards."""
        self.bar.close()
        self.flush()
        if self.wandb:
            self.wandb.finish()

    def record(self, event: Event) -> None:
        """Append to TensorBoard's file, at the next flush."""
        event.wall_time = time.time()
        if self.ranks.rank == 0:
            self.records.write(event.SerializeToString())

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log values by TensorBoard tag."""
        entries = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self.record(Event(summary=Summary(value=entries), step=step))
        if self.wandb:
            self.wandb.log(values, step)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[None]:
        """Note in `missing` whether the block could write `name`, and say so where not; training goes on."""
        try:
            yield
            self.missing.pop(name, None)
        except (OSError, RuntimeError) as error:  # torch.save wraps the system's error, or closing the file follows it
            systems = (each for each in (error, error.__context__) if isinstance(each, OSError))
            reason = str(next((each.strerror for each in systems if each.strerror), error))
            if name not in self.missing:
                say(f"{name} could not be written: {reason}; training goes on")
            self.missing[name] = reason

    def flush(self, durable: bool = False) -> None:
        """Write the pending events to TensorBoard's file; should that fail, they stay pending."""
        events = self.pending.getvalue()
        if not events:
            return
        with self.writing("TensorBoard's file"), (self.run_dir / self.log_name).open("ab") as file:
            file.truncate(self.log_bytes)  # what a failed attempt, or a process before a resume, wrote beyond
            file.write(events)
            file.flush()
            if durable:
                os.fsync(file.fileno())
            self.log_bytes += len(events)
            self.pending.seek(0)
            self.pending.truncate()


class Report(Log):
    """What the user gets of a run: how training goes, greedy evaluations, model.pt, checkpoints and the verdict."""

    STATE = (*Log.STATE, "recent", "evaluations", "best_step", "best_return", "best_network", "final_returns",
             "seconds")

    def __init__(self, args: Args, network: QNetwork, ranks: Ranks) -> None:
        super().__init__(args, ranks)
        self.finished: list[tuple[int, float, float]] = []  # step, return, length of episodes that are not logged yet
        self.recent: list[float] = []  # returns of the last training episodes
        self.evaluations: list[tuple[int, float]] = []  # (step, mean greedy return)
        self.best_step, self.best_return, self.best_network = 0, -math.inf, copy.deepcopy(network)
        self.final_returns: list[float] = []  # of the verdict's greedy episodes
        self.seconds, self.since = 0.0, time.perf_counter()  # spent in training until then
        self.seconds_before = 0.0  # in other processes, before a resume
        self.checkpoints = 0  # number of the one in force, counted from the run's beginning

    @property
    def evaluated(self) -> int:
        """The step of the last evaluation."""
        return self.evaluations[-1][0] if self.evaluations else 0

    def save(self, name: str, content: dict[str, Any], previous: str = "", path: Path | None = None) -> None:
        """Write a file that `read_file` reads, with the settings; `path` is for one that has another name."""
        with self.writing(name):
            settings = dataclasses.asdict(self.args)
            write_file(path or self.run_dir / name, {"format": FORMAT, "args": settings} | content, previous)

    def checkpoint(self, parts: dict[str, Any]) -> None:
        """Save all that the future of the run depends on; keep the checkpoint before it.

        Each rank writes its part, under a name of its own. Rank 0 comes last, so that a new checkpoint.pt means that
        all parts are there; then it removes those that no checkpoint needs. Raises TrainingError where the ranks'
        parameters differ.
        """
        self.log_episodes()
        self.flush(durable=True)
        kept = {name: pack(part) for name, part in parts.items() if name != "replay" or self.args.checkpoint_replay}
        number, path = self.checkpoints + 1, self.run_dir / CHECKPOINT
        kept |= {"ranks": self.ranks.size, "number": number}
        if len(set(self.ranks.gather(zlib.crc32(kept["learner"]["parameters"].numpy())))) > 1:
            step = kept["rollout"]["global_step"]
            raise TrainingError(f"the ranks' parameters differ at step {step:,}; resume from the last checkpoint")
        if self.ranks.rank:
            del kept["report"]  # rank 0's counts
            self.save(CHECKPOINT, kept, path=part_of_rank(path, self.ranks.rank, number))
        reasons = [reason for reason in self.ranks.gather(self.missing.get(CHECKPOINT))[1:] if reason]
        if self.ranks.rank == 0 and reasons:
            with self.writing(CHECKPOINT):
                raise RuntimeError(reasons[0])
        elif self.ranks.rank == 0:
            self.save(CHECKPOINT, kept, PREVIOUS)
        written = self.ranks.gather(CHECKPOINT not in self.missing)[0]
        self.checkpoints += written
        if self.ranks.rank == 0:
            kept_numbers = {str(self.checkpoints), str(self.checkpoints - 1)}
            for part in path.parent.glob("checkpoint.*.rank*"):  # also what a killed rank was writing
                if part.name.split(".")[1] not in kept_numbers:
                    with contextlib.suppress(OSError):
                        part.unlink()

    def log_episodes(self) -> None:
        """Log the training episodes that have ended on any rank since the last call."""
        for step, total, length in sorted(itertools.chain(*self.ranks.gather(self.finished)), key=lambda each: each[0]):
            self.recent = [*self.recent[-19:], total]
            self.scalars(step, {"charts/episodic_return": total, "charts/episodic_length": length})
        self.finished = []

    def lap(self, step: int) -> float:
        """Steps per second up to `step`; the clock goes on from here."""
        now = time.perf_counter()
        self.seconds, self.since = self.seconds + now - self.since, now
        return step / self.seconds

    def progress(self, step: int, epsilon: float, learning_rate: float, diagnostics: dict[str, float]) -> None:
        """Log and show how far training is."""
        self.log_episodes()
        total, speed = self.args.total_timesteps, self.lap(step)
        values = {"charts/epsilon": epsilon, "charts/learning_rate": learning_rate, "charts/SPS": int(speed)}
        if self.ranks.size > 1:
            values["charts/all_reduce"] = self.ranks.seconds / (self.seconds - self.seconds_before)
        self.scalars(step, values | diagnostics)
        self.flush()
        recent = f"{np.mean(self.recent):.1f}" if self.recent else "-"
        status = f"return {recent}, epsilon {epsilon:.2f}, loss {diagnostics.get('losses/td_loss', math.nan):.3g}"
        if self.missing:
            status += f", NOT WRITTEN: {', '.join(self.missing)}"
        self.bar.set_postfix_str(status, refresh=False)
        if self.bar.disable and due(max(total // 20, 1), step, max(self.args.log_frequency, self.args.num_envs)):
            left = max(total - step, 0) / speed
            say(f"step {step:,} of {total:,}: {status}, {speed:,.0f} steps/s, {left:,.0f} s left")

    def evaluate(self, step: int, network: QNetwork, envs: gym.vector.VectorEnv | None, episodes: int,
                 interrupted: Sequence[int]) -> Evaluation | None:
        """Evaluate on rank 0, log, and keep the network if none was better; None if interrupted."""
        # Other episodes each time, so that the verdict does not replay those that a run was stopped for.
        seed = derive_seed(self.args.seed, EVAL_ENVS, len(self.evaluations))
        self.log_episodes()
        self.lap(step)
        if self.ranks.rank == 0:
            result = evaluate(network, envs, episodes, seed, self.args.gamma, self.args.eval_max_steps, interrupted,
                              before_round=lambda: self.ranks.gather("plays"))  # so that the others know
            self.ranks.gather(result)
        else:
            while (result := self.ranks.gather(None)[0]) == "plays":
                pass
        if result is not None:
            check_finite(step, evaluation=result.returns)
            mean, length, q_bias = (float(values.mean()) for values in result)
            self.scalars(step, {"eval/episodic_return": mean, "eval/episodic_length": length, "eval/q_bias": q_bias})
            self.flush()
            say(f"step {step:,}: greedy return {mean:.1f} ± {result.returns.std():.1f} over {episodes} episodes")
            self.evaluations.append((step, mean))
            if mean >= self.best_return:
                self.best_step, self.best_return = step, mean
                self.best_network.load_state_dict(network.state_dict())
                if self.args.save_model and self.ranks.rank == 0:
                    self.save(MODEL, {"q_network": network.state_dict()})
        self.since = time.perf_counter()  # evaluations are no training
        return result

    def verdict(self, step: int) -> None:
        """Print how the run ended."""
        words = {"steps": f"{step:,}, training took {self.seconds:,.1f} s at {step / self.seconds:,.0f} steps/s"}
        if self.final_returns:
            words["final return"] = summarize(self.final_returns)
        else:
            words["interrupted"] = "so no greedy episodes at the end"
        if self.evaluations:
            words["best return"] = f"{self.best_return:.1f}, evaluated at step {self.best_step:,}"
        words |= {name: self.run_dir / name for name in (MODEL, CHECKPOINT, "videos") if (self.run_dir / name).exists()}
        words |= {"run folder": self.run_dir, "look at it": f"tensorboard --logdir {self.run_dir.parent}"}
        if (self.run_dir / CHECKPOINT).exists():
            more = " --total-timesteps MORE" * bool(self.final_returns)
            more += " --stop-return HIGHER" * (self.best_return >= self.args.stop_return)
            script, own = Path(sys.argv[0]), Path(__file__).name
            start = "python" if self.ranks.size == 1 else "torchrun [as before]"
            words["go on"] = (f"{start} {shlex.quote(str(script if script.name == own else own))} "
                              f"--resume {shlex.quote(str(self.run_dir))}{more}")
        say("\n".join(f"{name:14}{text}" for name, text in words.items()))


def describe(args: Args) -> str:
    """The settings in force, by section; a star marks those that TUNED brought."""
    tuned, lines = tuned_settings(args), []
    for section in SECTIONS[:-1]:
        names = (field.name for field in dataclasses.fields(section))
        words = ", ".join(flag(args, n)[2:] + "*" * ((n, getattr(args, n)) in tuned.items()) for n in names)
        lines.append(textwrap.fill(f"{section.__name__.lower():14}{words}", 110, subsequent_indent=" " * 14,
                                   break_on_hyphens=False))
    return "\n".join(lines)


def run_name(args: Args) -> str:
    """What the folders of runs with these settings begin with."""
    return re.sub(r"[^\w.=+-]", "-", f"{args.env_id}__{args.exp_name}__{args.seed}")


def create_run_dir(args: Args) -> Path:
    """Make a folder under runs/, its own even if another run starts in this second; UsageError if that fails."""
    name = f"{run_name(args)}__{int(time.time())}"
    try:
        for suffix in itertools.chain([""], map("_{}".format, itertools.count(2))):
            with contextlib.suppress(FileExistsError):
                (run_dir := Path("runs", name + suffix)).mkdir(parents=True)
                return run_dir
    except OSError as error:
        place = Path("runs").absolute()
        raise UsageError(f"cannot write to {place}: {error.strerror}; start where runs/ can be written") from None


@contextlib.contextmanager
def caught_signals(patient: bool = False) -> Iterator[list[int]]:
    """Collect a SIGINT or SIGTERM in a list, so that a run can end in order, and raise what it stands for at the end.

    A second one finds the handlers that were there before, unless `patient`: torchrun passes on what reached it, and
    the process may have had the same signal from elsewhere.
    """
    received: list[int] = []
    with contextlib.ExitStack() as handlers:

        def receive(signum: int, frame: Any) -> None:
            received.append(signum)
            if not patient:
                handlers.close()

        for number in (signal.SIGINT, signal.SIGTERM):
            if threading.current_thread() is threading.main_thread():  # only there does Python set handlers
                handlers.callback(signal.signal, number, signal.signal(number, receive))
        yield received
    if received:
        raise KeyboardInterrupt if received[0] == signal.SIGINT else SystemExit(128 + received[0])


def check_finite(step: int, reason: str = "the environment returned NaN or infinity",
                 **values: np.ndarray | float) -> None:
    """Raise TrainingError if one of the values is NaN or infinite."""
    for name, value in values.items():
        whole = isinstance(value, np.ndarray) and value.dtype.kind != "f"  # numbers, which are finite
        if not whole and np.count_nonzero(np.isfinite(value)) < np.size(value):  # half the time of all()
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


def train(args: Args, watch: Callable[[int, Learner], object] | None = None) -> Result:
    """Run one experiment, or go on with one: train, evaluate, report.

    `watch` is called with global_step and the learner whenever losses are logged, to measure what the log does not.

    Raises:
        UsageError: a setting cannot work; nothing was written.
        TrainingError: observations, rewards or the loss stopped being finite, or something could not be written.
        KeyboardInterrupt, SystemExit: SIGINT or SIGTERM came; the run ended in order before.
    """
    if args.evaluate is not None:
        raise UsageError(f"{flag(args, 'evaluate')}: is for play(args), which trains nothing")
    saved, ranks = {}, Ranks(args.cuda)
    with contextlib.ExitStack() as stack:
        interrupted = stack.enter_context(caught_signals(patient=ranks.size > 1))
        stack.enter_context(ranks)
        if ranks.rank:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        with ranks.agreed():
            if args.resume == "auto":
                found = ranks.gather(newest_checkpoint(args) if ranks.rank == 0 else None)[0]
                args = dataclasses.replace(args, resume=found)
            if args.resume is not None:
                args, path, saved = existing_run(args, verify=ranks.rank == 0)
            validate(args)
            stack.callback(setattr, torch.backends.cudnn, "deterministic", torch.backends.cudnn.deterministic)
            torch.backends.cudnn.deterministic = args.torch_deterministic
            if ranks.size > 1 and ranks.device.type == "cuda":
                torch.cuda.set_device(ranks.place)
            envs = stack.enter_context(contextlib.closing(make_envs(args, args.num_envs // ranks.size)))
            if args.capture_video:
                with contextlib.closing(gym.make(args.env_id)) as env:
                    if "rgb_array" not in env.metadata.get("render_modes", ()):
                        raise UsageError(f"{flag(args, 'capture_video')}: {args.env_id} does not render to rgb_array; "
                                         "leave it out")
                env = gym.make(args.env_id, render_mode="rgb_array", disable_env_checker=True)
                with contextlib.closing(env):
                    env.reset()
                    try:
                        env.render()
                    except gym.error.DependencyNotInstalled as error:
                        raise UsageError(f"{flag(args, 'capture_video')}: {error}; install what is missing") from None
            eval_envs = None
            if ranks.rank == 0:  # one environment an episode, where that does not mean as many processes
                count = min(args.eval_episodes, FINAL_EPISODES if args.vectorization != "async" else args.num_envs)
                eval_envs = stack.enter_context(contextlib.closing(make_envs(args, count)))
            learner = Learner(args, envs, ranks)
            if learner.parameters.numel() * learner.batch_size < 2**24:  # too little work for one core to share it
                stack.callback(torch.set_num_threads, torch.get_num_threads())
                torch.set_num_threads(1)
            replay, report = learner.replay, Report(args, learner.q_network, ranks)
            rollout = Rollout(args, envs, replay, ranks)
            if args.compile and replay.frames.device == learner.parameters.device:
                learner.compile()
            parts = {"learner": learner, "replay": replay, "rollout": rollout, "report": report}
            anew = restore(parts, path, saved, args, ranks) if saved else "a new run"
        with ranks.agreed():
            run_dir = path.parent if saved else create_run_dir(args) if ranks.rank == 0 else None
        run_dir = ranks.gather(run_dir)[0]
        with ranks.agreed():
            if ranks.rank == 0:
                stack.enter_context(lock(run_dir))
            report.open(run_dir, rollout.global_step, saved.get("args") != dataclasses.asdict(args))
        stack.callback(report.close)
        say(f"{describe(args)}{f'{chr(10)}ranks         {ranks.size}' * (ranks.size > 1)}\nrun folder    {run_dir}")
        if saved:
            if ranks.rank == 0:
                path.replace(run_dir / CHECKPOINT)  # where the one before the newest was named
            say(f"resumed       at step {rollout.global_step:,}")
        saved = None  # its tensors were mapped from disk; let go of the file

        def unfinished() -> bool:
            return rollout.global_step < args.total_timesteps and report.best_return < args.stop_return

        if not anew and unfinished():
            exact = all(ranks.gather(rollout.come_back(interrupted)))
            if ranks.stopping(interrupted):
                return None
            if not exact:
                say("the environments did not come back to the state they were in: not exact from here on")
                rollout.reset()
        if anew:
            if rollout.global_step and unfinished():
                say(f"not exact: {anew}, so the replay buffer is filled anew")
            learner.learning_starts = rollout.global_step + args.learning_starts
            rollout.reset()
            if args.checkpoint_frequency and unfinished():
                report.checkpoint(parts)
        report.since, stopped = time.perf_counter(), ranks.stopping(interrupted)

        while unfinished() and not stopped:
            global_step = rollout.global_step
            if due(args.eval_frequency, global_step, args.num_envs) and global_step > report.evaluated:
                stopped = report.evaluate(global_step, learner.q_network, eval_envs, args.eval_episodes,
                                          interrupted) is None and ranks.stopping(interrupted)
                continue
            report.final_returns = []  # of a run that had ended
            decay_steps = args.exploration_fraction * args.total_timesteps
            epsilon = linear_schedule(args.start_e, args.end_e, decay_steps, global_step)
            learn = functools.partial(learner.learn, global_step)  # what the steps so far owe
            ended = rollout.step(learner.act(replay.newest(), epsilon), meanwhile=learn)
            report.finished += [(rollout.global_step, *episode) for episode in ended]
            if ended and ranks.size == 1:
                report.log_episodes()
            report.bar.update(args.num_envs)

            global_step, at_end = rollout.global_step, rollout.global_step >= args.total_timesteps
            # Before what these steps owe: a target update among it would hide how far the target network lags.
            if due(args.log_frequency, global_step, args.num_envs) or at_end:
                diagnostics = learner.diagnostics()
                diverged = "learning diverged; lower --learning-rate or set --max-grad-norm"
                check_finite(global_step, diverged, loss=diagnostics.get("losses/td_loss", 0.0))
                report.progress(global_step, epsilon, learner.learning_rate.item(), diagnostics)
                if watch:
                    watch(global_step, learner)

            if due(args.checkpoint_frequency, global_step, args.num_envs) and not at_end:
                report.checkpoint(parts)
            stopped = ranks.stopping(interrupted, global_step)

        if rollout.global_step >= args.total_timesteps:
            learner.learn(rollout.global_step)
        report.bar.close()
        report.log_episodes()
        report.lap(rollout.global_step)
        if not report.final_returns:
            if not stopped:
                final = report.evaluate(rollout.global_step, learner.q_network, eval_envs, FINAL_EPISODES, interrupted)
                report.final_returns = [] if final is None else final.returns.tolist()
            ranks.stopping(interrupted)
            if args.checkpoint_frequency:
                report.checkpoint(parts)
        if args.capture_video and not interrupted and report.final_returns and ranks.rank == 0:
            with report.writing("videos"), contextlib.closing(make_envs(args, 1, run_dir / "videos" / "best")) as shown:
                evaluate(report.best_network, shown, VIDEO_EPISODES, derive_seed(args.seed, VIDEO), args.gamma,
                         args.eval_max_steps, interrupted)
        if MODEL in report.missing:
            report.save(MODEL, {"q_network": report.best_network.state_dict()})
        report.verdict(rollout.global_step)
        report.flush()
        if report.missing:
            unwritten = ", ".join(f"{name} ({reason})" for name, reason in report.missing.items())
            raise TrainingError(f"could not be written: {unwritten}; {run_dir} holds what was written before")
        speed = rollout.global_step / report.seconds
        return Result(run_dir, rollout.global_step, report.evaluations, np.array(report.final_returns),
                      report.best_return, speed)


class Agent:
    """A trained network that acts greedily; `load` makes one.

    Raises UsageError where the run cannot be read, or the environment is not what the network was made for.
    """

    def __init__(self, args: Args) -> None:
        """From the run that `args.evaluate` and `args.which` name; `self.args` are that run's settings then."""
        args, self.path, content = existing_run(args)
        validate(args)
        self.args = args
        with contextlib.closing(make_envs(args, 1)) as envs, contextlib.closing(gym.make(args.env_id)) as env:
            self.space, self.actions = envs.single_observation_space, envs.single_action_space
            self.unflattened = env.observation_space
        network = make_network(args, self.space, int(self.actions.n))
        try:
            if "learner" in content:
                flatten_parameters(network).copy_(content["learner"]["parameters"])
            else:
                network.load_state_dict(content["q_network"])
        except (RuntimeError, KeyError, TypeError) as error:
            raise UsageError(f"{flag(args, 'evaluate')}: does not fit {args.env_id} as it is here: {error}") from None
        self.device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
        self.q_network = network.to(self.device)

    @torch.no_grad()
    def act(self, observation: Any) -> Any:
        """The greedy action for an observation of the environment; actions (N,) for Box observations (N, *shape)."""
        if not isinstance(self.unflattened, gym.spaces.Box) and self.args.frame_stack == 1:
            if not self.unflattened.contains(observation):
                raise ValueError(f"{observation} is not an observation of {self.args.env_id}, {self.unflattened}")
            observation = gym.spaces.flatten(self.unflattened, observation)
        batch = torch.as_tensor(np.asarray(observation, self.space.dtype)).to(self.device)
        lead, shape = batch.ndim - len(self.space.shape), self.space.shape
        if lead not in (0, 1) or batch.shape[lead:] != shape:
            raise ValueError(f"{tuple(batch.shape)} is not the shape of an observation, {shape}, or of a batch of them")
        actions = self.q_network(batch if lead else batch[None]).argmax(1).cpu().numpy() + self.actions.start
        return actions if lead else int(actions[0])


def load(path: str | Path, which: Literal["best", "last"] = "best") -> Agent:
    """The trained agent of a run folder: the best network by greedy evaluation, or that of the last checkpoint."""
    return Agent(Args(evaluate=str(path), which=which))


def play(args: Args) -> Evaluation:
    """Let the network of a run play greedy episodes and print what they returned; for --evaluate."""
    agent = Agent(args)
    args, path = agent.args, agent.path
    # Each environment with a generator of its own, so that an episode is the same whether it is shown or not.
    ways = dataclasses.replace(args, vectorization="native" if args.vectorization == "native" else "sync")
    video = path.parent / "videos" / f"{path.stem}-seed-{args.seed}" if args.capture_video else None
    count = 1 if video or args.render else min(args.eval_episodes, FINAL_EPISODES)
    try:
        with caught_signals() as interrupted, contextlib.closing(make_envs(ways, count, video, args.render)) as envs:
            result = evaluate(agent.q_network, envs, args.eval_episodes, derive_seed(args.seed, PLAY), args.gamma,
                              args.eval_max_steps, interrupted)
    except Exception as error:
        if isinstance(error, UsageError) or not (video or args.render):
            raise
        raise UsageError(f"{flag(args, 'render' if args.render else 'capture_video')}: {error}") from None
    say(f"return        {summarize(result.returns)}\nnetwork       {path}")
    if video:
        say(f"videos        {video.parent}")
    return result


def parse_args(argv: Sequence[str] | None = None) -> Args:
    """Settings from a command line; UsageError for an unknown flag or a value of the wrong type."""
    sections = dataclasses.make_dataclass("Sections", [(s.__name__.lower(), s) for s in SECTIONS])
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            chosen, existing = (tyro.cli(section, args=argv, return_unknown_args=True, add_help=False)[0]
                                for section in (Environment, Existing))
            if existing.resume not in (None, "auto") or existing.evaluate is not None:
                defaults, shown = existing_run(Args(**vars(existing)), verify=False)[0], "that run"
            else:
                defaults = Args(env_id=chosen.env_id, tuned=chosen.tuned)
                shown = f"the TUNED settings of {chosen.env_id}" if tuned_settings(defaults) else "any environment"
            parts = [s(**{f.name: getattr(defaults, f.name) for f in dataclasses.fields(s)}) for s in SECTIONS]
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
    sys.stdout, sys.stderr = sys.stdout or io.StringIO(), sys.stderr or io.StringIO()  # where the shell closed them
    try:
        args = parse_args(argv)
        (train if args.evaluate is None else play)(args)
    except (UsageError, TrainingError) as error:
        ranks = Ranks()
        if ranks.place == 0 or isinstance(error, TrainingError):  # of a UsageError all ranks of a machine know
            sys.stderr.write(f"dqn.py: error: {f'rank {ranks.rank}: ' * (ranks.rank > 0)}{error}\n")  # in one piece
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
