"""Processes that are killed or interrupted, and runs of several processes under torchrun."""

import os
import random
import re
import signal
import socket
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

import dqn
from conftest import (
    ENVIRONMENT,
    MAIN,
    SHORT,
    TESTS,
    differences,
    finish,
    flags,
    gone,
    outcome,
    scalars,
    start,
    the_run,
    train,
    until,
    verdict,
)

KILLED = SHORT | dict(num_envs=2, n_step=3, total_timesteps=24_000, learning_starts=400, buffer_size=4000,
                      eval_frequency=3000, checkpoint_frequency=400)


def line(process, pattern):
    """Read the process's output up to a line with the pattern."""
    for text in process.stdout:
        if re.search(pattern, text):
            return text
    raise AssertionError(f"no {pattern}: {process.stderr.read()}")


def family(pid):
    """A process and all that it started; torchrun's ranks are in groups of their own."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(each for child in children for each in family(int(child)))]


def stopped_in_a_write(pids, run_dir):
    """Stop processes while one of them writes a checkpoint; let them go on if it was done before they stood."""
    if list(Path(run_dir).glob(".checkpoint*")):
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        if list(Path(run_dir).glob(".checkpoint*")):
            return True
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    return False


def steps_saved(run_dir):
    return [int(path.name.split("-")[1]) for path in Path(run_dir).glob("checkpoint-*-0-of-*.pt")]


@pytest.mark.parametrize(("ranks", "kills"), [(0, 8), (2, 3)])
def test_after_ten_kills_or_five_of_two_ranks_nothing_differs(ranks, kills, in_tmp):
    """SIGKILL to all at random moments, every other time while a checkpoint is written, twice in the final episodes."""
    settings = KILLED | dict(final_episodes=100) | (dict(total_timesteps=16_000) if ranks else {})
    finish(start(*flags(**settings, resume="runs/alone"), cwd=in_tmp, ranks=ranks))
    rng, steps, in_writes = random.Random(1), [], 0
    names = {f"checkpoint-{settings['total_timesteps']}-{rank}-of-{ranks or 1}.pt" for rank in range(ranks or 1)}
    for number in range(kills + 2):
        process = start(*flags(**settings, resume="runs/killed"), cwd=in_tmp, ranks=ranks)
        line(process, "a new run|goes on")
        time.sleep(0.3 * rng.random() * (number < kills))
        pids = family(process.pid)
        if number >= kills:
            until(lambda: {path.name for path in in_tmp.glob("runs/killed/checkpoint*")} == names)
        elif number % 2:
            until(lambda pids=pids: stopped_in_a_write(pids, "runs/killed"))
        assert process.poll() is None, "it came to its end"
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        process.communicate()
        in_writes += bool(list(in_tmp.glob("runs/killed/.checkpoint*")))
        steps.append(max(steps_saved("runs/killed"), default=0))
        until(lambda process=process: gone(process))
    assert steps == sorted(steps)
    assert in_writes >= kills // 2
    assert 0 < steps[-3] < settings["total_timesteps"]
    assert not Path("runs/killed/result.json").exists()
    finish(start(*flags(**settings, resume="runs/killed"), cwd=in_tmp, ranks=ranks))
    assert {path.name for path in Path("runs/killed").glob("checkpoint*")} == names
    assert differences(outcome(in_tmp / "runs/alone"), outcome(in_tmp / "runs/killed")) == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(("method", "settings"), [
    ("fork", {}), ("fork", {"async_envs": True}), ("spawn", {"async_envs": True})])
def test_a_signal_to_the_whole_group_ends_a_run_in_order_and_leaves_none(method, settings, number, status, in_tmp):
    """As Ctrl-C, timeout(1), systemd and Slurm send it: the environments' processes get it, too."""
    (in_tmp / "main.py").write_text(MAIN.replace("METHOD", method))
    settings = KILLED | settings | dict(total_timesteps=10**7, eval_frequency=400, batch_size=8)
    process = start(*flags(**settings), cwd=in_tmp, script=in_tmp / "main.py")
    line(process, "greedy return")
    os.killpg(process.pid, number)
    finish(process, status, timeout=20)
    assert not process.err
    until(lambda: gone(process), timeout=5)
    run_dir = the_run(in_tmp)
    assert process.out.count("ends after this step") == 1
    assert process.out.endswith(f"interrupted; to go on: python dqn.py --resume runs/{run_dir.name}\n")
    (step,) = steps_saved(run_dir)
    shown = scalars(run_dir)
    assert shown["eval/episodic_return"][0][0] == 400
    process = start("--resume", run_dir, cwd=in_tmp)
    line(process, f"goes on at step {step:,}")
    line(process, "greedy return")
    process.send_signal(number)
    finish(process, status)
    assert steps_saved(run_dir)[0] > step, "nothing is lost, and the run goes on"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("place", ["evaluation", "final episodes"])
