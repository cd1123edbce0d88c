"""Runs of several processes under torchrun, on CPUs: what they share, what each has of its own, and what ends them."""

import copy
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dqn
from conftest import ENVIRONMENT, QUICK, SCRIPT, differences, outcome, read_log
from dqn import CHECKPOINT, PREVIOUS, Args, Ranks, UsageError, read_file

RANKED = Path(__file__).with_name("ranked.py")
LAUNCH = [sys.executable, "-m", "torch.distributed.run"]
# Everything that a run does, in two seconds.
SHORT = [*QUICK, "--num-envs", "4", "--checkpoint-frequency", "400"]


def torchrun(*arguments, cwd, ranks=2, fault="none", options=()):
    """dqn.py on several ranks as a subprocess, both outputs in one pipe."""
    options = [*(options or ["--standalone"]), "--nproc-per-node", ranks]
    command = [*LAUNCH, *options, RANKED, fault, *arguments]
    return subprocess.Popen(list(map(str, command)), cwd=cwd, env=ENVIRONMENT | {"GLOO_SOCKET_IFNAME": "lo"}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process, status=0, timeout=90):
    """What the processes printed."""
    try:
        text = process.communicate(timeout=timeout)[0]
    finally:
        process.kill()
    assert process.returncode == status, text
    return text


