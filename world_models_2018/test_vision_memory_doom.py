"""Tests of vae.py, mdnrnn.py and doom.py: python -m pytest -q world_models_2018"""
import itertools
import math
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import doom
import mdnrnn
import vae
from doom import DoomDream, DoomEnv, random_actions
from mdnrnn import DONE_WEIGHT, MDNRNN, log_likelihood, sample
from vae import VAE, pixels


def parameters(model):
    return sum(p.numel() for p in model.parameters())


# --------------------------------------------------------------------------------------------------
# V
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
# M
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
# Doom
# --------------------------------------------------------------------------------------------------
needs_vizdoom = pytest.mark.skipif(doom.vizdoom is None, reason="vizdoom is not installed")


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
# Demos
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("module, good, bad", [
    (vae, ["--frames", "40", "--seconds", "0.1"], ["--frames", "5"]),
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
