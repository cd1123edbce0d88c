"""Files of a run: checkpoints and what resumes from them, args.json, the folder, writes that fail."""

import ctypes
import itertools
import json
import os
import pickle
import re
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import dqn
from conftest import SHORT, differences, finish, flags, outcome, scalars, start, the_run, train, verdict
from dqn import MAY_CHANGE, Args, UsageError


class Crash(BaseException):
    """The process dies: nothing between the raise and the end of `train` may matter."""


def crash():
    raise Crash


def crash_at(monkeypatch, step, run_dir, **settings):
    """Begin or resume a run that dies in the pass that comes after `step`."""

    def epsilon_at(args, at):
        if at == step:
            crash()
        return act_at(args, at)

    act_at = dqn.epsilon_at
    with monkeypatch.context() as patch:
        patch.setattr(dqn, "epsilon_at", epsilon_at)
        with pytest.raises(Crash):
            train(**settings, resume=run_dir)


def snapshot(run_dir):
    """Each file's content and time of change."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in Path(run_dir).rglob("*") if path.is_file()}


KINDS = {
    "one environment": {},
    "eight, three steps": dict(num_envs=8, n_step=3, train_frequency=3),
    "a last pass beyond the end": dict(num_envs=7),
    "processes": dict(num_envs=2, async_envs=True, env_id="FrozenLake-v1"),
    "Box2D": dict(num_envs=3, env_id="LunarLander-v3", dueling=True),
    "soft updates": dict(num_envs=2, env_id="Acrobot-v1", tau=0.1, target_network_frequency=7, double_q=False),
    "a small ring": dict(buffer_size=40, env_id="MountainCar-v0", loss="huber"),
    "no end": dict(env_id="environments:Endless-v0"),
    "dictionaries, stacked": dict(env_id="environments:Space-dict-v0", frame_stack=3, num_envs=2),
    "Atari": dict(env_id="ALE/Breakout-v5", num_envs=2, convolutions=((8, 8, 8),), hidden_sizes=(8,), frame_stack=4,
                  clip_rewards=True, eval_max_steps=5, train_frequency=40),
    "compiled": dict(compile=True),
    "dropout": {},
}


class Dropout(dqn.QNetwork):
    """Draws from torch's generator in each pass."""

    def __init__(self, args, envs):
        super().__init__(args, envs)
        self.layers.insert(len(self.layers) - 1, torch.nn.Dropout(0.5))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_died_five_times_ends_as_if_it_had_been_left_alone(kind, in_tmp, monkeypatch):
    settings = KINDS[kind]
    monkeypatch.setattr(dqn, "LOG_FREQUENCY", 7)  # between a restart and its first gradient step, too
    if kind == "dropout":
        monkeypatch.setattr(dqn, "QNetwork", Dropout)
    # TensorBoard orders files by time in seconds, host, process and a number; here lives share their second.
    lives = itertools.count(10)
    monkeypatch.setattr("socket.gethostname", lambda: f"life{next(lives)}")
    alone = train(**settings, resume="runs/alone")
    if settings.get("compile"):
        torch._dynamo.reset()  # as in another process
    passes = [100, 400, 999, 1100] if "num_envs" not in settings else [
        step // settings["num_envs"] * settings["num_envs"] for step in (100, 400, 999, 1100)]
    for step in passes:  # before the first checkpoint, and after the second, third and fourth
        crash_at(monkeypatch, step, "runs/died", **settings)
    with monkeypatch.context() as patch:  # in the final episodes, too
        patch.setattr(dqn, "play", lambda *given, **named: crash())
        with pytest.raises(Crash):
            train(**settings, resume="runs/died")
    train(**settings, resume="runs/died")
    assert differences(outcome(alone), outcome(Path("runs/died"))) == []


def test_a_checkpoint_cuts_the_episodes_and_a_run_without_them_does_not(in_tmp):
    cut = scalars(train(env_id="environments:Endless-v0", checkpoint_frequency=100))
    assert "charts/episodic_return" not in cut
    lengths = {frequency: scalars(train(env_id="MountainCar-v0", checkpoint_frequency=frequency)).get(
        "charts/episodic_length", []) for frequency in (150, 250, 0)}
    assert lengths[150] == [], "an episode takes 200 steps"
    assert [step for step, _ in lengths[250]] == [200, 450, 700, 950, 1200]
    assert [step for step, _ in lengths[0]] == [200, 401, 602, 803, 1004]


def test_a_checkpoint_holds_networks_optimizer_buffer_step_and_best_return(in_tmp):
    run_dir = train(num_envs=2)
    assert {path.name for path in run_dir.iterdir() if "events" not in path.name} == {
        "args.json", "model.pt", "checkpoint-1200-0-of-1.pt", "result.json", ".lock-0"}
    saved = torch.load(run_dir / "checkpoint-1200-0-of-1.pt", weights_only=True)
    assert saved.keys() == {"q_network", "target_network", "optimizer", "replay", "global_step", "best_return"}
    assert saved["replay"]["frames"].shape == (302 + 1, 2, 4)
    assert saved["global_step"] == 1200
    assert saved["best_return"] == max(value for _, value in scalars(run_dir)["eval/episodic_return"])
    assert json.loads((run_dir / "args.json").read_text()) == json.loads(json.dumps(
        vars(Args(**SHORT | dict(num_envs=2)))))


def test_a_resumed_run_lets_go_of_the_file_that_it_goes_on_from(in_tmp, monkeypatch):
    """Else the disk would keep a checkpoint that is deleted, and memory what was read."""
    run_dir = train()
    held = []
    monkeypatch.setattr(dqn, "due", lambda *_: held.append("checkpoint-1200" in Path("/proc/self/maps").read_text()))
    train(total_timesteps=1400, resume=str(run_dir))
    assert held
    assert not any(held)


def test_the_newest_checkpoint_of_which_all_parts_are_there_is_the_one_in_force(in_tmp, monkeypatch):
    run_dir = train()
    whole = run_dir / "checkpoint-1200-0-of-1.pt"
    for name in ("checkpoint-9000-0-of-2.pt", ".checkpoint-9999-0-of-1.pt.tmp"):
        (run_dir / name).write_bytes(b"half")
    best_return = torch.load(whole)["best_return"]
    torch.save(torch.load(whole) | {"global_step": 700}, run_dir / "checkpoint-700-0-of-1.pt")
    assert dqn.load_checkpoint(run_dir, {}) == dqn.Progress(1200, best_return)
    monkeypatch.setattr(dqn, "WORLD_SIZE", 2)
    assert dqn.load_checkpoint(run_dir, {}) == dqn.Progress(), "rank 1 lacks its part"
    monkeypatch.setattr(dqn, "WORLD_SIZE", 3)
    with pytest.raises(UsageError, match=rf"--resume {run_dir}: needs [12] processes, not 3"):
        dqn.load_checkpoint(run_dir, {})


def test_an_old_part_is_kept_until_all_processes_have_saved_theirs(tmp_path, monkeypatch):
    dqn.save_checkpoint(tmp_path, {}, dqn.Progress(10))
    (tmp_path / ".checkpoint-15-0-of-1.pt.tmp").touch()  # of a save that was killed
    seen = []
    monkeypatch.setattr(dqn.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dqn.dist, "barrier", lambda: seen.extend(path.name for path in tmp_path.iterdir()))
    dqn.save_checkpoint(tmp_path, {}, dqn.Progress(20))
    assert sorted(seen)[1:] == ["checkpoint-10-0-of-1.pt", "checkpoint-20-0-of-1.pt"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-20-0-of-1.pt"]


def test_a_run_that_is_complete_is_not_touched_and_goes_on_with_more_steps(cli, in_tmp):
    cli(**SHORT, resume="runs/it")
    before = snapshot("runs/it")
    process = cli("--resume runs/it")
    assert process.out.endswith("\nruns/it: complete; to go on, raise --total-timesteps 1200\n")
    assert snapshot("runs/it") == before
    process = start("--resume", "runs/it", "--total-timesteps", 2000, cwd=in_tmp)
    assert [process.stdout.readline() for _ in range(3)] == [
        "--total-timesteps 2000 is new: epsilon and learning rate follow it now\n",
        "network: convolutions (), hidden layers (120, 84)\n", "runs/it: goes on at step 1,200\n"]
    process.stdout.readline()
    assert not Path("runs/it/result.json").exists()
    finish(process)
    assert verdict("runs/it")["global_step"] == 2000
    shown = scalars(in_tmp / "runs/it")
    assert [step for step, _ in shown["eval/episodic_return"]] == [500, 1000, 1200, 1500, 2000]
    assert shown["charts/learning_rate"][-1][1] == 0.0
    assert dict(shown["charts/learning_rate"])[1500] == pytest.approx(1e-3 * 500 / 2000)


def test_a_run_that_reached_its_stop_return_goes_on_with_a_higher_one(cli, in_tmp):
    cli(**SHORT, resume="runs/it", stop_return=5.0)
    assert "raise --stop-return 5.0\n" in cli("--resume runs/it --total-timesteps 2000").out
    assert "goes on at step 500" in cli("--resume runs/it --stop-return 1e9").out
    assert "raise --total-timesteps 1200\n" in cli("--resume runs/it").out


ALLOWED = dict(total_timesteps=1500, eval_frequency=400, eval_episodes=3, eval_max_steps=40, eval_epsilon=0.1,
               final_episodes=9, save_model=False, stop_return=1e9, cuda=False, compile=True, capture_video=True,
               track=True, wandb_project_name="p", wandb_entity="e", resume="it", evaluate="it")
REFUSED = dict(env_id="Acrobot-v1", env_kwargs={"sutton_barto_reward": True}, num_envs=2, async_envs=True, tuned=True,
               frame_stack=2, clip_rewards=True, seed=2, convolutions=((8, 3, 1),), hidden_sizes=(8,), dueling=True,
               layer_norm=False, learning_rate=1.0, anneal_lr=False, buffer_size=700, learning_starts=300,
               batch_size=16, train_frequency=5, gamma=0.9, n_step=2, double_q=False, target_network_frequency=9,
               tau=0.5, loss="huber", max_grad_norm=1.0, start_e=0.9, end_e=0.1, exploration_fraction=0.1,
               checkpoint_frequency=100, exp_name="x", torch_deterministic=False)


def test_a_flag_that_would_make_another_experiment_is_refused_and_equal_ones_pass(in_tmp):
    run_dir = train(resume="runs/it", total_timesteps=300, checkpoint_frequency=0)
    before = snapshot(run_dir)
    for name, value in REFUSED.items():
        words = flags(**{name: value}) if name != "env_kwargs" else ["--env-kwargs", "sutton_barto_reward", "True"]
        args = dqn.parse_args(["--resume", "runs/it", *words])
        with pytest.raises(UsageError, match=rf"^--{name.replace('_', '-')} .*: the run has .* and keeps it$"):
            dqn.train(args)
    assert snapshot(run_dir) == before
    assert ALLOWED.keys() == set(MAY_CHANGE.split())
    assert ALLOWED.keys() | REFUSED.keys() == {field.name for field in fields(Args)}, "each is one or the other"
    for name, value in ALLOWED.items():
        if name not in ("resume", "evaluate"):
            assert getattr(dqn.parse_args(["--resume", "runs/it", *flags(**{name: value})]), name) == value
    same = dqn.load_args("runs/it")
    words = flags(**{name: getattr(same, name) for name in REFUSED if name != "env_kwargs"})
    assert dqn.parse_args(["--resume", "runs/it", *words]) == Args(**vars(same) | {"resume": "runs/it"})


def test_arguments_of_the_environment_beside_resume_must_be_the_same(in_tmp):
    train(resume="runs/it", env_id="FrozenLake-v1", env_kwargs={"is_slippery": False, "map_name": "4x4"},
          total_timesteps=300)
    args = dqn.parse_args("--resume runs/it --env-kwargs is_slippery False".split())
    assert args.env_kwargs == {"is_slippery": False, "map_name": "4x4"}
    dqn.validate(args)
    with pytest.raises(UsageError, match=r"--env-kwargs .*: the run has .* and keeps it"):
        dqn.validate(dqn.parse_args("--resume runs/it --env-kwargs is_slippery True".split()))
    dqn.validate(dqn.parse_args("--evaluate runs/it --env-kwargs is_slippery True".split()))
    with pytest.raises(UsageError, match="--env-id Taxi-v4: the run has FrozenLake-v1 and keeps it"):
        dqn.validate(dqn.parse_args("--evaluate runs/it --env-id Taxi-v4".split()))


def test_a_folder_that_is_missing_or_empty_begins_a_run_there_and_one_of_other_things_is_refused(cli, in_tmp):
    (in_tmp / "empty").mkdir()
    (in_tmp / "begun").mkdir()
    for name in (".lock-0", ".args.json.tmp"):  # of a process that was killed before it could write its settings
        (in_tmp / "begun" / name).touch()
    for folder in ("missing/in/another", "empty", "begun"):
        process = cli(**SHORT | dict(total_timesteps=300), resume=folder)
        assert f"{folder}: a new run\n" in process.out
        assert (in_tmp / folder / "model.pt").exists()
    (in_tmp / "other").mkdir()
    (in_tmp / "other" / "thesis.tex").write_text("x")
    before = snapshot("other")
    for flag in ("--resume", "--evaluate"):
        process = cli(f"{flag} other", status=2)
        assert re.fullmatch(r"dqn.py: error: other is not the folder of a run of this dqn.py: .*\n", process.err)
    assert snapshot("other") == before


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"hidden_sizes": [8], "sail": 3}'])
def test_settings_that_are_none_are_refused(content, tmp_path):
    (tmp_path / "args.json").write_text(content)
    with pytest.raises(UsageError, match="is not the folder of a run"):
        dqn.load_args(tmp_path)


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("hacked"),)


