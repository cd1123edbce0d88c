"""The training loop as a function: learning, determinism, what it leaves behind."""

import itertools
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

import dqn
from conftest import ENVIRONMENT, ROOT, read_log
from dqn import CHARTS, Args, Learner, QNetwork, Rollout, TrainingError, derive_seed, make_envs, train
from environments import Catch

SHORT = dict(tuned=False, total_timesteps=1200, learning_starts=200, buffer_size=600, batch_size=32,
             eval_frequency=500, eval_episodes=2, log_frequency=100)


def outcome(monkeypatch, **settings):
    """Everything that a run computed: parameters, replay, evaluations and logged scalars."""
    learners = []
    init = Learner.__init__
    monkeypatch.setattr(Learner, "__init__", lambda self, *a, **k: (learners.append(self), init(self, *a, **k))[1])
    result = train(Args(**SHORT | settings))
    log, replay = read_log(result.run_dir), learners[0].replay
    scalars = {tag: [(event.step, event.value) for event in log.Scalars(tag)] for tag in log.Tags()["scalars"]}
    del scalars["charts/SPS"]
    arrays = [replay.frames, replay.actions, replay.rewards, replay.terminated, replay.ended]
    return learners[0].parameters.clone(), arrays, result.evaluations, result.final_returns.tolist(), scalars


@pytest.mark.parametrize("settings", [dict(num_envs=1), dict(num_envs=3, n_step=3), dict(num_envs=8, dueling=True),
                                      dict(num_envs=2, vectorization="async"),
                                      dict(env_id="LunarLander-v3", num_envs=2)])
def test_a_seed_repeats_to_the_bit_whatever_the_global_generators_do(settings, in_tmp, monkeypatch):
    runs = []
    for i in range(2):
        random.seed(i)
        np.random.seed(i)
        torch.manual_seed(i)
        runs.append(outcome(monkeypatch, **settings))
    (parameters, arrays, *rest), (parameters2, arrays2, *rest2) = runs
    assert torch.equal(parameters, parameters2)
    assert all(np.array_equal(a, b) for a, b in zip(arrays, arrays2, strict=True))
    assert rest == rest2


def test_another_seed_is_another_run(in_tmp, monkeypatch):
    assert not torch.equal(outcome(monkeypatch, seed=1)[0], outcome(monkeypatch, seed=2)[0])


def same(one, other):
    """Whether two outcomes are the same to the bit."""
    (parameters, arrays, *rest), (parameters2, arrays2, *rest2) = one, other
    return (torch.equal(parameters, parameters2) and rest == rest2
            and all(np.array_equal(a, b) for a, b in zip(arrays, arrays2, strict=True)))


@pytest.mark.parametrize(("env_id", "way"), [
    ("FrozenLake-v1", dict(vectorization="async")),
    ("CartPole-v1", dict(vectorization="async")),
    ("CartPole-v1", dict(vectorization="native", env_id="environments:Halves-v0")),
])
def test_learning_while_environments_move_changes_nothing(env_id, way, in_tmp, monkeypatch):
    settings = dict(env_id=env_id, num_envs=3, n_step=3, gradient_steps=2)
    in_turn, overlapped = (outcome(monkeypatch, **settings | each) for each in (dict(vectorization="sync"), way))
    assert same(in_turn, overlapped)


