"""A guided tour of World Models, in the order in which the data flows; every stop is a check.

    vae -> mdnrnn -> controller -> carracing -> doom -> rollout and train -> evaluate -> the house

Each test names the claim it checks, and holds the code against something that can be trusted:
torch.distributions and torch's own layers, gymnasium's game and its checkers, pycma, a plain loop
or published numbers.

    python -m pytest world_models_2018/test_all.py              # under two minutes on one core
    python -m pytest world_models_2018/test_all.py -k doom      # only these stops
"""
import dataclasses
import hashlib
import io
import itertools
import json
import math
import pathlib
import re
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from PIL import Image

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import doom
import evaluate
import mdnrnn
import rollout
import train
import vae
from controller import CMAES, Controller, rosenbrock
from doom import DoomDream, DoomEnv, random_actions
from mdnrnn import DONE_WEIGHT, MDNRNN, log_likelihood, sample
from vae import VAE, pixels

try:
    import carracing
    from carracing import CarRacing, pedals, shrink
except ImportError:
    carracing = None

torch.set_num_threads(1)
needs_box2d = pytest.mark.skipif(carracing is None, reason="Box2D is not installed")
needs_vizdoom = pytest.mark.skipif(doom.vizdoom is None, reason="vizdoom is not installed")


def parameters(model):
    return sum(p.numel() for p in model.parameters())


# --------------------------------------------------------------------------------------------------
# vae.py
# --------------------------------------------------------------------------------------------------

def test_vae_has_the_published_parameters():
    assert parameters(VAE(32)) == 4_348_547
    assert parameters(VAE(64)) == 4_446_915


def test_vae_takes_frames_and_gives_pictures():
    model = VAE(32)
    frames = torch.randint(256, (2, 64, 64, 3), dtype=torch.uint8)
    x = pixels(frames)
    assert torch.equal((x[1, 2, 3, 4] * 255).round().byte(), frames[1, 3, 4, 2])
    with torch.no_grad():
        (mu, logvar), (mu2, logvar2) = model.encode(frames), model.encode(x)
        picture = model.decode(model.sample(mu, logvar))
    assert torch.equal(mu, mu2) and torch.equal(logvar, logvar2)
    assert mu.shape == logvar.shape == (2, 32)
    assert picture.shape == (2, 3, 64, 64) and 0 < picture.min() and picture.max() < 1
    for bad in (frames.permute(0, 3, 1, 2), frames.float(), x[:, :, :63], x.double().long()):
        with pytest.raises(ValueError, match="frames must be"):
            model.encode(bad)


def test_vae_shapes_between_are_the_published_ones():
    """Appendix A.1: nothing is padded, the linear layer before the decoder is not activated."""
    model, shapes = VAE(32), []
    for layer in (*model.encoder, *model.decoder):
        layer.register_forward_hook(lambda _, __, y: shapes.append(tuple(y.shape[1:])))
    with torch.no_grad():
        model.decode(model.encode(torch.rand(1, 3, 64, 64))[0])
    sizes = [s for s, _ in itertools.groupby(s for s in shapes if len(s) == 3)]
    assert sizes == [(32, 31, 31), (64, 14, 14), (128, 6, 6), (256, 2, 2), (1024, 1, 1),
                     (128, 5, 5), (64, 13, 13), (32, 30, 30), (3, 64, 64)]
    z = torch.linspace(-3, 3, 32).expand(1, -1)
    assert (model.decoder[:2](z) < 0).any()


def test_vae_samples_from_mu_and_logvar():
    model = VAE(2)
    mu, logvar = torch.tensor([[3.0, -1.0]]), torch.tensor([[2 * math.log(0.5), 2 * math.log(2.0)]])
    mu, logvar = mu.expand(50_000, 2), logvar.expand(50_000, 2)
    z = model.sample(mu, logvar, torch.Generator().manual_seed(0))
    assert torch.allclose(z.mean(0), mu[0], atol=0.03)
    assert torch.allclose(z.std(0), torch.tensor([0.5, 2.0]), rtol=0.02)


def test_vae_loss_is_squared_error_and_clipped_divergence():
    """Against torch.distributions and a plain sum; below 0.5 nats per z the divergence is free."""
    model, x = VAE(32), torch.rand(3, 3, 64, 64)
    mu, logvar = torch.randn(3, 32), torch.randn(3, 32)
    q = torch.distributions.Normal(mu, (logvar / 2).exp())
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(1)
    for scale in (1.0, 0.01):
        model.encode = lambda _, s=scale: (mu * s, logvar * s)
        if scale != 1:
            q = torch.distributions.Normal(mu * scale, (logvar * scale / 2).exp())
            kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(1)
        with torch.no_grad():
            loss, parts = model.loss(x, torch.Generator().manual_seed(1))
            z = model.sample(mu * scale, logvar * scale, torch.Generator().manual_seed(1))
            error = (model.decode(z) - x).pow(2).reshape(3, -1).sum(1)
        free = torch.full_like(kl, 16.0)
        assert torch.allclose(loss, (error + torch.maximum(kl, free)).mean())
        assert torch.allclose(parts["kl"], kl.mean(), atol=1e-5)
        assert torch.allclose(parts["error"], error.mean())
        assert (kl > 16).all() == (scale == 1)


