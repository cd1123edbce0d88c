"""How good are the defaults? CartPole-v1's, seed by seed, and those of Args on environments that nobody tuned.

    python tests/benchmarks/defaults.py cartpole --seeds 11 12 13                   # each candidate
    python tests/benchmarks/defaults.py untuned --env-ids Taxi-v4 DeepSea-v0        # beside Stable-Baselines3's DQN

Runs that results/cartpole.csv and results/untuned.csv hold are not repeated. `untuned` needs

    pip install --no-deps flappy-bird-gymnasium==0.4.0 gymnasium-2048==0.1.2 minigrid==3.2.0
"""

import math
import time
from dataclasses import dataclass
from typing import Literal

import gymnasium as gym
import numpy as np
import sweep
import torch
import tyro
from learning import prepare
from sweep import CURVE, FINAL, SPREAD, STEPS, Run

# What of CartPole-v1's entry in TUNED differs. Runs that do not end early tell how long a good network stays good.
CARTPOLE = {
    "80,000 transitions, no Double DQN": dict(buffer_size=80_000, double_q=False),  # up to a5acabd
    "80,000": dict(buffer_size=80_000, double_q=True),
    "10,000, no Double DQN": dict(buffer_size=10_000, double_q=False),
    "10,000": dict(buffer_size=10_000, double_q=True),
    "5,000, no Double DQN": dict(buffer_size=5_000, double_q=False),
    "5,000": dict(buffer_size=5_000, double_q=True),
}
CARTPOLE |= {f"{name}, no early stop": changes | dict(stop_return=math.inf) for name, changes in CARTPOLE.items()}


class DeepSea(gym.Env):
    """Dive from the upper left corner of a grid to the lower right one (bsuite, Osband et al. 2020).

    Each step goes a row down, and a column to the left or to the right; which action is which differs from place to
    place. Going right costs 0.01 / size. Only going right ten times brings 1: random play does so once in 1,024 dives.
    """

    def __init__(self, size=10):
        self.size = size
        self.right = np.random.default_rng(0).integers(2, size=(size, size))  # the action that goes right
        self.observation_space = gym.spaces.Box(0.0, 1.0, (size * size,), np.float32)
        self.action_space = gym.spaces.Discrete(2)

    def observe(self):
        place = np.zeros((self.size, self.size), np.float32)
        if self.row < self.size:
            place[self.row, self.column] = 1
        return place.ravel()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.row = self.column = 0
        return self.observe(), {}

    def step(self, action):
        goes_right = action == self.right[self.row, self.column]
        reward = (self.column == self.size - 1) - 0.01 / self.size if goes_right else 0.0
        self.column = min(max(self.column + (1 if goes_right else -1), 0), self.size - 1)
        self.row += 1
        return self.observe(), reward, self.row == self.size, False, {}


def grid():
    """Make MiniGrid's empty room of 8 x 8, observed as its picture of symbols alone."""
    import minigrid.wrappers

    return minigrid.wrappers.ImgObsWrapper(gym.make("MiniGrid-Empty-8x8-v0"))


gym.register("DeepSea-v0", DeepSea)
gym.register("Grid-v0", grid)

SB3, OURS = "Stable-Baselines3", "dqn.py"
EPISODE = 2_000  # steps after which an evaluation cuts an episode
UNTUNED = {  # and the steps of a run
    "Taxi-v4": 100_000, "FrozenLake8x8-v1": 100_000, "CliffWalking-v1": 50_000, "DeepSea-v0": 50_000,
    "flappy_bird_gymnasium:FlappyBird-v0": 120_000, "Grid-v0": 100_000,
    "gymnasium_2048:gymnasium_2048/TwentyFortyEight-v0": 100_000, "MinAtar/Breakout-v1": 120_000,
}
ENV_KWARGS = {"flappy_bird_gymnasium:FlappyBird-v0": {"use_lidar": False}}
# What helps there must cost nothing on these.
CONTROL = dict.fromkeys(("CartPole-v1", "Acrobot-v1", "MountainCar-v0", "LunarLander-v3"), 500_000)
# Defaults that were tried. Up to 4306c77 there was a gradient step in 10.
OLD = dict(train_frequency=10)
CANDIDATES = {
    "a gradient step in 10": OLD,
    "a gradient step in 4": dict(train_frequency=4),
    "buffer of 10,000": OLD | dict(buffer_size=10_000),
    "three steps": OLD | dict(n_step=3),
    "half of the run explores": OLD | dict(exploration_fraction=0.5),
}


