"""What is learned in half an hour of two cores: dqn.py, CleanRL and Stable-Baselines3, one after the other.

    git clone https://github.com/vwxyzjn/cleanrl      # fe8d8a0, and a Python with what it needs
    pip install torch==2.13.0 gymnasium==0.29.1 ale-py==0.10.1 box2d==2.3.10 numpy==1.26.4 tyro tensorboard \
        "opencv-python-headless<4.12" "moviepy<2" pygame
    python tests/benchmarks/half_hour.py --cleanrl cleanrl --cleanrl-python cleanrl/venv/bin/python

Pong from pixels with sticky actions, half an hour, one seed; LunarLander, five minutes, three seeds. dqn.py has the
settings of its default command, the others theirs: CleanRL those of its files, Stable-Baselines3 RL Zoo's. All have the
number of steps that fit into that time on the machine of the day, over which their schedules are spread.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import figures
import numpy as np
import pandas as pd
import sweep
import torch
import tyro
from sweep import FINAL, SECONDS, SPREAD, STEPS, Run, dqn
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

OURS, CLEANRL, SB3 = "dqn.py", "CleanRL", "Stable-Baselines3"
PONG, LANDER = "ALE/Pong-v5", "LunarLander-v3"
RAW = dict(frameskip=1, repeat_action_probability=0.25)  # of Pong; each program's wrapper skips four frames
RETURN, MINUTES = "charts/episodic_return", "charts/minutes"


class Task(NamedTuple):
    """What the programs do, in how many steps, with how many threads."""

    title: str
    seeds: tuple[int, ...]
    games: int  # greedy ones, of the last network
    steps: dict[str, int]
    threads: dict[str, int]


TASKS = {
    PONG: Task("Pong from pixels, half an hour", (1,), 20, {OURS: 250_000, CLEANRL: 88_000, SB3: 76_000},
               {OURS: 2, CLEANRL: 2, SB3: 2}),
    LANDER: Task("LunarLander, five minutes", (1, 2, 3), 100, {OURS: 560_000, CLEANRL: 1_780_000, SB3: 140_000},
                 {OURS: 1, CLEANRL: 1, SB3: 2}),
}


@dataclass
class Options:
    """What to run."""

    env_ids: tuple[str, ...] = tuple(TASKS)
    programs: tuple[str, ...] = (OURS, CLEANRL, SB3)
    cleanrl: Path = Path("cleanrl")  # its repository
    cleanrl_python: str = sys.executable


def logged(folder, tag):
    """Read a tag from TensorBoard's log: steps, wall times, values."""
    log = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    log.Reload()
    return pd.DataFrame(log.Scalars(tag))


def process(folder, threads, *command, **environment):
    """Run a program in a folder."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)} | environment
    subprocess.run([*map(str, command)], cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)


def ours(run, task, folder):
    """Run the default command, but for its length."""
    process(folder, task.threads[OURS], sys.executable, dqn.__file__, "--env-id", run.env_id, "--seed", run.seed,
            "--total-timesteps", run.changes["steps"], "--final-episodes", task.games, "--resume", "run")
    result = json.loads((folder / "run" / "result.json").read_text())
    return logged(folder / "run", RETURN), result["mean"], result["std"]


def cleanrl(run, task, folder):
    """Run CleanRL's file: on the same environment, with its start of learning as early, and a greedy evaluation."""
    is_atari = run.env_id == PONG
    script = run.changes["cleanrl"] / "cleanrl" / ("dqn_atari.py" if is_atari else "dqn.py")
    text = script.read_text()
    for old, new in (
        ("gym.make(env_id)", f"gym.make(env_id, **{RAW})" if is_atari else "gym.make(env_id)"),
        ("eval_episodes=10", f"eval_episodes={task.games}"),
        ("epsilon=args.end_e", "epsilon=0.0, capture_video=False"),
    ):
        assert text.count(old) == 1, (script, old)
        text = text.replace(old, new)
    (folder / "changed.py").write_text(text)
    # It starts to learn after 80,000 of 10,000,000 steps, and after 10,000 of 500,000.
    starts = run.changes["steps"] * 8 // 1_000 if is_atari else run.changes["steps"] // 50
    env_id = f"ale_py:{PONG}" if is_atari else "LunarLander-v2"  # Gymnasium 0.29.1 has no v3
    process(folder, task.threads[CLEANRL], run.changes["cleanrl_python"], "changed.py", "--env-id", env_id, "--seed",
            run.seed, "--total-timesteps", run.changes["steps"], "--learning-starts", starts, "--save-model",
            *(["--buffer-size", run.changes["steps"]] if is_atari else []),  # of 1,000,000, which need 26 GiB
            PYTHONPATH=str(run.changes["cleanrl"]))
    (run_dir,) = (path.parent for path in folder.glob("runs/**/*.cleanrl_model"))
    returns = logged(run_dir, "eval/episodic_return").value
    return logged(run_dir, RETURN), returns.mean(), returns.std(ddof=0)