def test_vae_learns_a_batch():
    torch.manual_seed(0)
    model = VAE(8)
    x = torch.zeros(4, 64, 64, 3, dtype=torch.uint8)
    for i in range(4):
        x[i, 16 * i:16 * i + 16] = 255
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        loss, _ = model.loss(x)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


# --------------------------------------------------------------------------------------------------
# mdnrnn.py
# --------------------------------------------------------------------------------------------------

def test_mdnrnn_has_the_published_parameters():
    assert parameters(MDNRNN()) == 422_368
    doom_model = MDNRNN(64, 1, 512, predict_done=True)
    assert parameters(doom_model) == 1_678_785
    # The same number comes from 65 inputs and two biases: make sure that it's 66 and one.
    assert doom_model.input.in_features == 64 + 1 + 1
    assert doom_model.recurrent.bias is None


def test_mdnrnn_is_an_lstm():
    """Against torch's own cell, its second bias zero and the forget gate's raised by 1."""
    torch.manual_seed(0)
    model = MDNRNN(3, 2, 7, 2).double()
    cell = torch.nn.LSTMCell(5, 7).double()
    with torch.no_grad():
        cell.weight_ih.copy_(model.input.weight), cell.weight_hh.copy_(model.recurrent.weight)
        cell.bias_ih.copy_(model.input.bias), cell.bias_hh.zero_()
        cell.bias_hh[7:14] = 1
    z, a = torch.randn(4, 6, 3).double(), torch.randn(4, 6, 2).double()
    start = state = tuple(torch.randn(4, 7).double() for _ in range(2))
    for t in range(6):
        state = cell(torch.cat([z[:, t], a[:, t]], 1), state)
    *_, (h, c) = model(z, a, start)
    assert torch.allclose(h, state[0]) and torch.allclose(c, state[1])
    # Step by step or all at once: the same.
    one, state = [], start
    for t in range(6):
        *out, state = model(z[:, t:t + 1], a[:, t:t + 1], state)
        one.append(out)
    whole = model(z, a, start)
    for k in range(3):
        assert torch.allclose(torch.cat([out[k] for out in one], 1), whole[k])
    assert whole[3] is None and whole[0].shape == (4, 6, 3, 2)


def test_mdnrnn_restart_forgets():
    """After a restart nothing that went before matters; the flag itself does."""
    torch.manual_seed(0)
    model = MDNRNN(3, 1, 8, 2, predict_done=True)
    z, a = torch.randn(2, 6, 3), torch.randn(2, 6, 1)
    restart = torch.zeros(2, 6)
    restart[:, 3] = 1
    whole = model(z, a, model.initial_state(2), restart)
    part = model(z[:, 3:], a[:, 3:], tuple(torch.randn(2, 8) for _ in range(2)), restart[:, 3:])
    for k in range(4):
        assert torch.allclose(whole[k][:, 3:], part[k], atol=1e-6)
    none = model(z, a, model.initial_state(2))
    assert torch.allclose(whole[1][:, :3], none[1][:, :3], atol=1e-6)
    assert (whole[1][:, 3] - none[1][:, 3]).abs().max() > 1e-3
    flag_only = model(z[:, :1], a[:, :1], model.initial_state(2), torch.ones(2, 1))
    assert (flag_only[1] - none[1][:, :1]).abs().max() > 1e-3
    bools = model(z, a, model.initial_state(2), restart.bool())
    assert torch.equal(bools[1], whole[1])


def mixtures(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    log_pi, mean, log_std = torch.randn(3, *shape, generator=g, dtype=torch.float64)
    return log_pi.log_softmax(-1), 2 * mean, log_std


def test_mixture_likelihood_is_torchs():
    log_pi, mean, log_std = mixtures(4, 6, 3, 5)
    z = 3 * torch.randn(4, 6, 3, dtype=torch.float64)
    expected = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=log_pi),
        torch.distributions.Normal(mean, log_std.exp())).log_prob(z)
    assert torch.allclose(log_likelihood(z, log_pi, mean, log_std), expected, rtol=1e-12)


def test_mixture_likelihood_is_safe():
    """Where probabilities underflow in float32, value and gradient stay finite."""
    log_pi = torch.tensor([[0.0, -2000.0]]).log_softmax(-1)
    parameters = [log_pi, torch.tensor([[0.0, 5.0]]), torch.tensor([[-6.0, -6.0]])]
    parameters = [p.requires_grad_() for p in parameters]
    far = log_likelihood(torch.tensor([1000.0]), *parameters)
    assert torch.isfinite(far) and far < -1e9
    far.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in parameters)