def test_a_damaged_file_or_one_that_could_run_code_is_refused_in_one_line(cli, in_tmp):
    train(total_timesteps=300, resume="runs/it")
    torch.save({"evil": Evil()}, in_tmp / "evil.pt")
    evil = (in_tmp / "evil.pt").read_bytes()
    for name, flag in (("checkpoint-300-0-of-1.pt", "--resume"), ("model.pt", "--evaluate")):
        path = Path("runs/it", name)
        for content in (b"", b"half a file", path.read_bytes()[:-100], pickle.dumps(Evil()), evil):
            path.write_bytes(content)
            with pytest.raises(UsageError, match=f"^{path} cannot be read: "):
                dqn.read_tensors(path)
        process = cli(f"{flag} runs/it", status=2)
        assert process.err.startswith(f"dqn.py: error: {path} cannot be read: ")
        assert process.err.count("\n") == 1
    assert not Path("hacked").exists()


def test_every_run_has_a_folder_of_its_own(in_tmp):
    assert len({train(total_timesteps=300) for _ in range(2)}) == 2


@pytest.fixture
def disk(tmp_path):
    """Make a folder on a file system of so many kB."""
    folder, libc = tmp_path / "disk", ctypes.CDLL(None, use_errno=True)
    folder.mkdir()

    def mount(size):
        if libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, f"size={size}k".encode()):
            pytest.skip(f"cannot mount a small file system: {os.strerror(ctypes.get_errno())}")
        return folder

    yield mount
    libc.umount2(str(folder).encode(), 2)