@pytest.mark.parametrize(("settings", "expected"), [
    (dict(env_id="ALE/Pong-v5"), ["send", "learn", "recv"]),
    (dict(env_id="environments:Halves-v0", vectorization="native"), ["send", "learn", "recv"]),
    (dict(vectorization="async"), ["step_async", "learn", "step_wait"]),
    (dict(vectorization="sync"), ["learn", "step"]),
    (dict(vectorization="native"), ["learn", "step"]),
])
def test_what_is_owed_is_learned_between_the_halves_of_a_step_where_it_has_halves(settings, expected, monkeypatch):
    args = Args(**settings, tuned=False, num_envs=2, buffer_size=10, frame_stack=1)
    envs, calls, held = make_envs(args, 2), [], []
    replay = Learner(args, envs, dqn.Ranks()).replay
    for name in {"send", "recv", "step_async", "step_wait", "step"}:
        if method := getattr(envs, name, None):
            monkeypatch.setattr(envs, name, lambda *given, name=name, method=method: (
                calls.append(name), method(*given))[1])
    rollout = Rollout(args, envs, replay, dqn.Ranks())
    rollout.reset()
    for passes in range(1, 4):
        rollout.step(np.zeros(2, np.int64), meanwhile=lambda: (calls.append("learn"), held.append(replay.filled)))
        assert replay.filled == passes
    envs.close()
    assert calls == expected * 3
    assert held == [0, 1, 2], "without the step that is under way"


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(("episodic", "ends"), [(False, [12]), (True, [4, 8, 12])])
def test_a_lost_life_ends_the_future_but_neither_stacks_nor_the_game(episodic, ends, clip):
    args = Args(env_id="environments:ALE/Lives-v0", tuned=False, num_envs=2, buffer_size=78, frame_stack=2, n_step=3,
                gamma=0.5, episodic_life=episodic, clip_rewards=clip)
    replay = Learner(args, envs := make_envs(args, 2), dqn.Ranks()).replay
    rollout = Rollout(args, envs, replay, dqn.Ranks())
    rollout.reset()
    assert rollout.lives.tolist() == [3, 3]
    finished = [rollout.step(np.zeros(2, np.int64), lambda: None) for _ in range(5 * 13)]
    # 3 + 2 + 1 + 0 - 1 - … - 8, whatever is learned from; a reset step follows each game
    assert [(i, episodes) for i, episodes in enumerate(finished, 1) if episodes] == [
        (13 * game - 1, [(-30.0, 12.0)] * 2) for game in range(1, 6)]
    batch, seen = replay.sample(3000, np.random.default_rng(0)), set()
    for (before, (game, step)), reward, (late, following), discount in zip(
            batch.observations.tolist(), batch.rewards.tolist(), batch.next_observations.tolist(),
            batch.discounts.tolist(), strict=True):
        seen.add((game, step))
        end = min(each for each in ends if each > step)
        walked = int(min(3, end - step))
        rewards = [3 - step - i for i in range(walked)]
        assert reward == sum(0.5**i * (np.clip(r, -1, 1) if clip else r) for i, r in enumerate(rewards))
        assert discount == (0 if step + walked == end else 0.5**walked)
        assert following == [game, step + walked]
        assert late == [game, step + walked - 1]
        assert before == ([game, step - 1] if step else [0, 0])
    assert seen == {(game, step) for game in (3, 4, 5) for step in range(12)}, "steps after a lost life are real ones"


def test_a_life_lost_in_breakout_ends_the_future_but_no_game():
    args = Args(env_id="ALE/Breakout-v5", tuned=False, num_envs=2, buffer_size=1000, hidden_sizes=(4,), frame_stack=2,
                episodic_life=True)
    envs, again, rng = make_envs(args, 2), make_envs(args, 2), np.random.default_rng(0)
    replay = Learner(args, envs, dqn.Ranks()).replay
    rollout = Rollout(args, envs, replay, dqn.Ranks())
    rollout.reset()
    lives = again.reset(seed=derive_seed(args.seed, dqn.TRAIN_ENVS, 0))[1]["lives"]
    lost, over, games, finished, returns, lengths = [], [], [], [], np.zeros(2), np.zeros(2)
    for _ in range(400):
        actions = rng.integers(4, size=2)
        finished += rollout.step(actions, lambda: None)
        _, rewards, terminated, truncated, infos = again.step(actions)
        lost.append(infos["lives"] < lives)
        over.append(terminated | truncated)
        lives, returns, lengths = infos["lives"], returns + rewards, lengths + 1
        games += [(returns[i], lengths[i]) for i in np.flatnonzero(over[-1])]
        for i in np.flatnonzero(infos["lives"] == 0):
            returns[i], lengths[i] = 0, -1  # the reset is no step
    assert np.array_equal(replay.terminated[:800].reshape(400, 2), lost)
    assert np.array_equal(replay.ended[:800].reshape(400, 2), over)
    assert finished == games
    assert np.sum(lost) > np.sum(over) >= 2