def workers(process):
    """Process numbers of the ranks."""
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in path.read_text().split() if b"ranked.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def until(condition, process, timeout=60):
    """Wait for what `condition` returns."""
    deadline = time.monotonic() + timeout
    while not (result := condition()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return result


def run_of(folder):
    (run_dir,) = (folder / "runs").iterdir()
    return run_dir


def parts(run_dir):
    """What each rank saved at the end."""
    first = read_file(run_dir / CHECKPOINT)
    names = (f"checkpoint.{first['number']}.rank{rank}.pt" for rank in range(1, first["ranks"]))
    return [first, *(read_file(run_dir / name) for name in names)]


def result(run_dir):
    """All that the ranks of a run computed, without what depends on the clock."""
    whole = outcome(run_dir)
    del whole["scalars"]["charts/all_reduce"]
    others = parts(run_dir)[1:]
    for part in others:
        del part["number"]
    return whole | {"others": others}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of two ranks that nothing disturbs; its output too."""
    folder = tmp_path_factory.mktemp("alone")
    text = finish(torchrun(*SHORT, cwd=folder))
    return run_of(folder), text


def test_two_ranks_end_with_equal_networks_and_optimisers_and_different_experience(alone):
    one, other = parts(alone[0])
    assert one["ranks"] == 2
    for name in ("parameters", "target_parameters", "optimizer", "gradient", "learning_rate", "learned_step"):
        assert differences(one["learner"][name], other["learner"][name]) == []
    for name in ("actions_rng", "replay_rng"):
        assert one["learner"][name]["state"] != other["learner"][name]["state"]
    same = (one["replay"]["frames"] == other["replay"]["frames"]).all(1)
    assert same.float().mean() < 0.1


def test_settings_are_totals_over_the_ranks(alone):
    one, other = parts(alone[0])
    assert one["rollout"]["global_step"] == other["rollout"]["global_step"] == 1200
    for part in (one, other):
        assert part["rollout"]["passes"] == 300  # of 2 of 4 environments
        assert part["replay"]["filled"] == 150  # steps of each, of 600 that the buffer holds of all
        assert part["learner"]["q_values"].shape == (16, 1)  # of a batch of 32
        assert part["learner"]["optimizer"]["steps"] == 100  # every 10 steps after 200


def test_only_rank_0_prints_and_logs_and_what_it_logs_is_of_all_ranks(alone):
    run_dir, text = alone
    for once in ("run folder    runs", "environment   env-id", "step 1,200 of 1,200", "final return", "go on"):
        assert len(re.findall(once, text)) == (2 if once.startswith("run folder") else 1), text
    assert len(list(run_dir.glob("events*"))) == 1
    log = read_log(run_dir)
    lengths = [(event.step, event.value) for event in log.Scalars("charts/episodic_length")]
    assert lengths == sorted(lengths, key=lambda each: each[0])
    # Each environment's steps but the reset steps are in an episode, or in one under way at the end.
    under_way = sum(part["rollout"]["lengths"].sum().item() for part in parts(run_dir))
    assert sum(length for _, length in lengths) + len(lengths) + under_way == pytest.approx(1200, abs=4)
    shares = [event.value for event in log.Scalars("charts/all_reduce")]
    assert len(shares) == len(log.Scalars("charts/SPS"))
    assert 0 < shares[-1] < 1


def test_a_seed_and_a_number_of_ranks_repeat_to_the_bit(alone, tmp_path):
    finish(torchrun(*SHORT, cwd=tmp_path))
    assert differences(result(alone[0]), result(run_of(tmp_path))) == []


@pytest.mark.parametrize("max_grad_norm", [0, 0.1])
def test_a_gradient_step_of_two_ranks_is_that_of_one_process_on_both_batches(max_grad_norm, tmp_path):
    finish(torchrun(max_grad_norm, cwd=tmp_path, fault="step"))
    one, other = (torch.load(tmp_path / f"step{rank}.pt") for rank in range(2))
    assert torch.equal(one["before"][0], other["before"][0])
    assert torch.equal(one["after"], other["after"])
    assert not any(torch.equal(*pair) for pair in zip(one["batch"][:4:3], other["batch"][:4:3], strict=True))
    batch = dqn.Batch(*map(torch.cat, zip(one["batch"], other["batch"], strict=True)))
    assert len(batch.rewards) == 32
    args = Args(tuned=False)
    space = dqn.make_envs(args, 1).single_observation_space
    network, target = (dqn.make_network(args, space, 2) for _ in range(2))
    for net, vector in zip((network, target), one["before"], strict=True):
        torch.nn.utils.vector_to_parameters(vector.clone(), net.parameters())
    with torch.no_grad():
        chosen = network(batch.next_observations).argmax(1)
        goal = batch.rewards + batch.discounts * target(batch.next_observations)[torch.arange(32), chosen]
    optimizer = torch.optim.Adam(network.parameters(), lr=args.learning_rate)
    torch.nn.functional.mse_loss(network(batch.observations)[torch.arange(32), batch.actions], goal).backward()
    assert torch.nn.utils.clip_grad_norm_(network.parameters(), max_grad_norm or math.inf) > 0.2
    gradient = torch.cat([p.grad.flatten() for p in network.parameters()])
    assert torch.allclose(one["gradient"], gradient, rtol=1e-4, atol=1e-6)
    optimizer.step()
    expected = torch.nn.utils.parameters_to_vector(network.parameters())
    assert (one["after"] - one["before"][0]).abs().max() > 5e-4
    assert (one["after"] - expected).abs().max() < 2e-6


def test_two_ranks_learn_cartpole(tmp_path):
    text = finish(torchrun("--env-id", "CartPole-v1", "--eval-episodes", 100, "--stop-return", 490, cwd=tmp_path),
                  timeout=240)
    assert float(re.search(r"best return +([\d.]+)", text)[1]) >= 490, text


def test_four_ranks_run_on_fewer_cores(tmp_path):
    finish(torchrun(*SHORT, "--num-envs", 8, cwd=tmp_path, ranks=4))
    saved = parts(run_of(tmp_path))
    assert len(saved) == 4
    assert all(torch.equal(part["learner"]["parameters"], saved[0]["learner"]["parameters"]) for part in saved[1:])


def test_ten_kills_of_a_rank_change_nothing(tmp_path):
    flags = [*SHORT, "--total-timesteps", 24_000, "--checkpoint-frequency", 1000, "--eval-frequency", 5000,
             "--resume", "auto"]
    for name in ("alone", "killed"):
        (tmp_path / name).mkdir()
    finish(torchrun(*flags, cwd=tmp_path / "alone"))
    folder, rng = tmp_path / "killed", random.Random(1)
    process, seen, steps = torchrun(*flags, cwd=folder, options=["--standalone", "--max-restarts", 10]), [], []
    for number in range(10):
        ranks = until(lambda: len(now := workers(process)) == 2 and not set(now) & set(seen) and now, process)  # noqa: B023
        seen += ranks
        if number % 2:  # soon after a checkpoint
            before = steps[-1]
            until(lambda: newest_step(folder) > before, process)  # noqa: B023
            time.sleep(0.3 * rng.random())
        else:  # before the first step, as a rule
            time.sleep(4 * rng.random())
        os.kill(rng.choice(ranks), signal.SIGKILL)
        steps.append(newest_step(folder))
    finish(process)
    assert steps == sorted(steps)
    assert 0 < steps[5] < steps[-1] < 24_000
    assert differences(result(run_of(tmp_path / "alone")), result(run_of(folder))) == []
    assert len(list(run_of(folder).glob("checkpoint.*.rank1.*"))) == 2, "those of older checkpoints are gone"


def newest_step(folder):
    """Of the checkpoint in force; 0 before there is one."""
    paths = list(folder.glob(f"runs/*/{CHECKPOINT}"))
    return read_file(paths[0], verify=False)["rollout"]["global_step"] if paths else 0


def test_a_crash_between_two_parts_leaves_the_last_whole_checkpoint_in_force(alone, tmp_path):
    options = ["--standalone", "--max-restarts", 1]
    text = finish(torchrun(*SHORT, "--resume", "auto", cwd=tmp_path, fault="die", options=options))
    assert "resumed       at step 400" in text
    assert differences(result(alone[0]), result(run_of(tmp_path))) == []


def test_a_crash_between_two_parts_after_the_last_evaluation_is_no_obstacle(tmp_path):
    """The third checkpoint is the last, of the step of the second: there the evaluation ended the run."""
    flags = [*SHORT, "--eval-frequency", 400, "--stop-return", 5, "--resume", "auto"]
    options = ["--standalone", "--max-restarts", 1]
    text = finish(torchrun(*flags, cwd=tmp_path, fault="die", options=options))
    assert "resumed       at step 400" in text
    assert "final return" in text


@pytest.mark.parametrize(("flags", "ranks"), [((), 2), (("--no-checkpoint-replay",), 2), ((), 4)])
def test_a_part_that_cannot_be_written_leaves_the_last_whole_checkpoint_in_force(flags, ranks, tmp_path):
    """Also where the first checkpoint that fails has the step of the one in force."""
    finish(torchrun(*SHORT, *flags, "--total-timesteps", 400, cwd=tmp_path))
    run_dir = run_of(tmp_path)
    longer = ("--resume", run_dir, "--total-timesteps", 1000)
    text = finish(torchrun(*longer, cwd=tmp_path, ranks=ranks, fault="full"), status=1)
    assert "NOT WRITTEN: checkpoint.pt" in text
    assert len(re.findall(r"error: .*could not be written: checkpoint.pt \(No space left on device\)", text)) == 2
    saved = parts(run_dir)
    assert [part["rollout"]["global_step"] for part in saved] == [400, 400]
    number = saved[0]["number"]
    names = {CHECKPOINT, PREVIOUS, *(f"checkpoint.{n}.rank1.pt" for n in (number - 1, number))}
    assert {path.name for path in run_dir.glob("checkpoint.*")} == names
    finish(torchrun(*longer, cwd=tmp_path))
    assert [part["rollout"]["global_step"] for part in parts(run_dir)] == [1000, 1000]


def test_sigterm_to_torchrun_leaves_a_checkpoint_that_goes_on_to_the_bit(tmp_path):
    flags = [*SHORT, "--total-timesteps", 12_000]
    for name in ("alone", "stopped"):
        (tmp_path / name).mkdir()
    finish(torchrun(*flags, cwd=tmp_path / "alone"))
    process = torchrun(*flags, cwd=tmp_path / "stopped")
    until(lambda: newest_step(tmp_path / "stopped") >= 2000, process)
    for pid in (*workers(process), process.pid):  # a rank gets it twice where a scheduler sends it to all
        os.kill(pid, signal.SIGTERM)
    text = process.communicate(timeout=40)[0]
    assert "interrupted   so no greedy episodes at the end" in text
    run_dir = run_of(tmp_path / "stopped")
    assert 2000 <= newest_step(tmp_path / "stopped") < 12_000
    assert f"go on         torchrun [as before] dqn.py --resume runs/{run_dir.name}\n" in text
    assert "not exact" not in finish(torchrun("--resume", run_dir, cwd=tmp_path))
    assert differences(result(run_of(tmp_path / "alone")), result(run_dir)) == []


@pytest.mark.parametrize("ranks", [1, 4])
def test_another_number_of_ranks_goes_on_with_the_networks_and_says_so(ranks, alone, tmp_path):
    run_dir = shutil.copytree(alone[0], tmp_path / alone[0].name, ignore=shutil.ignore_patterns("*.rank*"))
    content = read_file(run_dir / CHECKPOINT)
    content["report"]["seconds"] = 1e5  # as of a long run, which says nothing of how long averaging takes now
    dqn.write_file(run_dir / CHECKPOINT, copy.deepcopy(content))
    flags = ["--resume", run_dir, "--total-timesteps", 2400]
    text = finish(torchrun(*flags, cwd=tmp_path, ranks=ranks))
    assert f"not exact: the checkpoint is of 2 ranks, now there are {ranks}, so the replay buffer is filled" in text
    saved = parts(run_dir)
    assert len(saved) == ranks
    for name in ("actions_rng", "replay_rng"):
        assert len({str(part["learner"][name]["state"]) for part in saved}) == ranks
    for part in saved:
        assert part["rollout"]["global_step"] == 2400
        assert part["learner"]["optimizer"]["steps"] == 200  # 100 of them before; the next after 200 more steps
        assert part["replay"]["filled"] == 600 / 4  # each environment's last 150 steps
    shares = {event.step: event.value for event in read_log(run_dir).Scalars("charts/all_reduce")}
    assert (ranks == 1) == (max(shares) <= 1200)
    assert ranks == 1 or 0.01 < shares[max(shares)] < 1
    number = saved[0]["number"]
    assert {path.name for path in run_dir.glob("checkpoint.*.rank*")} == {
        f"checkpoint.{n}.rank{rank}.pt" for rank in range(1, ranks) for n in (number - 1, number)}


def test_ranks_whose_parameters_differ_end_with_a_clear_error(tmp_path):
    text = finish(torchrun(*SHORT, cwd=tmp_path, fault="flip"), status=1)
    assert "error: the ranks' parameters differ at step 800; resume from the last checkpoint" in text
    assert newest_step(tmp_path) == 400


def test_a_rank_that_raises_ends_the_others(tmp_path):
    text = finish(torchrun(*SHORT, cwd=tmp_path, fault="raise"), status=1, timeout=25)
    assert "ZeroDivisionError" in text
    assert "dqn.py: error: another rank has ended or hangs: " in text


def test_a_rank_that_hangs_ends_the_others_when_patience_does(tmp_path):
    process = torchrun(*SHORT, "--total-timesteps", 10**6, cwd=tmp_path, fault="impatient")
    until(lambda: newest_step(tmp_path), process)
    os.kill(workers(process)[1], signal.SIGSTOP)
    text = finish(process, status=1, timeout=60)  # 5 s, and 30 until torchrun kills what does not end
    assert "dqn.py: error: another rank has ended or hangs: " in text


def test_a_rank_that_never_comes_ends_the_others_when_patience_does(tmp_path):
    text = finish(torchrun(*SHORT, cwd=tmp_path, fault="absent"), status=1, timeout=25)
    assert "dqn.py: error: another rank has ended or hangs: ranks {1} did not come" in text


def test_an_evaluation_may_take_longer_than_patience(tmp_path):
    """Each of 20 rounds, of 5 episodes of 2 steps, takes half a second."""
    flags = [*SHORT, "--env-id", "environments:Slow-v0", "--eval-frequency", 0, "--total-timesteps", 240,
             "--eval-episodes", 5, "--eval-max-steps", 2]
    text = finish(torchrun(*flags, cwd=tmp_path, fault="impatient"))
    assert "over 100 greedy episodes" in text


def test_sigterm_is_answered_within_seconds_however_slow_the_environment_is(tmp_path):
    """A thousand steps would take 25 s here."""
    flags = [*SHORT, "--env-id", "environments:Slow-v0", "--eval-frequency", 0, "--eval-max-steps", 1]
    process = torchrun(*flags, "--checkpoint-frequency", 10**6, cwd=tmp_path)
    until(lambda: list(tmp_path.glob(f"runs/*/{CHECKPOINT}")), process)
    time.sleep(4)
    process.send_signal(signal.SIGTERM)
    start = time.monotonic()
    process.communicate(timeout=40)
    assert time.monotonic() - start < 8
    assert newest_step(tmp_path) > 0


@pytest.mark.parametrize(("flags", "message"), [
    ("--num-envs 3", "--num-envs 3: must be a multiple of 2, the number of ranks"),
    ("--num-envs 2 --batch-size 33", "--batch-size 33: must be a multiple of 2, the number of ranks"),
    ("--resume runs/none", "--resume runs/none: there is no runs/none"),
    ("--tau 2", "--tau 2.0: must lie in (0, 1]"),
    ("--tau two", "Error parsing --tau"),
])
def test_wrong_settings_are_named_once(flags, message, tmp_path):
    text = finish(torchrun(*flags.split(), cwd=tmp_path), status=1)
    assert text.count("dqn.py: error: ") == 1, text
    assert f"dqn.py: error: {message}" in text
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def two_nodes():
    """Two network namespaces that reach each other as 10.77.0.1 and 10.77.0.2 do; how to run a command in each."""
    names = [f"dqn{os.getpid()}{letter}" for letter in "ab"]
    commands = [f"ip netns add {name}" for name in names]
    commands += ["ip link add {0} netns {0} type veth peer name {1} netns {1}".format(*names)]
    for number, name in enumerate(names, 1):
        commands += [f"ip -n {name} addr add 10.77.0.{number}/24 dev {name}", f"ip -n {name} link set {name} up",
                     f"ip -n {name} link set lo up"]
    try:
        for command in commands:
            if shutil.which("ip") is None or subprocess.run(command.split(), capture_output=True).returncode:
                pytest.skip(f"no rights to make network namespaces: {command}")
        yield [["ip", "netns", "exec", name] for name in names], names
    finally:
        for name in names:
            if shutil.which("ip"):
                subprocess.run(["ip", "netns", "del", name], capture_output=True)


def test_two_nodes_train_one_network(two_nodes, tmp_path):
    prefixes, names = two_nodes
    processes = []
    for number, (prefix, name) in enumerate(zip(prefixes, names, strict=True)):
        options = ["--nnodes", "2", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint",
                   "10.77.0.1:29400", "--rdzv-conf", f"is_host={number == 0}", "--local-addr", f"10.77.0.{number + 1}"]
        command = [*prefix, *LAUNCH, *options, str(SCRIPT), *SHORT]
        environment = ENVIRONMENT | {"GLOO_SOCKET_IFNAME": name}
        processes.append(subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE,
                                          stderr=subprocess.STDOUT))
    texts = [finish(process) for process in processes]
    assert sum("final return" in text for text in texts) == 1
    saved = parts(run_of(tmp_path))
    assert len(saved) == 4
    assert all(torch.equal(part["learner"]["parameters"], saved[0]["learner"]["parameters"]) for part in saved[1:])


def test_without_torchrun_there_is_one_rank_and_no_process_group(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")  # as Slurm scripts and others set it
    with Ranks() as ranks:
        assert (ranks.rank, ranks.size, ranks.path) == (0, 1, ())
        assert not torch.distributed.is_initialized()
        vector = torch.arange(3.0)
        ranks.average(vector)
        assert vector.tolist() == [0, 1, 2]
        assert ranks.gather("value") == ["value"]
        assert ranks.seconds == 0


def test_an_error_that_all_ranks_raise_is_the_one_that_a_rank_met():
    error = UsageError("--tau 2.0: must lie in (0, 1]")
    with pytest.raises(UsageError) as raised, Ranks().agreed():
        raise error
    assert raised.value is error


def test_the_ranks_of_a_machine_share_its_memory(monkeypatch):
    alone = dqn.available_memory()
    monkeypatch.setattr(dqn, "Ranks", lambda: SimpleNamespace(here=4))
    assert dqn.available_memory() == pytest.approx(alone / 4, rel=0.2)


def test_a_checkpoint_of_two_ranks_that_does_not_say_its_number_ends_in_one_line(monkeypatch, tmp_path):
    dqn.write_file(tmp_path / CHECKPOINT, {"format": 1, "args": {}, "ranks": 2})
    monkeypatch.setattr(dqn, "Ranks", lambda: SimpleNamespace(size=2))
    with pytest.raises(UsageError, match=r"there is no .*checkpoint\.None\.rank1\.pt"):
        dqn.read_checkpoint(tmp_path / CHECKPOINT)


def test_tuned_settings_of_atari_games_suit_32_ranks():
    """As the README starts them, on four machines of eight GPUs."""
    args = Args(env_id="ALE/Pong-v5")
    assert [getattr(args, name) % 32 for name in ("num_envs", "buffer_size", "batch_size")] == [0, 0, 0]


def finished_run(**settings):
    """A run in runs/, with checkpoints."""
    args = dict(env_id="CartPole-v1", tuned=False, total_timesteps=300, learning_starts=100, buffer_size=300,
                batch_size=8, eval_frequency=0, checkpoint_frequency=100, eval_max_steps=20) | settings
    return dqn.train(Args(**args)), args


def test_resume_auto_goes_on_with_the_newest_run_of_these_settings(in_tmp):
    first, args = finished_run()
    second, _ = finished_run()
    finished_run(seed=2)
    finished_run(gamma=0.5)  # in the name the same, but another experiment
    for age, run_dir in enumerate((second.run_dir, first.run_dir)):
        os.utime(run_dir, (time.time() - age - 100,) * 2)
    longer = dqn.train(Args(**args | dict(resume="auto", total_timesteps=400)))
    assert (longer.run_dir, longer.global_step) == (second.run_dir, 400)
    os.utime(first.run_dir, (time.time() + 1,) * 2)
    assert dqn.train(Args(**args | dict(resume="auto", total_timesteps=400))).run_dir == first.run_dir


def test_resume_auto_takes_the_checkpoint_before_a_damaged_one(in_tmp, capsys):
    run, args = finished_run()
    path = run.run_dir / CHECKPOINT
    path.write_bytes(path.read_bytes()[:-100])
    assert dqn.train(Args(**args | dict(resume="auto"))).run_dir == run.run_dir
    assert "resumed       at step 200" in capsys.readouterr().out


def test_resume_auto_takes_the_checkpoint_before_one_that_lacks_a_part(alone, in_tmp, capsys, monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    run_dir = Path(shutil.copytree(alone[0], in_tmp / "runs" / alone[0].name))
    settings = read_file(run_dir / CHECKPOINT)["args"] | {"resume": "auto"}
    assert dqn.newest_checkpoint(Args(**settings)) == f"runs/{run_dir.name}/{CHECKPOINT}"
    number = read_file(run_dir / CHECKPOINT)["number"]
    (run_dir / f"checkpoint.{number}.rank1.pt").unlink()
    assert dqn.newest_checkpoint(Args(**settings)) == f"runs/{run_dir.name}/{PREVIOUS}"
    (run_dir / f"checkpoint.{number - 1}.rank1.pt").write_bytes(b"")
    assert dqn.newest_checkpoint(Args(**settings)) is None
    assert f"not resumed   --resume runs/{run_dir.name}/{CHECKPOINT}: there is no " in capsys.readouterr().out


def test_resume_auto_begins_a_run_where_there_is_none(in_tmp):
    run, _ = finished_run(resume="auto")
    assert run.global_step == 300


def test_a_missing_part_is_named_with_the_checkpoint_that_is_whole(alone, tmp_path):
    run_dir = Path(shutil.copytree(alone[0], tmp_path / alone[0].name))
    part = run_dir / f"checkpoint.{read_file(run_dir / CHECKPOINT)['number']}.rank1.pt"
    part.unlink()
    text = finish(torchrun("--resume", run_dir, "--total-timesteps", 2400, cwd=tmp_path), status=1)
    assert text.count("dqn.py: error: ") == 1
    advice = f"the one before it, of step 800, is whole: --resume {run_dir / PREVIOUS}"
    assert f"dqn.py: error: --resume {run_dir}: there is no {part}; {advice}\n" in text
    finish(torchrun("--resume", run_dir / PREVIOUS, cwd=tmp_path))
    assert differences(result(alone[0]), result(run_dir)) == []
