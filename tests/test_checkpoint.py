"""Checkpoints and resume: exact, whole or refused, and no code in them."""

import os
import re
import shutil
import signal
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo

import dqn
from conftest import differences, outcome, read_log
from dqn import CHECKPOINT, MODEL, PREVIOUS, Args, Rollout, TrainingError, UsageError, load, read_file, train

SHORT = dict(tuned=False, total_timesteps=1200, learning_starts=200, buffer_size=600, batch_size=32,
             eval_frequency=500, eval_episodes=2, eval_max_steps=60, log_frequency=100, checkpoint_frequency=250)


class Crash(BaseException):
    """The process dies: nothing between the raise and the end of `train` may matter."""


def crash_at(monkeypatch, passes, how=None):
    """Let the run end within its `passes`-th pass, by an exception or by a signal to this process."""
    step, taken = Rollout.step, 0

    def counted(self, actions, meanwhile):
        nonlocal taken
        taken += 1
        if taken == passes:
            if how is None:
                raise Crash
            os.kill(os.getpid(), how)
        return step(self, actions, meanwhile)

    monkeypatch.setattr(Rollout, "step", counted)


def end_early(monkeypatch, passes, how=None, **settings):
    """Begin or resume a run that ends early; its folder."""
    with monkeypatch.context() as patch:
        crash_at(patch, passes, how)
        with pytest.raises((Crash, KeyboardInterrupt, SystemExit)):
            train(Args(**settings))
    return settings.get("resume") or max(Path("runs").iterdir(), key=lambda path: path.stat().st_mtime_ns)


@pytest.fixture
def stopped(in_tmp, monkeypatch):
    """The folder of a run that crashed at step 700, with checkpoints of steps 250 and 500."""
    return end_early(monkeypatch, 700, **SHORT)