@dataclass
class Options(sweep.Options):
    """What to run."""

    part: tyro.conf.Positional[Literal["cartpole", "untuned"]] = "cartpole"
    env_ids: tuple[str, ...] = tuple(UNTUNED)  # of `untuned`
    settings: tuple[str, ...] = ()  # these; none: all of `cartpole`, dqn.py and Stable-Baselines3 of `untuned`


def do(run, prepare, tags):
    """Train one of the two, and let the last network play 100 greedy episodes; return the run's rows."""
    if run.setting != SB3:
        return sweep.do(run, prepare, tags)
    import stable_baselines3
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy

    prepare(run)
    torch.set_num_threads(1)

    def make(limit=None):
        env = gym.make(run.env_id, **run.changes["env_kwargs"])
        return gym.wrappers.TimeLimit(env, limit) if limit else env

    start = time.perf_counter()
    model = stable_baselines3.DQN("MlpPolicy", make_vec_env(make, seed=run.seed), seed=run.seed, device="cpu")
    model.learn(run.changes["total_timesteps"])
    seconds = time.perf_counter() - start
    envs = make_vec_env(make, 100, 10_000 + run.seed, env_kwargs=dict(limit=EPISODE))
    returns = evaluate_policy(model, envs, 100, return_episode_rewards=True)[0]
    rows = sweep.rows_of(run, [(model.num_timesteps, tag, value) for tag, value in (
        (FINAL, np.mean(returns)), (SPREAD, np.std(returns)), (sweep.SECONDS, seconds))])
    return rows.assign(commit=stable_baselines3.__version__)


def cartpole(options):
    """Run what is missing of CartPole-v1's candidates, and print their table."""
    settings = {name: changes for name, changes in CARTPOLE.items() if name in (options.settings or CARTPOLE)}
    rows = sweep.sweep("cartpole", [Run("CartPole-v1", name, seed, changes) for seed in options.seeds
                                    for name, changes in settings.items()])
    sweep.head("CartPole-v1", "commit", "seeds", "final: mean", "lowest", "below 495", "steps",
               "evaluations of 500 from 45,000 steps on", "lowest of them")
    for name in settings:
        final, steps = (sweep.last(rows, "CartPole-v1", name, tag) for tag in (FINAL, STEPS))
        curve = sweep.table(rows, "CartPole-v1", name, CURVE)
        late = curve[curve.index >= 45_000].stack()
        sweep.line(name, sweep.commits(rows, "CartPole-v1", name), len(final), f"{final.mean():.1f}",
                   f"{final.min():.1f}", (final < 495).sum(), f"{steps.mean():,.0f}",
                   f"{(late == 500).sum()} of {len(late)}", f"{late.min():.1f}")


def untuned(options):
    """Run what is missing of the environments that nobody tuned, and print their table."""
    names, steps = options.settings or (OURS, SB3), UNTUNED | CONTROL
    runs = []
    for env_id in options.env_ids:
        changes = dict(total_timesteps=steps[env_id], tuned=env_id.startswith("MinAtar/"),  # whose entry nobody tuned
                       eval_max_steps=EPISODE, env_kwargs=ENV_KWARGS.get(env_id, {}))
        runs += [Run(env_id, name, seed, changes | CANDIDATES.get(name, {}))
                 for seed in options.seeds for name in names]
    rows = sweep.sweep("untuned", runs, prepare, do=do)
    sweep.head("environment", "steps", *names)
    for env_id in options.env_ids:
        finals = [sweep.last(rows, env_id, name, FINAL) for name in names]
        sweep.line(env_id.split(":")[-1], f"{steps[env_id]:,}",
                   *(f"{final.mean():.2f} ({', '.join(f'{value:.4g}' for value in final)})" for final in finals))


if __name__ == "__main__":
    options = tyro.cli(Options)
    {"cartpole": cartpole, "untuned": untuned}[options.part](options)