def test_mdnrnn_loss_counts_what_can_be_predicted():
    """Against a loop over the steps; deaths weigh DONE_WEIGHT, what follows them nothing."""
    torch.manual_seed(0)
    model = MDNRNN(3, 1, 8, 2, predict_done=True).double()
    z, a, next_z = (torch.randn(2, 5, n).double() for n in (3, 1, 3))
    done, restart, inside = torch.zeros(2, 5), torch.zeros(2, 5), torch.ones(2, 5)
    done[0, 2] = restart[0, 3] = restart[1, 1] = 1
    inside[0, 2] = inside[1, 0] = 0                          # a death; a game that was cut off
    log_pi, mean, log_std, log_odds, _ = model(z, a, model.initial_state(2), restart)
    p = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=log_pi),
        torch.distributions.Normal(mean, log_std.exp())).log_prob(next_z)
    nats, weighted = [], []
    for b, t in itertools.product(range(2), range(5)):
        if inside[b, t]:
            nats += (-p[b, t]).tolist()
        odds = DONE_WEIGHT * log_odds[b, t].exp()            # the odds it was trained to give
        weighted.append(DONE_WEIGHT * (1 + 1 / odds).log() if done[b, t] else (1 + odds).log())
    z_loss, done_loss = torch.tensor(nats).mean(), torch.stack(weighted).mean()
    loss, parts = model.loss(z, a, next_z, done, restart, inside)
    assert torch.allclose(parts["z_loss"], z_loss.double())
    assert torch.allclose(parts["done_loss"], done_loss)
    assert torch.allclose(loss, parts["z_loss"] + parts["done_loss"])
    # inside left out: wherever not done
    assert torch.equal(model.loss(z, a, next_z, done, restart)[0],
                       model.loss(z, a, next_z, done.bool(), restart.bool(), done == 0)[0])
    other = next_z.clone()
    other[0, 2] += 100
    assert torch.equal(model.loss(z, a, other, done, restart)[0],
                       model.loss(z, a, next_z, done, restart)[0])


def test_mdnrnn_done_odds_are_those_of_the_data():
    """Deaths weigh ten times in training; the odds that come out are right all the same."""
    torch.manual_seed(0)
    model = MDNRNN(1, 1, 4, 1, predict_done=True)
    zeros, done = torch.zeros(50, 1, 1), torch.zeros(50, 1)
    done[0] = 1                                              # one in fifty, unforeseeable
    optimizer = torch.optim.Adam(model.head.parameters(), lr=0.1)
    for _ in range(100):
        loss, _ = model.loss(zeros, zeros, zeros, done)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    with torch.no_grad():
        log_odds = model(zeros[:1], zeros[:1], model.initial_state(1))[3]
    assert log_odds.sigmoid().item() == pytest.approx(1 / 50, rel=0.05)


def test_sample_follows_the_mixture_and_the_temperature():
    n, (log_pi, mean, log_std) = 100_000, mixtures(2, 3, seed=1)
    for tau in (1.0, 0.5, 1.3):
        draws = sample(*(p.expand(n, 2, 3) for p in (log_pi, mean, log_std)), tau,
                       torch.Generator().manual_seed(0))
        assert draws.shape == (n, 2)
        hot = torch.distributions.MixtureSameFamily(
            torch.distributions.Categorical(logits=log_pi / tau),
            torch.distributions.Normal(mean, log_std.exp() * tau ** 0.5))
        for x in (-2.0, -0.5, 0.7, 2.0):
            expected = hot.cdf(torch.full((2,), x, dtype=torch.float64))
            assert torch.allclose((draws <= x).double().mean(0), expected, atol=0.01)
    # Each number of z draws its own component.
    both = (draws - draws.mean(0)) / draws.std(0)
    assert (both[:, 0] * both[:, 1]).mean().abs() < 0.02


def test_sample_ignores_components_without_weight():
    log_pi = torch.tensor([-math.inf, 0.0, -math.inf]).expand(1000, 3)
    mean = torch.tensor([-100.0, 0.0, 100.0]).expand(1000, 3)
    assert sample(log_pi, mean, torch.full((1000, 3), -20.0)).abs().max() < 1e-3


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
    cma = pytest.importorskip("cma")
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


@needs_box2d
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


@needs_box2d
def test_rewards_and_ends_are_gymnasiums(drive):
    assert [step[1:] for step in drive[0]] == [step[1:] for step in drive[1]]
    assert drive[1][-1][3] and not drive[1][-2][3]
    assert max(step[1] for step in drive[1]) > 1       # tiles were visited


@needs_box2d
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


@needs_box2d
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


@needs_box2d
def test_the_bar_of_indicators_is_cut_off(drive):
    frame = drive[0][-1][0]
    assert (frame[84:, 90:] == 0).all() and (frame[:84, 90:].sum(-1) > 0).all()