# too small for TensorBoard's file, args.json, model.pt, the first checkpoint, the second beside it
@pytest.mark.parametrize("size", [4, 8, 60, 252, 600, 1300])
def test_a_full_disk_ends_in_pythons_own_error_and_what_was_written_before_goes_on(size, disk):
    folder = disk(size)
    settings = SHORT | dict(buffer_size=20_000, total_timesteps=12_000, checkpoint_frequency=1000)
    process = finish(start(*flags(**settings), cwd=folder), status=1)
    assert "No space left on device" in process.err
    run_dir = the_run(folder)
    assert not [path for path in run_dir.rglob("*") if path.suffix == ".tmp"]
    for path in run_dir.glob("*.pt"):
        torch.load(path, weights_only=True)
    if (run_dir / "args.json").exists():
        dqn.load_args(run_dir)
    if size in (252, 1300):  # without a checkpoint, and with one
        roomy = shutil.copytree(run_dir, folder.parent / "roomy")
        alone = finish(start(*flags(**settings), "--resume", folder.parent / "alone", cwd=folder.parent))
        resumed = finish(start("--resume", roomy, cwd=folder.parent))
        assert ("goes on at step" in resumed.out) == (size == 1300)
        assert alone.out.splitlines()[-2] == resumed.out.splitlines()[-2]
        assert differences(outcome(folder.parent / "alone"), outcome(roomy)) == []


def test_a_checkpoint_of_another_version_is_refused_in_one_line_and_its_best_network_is_not(cli, in_tmp):
    run_dir = train(resume="runs/it", total_timesteps=300)
    path = run_dir / "checkpoint-300-0-of-1.pt"
    saved = torch.load(path)
    del saved["replay"]["is_last"]  # as in versions that had other flags
    torch.save(saved, path)
    process = cli("--resume runs/it --total-timesteps 400", status=2)
    assert process.err == f"dqn.py: error: {path} does not fit this dqn.py: 'is_last'\n"
    assert "over 2 episodes" in cli("--evaluate runs/it").out
    (run_dir / "model.pt").unlink()
    assert "runs/it/model.pt cannot be read: [Errno 2] No such file" in cli("--evaluate runs/it", status=2).err