KINDS = {
    "one environment": {},
    "eight": dict(num_envs=8, n_step=3),
    "sixty-four": dict(num_envs=64, total_timesteps=9600, checkpoint_frequency=2000),
    "processes": dict(num_envs=2, vectorization="async", env_id="FrozenLake-v1"),
    "a last pass beyond the end": dict(num_envs=7),
    "Box2D": dict(num_envs=3, env_id="LunarLander-v3", dueling=True, double_q=True),
    "Acrobot": dict(num_envs=2, env_id="Acrobot-v1", anneal_lr=True, tau=0.1, layer_norm=True),
    "a ring smaller than the journal": dict(buffer_size=40, env_id="MountainCar-v0"),
    "no limit, other action numbers": dict(env_id="environments:Endless-v0", total_timesteps=700),
    "logged more often than learned": dict(log_frequency=10, train_frequency=90, target_network_frequency=70),
    "dictionaries": dict(env_id="environments:Space-dict-v0"),
    "unsigned 16 bits": dict(env_id="environments:Space-uint16-v0"),
    "stacks": dict(frame_stack=3, num_envs=2, buffer_size=100),
    "Atari": dict(env_id="ALE/Pong-v5", hidden_sizes=(4,), total_timesteps=400, buffer_size=200, frame_stack=2,
                  vectorization="sync"),
    "Atari's own vectors": dict(env_id="ALE/Breakout-v5", num_envs=2, hidden_sizes=(8,), total_timesteps=900,
                                frame_stack=4, clip_rewards=True, episodic_life=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_crashed_and_was_interrupted_ends_as_if_it_had_been_left_alone(kind, in_tmp, monkeypatch):
    settings = SHORT | KINDS[kind]
    passes = settings["total_timesteps"] // settings.get("num_envs", 1)
    alone = train(Args(**settings)).run_dir
    run_dir = end_early(monkeypatch, passes * 2 // 3, **settings)
    for at, how in ((5, None), (passes // 9, signal.SIGINT), (1, signal.SIGTERM), (passes // 9, signal.SIGTERM)):
        assert end_early(monkeypatch, at, how, resume=str(run_dir)) == str(run_dir)
    result = train(Args(resume=str(run_dir)))
    assert result.run_dir == run_dir != alone
    assert differences(outcome(alone), outcome(run_dir)) == []


COMPILED = SHORT | dict(compile=True, loss="huber", max_grad_norm=1.0, eval_frequency=0)


@pytest.fixture
def nothing_compiled():
    """PyTorch's compiler as in a new process."""
    torch._dynamo.reset()


def test_a_compiled_run_that_crashed_ends_as_if_it_had_been_left_alone(in_tmp, monkeypatch, capsys, nothing_compiled):
    alone = train(Args(**COMPILED)).run_dir
    run_dir = end_early(monkeypatch, 800, **COMPILED)
    torch._dynamo.reset()  # as in another process: the resumed run compiles anew
    train(Args(resume=str(run_dir)))
    assert differences(outcome(alone), outcome(run_dir)) == []
    out = capsys.readouterr().out
    assert out.count("compiling ") == 3
    assert "goes on without" not in out


def test_a_compiled_run_is_the_same_whatever_was_compiled_before(in_tmp, capsys, nothing_compiled):
    alone = train(Args(**COMPILED)).run_dir
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=1):  # of one function in a process, otherwise 8
        train(Args(**COMPILED | dict(batch_size=16, total_timesteps=300)))
        after_another = train(Args(**COMPILED)).run_dir
    assert "goes on without" not in capsys.readouterr().out
    assert differences(outcome(alone), outcome(after_another)) == []


@pytest.mark.parametrize("journal", [40, 150])
def test_a_full_journal_is_emptied_by_a_reset_and_resume_stays_exact(journal, in_tmp, monkeypatch):
    monkeypatch.setattr(dqn, "JOURNAL_PASSES", journal)
    settings = SHORT | dict(num_envs=2)
    alone = train(Args(**settings)).run_dir
    state = read_file(alone / CHECKPOINT)["rollout"]
    assert state["reset_step"] == 600 // journal * journal * 2
    run_dir = end_early(monkeypatch, 333, **settings)
    run_dir = end_early(monkeypatch, 100, signal.SIGINT, resume=str(run_dir))
    train(Args(resume=run_dir))
    assert differences(outcome(alone), outcome(Path(run_dir))) == []


def test_the_seed_of_a_reset_follows_from_its_step(in_tmp):
    args = Args(tuned=False, num_envs=2)
    envs = dqn.make_envs(args, 2)
    rollout = Rollout(args, envs, dqn.Learner(args, envs, dqn.Ranks()).replay, dqn.Ranks())
    first, again, later = ((setattr(rollout, "reset_step", step), rollout.begin()[0].copy())[1] for step in (0, 0, 800))
    assert np.array_equal(first, again)
    assert not np.isclose(first, later).any()


def test_an_episode_longer_than_the_journal_is_not_cut_at_once(in_tmp, monkeypatch):
    """The environments would be reset each 40 passes, but for the one episode; at 400 passes they are."""
    monkeypatch.setattr(dqn, "JOURNAL_PASSES", 40)
    settings = SHORT | dict(env_id="environments:Endless-v0", total_timesteps=900)
    alone = train(Args(**settings)).run_dir
    assert read_file(alone / CHECKPOINT)["rollout"]["reset_step"] == 800
    run_dir = end_early(monkeypatch, 390, signal.SIGINT, **settings)
    assert read_file(run_dir / CHECKPOINT)["rollout"]["passes"] == 390
    train(Args(resume=str(run_dir)))
    assert differences(outcome(alone), outcome(run_dir)) == []


def test_how_often_a_run_is_saved_changes_nothing(in_tmp):
    folders = [train(Args(**SHORT | dict(checkpoint_frequency=n))).run_dir for n in (1200, 70)]
    first, second = map(outcome, folders)
    for each in (first, second):
        each["checkpoint"].pop("args")
        each["model"].pop("args")
        each["checkpoint"]["report"].pop("log_bytes")  # the settings are in the log, too
    assert differences(first, second) == []


def test_no_checkpoints_are_written_where_the_frequency_is_zero(in_tmp):
    run_dir = train(Args(**SHORT | dict(checkpoint_frequency=0))).run_dir
    assert not list(run_dir.glob("checkpoint*"))
    with pytest.raises(UsageError, match=rf"--resume {run_dir}: there is no {run_dir}/{CHECKPOINT}"):
        train(Args(resume=str(run_dir)))


def test_a_run_can_be_resumed_before_its_first_periodic_checkpoint(in_tmp, monkeypatch):
    alone = train(Args(**SHORT)).run_dir
    run_dir = end_early(monkeypatch, 100, **SHORT)
    assert read_file(run_dir / CHECKPOINT)["rollout"]["global_step"] == 0
    train(Args(resume=str(run_dir)))
    assert differences(outcome(alone), outcome(run_dir)) == []


def test_an_environment_that_does_not_come_back_is_noticed(in_tmp, monkeypatch, capsys):
    run_dir = end_early(monkeypatch, 700, **SHORT, env_id="environments:Coded-v0")
    result = train(Args(resume=str(run_dir)))
    assert "not exact" in capsys.readouterr().out
    assert result.global_step == 1200


def test_rewards_that_do_not_repeat_are_noticed_although_observations_do(in_tmp, monkeypatch, capsys):
    noise = np.random.default_rng()

    def step(self, action):
        observation, reward, *rest = dqn.gym.envs.classic_control.CartPoleEnv.step(self, action)
        return observation, reward + noise.normal(), *rest

    noisy = type("Noisy", (dqn.gym.envs.classic_control.CartPoleEnv,), {"step": step})
    dqn.gym.register("Noisy-v0", noisy, max_episode_steps=100)
    run_dir = end_early(monkeypatch, 700, **SHORT, env_id="Noisy-v0")
    train(Args(resume=str(run_dir)))
    assert "not exact" in capsys.readouterr().out


def test_a_log_that_lost_its_end_or_is_gone_is_begun_anew(in_tmp, monkeypatch):
    for spoil in (lambda path: os.truncate(path, path.stat().st_size - 5), lambda path: path.unlink()):
        run_dir = end_early(monkeypatch, 1, signal.SIGINT, resume=str(end_early(monkeypatch, 700, **SHORT)))
        (log,) = Path(run_dir).glob("events*")
        spoil(log)
        monkeypatch.setattr(dqn.socket, "gethostname", lambda: "zzz")  # the second of the two, in this one second
        train(Args(resume=run_dir))
        monkeypatch.undo()
        monkeypatch.chdir(in_tmp)
        assert [event.step for event in read_log(Path(run_dir)).Scalars("eval/episodic_return")][-2:] == [1000, 1200]


def test_a_run_whose_account_fails_at_resume_keeps_its_files(stopped, monkeypatch):
    before = {path.name for path in stopped.iterdir()}
    monkeypatch.setattr(dqn.importlib.util, "find_spec", lambda name: type("Spec", (), {"origin": "here"}))
    monkeypatch.setitem(dqn.sys.modules, "wandb", None)  # importing it raises
    wandb = type("Wandb", (), {"init": lambda **settings: 1 / 0})
    monkeypatch.setitem(dqn.sys.modules, "wandb", wandb)
    with pytest.raises(UsageError, match="--track: division by zero; log in"):
        train(Args(resume=str(stopped), track=True))
    assert {path.name for path in stopped.iterdir()} == before
    with pytest.raises(UsageError, match="--track"):
        train(Args(**SHORT, track=True))
    assert list(Path("runs").iterdir()) == [stopped], "a new run leaves nothing"


def test_a_checkpoint_cannot_name_a_file_elsewhere(stopped, in_tmp):
    victim = in_tmp / "victim.txt"
    victim.write_text("x" * 5000)
    content = torch.load(stopped / CHECKPOINT)
    content["report"] |= {"log_name": str(victim), "log_bytes": 3}
    torch.save(content, stopped / CHECKPOINT)
    train(Args(resume=str(stopped)))
    assert victim.read_text() == "x" * 5000


@pytest.mark.parametrize("change", [{"args": {"sail": 3}}, {"args": {"env_id": "CartPole-v1"}, "rollout": 3},
                                    {"learner": None}, {"learner": None, "ranks": 2}, {"report": {}}])
@pytest.mark.parametrize("more", [{}, {"total_timesteps": 1500}])
def test_content_of_another_program_is_refused(more, change, stopped):
    torch.save(torch.load(stopped / CHECKPOINT) | change, stopped / CHECKPOINT)
    before = snapshot(stopped)
    with pytest.raises(UsageError, match=rf"--resume {stopped}"):
        train(Args(resume=str(stopped), **more))
    assert snapshot(stopped) == before


@pytest.mark.parametrize("checkpoint_replay", [True, False])
def test_a_run_that_has_ended_is_not_touched_and_can_be_trained_longer(checkpoint_replay, in_tmp, capsys):
    first = train(Args(**SHORT, checkpoint_replay=checkpoint_replay))
    before = snapshot(first.run_dir)
    again = train(Args(resume=str(first.run_dir)))
    assert again.final_returns.tolist() == first.final_returns.tolist()
    assert again.evaluations == first.evaluations
    assert snapshot(first.run_dir) == before
    longer = train(Args(resume=str(first.run_dir), total_timesteps=2000))
    assert longer.global_step == 2000
    assert [step for step, _ in longer.evaluations] == [500, 1000, 1200, 1500, 2000]
    assert read_file(first.run_dir / CHECKPOINT)["args"]["total_timesteps"] == 2000


def test_a_run_that_reached_its_stop_return_says_how_to_go_on(in_tmp, capsys):
    first = train(Args(**SHORT, stop_return=5.0))
    assert first.global_step == 500
    assert train(Args(resume=str(first.run_dir), total_timesteps=2000)).global_step == 500
    assert "--stop-return HIGHER" in capsys.readouterr().out
    assert train(Args(resume=str(first.run_dir), stop_return=np.inf)).global_step == 1200


ALLOWED = dict(total_timesteps=1500, checkpoint_frequency=100, eval_frequency=400, eval_episodes=3, eval_max_steps=50,
               log_frequency=50, save_model=False, stop_return=1e9, checkpoint_replay=False, cuda=False,
               compile=True)
REFUSED = dict(env_id="Acrobot-v1", tuned=True, num_envs=2, vectorization="async", seed=2, learning_rate=1.0,
               anneal_lr=False, buffer_size=700, learning_starts=300, batch_size=16, train_frequency=5,
               gradient_steps=2, gamma=0.9, n_step=2, double_q=False, target_network_frequency=9, tau=0.5, loss="huber",
               max_grad_norm=1.0, hidden_sizes=(8,), dueling=True, layer_norm=False, start_e=0.9, end_e=0.1,
               exploration_fraction=0.1, exp_name="x", torch_deterministic=False, which="last", render=True,
               frame_stack=2, clip_rewards=True, sticky_actions=0.5, episodic_life=True, full_action_space=True,
               amp=True)


@pytest.mark.parametrize("name", ALLOWED)
def test_a_resumed_run_may_change(name, stopped):
    result = train(Args(resume=str(stopped), **{name: ALLOWED[name]}))
    assert read_file(stopped / CHECKPOINT)["args"][name] == ALLOWED[name]
    assert result.global_step == (1500 if name == "total_timesteps" else 1200)
    log = dqn.Path(stopped, read_file(stopped / CHECKPOINT)["report"]["log_name"]).read_bytes()
    assert f"|{name}|{ALLOWED[name]}|".encode() in log, "the log shows the settings in force"


def test_a_resumed_run_may_not_become_another_experiment(stopped):
    before = snapshot(stopped)
    for name, value in REFUSED.items():
        with pytest.raises(UsageError, match=rf"--{name.replace('_', '-')} .*--resume {stopped} has .*leave it out"):
            train(Args(resume=str(stopped), **{name: value}))
    with pytest.raises(UsageError, match="--total-timesteps 400"):
        train(Args(resume=str(stopped), total_timesteps=400))
    assert snapshot(stopped) == before
    fields = {field.name for field in dqn.dataclasses.fields(Args)}
    rest = {"resume", "evaluate", "capture_video", "track", "wandb_project_name", "wandb_entity"}
    assert ALLOWED.keys() | REFUSED.keys() | rest == fields, "every setting is one or the other"


def snapshot(run_dir):
    """Each file's content and time of change."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in run_dir.rglob("*") if path.is_file()}


def test_without_its_replay_buffer_a_resumed_run_fills_it_before_it_learns(in_tmp, monkeypatch, capsys):
    settings = SHORT | dict(checkpoint_replay=False)
    run_dir = end_early(monkeypatch, 700, **settings)
    assert "replay" not in read_file(run_dir / CHECKPOINT)
    learned, held = [], []
    gradient_step = dqn.Learner.gradient_step

    def spy(self):
        learned.append(self.optimizer.steps.item())
        held.append(self.replay.filled)
        gradient_step(self)

    monkeypatch.setattr(dqn.Learner, "gradient_step", spy)
    before = read_file(run_dir / CHECKPOINT)["learner"]["optimizer"]["steps"]
    assert before == 29  # steps 210, 220, …, 490; what step 500 owes comes with the step after it
    train(Args(resume=str(run_dir)))
    assert "not exact" in capsys.readouterr().out
    assert learned == list(range(29, 29 + 50)), "steps 710, 720, …, 1,200"
    assert held[0] == 210


def test_bytes_cut_off_or_flipped_are_refused_or_change_nothing(stopped):
    """Cut at 150 places; flipped at 300 places and in each byte of the archive's directory."""
    for name in (CHECKPOINT, MODEL):
        path, data = stopped / name, (stopped / name).read_bytes()
        whole = read_file(shutil.copy(path, "whole.pt"))
        for size in [*range(0, len(data), len(data) // 150), len(data) - 1]:
            path.write_bytes(data[:size])
            with pytest.raises(UsageError, match=r"damaged|there is no"):
                read_file(path)
        with zipfile.ZipFile(stopped / PREVIOUS) as archive:
            directory = len(data) - ((stopped / PREVIOUS).stat().st_size - archive.start_dir)
        places = {*range(0, len(data), len(data) // 300), *range(max(directory, len(data) - 2500), len(data))}
        refused = 0
        for place in sorted(places):
            path.unlink()  # what was read is mapped from the file
            path.write_bytes(data[:place] + bytes([data[place] ^ (1 << place % 8)]) + data[place + 1:])
            try:
                content = read_file(path)
            except UsageError:
                refused += 1
            else:
                assert differences(whole, content) == [], f"byte {place}"
        assert refused > len(places) / 4
        path.write_bytes(data)


class Mischief:
    def __reduce__(self):
        return os.mkdir, ("mischief",)


@pytest.mark.parametrize("old_format", [False, True])
def test_a_file_that_would_run_code_is_refused(old_format, stopped):
    content = torch.load(stopped / CHECKPOINT, weights_only=True) | {"surprise": Mischief()}
    for name in (CHECKPOINT, MODEL):
        torch.save(content, stopped / name, _use_new_zipfile_serialization=not old_format)
    for use in (lambda: train(Args(resume=str(stopped))), lambda: load(stopped), lambda: load(stopped, "last")):
        with pytest.raises(UsageError, match=r"damaged" if old_format else r"could run code; not loaded"):
            use()
    assert not Path("mischief").exists()


FOREIGN = {
    "empty": (lambda path: path.write_bytes(b""), "damaged"),
    "text": (lambda path: path.write_text("no model"), "damaged"),
    "a zip of something": (lambda path: shutil.make_archive(str(path), "zip", path.parent, "videos") and
                           Path(f"{path}.zip").replace(path), "damaged"),
    "a state_dict": (lambda path: torch.save(torch.nn.Linear(2, 2).state_dict(), path), "not written by dqn.py"),
    "a tensor": (lambda path: torch.save(torch.zeros(3), path), "not written by dqn.py"),
    "from the future": (lambda path: torch.save(torch.load(path) | {"format": 99}, path), "format 99.*newer dqn.py"),
    "missing": (lambda path: path.unlink(), "there is no"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "cannot be read"),
    "another network": (lambda path: torch.save(torch.load(path) | {"learner": {"parameters": torch.zeros(3)}}, path),
                        "does not fit"),
    "without a part": (lambda path: torch.save({k: v for k, v in torch.load(path).items() if k != "rollout"}, path),
                       "no checkpoint"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_that_is_no_checkpoint_of_this_program_is_refused_and_nothing_touched(kind, stopped):
    spoil, expected = FOREIGN[kind]
    (stopped / "videos").mkdir()
    (stopped / PREVIOUS).unlink()
    path = stopped / CHECKPOINT
    copy = stopped / "copy.pt"
    shutil.copy(path, copy)
    spoil(copy)
    path.unlink()
    if copy.exists():
        copy.replace(path)
    before = snapshot(stopped)
    with pytest.raises(UsageError, match=rf"--resume {stopped}.*{expected}"):
        train(Args(resume=str(stopped)))
    assert snapshot(stopped) == before


def test_where_the_newest_checkpoint_is_damaged_the_one_before_it_is_offered_and_serves(in_tmp, monkeypatch):
    alone = train(Args(**SHORT)).run_dir
    run_dir = end_early(monkeypatch, 700, **SHORT)
    (run_dir / CHECKPOINT).write_bytes((run_dir / CHECKPOINT).read_bytes()[:5000])
    with pytest.raises(UsageError, match=rf"damaged.*step 250, is whole: --resume {run_dir}/{PREVIOUS}$"):
        train(Args(resume=str(run_dir)))
    monkeypatch.setattr(Rollout, "come_back", lambda self, interrupted: interrupted.append(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train(Args(resume=str(run_dir / PREVIOUS)))
    monkeypatch.undo()
    monkeypatch.chdir(in_tmp)
    assert read_file(run_dir / CHECKPOINT)["rollout"]["global_step"] == 250, "it is the newest now"
    train(Args(resume=str(run_dir)))
    assert differences(outcome(alone), outcome(run_dir)) == []


def test_a_folder_that_vanishes_costs_no_training_and_is_named_at_the_end(in_tmp, monkeypatch, capsys):
    step, taken = Rollout.step, []

    def spy(self, actions, meanwhile):
        taken.append(1)
        if len(taken) == 600:
            shutil.rmtree("runs")
        return step(self, actions, meanwhile)

    monkeypatch.setattr(Rollout, "step", spy)
    with pytest.raises(TrainingError, match=r"could not be written: .*TensorBoard's file.*No such file.*checkpoint.pt"):
        train(Args(**SHORT))
    assert len(taken) == 1200
    out = capsys.readouterr().out
    assert "checkpoint.pt could not be written: No such file or directory; training goes on" in out
    assert re.search(r"step 1,100 of 1,200: .*NOT WRITTEN: .*checkpoint.pt", out)


def test_what_could_not_be_written_for_a_while_is_written_later(in_tmp, monkeypatch):
    alone = train(Args(**SHORT)).run_dir
    step, taken = Rollout.step, []

    def spy(self, actions, meanwhile):
        taken.append(1)
        if len(taken) == 300:
            max(Path("runs").iterdir(), key=lambda path: path.stat().st_mtime_ns).rename("elsewhere")
        if len(taken) == 1100:
            Path("elsewhere").rename(alone.with_name(alone.name + "_2"))
        return step(self, actions, meanwhile)

    monkeypatch.setattr(Rollout, "step", spy)
    second = int(alone.name.split("__")[-1])
    monkeypatch.setattr("time.time", lambda: second)
    run_dir = train(Args(**SHORT)).run_dir
    assert differences(outcome(alone), outcome(run_dir)) == []


def test_an_operating_system_without_locks_links_or_folder_flushes_will_do(in_tmp, monkeypatch):
    monkeypatch.delattr(dqn, "fcntl")
    monkeypatch.delattr(os, "link")
    system_open = os.open

    def no_folders(path, flags, *rest):
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied")
        return system_open(path, flags, *rest)

    monkeypatch.setattr(os, "open", no_folders)
    run_dir = end_early(monkeypatch, 700, **SHORT)
    assert train(Args(resume=str(run_dir))).global_step == 1200


def test_a_run_folder_that_cannot_be_written_is_answered_in_one_line(stopped):
    (stopped / ".lock").unlink()
    (stopped / ".lock").mkdir()
    with pytest.raises(UsageError, match=f"cannot write to {stopped}"):
        train(Args(resume=str(stopped)))
