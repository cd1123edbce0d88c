"""What torchrun starts in test_ranks.py: dqn.py with a fault, `ranked.py FAULT FLAGS...`, or one gradient step."""

import copy
import errno
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import dqn

RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
gradient_step, write_file, train = dqn.Learner.gradient_step, dqn.write_file, dqn.train


def flip_a_bit(learner):
    """A parameter of rank 1 changes after 20 gradient steps."""
    gradient_step(learner)
    if RANK == 1 and learner.optimizer.steps == 20:
        learner.parameters.view(torch.int32)[5] ^= 1


def raise_an_error(learner):
    """Rank 1 meets a bug after 20 gradient steps."""
    gradient_step(learner)
    if RANK == 1 and learner.optimizer.steps == 20:
        raise ZeroDivisionError


def die_before_the_last_part(path, content, previous=""):
    """Rank 0 ends when the others' parts of the third checkpoint are there and its own is not, once."""
    if path.name == dqn.CHECKPOINT and content["number"] == 3 and not Path("died").exists():
        Path("died").touch()
        os._exit(1)
    write_file(path, content, previous)


def have_a_full_disk(path, content, previous=""):
    """The last rank cannot write between two steps."""
    if RANK == SIZE - 1 and 400 <= content["rollout"]["global_step"] <= 1200:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    write_file(path, content, previous)


def never_meet(args, watch=None):
    """Rank 1 hangs before it has met the others."""
    time.sleep(3600 * RANK)
    train(args, watch)


def one_step(max_grad_norm):
    """Take a gradient step; leave behind this rank's share of the batch and the networks before and after."""
    args = dqn.Args(tuned=False, num_envs=4, buffer_size=400, batch_size=32, n_step=3, max_grad_norm=max_grad_norm)
    with dqn.Ranks() as ranks:
        envs = dqn.make_envs(args, args.num_envs // ranks.size)
        learner = dqn.Learner(args, envs, ranks)
        rollout = dqn.Rollout(args, envs, learner.replay, ranks)
        rollout.reset()
        for _ in range(50):
            rollout.step(learner.act(learner.replay.newest(), 1.0), lambda: None)
        learner.target_parameters *= 0.5
        batch = learner.replay.sample(learner.batch_size, copy.deepcopy(learner.replay_rng))
        before = learner.parameters.clone(), learner.target_parameters.clone()
        learner.gradient_step()
        found = {"batch": list(batch), "before": before, "gradient": learner.gradient, "after": learner.parameters}
        torch.save(found, f"step{RANK}.pt")


FAULTS = {
    "none": {},
    "impatient": {"PATIENCE": timedelta(seconds=5)},
    "absent": {"PATIENCE": timedelta(seconds=5), "train": never_meet},
    "flip": {"Learner.gradient_step": flip_a_bit},
    "raise": {"Learner.gradient_step": raise_an_error},
    "die": {"write_file": die_before_the_last_part},
    "full": {"write_file": have_a_full_disk},
}

if __name__ == "__main__":
    fault, *flags = sys.argv[1:]
    if fault == "step":
        one_step(*map(float, flags))
    else:
        for name, value in FAULTS[fault].items():
            place, _, attribute = name.rpartition(".")
            setattr(getattr(dqn, place) if place else dqn, attribute, value)
        dqn.main(flags)
