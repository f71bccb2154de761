"""The controller and CMA-ES, the car's camera, and the training loop; merged into test_all.py."""
import dataclasses
import hashlib
import io
import json
import math
import pathlib
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import cma
import gymnasium as gym
import numpy as np
import pytest
import torch

import carracing
import rollout
import train
from carracing import CarRacing, pedals, shrink
from controller import CMAES, Controller, rosenbrock

torch.set_num_threads(1)
HERE = pathlib.Path(__file__).parent

# --------------------------------------------------------------------------------------------------
# controller.py
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, size", [
    ((32 + 256, 3), 867), ((32, 3), 99), ((32, 3, 40), 1443),
    ((64 + 512 + 512, 1, 0, False), 1088)])
def test_controller_has_the_papers_number_of_parameters_and_is_the_formula(arguments, size):
    c, rng = Controller(*arguments), np.random.default_rng(0)
    assert c.size == size
    theta, x = rng.standard_normal(size), rng.standard_normal((5, arguments[0]))
    # torch's own layers, filled with the same numbers
    bias = arguments[3] if len(arguments) > 3 else True
    hidden = arguments[2:3] and arguments[2]
    widths = [arguments[0], *([hidden] if hidden else []), arguments[1]]
    layers = [torch.nn.Linear(i, o, bias=bias).double() for i, o in zip(widths, widths[1:])]
    torch.nn.utils.vector_to_parameters(
        torch.from_numpy(theta), [p for layer in layers for p in layer.parameters()])
    y = torch.from_numpy(x)
    for layer in layers:
        y = torch.tanh(layer(y))
    np.testing.assert_allclose(c.act(theta, x), y.detach().numpy(), rtol=1e-12)
    with pytest.raises(ValueError):
        c.act(theta[:-1], x)


N = 6
ROTATION = np.linalg.qr(np.random.default_rng(0).standard_normal((N, N)))[0]
FUNCTIONS = {
    "sphere": lambda x: (x ** 2).sum(-1),
    "ellipsoid": lambda x: (1e6 ** (np.arange(N) / (N - 1)) * x ** 2).sum(-1),
    "rosenbrock": rosenbrock,
    "rotated cigar": lambda x: ((x @ ROTATION) ** 2 * ([1] + [1e6] * (N - 1))).sum(-1)}


def evaluations(es, f, ours):
    """How many until one is below 1e-8."""
    for generation in range(5000):
        x = np.array(es.ask())
        values = f(x)
        if values.min() < 1e-8:
            return generation * len(x) + 1 + int(np.argmax(values < 1e-8))
        es.tell(values) if ours else es.tell(list(x), list(values))
    return math.inf


@pytest.mark.parametrize("name", FUNCTIONS)
def test_cmaes_needs_as_many_evaluations_as_pycma(name):
    start = np.zeros(N) if name == "rosenbrock" else np.full(N, 0.5)
    ours = [evaluations(CMAES(start, 0.3, seed=s), FUNCTIONS[name], True) for s in range(5)]
    theirs = [evaluations(cma.CMAEvolutionStrategy(start, 0.3, {"seed": s + 1, "verbose": -9}),
                          FUNCTIONS[name], False) for s in range(5)]
    assert np.median(ours) <= 1.3 * np.median(theirs)


def test_cmaes_goes_on_from_its_state_and_only_ranks_count():
    a, b = (CMAES(np.ones(5), 0.5, 10, seed=3) for _ in range(2))
    for _ in range(20):
        x = a.ask()
        assert (x == b.ask()).all()
        a.tell(rosenbrock(x))
        b.tell(np.log1p(rosenbrock(x)))                        # another scale, the same order
    c = CMAES(np.zeros(5), 0.1, 10, seed=3)
    c.load(a.state())
    assert (a.mean == b.mean).all() and (a.C == b.C).all() and (c.ask() == a.ask()).all()
    with pytest.raises(ValueError):
        a.tell([math.nan] * 10)
    with pytest.raises(ValueError):
        CMAES(np.ones(5)).tell([0.0] * 8)


def test_cmaes_of_the_papers_size_decomposes_now_and_then():
    es = CMAES(np.zeros(1088), 0.1, 64)
    done = []
    for _ in range(6):
        es.tell((es.ask() ** 2).sum(1))
        done.append(es.decomposed)
    assert done == [0, 0, 0, 4, 4, 4]          # 1 / (10 n (c_1 + c_mu)) = 3.2 generations
    np.testing.assert_allclose(es.w[:32].sum(), 1)
    assert np.linalg.eigvalsh(es.C).min() > 0