def test_training_clips_rewards_and_ends_lives_while_reports_and_evaluations_do_not(in_tmp, monkeypatch):
    _, (frames, _, rewards, terminated, ended), evaluations, final_returns, scalars = outcome(
        monkeypatch, env_id="environments:ALE/Lives-v0", clip_rewards=True, episodic_life=True, frame_stack=2)
    assert {value for _, value in scalars["charts/episodic_return"]} == {-30.0}
    assert {value for _, value in scalars["charts/episodic_length"]} == {12.0}
    assert {mean for _, mean in evaluations} == set(final_returns) == {-30.0}
    assert {value for _, value in scalars["eval/episodic_length"]} == {12.0}
    assert set(rewards) == {0.0, *range(-8, 4)}
    following = np.roll(frames[:-1, 1], -1)  # number of the step after
    assert set(following[terminated]) == {4.0, 8.0, 12.0}
    assert set(following[ended]) == {12.0}


def test_where_nothing_can_be_compiled_a_run_goes_on_without(in_tmp, monkeypatch, capsys):
    def broken(function, **settings):
        calls = itertools.count(1)

        def call(*inputs):
            if next(calls) < 3:
                return function(*inputs)
            raise RuntimeError("there is no compiler\n  anywhere")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    compiled, eager = (outcome(monkeypatch, compile=wanted) for wanted in (True, False))
    lines = [line for line in capsys.readouterr().out.splitlines() if "--compile:" in line]
    assert lines == ["--compile: goes on without, there is no compiler anywhere"]
    assert same(compiled, eager)


def test_a_run_leaves_the_global_generators_and_settings_alone(in_tmp):
    states = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
    threads = torch.get_num_threads()
    assert not torch.backends.cudnn.deterministic
    train(Args(**SHORT))
    assert states[:2] == (random.getstate(), str(np.random.get_state()))
    assert torch.equal(states[2], torch.get_rng_state())
    assert torch.get_num_threads() == threads
    assert not torch.backends.cudnn.deterministic


def test_nothing_happens_at_import(tmp_path):
    code = "import sys; before = set(sys.modules); import dqn; assert 'wandb' not in sys.modules; print(dqn.Args())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Args(")
    assert not done.stderr
    assert not list(tmp_path.iterdir())


def test_the_log_holds_every_tag(in_tmp):
    log = read_log(train(Args(**SHORT, num_envs=3)).run_dir)
    tags = set(log.Tags()["scalars"])
    assert tags == {"charts/episodic_return", "charts/episodic_length", "charts/SPS", "charts/epsilon",
                    "charts/learning_rate", "losses/td_loss", "losses/q_values", "losses/grad_norm",
                    "eval/episodic_return", "eval/episodic_length", "eval/q_bias", "target/lag", "target/drift"}
    assert {tag for tags in CHARTS.values() for tag in tags} == tags
    assert [event.step for event in log.Scalars("eval/episodic_return")] == [501, 1002, 1200]
    assert [event.step for event in log.Scalars("losses/td_loss")] == [300, 402, 501, 600, 702, 801, 900, 1002, 1101,
                                                                       1200]
    assert {"hyperparameters/text_summary", "custom_scalars__config__"} <= set(log.Tags()["tensors"])
    plugins = log.summary_metadata
    assert plugins["_hparams_/session_start_info"].plugin_data.plugin_name == "hparams"
    assert b"train_frequency" in plugins["_hparams_/session_start_info"].plugin_data.content


