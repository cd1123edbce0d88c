"""What more ranks bring and cost: runs under torchrun on this machine, and what a network between machines would add.

    pip install -r requirements.txt -r tests/benchmarks/requirements.txt
    python tests/benchmarks/scaling.py                  # about 15 minutes on two cores

Three tables. The first is measured: whole runs with 1, 2 and 4 ranks (one thread each; gloo over the loopback device,
whose counters tell the bytes). The second is computed: how long an all-reduce takes, and how long the rest of a
gradient step has to last for it to be a tenth. The third has the gradient steps' measured times, one thread, and up to
how many ranks the all-reduce would stay below a tenth of a step.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).parents[2]))

import dqn

# What is run: a name, and settings for a network and an environment.
CASES = {
    "CartPole-v1, 120 and 84 units": dict(env_id="CartPole-v1", tuned=False),
    "LunarLander-v3, 256 and 256 units": dict(env_id="LunarLander-v3", tuned=False, hidden_sizes=(256, 256)),
    "Pong, convolutions and 512 units": dict(env_id="ALE/Pong-v5", tuned=False, hidden_sizes=(512,), frame_stack=4,
                                             layer_norm=False),
}
RUNS = ("--no-tuned --no-cuda --num-envs 8 --eval-frequency 0 --eval-max-steps 1 "
        "--log-frequency 500 --checkpoint-frequency 0").split()
# Bytes a second in one direction, and seconds that a message takes besides: the first is the line rate; the second is
# assumed, for TCP through a switch and for NCCL within a machine.
LINKS = {"25 Gbit/s Ethernet": (25e9 / 8, 30e-6), "NVLink 4, 450 GB/s": (450e9, 5e-6)}
SHARE, MOST = 0.1, 1024
LOOPBACK = Path("/sys/class/net/lo/statistics/tx_bytes")


@dataclass
class Options:
    """What to measure."""

    ranks: tuple[int, ...] = (1, 2, 4)  # world sizes
    steps: int = 20_000  # environment steps of a run, a twentieth of them before learning starts; Pong has a tenth
    repeats: int = 3  # runs of each kind
    batches: tuple[int, ...] = (32, 128, 512, 2048)  # transitions of each rank in a gradient step
    chunks: int = 7  # times that a gradient step is measured


def parameters(case: str) -> int:
    """How many a network has."""
    args = dqn.Args(**CASES[case])
    envs = dqn.make_envs(args, 1)
    space, actions = envs.single_observation_space, int(envs.single_action_space.n)
    envs.close()
    return sum(p.numel() for p in dqn.make_network(args, space, actions).parameters())


def run(case: str, ranks: int, steps: int) -> tuple[float, float, float]:
    """Steps a second, the all-reduce's share of time, and bytes that a rank sends in each gradient step."""
    settings = CASES[case]
    flags = [*RUNS, "--total-timesteps", steps, "--learning-starts", steps // 20, "--env-id", settings["env_id"]]
    flags += ["--hidden-sizes", *settings.get("hidden_sizes", (120, 84))]
    flags += ["--frame-stack", settings.get("frame_stack", 1)]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
    sent = int(LOOPBACK.read_text())
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, *map(str, launch), dqn.__file__, *map(str, flags)], cwd=folder,
                              capture_output=True, text=True, check=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"})
        (run_dir,) = Path(folder, "runs").iterdir()
        log = EventAccumulator(str(run_dir)).Reload()
        share = log.Scalars("charts/all_reduce")[-1].value if ranks > 1 else 0.0
    sent = int(LOOPBACK.read_text()) - sent
    speed = float(re.search(r"at ([\d,]+) steps/s", done.stdout)[1].replace(",", ""))
    return speed, share, sent / ranks / ((steps - steps // 20) // 10)


def gradient_time(case: str, batch_size: int, chunks: int) -> float:
    """Seconds of a gradient step with one thread: sampling, both networks, the gradient and Adam."""
    args = dqn.Args(**CASES[case], cuda=False, batch_size=batch_size, buffer_size=4096)
    envs = dqn.make_envs(args, 1)
    learner = dqn.Learner(args, envs, dqn.Ranks())
    rollout = dqn.Rollout(args, envs, learner.replay, dqn.Ranks())
    rollout.reset()
    for _ in range(1000):
        rollout.step(learner.act(learner.replay.newest(), 1.0), meanwhile=lambda: None)
    envs.close()
    times = []
    for _ in range(chunks + 1):  # the first one warms up
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < 0.3:
            learner.gradient_step()
            count += 1
        times.append((time.perf_counter() - start) / count)
    return median(times[1:])


def all_reduce_time(size: int, ranks: int, rate: float, delay: float) -> float:
    """Seconds to average `size` bytes in a ring, as gloo does and NCCL may.

    Each rank sends 2 (ranks - 1) messages of a `ranks`-th of the bytes (Patarasuk & Yuan 2009, "Bandwidth optimal
    all-reduce algorithms for clusters of workstations"). Trees need fewer messages.
    """
    return 2 * (ranks - 1) * (size / ranks / rate + delay)


def most_ranks(size: int, compute: float, rate: float, delay: float) -> int:
    """The largest power of two of ranks, up to MOST, with which the all-reduce takes at most SHARE of a step."""
    ranks = 1
    while ranks < MOST and all_reduce_time(size, 2 * ranks, rate, delay) <= SHARE / (1 - SHARE) * compute:
        ranks *= 2
    return ranks


def main(options: Options) -> None:
    """Print the tables."""
    print("| measured | ranks | steps/s: median (lowest–highest) | of one rank's | all-reduce's share of time | "
          "bytes that a rank sends in a gradient step | computed |\n|-|-|-|-|-|-|-|")
    sizes = {case: 4 * parameters(case) for case in CASES}
    for case, size in sizes.items():
        found = {}
        for _ in range(options.repeats):
            for ranks in options.ranks:  # in turn, since a shared machine's speed drifts
                found.setdefault(ranks, []).append(run(case, ranks, options.steps // (10 if "Pong" in case else 1)))
        base = median(speed for speed, *_ in found[options.ranks[0]])
        for ranks, values in found.items():
            speeds, shares, sent = zip(*values, strict=True)
            print(f"| {case} | {ranks} | {median(speeds):,.0f} ({min(speeds):,.0f}–{max(speeds):,.0f}) | "
                  f"{median(speeds) / base:.2f} | {median(shares):.0%} | {median(sent):,.0f} | "
                  f"{2 * (ranks - 1) / ranks * size:,.0f} |", flush=True)

    print(f"\n| computed: an all-reduce takes, and a gradient step must take besides, for a share of {SHARE:.0%} | "
          "bytes of gradient | 2 ranks | 8 ranks | 32 ranks | 128 ranks |\n|-|-|-|-|-|-|")
    for case, size in sizes.items():
        for link, (rate, delay) in LINKS.items():
            times = [all_reduce_time(size, ranks, rate, delay) * 1e3 for ranks in (2, 8, 32, 128)]
            cells = " | ".join(f"{t:.3g} ms, {t * (1 - SHARE) / SHARE:.3g} ms" for t in times)
            print(f"| {case}; {link} | {size:,} | {cells} |")

    torch.set_num_threads(1)
    print(f"\n| measured: a gradient step on one thread; computed: ranks up to which the all-reduce stays within "
          f"{SHARE:.0%} | batch of each rank | gradient step | {' | '.join(LINKS)} |\n|-|-|-|-|-|")
    for case, size in sizes.items():
        for batch_size in options.batches:
            compute = gradient_time(case, batch_size, options.chunks)
            limits = (most_ranks(size, compute, *link) for link in LINKS.values())
            cells = " | ".join("none" if most == 1 else f"{most:,}" if most < MOST else f"{MOST:,}+" for most in limits)
            print(f"| {case} | {batch_size} | {compute * 1e3:,.2f} ms | {cells} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options))