@needs_box2d
def test_shrink_takes_area_means_of_84_rows():
    frame = np.random.default_rng(0).integers(256, size=(96, 96, 3)).astype(np.uint8)
    fine = frame[:84].astype(float).repeat(16, 0).repeat(2, 1)            # 84 x 16 = 64 x 21 rows
    means = fine.reshape(64, 21, 64, 3, 3).mean((1, 3))
    assert abs(shrink(frame) - means).max() <= 0.5 + 1e-9


@needs_box2d
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
# doom.py
# --------------------------------------------------------------------------------------------------

@needs_vizdoom
def test_doom_env_passes_gymnasiums_checker(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    env = DoomEnv()
    check_env(env, skip_render_check=True)
    env.close()
    assert not list(tmp_path.iterdir())                      # the engine leaves nothing behind


@needs_vizdoom
def test_doom_env_is_take_cover():
    """Seeds decide everything, actions move the view, the paper's limit truncates."""
    env = DoomEnv(max_steps=90)
    with pytest.raises(gym.error.ResetNeeded):
        env.step(np.zeros(1, np.float32))

    def play(action, seed=3, steps=90):
        frames = [env.reset(seed=seed)[0]]
        for t in range(steps):
            frame, reward, terminated, truncated, _ = env.step(np.array([action], np.float32))
            frames.append(frame)
            assert reward == 1 and not terminated and truncated == (t == 89)
        return np.stack(frames)

    still = play(0)
    assert still.shape == (91, 64, 64, 3) and still.dtype == np.uint8
    assert np.array_equal(play(0.33), still) and np.array_equal(play(-0.33), still)
    assert not np.array_equal(play(0, seed=4), still)        # alike at first only
    left, right = play(-0.34, steps=12), play(0.34, steps=12)
    assert np.array_equal(play(-1, steps=12), left) and np.array_equal(play(1, steps=12), right)
    assert not np.array_equal(left, right)
    # A step to the right moves the room to the left: the columns of the picture match best when
    # shifted that way.
    def shift(frames):
        first, last = (f[28:44].mean((0, 2)) for f in (still[12], frames[12]))
        costs = [np.square(first[8 + s:56 + s] - last[8:56]).mean() for s in range(-8, 9)]
        return np.argmin(costs) - 8
    assert shift(right) > 0 > shift(left)
    for bad in ([1.5], [math.nan], [[0.0]], [0.0, 0.0]):
        with pytest.raises(gym.error.InvalidAction):
            env.step(np.array(bad, np.float32))
    env.close()


@needs_vizdoom
def test_doom_env_dies_of_standing_still():
    env = DoomEnv()
    env.reset(seed=0)
    assert env.game.get_doom_skill() == 4
    for steps in range(1, 2101):
        frame, _, terminated, truncated, _ = env.step(np.zeros(1, np.float32))
        if terminated:
            break
    assert 30 < steps < 600 and not truncated
    assert frame.any()                                       # the last that was seen, not black
    env.close()


def test_missing_vizdoom_is_one_line(monkeypatch):
    monkeypatch.setattr(doom, "vizdoom", None)
    with pytest.raises(ImportError, match="pip install vizdoom"):
        DoomEnv()
    monkeypatch.setattr(sys, "argv", ["doom.py"])
    with pytest.raises(SystemExit, match="^error: vizdoom is missing: pip install vizdoom$"):
        doom.main()


def test_random_actions_are_held():
    actions = np.concatenate(list(itertools.islice(random_actions(np.random.default_rng(0)), 5000)))
    assert actions.dtype == np.float32 and -1 <= actions.min() < -0.9 and 0.9 < actions.max() <= 1
    runs = [len(list(run)) for _, run in itertools.groupby(actions.tolist())][:-1]
    assert set(runs) == set(range(1, 11)) and np.mean(runs) == pytest.approx(5.5, rel=0.05)


def small_model():
    torch.manual_seed(0)
    return MDNRNN(4, 1, 6, 2, predict_done=True)


def test_doom_dream_is_a_gymnasium_vector_env():
    model = small_model()
    with torch.no_grad():
        model.head.bias[-1] = -2                           # about one step in eight is the last
    starts = torch.randn(5, 2, 4)
    env = DoomDream(model, starts, 3, steps=10)
    with pytest.raises(gym.error.ResetNeeded):
        env.step(np.zeros((3, 1), np.float32))
    recorded = gym.wrappers.vector.RecordEpisodeStatistics(DoomDream(model, starts, 3, steps=10))
    before = torch.get_rng_state()
    rng, lengths = np.random.default_rng(0), np.zeros(3, int)
    kinds, seen = set(), recorded.reset(seed=1)[0]
    for _ in range(200):
        assert recorded.observation_space.contains(seen)
        seen, reward, terminated, truncated, infos = recorded.step(
            rng.uniform(-1, 1, (3, 1)).astype(np.float32))
        lengths += 1
        assert reward.dtype == np.float64 and (reward == 1).all()
        assert not (terminated & truncated).any()
        assert (truncated == ((lengths == 10) & ~terminated)).all()
        over = terminated | truncated
        for i in np.flatnonzero(over):
            kinds.add(bool(terminated[i]))
            assert infos["episode"]["l"][i] == lengths[i]
            assert infos["final_obs"][i].shape == (16,)
            assert infos["final_obs"][i][4:].any()           # c and h of the dream that ended
            assert not seen[i][4:].any()                     # the next one remembers nothing
        lengths[over] = 0
    assert kinds == {True, False}
    assert torch.equal(torch.get_rng_state(), before)
    for bad in (np.full((3, 1), 1.5), np.full((3, 1), np.nan), np.zeros(3), np.zeros((2, 1))):
        with pytest.raises(gym.error.InvalidAction):
            recorded.step(bad.astype(np.float32))
    for bad in (dict(starts=starts[:, :1]), dict(starts=starts[:0]), dict(num_envs=0),
                dict(steps=0), dict(temperature=0.0), dict(temperature=math.nan),
                dict(model=MDNRNN(4, 1, 6, 2))):
        with pytest.raises(ValueError):
            DoomDream(**dict(model=model, starts=starts, num_envs=3) | bad)


def test_doom_dream_passes_gymnasiums_checker():
    """The checker takes single environments: one dream is one."""
    class One(gym.Env):
        metadata = {"render_modes": []}

        def __init__(self):
            self.envs = DoomDream(small_model(), torch.randn(5, 2, 4), 1)
            self.observation_space = self.envs.single_observation_space
            self.action_space = self.envs.single_action_space

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return self.envs.reset(seed=seed)[0][0], {}

        def step(self, action):
            seen, reward, terminated, truncated, _ = self.envs.step(action[None])
            return seen[0], reward[0], bool(terminated[0]), bool(truncated[0]), {}

    check_env(One(), skip_render_check=True)


def test_doom_dream_is_m():
    """Each step of the dream is one of M's: same state, same mixture, restart_0 = 1."""
    model = small_model()
    with torch.no_grad():
        model.head.bias[-1] = -20                            # nobody dies
    sharp = torch.stack([torch.randn(1, 4), torch.full((1, 4), -20.0)], 1)
    env = DoomDream(model, sharp, 2, temperature=0.7)
    seen, _ = env.reset(seed=3)
    assert np.allclose(seen[:, :4], sharp[:, 0], atol=1e-3)  # N(mu, exp(logvar)), here narrow
    zs, actions = [seen[:, :4]], np.random.default_rng(0).uniform(-1, 1, (6, 2, 1))
    for a in actions.astype(np.float32):
        seen, *_ = env.step(a)
        zs.append(seen[:, :4])
    z = torch.from_numpy(np.stack(zs, 1))                                        # [2, 7, 4]
    a = torch.from_numpy(actions.astype(np.float32)).transpose(0, 1)             # [2, 6, 1]
    restart = torch.zeros(2, 6)
    restart[:, 0] = 1
    with torch.no_grad():
        *_, (h, c) = model(z[:, :6], a, model.initial_state(2), restart)
    assert np.allclose(seen[:, 4:10], c, atol=1e-5) and np.allclose(seen[:, 10:], h, atol=1e-5)
    # Equal seeds, equal dreams; the temperature reaches the draw.
    again = DoomDream(model, sharp, 2, temperature=0.7)
    again.reset(seed=3)
    tame = DoomDream(model, sharp, 2, temperature=1e-6)
    tame.reset(seed=3)
    for k, a in enumerate(actions.astype(np.float32)):
        assert np.array_equal(again.step(a)[0][:, :4], zs[k + 1])
        assert not np.array_equal(tame.step(a)[0][:, :4], zs[k + 1])


def test_doom_dream_ends_as_often_as_m_says():
    model = small_model()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.head.bias[-1] = -math.log(19)                                      # odds 1 : 19
    env = DoomDream(model, torch.randn(5, 2, 4), 2000)
    env.reset(seed=0)
    ends = np.mean([env.step(np.zeros((2000, 1), np.float32))[2].mean() for _ in range(10)])
    assert ends == pytest.approx(1 / 20, abs=0.005)


# --------------------------------------------------------------------------------------------------
# The demonstrations of vae.py, mdnrnn.py and doom.py
# --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("module, good, bad", [
    pytest.param(vae, ["--frames", "40", "--seconds", "0.1"], ["--frames", "5"],
                 marks=needs_box2d),
    (mdnrnn, ["--updates", "2"], ["--updates", "0"]),
    pytest.param(doom, ["--games", "1"], ["--games", "0"], marks=needs_vizdoom)])