# --------------------------------------------------------------------------------------------------
# carracing.py
# --------------------------------------------------------------------------------------------------


def driven(steps, seed=0):
    """Actions that mostly accelerate, each held for ten steps."""
    rng = np.random.default_rng(seed)
    return pedals(rng.uniform((-0.3, -1, -1), (0.3, 1, 0.2), (steps // 10 + 1, 3))).repeat(10, 0)


def test_pedals_follow_the_code_behind_the_paper():
    np.testing.assert_allclose(
        pedals([[0.5, 0, -0.5], [-1, 1, 0.5], [0, -1, 0]]),
        [[0.5, 0.5, 0], [-1, 1, 0.5], [0, 0, 0]])


@pytest.fixture(scope="module")
def drive():
    """The same drive in gymnasium and with our camera: (picture, reward, terminated, truncated)."""
    both, actions = [], driven(150)
    for env in (gym.make("CarRacing-v3", max_episode_steps=130), CarRacing(max_steps=130)):
        seen = [(env.reset(seed=5)[0], 0.0, False, False)]
        for action in actions[:130]:
            seen.append(env.step(action)[:4])
        both.append(seen)
        env.close()
    return both


def test_rewards_and_ends_are_gymnasiums(drive):
    assert [step[1:] for step in drive[0]] == [step[1:] for step in drive[1]]
    assert drive[1][-1][3] and not drive[1][-2][3]
    assert max(step[1] for step in drive[1]) > 1       # tiles were visited


def test_leaving_the_playfield_ends_the_drive_as_in_gymnasium(monkeypatch):
    # A small playfield: driving straight on leaves it soon. The same number in both modules.
    ends = []
    monkeypatch.setattr(carracing.car_racing, "PLAYFIELD", 230)
    monkeypatch.setattr(carracing.car_racing.CarRacing, "_render", lambda self, mode: None)
    for env in (carracing.car_racing.CarRacing(), CarRacing()):
        env.reset(seed=1)
        for t in range(1000):
            _, reward, terminated, _, info = env.step(np.array([0.3, 1, 0], np.float32))
            if terminated:
                break
        ends.append((t, reward, info))
    assert ends[0] == ends[1] and ends[1][1] == -100 and not ends[1][2]["lap_finished"]


def picture_errors(drive, picture_of=lambda frame: frame):
    """Mean differences of each tenth picture, 0 to 255. gymnasium's shrinking rounds colours down,
    twice: 2 of 255, which we do not copy.
    """
    pairs = [(shrink(a[0]).astype(float), b[0].astype(float))
             for a, b in zip(*(seen[::10] for seen in drive))]
    return [abs(theirs + 2 * (theirs > 0) - picture_of(ours)).mean() for theirs, ours in pairs]


def test_pictures_are_gymnasiums_shrunk(drive):
    errors = picture_errors(drive)
    assert max(errors) < 1.5 and np.mean(errors) < 0.8
    # One pixel off, a little too large, upside down: each would be seen.
    for wrong in (lambda p: np.roll(p, 1, 0), lambda p: np.roll(p, 1, 1), lambda p: p[::-1],
                  lambda p: p[:, ::-1], lambda p: p[2:62].repeat(2, 0)[:64]):
        assert np.mean(picture_errors(drive, wrong)) > 1.5
    # The car, in its box alone: it is there, and it is red.
    rows, columns = carracing.BOX
    for theirs, ours in zip(*(seen[60::10] for seen in drive)):
        box = shrink(theirs[0])[rows, columns].astype(float) + 2 - ours[0][rows, columns]
        assert abs(box).mean() < 10
        assert ours[0][54, 31, 0] > ours[0][54, 31, 1] + 50.0


def test_the_bar_of_indicators_is_cut_off(drive):
    frame = drive[0][-1][0]
    assert (frame[84:, 90:] == 0).all() and (frame[:84, 90:].sum(-1) > 0).all()


def test_shrink_takes_area_means_of_84_rows():
    frame = np.random.default_rng(0).integers(256, size=(96, 96, 3)).astype(np.uint8)
    fine = frame[:84].astype(float).repeat(16, 0).repeat(2, 1)            # 84 x 16 = 64 x 21 rows
    means = fine.reshape(64, 21, 64, 3, 3).mean((1, 3))
    assert abs(shrink(frame) - means).max() <= 0.5 + 1e-9


def test_a_visited_tile_changes_colour_and_the_camera_is_gymnasiums_box():
    env = CarRacing()
    env.reset(seed=0)
    colours = env.palette[carracing.TILE:].copy()
    for action in driven(60):
        frame = env.step(action)[0]
    visited = np.array([tile.road_visited for tile in env.road])
    assert (env.palette[carracing.TILE:][visited] == 102).all() and visited.sum() > 1
    assert (env.palette[carracing.TILE:][~visited] == colours[~visited]).all()
    assert env.observation_space.contains(frame)


# --------------------------------------------------------------------------------------------------
# rollout.py and train.py
# --------------------------------------------------------------------------------------------------

TINY = ["--preset", "smoke", "--rollouts", "3", "--rollout_steps", "50", "--steps", "12",
        "--vae_updates", "3", "--vae_batch", "2", "--m_updates", "3", "--m_batch", "2",
        "--generations", "2", "--trials", "1", "--eval_rollouts", "2"]


@pytest.fixture
def here(monkeypatch):
    """Rollouts in threads of this process, and no time spent on estimates."""
    monkeypatch.setattr(train, "open_pool", lambda config: ThreadPoolExecutor(config.workers))
    monkeypatch.setattr(train, "estimate", lambda *_: {})
    monkeypatch.setattr(train, "draw_curves", lambda run: None)
    monkeypatch.setattr(train.os, "fsync", lambda descriptor: None)


def contents(state):
    """A checkpoint's dict as comparable bytes, without what may differ."""
    state = {k: v for k, v in state.items() if k != "config"}
    data = io.BytesIO()
    torch.save(state, data)
    return torch.load(io.BytesIO(data.getvalue()), weights_only=True)


def equal(a, b):
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def test_a_run_stopped_anywhere_ends_as_one_that_was_not(tmp_path, here, monkeypatch, capsys):
    def arguments(name, workers):
        return ["--task", "car", *TINY, "--out", str(tmp_path / name), "--workers", workers]

    assert train.main(arguments("whole", "1")) == 0
    # The other: more workers, stopped by Ctrl-C in the middle of each stage.
    stops, save = [("rollouts", 1), ("V", 2), ("M", 1), ("C", 1)], train.Run.save

    def stopping_save(run, always=True):
        stop = stops and (run.state["stage"], run.state["update"]) == stops[0]
        save(run, always or stop)
        if stop:
            stops.pop(0)
            raise KeyboardInterrupt

    monkeypatch.setattr(train.Run, "save", stopping_save)
    # Rollouts are saved by the clock: let it be time after the first.
    monkeypatch.setattr(train, "SAVE_SECONDS", -1)
    folder = tmp_path / "parts/car-smoke-s0"
    assert train.main(arguments("parts", "3")) == 1
    with open(folder / "rollouts.bin", "ab") as file:
        file.write(b"written after the last checkpoint")
    monkeypatch.setattr(train, "SAVE_SECONDS", 120)
    for left in 3, 2, 1, 0:
        assert f"error: stopped; go on with --resume {folder}" in capsys.readouterr().err
        assert len(stops) == left
        assert train.main(["--resume", str(folder), "--workers", "2"]) == (left > 0)
    whole, parts = (contents(train.read_checkpoint(tmp_path / name / "car-smoke-s0"))
                    for name in ("whole", "parts"))
    assert whole["stage"] == "done" and equal(whole, parts)
    for name in "rollouts.bin", "metrics.csv", "vae.png":
        assert (tmp_path / "whole/car-smoke-s0" / name).read_bytes() == (folder / name).read_bytes()

    monkeypatch.setattr(train.Run, "save", save)
    # V and M of a finished run can be taken over: only C is evolved, here from z alone.
    assert train.main([*arguments("more", "1"), "--reads", "z", "--models", str(folder)]) == 0
    z = train.read_checkpoint(tmp_path / "more/car-smoke-s0-z")
    assert z["theta"].shape == (99,) and equal(z["V"], parts["V"])

    # A damaged checkpoint: the one before is taken. Both damaged, or foreign: one line.
    capsys.readouterr()
    for name, status, text in (("checkpoint.pt", 0, "warning"),
                               ("checkpoint-previous.pt", 1, "error")):
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)
        monkeypatch.setattr(train.Run, "save", lambda *_, **__: None)
        assert train.main(["--resume", str(folder)]) == status
        error = capsys.readouterr().err.splitlines()[0]
        assert error.startswith(text) and "is damaged" in error


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return pathlib.Path.touch, (tmp_path / "owned",)

    data = io.BytesIO()
    torch.save(Evil(), data)
    data = data.getvalue()
    (tmp_path / "checkpoint.pt").write_bytes(hashlib.sha256(data).digest() + data)
    assert train.main(["--resume", str(tmp_path)]) == 1
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("arguments, text", [
    (["--task", "pong"], "--task is car or doom"),
    (["--task", "car", "--preset", "big"], "--preset is small, paper or smoke"),
    (["--task", "doom", "--reads", "z"], "--reads"),
    (["--task", "car", "--population", "3"], "--population must be 4 or more"),
    (["--resume", "nowhere"], "nowhere holds no checkpoint"),
    (["--task", "car", "--models", "nowhere"], "nowhere holds no checkpoint")])
def test_bad_input_gets_one_line(arguments, text, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and text in error and error.count("\n") == 1
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("task, module", [("doom", "vizdoom"), ("car", "Box2D")])
def test_missing_packages_get_one_line(task, module):
    code = (f"import sys; sys.modules[{module!r}] = None\n"
            f"import train; sys.exit(train.main(['--task', {task!r}]))")
    result = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ") and "pip install" in result.stderr


def test_a_full_disk_gets_one_line_and_loses_nothing(tmp_path, here, monkeypatch, capsys):
    folder, write = tmp_path / "car-smoke-s0", train.write_atomically

    def full(path, data, keep=None):
        if len(data) > 10_000_000:                      # the first checkpoint with V in it
            raise OSError(28, "No space left on device", str(path))
        write(path, data, keep)

    monkeypatch.setattr(train, "write_atomically", full)
    assert train.main(["--task", "car", *TINY, "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and "No space left" in error
    assert f"--resume {folder}" in error
    assert train.read_checkpoint(folder)["stage"] == "V"


def test_gates_stop_a_run_whose_m_predicts_nothing(tmp_path, here, monkeypatch, capsys):
    monkeypatch.setattr(train, "log_likelihood", lambda z, *_: z * 0 - 9)
    assert train.main(["--task", "car", *TINY, "--gate", "0.15", "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "M does not pass its gate" in error and "--m_updates 6" in error
    assert train.read_checkpoint(tmp_path / "car-smoke-s0")["stage"] == "M"


def test_doom_is_evolved_only_if_dreams_last_as_long_as_games(tmp_path, here, monkeypatch, capsys):
    dreams, games = [], []

    def records(config, number):                        # noise, fifty steps until death
        rng, kind = np.random.default_rng(number), rollout.record_type(config)
        record = np.frombuffer(rng.bytes(50 * kind.itemsize), kind).copy()
        record["action"] = rng.uniform(-1, 1, (50, 1))
        record["first"], record["done"] = np.arange(50) == 0, np.arange(50) == 49
        return record

    def dream(config, weights, policy, seeds):
        dreams.append((config.temperature, policy if isinstance(policy, str) else "C"))
        return [120.0] * len(seeds)

    def play(config, weights, policy, seeds):
        games.append(policy if isinstance(policy, str) else "C")
        return [100.0 + 5 * (policy == "random")] * len(seeds)

    monkeypatch.setattr(train, "make_env", lambda config, steps: CarRacing())
    monkeypatch.setattr(train, "log_likelihood", lambda z, *_: z * 0 + 9)
    for function in dream, play:
        monkeypatch.setattr(train, function.__name__, function)
    monkeypatch.setattr(train, "random_rollout", records)
    # 120 dreamed steps for 100 real ones are too many for 15 %, 120 for 105 are not.
    assert train.main(["--task", "doom", *TINY, "--gate", "0.15", "--out", str(tmp_path)]) == 1
    out, error = capsys.readouterr()
    assert "no controller is evolved" in error and "nothing: 120 +- 0" in out and "+14%" in out
    assert set(dreams) == {(1.0, "nothing"), (1.0, "random")} and "C" not in games
    # With a wider gate the same run goes on, in dreams at tau 1.15; the game only measures.
    dreams.clear(), games.clear()
    folder = tmp_path / "doom-smoke-s0"
    assert train.main(["--resume", str(folder), "--gate", "0.25"]) == 0
    assert dreams.count((1.15, "C")) == 2 * 4 and games.count("C") == 1
    state = train.read_checkpoint(folder)
    assert state["starts"].shape == (3, 2, 64) and state["best_actual"] == 100


def models(config):
    torch.manual_seed(0)
    v, m = rollout.new_models(config)
    return v, m, rollout.pack(dict(V=v.state_dict(), M=m.state_dict(),
                                   starts=torch.randn(3, 2, v.z_size)))


def test_play_is_the_loop_of_figure_2(monkeypatch):
    config = train.Config(steps=8)
    v, m, weights = models(config)
    theta = np.random.default_rng(0).normal(0, 1, 867).astype(np.float32)
    env, total, c, actions, played = CarRacing(max_steps=8), 0, Controller(288, 3), [], []
    frame, state = env.reset(seed=7)[0], m.initial_state(1)
    with torch.no_grad():
        for _ in range(8):
            z = v.encode(torch.from_numpy(frame)[None])[0]
            actions.append(pedals(c.act(theta, torch.cat([z, state[0]], 1).numpy())))
            state = m(z[None], torch.from_numpy(actions[-1])[None], state)[-1]
            frame, reward, *_ = env.step(actions[-1][0])
            total += reward
    monkeypatch.setattr(rollout, "to_action", lambda c, a: played.append(pedals(a)) or played[-1])
    # The same alone and beside another rollout.
    for seeds in [7], [3, 7]:
        played.clear()
        assert rollout.play(config, weights, theta, seeds)[-1] == pytest.approx(total, abs=1e-4)
        np.testing.assert_allclose([a[-1] for a in played], [a[0] for a in actions], atol=1e-4)
    assert np.ptp(actions, 0).min() > 1e-3


def test_records_of_random_play_align():
    config = train.Config(rollout_steps=30)
    records = rollout.random_rollout(config, 2)
    env, first = CarRacing(), rollout.seed_of(config.seed, rollout.COLLECT, 2)
    frame = env.reset(seed=first)[0]
    for t, record in enumerate(records):                # what is done at t leads to frame t + 1
        assert (record["frame"] == frame).all() and record["first"] == (t == 0)
        frame = env.step(record["action"])[0]
    assert len(records) == 30 and not records["done"].any()
    changes = (records["action"][1:] != records["action"][:-1]).any(1).sum()
    assert 3 <= changes <= 15


def test_doom_is_evolved_in_dreams_alone(monkeypatch):
    config = train.Config(**train.PRESETS["smoke", "doom"] | dict(task="doom", steps=20))
    weights = models(config)[2]
    theta = np.random.default_rng(0).normal(0, 0.1, 1088)
    monkeypatch.setattr(rollout, "make_env", None)      # no game is started
    survived = rollout.dream(config, weights, theta, [1, 2, 3])
    assert survived == rollout.dream(config, weights, theta, [1, 2, 3])
    assert len(survived) == 3 and 1 <= min(survived) <= max(survived) <= 20


def test_dask_gives_the_same_numbers_as_this_process(tmp_path):
    pytest.importorskip("distributed")
    config = train.Config(steps=10)
    weights, seeds = models(config)[2], [[1, 2], [3, 4]]
    theta = np.full(867, 0.01)
    here = [rollout.play(config, weights, theta, s) for s in seeds]
    # A real cluster, elsewhere: its processes do not see our folder.
    file = tmp_path / "scheduler.json"
    dask = [subprocess.Popen([sys.executable, "-m", "dask", *arguments, "--scheduler-file", file],
                             cwd=tmp_path, stderr=subprocess.DEVNULL)
            for arguments in (["scheduler", "--port", "0", "--no-dashboard", "--no-show"],
                              ["worker", "--nworkers", "2", "--nthreads", "1", "--no-dashboard"])]
    try:
        for _ in range(600):
            if file.exists() and file.read_text():
                break
            time.sleep(0.1)
        address = json.loads(file.read_text())["address"]
        pool = train.open_pool(dataclasses.replace(config, scheduler=address))
        assert list(pool.map(train.partial(train.play, config, weights, theta), seeds)) == here
        pool.shutdown()
    finally:
        for process in dask[::-1]:
            process.terminate()
            process.wait()


def test_without_dask_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ImportError, match="pip install distributed"):
        train.open_pool(train.Config(scheduler="tcp://host:8786"))


def test_the_estimate_counts_what_is_left():
    config = train.Config(**train.PRESETS["smoke", "car"] | dict(workers=1))
    whole, half = train.estimate(config, "rollouts", 0), train.estimate(config, "M", 29)
    assert list(whole) == ["rollouts", "V", "M", "C"] and list(half) == ["M", "C"]
    assert 0 < half["M"] < whole["M"] and 0.01 < sum(whole.values()) < 20
    assert train.estimate(config, "done", 0) == {}


def test_train_is_short():
    assert len((HERE / "train.py").read_text().splitlines()) <= 500
    for path in HERE.glob("*.py"):
        assert max(map(len, path.read_text().splitlines())) <= 100, path