def test_a_watcher_sees_the_learner_whenever_losses_are_logged(in_tmp):
    seen = []
    settings = SHORT | dict(log_frequency=300, target_network_frequency=600, tau=1.0)
    train(Args(**settings), lambda step, learner: seen.append((step, learner.learned_step)))
    assert seen == [(300, 299), (600, 599), (900, 899), (1200, 1199)]  # what the last step owes comes after


def test_the_logged_lag_is_that_before_a_hard_update_of_the_same_step(in_tmp):
    log = read_log(train(Args(**SHORT, target_network_frequency=100)).run_dir)
    assert all(event.value > 0 for event in log.Scalars("target/lag"))


def test_logged_returns_and_lengths_are_those_of_the_episodes(in_tmp):
    settings = SHORT | dict(num_envs=3, env_id="MountainCar-v0", total_timesteps=2000, learning_starts=1900)
    log = read_log(train(Args(**settings)).run_dir)
    returns, lengths = (log.Scalars(f"charts/episodic_{name}") for name in ("return", "length"))
    # each step costs 1 and the limit is 200; the reset step is no step, so episodes end after 200, 401, …
    assert [event.value for event in returns] == [-200.0] * len(returns)
    assert [event.value for event in lengths] == [200.0] * len(lengths)
    assert [event.step for event in returns] == [600] * 3 + [1203] * 3 + [1806] * 3


def test_the_model_file_rebuilds_the_best_network(in_tmp):
    result = train(Args(**SHORT, hidden_sizes=(16,), dueling=True))
    saved = torch.load(result.run_dir / "model.pt", weights_only=True)
    args = Args(**saved["args"])
    assert (args.hidden_sizes, args.dueling, args.total_timesteps) == ((16,), True, 1200)
    network = QNetwork(make_envs(args, 1).single_observation_space, 2, args.hidden_sizes, args.dueling, args.layer_norm)
    network.load_state_dict(saved["q_network"])
    number = max(i for i, (step, mean) in enumerate(result.evaluations) if mean == result.best_return)
    episodes = 100 if number == 2 else 2
    again = dqn.evaluate(network, make_envs(args, 2), episodes, dqn.derive_seed(1, dqn.EVAL_ENVS, number))
    assert again.returns.mean() == result.best_return


def test_what_is_kept_is_the_best_network_and_not_what_came_of_it(in_tmp, monkeypatch):
    returns, reports = iter([10.0, 7.0, 5.0]), []
    monkeypatch.setattr(dqn, "evaluate", lambda *rest, **settings: dqn.Evaluation(*np.full((3, 2), next(returns))))
    close = dqn.Report.close
    monkeypatch.setattr(dqn.Report, "close", lambda self: (reports.append(self), close(self))[1])
    result = train(Args(**SHORT))
    assert result.evaluations == [(500, 10.0), (1000, 7.0), (1200, 5.0)]
    assert (result.best_return, reports[0].best_step) == (10.0, 500)
    saved = torch.load(result.run_dir / "model.pt", weights_only=True)["q_network"]
    kept = reports[0].best_network.state_dict()
    assert all(torch.equal(kept[name], saved[name]) for name in saved)


def test_no_save_model_writes_none(in_tmp):
    assert not (train(Args(**SHORT, save_model=False)).run_dir / "model.pt").exists()


def test_the_run_ends_once_a_greedy_evaluation_reaches_the_stop_return(in_tmp, monkeypatch):
    seeds = []
    evaluate = dqn.evaluate
    monkeypatch.setattr(dqn, "evaluate", lambda network, envs, episodes, seed, *rest, **settings: (
        seeds.append(seed), evaluate(network, envs, episodes, seed, *rest, **settings))[1])
    assert train(Args(**SHORT, stop_return=5.0)).global_step == 500
    assert len(set(seeds)) == 2, "the verdict plays other episodes than the evaluation that ended the run"