def test_a_signal_in_an_evaluation_or_in_the_final_episodes_ends_these_within_a_step(place, number, in_tmp):
    """In an environment whose episodes never end. A resumed run plays its final episodes, and is complete then."""
    settings = SHORT | dict(env_id="environments:Endless-v0", eval_max_steps=10**9, eval_frequency=0, resume="runs/it")
    settings |= dict(eval_frequency=480) if place == "evaluation" else dict(eval_episodes=0, total_timesteps=480)
    process = start(*flags(**settings), cwd=in_tmp)
    line(process, "step 480 of")
    until(lambda: place == "evaluation" or steps_saved("runs/it") == [480])
    time.sleep(0.5)
    process.send_signal(number)
    finish(process, 128 + number, timeout=20)
    assert process.out.endswith("\nends after this step; a second signal ends it at once\n"
                                "interrupted; to go on: python dqn.py --resume runs/it\n")
    assert steps_saved("runs/it")[0] in (480, 481)
    assert not [tag for tag in scalars("runs/it") if tag.startswith("eval")]
    assert not Path("runs/it/result.json").exists()
    assert Path("runs/it/model.pt").exists() == (place == "final episodes")
    if place == "final episodes":
        resumed = finish(start("--resume", "runs/it", "--eval-max-steps", 20, cwd=in_tmp))
        assert "over 3 episodes" in resumed.out
        assert verdict("runs/it")["episodes"] == 3


def test_a_signal_after_the_verdict_changes_nothing(in_tmp, monkeypatch, capfd):
    monkeypatch.setattr(dqn, "say", lambda text, say=dqn.say: (
        say(text), "look at it" in text and signal.raise_signal(signal.SIGTERM)))
    assert verdict(train())["episodes"] == 3
    assert "interrupted" not in capfd.readouterr().out