def zoo(run, task, folder):
    """Train Stable-Baselines3's DQN with RL Zoo's settings."""
    from stable_baselines3 import DQN
    from stable_baselines3.common.env_util import make_atari_env, make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.vec_env import VecFrameStack

    torch.set_num_threads(task.threads[SB3])
    is_atari = run.env_id == PONG

    def make(seed, number, monitor_dir=None):
        if is_atari:
            envs = make_atari_env(run.env_id, number, seed, monitor_dir=monitor_dir, env_kwargs=RAW)
            return VecFrameStack(envs, 4)
        return make_vec_env(run.env_id, number, seed, monitor_dir=monitor_dir)

    if is_atari:  # it starts to learn after 100,000 of 10,000,000 steps
        settings = dict(policy="CnnPolicy", learning_rate=1e-4, batch_size=32, buffer_size=100_000,
                        learning_starts=run.changes["steps"] // 100, target_update_interval=1_000, train_freq=4,
                        gradient_steps=1, exploration_fraction=0.1, exploration_final_eps=0.01)
    else:
        settings = dict(policy="MlpPolicy", learning_rate=6.3e-4, batch_size=128, buffer_size=50_000,
                        learning_starts=0, target_update_interval=250, train_freq=4, gradient_steps=-1,
                        exploration_fraction=0.12, exploration_final_eps=0.1, policy_kwargs=dict(net_arch=[256, 256]))
    model = DQN(env=make(run.seed, 1, str(folder)), seed=run.seed, device="cpu", **settings)
    model.learn(run.changes["steps"])
    returns = evaluate_policy(model, make(10_000 + run.seed, 10), task.games, return_episode_rewards=True)[0]
    monitor = folder / "0.monitor.csv"
    started = json.loads(monitor.read_text().splitlines()[0][1:])["t_start"]
    episodes = pd.read_csv(monitor, skiprows=1)
    frames = 4 if is_atari else 1
    shown = pd.DataFrame(dict(step=episodes.l.cumsum() // frames, wall_time=started + episodes.t, value=episodes.r))
    return shown, np.mean(returns), np.std(returns)


def curve(episodes, points=60):
    """Give steps, minutes and the mean return of the last 20 episodes, at times that are evenly spread."""
    recent = episodes.assign(value=episodes.value.rolling(20, min_periods=1).mean())
    last = recent.minutes.iloc[-1]
    places = [(recent.minutes <= last * (number + 1) / points + 1e-9).sum() - 1 for number in range(points)]
    return recent.iloc[sorted({place for place in places if place >= 0})]


def do(run, prepare, tags):
    """Train and evaluate one of the three; return the run's rows."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.time()
        program = {OURS: ours, CLEANRL: cleanrl, SB3: zoo}[run.setting]
        episodes, mean, spread = program(run, TASKS[run.env_id], Path(folder))
    shown = curve(episodes.assign(minutes=(episodes.wall_time - start) / 60))
    values = [(each.step, tag, value) for each in shown.itertuples()
              for tag, value in ((MINUTES, each.minutes), (RETURN, each.value))]
    end = shown.iloc[-1]
    values += [(end.step, FINAL, mean), (end.step, SPREAD, spread), (end.step, STEPS, run.changes["steps"]),
               (end.step, SECONDS, 60 * end.minutes)]
    return sweep.rows_of(run, values)


def draw(rows, env_ids):
    """Draw return over minutes, a line for each run; a dot is the greedy return of its last network."""
    titles = [TASKS[env_id].title for env_id in env_ids]
    labels = dict(xlabel="minutes on two cores", ylabel="return")
    with figures.panels("half_hour", titles, height=2.6, width=5.5, **labels) as axes:  # narrow, to be read on a phone
        for place, env_id in zip(axes, env_ids, strict=True):
            for number, program in enumerate((OURS, CLEANRL, SB3)):
                curves = sweep.table(rows, env_id, program, RETURN)
                minutes, finals = (sweep.table(rows, env_id, program, tag) for tag in (MINUTES, FINAL))
                for seed in curves:
                    line = dict(color=f"C{number}", linewidth=1, label=program if seed == curves.columns[0] else None)
                    place.plot(minutes[seed].dropna(), curves[seed].dropna(), **line)
                    place.plot(minutes[seed].max(), finals[seed].dropna(), "o", color=f"C{number}", markersize=4)


def main(options):
    """Run what is missing, print a table, draw the figure."""
    runs = []
    for env_id in options.env_ids:
        for seed in TASKS[env_id].seeds:
            for program in options.programs:
                changes = dict(steps=TASKS[env_id].steps[program], cleanrl=options.cleanrl.resolve(),
                               cleanrl_python=str(Path(options.cleanrl_python).absolute()))
                runs.append(Run(env_id, program, seed, changes))
    rows = sweep.sweep("half_hour", runs, do=do, threads=os.cpu_count())  # one at a time
    sweep.head("environment", "program", "threads", "steps", "minutes", "greedy return at the end, by seed")
    for env_id in options.env_ids:
        for program in options.programs:
            finals, steps, seconds = (sweep.last(rows, env_id, program, tag) for tag in (FINAL, STEPS, SECONDS))
            sweep.line(env_id, program, TASKS[env_id].threads[program], f"{steps[0]:,.0f}",
                       ", ".join(f"{each / 60:.1f}" for each in seconds), ", ".join(f"{each:.1f}" for each in finals))
    draw(rows, options.env_ids)


if __name__ == "__main__":
    main(tyro.cli(Options))