def test_two_runs_of_one_second_do_not_share_a_folder(in_tmp, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 1000.0)
    runs = [train(Args(**SHORT | dict(total_timesteps=300), env_id=env_id)).run_dir
            for env_id in ["environments:Walk-v0"] * 3]
    assert [run.name for run in runs] == [f"environments-Walk-v0__dqn__1__1000{end}" for end in ("", "_2", "_3")]
    assert all(run.parent.name == "runs" for run in runs)


def test_a_table_learns_the_values_of_a_frozen_lake_without_slip(in_tmp):
    """One step from the goal is worth 1, two steps gamma, ...: six steps lead from start to goal."""
    values = []

    class Spy(dqn.Report):
        def evaluate(self, step, network, *rest):
            values.append(network(torch.eye(16)).max(1).values.detach())
            return super().evaluate(step, network, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dqn, "Report", Spy)
        dqn.gym.register("StillLake-v0", "gymnasium.envs.toy_text.frozen_lake:FrozenLakeEnv", max_episode_steps=100,
                         kwargs={"is_slippery": False})
        result = train(Args(env_id="StillLake-v0", total_timesteps=16_000, num_envs=4, hidden_sizes=(), end_e=1.0,
                            learning_rate=0.02, learning_starts=500, train_frequency=4, buffer_size=16_000,
                            target_network_frequency=100, eval_frequency=0, gamma=0.9))
    assert result.final_returns.tolist() == [1.0] * 100
    for state, steps in ((14, 1), (13, 2), (10, 2), (9, 3), (8, 4), (4, 5), (0, 6)):
        assert values[-1][state].item() == pytest.approx(0.9 ** (steps - 1), rel=0.02)


def test_two_frames_are_needed_to_catch_and_suffice():
    """Of all that can be done while the paddle moves one thing catches; when it has to begin, two balls look alike."""
    for offset in range(-4, 5):
        frames, ways = [], []
        for direction in (-1, 1):
            env = Catch()
            env.reset(seed=0)
            env.offset, env.direction = offset, direction
            frames.append([env.step(action)[0] for action in (0, 2, 1, 0, 2, 1, 0, 2, 1)][-2:])  # moves nothing
            for actions in itertools.product(range(3), repeat=3):
                env.fallen, env.paddle = 9, 42
                steps = [env.step(action) for action in actions]
                assert [step[1:4] for step in steps[:2]] == [(0.0, False, False)] * 2
                assert steps[2][1] in (-1.0, 1.0)
                assert steps[2][2]
                ways += [(direction, actions)] if steps[2][1] == 1 else []
        assert ways == [(-1, (0, 0, 0)), (1, (2, 2, 2))]
        assert np.array_equal(frames[0][1], frames[1][1])
        assert not np.array_equal(frames[0][0], frames[1][0])


def test_catching_a_ball_is_learned_from_pixels(in_tmp):
    """Whoever sees single frames catches half of the balls at best."""
    result = train(Args(env_id="environments:Catch-v0", frame_stack=2, num_envs=8, total_timesteps=8_000, seed=8,
                        learning_starts=500, buffer_size=8_000, batch_size=32, train_frequency=4, learning_rate=5e-4,
                        n_step=3, gamma=0.97, target_network_frequency=400, hidden_sizes=(64,), eval_frequency=0))
    assert set(result.final_returns) <= {-1.0, 1.0}
    assert (result.final_returns == 1).mean() >= 0.95


def test_cartpole_is_learned(in_tmp):
    result = train(Args(env_id="CartPole-v1", seed=6))
    assert result.global_step <= 80_000
    assert result.final_returns.mean() >= 475


def test_a_loss_that_is_not_finite_ends_the_run_and_the_log_stays_readable(in_tmp):
    with pytest.raises(TrainingError, match=r"loss not finite at step \d.*--learning-rate"):
        train(Args(**SHORT, learning_rate=1e30))
    (run_dir,) = (in_tmp / "runs").iterdir()
    assert read_log(run_dir).Scalars("charts/epsilon")