def test_demos(module, good, bad, tmp_path, monkeypatch):
    """Each saves its picture and nothing else; bad flags get one line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["demo", *bad])
    with pytest.raises(SystemExit, match="^error: .* must be .* or more.*$"):
        module.main()
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(sys, "argv", ["demo", *good])
    module.main()
    assert [file.suffix for file in tmp_path.iterdir()] == [".png"]


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


@needs_box2d
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


@needs_box2d
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


@needs_box2d
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


@needs_box2d
def test_gates_stop_a_run_whose_m_predicts_nothing(tmp_path, here, monkeypatch, capsys):
    monkeypatch.setattr(train, "log_likelihood", lambda z, *_: z * 0 - 9)
    assert train.main(["--task", "car", *TINY, "--gate", "0.15", "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "M does not pass its gate" in error and "--m_updates 6" in error
    assert train.read_checkpoint(tmp_path / "car-smoke-s0")["stage"] == "M"


@needs_box2d
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


@needs_box2d
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


@needs_box2d
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


@needs_box2d
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


@needs_box2d
def test_the_estimate_counts_what_is_left():
    config = train.Config(**train.PRESETS["smoke", "car"] | dict(workers=1))
    whole, half = train.estimate(config, "rollouts", 0), train.estimate(config, "M", 29)
    assert list(whole) == ["rollouts", "V", "M", "C"] and list(half) == ["M", "C"]
    assert 0 < half["M"] < whole["M"] and 0.01 < sum(whole.values()) < 20
    assert train.estimate(config, "done", 0) == {}


# --------------------------------------------------------------------------------------------------
# evaluate.py
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(tmp_path, here):
    """Function: task, settings -> the folder of a finished run whose V, M and C know nothing."""
    def make(task, stage="done", **settings):
        config = train.Config(**train.PRESETS["smoke", task] | dict(
            task=task, preset="smoke", generations=3) | settings)
        v, m, _ = models(config)
        folder = tmp_path / f"{task}-{config.reads}-{config.seed}"
        folder.mkdir()
        theta = np.random.default_rng(0).normal(0, 0.1, rollout.new_controller(config).size)
        train.Run(config, folder, dict(
            stage=stage, V=v.state_dict(), M=m.state_dict(), theta=torch.from_numpy(theta),
            starts=torch.randn(3, 2, v.z_size), es=dict(generation=2 + (stage == "done")),
            rows=[])).save()
        return folder
    return make


def scored(monkeypatch):
    """Instead of playing: the actual score of an episode is its seed, the virtual minus that."""
    asked = []

    def score(sign, config, weights, theta, seeds):
        asked.append((config.steps, theta.shape, seeds))
        return [float(sign * s) for s in seeds]

    monkeypatch.setattr(evaluate, "open_pool", lambda config: ThreadPoolExecutor(1))
    monkeypatch.setattr(evaluate, "make_env", lambda *_: types.SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(evaluate, "play", lambda *a: score(1, *a))
    monkeypatch.setattr(evaluate, "dream", lambda *a: score(-1, *a))
    return asked


def test_published_scores_are_tables_1_and_2():
    """As printed in the paper, which is not at hand here: sums that a slip would change."""
    assert sum(m for *_, (m, _) in evaluate.TABLE_1) == 343 + 591 + 652 + 838 + 632 + 788 + 906
    assert [row[1:] for row in evaluate.TABLE_2 if row[0] == 1.15] == [((918, 546), (1092, 556))]
    assert [row[2] for row in evaluate.TABLE_2] == [
        (193, 58), (196, 50), (868, 511), (1092, 556), (753, 139), (210, 108), (820, 58)]


def test_a_run_is_judged_on_100_unseen_seeds_and_remembers(finished, monkeypatch, capsys):
    folder, asked = finished("doom", seed=4), scored(monkeypatch)
    assert evaluate.main([str(folder)]) == 0
    seeds = [s for _, _, four in asked for s in four]
    assert len(seeds) == 200 and seeds[:100] == seeds[100:] and len(set(seeds)) == 100
    assert {(steps, shape) for steps, shape, _ in asked} == {(2100, (1088,))}
    streams = range(rollout.UNSEEN)                     # of training, with room to spare
    trained = {rollout.seed_of(4, *place) for stream in streams for place in itertools.chain(
        itertools.product([stream], range(700)), itertools.product([stream], range(60), range(40)))}
    assert not trained & set(seeds)
    row = capsys.readouterr().out.splitlines()[2]
    mean, std = f"{np.mean(seeds[:100]):.0f}", f"{np.std(seeds[:100]):.0f}"
    assert [text.strip() for text in row.split("|")[2:-1]] == [
        "smoke", "4", "tau 1.15", "3 of 3", "100", f"{mean} +- {std}", f"-{mean} +- {std}",
        "1092 +- 556", "918 +- 546"]
    asked.clear()                                       # printed again, from the folder
    for file in folder.glob("checkpoint*"):
        file.unlink()
    assert evaluate.main([str(folder)]) == 0 and not asked
    assert capsys.readouterr().out.splitlines()[2] == row


def test_tables_sort_runs_into_the_papers_rows(finished, monkeypatch, capsys):
    asked = scored(monkeypatch)
    runs = [str(finished("car")), str(finished("car", reads="z", seed=1)),
            str(finished("doom", temperature=0.5)),
            str(finished("car", stage="C", reads="z40", seed=2))]
    assert evaluate.main([*runs, "--episodes", "6", "--table1", "--table2"]) == 0
    rows = {line.split("|")[1].strip(): line for line in capsys.readouterr().out.splitlines()
            if line.startswith("|")}
    for name, text in (("Full World Model", "906 +- 21 "), ("V model", "632 +- 251 "),
                       ("Full World Model", "(smoke, seed 0, generation 3) "),
                       ("V model", "(smoke, seed 1, generation 3) "),
                       ("V model with hidden layer", "(smoke, seed 2, generation 2) "),
                       ("tau 0.50", "(smoke, seed 0, generation 3) "),
                       ("tau 1.15", "not run yet ")):
        assert text in rows[name], (name, rows[name])
    assert "not run yet" not in rows["V model"] and "seed 0" not in rows["V model"]
    assert {len(four) for _, _, four in asked} == {2, 4}
    # A run that still goes on will have other scores tomorrow: nothing is stored.
    assert [pathlib.Path(run, "evaluation.json").exists() for run in runs] == [True] * 3 + [False]


@needs_box2d
def test_the_dream_leaves_the_real_thing_and_goes_on(finished, tmp_path, monkeypatch):
    folder = finished("car")
    monkeypatch.setattr(evaluate, "CONTEXT", 8)

    def pictures(*arguments):
        assert evaluate.main([str(folder), "--dream", str(tmp_path / "d.gif"), *arguments]) == 0
        gif = Image.open(tmp_path / "d.gif")
        return gif.n_frames, (tmp_path / "d.gif").read_bytes()

    count, data = pictures("--steps", "10")
    assert count == 5 and pictures("--steps", "10")[1] == data
    assert pictures("--steps", "10", "--seed", "1")[1] != data
    images = evaluate.pages(*evaluate.load(folder, "M"), 4, 1.0, 0)
    panels = np.array([np.asarray(image)[20:212] for image in images])           # [4, 192, 588, 3]
    real, seen, dreamed = panels[:, :, :192], panels[:, :, 198:390], panels[:, :, 396:588]
    assert (seen[0] == dreamed[0]).all() and (seen[3] != dreamed[3]).any()
    # What V sees is V, and the real thing is the game's: the same drive, here once more.
    config, state, v, m = evaluate.load(folder, "M")
    act = rollout.policy_of(config, state["theta"].numpy(), [0])
    env, memory = CarRacing(), m.initial_state(1)
    frame, _ = env.reset(seed=rollout.seed_of(0, rollout.UNSEEN, 0))
    with torch.no_grad():
        for t in range(evaluate.CONTEXT):
            z = v.encode(torch.from_numpy(frame)[None])[0]
            action = act(torch.cat([z, memory[0]], 1).numpy())
            memory = m(z[None], torch.from_numpy(action)[None], memory)[-1]
            frame = env.step(action[0])[0]
        picture = v.decode(v.encode(torch.from_numpy(frame)[None])[0])[0].permute(1, 2, 0)
    assert (real[0, 1::3, 1::3] == frame).all()
    assert abs(seen[0, 1::3, 1::3] / 255 - picture.numpy()).max() < 0.01


@pytest.mark.parametrize("task", [pytest.param("car", marks=needs_box2d), "doom"])
def test_a_person_plays_in_the_dream(task, finished):
    """Keys move, t and g change the temperature, space hands over to C; death begins another."""
    from matplotlib.figure import Figure
    config, state, v, m = evaluate.load(finished(task), "M")
    used, forward = [], m.forward
    m.forward = lambda z, a, *rest: used.append(a[0, 0].tolist()) or forward(z, a, *rest)
    player = evaluate.Player(config, state, v, m, Figure(), 1.0, 0)
    for key in "left", "up":
        player.press(types.SimpleNamespace(key=key))
    player.tick()
    player.held.clear()
    player.tick()
    assert used == [[-1.0, 1.0, 0.0][:m.action_size], [0.0] * m.action_size]
    player.press(types.SimpleNamespace(key="t"))
    assert player.tau == pytest.approx(1.1)
    player.press(types.SimpleNamespace(key=" "))
    player.tick()
    assert any(used[-1])
    if task == "doom":
        # C reads the same here as in the environment that it is evolved in.
        with torch.no_grad():
            m.head.bias[-1] = -50                       # alive, with something to remember
        env = DoomDream(m, state["starts"], 1)
        env.reset(seed=0)
        seen = env.step(np.ones((1, 1), np.float32))[0]
        assert (evaluate.features(config, env.z, (env.h, env.c)) == seen).all()
        with torch.no_grad():
            m.head.bias[-1] = 50
        player.tick()
        assert player.step == 0 and "ended after" in player.caption.get_text()


def test_evaluate_refuses_in_one_line(finished, tmp_path, capsys, monkeypatch):
    scored(monkeypatch)
    folder = finished("doom")

    def refused(text, *arguments):
        assert evaluate.main([str(a) for a in arguments]) == 1
        error = capsys.readouterr().err.replace("\r", "\n").splitlines()[-1]
        assert error.startswith("error: ") and text in error, error

    refused("name a run folder")
    refused("holds no checkpoint", tmp_path / "nowhere")
    refused("--episodes must lie in 1 ..", folder, "--episodes", 0)
    refused("--temperature must lie", folder, "--play", "--temperature", "nan")
    refused("name one folder", folder, folder, "--play")
    refused("must end in .gif", folder, "--dream", "dream.mp4")
    refused("needs a window", folder, "--play")
    (folder / "evaluation.json").write_text('{"task": "doom"}')
    refused("is damaged; --episodes 100", folder)
    young = finished("doom", stage="M", seed=1)
    state = train.read_checkpoint(young)
    del state["theta"]
    train.Run(train.Config(**state["config"]), young, state).save()
    refused("has no controller yet", young)
    # Weights of another shape, settings of another version, a pickle that would run code.
    state["M"]["head.bias"] = torch.zeros(3)
    train.Run(train.Config(**state["config"]), young, state).save()
    refused("another version, or not ours", young, "--dream", tmp_path / "d.gif")

    class Evil:
        def __reduce__(self):
            return pathlib.Path.touch, (tmp_path / "owned",)

    for foreign in Evil(), [1], {"config": {"speed": 3}, "theta": 0, "M": 0}:
        data = io.BytesIO()
        torch.save(foreign, data)
        data = hashlib.sha256(data.getvalue()).digest() + data.getvalue()
        (young / "checkpoint.pt").write_bytes(data)
        (young / "checkpoint-previous.pt").unlink(missing_ok=True)
        refused("checkpoint", young)
    assert not (tmp_path / "owned").exists()
    # A full disk: a warning, and the scores are printed all the same.
    monkeypatch.setattr(evaluate, "write_atomically", lambda path, _: (_ for _ in ()).throw(
        OSError(28, "No space left on device", str(path))))
    assert evaluate.main([str(folder), "--episodes", "4"]) == 0
    out, error = capsys.readouterr()
    assert "No space left" in error and "1092 +- 556" in out


# --------------------------------------------------------------------------------------------------
# The house
# --------------------------------------------------------------------------------------------------


def test_train_is_short():
    assert len((HERE / "train.py").read_text().splitlines()) <= 500
    for path in HERE.glob("*.py"):
        assert max(map(len, path.read_text().splitlines())) <= 100, path


def test_evaluate_is_short():
    assert len((HERE / "evaluate.py").read_text().splitlines()) <= 400


def test_nothing_imports_from_the_top_level():
    """And nothing there from here. Names that both have, such as train, are each folder's own."""
    ours, above = ({path.stem for path in folder.glob("*.py")} for folder in (HERE, HERE.parent))
    pattern = re.compile(r"^\s*(?:from|import) ([\w, ]+?)(?: import| as|$)", re.MULTILINE)

    def imported(folder):
        return {name.strip() for path in folder.glob("*.py")
                for names in pattern.findall(path.read_text()) for name in names.split(",")}

    assert {"vae", "torch", "rollout"} <= imported(HERE) and not imported(HERE) & (above - ours)
    assert not imported(HERE.parent) & (ours - above)
    # What Python really loads, where nothing else can be found.
    code = "import evaluate, sys; print(*sys.modules)"
    names = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert not set(names.stdout.split()) & (above - ours), names.stderr
    assert {"evaluate", "train", "rollout"} <= set(names.stdout.split())


def test_the_readme_tells_the_truth():
    """Its tables are what evaluate.py prints of the results that are kept; its map is right."""
    text = (HERE / "README.md").read_text()
    results = [evaluate.read_evaluation(path) for path in sorted(HERE.glob("results/*/*.json"))]
    assert evaluate.table_1(results) in text and evaluate.table_2(results) in text
    places = re.findall(r"\[`([\w.]+)`\]\((\w+\.py)\)", text)
    assert len(places) > 10 and "@@" not in text
    for name, file in places:
        assert re.search(rf"(def|class) {name.split('.')[-1]}\b", (HERE / file).read_text()), name
    for path in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (HERE / path).stat().st_size < 100_000, path