def test_under_nohup_a_run_goes_on_without_its_terminal_and_into_a_closed_pipe_in_silence(in_tmp, monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, "PYTHONIOENCODING", "ascii")
    process = start(*flags(**SHORT, resume="runs/it"), cwd=in_tmp,
                    before=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert "? " in line(process, "greedy return"), "what ASCII lacks is replaced"
    process.send_signal(signal.SIGHUP)
    process.stdout.close()
    assert process.wait(60) == 0
    assert not process.stderr.read()
    assert verdict("runs/it")["global_step"] == 1200


def test_a_run_ends_in_one_line_if_a_process_of_its_environments_dies(in_tmp):
    settings = SHORT | dict(env_id="environments:Faulty-dying-v0", num_envs=3, async_envs=True, eval_frequency=0)
    process = finish(start(*flags(**settings), cwd=in_tmp), status=1)
    assert process.err == "dqn.py: error: a process of --async-envs died; --resume goes on from the checkpoint\n"
    assert gone(process)
    assert steps_saved(the_run(in_tmp)) == [750]


def test_a_signal_between_any_two_statements_ends_a_run_saved(in_tmp, monkeypatch):
    """A signal comes before each of the loop's calls in turn; there is a checkpoint of the last step."""
    calls = {"act": dqn.QNetwork, "add": dqn.ReplayBuffer, "update": dqn.Agent, "sync_target": dqn.Agent,
             "record": dqn.Log, "evaluate": dqn, "check_loss": dqn, "save_checkpoint": dqn, "learn": dqn,
             "restart": dqn, "epsilon_at": dqn, "due": dqn}
    for name, place in calls.items():
        count, method = 0, getattr(place, name)

        def call(*given, method=method):
            nonlocal count
            count += 1
            if count == 2:
                signal.raise_signal(signal.SIGTERM)
            return method(*given)

        with monkeypatch.context() as patch:
            patch.setattr(place, name, call)
            settings = SHORT | dict(resume=f"runs/{name}", checkpoint_frequency=100, eval_frequency=100)
            with pytest.raises(KeyboardInterrupt):
                dqn.train(dqn.Args(**settings))
        (step,) = steps_saved(f"runs/{name}")
        assert 0 < step < 1200


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_run_at_once(first, in_tmp):
    process = start(*flags(**SHORT | dict(env_id="environments:Faulty-stuck-v0")), cwd=in_tmp)
    line(process, "step 240 of")
    time.sleep(0.5)
    process.send_signal(first)
    time.sleep(1)
    assert process.poll() is None, "the pass is not over: the environment takes a minute for a step"
    process.send_signal(signal.SIGTERM)
    finish(process, -signal.SIGTERM, timeout=2)


def test_a_living_run_cannot_be_resumed_and_a_killed_one_can_although_its_environments_had_processes(in_tmp):
    settings = KILLED | dict(total_timesteps=10**7, async_envs=True, resume="runs/it")
    process = start(*flags(**settings), cwd=in_tmp)
    line(process, "a new run")
    before = until(Path("runs/it/args.json").exists) and Path("runs/it/args.json").read_bytes()
    other = finish(start("--resume", "runs/it", "--eval-episodes", 7, cwd=in_tmp), status=2)
    assert other.err.startswith("dqn.py: error: --resume runs/it: The file lock")
    assert other.err.endswith("Another process trains there\n")
    assert Path("runs/it/args.json").read_bytes() == before
    until(lambda: steps_saved("runs/it"))
    process.kill()
    process.communicate()
    third = start("--resume", "runs/it", cwd=in_tmp)
    line(third, "goes on")
    third.send_signal(signal.SIGTERM)
    finish(third, 143)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A run of two ranks: its folder and its output."""
    folder = tmp_path_factory.mktemp("two")
    process = finish(start(*flags(**SHORT | dict(num_envs=4, save_model=True)), cwd=folder, ranks=2))
    return the_run(folder), process.out


def parts(run_dir, step=1200):
    return [torch.load(run_dir / f"checkpoint-{step}-{rank}-of-2.pt", weights_only=True) for rank in range(2)]


def test_two_ranks_end_with_equal_networks_and_optimisers_and_different_experience(two):
    one, other = parts(two[0])
    for name in ("q_network", "target_network", "optimizer", "global_step", "best_return"):
        assert differences(one[name], other[name]) == []
    assert one["optimizer"]["state"][0]["step"] == 100  # every 10 steps after 200
    for part in (one, other):
        assert part["replay"]["frames"].shape[:2] == (600 // 4 + 2 + 1, 2)  # half of the environments and the buffer
    assert (one["replay"]["frames"] == other["replay"]["frames"]).all(-1).float().mean() < 0.2


def test_only_rank_0_prints_logs_and_evaluates_and_frequencies_are_those_of_one_process(two):
    run_dir, text = two
    for once in ("a new run", "step 1,200 of 1,200", "step 500: greedy", "at the end", "look at it"):
        assert text.count(once) == 1, text
    assert len(list(run_dir.glob("events*"))) == 1
    shown = scalars(run_dir)
    assert [step for step, _ in shown["eval/episodic_return"]] == [500, 1000, 1200]
    assert [step for step, _ in shown["losses/td_loss"]] == [500, 1000]


def test_a_gradient_step_of_two_ranks_is_that_of_one_process_on_both_batches(in_tmp):
    finish(start(cwd=in_tmp, ranks=2, script=TESTS / "two_ranks.py"))
    one, other = (torch.load(in_tmp / f"step{rank}.pt", weights_only=False) for rank in range(2))
    assert all(map(torch.equal, one["before"], other["before"]))
    assert all(map(torch.equal, one["after"], other["after"]))
    assert not torch.equal(one["batch"][0], other["batch"][0])
    torch.manual_seed(1)
    args = dqn.Args(**one["settings"])
    agent = dqn.Agent(args, dqn.make_envs(args, 1), torch.device("cpu"))
    assert all(map(torch.equal, one["before"], agent.q_network.parameters())), "the seed's, on all ranks"
    agent.update(dqn.Batch(*map(torch.cat, zip(one["batch"], other["batch"], strict=True))), 0.1)
    for found, expected in zip(one["after"], agent.q_network.parameters(), strict=True):
        assert torch.allclose(found, expected, atol=1e-5)


def test_the_device_is_the_accelerator_that_torch_names_and_with_no_cuda_the_cpu(monkeypatch):
    """Each process of a machine has its own; here there is none."""
    chosen = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    with ExitStack() as at_the_end:
        assert dqn.start_processes(dqn.Args(cuda=False), at_the_end) == torch.device("cpu")
        assert not chosen
        assert dqn.start_processes(dqn.Args(), at_the_end) == torch.device("mps")
    assert chosen == [3]


def test_another_number_of_ranks_is_refused_in_one_line(two):
    process = finish(start("--resume", two[0], "--total-timesteps", 2000, cwd=two[0].parent), status=2)
    assert process.err == f"dqn.py: error: --resume {two[0]}: needs 2 processes, not 1\n"
    process = finish(start(*flags(**SHORT | dict(num_envs=3)), cwd=two[0].parent, ranks=2), status=1)  # torchrun's
    errors = [text for text in process.err.splitlines() if text.startswith("dqn.py")]
    expected = "dqn.py: error: --num-envs 3: must be a multiple of 2 processes"
    assert errors == [expected] * 2, "once in each of torchrun's attempts"


def test_the_best_network_of_two_ranks_is_played_by_one(two):
    process = finish(start("--evaluate", two[0], "--capture-video", cwd=two[0].parent, ranks=2))
    assert process.out.count("over 2 episodes") == 1
    assert "Overwriting" not in process.err, "Gymnasium warns if two record in one folder"


def test_processes_count_where_a_launcher_says_all_and_need_no_torchrun(two, in_tmp, monkeypatch):
    """Two that are started by hand end as two of torchrun; one alone that has a rank is one process, and saves."""
    settings = flags(**SHORT | dict(num_envs=4), resume="runs/it")
    monkeypatch.setitem(ENVIRONMENT, "RANK", "1")
    monkeypatch.setitem(ENVIRONMENT, "WORLD_SIZE", "2")
    finish(start(*flags(**SHORT, resume="runs/one"), cwd=in_tmp))
    assert (in_tmp / "runs/one/checkpoint-1200-0-of-1.pt").exists()
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    for name, value in dict(MASTER_ADDR="localhost", MASTER_PORT=port).items():
        monkeypatch.setitem(ENVIRONMENT, name, value)
    other = start(*settings, cwd=in_tmp)
    monkeypatch.setitem(ENVIRONMENT, "RANK", "0")
    finish(start(*settings, cwd=in_tmp))
    finish(other)
    assert differences(outcome(two[0]), outcome(in_tmp / "runs/it")) == []


def test_with_max_restarts_a_run_goes_on_by_itself(two, in_tmp):
    """Rank 1 dies once, at step 700."""
    process = finish(start(*flags(**SHORT | dict(num_envs=4), resume="runs/it"), cwd=in_tmp, ranks=2,
                           script=TESTS / "two_ranks.py"))
    assert (in_tmp / "died").exists()
    assert "runs/it: goes on at step 500" in process.out
    assert differences(outcome(two[0]), outcome(in_tmp / "runs/it")) == []
