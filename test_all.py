"""A guided tour of the repository, in the order in which the data flows; every stop is a check.

    atari -> vqvae -> convlstm -> dynamics -> ppo -> train and evaluate -> the house itself

Each test names the claim it checks: a section, equation or table of the paper (Robine et al.,
2020), or a promise of one of our files. It holds the code against something that can be trusted: a
definition written as a plain loop, 40-digit arithmetic, torch's own modules, published numbers.

    python -m pytest test_all.py                 # three to four minutes on one core
    python -m pytest test_all.py -k codebook     # only the stops with this word in their name
    CUDA_VISIBLE_DEVICES=0 python -m pytest test_all.py -k on_cuda      # the stop that needs a GPU
"""
import argparse
import contextlib
import copy
import csv
import dataclasses
import errno
import functools
import hashlib
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
import zipfile

# A process that has used a GPU can't be forked, and the tests fork.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import ale_py
import gymnasium as gym
import matplotlib.pyplot                       # here, so that forked children need not
import mpmath                                  # comes with torch
import numpy as np
import pytest
import torch
import torch._dynamo                           # Adam wants it: here, so that forked children
import torch.nn.functional as F                # need not import it
from gymnasium.utils.env_checker import check_env
from torch._dynamo.backends.debugging import aot_eager
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

import atari
import evaluate
import ppo
import train
import vqvae
from atari import AtariEnv, ExperienceBuffer, area_matrix, batches_per_epoch, canonical_name
from convlstm import ConvLSTMCell
from dynamics import Dynamics, DreamEnv, dream, open_loop, reward_class, sample
from ppo import ActorCritic, gae, ppo_loss, ppo_update
from vqvae import (MAX_LOGIT, VQVAE, Codebook, continuous_bernoulli_mean, continuous_bernoulli_nll,
                   foreground_error)

HERE = pathlib.Path(__file__).resolve().parent
torch.set_num_threads(1)                       # for networks this small, threads only wait


# ----------------------------------------------------------------------------------------------
# atari.py: what is an observation?
# ----------------------------------------------------------------------------------------------


def test_area_resize_is_the_mean_over_each_output_pixels_area():
    """atari.py: 210x160 -> 96x96 by area, as OpenCV's INTER_AREA, within one grey level."""
    screen = np.random.default_rng(0).integers(0, 256, (210, 160), dtype=np.uint8)
    sy, sx = 210 / 96, 160 / 96                # an output pixel covers 2.1875 x 1.6667 input pixels
    expected = np.zeros((96, 96))
    for i, j in np.ndindex(96, 96):
        for y in range(int(i * sy), min(210, math.ceil((i + 1) * sy))):
            for x in range(int(j * sx), min(160, math.ceil((j + 1) * sx))):
                height = min((i + 1) * sy, y + 1) - max(i * sy, y)
                width = min((j + 1) * sx, x + 1) - max(j * sx, x)
                expected[i, j] += max(height, 0) * max(width, 0) / (sy * sx) * screen[y, x]
    env = AtariEnv("Pong")
    assert env.resize(screen).dtype == np.uint8
    assert np.abs(env.resize(screen) - expected).max() < 0.501       # rounded, not cut
    assert (env.resize(np.full((210, 160), 137, np.uint8)) == 137).all()
    # The worked example of the docstring.
    np.testing.assert_allclose(area_matrix(4, 3), [[.75, .25, 0, 0], [0, .5, .5, 0],
                                                   [0, 0, .25, .75]], atol=1e-6)


def test_equal_seeds_and_actions_give_equal_frames():
    """atari.py, AtariEnv: uint8 [96, 96] frames that the seed and the actions determine."""
    first, second, other = (AtariEnv("Pong", seed=s) for s in (5, 5, 6))
    frames = [env.reset() for env in (first, second, other)]
    assert frames[0].shape == (96, 96) and frames[0].dtype == np.uint8
    actions = np.random.default_rng(0).integers(6, size=40)
    films = [[env.step(a)[0] for a in actions] for env in (first, second, other)]
    assert np.array_equal(films[0], films[1])
    assert not np.array_equal(films[0], films[2])                    # another number of no-ops
    first.reset(seed=5)                                              # a seed restarts everything
    assert np.array_equal(films[0], [first.step(a)[0] for a in actions])


def test_a_step_is_four_frames_and_shows_the_brighter_of_the_last_two():
    """Section 3.3 and the Atari 100K protocol: skip 4, maximum over the last 2, rewards summed."""
    env = AtariEnv("Pong", noop_max=0)
    bare = gym.make("ALE/Pong-v5", frameskip=1, repeat_action_probability=0, obs_type="grayscale")
    screen, _ = bare.reset(seed=3)
    assert np.array_equal(env.reset(seed=3), env.resize(screen))     # noop_max=0: the very first
    maximum_matters, paid_at = False, set()
    for action in np.random.default_rng(0).integers(6, size=300):
        screens, rewards = [], []
        for _ in range(4):
            screen, reward, *_ = bare.step(action)
            screens.append(screen)
            rewards.append(reward)
        frame, reward, terminated, truncated = env.step(action)
        assert np.array_equal(frame, env.resize(np.maximum(screens[2], screens[3])))
        assert reward == sum(rewards) and not terminated and not truncated
        maximum_matters |= not np.array_equal(frame, env.resize(screens[3]))
        paid_at |= set(np.flatnonzero(rewards))
    assert maximum_matters and len(paid_at) > 1                      # or nothing was tested


def test_the_protocol_of_the_atari_100k_papers():
    """Section 4: minimal action sets, nothing sticky, no-ops, an episode is all five lives."""
    counts = dict(BankHeist=18, Breakout=4, CrazyClimber=9, Freeway=3, Pong=6, Seaquest=18)
    assert set(counts) == set(evaluate.PUBLISHED)                    # the games of Table 4
    for game, count in counts.items():
        env = AtariEnv(game, seed=0)
        assert env.num_actions == len(env.action_meanings) == count
        assert env.ale.ale.getFloat("repeat_action_probability") == 0
    noops = []
    for _ in range(40):
        env.reset()
        noops.append(env.ale.ale.getEpisodeFrameNumber())
    assert min(noops) >= 1 and max(noops) <= 30 and len(set(noops)) > 10
    assert AtariEnv("Pong", seed=0).lives == 0                       # it counts none
    env, lives = AtariEnv("Breakout", seed=0), [5]
    env.reset()
    while lives[-1] > 1:
        _, _, terminated, truncated = env.step(1)                    # serve, and look on
        lives.append(env.lives)
        assert not terminated and not truncated
    assert sorted(set(lives), reverse=True) == [5, 4, 3, 2, 1]
    with pytest.raises(ValueError, match="'Pogn'.*Pong"):            # a typo is told its neighbours
        AtariEnv("Pogn")


def test_a_lost_game_is_terminated_and_a_cut_one_truncated():
    """atari.py, step: the end of the game and the limit of 108,000 frames are told apart."""
    env = AtariEnv("Pong", seed=0)
    env.reset()
    score, terminated, truncated = 0, False, False
    while not (terminated or truncated):
        _, reward, terminated, truncated = env.step(0)
        score += reward
    assert (score, terminated, truncated) == (-21, True, False)      # the game's own score

    # Half an hour of play takes long, so the emulator's limit is set lower (read when seeded).
    assert env.ale.ale.getInt("max_num_frames_per_episode") == 108_000
    env.ale.ale.setInt("max_num_frames_per_episode", 100)
    env.reset(seed=1)
    steps = [env.step(0)[2:] for _ in range((100 - env.ale.ale.getEpisodeFrameNumber() + 3) // 4)]
    assert steps[-1] == (False, True) and set(steps[:-1]) == {(False, False)}
    assert env.ale.ale.getEpisodeFrameNumber() == 100


def filled_buffer(rng, n=300):
    """A buffer of 2x2 frames that hold their row number, with random episode ends."""
    buffer = ExperienceBuffer(n, size=2)
    frames = np.arange(n)[:, None, None] * np.ones((2, 2))
    frames = (frames % 256).astype(np.uint8)
    terminated, truncated = rng.random(n) < 0.1, rng.random(n) < 0.05
    row = 0
    while row < n:                             # in pieces of every size, single rows among them
        size = min(int(rng.integers(1, 9)), n - row)
        new = slice(row, row + size) if size > 1 else row
        buffer.add(frames[new], 0, 1.0, terminated[new], truncated[new])
        row += size
    return buffer, frames, terminated, truncated


def test_stacks_never_reach_into_the_episode_before():
    """Section 3.3, "the last four frames": at an episode's start its first frame repeats."""
    buffer, frames, terminated, truncated = filled_buffer(np.random.default_rng(0))
    assert terminated.any() and truncated.any()
    assert np.array_equal(buffer.ends, terminated | truncated)
    assert np.array_equal(buffer.terminated, terminated)             # kept apart
    expected = []
    for t in range(len(buffer)):
        stack = [t]
        while len(stack) < 4:
            before = stack[0] - 1
            is_same = before >= 0 and not terminated[before] and not truncated[before]
            stack.insert(0, before if is_same else stack[0])
        expected.append(frames[stack])
    expected = np.array(expected)                                    # [N, 4, 2, 2]
    assert np.array_equal(buffer.stacked(np.arange(300)), expected)
    rows = np.random.default_rng(1).integers(300, size=(7, 11))      # any shape of indices
    assert np.array_equal(buffer.stacked(rows), expected[rows])
    with pytest.raises(IndexError):
        buffer.stacked([300])


def test_adding_one_by_one_or_all_at_once_is_the_same():
    """atari.py, ExperienceBuffer.add: with or without a leading axis."""
    rng, n = np.random.default_rng(0), 60
    columns = (rng.integers(256, size=(n, 2, 2), dtype=np.uint8), rng.integers(6, size=n),
               rng.normal(size=n).astype(np.float32), rng.random(n) < 0.2, rng.random(n) < 0.1,
               rng.random(n) < 0.3)
    single, batched = ExperienceBuffer(n, size=2), ExperienceBuffer(n, size=2)
    for row in zip(*columns):
        single.add(*row)
    batched.add(*(c[:1] for c in columns))
    batched.add(*(c[1:] for c in columns))
    assert len(single) == len(batched) == n
    for name, column in zip(ExperienceBuffer.COLUMNS, columns):
        assert np.array_equal(getattr(single, name), column)
        assert np.array_equal(getattr(batched, name), column)
    assert np.array_equal(single.start, batched.start) and len(set(single.start)) > 5


def test_windows_are_consecutive_apart_and_cut_elsewhere_each_time():
    """Released code: one epoch is one pass over disjoint windows of 11 at a random offset."""
    rng, offsets = np.random.default_rng(0), set()
    buffer = filled_buffer(rng)[0]
    for _ in range(200):
        windows = buffer.windows(11, rng)
        assert windows.shape[1] == 11 and (np.diff(windows, axis=1) == 1).all()
        assert (np.diff(windows.flatten()) == 1).all()               # one follows the other
        assert 0 <= windows.min() and windows.max() < len(buffer)
        offset = windows[0, 0]
        assert len(windows) == (300 - offset) // 11                  # nothing is left out
        offsets.add(int(offset))
    assert offsets == set(range(11))
    assert buffer.windows(301, rng).shape == (0, 301)
    assert buffer.windows(300, rng).tolist() == [list(range(300))]


def test_all_experience_fits_into_a_gigabyte():
    """Section 4, 100K interactions: 102,400 single frames in under 1 GB; one more is refused."""
    buffer = ExperienceBuffer(102_400)
    assert sum(v.nbytes for v in vars(buffer).values() if isinstance(v, np.ndarray)) < 1e9
    full, frame = ExperienceBuffer(3, size=2), np.zeros((2, 2), np.uint8)
    for _ in range(3):
        full.add(frame, 0, 0.0, False, False)
    with pytest.raises(IndexError, match="3 steps"):
        full.add(frame, 0, 0.0, False, False)
    assert len(full) == 3


def test_what_bytes_cannot_hold_is_refused_and_not_wrapped():
    """atari.py: frames are bytes, actions exist, seeds are the emulator's."""
    env, buffer = AtariEnv("Pong", seed=0), ExperienceBuffer(9, size=2)
    env.reset()
    for action in (-1, 6, 0.5, math.nan):
        with pytest.raises(ValueError, match="from 0 to 5"):
            env.step(action)
    frames = np.full((2, 2, 2), 255, np.uint8)
    for action in (-1, 256, 300, 0.5, [0, 300], [-1, 0]):
        with pytest.raises(ValueError, match="from 0 to 255"):
            buffer.add(frames if isinstance(action, list) else frames[0], action, 0, False, False)
    with pytest.raises(ValueError, match="uint8"):
        buffer.add(frames[0] / 255, 0, 0, False, False)
    assert len(buffer) == 0 and not buffer.frames.any()
    buffer.add(frames, np.array([0, 255]), np.zeros(2), np.zeros(2, bool), np.zeros(2, bool))
    assert buffer.actions[:2].tolist() == [0, 255] and (buffer.frames[:2] == 255).all()
    for seed in (-1, 2**31):
        with pytest.raises(ValueError, match="from 0 to 2147483647"):
            AtariEnv("Pong", seed=seed)
        with pytest.raises(ValueError, match="from 0 to 2147483647"):
            env.reset(seed=seed)
    assert AtariEnv("Pong", seed=2**31 - 1).reset().any()


def test_names_are_taken_in_any_spelling():
    """atari.py, canonical_name: "Space Invaders" and the like; `game` has the tables' spelling."""
    for name in ("SpaceInvaders", "Space Invaders", "spaceinvaders", "space_invaders"):
        assert canonical_name(name) == "SpaceInvaders"
    assert AtariEnv("bank heist").game == "BankHeist"
    games = [key[4:-3] for key in gym.registry if re.fullmatch("ALE/.*-v5", key)]
    assert len(games) > 100 and [canonical_name(game) for game in games] == games
    for wrong, near in (("Space Invadrs", "SpaceInvaders"), ("", "Pong"), (None, "Pong")):
        with pytest.raises(ValueError, match=f"{wrong!r}; the nearest names: .*{near}"):
            canonical_name(wrong)


def test_waiting_never_fires():
    """atari.py, reset: action 0 of Backgammon is FIRE; what is waited are no-ops all the same."""
    env, bare = AtariEnv("Backgammon", seed=1), AtariEnv("Backgammon", noop_max=0)
    assert "NOOP" not in env.action_meanings
    waited = np.random.default_rng(1).integers(1, 31)
    screens = []
    for action in (ale_py.Action.NOOP, ale_py.Action.FIRE):
        bare.reset(seed=1)
        for _ in range(waited):
            bare.ale.ale.act(action)
        screens.append(bare.ale.ale.getRAM())
    env.reset()
    assert np.array_equal(env.ale.ale.getRAM(), screens[0])
    assert not np.array_equal(*screens)                              # or nothing was tested


# ----------------------------------------------------------------------------------------------
# vqvae.py: the continuous Bernoulli, the counts of Table 3, the codebook
# ----------------------------------------------------------------------------------------------


def test_continuous_bernoulli_is_a_density_with_the_mean_we_show():
    """Section 3.3, "continuous Bernoulli": integrates to 1; its mean is not the sigmoid."""
    nodes, weights = np.polynomial.legendre.leggauss(200)            # exact for these integrands
    x, w = torch.tensor((nodes + 1) / 2), torch.tensor(weights / 2)
    for logit in (-60., -16., -3., -0.9, -1e-3, 0., 1e-6, 0.3, 1., 8., 60.):
        logits = torch.full_like(x, logit)
        density = torch.exp(-continuous_bernoulli_nll(logits, x))
        assert abs((density * w).sum().item() - 1) < 1e-7
        mean = continuous_bernoulli_mean(torch.tensor(logit, dtype=torch.float64)).item()
        assert abs((density * x * w).sum().item() - mean) < 1e-7
    assert abs(continuous_bernoulli_mean(torch.tensor(2.)).item() - 0.657) < 5e-4
    assert torch.sigmoid(torch.tensor(2.)) > 0.88                    # the usual mistake


def test_continuous_bernoulli_is_exact_from_minus_60_through_0_to_60():
    """vqvae.py: value and gradient within 1e-5 relative of 40-digit arithmetic, in float32."""
    sizes = (0, 1e-8, 1e-4, .01, .1, .3, .7, .99, .999, 1, 1.001, 1.1, 2, 4, 8, 15.9, 25, 60)
    logits = torch.tensor(sorted({s * v for v in sizes for s in (-1., 1.)}), requires_grad=True)
    for x in (0., 0.2, 0.5, 0.75, 1.):
        xs = torch.full_like(logits, x)
        values = continuous_bernoulli_nll(logits, xs)
        grads, = torch.autograd.grad(values.sum(), logits)
        for l, x_, value, grad in zip(*(v.tolist() for v in (logits, xs, values, grads))):
            with mpmath.workdps(40):
                l = mpmath.mpf(l)
                log_a = mpmath.log(mpmath.expm1(l) / l) if l else mpmath.mpf(0)
                mean = 1 / (1 - mpmath.exp(-l)) - 1 / l if l else mpmath.mpf(0.5)
                true_value, true_grad = log_a - x_ * l, mean - x_
                assert abs(value - true_value) <= 1e-5 * abs(true_value), (l, x_)
                assert abs(grad - true_grad) <= 1e-5 * abs(true_grad), (l, x_)


def test_continuous_bernoulli_agrees_with_torch():
    """Section 3.3: torch.distributions.ContinuousBernoulli, where that is exact."""
    logits = torch.tensor([-8., -3., -1.2, -.5, .5, .8, 1., 2., 8.], dtype=torch.float64)
    for x in (0., 0.1, 0.5, 0.9, 1.):
        x = torch.full_like(logits, x)
        theirs = torch.distributions.ContinuousBernoulli(logits=logits)
        torch.testing.assert_close(continuous_bernoulli_nll(logits, x), -theirs.log_prob(x))
        torch.testing.assert_close(continuous_bernoulli_mean(logits), theirs.mean)
    x = torch.tensor([0.3], requires_grad=True)                      # d(-log p)/dx = -logit
    continuous_bernoulli_nll(torch.tensor([2.]), x).sum().backward()
    assert x.grad.item() == -2


def test_tables_2_and_3_to_the_digit():
    """Tables 2 and 3, for M = 18 actions.

    They count parameters *and* persistent buffers: running mean, variance and step counter of each
    batch norm, and the codebook with its moving averages, which encoder and decoder both need.
    """
    def count(module):
        return sum(v.numel() for v in module.state_dict().values())

    vqvae, dynamics, policy = VQVAE(), Dynamics(18), ActorCritic(18)
    codebook = count(vqvae.codebook)
    world_model = count(vqvae) + count(dynamics)
    assert codebook == 12_417
    assert count(vqvae.encoder) + codebook == 2_027_658              # "Encoder"
    assert count(vqvae.decoder) + codebook == 2_087_269              # "Decoder"
    assert count(vqvae) == 4_102_510                                 # "VQ-VAE"
    assert count(dynamics) == 6_552_547                              # "Dynamics network"
    assert count(policy) == 1_303_571                                # "Policy network"
    assert world_model == 10_655_057                                 # "World model", Table 2
    assert world_model + count(policy) == 11_958_628                 # "training"
    assert count(vqvae.encoder) + codebook + count(policy) == 3_331_229     # "inference"


def test_nearest_code_against_brute_force():
    """Section 3.3, "vector quantized": the nearest of all codes in Euclidean distance."""
    torch.manual_seed(0)
    book, z = Codebook(16, 5), torch.randn(50, 5)
    book.codes.mul_(torch.rand(16, 1) * 3)                           # of very different lengths
    for vector, index in zip(z, book.nearest(z).tolist()):
        distances = [sum((a - b) ** 2 for a, b in zip(vector.tolist(), code))
                     for code in book.codes.tolist()]
        assert index == min(range(16), key=distances.__getitem__)


def test_codebook_moving_averages_against_the_formulas():
    """van den Oord et al., Appendix A.1, both averages debiased: loops over codes and vectors."""
    torch.manual_seed(0)
    K, D, decay, eps = 6, 3, 0.99, 1e-5
    book = Codebook(K, D, decay, eps)
    usage, sums = np.zeros(K), np.zeros((K, D))
    for t in range(1, 6):
        z, assigned = torch.randn(20, D), torch.randint(K - 1, (20,))        # nobody uses the last
        book.update(z, F.one_hot(assigned, K).float())
        for i in range(K):
            mine = z[assigned == i].double().numpy()
            usage[i] = decay * usage[i] + (1 - decay) * len(mine)
            sums[i] = decay * sums[i] + (1 - decay) * mine.sum(0)
        n, m = usage / (1 - decay ** t), sums / (1 - decay ** t)
        n = (n + eps) / (n.sum() + K * eps) * n.sum()                # Laplace smoothing
        np.testing.assert_allclose(book.codes, m / n[:, None], rtol=1e-4, atol=1e-5)
        if t == 1:                             # debiased, so at once where the vectors are
            for i in assigned.unique():
                torch.testing.assert_close(book.codes[i], z[assigned == i].mean(0),
                                           rtol=1e-4, atol=1e-5)


def small_vqvae():
    """A narrow VQ-VAE with sound batch norms, and six images of 6x6 patches."""
    torch.manual_seed(0)
    vqvae = VQVAE(width=0.125)
    x = F.interpolate(torch.rand(6, 4, 6, 6), 96)
    for module in vqvae.encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0              # running averages that are there at once
    vqvae.train().features(x)
    assert len(vqvae.encode(x).unique()) > 10  # one code for everything would test nothing
    return vqvae, x


def test_codebook_moves_in_training_only():
    """vqvae.py, loss: evaluation leaves codes, averages and batch norms as they are."""
    vqvae, x = small_vqvae()
    for training in (False, True):
        before = {k: v.clone() for k, v in vqvae.state_dict().items()}
        vqvae.train(training).loss(x[:3])
        moved = {k for k, v in vqvae.state_dict().items() if not torch.equal(v, before[k])}
        if training:
            assert {"codebook.codes", "codebook.sums", "codebook.usage", "codebook.step",
                    "encoder.1.running_mean"} <= moved
        else:
            assert not moved


def test_gradient_reaches_the_encoder_as_if_nothing_were_quantised():
    """van den Oord et al., Eq. 3: the straight-through gradient and the commitment's."""
    vqvae, x = small_vqvae()
    vqvae.eval()
    kept = []
    handle = vqvae.encoder.register_forward_hook(
        lambda module, args, z_e: z_e.retain_grad() or kept.append(z_e))
    loss, _ = vqvae.loss(x)
    handle.remove()
    loss.backward()
    z_e = kept[0]
    z_q = vqvae.embed(vqvae.encode(x)).requires_grad_()
    nll = continuous_bernoulli_nll(vqvae.logits(z_q), x).sum() / len(x)
    straight, = torch.autograd.grad(nll, z_q)
    pull = 0.25 * 2 * (z_e - z_q).detach() / z_e.numel()
    torch.testing.assert_close(z_e.grad, straight + pull, rtol=1e-4, atol=1e-5)
    assert pull.abs().max() > 1e-4 and straight.abs().max() > 1e-2   # both are seen by the check
    assert all(p.grad.abs().max() > 0 for p in vqvae.encoder.parameters())


def test_codes_of_an_observation_do_not_depend_on_its_company():
    """vqvae.py, encode: the same codes alone or in a batch, in training or evaluation mode."""
    vqvae, x = small_vqvae()
    together = vqvae.train().encode(x)
    assert vqvae.training                      # and the mode comes back
    alone = torch.cat([vqvae.eval().encode(image[None]) for image in x])
    assert not vqvae.training
    assert together.shape == (6, 6, 6) and together.dtype == torch.int64
    assert torch.equal(together, alone) and len(together.unique()) > 10
    as_bytes = (x * 255).round().byte()
    assert torch.equal(vqvae.encode(as_bytes), vqvae.encode(as_bytes.float() / 255))


def test_decoding_shows_the_mean_and_logits_end_at_the_clamp():
    """The density is unbounded at exact black, so the logits must not be."""
    vqvae, _ = small_vqvae()
    codes = torch.randint(128, (2, 6, 6))
    embedded = vqvae.embed(codes)
    assert torch.equal(embedded[1, :, 2, 5], vqvae.codebook.codes[codes[1, 2, 5]])
    with torch.no_grad():
        vqvae.decoder[-1].bias.copy_(torch.tensor([-1e4, 1e4, 0., 1.]))
    logits = vqvae.logits(embedded)
    assert (logits[:, 0] == -15.9).all() and (logits[:, 1] == 15.9).all()
    assert (logits[:, 2:].abs() < 7.5).all() and MAX_LOGIT == 15.9
    images = vqvae.decode(codes)
    assert images.shape == (2, 4, 96, 96) and 0 <= images.min() and images.max() <= 1
    assert torch.equal(images, continuous_bernoulli_mean(logits))


def test_the_clamps_gradient_leads_back_inside_only():
    """vqvae.py, MAX_LOGIT: beyond an end the gradient of that end, but never outwards."""
    vqvae, _ = small_vqvae()
    vqvae.decoder = torch.nn.Identity()
    logits = torch.tensor([-40., -16., -15., 0., 15., 16., 40.])
    for x, outwards in ((0.0, logits < -15.9), (0.03, logits < -15.9), (0.3, logits > 99),
                        (0.7, logits > 99), (0.97, logits > 15.9), (1.0, logits > 15.9)):
        inputs, xs = logits.clone().requires_grad_(), torch.full_like(logits, x)
        continuous_bernoulli_nll(vqvae.logits(inputs), xs).sum().backward()
        expected = continuous_bernoulli_mean(logits.clamp(-15.9, 15.9)) - x
        torch.testing.assert_close(inputs.grad, torch.where(outwards, 0, expected))
    # torch.distributions leads back as well, with the plain Bernoulli's sigmoid(l) - x.
    far = torch.tensor([-40., -20.], requires_grad=True)
    torch.distributions.ContinuousBernoulli(logits=far).log_prob(torch.tensor(0.3)).sum().backward()
    torch.testing.assert_close(-far.grad, torch.tensor([-0.3, -0.3]))


def test_the_first_pictures_are_as_bright_as_the_game():
    """vqvae.py, start_at_brightness: the mean in bright games, inside the clamp in dark ones."""
    vqvae, _ = small_vqvae()
    codes = torch.randint(128, (2, 6, 6))
    for mean in (0.2, 0.35, 0.5, 0.65, 0.8):
        vqvae.start_at_brightness(torch.tensor(mean))
        bias = vqvae.decoder[-1].bias
        torch.testing.assert_close(bias, torch.full((4,), 1 / (1 - mean) - 1 / mean))
        assert vqvae.decode(codes).mean().item() == pytest.approx(mean, abs=0.06)
    for mean, end in ((0.0, -15.9), (1e-3, -15.9), (0.03, -15.9), (0.97, 15.9), (1.0, 15.9)):
        vqvae.start_at_brightness(torch.tensor(mean))
        assert (vqvae.decoder[-1].bias == end).all(), mean


def test_vqvae_loss_and_its_parts():
    """Section 3.4, "Constant KL": KL is 36 log 128; usage and perplexity against direct counts."""
    vqvae, x = small_vqvae()
    loss, parts = vqvae.eval().loss(x)
    for numbers in (255.0, -0.1):              # bytes, as floats
        with pytest.raises(AssertionError, match="floats must be in"):
            vqvae.loss(torch.full((2, 4, 96, 96), numbers))
    assert abs(parts["kl"].item() - 36 * math.log(128)) < 1e-3
    codes = vqvae.encode(x)
    pixels = continuous_bernoulli_nll(vqvae.logits(vqvae.embed(codes)), x)
    torch.testing.assert_close(parts["reconstruction"], pixels.sum((1, 2, 3)).mean())
    torch.testing.assert_close(parts["elbo"], -parts["reconstruction"] - parts["kl"])
    commitment = (vqvae.features(x) - vqvae.embed(codes)).square().mean()
    torch.testing.assert_close(parts["commitment"], commitment)
    torch.testing.assert_close(loss, -parts["elbo"] + 0.25 * commitment)
    weight = torch.rand(x.shape)               # weighs pixels in the loss, not in what is reported
    weighted, same_parts = vqvae.loss(x, weight=weight)
    torch.testing.assert_close(weighted - loss, (pixels * (weight - 1)).sum((1, 2, 3)).mean(),
                               rtol=1e-3, atol=1e-2)
    assert same_parts == parts
    shares = [(codes == k).double().mean().item() for k in codes.unique()]
    assert parts["usage"].item() == pytest.approx(len(shares) / 128)
    perplexity = math.exp(-sum(p * math.log(p) for p in shares))
    assert parts["perplexity"].item() == pytest.approx(perplexity, rel=1e-4)


def test_foreground_weighs_more(monkeypatch):
    """vqvae.py, is_foreground, and the weight that train.py's update makes of it, by pixel."""
    x = torch.full((2, 4, 96, 96), 100, dtype=torch.uint8)
    x[0, 2, 1, 1], x[1, 3, 0, 2], x[1, 0, 2, 2] = 111, 89, 110      # the last is too close to 100
    models, seen = tiny_models(), []
    models.background.fill_(100)
    loss = models.vqvae.loss
    monkeypatch.setattr(models.vqvae, "loss", lambda x, weight: seen.append(weight)
                        or loss(x, weight))
    models.vqvae_update(x, models.scalar(5.0))
    models.vqvae_update(x)
    expected = torch.ones(x.shape)
    expected[0, 2, 1, 1] = expected[1, 3, 0, 2] = 6
    assert torch.equal(seen[0], expected) and seen[1] is None


def test_foreground_error_is_one_for_the_background_and_zero_for_perfect():
    """The figure that sees whether the ball is there."""
    torch.manual_seed(0)
    background = torch.rand(1, 1, 8, 8).expand(9, -1, -1, -1)
    images = background.clone()
    for i in range(9):
        images[i, 0, i % 8, 3] = 1 - images[i, 0, i % 8, 3].round()  # something small that moves
    assert foreground_error(images, images) == 0
    assert foreground_error(images, background) == pytest.approx(1)
    halfway = (images + background) / 2
    assert foreground_error(images, halfway) == pytest.approx(0.25)
    grey = images + 0.02 * (images == background)                    # errors elsewhere do not count
    assert foreground_error(images, grey) == 0


# ----------------------------------------------------------------------------------------------
# convlstm.py: the recurrent cell
# ----------------------------------------------------------------------------------------------


def test_convlstm_on_a_1x1_map_is_torchs_lstm_cell():
    """Section 3.3, "convolutional LSTM": without norms and peepholes, torch.nn.LSTMCell."""
    torch.manual_seed(0)
    cell, theirs = ConvLSTMCell(5, 7, size=(1, 1)), torch.nn.LSTMCell(5, 7)
    cell.norm_x = cell.norm_h = torch.nn.Identity()
    with torch.no_grad():
        cell.bias.normal_()
        theirs.weight_ih.copy_(cell.conv_x.weight[:, :, 2, 2])       # the rest meets the padding
        theirs.weight_hh.copy_(cell.conv_h.weight[:, :, 2, 2])
        theirs.bias_ih.copy_(cell.bias)
        theirs.bias_ih[7:14] += 1                                    # the forget gate's bias of 1
        theirs.bias_hh.zero_()
    state, their_state = cell.initial_state(3), (torch.zeros(3, 7), torch.zeros(3, 7))
    for _ in range(4):
        x = torch.randn(3, 5)
        state, their_state = cell(x[:, :, None, None], state), theirs(x, their_state)
        for ours, reference in zip(state, their_state):
            torch.testing.assert_close(ours[:, :, 0, 0], reference)


def test_convlstm_norms_and_peepholes_by_hand():
    """Shi et al., 2015, with layer norm: the formulas of convlstm.py, pixel by pixel in float64."""
    torch.manual_seed(0)
    B, I, C, H, W = 2, 3, 2, 3, 4
    cell = ConvLSTMCell(I, C, kernel_size=3, size=(H, W)).double()
    assert not cell.peephole.any() and not cell.bias.any()           # they start at zero
    for p in cell.parameters():
        torch.nn.init.normal_(p)
    x, h, c = (torch.randn(B, n, H, W, dtype=torch.float64) for n in (I, C, C))
    new_h, new_c = cell(x, (h, c))

    def convolved_and_normed(image, weight, norm):                   # -> [4C, H, W]
        out = np.zeros((4 * C, H, W))
        for k, y, x_, i, dy, dx in np.ndindex(4 * C, H, W, len(image), 3, 3):
            if 0 <= y + dy - 1 < H and 0 <= x_ + dx - 1 < W:
                out[k, y, x_] += weight[k, i, dy, dx] * image[i, y + dy - 1, x_ + dx - 1]
        out = (out - out.mean()) / np.sqrt(out.var() + 1e-5)         # over all of channels and map
        return out * norm.weight.detach().numpy() + norm.bias.detach().numpy()

    def sigmoid(a):
        return 1 / (1 + np.exp(-a))

    w_x, w_h, bias, peep = (p.detach().numpy() for p in (cell.conv_x.weight, cell.conv_h.weight,
                                                         cell.bias, cell.peephole))
    for b in range(B):
        pre = convolved_and_normed(x[b].numpy(), w_x, cell.norm_x) \
            + convolved_and_normed(h[b].numpy(), w_h, cell.norm_h) + bias[:, None, None]
        for k in range(C):
            old = c[b, k].numpy()
            i = sigmoid(pre[k] + peep[0, k] * old)
            f = sigmoid(pre[C + k] + peep[1, k] * old + 1)
            new = f * old + i * np.tanh(pre[2 * C + k])
            o = sigmoid(pre[3 * C + k] + peep[2, k] * new)           # sees the new cell
            np.testing.assert_allclose(new_c[b, k].detach(), new, rtol=1e-8)
            np.testing.assert_allclose(new_h[b, k].detach(), o * np.tanh(new), rtol=1e-8)
    first = ConvLSTMCell(4, 5).initial_state(3)
    assert all(s.shape == (3, 5, 6, 6) and s.dtype == torch.float32 and not s.any() for s in first)


# ----------------------------------------------------------------------------------------------
# The demos of these three, and what the demos of all five refuse
# ----------------------------------------------------------------------------------------------


def demo(monkeypatch, name, *arguments):
    """Runs `python NAME.py ARGUMENTS` in this process: what it says when it fails, or None."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    monkeypatch.setattr(signal, "signal", lambda *_: None)           # the tests' own Ctrl-C stays
    monkeypatch.setenv("MPLBACKEND", "Agg")
    try:
        runpy.run_path(str(HERE / f"{name}.py"), run_name="__main__")
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize("name, flags", [
    ("atari", "--steps 0/--steps -1/--steps 1000000000/--game Pogn"),
    ("vqvae", "--updates 0/--updates 1000000000/--width 0/--width nan/--width 1e9/--width -1/"
              "--game Pogn"),
    ("convlstm", "--updates 0/--updates 1000000000"),
    ("dynamics", "--updates 0/--updates 1000000000"),
    ("ppo", "--steps 0/--steps 1023/--steps 1000000000/--interactions 1/--interactions 1000000000/"
            "--game Pogn/--game=/--device hpu --game Pong/--device banana --game Pong/"
            "--device meta --game Pong/--out file --game Pong/--out file/x --game Pong")])
def test_demos_refuse_bad_flags_in_one_line_before_any_work(name, flags, monkeypatch, tmp_path):
    """Numbers out of range, unknown games and devices, pictures that cannot be written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    files = ("nowhere/x.png", "folder.png", "x.nonsense", "x", "x" * 300 + ".png")
    lines = [*flags.replace("/--", "|--").split("|"), "--seed -1", "--seed 2147483648",
             *(f"--out {file}" for file in files if name != "ppo")]
    for arguments in lines:
        line = demo(monkeypatch, name, *arguments.split())
        assert isinstance(line, str) and re.fullmatch("error: .+", line), (arguments, line)
        flag, _, value = arguments.replace("=", " ").partition(" ")
        assert flag in line or (value.split(" ")[0] or flag[2:]) in line, (arguments, line)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


def test_a_demo_is_not_ended_by_surroundings(tmp_path):
    """The user's matplotlib settings change nothing; lost output is said in one line."""
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nbackend: TkAgg\n")
    run = functools.partial(
        subprocess.run, cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"MPLBACKEND": "module://nowhere", "OMP_NUM_THREADS": "1"})
    line = [sys.executable, str(HERE / "atari.py"), "--steps", "5", "--game", "space_invaders"]
    done = run(line, stdout=subprocess.DEVNULL)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "atari_SpaceInvaders.png").stat().st_size > 5000
    with open("/dev/full", "w") as full:
        done = run(line, stdout=full)
    assert done.returncode == 1
    assert done.stderr == "error: [Errno 28] No space left on device\n"


def test_ctrl_c_ends_a_demo_from_its_first_moment(tmp_path):
    """While it imports, too: exit status 130 and nothing on stderr."""
    (tmp_path / "argparse.py").write_text("import os, signal, time\n"       # imported first
                                          "os.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")
    for name in ("atari", "vqvae", "convlstm", "dynamics", "ppo"):
        shutil.copy(HERE / f"{name}.py", tmp_path)
        status, _, lines = command(tmp_path / f"{name}.py")
        assert (status, lines) == (130, []), name


def test_the_demo_of_the_vqvae(monkeypatch, tmp_path, capsys):
    """Its random play is stacked as in atari.py; it leaves a picture and two errors."""
    play = vqvae.random_play("pong", 30, seed=0)
    assert play.shape == (30, 4, 96, 96) and play.dtype == torch.uint8
    assert torch.equal(play[1:, :3], play[:-1, 1:]) and (play[0] == play[0, 0]).all()
    assert len(play[:, 3].unique(dim=0)) > 10
    assert torch.equal(play, vqvae.random_play("Pong", 30, seed=0))

    # In these frames nothing moves but the score: the field's error has nothing to count.
    frames = torch.zeros(2720, 4, 96, 96, dtype=torch.uint8)
    frames[torch.arange(2720) % 9 == 0, :, 3:9, 40:50] = 200
    monkeypatch.setattr(vqvae, "random_play", lambda game, steps, seed: frames)
    monkeypatch.setattr(sys, "argv", ["vqvae.py", "--updates", "2", "--width", "0.01",
                                      "--out", str(tmp_path / "x.png")])
    vqvae.main()
    whole, field = re.findall(r": ([\d.]+)$", capsys.readouterr().out, re.MULTILINE)
    assert float(whole) > 0.5 and float(field) == 0
    assert (tmp_path / "x.png").stat().st_size > 5000


# ----------------------------------------------------------------------------------------------
# dynamics.py: what comes next, and the dream
# ----------------------------------------------------------------------------------------------

M, K, D = 3, 8, 4                              # a small world: actions, codes, code dimensions


def small_world(B=3, L=6, **settings):
    """(dynamics, embed, batch of codes, actions, rewards, ends) with no episode end in it."""
    torch.manual_seed(0)
    dynamics, vectors = (Dynamics(M, num_codes=K, code_dim=D, hidden=6, **settings),
                         torch.randn(K, D))
    batch = [torch.randint(K, (B, L, 6, 6)), torch.randint(M, (B, L)),
             torch.randint(-2, 3, (B, L)).float(), torch.zeros(B, L, dtype=torch.bool)]
    return dynamics, lambda codes: F.embedding(codes, vectors).permute(0, 3, 1, 2), batch


def test_one_step_of_the_dynamics():
    """Eq. 4, 6, 7 and Figure 3: shapes, and the action enters at both cells and both heads."""
    dynamics, embed, (codes, actions, _, _) = small_world()
    state = dynamics.initial_state(3)
    code_logits, reward_logits, new_state = dynamics(embed(codes[:, 0]), actions[:, 0], state)
    assert code_logits.shape == (3, K, 6, 6) and reward_logits.shape == (3, 3)
    assert [s.shape for cell in new_state for s in cell] == [(3, 6, 6, 6)] * 4
    for module in (dynamics.cell1, dynamics.cell2, dynamics.code_head, dynamics.reward_head):
        seen = []
        handle = module.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        for action in range(M):
            dynamics(embed(codes[:, 0]), torch.full((3,), action), state)
        handle.remove()
        for action, x in enumerate(seen):      # the last M planes are its one-hot vector
            planes = F.one_hot(torch.tensor(action), M).float()[None, :, None, None]
            assert torch.equal(x[:, -M:], planes.expand(3, M, 6, 6))


def test_rewards_become_three_classes():
    """Section 3.3: clip to [-1, 1], round to the nearest integer; class 0 is -1."""
    rewards = torch.tensor([-200., -1., -0.6, -0.4, 0., 0.4, 0.6, 1., 7.])
    assert reward_class(rewards).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_dynamics_loss_against_plain_loops():
    """Eq. 6 and 7, maximum likelihood: one sequence, one step, one code at a time."""
    dynamics, embed, (codes, actions, rewards, ends) = small_world()
    ends[0, 2] = ends[2, 0] = ends[2, 4] = True
    loss, parts = dynamics.loss(codes, actions, rewards, ends, embed, context=6, reward_weight=0.3)
    code_losses, code_right, reward_losses, reward_right = [], [], [], {0: [], 1: [], 2: []}
    for b in range(3):
        state = dynamics.initial_state(1)
        for t in range(5):
            code_logits, reward_logits, state = dynamics(embed(codes[b:b + 1, t]),
                                                         actions[b:b + 1, t], state)
            if ends[b, t]:                     # the next observation is of another episode:
                state = dynamics.initial_state(1)                    # nothing to remember,
            else:                                                    # and it is not predicted
                log_p = code_logits[0].log_softmax(0)
                for y, x in np.ndindex(6, 6):
                    target = codes[b, t + 1, y, x].item()
                    code_losses.append(-log_p[target, y, x].item())
                    code_right.append(log_p[:, y, x].argmax().item() == target)
            target = int(min(max(rewards[b, t].item(), -1), 1)) + 1
            reward_losses.append(-reward_logits[0].log_softmax(0)[target].item())
            reward_right[target].append(reward_logits[0].argmax().item() == target)
    assert parts["code_loss"].item() == pytest.approx(np.mean(code_losses), rel=1e-5)
    assert parts["reward_loss"].item() == pytest.approx(np.mean(reward_losses), rel=1e-5)
    expected = 36 * np.mean(code_losses) + 0.3 * np.mean(reward_losses)     # Eq. 6: a product
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert parts["code_accuracy"].item() == pytest.approx(np.mean(code_right), rel=1e-5)
    for k, name in enumerate(("minus", "zero", "plus")):
        assert parts[f"reward_accuracy_{name}"].item() == pytest.approx(np.mean(reward_right[k]))
    _, parts = dynamics.loss(codes, actions, rewards.clamp(min=0), ends, embed)
    assert parts["reward_accuracy_minus"].isnan()                    # there was none: not 0, not 1


def test_no_code_loss_across_an_episode_end():
    """Section 3.4, "Episodic Environments": no loss where the target is another episode's."""
    dynamics, embed, (codes, actions, rewards, ends) = small_world()

    def code_loss(codes, ends=ends):
        _, parts = dynamics.loss(codes, actions, rewards, ends, embed, context=6)
        return parts["code_loss"].item()

    other = codes.clone()
    other[:, 5] = (codes[:, 5] + 1) % K        # row 5 is the last target, and no input
    assert code_loss(other) != code_loss(codes)
    ends[:, 4] = True                          # row 4 is the last of its episode
    assert code_loss(other) == code_loss(codes)
    # The last column says what follows row 5, which nothing here predicts.
    later = ends.clone()
    later[:, 5] = True
    assert code_loss(codes, ends=later) == code_loss(codes)
    # Where every step crosses an end there is nothing to learn, and no 0 / 0.
    assert code_loss(codes, ends=torch.ones_like(ends)) == 0


def test_the_dynamics_refuses_what_would_pass_unnoticed():
    """Ends that are numbers (~1 is -2), actions that do not exist (planes of zeros)."""
    dynamics, embed, (codes, actions, rewards, ends) = small_world()
    for numbers in (ends.long(), ends.byte(), ends.float()):
        with pytest.raises(AssertionError, match="ends must be bool"):
            dynamics.loss(codes, actions, rewards, numbers, embed)
    for wrong in (-1, M):
        with pytest.raises(RuntimeError, match="Class values"):
            dynamics(embed(codes[:, 0]), torch.full((3,), wrong), dynamics.initial_state(3))
        with pytest.raises(RuntimeError, match="Class values"):
            dynamics.loss(codes, torch.full_like(actions, wrong), rewards, ends, embed)
        with pytest.raises(RuntimeError, match="Class values"):
            open_loop(dynamics, embed, codes, torch.full_like(actions, wrong))


def predictions(dynamics, embed, batch, context=6, **settings):
    """The code logits of each step of one loss, and the codes that each step was given."""
    logits, inputs = [], []
    handle = dynamics.code_head.register_forward_hook(
        lambda m, args, out: logits.append(out.detach()))
    torch.manual_seed(1)
    dynamics.loss(*batch, lambda codes: inputs.append(codes.clone()) or embed(codes), context,
                  **settings)
    handle.remove()
    return logits, inputs


def test_state_is_zeroed_at_an_episode_end():
    """What was before an end has no influence on predictions after it."""
    dynamics, embed, batch = small_world()
    batch[3][0, 1] = True                      # sequence 0: an end after row 1; the others: none
    changed = [v.clone() for v in batch]
    changed[0][:, 0] = (changed[0][:, 0] + 1) % K
    before, after = (predictions(dynamics, embed, b)[0] for b in (batch, changed))
    for t in range(5):
        same = [torch.equal(before[t][b], after[t][b]) for b in range(3)]
        assert same == [t > 1, False, False]


def test_after_the_context_the_model_reads_its_own_samples():
    """Released code: 4 true inputs, then sampled predictions, and the truth again after an end."""
    dynamics, embed, batch = small_world(L=9)
    codes, _, _, ends = batch
    ends[1, 5] = True
    _, inputs = predictions(dynamics, embed, batch, context=4)
    assert len(inputs) == 8
    for t, given in enumerate(inputs):
        is_true = [torch.equal(given[b], codes[b, t]) for b in range(3)]
        assert is_true == [t < 4, t < 4 or t == 6, t < 4]
    # True codes beyond the context are targets only; true codes within it steer the samples.
    later, early = [v.clone() for v in batch], [v.clone() for v in batch]
    later[0][0, 4:] = (later[0][0, 4:] + 1) % K
    early[0][0, 3] = (early[0][0, 3] + 1) % K
    after_later = predictions(dynamics, embed, later, context=4)[1]
    after_early = predictions(dynamics, embed, early, context=4)[1]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(inputs, after_later))
    assert not torch.equal(inputs[4][0], after_early[4][0])
    # They are samples of the prediction: cold, the likeliest codes,
    logits, inputs = predictions(dynamics, embed, batch, context=4, temperature=1e-4)
    assert torch.equal(inputs[4], logits[3].argmax(1))
    # and with one code certain, it is what comes.
    with torch.no_grad():
        dynamics.code_head.bias[5] += 100
    _, inputs = predictions(dynamics, embed, batch, context=4)
    assert (inputs[4] == 5).all() and (inputs[7] == 5).all()


def test_samples_follow_the_softmax():
    """Eq. 6 to 8, Cat(Softmax(.)): frequencies of 40,000 draws, and at temperature 2."""
    torch.manual_seed(0)
    logits, n = torch.tensor([1., -1., 0.3, 2., -0.5]), 40_000
    for temperature in (1.0, 2.0):
        counts = sample(logits.expand(n, 5), temperature).bincount(minlength=5)
        expected = n * torch.softmax(logits.double() / temperature, 0)
        chi_square = ((counts - expected) ** 2 / expected).sum().item()
        assert chi_square < 18.5               # exceeded once in a thousand, 4 degrees of freedom
    peaked = F.one_hot(torch.randint(K, (2, 6, 6)), K).permute(0, 3, 1, 2) * 100.
    assert torch.equal(sample(peaked), peaked.argmax(1))             # along dimension 1


def test_dream():
    """Section 3.4: starts at real codes, 50 steps, sampled codes and rewards, then it ends."""
    dynamics, embed, (codes, _, _, _) = small_world(B=5)
    policy = ActorCritic(M, code_dim=D, width=0.1)
    torch.nn.init.normal_(policy.actor.weight)
    calls = []
    handle = dynamics.register_forward_hook(lambda m, args, out: calls.append((args, out)))
    torch.manual_seed(3)
    batch = dream(dynamics, embed, policy, codes[:, 0], steps=12)
    handle.remove()
    assert torch.equal(batch["codes"][0], codes[:, 0])
    assert batch["codes"].shape == (12, 5, 6, 6)
    assert all(batch[k].shape == (12, 5) for k in set(batch) - {"codes", "last_value"})
    assert batch["dones"][-1].all() and not batch["dones"][:-1].any()
    assert torch.equal(batch["last_value"], torch.zeros(5))
    assert set(batch["rewards"].unique().tolist()) == {-1, 0, 1}
    assert not any(v.requires_grad for v in batch.values())
    # Actions, log-probabilities and values are the policy's on the codes of the same row (Eq. 8).
    for t in range(12):
        logits, values = policy(embed(batch["codes"][t]))
        distribution = torch.distributions.Categorical(logits=logits)
        log_probs = distribution.log_prob(batch["actions"][t])
        torch.testing.assert_close(batch["log_probs"][t], log_probs)
        torch.testing.assert_close(batch["values"][t], values)
    # Step t reads (z_t, a_t, h_{t-1}), and h begins at zero (Eq. 4).
    assert not any(s.any() for cell in calls[0][0][2] for s in cell)
    for t, ((z, action, state), _) in enumerate(calls):
        assert torch.equal(z, embed(batch["codes"][t])) and torch.equal(action, batch["actions"][t])
        assert t == 0 or state is calls[t - 1][1][2]
    torch.manual_seed(3)
    again = dream(dynamics, embed, policy, codes[:, 0], steps=12)
    assert all(torch.equal(batch[k], again[k]) for k in batch)       # the seed decides everything


def test_dream_draws_codes_and_rewards_from_the_predictions():
    """Eq. 6 and 7: what is certain happens; the temperature flattens the codes alone."""
    dynamics, embed, (codes, _, _, _) = small_world(B=5)
    with torch.no_grad():
        dynamics.reward_head.linear2.bias[0] += 100
        dynamics.code_head.bias[6] += 20
    policy = ActorCritic(M, code_dim=D, width=0.1)
    batch = dream(dynamics, embed, policy, codes[:, 0], steps=4)
    assert (batch["rewards"] == -1).all() and (batch["codes"][1:] == 6).all()
    hot = dream(dynamics, embed, policy, codes[:, 0], steps=4, temperature=100)
    assert (hot["rewards"] == -1).all() and len(hot["codes"][1:].unique()) == K
    twins = dream(dynamics, embed, policy, codes[:1, 0].expand(60, -1, -1), steps=1)
    assert len(twins["actions"].unique()) == M                       # sampled: not the best one


def test_the_third_head_against_plain_loops():
    """--predict-ends: the loss of ends counts an end 100 times; cuts are no ends of the game."""
    dynamics, embed, (codes, actions, rewards, ends) = small_world(predict_ends=True)
    assert not hasattr(Dynamics(M, hidden=4).end_head, "linear2")    # off by default
    ends[0, 2] = ends[2, 0] = ends[2, 4] = ends[1, 5] = True
    terminated = ends.clone()
    terminated[2, 0] = False                   # there recording was cut
    torch.nn.init.normal_(dynamics.end_head.linear2.weight, 0, 3)
    loss, parts = dynamics.loss(codes, actions, rewards, ends, embed, context=6, reward_weight=0.3,
                                end_targets=terminated)
    losses, truth, said = [], [], []
    for b in range(3):
        state = dynamics.initial_state(1)
        for t in range(5):
            _, _, state = dynamics(embed(codes[b:b + 1, t]), actions[b:b + 1, t], state)
            logit = dynamics.end_logits(actions[b:b + 1, t], state).item()
            h, planes = state[1][0], F.one_hot(actions[b:b + 1, t], M)[:, :, None, None]
            y = torch.cat([h, planes.expand(-1, -1, 6, 6)], 1)
            raw = dynamics.end_head(y).item()
            assert logit == pytest.approx(raw - math.log(100), abs=1e-5)
            over = terminated[b, t].item()
            losses.append((100 if over else 1) * -math.log(
                1 / (1 + math.exp(-raw if over else raw))))
            truth.append(over)
            said.append(logit > 0)
            if ends[b, t]:
                state = dynamics.initial_state(1)
    assert sum(truth) == 2
    assert parts["end_loss"].item() == pytest.approx(np.mean(losses), rel=1e-4)
    assert loss.item() == pytest.approx((36 * parts["code_loss"] + 0.3 * (
        parts["reward_loss"] + parts["end_loss"])).item(), rel=1e-5)
    assert parts["end_true"].item() == pytest.approx(2 / 15)
    assert parts["end_predicted"].item() == pytest.approx(np.mean(said))
    assert parts["end_right"].item() == pytest.approx(np.mean(np.array(said) & truth))
    _, same = dynamics.loss(codes, actions, rewards, ends, embed, context=6)
    assert same["end_true"].item() == pytest.approx(3 / 15)          # not told better: every end

    # The weight does not make ends likelier: the loss is least where the head says 2 in 15.
    torch.nn.init.zeros_(dynamics.end_head.linear2.weight)
    with torch.no_grad():
        dynamics.end_head.linear2.bias[:] = math.log(2 / 13) + math.log(100)
    dynamics.loss(codes, actions, rewards, ends, embed, end_targets=terminated)[0].backward()
    assert dynamics.end_head.linear2.bias.grad.abs() < 1e-6 * 1e-4   # of 1e-6 times the gradient


def test_an_end_is_learned():
    """--predict-ends: one step in twenty ends the game; the head finds out by what."""
    dynamics, embed, _ = small_world(predict_ends=True)
    optimizer = torch.optim.Adam(dynamics.parameters(), lr=1e-2)
    for _ in range(25):
        codes, actions = torch.randint(1, K, (60, 2, 6, 6)), torch.randint(M, (60, 2))
        ends = torch.rand(60, 2) < 0.05
        codes[ends] = 0                        # the screen goes blank
        loss, parts = dynamics.loss(codes, actions, torch.zeros(60, 2), ends, embed,
                                    reward_weight=1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert parts["end_right"] == parts["end_predicted"] == parts["end_true"] > 0


def test_a_dream_ends_where_the_model_says(monkeypatch):
    """--predict-ends: an ended dream goes on as another from a real start, the state forgotten;
    then GAE does not look past the end, but past the last step."""
    world, T, B = CountingWorld(), 12, 12
    starts = torch.randint(8, (B, 6, 6))

    def policy(z):
        return torch.zeros(len(z), 3), z[:, :8].argmax(1).float().mean((1, 2))

    monkeypatch.setattr(world, "end_head", True, raising=False)
    torch.manual_seed(0)
    batch = dream(world, world.embed, policy, starts, steps=T, memory=True)
    assert torch.equal(batch["dones"], batch["actions"] == 0)
    known, age = {tuple(s.flatten().tolist()) for s in starts}, torch.zeros(B, dtype=torch.int64)
    begun = set()
    for t in range(T):
        assert torch.equal(batch["memory"][t, :, 0, 0, 0].long(), age)
        step = batch["actions"][t] + age
        following = (batch["codes"][t] + step[:, None, None]) % 8
        age += 1
        for b in range(B):
            if batch["dones"][t, b]:
                age[b] = 0
                if t < T - 1:
                    begun.add(tuple(batch["codes"][t + 1, b].flatten().tolist()))
            elif t < T - 1:
                assert torch.equal(batch["codes"][t + 1, b], following[b])
            else:                              # nothing ends with the last step
                assert batch["last_value"][b] == following[b].float().mean()
    assert begun <= known and len(begun) > 3 and 0 < batch["dones"][-1].sum() < B
    monkeypatch.setattr(world, "end_head", None, raising=False)
    still = dream(world, world.embed, policy, starts, steps=T)
    assert still["dones"].sum() == B and not still["last_value"].any()


def test_a_dream_goes_on_from_what_is_remembered(monkeypatch):
    """dream and DreamEnv, start_state: dreams that begin again find the memory of their start."""
    world, T, B = CountingWorld(), 9, 12
    starts = torch.randint(8, (B, 6, 6), generator=torch.Generator().manual_seed(0))
    age = torch.arange(B) * 10
    memory = age.float()[:, None, None, None].expand(-1, -1, 6, 6)
    state, which = [(memory, memory)] * 2, {tuple(s.flatten().tolist()): 10 * i
                                            for i, s in enumerate(starts)}

    def policy(z):
        return torch.zeros(len(z), 3), z.sum((1, 2, 3))

    batch = dream(world, world.embed, policy, starts, steps=T, memory=True, start_state=state)
    for t in range(T):
        assert torch.equal(batch["memory"][t, :, 0, 0, 0].long(), age + t)
    monkeypatch.setattr(world, "end_head", True, raising=False)
    batch = dream(world, world.embed, policy, starts, steps=T, memory=True, start_state=state)
    env = DreamEnv(world, world, starts, B, steps=T, start_state=state)
    env.reset(seed=0)
    rows = [(env.state[1][0][:, 0, 0, 0], env.codes,
             torch.from_numpy(env.step(np.arange(B) % 3)[2])) for _ in range(T)]
    for memories, codes, over in ((batch["memory"][:, :, 0, 0, 0], batch["codes"], batch["dones"]),
                                  map(torch.stack, zip(*rows))):
        assert over.any() and not over.all()
        for t, b in np.ndindex(T, B):
            if t == 0 or over[t - 1, b]:       # begun, or begun again
                assert memories[t, b] == which[tuple(codes[t, b].flatten().tolist())]
            else:
                assert memories[t, b] == memories[t - 1, b] + 1


def test_open_loop_dreams_each_stretch_as_if_it_were_alone():
    """Dream fidelity: 4 observations seen, then every step from the one before, by plain loops."""
    dynamics, embed, (codes, actions, _, _) = small_world(B=5, L=9)
    with torch.no_grad():                      # what is drawn is certain
        dynamics.code_head.weight *= 1e6
        dynamics.reward_head.linear2.weight *= 1e6
    dreamed, rewards = open_loop(dynamics, embed, codes, actions)
    assert dreamed.shape == (5, 9, 6, 6) and rewards.shape == (5, 8)
    for b in range(5):
        state, z = dynamics.initial_state(1), codes[b:b + 1, 0]
        for t in range(8):
            assert torch.equal(dreamed[b, t], z[0])
            with torch.no_grad():
                code_logits, reward_logits, state = dynamics(embed(z), actions[b:b + 1, t], state)
            assert rewards[b, t] == reward_logits[0].argmax() - 1
            z = codes[b:b + 1, t + 1] if t + 1 < 4 else code_logits.argmax(1)
    assert torch.equal(dreamed[:, :4], codes[:, :4]) and (dreamed[:, 4:] != codes[:, 4:]).any()
    assert len(rewards.unique()) > 1
    with torch.no_grad():                      # at another temperature codes are drawn, not rewards
        hot = open_loop(dynamics, embed, codes, actions, context=2, temperature=1e9)[0]
    assert torch.equal(hot[:, :2], codes[:, :2]) and len(hot[:, 2:].unique()) == K


# ----------------------------------------------------------------------------------------------
# ppo.py: learning from what was dreamed
# ----------------------------------------------------------------------------------------------


def test_gae_against_the_explicit_double_sum():
    """Schulman et al., 2016, Eq. 16: A_t = sum_l (gamma lambda)^l delta_{t+l}, to the end."""
    torch.manual_seed(0)
    T, B, gamma, lam = 12, 4, 0.97, 0.9
    rewards, values, last = torch.randn(T, B), torch.randn(T, B), torch.randn(B)
    dones = torch.rand(T, B) < 0.2
    dones[-1, 0], dones[-1, 1] = True, False
    advantages = gae(rewards, values, dones, last, gamma, lam)
    after = torch.cat([values[1:], last[None]])                      # V_{t+1}
    for t, b in np.ndindex(T, B):
        total = 0.0
        for l in range(T - t):
            over = dones[t + l, b].item()
            next_value = 0 if over else gamma * after[t + l, b]
            delta = rewards[t + l, b] + next_value - values[t + l, b]
            total += (gamma * lam) ** l * delta.item()
            if over:
                break
        assert advantages[t, b].item() == pytest.approx(total, abs=1e-5)


def test_ppo_clip_on_its_four_cases():
    """Schulman et al., 2017, Eq. 7 and Figure 1: going too far gains nothing, a mistake costs."""
    #        ratio  advantage  objective  d objective / d ratio
    cases = ((1.3,  1.,        1.1,       0.),       # good, and made likely enough: clipped
             (1.3, -1.,       -1.3,      -1.),       # bad, and made more likely: pay, and go back
             (0.7,  1.,        0.7,       1.),       # good, and made less likely: go back
             (0.7, -1.,       -0.9,       0.),       # bad, and made unlikely enough: clipped
             (1.05, 1.,        1.05,      1.))       # within 1 +- 0.1 nothing is clipped
    zeros = torch.zeros(1)
    for ratio, advantage, objective, slope in cases:
        old = torch.tensor([0.4])
        p = ratio * old
        logits = torch.stack([p, 1 - p], 1).log().requires_grad_()   # actions 0 and 1
        loss, parts = ppo_loss(logits, zeros, torch.tensor([0]), old.log(),
                               torch.tensor([advantage]), zeros, zeros, clip=0.1, entropy_coef=0.0)
        assert loss.item() == pytest.approx(-objective, rel=1e-5)
        grad, = torch.autograd.grad(loss, logits)
        # d ratio / d logit_0 = ratio (1 - p)
        assert grad[0, 0].item() == pytest.approx(-slope * ratio * (1 - p.item()), abs=1e-6)
        assert parts["clip_fraction"].item() == (ratio != 1.05)


def test_ppo_value_loss_entropy_and_their_sum():
    """Schulman et al., 2017, Eq. 9, with the clipped value loss: sample by sample."""
    torch.manual_seed(0)
    n, logits = 50, torch.randn(50, M)
    actions, old_log_probs = torch.randint(M, (n,)), torch.randn(n) * 0.1 - 1
    values, old_values, returns, advantages = (torch.randn(n) * 0.3 for _ in range(4))
    loss, parts = ppo_loss(logits, values, actions, old_log_probs, advantages, returns, old_values,
                           clip=0.2, value_clip=0.15, value_coef=0.7, entropy_coef=0.03)
    value_losses, clipped_counts = [], 0
    for v, o, r in zip(values.tolist(), old_values.tolist(), returns.tolist()):
        near = o + min(max(v - o, -0.15), 0.15)
        value_losses.append(0.5 * max((v - r) ** 2, (near - r) ** 2))
        clipped_counts += (near - r) ** 2 > (v - r) ** 2
    assert 0 < clipped_counts < n
    distribution = torch.distributions.Categorical(logits=logits)
    log_ratio = distribution.log_prob(actions) - old_log_probs
    policy = -torch.min(log_ratio.exp() * advantages, log_ratio.exp().clip(0.8, 1.2) * advantages)
    assert parts["value_loss"].item() == pytest.approx(np.mean(value_losses), rel=1e-5)
    assert parts["entropy"].item() == pytest.approx(distribution.entropy().mean().item(), rel=1e-5)
    assert parts["policy_loss"].item() == pytest.approx(policy.mean().item(), rel=1e-4)
    k3 = (log_ratio.exp() - 1 - log_ratio).mean().item()
    assert parts["approx_kl"].item() == pytest.approx(k3, rel=1e-4)
    expected = policy.mean() + 0.7 * np.mean(value_losses) - 0.03 * distribution.entropy().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    _, plain = ppo_loss(logits, values, actions, old_log_probs, advantages, returns, old_values,
                        value_clip=None)
    assert plain["value_loss"].item() == pytest.approx(F.mse_loss(values, returns).item() / 2)
    # (N, 1) against (N,) would silently become (N, N).
    right = [logits, values, actions, old_log_probs, advantages, returns, old_values]
    for i in range(1, 7):
        wrong = [v[:, None] if j == i else v for j, v in enumerate(right)]
        with pytest.raises(AssertionError, match="N of each"):
            ppo_loss(*wrong)
    with pytest.raises(AssertionError, match="N of each"):
        ppo_loss(torch.cat([logits, logits]), *right[1:])
    with pytest.raises(AssertionError):
        gae(torch.zeros(5, 2), torch.zeros(5, 2, 1), torch.zeros(5, 2), torch.zeros(2))
    # Whole numbers as rewards: nothing is cut off.
    rewards, values, last = torch.tensor([[1], [0], [2]]), torch.randn(3, 1), torch.randn(1)
    dones = torch.tensor([[False], [True], [False]])
    torch.testing.assert_close(gae(rewards, values, dones, last),
                               gae(rewards.float(), values, dones, last), rtol=0, atol=0)


def rollout_of(policy, observations, reward):
    """One step each of T x B observations: dict of [T, B]; reward(actions [T, B]) -> [T, B]."""
    T, B = observations.shape[:2]
    with torch.no_grad():
        logits, values = policy(observations.flatten(0, 1))
    distribution = torch.distributions.Categorical(logits=logits)
    actions = distribution.sample()
    return {"actions": actions.view(T, B), "log_probs": distribution.log_prob(actions).view(T, B),
            "values": values.view(T, B), "rewards": reward(actions.view(T, B)),
            "dones": torch.ones(T, B, dtype=torch.bool)}


def test_ppo_update_solves_a_contextual_bandit():
    """Section 3.4, PPO: in each of three situations another action pays."""
    torch.manual_seed(0)
    policy, situations = ActorCritic(M, code_dim=D, width=0.1), torch.randn(M, D, 6, 6)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    for _ in range(25):
        which = torch.randint(M, (20, 6))
        observations = situations[which]
        rollout = rollout_of(policy, observations, lambda a: (a == (which + 1) % M).float())
        parts = ppo_update(policy, optimizer, observations, rollout, torch.zeros(6), minibatch=120,
                           clip=0.3, value_clip=9.0)
    logits, values = policy(situations)
    p = logits.softmax(1).detach()
    assert all(p[s, (s + 1) % M] > 0.9 for s in range(M))
    assert all(0.7 < v < 1.2 for v in values.tolist())               # what it pays
    assert set(parts) == {"policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction"}


def test_ppo_update_visits_every_sample_and_limits_the_gradient():
    """Released code: 4 epochs in random minibatches, gradient norm at most 0.5."""
    torch.manual_seed(0)
    policy = ActorCritic(M, code_dim=D, width=0.1)
    observations = torch.arange(30.).view(5, 6, 1, 1, 1).expand(-1, -1, D, 6, 6)
    rollout = rollout_of(policy, observations, lambda a: 1e4 * torch.randn(5, 6))
    batches, steps = [], []
    policy.register_forward_pre_hook(
        lambda module, args: batches.append(args[0][:, 0, 0, 0].int().tolist()))
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)         # a step is the gradient itself
    optimizer.register_step_post_hook(lambda *_: steps.append(torch.stack(
        [p.grad.norm() for p in policy.parameters()]).norm().item()))
    ppo_update(policy, optimizer, observations, rollout, torch.zeros(6), epochs=4, minibatch=8)
    assert [len(b) for b in batches] == [8, 8, 8, 6] * 4
    epochs = [sum(batches[i:i + 4], []) for i in range(0, 16, 4)]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4              # in another order each time
    assert steps == pytest.approx([0.5] * 16, rel=1e-3)
    # (B, T) for (T, B) has as many samples, each with another one's observation.
    with pytest.raises(AssertionError, match="T, B"):
        ppo_update(policy, optimizer, observations.transpose(0, 1), rollout, torch.zeros(6))


def test_ppo_update_normalises_each_minibatch_and_survives_a_single_sample(monkeypatch):
    """Advantages of mean 0 and (unbiased) standard deviation 1; one left over counts nothing."""
    torch.manual_seed(0)
    policy, observations = ActorCritic(M, code_dim=D, width=0.1), torch.randn(3, 3, D, 6, 6)
    rollout, seen = rollout_of(policy, observations, lambda a: torch.randn(3, 3)), []
    advantages = (rollout["rewards"] - rollout["values"]).flatten().numpy()      # each is an end
    monkeypatch.setattr(ppo, "ppo_loss", lambda *a, **k: seen.append(a) or ppo_loss(*a, **k))
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)
    ppo_update(policy, optimizer, observations, rollout, torch.zeros(3), epochs=2, minibatch=4)
    assert [len(arguments[4]) for arguments in seen] == [4, 4, 1] * 2
    log_probs = rollout["log_probs"].flatten()
    for _, _, _, old_log_probs, given, returns, old_values in seen:
        rows = [(log_probs == p).nonzero()[0, 0].item() for p in old_log_probs]
        mine = advantages[rows]
        np.testing.assert_allclose(returns - old_values, mine, atol=1e-6)
        expected = (mine - mine.mean()) / mine.std(ddof=1) if len(rows) > 1 else [0.0]
        np.testing.assert_allclose(given, expected, atol=1e-5)
    assert all(p.isfinite().all() for p in policy.parameters())


def test_the_pixel_network_is_the_usual_one():
    """Mnih et al. (2015): 8x8/4, 4x4/2, 3x3/1 convolutions and 512 units; here with two heads."""
    network = ppo.PixelNet(6)
    count = sum(p.numel() for p in network.parameters())
    convolutions = (4 * 64 + 1) * 32 + (32 * 16 + 1) * 64 + (64 * 9 + 1) * 64
    assert count == convolutions + (64 * 7 * 7 + 1) * 512 + (512 + 1) * (6 + 1)
    logits, values = network(torch.randint(256, (3, 4, 84, 84), dtype=torch.uint8))
    assert logits.shape == (3, 6) and values.shape == (3,)
    assert logits.abs().max() < 0.5            # close to the uniform policy at first


def test_the_baseline_plays_the_same_game():
    """Model-free PPO sees what AtariEnv shows, from an independent implementation: grey, maximum of
    the last two of four frames, 84x84 by area; no sticky actions, no fire at reset."""
    envs = ppo.atari_envs("Breakout", 2)
    observation, info = envs.reset(seed=3)
    own = [AtariEnv("Breakout", size=84, noop_max=0) for _ in range(2)]
    for env, noops in zip(own, info["frame_number"]):
        assert 0 <= noops <= 30
        env.reset(seed=0)
        for _ in range(noops):
            screen = env.ale.step(0)[0]
        assert np.abs(env.resize(screen) - observation[own.index(env), 3].astype(int)).max() <= 1
    points, rng = 0, np.random.default_rng(0)
    for t in range(120):
        actions = np.array([1, 1]) if t % 20 == 0 else rng.integers(4, size=2)
        observation, rewards, terminated, truncated, _ = envs.step(actions)
        for i, env in enumerate(own):
            frame, reward, over, _ = env.step(actions[i])
            assert np.abs(frame.astype(int) - observation[i, 3]).max() <= 1, (t, i)
            assert rewards[i] == reward and over == terminated[i]
            points += reward
    assert points > 0
    # Rewards are not clipped: a bank in BankHeist pays 10 and more.
    envs = ppo.atari_envs("BankHeist", 1)
    envs.reset(seed=0)
    paid = {int(envs.step(rng.integers(18, size=1))[1][0]) for _ in range(400)}
    assert max(paid) >= 10
    with pytest.raises(ValueError, match="nearest names: Freeway"):
        ppo.atari_envs("Freewya", 1)
    for name in ("SpaceInvaders", "Space Invaders", "spaceinvaders", "space_invaders"):
        assert ppo.canonical_name(name) == "SpaceInvaders"
    assert ppo.canonical_name("bank heist") == "BankHeist"
    # Eight emulators take seeds up to here: see `atari`.
    ppo.atari_envs("Pong", 8).reset(seed=2**31 - 9)


class Clock(gym.vector.VectorEnv):
    """Environment i pays 1, 2, 3, .. points, ends after 3 + i steps: the first by the clock."""

    single_action_space = gym.spaces.Discrete(2)

    def __init__(self, num_envs):
        self.num_envs, self.last = num_envs, 3 + np.arange(num_envs)

    def reset(self, seed=None):
        self.t = np.zeros(self.num_envs, int)
        return self.t[:, None].astype(np.float32), {}

    def step(self, actions):
        self.t += 1
        points, over = self.t.copy(), self.t == self.last
        info = {"final_obs": np.where(over, self.t, 0)[:, None].astype(np.float32)}
        self.t[over] = 0
        return (self.t[:, None].astype(np.float32), points, over & (self.last > 3),
                over & (self.last == 3), info)


class ValueIsSum(torch.nn.Module):
    """V(x) = the sum of x, and two equally likely actions."""

    def __init__(self, num_actions=2):
        super().__init__()
        self.zero = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.zero.expand(len(x), 2), x.flatten(1).float().sum(1) + self.zero.detach()


def test_a_rollout_bootstraps_where_the_clock_cut_it():
    """Rewards of a cut episode's last step hold gamma V of its last observation; whole_episodes
    counts each environment's first episode and no more."""
    envs, network = Clock(2), ValueIsSum()
    last, observations, rollout = ppo.play(network, envs, envs.reset()[0], 5, 0.5, True)
    assert observations[:, :, 0].T.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert last[:, 0].tolist() == [2, 1]
    assert rollout["points"].T.tolist() == [[1, 2, 3, 1, 2], [1, 2, 3, 4, 1]]
    assert rollout["rewards"].T.tolist() == [[1, 1, 1 + 0.5 * 3, 1, 1], [1, 1, 1, 1, 1]]
    assert rollout["dones"].T.tolist() == [[False, False, True, False, False],
                                           [False, False, False, True, False]]
    assert rollout["values"].tolist() == observations[:, :, 0].tolist()
    np.testing.assert_allclose(rollout["log_probs"], math.log(0.5), rtol=1e-6)
    unclipped = ppo.play(network, envs, envs.reset()[0], 2)[2]
    assert unclipped["rewards"].T.tolist() == [[1, 2], [1, 2]]
    assert ppo.whole_episodes(network, envs, 0) == [6, 10]


def test_the_baseline_leaves_a_run_that_evaluate_reads(tmp_path, capsys, monkeypatch):
    """Ppo.py --game writes what the table and Figure 5 need; a stopped one is shown as such."""
    played = []
    monkeypatch.setattr(ppo, "PixelNet", ValueIsSum)
    monkeypatch.setattr(ppo, "atari_envs", lambda game, num_envs: Clock(num_envs))
    monkeypatch.setattr(ppo, "whole_episodes", lambda network, envs, seed: (
        played.append(seed), [float(len(played))] * 8)[1])
    monkeypatch.setattr(sys, "argv", ["ppo.py", *f"--game Breakout --interactions 2100 --out "
                                      f"{tmp_path} --seed 3 --device cpu".split()])
    victim, folder = tmp_path / "victim", tmp_path / "Breakout-ppo-s3"
    victim.write_text("precious")
    folder.mkdir()
    for name in ("config.json", "metrics.csv"):
        (folder / name).symlink_to(victim)
    (folder / "evaluation.json").symlink_to(tmp_path / "nowhere")
    ppo.main()
    assert victim.read_text() == "precious" and not (tmp_path / "nowhere").exists()
    assert played == [10**6 + 3 + n for n in (0, 8, 16, 24)]
    said = capsys.readouterr().out
    assert "training takes about" in said and "mean 2.5" in said and "over 32 episodes" in said
    result = json.loads((folder / "evaluation.json").read_text())
    assert result["returns"] == [1.0] * 8 + [2.0] * 8 + [3.0] * 8 + [4.0] * 8
    assert result["interactions"] == 2048 and result["protocol"] == train.PROTOCOL
    run = evaluate.read_run(folder)
    scores = [n * (n + 1) / 2 for n in range(3, 11) for _ in range(256 // n)]
    mean = sum(scores) / len(scores)           # of all training episodes, each in points
    assert run["changed"] == {"interactions": 2048} and run["preset"] == "ppo"
    row, = run["rows"]
    assert row["collect_return"] == pytest.approx(mean) and row["real_return"] == 2.5
    with pytest.raises(SystemExit, match="already holds a run"):
        ppo.main()
    text = judged(capsys, folder)              # one run of ppo.py: nothing to play with, so a table
    assert "2.5" in text and "5.9 (3.3)" in text and "ppo with interactions=2048" in text
    assert_main_refuses("keeps no weights", evaluate.main, folder, "--fidelity")
    assert_main_refuses("none of these runs has", evaluate.main, folder, "--sweep-temperature")

    ours = made_up_run(tmp_path, "Breakout", 0, [9.0])
    whole = [json.loads((folder / "config.json").read_text()) | {"interactions": 102_400,
                                                                 "seed": s} for s in (1, 2, 3)]
    for i, config in enumerate(whole):
        other = tmp_path / f"other{i}"
        shutil.copytree(folder, other)
        (other / "config.json").write_text(json.dumps(config))
        (other / "evaluation.json").write_text(json.dumps(
            result | {"seed": config["seed"], "interactions": 102_400}))
    (tmp_path / "other2" / "evaluation.json").unlink()
    text = judged(capsys, ours, *tmp_path.glob("other*"))
    assert re.search(r"Breakout +ppo +1,2 +64 +102,400 \| +2.5 \(0.0\)", text), text
    assert "other2 stopped early" in text
    page = drawn_by(monkeypatch)               # named alone, Figure 5's curve
    judged(capsys, *tmp_path.glob("other*"), "--plot", tmp_path / "a.png")
    lines = {line.get_label(): line for line in page().axes[0].lines}
    assert "2 seeds" in page().axes[0].get_title() and "training" in page().get_supylabel()
    assert lines["mean over seeds"].get_ydata().tolist() == [run["rows"][-1]["collect_return"]]
    assert lines["PPO 100K, published final mean"].get_ydata()[0] == 5.9
    assert len(set(looks(lines.values()))) == len(lines)


def test_the_baseline_of_any_seed_without_a_listener(tmp_path, monkeypatch):
    """A seed near the emulators' last, the game in another spelling, stdout a closed pipe: all
    that counts is in the folder, under the game's own name; CartPole has only its words to give."""
    seeds = []

    class Checked(Clock):
        """Eight environments, each with a seed of 31 bits."""

        def reset(self, seed=None):
            assert seed is None or 0 <= seed and seed + 7 < 2**31
            seeds.append(seed)
            return super().reset(seed)

    def closed(*_):
        raise BrokenPipeError("Broken pipe")

    monkeypatch.setattr(ppo, "PixelNet", ValueIsSum)
    monkeypatch.setattr(ppo, "atari_envs", lambda game, num_envs: Checked(num_envs))
    for seed in (2_147_000_000, 2**31 - 1):
        monkeypatch.setattr(sys, "argv", ["ppo.py", *f"--game bank_heist --interactions 1024 --out "
                                          f"{tmp_path} --seed {seed} --device cpu".split()])
        monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(write=closed, flush=closed))
        ppo.main()
        run = evaluate.read_run(tmp_path / f"BankHeist-ppo-s{seed}")
        assert run["seed"] == seed and len(run["returns"]) == 32 and len(run["rows"]) == 1
    assert len(seeds) == 2 * 5
    for line in (["ppo", "--steps", 1024],
                 ["dynamics", "--updates", 1, "--out", tmp_path / "x.png"]):
        monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(write=closed, flush=closed))
        assert demo(monkeypatch, *line) == "error: Broken pipe"
        assert sys.stdout is None              # or the interpreter would try once more at the end


def test_the_demo_of_the_dynamics(monkeypatch, tmp_path, capsys):
    """It says how much of its dreams is right and saves them, whatever matplotlib is set to."""
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)
    assert not demo(monkeypatch, "dynamics", "--updates", 2, "--out", tmp_path / "x.png")
    said = capsys.readouterr().out
    assert re.findall(r"at temperature ([\d.]+): after 1 step", said) == ["1.0", "0.5"]
    assert (tmp_path / "x.png").stat().st_size > 5000


# ----------------------------------------------------------------------------------------------
# train.py and evaluate.py: everything together
# ----------------------------------------------------------------------------------------------


def tiny_models(device="cpu", **settings):
    """Three networks with hardly any channels; float32, where not said."""
    small = dict(bf16=False, vqvae_width=0.1, hidden=8, policy_width=0.1, dream_steps=4,
                 minibatch=5)
    return train.Models(train.Config(device=device, **small | settings), num_actions=M)


def certain_models(**settings):
    """Untrained tiny models whose predictions are certain: sampling is taking the likeliest."""
    torch.manual_seed(1)
    models = tiny_models(**settings)
    with torch.no_grad():
        models.dynamics.code_head.weight *= 1e4
        models.dynamics.reward_head.linear2.weight *= 1e5
        models.dynamics.reward_head.linear2.bias.zero_()
    return models


def tiny_windows(device="cpu", B=2, L=6):
    """x, actions, rewards, ends, terminated of windows as the world model's update wants them."""
    x = torch.zeros(B, L, 4, 96, 96, dtype=torch.uint8, device=device)
    return [x if device == "meta" else x.random_(256)] + [
        torch.zeros(B, L, dtype=t, device=device)
        for t in (torch.int64, torch.float32, torch.bool, torch.bool)]


def test_the_paper_preset_is_the_paper():
    """102,400 interactions (3.4), 241,000 world-model updates, 19,000 of PPO (released code)."""
    config = train.settings_from({"preset": "paper", "device": "cpu"})
    rounds = [train.work(config, i) for i in range(config.iterations)]
    assert [r["collect"] for r in rounds] == [12_800] + [6_400] * 14
    assert sum(r["collect"] for r in rounds) == 102_400
    assert [r["warm_up"] for r in rounds] == [50 * 12_800 // 40] + [0] * 14
    world_model = [r["world_model"] for r in rounds]
    assert world_model[0] == pytest.approx(40_600, rel=0.02)
    assert all(13_000 < updates < 15_500 for updates in world_model[1:])     # "about 14,000"
    assert sum(world_model) == pytest.approx(241_000, rel=0.02)
    ppo = [r["policy"] for r in rounds]
    assert ppo == [1000] * 7 + [2000] + [1000] * 3 + [2000] + [1000] * 2 + [3000]
    assert sum(ppo) * config.dreams * config.dream_steps == 15_200_000       # imagined steps
    assert rounds[-1]["evaluate"] == 32
    said = dict(
        vqvae_lr=1e-4, warmup_lr=1e-3, warmup_lr_end=1e-3, foreground=0, vqvae_share=1, hidden=128,
        vqvae_every=3, dynamics_batch=4, window=11, context=4, teacher=0, predict_ends=False,
        dynamics_lr=5e-4, dynamics_lr_end=5e-4, reward_lr=1e-3, reward_weight=1e-6, dreams=16,
        dream_steps=50, ppo_epochs=4, minibatch=256, gamma=0.99, lam=0.95, clip=0.1,
        entropy_coef=0.01, policy_lr=2.5e-4, dream_context=0, collect_temperature=1.5,
        temperature=1.0, explore=0, random_segment=0, vqvae_width=1.0, policy_width=1.0,
        commitment=0.25, vqvae_batch=40)
    assert {name: getattr(config, name) for name in said} == said
    fixed = {p.name: p.default for f in (ppo_loss, ppo_update, VQVAE.__init__)
             for p in inspect.signature(f).parameters.values()}
    said = dict(value_clip=0.1, value_coef=0.5, max_grad_norm=0.5, commitment=0.25)
    assert {name: fixed[name] for name in said} == said
    assert tiny_models(commitment=7.0).vqvae.commitment == 7
    assert len(dataclasses.fields(config)) <= 55
    assert all(f.metadata["help"] for f in dataclasses.fields(config))


def test_the_estimate_knows_that_later_rounds_cost_something_else():
    """train.py, seconds_left: units of work still to do, times the pace of each stage."""
    config = train.settings_from({"preset": "paper", "device": "cpu"})
    rates = dict(collect=0.5, warm_up=2.0, world_model=3.0, policy=5.0, evaluate=7.0)
    run = types.SimpleNamespace(config=config, rates=rates, iteration=13, stage="policy",
                                update=600)
    now, last = train.work(config, 13), train.work(config, 14)
    expected = 5 * (now["policy"] - 600) + 7 * now["evaluate"] \
        + 0.5 * 6_400 + 3 * last["world_model"] + 5 * 3_000 + 7 * 32
    assert train.Run.seconds_left(run) == pytest.approx(expected)
    assert train.clock(3_600 * 18 + 61) == "18:01:01"


def test_an_epoch_covers_every_window_once():
    """Released code: a pass over windows that do not overlap, in random order, in full batches."""
    buffer = filled_buffer(np.random.default_rng(0), n=230)[0]       # 20 windows at any offset
    order = buffer.epoch(11, 4, np.random.default_rng(1))
    assert order.shape == (5, 4, 11) == (batches_per_epoch(230, 11, 4), 4, 11)
    rows = np.sort(order.flatten())
    assert np.array_equal(rows, rows[0] + np.arange(220)) and 0 <= rows[0] <= 10
    starts = order[..., 0].flatten()
    assert not np.array_equal(starts, np.sort(starts))               # in random order


class World:
    """A game with known answers. Frame t of the episode that begins as number e is 16 e + t all
    over; a step pays 7 points; an episode lasts 5 steps; actions are kept."""

    num_actions, lives, action_meanings = 3, 0, ["NOOP", "LEFT", "RIGHT"]
    pays, lasts = 7.0, 5

    def __init__(self, game=None, seed=None):
        self.episode, self.actions, self.reseeded = -1, [], []

    def reset(self, seed=None):
        self.episode, self.t = self.episode + 1, 0
        self.reseeded.append(seed)
        return self.frame()

    def frame(self):
        return np.full((96, 96), 16 * self.episode + self.t, np.uint8)

    def step(self, action):
        self.t += 1
        self.actions.append(action)
        return self.frame(), self.pays, self.t == self.lasts, False


class Eyes:
    """In place of Models: keeps what it is shown and at which temperature; plays LEFT."""

    acting = contextlib.nullcontext

    def __init__(self):
        self.seen, self.temperatures = [], []

    def act(self, observations, temperature, state=None, instead=None):
        self.seen.append(observations[:, :, 0, 0].copy())                        # [B, 4]
        self.temperatures.append(temperature)
        torch.rand(1)                                                # as a policy draws
        return (np.ones(len(observations), np.int64) if instead is None else instead), state


def moved(models, update):
    """Calls update() -> the names of the networks that it changed."""
    before = copy.deepcopy({name: m.state_dict() for name, m in models.networks().items()})
    update()
    return {name for name, m in models.networks().items() if not same(m.state_dict(), before[name])}


def a_run(stage, iteration=0, models=None, buffer=None, env=None, **settings):
    """A Run in the middle of things: all its own methods, nothing on disk."""
    run = object.__new__(train.Run)
    config = train.Config(**settings) if settings or models is None else models.config
    vars(run).update(
        config=config, models=models, buffer=buffer, env=env, device=torch.device("cpu"),
        folder=None, iteration=iteration, stage=stage, update=0, sums={}, rows=[], times=[],
        returns=[], shards=[], rates=dict.fromkeys(train.STAGES, 1.0), codes=None,
        first_bad=torch.full((), -1), stop_signal=None, saved_at=math.inf, saved=True,
        save=lambda: None)
    return run


def collected(env, iteration, steps, models=None, **settings):
    """A run after train.collect has played one round of so many steps in env; its figures."""
    run = a_run("collect", iteration, models or Eyes(), ExperienceBuffer(2 * steps), env,
                first_interactions=steps, interactions=steps, **settings)
    return run, train.collect(run)


def collected_actions(iteration, steps, num_actions, act=None, **settings):
    """What train.collect does in one round of a game in which nothing happens, [steps]."""
    frame, models = np.zeros((96, 96), np.uint8), Eyes()
    models.act = act or models.act
    env = types.SimpleNamespace(num_actions=num_actions, lives=0, reset=lambda seed=None: frame,
                                step=lambda action: (frame, 0.0, False, False))
    return collected(env, iteration, steps, models, **settings)[0].buffer.actions[:steps]


def test_what_is_collected_is_what_was_seen_and_done():
    """Section 3.4, "interacting with the real environment": row t holds the frame on which a_t was
    chosen; the stack starts anew with each episode; a round is cut at its end; the policy acts at
    the temperature for collecting, from round 2 on."""
    first, later = World(), World()
    run, figures = collected(first, 0, 12)
    buffer = run.buffer
    said = [16 * e + t for e in range(3) for t in range(5)][:12]
    assert buffer.frames[:12, 0, 0].tolist() == said
    assert buffer.actions[:12].tolist() == first.actions and len(set(first.actions)) == 3
    assert not run.models.seen                                       # round 1 asks nobody
    assert buffer.terminated[:12].nonzero()[0].tolist() == [4, 9]
    assert buffer.truncated[:12].nonzero()[0].tolist() == [11]       # the round's end
    assert figures == {"collect_episodes": 2, "collect_return": 35, "collect_rewards": 1}
    assert first.reseeded[0] is not None and first.reseeded[1:] == [None, None]
    run, _ = collected(later, 1, 12)
    stacks = np.concatenate(run.models.seen)
    assert stacks[0].tolist() == [0] * 4 and stacks[3].tolist() == [0, 1, 2, 3]
    assert stacks[5].tolist() == [16] * 4 and stacks[7].tolist() == [16, 16, 17, 18]
    assert run.models.temperatures == [1.5] * 12 and later.actions == [1] * 12
    again, _ = collected(World(), 0, 12)
    assert np.array_equal(again.buffer.actions, buffer.actions)      # a function of the seed
    other, _ = collected(World(), 0, 12, seed=1)
    assert not np.array_equal(other.buffer.actions, buffer.actions)


def test_the_warm_up_learns_all_of_the_first_data_in_another_order_each_time(monkeypatch):
    """Section 3.4, "Warming Up": the VQ-VAE alone, 50 epochs, at the higher rate."""
    models = tiny_models(first_interactions=60, warmup_batch=20, warmup_epochs=3, warmup_lr=2e-3,
                         warmup_lr_end=1e-3, foreground=40)
    buffer, rows, rates, weights, biases = noise(60), [], [], [], []
    observations, update = models.observations, models.vqvae_update
    monkeypatch.setattr(models, "observations",
                        lambda b, r: rows.append(r) or observations(b, r))

    def vqvae_update(x, weight):
        biases.append(models.vqvae.decoder[-1].bias.mean().item())
        rates.append(models.optimizers["vqvae"].param_groups[0]["lr"])
        weights.append(weight.item())
        return update(x, weight)

    monkeypatch.setattr(models, "vqvae_update", vqvae_update)
    buffer.frames //= 4                                              # dark: mean 32 of 255
    run = a_run("warm_up", models=models, buffer=buffer)
    assert moved(models, lambda: train.warm_up(run)) == {"vqvae"} and not models.vqvae.training
    assert rates == pytest.approx([2e-3 - 1e-3 * i / 9 for i in range(9)])
    assert weights[:5] == [40] * 5 and weights[8] == pytest.approx(40 * 0.1 ** (35 / 36))
    epochs = np.array(rows).reshape(3, 60)
    assert all(sorted(epoch) == list(range(60)) for epoch in epochs)
    assert all((epochs[a] != epochs[b]).any() for a, b in ((0, 1), (0, 2), (1, 2)))
    mean = torch.from_numpy(buffer.frames).median(0).values.float().mean().item() / 255
    assert biases[0] == pytest.approx(1 / (1 - mean) - 1 / mean, rel=1e-3)   # before it learns


def test_the_world_model_learns_on_new_windows_the_vqvae_in_every_third_step(monkeypatch):
    """Section 3.4, "Fixed Representation Learning" and "Reward Loss": who learns when, how fast."""
    models = tiny_models(first_interactions=121, iterations=1, world_model_epochs=(3,), window=6,
                         dynamics_batch=4, vqvae_batch=5, vqvae_lr=1e-5, dynamics_lr=1e-3,
                         dynamics_lr_end=5e-4, reward_lr=4e-3, teacher=0.5, context=2,
                         foreground=30)
    said, windows = [], models.windows
    names = {"vqvae": models.vqvae_update, "dynamics": models.world_model_update}

    def noted(name):
        def update(*arguments):
            rates = [group["lr"] for group in models.optimizers[name].param_groups]
            said.append((name, rates, arguments, models.vqvae.training))
            return names[name](*arguments)
        return update

    rows = []
    monkeypatch.setattr(models, "vqvae_update", noted("vqvae"))
    monkeypatch.setattr(models, "world_model_update", noted("dynamics"))
    monkeypatch.setattr(models, "windows", lambda b, r, c: rows.append(r) or windows(b, r, c))
    monkeypatch.setattr(evaluate, "world_model_picture", lambda run: 0.5)
    run = a_run("world_model", models=models, buffer=noise(121))
    assert train.learn_world_model(run)["foreground_error"] == 0.5
    total = train.work(models.config, 0)["world_model"]
    dynamics = [s for s in said if s[0] == "dynamics"]
    assert len(dynamics) == total == 3 * 4
    # In steps 3, 6, 9 .., before the dynamics', at its own low rate, on five observations.
    assert [i for i, s in enumerate(said) if s[0] == "vqvae"] == [2, 6, 10, 14]
    assert all(s[1] == [1e-5] and s[2][0].shape == (5, 4, 96, 96) and s[2][1] == 3
               for s in said if s[0] == "vqvae")                     # a tenth of the foreground
    assert not any(s[3] for s in said) and not models.vqvae.training
    done = np.arange(total) / total
    assert np.allclose([s[1] for s in dynamics],
                       np.stack([1e-3 - 5e-4 * done, 4e-3 - 2e-3 * done], 1))
    assert [s[2][-1] for s in dynamics] == [6] * 6 + [2] * 6        # true inputs in the first half
    epochs = np.array(rows).reshape(3, -1)
    assert all(len(set(epoch)) == 4 * 4 * 6 for epoch in epochs)     # each row once a pass
    assert all(set(epochs[a]) != set(epochs[b]) or (epochs[a] != epochs[b]).any()
               for a, b in ((0, 1), (1, 2)))


def test_the_vqvae_stands_still_after_its_share_of_a_round(monkeypatch):
    """train.py, vqvae_share: from then on the dynamics gets codes instead of observations. Until
    then the VQ-VAE's are drawn from all experience, others each time."""
    models, said = tiny_models(first_interactions=121, iterations=1, world_model_epochs=(3,),
                               window=6, dynamics_batch=4, vqvae_every=1, vqvae_share=0.5), []
    for name in ("vqvae_update", "world_model_update"):
        monkeypatch.setattr(models, name, lambda x, *_: said.append(x.ndim)
                            or {"code_loss": torch.zeros(())})
    monkeypatch.setattr(evaluate, "world_model_picture", lambda run: 0.5)
    observations, rows = models.observations, []
    monkeypatch.setattr(models, "observations", lambda b, r: rows.append(r) or observations(b, r))
    train.learn_world_model(a_run("world_model", models=models, buffer=noise(121)))
    drawn = np.array([r for r in rows if len(r) == models.config.vqvae_batch])
    assert drawn.shape == (6, 40) and drawn.min() < 10 and drawn.max() > 110
    assert len({tuple(r) for r in drawn}) == 6
    assert said == [4, 5] * 6 + [4] * 6        # a VQ-VAE's batch has four dimensions, so have codes


def test_the_policy_dreams_from_anywhere_and_knows_the_codes_of_today(monkeypatch):
    """Section 3.4, "randomly selecting the initial observation": of all rounds, others each time;
    where the VQ-VAE stands still its codes are computed once a round, after it has moved."""
    models = tiny_models(dreams=40, ppo_updates=(5,) * 15, vqvae_share=0.5)
    buffer, rows = noise(300), []
    monkeypatch.setattr(models, "starts", lambda b, r, codes: rows.append((r, codes)) or ())
    monkeypatch.setattr(models, "policy_update", lambda: {"entropy": torch.zeros(())})
    run = a_run("policy", 1, models, buffer)
    train.learn_policy(run)
    drawn = np.array([r for r, _ in rows])
    assert drawn.shape == (5, 40) and drawn.min() < 20 and drawn.max() > 280
    assert len({tuple(r) for r in drawn}) == 5
    assert all(torch.equal(codes, models.encode_all(buffer)) for _, codes in rows)
    with torch.no_grad():                                            # the VQ-VAE moves on
        models.vqvae.codebook.codes.copy_(models.vqvae.codebook.codes.flip(0))
    monkeypatch.setattr(evaluate, "world_model_picture", lambda run: 0.5)
    run.stage, run.config.scale = "world_model", 1e-9                # a round without updates
    train.learn_world_model(run)
    run.stage, run.config.scale, run.update = "policy", 1.0, 0
    train.learn_policy(run)
    assert torch.equal(rows[-1][1], models.encode_all(buffer))
    assert not torch.equal(rows[-1][1], rows[0][1])


def test_the_temperature_of_dreams_is_not_the_policys():
    """Eq. 6 and 8: warmer codes, the same policy; and `act` draws at the temperature it is told."""
    torch.manual_seed(0)
    models, x = tiny_models(), np.zeros((200, 4, 96, 96), np.uint8)
    with torch.no_grad():
        models.policy.actor.bias[1] = 8.0                            # p = 0.99 and more
    rollout = dream(models.dynamics, models.embed, models.policy,
                    torch.randint(128, (50, 6, 6)), 4, 1e6)
    assert (rollout["actions"] == 1).float().mean() > 0.9
    with models.acting():
        shares = [np.mean(models.act(x, t)[0] == 1) for t in (0.1, 1.0, 1e6)]
    assert shares[0] == 1 and shares[1] > 0.9 and shares[2] < 0.7


def test_evaluation_is_the_game_as_it_is(monkeypatch):
    """Section 4: whole episodes, unclipped, at temperature 1, on a stack that moves along; nothing
    is learned, and training's random numbers go on as if it had not been."""
    monkeypatch.setattr(evaluate, "AtariEnv", World)
    run = a_run("evaluate", 14, Eyes(), iterations=15, final_episodes=11)
    torch.manual_seed(3)
    expected = torch.get_rng_state()
    figures = train.evaluate(run)
    assert torch.equal(torch.get_rng_state(), expected)
    assert run.returns == [35.0] * 11 and figures["real_return"] == 35
    assert set(run.models.temperatures) == {1.0}
    assert [seen.shape[0] for seen in run.models.seen] == [8] * 5 + [3] * 5  # eight side by side
    assert [seen[0].tolist() for seen in run.models.seen[:5]] == [
        [0] * 4, [0, 0, 0, 1], [0, 0, 1, 2], [0, 1, 2, 3], [1, 2, 3, 4]]


def test_the_loop_is_the_papers(monkeypatch):
    """Section 3.4: 15 rounds of collect, world model, policy; the warm-up in the first alone. A run
    that stood before any stage goes on with just that one."""
    done = []
    for name in ("collect", "warm_up", "learn_world_model", "learn_policy", "evaluate"):
        def stage(run, name=name):
            done.append((run.iteration, run.stage, name.removeprefix("learn_")))
            run.add_time(0)
        stage.__name__ = name
        monkeypatch.setattr(train, name, stage)
    monkeypatch.setattr(evaluate, "report", lambda run: None)
    whole = [(i, s, s) for i in range(15) for s in train.STAGES if s != "warm_up" or i == 0]
    for i, (iteration, stage, _) in enumerate(whole):
        done.clear()
        run = a_run(stage, iteration, buffer=[])
        run.rows = [{} for _ in range(iteration)]
        train.train(run)
        assert done == whole[i:]


def test_random_actions_of_round_1_are_uniform_or_prefer_some_for_a_while():
    """Section 3.4, "random policy"; with random_segment the odds are uneven and change."""
    def shares(**settings):
        actions = collected_actions(0, 3000, 3, **settings).reshape(30, 100, 1)
        return (actions == np.arange(3)).mean(1)                                 # [30, 3]

    uniform, uneven = shares(), shares(random_segment=100)
    assert uniform.max() < 0.55 and np.allclose(uniform.mean(0), 1 / 3, atol=0.04)
    assert np.median(uneven.max(1)) > 0.6 and set(uneven.argmax(1)) == {0, 1, 2}


def test_exploring_holds_random_actions():
    """--explore: 2, 4, 8 or 16 steps each; the policy's state follows what was done."""
    chosen = []

    def act(observations, temperature, state, instead):
        chosen.append(instead is None)
        return (np.array([200]) if instead is None else instead), state

    def actions(explore, steps=20_000):
        return collected_actions(1, steps, 200, act, explore=explore)

    assert (actions(0.0, 500) == 200).all() and all(chosen)
    chosen.clear()
    taken, own = actions(0.05), np.array(chosen)
    assert (taken[own] == 200).all()
    # Of 200 actions hardly ever the same one twice in a row: what stays the same is one hold.
    changes = np.flatnonzero(np.diff(taken, prepend=-1) != 0)
    lengths, held = np.diff(np.append(changes, len(taken))), ~own[changes]
    shares = [(lengths[held][:-1] == n).mean() for n in (2, 4, 8, 16)]           # the last is cut
    assert sum(shares) > 0.99 and shares == pytest.approx([0.25] * 4, abs=0.05)
    assert held.sum() / own.sum() == pytest.approx(0.05, rel=0.2)    # of the chances it had
    assert 80 < taken[changes[held]].mean() < 120                                # uniform

    models, x = tiny_models(policy_memory=True), np.zeros((1, 4, 96, 96), np.uint8)
    taken, state = models.act(x, 1.0, None, np.array([2]))
    z = models.vqvae.embed(models.vqvae.encode(torch.from_numpy(x)))
    with torch.no_grad():
        expected = models.dynamics(z, torch.tensor([2]), models.dynamics.initial_state(1))[2]
    assert taken.tolist() == [2]
    torch.testing.assert_close(state[1][0], expected[1][0])


def test_the_vqvae_learns_only_in_its_own_updates():
    """Section 3.4, "Fixed Representation Learning": each update moves its own network alone."""
    torch.manual_seed(0)
    models, windows = tiny_models(), tiny_windows()
    codes = models.vqvae.encode(windows[0][0])
    assert moved(models, lambda: models.vqvae_update(windows[0][0])) == {"vqvae"}
    assert moved(models, lambda: models.world_model_update(*windows, 4)) == {"dynamics"}
    assert moved(models, lambda: models.policy_update(codes)) == {"policy"}


def test_codes_computed_once_are_those_of_each_update():
    """train.py, vqvae_share: where the VQ-VAE stands still, nothing but the work changes."""
    models, buffer = tiny_models(bf16=False), noise(300)
    rows = np.arange(12).reshape(2, 6) + 100
    codes = models.encode_all(buffer)
    assert codes.shape == (300, 6, 6) and codes.dtype == torch.uint8
    start, parts = copy.deepcopy(models.dynamics.state_dict()), []
    for given in (None, codes):
        models.dynamics.load_state_dict(start)
        torch.manual_seed(0)
        parts.append(models.world_model_update(*models.windows(buffer, rows, given), 2))
    assert set(parts[0]) == set(parts[1]) and len(parts[0]) > 4
    for name in ("code_loss", "reward_loss", "code_accuracy"):
        torch.testing.assert_close(parts[0][name], parts[1][name])


def test_the_scaled_reward_loss_still_trains_its_head():
    """Section 3.4, "Reward Loss": weight 1e-6, and Adam undoes it for the head."""
    torch.manual_seed(0)
    models, (x, actions, rewards, ends, over) = tiny_models(), tiny_windows()
    head = models.dynamics.reward_head.linear2.bias
    before = head.detach().clone()
    models.world_model_update(x, actions, rewards + 1, ends, over, 4)
    # Adam's first step is the learning rate, whatever the gradient's scale.
    torch.testing.assert_close(head - before, torch.tensor([-1e-3, -1e-3, 1e-3]), rtol=1e-2, atol=0)


def test_a_dream_remembers_the_steps_before_it(monkeypatch):
    """train.py, starts: the real steps of the same episode, one after the other; no others."""
    models, buffer = certain_models(dream_context=3), ExperienceBuffer(12)
    rng = np.random.default_rng(0)
    buffer.add(rng.integers(256, size=(12, 96, 96), dtype=np.uint8), rng.integers(M, size=12), 0.0,
               np.arange(12) == 4, np.arange(12) == 11)
    rows = np.array([0, 2, 4, 5, 6, 8, 11])
    known = models.encode_all(buffer)
    codes, state = models.starts(buffer, rows, known)
    assert torch.equal(codes, known[torch.from_numpy(rows)].long())
    for i, (row, begun) in enumerate(zip(rows, [0, 0, 0, 5, 5, 5, 5])):
        own = models.dynamics.initial_state(1)
        for t in range(max(row - 3, begun), row):
            with torch.no_grad():
                z = models.vqvae.embed(known[t:t + 1].long())
                own = models.dynamics(z, torch.tensor([buffer.actions[t]]).long(), own)[2]
        for mine, theirs in zip(state, own):
            torch.testing.assert_close([part[i] for part in mine], [part[0] for part in theirs])
    seen = []
    monkeypatch.setattr(train, "dream", lambda *a, **k: seen.append((a, k)) or dream(*a, **k))
    models.policy_update(codes, state)
    assert seen[0][1]["start_state"] is state
    paper = tiny_models().starts(buffer, rows, known)[1]             # remembers nothing
    assert not any(part.any() for cell in paper for part in cell)


def test_flags_reach_the_dream(monkeypatch):
    """--temperature flattens the codes of training dreams, and only those; hyphens are fine too."""
    given = vars(train.parse(["--temperature", "50", "--dream-steps=7", "--gamma=0.5"]))
    config = train.settings_from({"preset": "smoke"} | {
        name: given[name] for name in ("temperature", "dream_steps", "gamma")})
    assert (config.temperature, config.dream_steps, config.gamma) == (50, 7, 0.5)
    with pytest.raises(train.UserError, match="--temperature must be more than 0"):
        train.check(dataclasses.replace(config, temperature=0.0))
    with pytest.raises(train.UserError, match="--teacher must be from 0 to 1, not 2"):
        train.check(dataclasses.replace(config, teacher=2.0))

    def given_codes(update, **settings):
        models, seen = certain_models(**settings), []
        embed = models.embed
        models.embed = lambda codes: (seen.append(codes), embed(codes))[1]
        torch.manual_seed(3)
        update(models)
        return torch.stack(seen[:4])           # [T, B, 6, 6]

    def dreamed(models):
        models.policy_update(models.vqvae.encode(tiny_windows()[0][0]))

    def read(models):
        models.world_model_update(*tiny_windows(), 2)

    # What is dreamed, and what is read after the context, here 2.
    for update, real in ((dreamed, 1), (read, 2)):
        cold, hot = given_codes(update), given_codes(update, temperature=1e9)
        assert torch.equal(cold[:real], hot[:real])
        assert (cold[real] != hot[real]).float().mean() > 0.9

    seen = []
    monkeypatch.setattr(train, "dream", lambda *a, **k: seen.append(dream(*a, **k)) or seen[-1])
    models = tiny_models()
    parts = models.policy_update(models.vqvae.encode(tiny_windows()[0][0]))
    assert torch.equal(parts["dream_return"], seen[-1]["rewards"].sum(0).mean())
    assert seen[0]["rewards"].any() and not (seen[0]["rewards"] % 1).any()


def test_policy_memory_is_h_of_the_second_cell(monkeypatch):
    """Eq. 5, Table 1's second form: the policy sees h_{t-1}, in dreams and in real play alike."""
    assert not train.Config().policy_memory
    given = vars(train.parse(["--policy-memory"]))
    assert given["policy_memory"] is True
    models = certain_models(policy_memory=True)
    dynamics, embed, policy = models.dynamics, models.vqvae.embed, models.policy
    assert policy.trunk[0].in_channels == 32 + 8

    # In the dream: the h before each step, zero at first; what was seen is what PPO learns from.
    batch = dream(dynamics, embed, policy, torch.randint(128, (3, 6, 6)), steps=5, memory=True)
    state = dynamics.initial_state(3)
    for t in range(5):
        z = embed(batch["codes"][t])
        assert torch.equal(batch["memory"][t], state[1][0])
        with torch.no_grad():
            logits, values = policy(torch.cat([z, state[1][0]], 1))
            state = dynamics(z, batch["actions"][t], state)[2]
        assert torch.equal(values, batch["values"][t])
        chosen = logits.log_softmax(1).gather(1, batch["actions"][t][:, None])[:, 0]
        assert torch.equal(chosen, batch["log_probs"][t])
    assert state[1][0].abs().max() > 0
    seen = []
    monkeypatch.setattr(train, "ppo_update", lambda *a, **k: seen.append(a) or {})
    monkeypatch.setattr(train, "dream", lambda *a, **k: seen.append(dream(*a, **k)) or seen[-1])
    models.policy_update(models.vqvae.encode(tiny_windows()[0][0]))
    expected = torch.cat([torch.stack([embed(z) for z in seen[0]["codes"]]), seen[0]["memory"]], 2)
    assert torch.equal(seen[1][2], expected)

    # In the game: three episodes side by side, the middle one ends first.
    x = np.random.default_rng(0).integers(0, 256, (4, 3, 4, 96, 96), np.uint8)
    torch.manual_seed(0)
    state, own = None, [dynamics.initial_state(1) for _ in range(3)]
    playing = [0, 1, 2]
    for t in range(4):
        actions, state = models.act(x[t, playing], 1.0, state)
        for i, (episode, action) in enumerate(zip(playing, actions)):
            with torch.no_grad():
                z = embed(models.vqvae.encode(torch.from_numpy(x[t, episode:episode + 1])))
                own[episode] = dynamics(z, torch.tensor([action]), own[episode])[2]
            for cell in range(2):
                for mine, theirs in zip(state[cell], own[episode][cell]):
                    torch.testing.assert_close(mine[i], theirs[0])
        if t == 1:
            playing = [0, 2]
            state = evaluate.still_playing(state, np.array([True, False, True]))
    with torch.no_grad():                      # a policy that acts on nothing but its memory
        policy.trunk[0].weight[:, :32] = 0
        torch.nn.init.normal_(policy.actor.weight)
        logits = [policy(torch.cat([z, h], 1))[0] for h in (torch.zeros(1, 8, 6, 6), own[0][1][0])]
    assert not torch.allclose(*logits)


def test_memory_lasts_as_long_as_an_episode(monkeypatch):
    """The state that `act` returned comes back with the next observation of the same episode."""
    class Env(World):
        """Frames show the episode's seed and step; an episode lasts seed steps."""

        pays = 1.0

        def __init__(self, game, seed):
            super().__init__()
            self.seed = self.lasts = seed

        def frame(self):
            return np.array([[self.seed, self.t]], np.uint8)

    class Watcher(Eyes):
        steps = 0

        def act(self, observations, temperature, state=None, instead=None):
            seeds, steps = torch.from_numpy(observations[:, -1, 0].astype(np.int64)).T
            if state is None:
                assert (steps == 0).all()
            else:
                for h, c in state:
                    assert torch.equal(h, seeds) and torch.equal(c, steps)
            self.steps += len(seeds)
            return np.zeros(len(seeds), np.int64), [(seeds, steps + 1), (seeds, steps + 1)]

    monkeypatch.setattr(evaluate, "AtariEnv", Env)
    watcher = Watcher()
    assert evaluate.play_episodes(watcher, "Any", [3, 1, 4, 2], 1.0) == [3, 1, 4, 2]
    assert watcher.steps == 10
    monkeypatch.setattr(evaluate, "ExperienceBuffer", lambda n: types.SimpleNamespace(
        add=lambda frames, *_: steps.append(len(frames))))
    steps = []
    evaluate.record(Watcher(), "Any", [3, 1, 4, 2], 1.0, most=3)
    assert steps == [3, 1, 3, 2]

    # Collecting: one environment, episode after episode.
    buffer = ExperienceBuffer(11)
    buffer.frames = np.zeros((11, 1, 2), np.uint8)
    run = a_run("collect", 1, Watcher(), buffer, Env("Any", 4), interactions=11)
    assert train.collect(run)["collect_episodes"] == 2 and run.models.steps == 11


def test_predicted_ends_reach_everything(monkeypatch):
    """--predict-ends: the head learns, also what ends with a life, PPO looks past the dream's last
    step, the metrics say how reliable the ends are."""
    torch.manual_seed(0)
    models = tiny_models(predict_ends=True, reward_lr=0.01, dynamics_batch=1, window=6,
                         first_interactions=12)
    x, actions, rewards, ends, over = tiny_windows()
    ends[1, 2] = over[1, 2] = True
    head = models.dynamics.end_head.conv.weight
    before = head.detach().clone()
    models.world_model_update(x, actions, rewards, ends, over, 4)
    moved = (head - before).abs().max().item()
    assert moved == pytest.approx(0.01, rel=0.1)                     # Adam undoes the 1e-6
    seen = []
    monkeypatch.setattr(train, "ppo_update", lambda *a, **k: seen.append(a) or {})
    monkeypatch.setattr(train, "dream", lambda *a, **k: seen.append(dream(*a, **k)) or seen[-1])
    models.policy_update(models.vqvae.encode(x[0]))
    assert torch.equal(seen[1][4], seen[0]["last_value"]) and seen[0]["last_value"].any()

    counts = iter([(1, 2, 4), (0, 3, 0), (2, 3, 6)])     # right, predicted, true, of 10 each

    def update(x, actions, rewards, ends, over, context):
        assert torch.equal(over, lost.view(2, 6)) and torch.equal(ends, ended.view(2, 6))
        return {name: torch.tensor(n / 10) for name, n in zip(
            ("end_right", "end_predicted", "end_true"), next(counts))}

    buffer, terminated = ExperienceBuffer(12), torch.arange(12) % 5 == 3
    lost, ended = terminated.clone(), terminated.clone()
    lost[7] = ended[11] = True                       # a life; the recording
    buffer.add(np.zeros((12, 96, 96), np.uint8), np.zeros(12), np.zeros(12), terminated.numpy(),
               np.arange(12) == 11, np.arange(12) == 7)
    monkeypatch.setattr(models, "world_model_update", update)
    monkeypatch.setattr(evaluate, "world_model_picture", lambda run: 0.5)
    monkeypatch.setattr(buffer, "epoch", lambda *_: np.arange(12).reshape(1, 2, 6))
    models.config.vqvae_every = 10
    run = a_run("world_model", models=models, buffer=buffer)
    run.updates = lambda total: (0, total // 2, total)
    monkeypatch.setattr(train, "batches_per_epoch", lambda *_: 1)
    monkeypatch.setattr(train, "work", lambda *_: {"world_model": 8})
    figures = train.learn_world_model(run)
    assert figures["end_precision"] == pytest.approx(3 / 8)
    assert figures["end_recall"] == pytest.approx(3 / 10)
    assert {"end_loss", "end_precision", "end_recall"} <= set(train.METRICS)


def test_lost_lives_are_noted(monkeypatch):
    """--predict-ends: row t says whether a life was lost with a_t, also when read from disk."""
    run, _ = collected(AtariEnv("Breakout"), 0, 300, random_segment=20)
    replay, lives = AtariEnv("Breakout"), []
    replay.reset(seed=int(np.random.default_rng([0, 0, 0]).integers(2**31)))
    for action, terminated in zip(run.buffer.actions[:300], run.buffer.terminated):
        before = replay.ale.ale.lives()
        replay.step(action)
        lives.append(before - replay.ale.ale.lives())
        if terminated:
            assert replay.ale.ale.game_over() and lives[-1] == 1
            replay.reset()
    assert sum(lives) > 5 and run.buffer.terminated.any()
    assert np.array_equal(run.buffer.lost[:300], np.array(lives) == 1)
    restored = ExperienceBuffer(300)
    restored.add_bytes(run.buffer.to_bytes(0, 300))
    for name in restored.COLUMNS:
        assert np.array_equal(getattr(restored, name), getattr(run.buffer, name)[:300]), name
    own = {name: getattr(restored, name) for name in restored.COLUMNS}
    bombs = [written(np.savez, **own | more) for more in (
        {"more": np.zeros(1000)}, {"frames": own["frames"][[0] * 301]})]
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *_, **__: pytest.fail("unpacked"))
    for bomb in bombs:
        with pytest.raises(ValueError, match="no experience of such a run"):
            ExperienceBuffer(300).add_bytes(bomb)
    monkeypatch.undo()
    for foreign in (b"", b"no archive", run.buffer.to_bytes(0, 300)[:-1],
                    written(np.savez, frames=np.zeros(3)), written(np.save, np.zeros(3)),
                    written(np.savez, **{n: np.zeros(3) for n in restored.COLUMNS}),
                    written(np.savez, **own | {"frames": own["frames"][:, :1, :1]}),
                    written(np.savez, **own | {"rewards": own["rewards"] * np.nan})):
        with pytest.raises(ValueError, match="no experience of such a run"):
            ExperienceBuffer(300).add_bytes(foreign)


def test_with_bfloat16_each_gradient_step_sees_the_one_before():
    """train.py, policy_update: autocast must not go on with copies of old weights."""
    torch.manual_seed(0)
    models = tiny_models(policy_lr=1e-2, ppo_epochs=2, dream_steps=10)
    models.use_bf16 = True                     # slow where the processor can't, but the same
    parts = models.policy_update(models.vqvae.encode(tiny_windows()[0][0]))
    # The probability ratios leave 1 as soon as the weights have moved.
    assert parts["approx_kl"] > 1e-5


def test_acting_below_the_papers_width_uses_one_thread_and_gives_the_others_back():
    """train.py, Models.acting: also where the playing is broken off."""
    models = tiny_models()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyError), models.acting():
            assert torch.get_num_threads() == 1
            raise KeyError
        assert torch.get_num_threads() == 2
        models.config = dataclasses.replace(models.config, vqvae_width=1.0)
        with models.acting():
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_no_update_waits_for_the_device():
    """Ready for CUDA: all updates run on `meta`, where any look at a value is an error."""
    models, windows = tiny_models("meta"), tiny_windows("meta")
    more = tiny_models("meta", policy_memory=True, predict_ends=True)
    x = windows[0][0]
    run = types.SimpleNamespace(sums={}, first_bad=torch.full((), -1, device="meta"))
    for parts in (models.vqvae_update(x), models.vqvae_update(x, models.scalar(40.0)),
                  models.world_model_update(*windows, 4),
                  models.policy_update(models.vqvae.encode(x)),
                  more.world_model_update(*windows, 4),
                  more.policy_update(more.vqvae.encode(x))):
        assert all(v.device.type == "meta" and v.shape == () for v in parts.values())
        train.Run.add(run, parts, 0)           # the averages of the stage
    with pytest.raises(RuntimeError):          # the check itself: a copy to the host is an error
        parts["entropy"].item()


def test_compiled_updates_are_single_graphs_and_the_same(monkeypatch):
    """--compile: dynamics update and dream step as one graph each, with the same results; traced
    here by torch's own tracer, without the compiler behind it."""
    real, graphs = torch.compile, []

    def traced(function, fullgraph, dynamic):
        assert fullgraph and not dynamic
        return real(function, fullgraph=True, dynamic=False, backend=lambda graph, inputs:
                    graphs.append(graph) or aot_eager(graph, inputs))

    monkeypatch.setattr(torch, "compile", traced)
    torch._dynamo.reset()
    results = []
    for compile in (False, True):
        torch.manual_seed(0)
        models, windows = tiny_models(compile=compile, dream_steps=3), tiny_windows(L=3)
        windows[3][0, 0] = True
        results.append([models.world_model_update(*windows, 1) for _ in range(2)]
                       + [models.policy_update(models.vqvae.encode(windows[0][0])),
                          models.dynamics.state_dict(), models.policy.state_dict(),
                          torch.get_rng_state()])
    assert len(graphs) == 2                                          # one each, used three times
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6, equal_nan=True)
    monkeypatch.undo()
    monkeypatch.setattr(torch, "compile", lambda function: (lambda x: 1 / 0))
    assert_main_refuses("--compile needs a C++ compiler", train.main, "--compile", "true")


def updates_of_all_stages(device="cpu", graphs=False):
    """Updates with other rates, weights and a background each time
    -> (what they say, all weights after them, how many graphs there are of each function)."""
    torch.manual_seed(0)
    models = tiny_models(device, predict_ends=True, policy_memory=True)
    models.graphs, state, said = graphs, None, []
    for i in range(5):
        torch.manual_seed(i)
        windows = [w.to(device) for w in tiny_windows()]
        x, fresh, buffer = windows[0][0], models.dynamics.initial_state(6), noise(40 + i)
        buffer.frames[:40:1 + i] = 0
        models.find_background(buffer)
        for name, rates in (("vqvae", [1e-3 / (i + 1)]), ("dynamics", [1e-3 / (i + 1), 1e-3 * i]),
                            ("policy", [1e-4 * i])):
            models.set_rates(name, *rates)
        said += [models.vqvae_update(x, models.scalar(40.0 / (i + 1))),
                 models.world_model_update(*windows, 6 if i < 3 else 2),
                 models.policy_update(models.vqvae.encode(x), fresh)]
        with models.acting():
            actions, state = models.act(x.cpu().numpy(), 1.5, state)
        said.append({"actions": torch.from_numpy(actions)})
    return (said, {name: m.state_dict() for name, m in models.networks().items()},
            {name: len(replayed.graphs) for name, replayed in models.recorded.items()})


def test_replayed_updates_depend_on_their_arguments_alone(monkeypatch):
    """What Replayed asks of updates, without a GPU: here a "replay" calls the function once more,
    on the tensors that came first, into which the new ones are copied. A rate or weight that is
    handed over as a number would be one more graph in each call."""
    def pretend(self, *arguments):
        given, structure = tree_flatten(arguments)
        key = str(structure), *(a.shape if isinstance(a, torch.Tensor) else a for a in given)
        inputs = self.graphs.setdefault(key, tree_map_only(torch.Tensor, torch.clone, arguments))
        for old, new in zip(tree_flatten(inputs)[0], given):
            if isinstance(new, torch.Tensor):
                old.copy_(new)
        return tree_map_only(torch.Tensor, torch.clone, self.function(*inputs))

    *expected, graphs = updates_of_all_stages()
    assert not graphs
    monkeypatch.setattr(train.Replayed, "__call__", pretend)
    *outcome, graphs = updates_of_all_stages(graphs=True)
    torch.testing.assert_close(outcome, expected, rtol=0, atol=0, equal_nan=True)
    # World model: two contexts. Playing: the first step has no state yet.
    assert graphs == {"vqvae_update": 1, "world_model_update": 2, "policy_update": 1, "choose": 2}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA_VISIBLE_DEVICES=0 and a GPU")
def test_recorded_updates_are_the_same_on_cuda():
    """CUDA graphs beside the same updates, launched kernel by kernel. Not bit for bit: sums of
    atomic additions differ from call to call, and one different code is another dream."""
    plain, graphs = updates_of_all_stages("cuda"), updates_of_all_stages("cuda", True)
    for one, other in zip(plain[0], graphs[0]):
        for name in one.keys() & {"elbo", "commitment", "value_loss", "entropy", "end_loss"}:
            torch.testing.assert_close(other[name], one[name], rtol=0.02, atol=1e-3)
    for i in (1, 5, 9):                                     # all inputs true: nothing is drawn
        torch.testing.assert_close(graphs[0][i]["code_loss"], plain[0][i]["code_loss"],
                                   rtol=0.01, atol=0)
    assert not plain[2] and graphs[2]["world_model_update"] == 2


def test_evaluation_plays_whole_real_games(capsys):
    """Section 4 and Table 4: unclipped scores; the random policy's -20.7 in Pong."""
    evaluate.main(["--random", "--game", "Pong", "--episodes", "3", "--json"])
    result, = json.loads(capsys.readouterr().out)
    assert result["episodes"] == len(result["returns"]) == 3
    assert all(-21 <= score <= -17 and score == int(score) for score in result["returns"])
    assert result["mean"] == pytest.approx(np.mean(result["returns"]))
    assert evaluate.human_normalised("Pong", -20.7) == 0
    assert evaluate.human_normalised("Pong", 14.6) == 1
    assert evaluate.human_normalised("Tennis", 3) is None
    assert [evaluate.figure(x, 3) for x in (-2e-4, -2e-3, None)] == ["0.000", "-0.002", "-"]
    lines = evaluate.describe("Freeway", [20., 30.])
    assert "mean 25.0" in lines and "std 5.0" in lines and "24.6" in lines


# ----------------------------------------------------------------------------------------------
# The real command line
# ----------------------------------------------------------------------------------------------


def command(*arguments):
    """Runs python with these arguments -> exit status, stdout, lines of stderr."""
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=HERE, capture_output=True,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return done.returncode, done.stdout, without_the_emulators(done.stderr)


def without_the_emulators(stderr):
    """Its lines, but for those with which the emulator introduces itself."""
    return [line for line in stderr.splitlines() if not line.startswith(("A.L.E", "[Power"))]


def forked(work):
    """Calls work() in a child process -> exit status, negative for a signal; stdout; lines of
    stderr. The child is this process once more, which has imported torch: that takes seconds."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        def child():
            for number, name, file in ((1, "stdout", out), (2, "stderr", err)):
                os.dup2(file.fileno(), number)
                setattr(sys, name, os.fdopen(number, "w", buffering=1))
            work()
        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join()
        out.seek(0), err.seek(0)
        return process.exitcode, out.read(), without_the_emulators(err.read())


def assert_refused(saying, main, *arguments):
    """As a command it fails with exactly one line, which says this."""
    status, _, lines = forked(lambda: main([*map(str, arguments)]))
    assert status == 1
    assert len(lines) == 1 and lines[0].startswith("error: ") and saying in lines[0], lines


def assert_main_refuses(saying, main, *arguments):
    """The same in this process: sys.exit(text) prints text, exit status 1."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    line = stop.value.code
    assert isinstance(line, str) and line.startswith("error: ") and "\n" not in line, line
    assert saying in line, line


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The folder of a run of the smoke preset, with a shorter warm-up: every stage, on Breakout,
    whose episodes are the shortest."""
    out = tmp_path_factory.mktemp("runs")
    status, stdout, lines = command("train.py", "--game", "Breakout", "--preset", "smoke",
                                    "--warmup_epochs", 1, "--out", out)
    assert status == 0, lines
    assert "600 interactions (2,400 frames)" in stdout and "done: python evaluate.py" in stdout
    return out / "Breakout-smoke-s0"


def test_smoke_preset_leaves_what_is_promised(smoke):
    """Section 3.4 from end to end, twice around, and the run folder as the README draws it."""
    config = json.loads((smoke / "config.json").read_text())
    assert (config["game"], config["preset"], config["seed"]) == ("Breakout", "smoke", 0)
    with open(smoke / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(train.METRICS)
    assert [r["iteration"] for r in rows] == ["1", "2"]
    assert [r["interactions"] for r in rows] == ["400", "600"]
    for name in ("elbo", "perplexity", "code_loss", "code_accuracy", "dream_return", "entropy",
                 "foreground_error", "real_return"):
        assert all(math.isfinite(float(r[name])) for r in rows), name
    first, second = (float(row["code_loss"]) for row in rows)
    assert second < min(first, math.log(128))                                    # it learns
    with open(smoke / "times.csv") as file:
        times = list(csv.DictReader(file))
    assert list(times[0]) == ["iteration", *train.STAGES, "peak_mb"]
    assert float(times[0]["warm_up"]) > 0 and float(times[1]["warm_up"]) == 0
    state = torch.load(smoke / "checkpoint.pt", weights_only=True)
    assert set(state["networks"]) == {"vqvae", "dynamics", "policy"}
    result = json.loads((smoke / "evaluation.json").read_text())
    assert result["game"] == "Breakout" and result["episodes"] == len(result["returns"]) == 1
    for name in ("progress.png", "world_model_01.png", "world_model_02.png"):
        assert (smoke / name).read_bytes().startswith(b"\x89PNG")


def test_a_run_is_never_overwritten(smoke):
    """A second start on the same folder stops, and says how to go on."""
    before = {p.name: p.stat().st_mtime_ns for p in smoke.iterdir()}
    assert_refused(f"--resume {smoke}", train.main, "--game", "Breakout", "--preset", "smoke",
                   "--out", smoke.parent)
    assert {p.name: p.stat().st_mtime_ns for p in smoke.iterdir()} == before


def test_evaluate_plays_a_run(smoke):
    """Evaluate.py prints the scores, the protocol and the paper's row for the game."""
    status, stdout, lines = forked(lambda: evaluate.main([str(smoke), "--episodes", "1"]))
    assert status == 0, lines
    for said in ("after 600 real interactions", "sampled actions", "no sticky actions", "unclipped",
                 "over 1 episodes", "human-normalised", "paper mean 8.8"):
        assert said in stdout, said


def test_clear_words_for_an_unknown_game_or_device(tmp_path):
    """One clear line, exit status not 0, and no folder left behind."""
    start = ("--preset", "smoke", "--out", tmp_path / "runs")
    assert_refused("the nearest names: Pong", train.main, *start, "--game", "Pogn")
    for device in ("banana", "meta", *["cuda"] * (not torch.cuda.is_available())):
        assert_refused(f"device '{device}' is not available here; use --device cpu", train.main,
                       *start, "--device", device)
    assert_main_refuses("names: Pong", evaluate.main, "--random", "--game", "Pogn")
    assert not (tmp_path / "runs").exists()


def test_the_command_for_going_on_works_when_pasted(monkeypatch, tmp_path):
    """Blanks, quotes, dollars; letters, or bytes, that the terminal's encoding lacks."""
    names = ("my runs/x", "it's", 'say "hi"', "a$HOME`id`", "runs/走る/Pong", "é\\n'\"", "€1",
             os.fsdecode(b"bad\xffbytes"))
    commands = []
    for encoding in ("ascii", "cp1252", "utf-8"):
        monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding))
        commands += map(train.again, names)
        "".join(commands[-len(names):]).encode(encoding)             # can be shown as it is
    words = "\n".join(line.removeprefix("python train.py --resume") for line in commands)
    said = subprocess.run(["bash"], input=os.fsencode(words.replace("\n", "\nprintf '%s\\0'").join(
        ["printf '%s\\0'", ""])), stdout=subprocess.PIPE).stdout
    assert said.split(b"\0")[:-1] == [os.fsencode(name) for name in 3 * names]


def test_lost_output_is_said_once_on_the_other_stream(monkeypatch, capsys):
    """Also if a stream was closed from the start, which Python shows as None."""
    def refuse(arguments):
        raise train.UserError("enough")

    monkeypatch.setattr(train, "start", refuse)
    for lost, other in (("stdout", "err"), ("stderr", "out")):
        with monkeypatch.context() as patch:
            patch.setattr(sys, lost, None)
            with pytest.raises(SystemExit, match="enough"):
                train.main([])
            for _ in range(2):
                train.say("a line", lost)
        said = getattr(capsys.readouterr(), other)
        assert said.startswith("warning: output is lost; the run goes on\n")
        assert said.count("warning") == 1
    for first in ("stdout", "stderr"):         # a terminal that went away: both are gone at once
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, open(os.devnull))         # takes nothing
        train.say("a line", first)
        assert sys.stdout is sys.stderr is None


def test_a_foreign_checkpoint_is_refused_and_its_code_not_run(tmp_path):
    """Checkpoints load with weights_only=True; anything else there is one clear line."""
    path, trap = tmp_path / "checkpoint.pt", tmp_path / "trap"

    def both_refuse(saying, folder=tmp_path):
        assert_main_refuses(saying, evaluate.main, folder, "--episodes", 1)
        assert_main_refuses(saying, train.main, "--resume", folder)

    both_refuse("there is no run folder", tmp_path / "nowhere")
    both_refuse("holds no checkpoint")
    path.write_bytes(np.random.default_rng(0).bytes(1000))
    both_refuse("is damaged or no checkpoint")
    for foreign in ({"model": torch.zeros(3)}, [1, 2], {"schema": train.SCHEMA, "networks": {}}):
        torch.save(foreign, path)
        both_refuse("checkpoint")
    # A pickle is a program. This one makes a folder, in place of something worse.
    bomb = type("Bomb", (), {"__reduce__": lambda self: (os.mkdir, (str(trap),))})()
    torch.save({"schema": train.SCHEMA, "networks": bomb}, path)
    assert_refused("is damaged or no checkpoint", evaluate.main, tmp_path, "--episodes", 1)
    assert_refused("is damaged or no checkpoint", train.main, "--resume", tmp_path)
    path.write_bytes(train.sealed({"schema": train.SCHEMA, "networks": bomb}))
    both_refuse("is no checkpoint of this version")
    assert not trap.exists()
    torch.load(path, weights_only=False)       # it was live
    assert trap.exists()


# ----------------------------------------------------------------------------------------------
# evaluate.py: judging many runs, seeing what one dreams
# ----------------------------------------------------------------------------------------------


def write_table(path, columns, rows):
    """A table as Run.write_tables writes it; a figure that a row does not have stays empty."""
    lines = [columns, *([f"{row[c]:.6g}" if c in row else "" for c in columns] for row in rows)]
    path.write_text("".join(",".join(line) + "\n" for line in lines))


def made_up_run(out, game, seed, scores, preset="small", rows=3, **changed):
    """A run folder with config.json, metrics.csv and, if there are scores, evaluation.json."""
    folder = out / f"{game}-{preset}-s{seed}-{len(changed)}"
    folder.mkdir(parents=True)
    settings = train.PRESETS[preset] | {"game": game, "preset": preset, "seed": seed} | changed
    settings |= {"out": str(out), "eval_episodes": seed}             # no reason not to be averaged
    config = dataclasses.asdict(train.Config(**settings))
    (folder / "config.json").write_text(json.dumps(config))
    write_table(folder / "metrics.csv", train.METRICS, [
        {"iteration": i + 1, "interactions": 100 * (i + 1), "real_return": 10. * seed + i,
         "real_episodes": 4} for i in range(rows)])
    if scores is not None:
        (folder / "evaluation.json").write_text(json.dumps(
            {"game": game, "preset": preset, "seed": seed, "interactions": 100 * rows,
             "episodes": len(scores), "returns": scores}))
    return folder


def judged(capsys, *arguments):
    """What evaluate.main prints."""
    capsys.readouterr()
    evaluate.main([str(a) for a in arguments])
    return capsys.readouterr().out


def drawn_by(monkeypatch):
    """-> a function that returns the matplotlib figure which was drawn last."""
    pages, plain = [], matplotlib.figure.Figure
    monkeypatch.setattr(matplotlib.figure, "Figure", lambda **settings: (
        pages.append(plain(**settings)), pages[-1])[1])
    return lambda: pages[-1]


def looks(lines):
    """How each is drawn, in black and white."""
    return [(line.get_linestyle(), line.get_linewidth(), line.get_marker(),
             str(line._dash_pattern)) for line in lines]


def test_costs_of_runs(tmp_path, capsys):
    """Sums of times.csv, shares of the stages, the highest peak; damage is told in one line."""
    run, bare = (made_up_run(tmp_path, "Pong", seed, [1.0]) for seed in (0, 1))
    seconds = [[10, 600, 900, 90, 20], [30, 0, 1800, 180, 40]]
    write_table(run / "times.csv", train.TIMES, [
        dict(zip(train.TIMES, (i + 1, *row, 900 - i))) for i, row in enumerate(seconds)])
    told = [re.split("  +", line) for line in judged(capsys, run, bare).splitlines()[-2:]]
    assert told == [["run", "h:mm:ss", "collect", "warm up", "world model", "policy", "evaluate",
                     "peak memory, MB"],
                    [run.name, "1:01:10", "1%", "16%", "74%", "7%", "2%", "900"]]
    (bare / "times.csv").write_text("iteration,collect\n1,2\n")
    assert_main_refuses("times.csv is damaged", evaluate.main, run, bare)


def test_markdown_tables(tmp_path, capsys):
    """--markdown: each run with its standard error, means over seeds, what differs, what it took;
    the two tables of results/README.md are just this output for the results that are kept."""
    for seed, scores in enumerate(([1.0, 3.0], [5.0, 5.0])):
        run = made_up_run(tmp_path, "Freeway", seed, scores)
    made_up_run(tmp_path, "Freeway", 2, [9.0], scale=0.5)
    made_up_run(tmp_path, "Pong", 0, None)
    write_table(run / "times.csv", train.TIMES, [
        dict(zip(train.TIMES, (1, 10, 30, 3000, 500, 60, 1234.5)))])
    chance = tmp_path / "random.json"
    chance.write_text(json.dumps([{"game": "Freeway", "mean": 0.25, "std": 0.5}]))
    scores, notes, costs = judged(capsys, *tmp_path.iterdir(), "--markdown").split("\n\n")
    published = "24.6 (3.4) | 20.3 (18.5) | 8.0 (9.8) |"
    assert scores.splitlines()[2:] == [
        # Standard error of 1, 3: deviation 1 / sqrt(2). Of the means 2 and 5: deviation 1.5.
        "| Freeway | small | 2.0 (0.7), 5.0 (0.0) | **3.5** (1.5) | 0.118 | 0.2 (0.5) | 0.0 | "
        + published,
        "| Freeway | small [1] | 9.0 (0.0) | **9.0** | 0.304 | 0.2 (0.5) | 0.0 | " + published,
        "| Pong | small | stopped early | - | - | - | -20.7 | 11.8 (6.9) | 5.2 (9.7) "
        "| -20.5 (0.6) |"]
    assert notes.strip() == "[1] small with `scale=0.5`"
    assert costs.splitlines()[2:] == [
        f"| {run.name} | 1:00:00 | 0% | 1% | 83% | 14% | 2% | 1,234 |"]
    assert len({line.count("|") for line in scores.splitlines()}) == 1
    for text in ('[{"game": "Freeway"}]', '{"game": 1}', "[1]", "[" * 100_000,
                 '[{"game": [], "mean": 0, "std": 0}]',
                 f'[{{"game": "Freeway", "mean": {10**400}, "std": 0}}]'):
        chance.write_text(text)
        assert_main_refuses("random.json is damaged", evaluate.main, run, "--markdown")
    for look in ("--random", "--dream=a.gif", "--sweep-temperature"):
        assert_main_refuses("", evaluate.main, run, "--markdown", look)

    readme = (HERE / "results" / "README.md").read_text()
    for part in judged(capsys, *(HERE / "results").iterdir(), "--markdown").split("\n\n"):
        assert part.strip() in readme, "python evaluate.py results/* --markdown says otherwise"
    # The short table at the README's beginning: random play, the preset as it is, the paper.
    readme = (HERE / "README.md").read_text()
    groups = json.loads(judged(capsys, *(HERE / "results").glob("*-small-s*"), "--json"))
    chance = json.loads((HERE / "results" / "random.json").read_text())
    for name, means in (("random play", {row["game"]: row["mean"] for row in chance}),
                        ("**`small`**", {row["game"]: row["mean"] for row in groups}),
                        ("the paper, published", {game: row[2][0] for game, row
                                                  in evaluate.PUBLISHED.items()})):
        cells = " | ".join(f"{means[game]:.1f}" for game in evaluate.PUBLISHED)
        assert f"| {name} | {cells} |" in readme


def test_results_kept_without_their_checkpoints(tmp_path, capsys):
    """results/*: pictures beside the runs are passed over; a run kept alone shows its scores."""
    run = made_up_run(tmp_path, "Pong", 0, [1.0, 2.0])
    (tmp_path / "curves.png").write_bytes(b"")
    (tmp_path / "random.json").write_text("[]")
    for folders in (tmp_path.iterdir(), [run]):
        assert json.loads(judged(capsys, *folders, "--json"))[0]["mean"] == 1.5
    assert_main_refuses("name a run folder", evaluate.main, tmp_path / "random.json")


def test_published_numbers_are_those_of_tables_4_and_5():
    """Table 4: mean and deviation of ours, SimPLe, PPO 100K. Table 5: medians, bests."""
    table4 = """BankHeist 101.2 17.4 8.2 4.4 16.0 12.4
        Breakout 8.8 1.5 12.7 3.8 5.9 3.3
        CrazyClimber 47536.9 6114.9 39827.8 22582.6 18400.0 5275.1
        Freeway 24.6 3.4 20.3 18.5 8.0 9.8
        Pong 11.8 6.9 5.2 9.7 -20.5 0.6
        Seaquest 458.1 155.7 370.9 128.2 370.0 103.3"""
    table5 = """BankHeist 101.2 8.9 121.6 13.9
        Breakout 8.4 11.0 11.6 19.5
        CrazyClimber 45256.2 41396.9 59609.4 67250.0
        Freeway 26.2 33.5 29.0 34.0
        Pong 8.2 1.4 20.2 21.0
        Seaquest 472.5 386.9 635.0 497.2"""
    lines = list(zip(table4.splitlines(), table5.splitlines()))
    assert len(lines) == len(evaluate.PUBLISHED) == 6
    for line4, line5 in lines:
        game, *four = line4.split()
        same_game, *five = line5.split()
        four, five = [float(v) for v in four], [float(v) for v in five]
        _, _, paper, simple, ppo = evaluate.PUBLISHED[game]
        assert game == same_game and ppo == tuple(four[4:])
        assert paper == (*four[:2], five[0], five[2]) and simple == (*four[2:4], five[1], five[3])


def test_judge_pools_seeds_and_nothing_else(tmp_path, capsys):
    """Tables 4 and 5: a run counts as the mean of its episodes; statistics are over runs."""
    for seed, scores in enumerate(([1, 3], [5, 5], [12, 12])):
        made_up_run(tmp_path, "Freeway", seed, scores)
    made_up_run(tmp_path, "Freeway", 3, [20.0], preset="paper")
    made_up_run(tmp_path, "Freeway", 4, [25.0], scale=0.5)
    made_up_run(tmp_path, "Freeway", 5, None, rows=2)
    made_up_run(tmp_path, "Pong", 0, [-21.0])
    made_up_run(tmp_path, "Tennis", 0, [-24.0], preset="smoke")
    rows = json.loads(judged(capsys, *tmp_path.iterdir(), "--json"))
    assert [(r["game"], r["preset"], r["seeds"], r["mean"]) for r in rows] == [
        ("Freeway", "paper", [3], 20), ("Freeway", "small", [0, 1, 2], pytest.approx(19 / 3)),
        ("Freeway", "small", [5], None), ("Freeway", "small", [4], 25),
        ("Pong", "small", [0], -21), ("Tennis", "smoke", [0], -24)]
    row = next(r for r in rows if r["seeds"] == [0, 1, 2])
    assert (row["median"], row["best"], row["episodes"], row["interactions"]) == (5, 12, 6, 300)
    assert row["std"] == pytest.approx(math.sqrt(
        sum((v - 19 / 3) ** 2 for v in (2, 5, 12)) / 3))
    assert row["human_normalised"] == pytest.approx(19 / 3 / 29.6)
    assert [r["finished"] for r in rows].count(False) == 1 and rows[-1]["human_normalised"] is None
    assert all(r["std"] is None for r in rows if len(r["seeds"]) == 1)   # one run has no spread
    assert next(r for r in rows if r["seeds"] == [4])["changed"] == {"scale": 0.5}

    text = judged(capsys, *tmp_path.iterdir())
    line = next(line for line in text.splitlines() if "0,1,2" in line)
    for said in ("Freeway", "small", "6.3 (4.2)", "5.0", "12.0", "0.214", "24.6 (3.4)", "26.2",
                 "20.3 (18.5)", "33.5", "34.0", "8.0 (9.8)"):
        assert said in line, (said, line)
    assert "stopped early or still runs: in round 2 of 15; last evaluated after 200 " in text
    assert "51.0 over 4 episodes" in text and "small with scale=0.5" in text
    assert "human-normalised, small, 2 games" in text and "one run only of Pong" in text
    assert max(len(line) for line in text.splitlines() if " | " in line) < 180


def test_runs_from_before_a_setting_existed(tmp_path, capsys):
    """A setting younger than the run has its default; one that is no more makes a row of its own,
    whose footnote says so and lists nothing."""
    made_up_run(tmp_path, "Pong", 1, [3.0])
    young, old, older = (made_up_run(tmp_path / name, "Pong", 0, [9.0]) for name in "abc")
    config = json.loads((young / "config.json").read_text())
    del config["temperature"], config["policy_memory"]
    (young / "config.json").write_text(json.dumps(config))
    # The preset has another one by now, and the table says so.
    assert json.loads(judged(capsys, young, "--plot", tmp_path / "a.png", "--json"))[0][
        "changed"] == {"temperature": 1.0}
    loaded = evaluate.config_from(config, {})
    assert loaded.temperature == 1 and not loaded.policy_memory and loaded.preset == "small"
    with pytest.raises(train.UserError, match="another version of train.py: colour, shape"):
        evaluate.config_from(config | {"shape": 1, "colour": 2}, {})
    for folder, colour in ((old, 1), (older, 2)):
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(settings | {"colour": colour, "hidden": 7}))
    text = judged(capsys, tmp_path / "Pong-small-s1-0", old, older)
    assert text.count("of an older version (commit 149dcc7 or before)") == 2
    assert "colour" not in text and "hidden" not in text
    for kind, score in (("small", "3.0"), (r"small \[1\]", "9.0"), (r"small \[2\]", "9.0")):
        assert re.search(rf"Pong +{kind} +\d +1 +300 \| +{score}", text), text


def test_aggregates_and_their_bootstrap_against_brute_force():
    """Agarwal et al. (2021): all 729 ways to redraw 3 runs in each of 2 games, by plain loops."""
    scores = [np.array([0.1, 0.5, 0.9]), np.array([0.2, 0.3, 1.6])]

    def by_hand(games):
        means = sorted(sum(g) / len(g) for g in games)
        median = (means[(len(means) - 1) // 2] + means[len(means) // 2]) / 2
        everything = sorted(v for g in games for v in g)
        for _ in range(int(0.25 * len(everything))):
            everything = everything[1:-1]
        return [sum(means) / len(means), median, sum(everything) / len(everything)]

    rng = np.random.default_rng(0)
    for sizes in ((1,), (3, 3), (5, 2, 4), (4, 4, 4, 4), (5,)):
        games = [rng.normal(size=n) for n in sizes]
        np.testing.assert_allclose(evaluate.aggregates(games), by_hand(games))
    draws = [[a, b, c] for a in range(3) for b in range(3) for c in range(3)]
    every = np.array([by_hand([scores[0][i], scores[1][j]]) for i in draws for j in draws])
    low, high = evaluate.bootstrap(scores, resamples=40_000)
    for k in range(3):                         # the distribution is discrete: some slack in p
        assert np.quantile(every[:, k], 0.02) <= low[k] <= np.quantile(every[:, k], 0.03)
        assert np.quantile(every[:, k], 0.97) <= high[k] <= np.quantile(every[:, k], 0.98)
    assert evaluate.interquartile_mean(np.array([9., 1, 4, 2, 3])) == 3     # docstring's example


def test_judge_refuses_what_it_cannot_trust(tmp_path, capsys):
    """One clear line each; a damaged or doubled run is never averaged."""
    good, other = (made_up_run(tmp_path, "Pong", s, [1.0]) for s in (0, 1))

    def refuses(saying, *folders):
        assert_main_refuses(saying, evaluate.main, good, *folders)

    refuses("no run folder", tmp_path / "nowhere")
    refuses("no config.json", tmp_path)
    nameless = shutil.copytree(good, tmp_path / "nameless")
    (nameless / "config.json").unlink()        # whose settings nobody knows
    refuses("no config.json", nameless)
    refuses("same game, preset and seed", good)
    assert_main_refuses("at most one run", evaluate.main, good, other, "--random")
    path = other / "evaluation.json"
    whole = json.loads(path.read_text())
    for text in ("", "[1]", '"x"', "{", json.dumps(whole | {"returns": []}),
                 json.dumps(whole | {"returns": [float("nan")]}),
                 json.dumps(whole | {"returns": ["3"]}), "[" * 100_000,
                 json.dumps(whole | {"returns": [10**400]}),
                 json.dumps(whole | {"interactions": None})):
        path.write_text(text)
        refuses("is damaged", other)
    path.write_text(json.dumps(whole | {"seed": 7}))
    refuses("belongs to another run", other)
    path.write_text(json.dumps(whole))
    for text in ("iteration,interactions\n1,abc\n", "a,b\n1,2\n", "iteration\n1,2,3\n",
                 "iteration,interactions\n1,inf\n", "iteration,interactions,real_return\n1,2,3\n",
                 "iteration,interactions\n1,1e300\n", "iteration,interactions\n1,\xff\n"):
        (other / "metrics.csv").write_text(text, encoding="latin-1")
        refuses("metrics.csv is damaged", other)
    (other / "metrics.csv").unlink()           # may be missing: the scores are elsewhere
    assert "0,1" in judged(capsys, good, other)


def test_plot_draws_figure_4(tmp_path, capsys, monkeypatch):
    """Figure 4: mean and spread over finished seeds, published means as lines, one legend."""
    for seed, scores in enumerate(([1.0], [50.0], [9.0])):
        made_up_run(tmp_path, "Freeway", seed, scores)
    made_up_run(tmp_path, "Freeway", 3, None, rows=2)
    made_up_run(tmp_path, "Freeway", 4, None, rows=0)
    made_up_run(tmp_path, "Pong", 0, [9.0])
    runs, picture = sorted(tmp_path.iterdir()), tmp_path / "curves.png"
    page = drawn_by(monkeypatch)
    judged(capsys, *runs, "--plot", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    freeway, pong = page().axes
    assert (freeway.get_title(), pong.get_title()) == ("Freeway, 3 seeds", "Pong, 1 seed")
    lines = {line.get_label(): line for line in freeway.lines}
    mean = lines["mean over seeds"]
    # made_up_run: seed s scores 10 s, 10 s + 1, 10 s + 2 after 100, 200, 300 interactions.
    assert mean.get_xdata().tolist() == [100, 200, 300]
    assert mean.get_ydata().tolist() == [10, 11, 12]
    assert lines["stopped early or still runs"].get_ydata().tolist() == [30, 31]
    low, high = freeway.collections[0].get_datalim(freeway.transData).intervaly
    assert (low, high) == pytest.approx((10 - math.sqrt(200 / 3), 12 + math.sqrt(200 / 3)))
    assert not pong.collections                # one seed has no spread
    for name, mean in (("paper", 24.6), ("SimPLe", 20.3), ("PPO 100K", 8.0)):
        assert lines[f"{name}, published final mean"].get_ydata()[0] == mean
    assert 5.2 in [line.get_ydata()[0] for line in pong.lines]
    # In black and white: greys only, and no two lines of a panel look the same.
    assert len(set(looks(freeway.lines))) == len(freeway.lines) == 5
    for colour in (*(line.get_color() for line in freeway.lines),
                   *freeway.collections[0].get_facecolor()):
        assert len(set(matplotlib.colors.to_rgb(colour))) == 1
    legend, = page().legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert set(lines) < set(texts) and len(texts) == 6 and legend.get_title().get_text() == (
        "preset small")
    # Nothing overlaps: neither panels nor legend nor the texts at the edges.
    boxes = [thing.get_tightbbox() for thing in (freeway, pong, legend, page()._supxlabel,
                                                 page()._supylabel)]
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i]), i
    monkeypatch.undo()
    assert_main_refuses("must end in .png", evaluate.main, runs[0], "--plot", tmp_path / "a.txt")
    (tmp_path / "folder.png").mkdir()
    assert_main_refuses("is a folder", evaluate.main, runs[0], "--plot", tmp_path / "folder.png")
    nowhere = tmp_path / "nowhere" / "b.png"
    assert_main_refuses("there is no folder", evaluate.main, runs[0], "--plot", nowhere)
    new = made_up_run(tmp_path / "new", "Pong", 1, None, rows=0)
    assert_main_refuses("nothing to plot", evaluate.main, new, "--plot", picture)


def test_plot_shows_the_preset_and_variants_only_when_named_alone(tmp_path, capsys, monkeypatch):
    """One curve a game: an unchanged preset before variants, more runs before fewer."""
    plain = [made_up_run(tmp_path, "Breakout", 0, [1.0])]
    half = [made_up_run(tmp_path, "Freeway", seed, [1.0], scale=0.5) for seed in (0, 1)]
    twice = [made_up_run(tmp_path, game, 7, [1.0], scale=2.0) for game in ("Pong", "Breakout")]
    twice.append(made_up_run(tmp_path, "Breakout", 8, [1.0], scale=2.0))
    page = drawn_by(monkeypatch)
    for runs, games, title in ((plain + half + twice, ["Breakout, 1 seed"], "preset small"),
                               (half + twice, ["Breakout, 2 seeds", "Pong, 1 seed"],
                                "small with scale=2.0"),
                               (half, ["Freeway, 2 seeds"], "small with scale=0.5")):
        capsys.readouterr()
        evaluate.main([*map(str, runs), "--plot", str(tmp_path / "a.png")])
        said = capsys.readouterr().err
        assert [ax.get_title() for ax in page().axes] == games
        assert page().legends[0].get_title().get_text() == title
        assert ("name these runs alone" in said) == (runs is not half), said


def test_pictures_do_not_depend_on_the_users_settings(tmp_path, capsys, monkeypatch):
    """A notebook's backend, LaTeX in a matplotlibrc that is not installed: the same bytes."""
    run, seen = made_up_run(tmp_path, "Pong", 0, [1.0]), []
    training = types.SimpleNamespace(folder=tmp_path, config=train.Config(game="Pong"), rows=[
        {"interactions": 100 * i, "real_return": i, "entropy": 1 / i} for i in (1, 2, 3)])
    for settings in ({}, {"text.usetex": True, "font.size": 30, "figure.dpi": 20,
                          "backend": "module://no_such_notebook"}):
        with matplotlib.rc_context():
            for name, value in settings.items():
                matplotlib.rcParams[name] = value
            judged(capsys, run, "--plot", tmp_path / "a.png")
            evaluate.progress_picture(training)
        seen.append([(tmp_path / name).read_bytes() for name in ("a.png", "progress.png")])
    assert seen[0] == seen[1]
    assert capsys.readouterr().err == ""       # no warning
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nbackend: module://no_notebook\n")
    monkeypatch.setenv("MATPLOTLIBRC", str(tmp_path))
    monkeypatch.setenv("MPLBACKEND", "module://no_such_notebook")
    status, _, lines = command("evaluate.py", run, "--plot", tmp_path / "b.png")
    assert status == 0 and (tmp_path / "b.png").read_bytes() == seen[0][0], lines


def test_a_picture_never_ends_a_run(tmp_path, capsys, monkeypatch):
    """Whatever matplotlib or the disk do: a line of warning, and the foreground error as before."""
    rng, models = np.random.default_rng(0), tiny_models(first_interactions=60)
    buffer = ExperienceBuffer(60)
    buffer.add(rng.integers(0, 256, (60, 96, 96), np.uint8), rng.integers(M, size=60),
               np.zeros(60), rng.random(60) < 0.02, np.zeros(60, bool))
    run = types.SimpleNamespace(
        models=models, buffer=buffer, folder=tmp_path, iteration=0, config=models.config, rows=[],
        numpy_rng=lambda *numbers: np.random.default_rng(numbers),
        other_dice=contextlib.nullcontext)
    error = evaluate.world_model_picture(run)
    assert 0 < error < 100 and capsys.readouterr().err == ""
    assert (tmp_path / "world_model_01.png").read_bytes().startswith(b"\x89PNG")

    def broken(*arguments, **settings):
        raise RuntimeError("no pencil\nno paper")

    def full(path, data):
        raise train.UserError("no room")
    for where, name, reason in ((matplotlib.figure, "Figure", broken),
                                (matplotlib.figure.Figure, "subplots", broken),
                                (evaluate, "write_atomically", full)):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, reason)
            assert evaluate.world_model_picture(run) == error
            evaluate.progress_picture(run)
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 2 and all(line.startswith("warning: no picture ") for line in said)
        assert all(line.endswith(("no pencil", "no room")) for line in said), said


def saved_run(tmp_path, seed=0, checkpoint=True, **settings):
    """A run folder with untrained tiny models in its checkpoint -> folder, models."""
    torch.manual_seed(seed)
    folder = made_up_run(tmp_path, "Freeway", seed, [20.0, 30.0], bf16=False, vqvae_width=0.1,
                         hidden=8, policy_width=0.1, **settings)
    config = evaluate.config_from(json.loads((folder / "config.json").read_text()), {})
    models = train.Models(config, 3)
    if checkpoint:
        (folder / "checkpoint.pt").write_bytes(train.sealed({
            "schema": train.SCHEMA, "config": dataclasses.asdict(config) | {
                "device": "cuda", "out": str(tmp_path)},
            "rows": [{"interactions": 700}], "networks": {
                name: network.state_dict() for name, network in models.networks().items()}}))
    return folder, models


def test_stored_scores_are_shown_and_episodes_played_when_asked(tmp_path, capsys, monkeypatch):
    """One run alone: what was played is in evaluation.json; --episodes plays anew."""
    folder, _ = saved_run(tmp_path)
    seeds = []
    monkeypatch.setattr(evaluate, "play_episodes", lambda models, game, numbers, temperature: (
        seeds.extend(numbers), [7.0] * len(numbers))[1])
    for named in (folder, tmp_path / "*"):     # a Windows shell leaves the pattern to us
        text = judged(capsys, named)
        assert not seeds and re.search(r"Freeway +small \[1\] +0 +2 +300 \| +25.0", text), text
        assert "24.6 (3.4)" in text
    text = judged(capsys, folder, "--episodes", 10, "--seed", 2**31 - 1)
    assert "mean 7.0" in text and "after 700 real" in text and "paper mean 24.6" in text
    assert len(set(seeds)) == 10 and all(0 <= seed < 2**31 for seed in seeds)
    assert_main_refuses(f"no run folder {tmp_path / 'no*'}", evaluate.main, tmp_path / "no*")


def test_a_model_to_keep(tmp_path, capsys, monkeypatch):
    """--export: weights in bfloat16, with which everything works; damage and code are refused."""
    folder, models = saved_run(tmp_path)
    record = evaluate.record                   # a dozen steps will do
    monkeypatch.setattr(evaluate, "record", lambda *given, most=0: record(*given[:4], 12))
    evaluate.main([str(folder), "--export", str(folder / "model.pt")])
    (folder / "checkpoint.pt").unlink()
    path = folder / "model.pt"
    whole = path.read_bytes()
    assert whole[-32:] == hashlib.sha256(whole[:-32]).digest()
    state = torch.load(io.BytesIO(whole), weights_only=True)
    assert set(state) == {"schema", "config", "rows", "networks"}
    assert state["config"]["out"] == "runs"    # not where the user keeps things
    assert {t.dtype for network in state["networks"].values() for t in network.values()
            } == {torch.bfloat16, torch.int64}
    loaded, config, interactions = evaluate.load_models(folder, "cpu")
    assert (interactions, config.hidden, config.game) == (700, 8, "Freeway")
    for name, network in loaded.networks().items():
        for key, value in models.networks()[name].state_dict().items():
            assert torch.equal(network.state_dict()[key], value.bfloat16().to(value.dtype)), key
    evaluate.main([str(folder), "--dream", str(tmp_path / "a.png"), "--steps", "2"])
    assert evaluate.dream_env(folder, 2).reset(seed=0)[0].shape == (2, 32, 6, 6)

    bomb = type("Bomb", (), {"__reduce__": lambda self: (os.mkdir, (str(tmp_path / "trap"),))})()
    for foreign in (whole[:-1], whole[:900] + b"!" + whole[901:], b"", [1], {}, bomb,
                    state | {"config": None}, state | {"config": state["config"] | {"hidden": "8"}},
                    state | {"networks": None}, state | {"networks": {}}, state | {"config": {}},
                    state | {"networks": state["networks"] | {"policy": {"a": torch.zeros(1)}}}):
        if not isinstance(foreign, bytes):
            foreign = train.sealed(foreign)
        path.write_bytes(foreign)
        assert_main_refuses("model.pt", evaluate.main, folder, "--dream", tmp_path / "a.png")
    assert not (tmp_path / "trap").exists()
    path.unlink()
    assert_main_refuses(f"{folder} holds no checkpoint and no model.pt", evaluate.main, folder,
                        "--dream", tmp_path / "a.png")
    assert_main_refuses("must end in model.pt", evaluate.main, folder, "--export",
                        folder / "checkpoint.pt")


def test_a_checkpoint_of_another_run_is_refused(tmp_path, monkeypatch):
    """Another seed's or game's or setting's; what may change may differ; no compiler is needed."""
    folder, _ = saved_run(tmp_path, compile=True)
    for where, name in ((torch, "compile"), (evaluate, "play_episodes"), (evaluate, "record")):
        monkeypatch.setattr(where, name, lambda *_, **__: pytest.fail("too late"))
    config = json.loads((folder / "config.json").read_text())
    for name, value in (("checkpoint_minutes", 99), ("final_episodes", 1), ("out", "here")):
        (folder / "config.json").write_text(json.dumps(config | {name: value}))
        evaluate.load_models(folder, "cpu")
    for name, value in (("seed", 1), ("game", "Pong"), ("gamma", 0.9), ("preset", "paper")):
        (folder / "config.json").write_text(json.dumps(config | {name: value}))
        for flags in (["--episodes", "1"], ["--fidelity"]):
            assert_main_refuses("belongs to another run", evaluate.main, folder, *flags)
        assert_main_refuses("belongs to another run", train.main, "--resume", folder)


def test_only_regular_files_of_their_size_are_read(tmp_path, capsys):
    """A pipe, a device, a folder or a huge file in place of any: one line, at once."""
    write_table(made_up_run(tmp_path, "Pong", 0, [1.0]) / "times.csv", train.TIMES, [])
    folder, huge = tmp_path / "Pong-small-s0-0", tmp_path / "huge"
    with open(huge, "wb") as file:
        file.truncate(2**40)                   # takes no room
    for name, flag in (("config.json", "--json"), ("evaluation.json", "--json"),
                       ("metrics.csv", "--json"), ("times.csv", "--markdown"),
                       ("../random.json", "--markdown"), ("model.pt", "--fidelity")):
        path = folder / name
        kept = path.read_bytes() if path.exists() else None
        for make in (lambda: os.mkfifo(path), path.mkdir, lambda: path.symlink_to("/dev/zero"),
                     lambda: path.symlink_to(huge)):
            path.unlink(missing_ok=True)
            make()
            assert_main_refuses(path.name, evaluate.main, folder, flag)
            path.rmdir() if path.is_dir() else path.unlink()
        if kept is not None:
            path.write_bytes(kept)


def test_hand_edited_files_never_end_in_a_traceback(tmp_path, capsys):
    """Any JSON in place of any value of config.json and evaluation.json: shown or one line."""
    folder = made_up_run(tmp_path, "Pong", 0, [1.0])
    shown = refused = 0
    for name in ("config.json", "evaluation.json"):
        whole = json.loads((folder / name).read_text())
        for key in ("game", "preset", "seed", "iterations", "gamma", "returns", "interactions"):
            for value in (None, True, -1, 1.5, 10**30, math.nan, "x\ud800", [], [[1]], {"a": 1}):
                (folder / name).write_text(json.dumps(whole | {key: value}))
                try:
                    judged(capsys, folder, "--markdown")
                    judged(capsys, folder)
                    shown += 1
                except SystemExit as stop:
                    assert stop.code.startswith("error: ") and "\n" not in stop.code
                    refused += 1
        (folder / name).write_text(json.dumps(whole))
    assert shown > 50 and refused > 50


def test_output_may_be_lost_or_have_another_encoding(tmp_path):
    """Japanese names on a stdout of ascii; a closed or full one: no traceback."""
    folder = made_up_run(tmp_path / "走る", "Pong", 0, [1.0], rows=0)
    (folder / "evaluation.json").unlink()      # so that its name is printed
    shown, full, closed = (subprocess.run(
        f"{sys.executable} evaluate.py '{folder}' {lost}", shell=True, cwd=HERE, text=True,
        capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"})
        for lost in ("", "> /dev/full", ">&- 2>&-"))
    assert shown.returncode == 0 and r"\u8d70\u308b" in shown.stdout, shown.stderr
    assert full.returncode == 1 and re.fullmatch("error: .*\n", full.stderr)
    assert (closed.returncode, closed.stdout, closed.stderr) == (0, "", "")


def test_flags_have_bounds_and_names_any_spelling(tmp_path, capsys, monkeypatch):
    """One rule for seeds; what no machine can do is refused; each refusal names what was typed."""
    run, other = (made_up_run(tmp_path, "Pong", seed, [1.0]) for seed in (0, 1))
    for flag, values in (("seed", (-1, 2**31)), ("episodes", (0, 1001)), ("steps", (0, 2001)),
                         ("temperature", (0, -1, "nan", "inf", "1e-300"))):
        for value in values:
            assert_main_refuses(f"--{flag} must lie in", evaluate.main, run, f"--{flag}", value)
    for flags in (("--random", "--fidelity"), ("--play", "--sweep-temperature"),
                  ("--markdown", "--dream", "a.gif"), ("--plot", "a.png", "--random"),
                  ("--export", "model.pt", "--video", "a.gif")):
        assert_main_refuses("do not go together", evaluate.main, run, *flags)
    (tmp_path / "random.json").touch()
    assert_main_refuses("random.json is a file", evaluate.main, tmp_path / "random.json")
    assert_main_refuses("there is no run folder", evaluate.main, "x" * 5000)
    monkeypatch.setattr(evaluate, "play_episodes", lambda *arguments: [0.0] * 2)
    for name in ("Space Invaders", "space_invaders", "spaceinvaders"):
        text = judged(capsys, "--random", "--game", name, "--episodes", 2, "--json")
        assert json.loads(text)[0]["game"] == "SpaceInvaders"


def test_fidelity_figures_against_plain_loops(monkeypatch):
    """Dream fidelity: accuracy, pixel errors, precision and recall of a made-up dream."""
    rng = np.random.default_rng(0)
    models, buffer = tiny_models(), ExperienceBuffer(200)
    ends = np.zeros(200, bool)
    ends[[70, 71, 100, 199]] = True            # episodes of 71, 1, 29 and 99 steps
    buffer.add(rng.integers(0, 256, (200, 96, 96), np.uint8), rng.integers(M, size=200),
               rng.choice([-3., -1, 0, 0, 0, 2], 200), ends, np.zeros(200, bool))
    codes = models.encode_all(buffer).long()
    assert torch.equal(codes, torch.cat([models.vqvae.encode(torch.from_numpy(
        buffer.stacked([t]))) for t in range(200)]))

    calls, rows = [], [range(s, s + 54) for s in range(200 - 54 + 1) if not ends[s:s + 53].any()]

    def made_up(dynamics, embed, real, actions, context, temperature):
        first = sum(len(call) for call in calls)
        mine = torch.tensor([list(w) for w in rows[first:first + len(real)]])
        assert torch.equal(real, codes[mine])
        assert torch.equal(actions, torch.from_numpy(buffer.actions[mine].astype(np.int64)))
        calls.append(mine)
        dreamed = torch.where(torch.rand(real.shape) < 0.5, real, torch.randint(128, real.shape))
        return dreamed, torch.randint(-1, 2, (len(real), 53)).float()

    made = []
    monkeypatch.setattr(evaluate, "open_loop", lambda *a: made.append(made_up(*a)) or made[-1])
    moments, table = evaluate.fidelity(models, buffer, most=1000)
    dreamed, paid = (torch.cat(part) for part in zip(*made))
    assert moments == len(rows) == 18 + 46
    assert [row["step"] for row in table] == [1, 2, 5, 10, 25, 50]
    for row in table:
        k, last = row["step"], 3
        right = still = hits = mine = true = 0
        square = {"": 0, "_still": 0, "_codes": 0}
        for n, window in enumerate(rows):
            t = window[last + k]
            right += int((dreamed[n, last + k] == codes[t]).sum())
            still += int((codes[window[last]] == codes[t]).sum())
            frame = buffer.frames[t] / 255.
            for name, z in zip(square, (dreamed[n, last + k], codes[window[last]], codes[t])):
                square[name] += ((models.vqvae.decode(z[None])[0, -1].numpy() - frame) ** 2).sum()
            for j in range(last, last + k):    # the reward of row j comes with observation j + 1
                game = np.sign(buffer.rewards[window[j]])
                mine += int(paid[n, j] != 0)
                true += int(game != 0)
                hits += int(game != 0 and paid[n, j] == game)
        assert row["code_accuracy"] == pytest.approx(right / len(rows) / 36)
        assert row["code_accuracy_still"] == pytest.approx(still / len(rows) / 36)
        for name in square:
            assert row["pixel_error" + name] == pytest.approx(
                255 * math.sqrt(square[name] / len(rows) / 96**2), rel=1e-4)
        assert (row["rewards_real"], row["rewards_dreamed"]) == (true, mine)
        assert row["reward_precision"] == pytest.approx(hits / mine)
        assert row["reward_recall"] == pytest.approx(hits / true)
        assert row["foreground_error"] > 0
    with pytest.raises(train.UserError, match="no episode lasted"):
        short = ExperienceBuffer(30)
        short.add(*(getattr(buffer, n)[72:101] for n in ExperienceBuffer.COLUMNS))
        evaluate.fidelity(models, short)


def test_recorded_episodes_are_what_was_played():
    """Held-out real play: actions replayed in the emulator give the frames and rewards recorded."""
    models = evaluate.RandomPolicy(6, seed=0)
    buffer = evaluate.record(models, "Pong", [3, 4], 1.0, most=12)
    assert len(buffer) == 24 and np.flatnonzero(buffer.truncated).tolist() == [11, 23]
    for first, seed in ((0, 3), (12, 4)):
        env = AtariEnv("Pong", seed=seed)
        frame = env.reset()
        for t in range(first, first + 12):
            assert np.array_equal(buffer.frames[t], frame)
            frame, reward, _, _ = env.step(buffer.actions[t])
            assert buffer.rewards[t] == reward


def test_dream_and_video_pictures(tmp_path, monkeypatch, capsys):
    """A dream beside the real game under the same actions; the policy and what the model sees."""
    torch.manual_seed(0)
    config = train.Config(game="Pong", bf16=False, vqvae_width=0.1, hidden=8, policy_width=0.1)
    models = train.Models(config, 6)
    names = AtariEnv("Pong").action_meanings
    buffer = evaluate.record(models, "Pong", [3], 1.0, most=90)
    steps = evaluate.dream_pictures(models, buffer, names, 12, 1.0, np.random.default_rng(5))
    assert len(steps) == 13                    # the last observation seen, and 12 dreamed ones
    first = next(t for t in range(90) if all(  # where in the episode is it?
        np.array_equal(buffer.frames[t + i] / 255, steps[i][0][0][1]) for i in range(13)))
    total = 0
    for i, (panels, caption) in enumerate(steps):
        (real, frame), (dreamed, image), (_, codes) = panels
        assert caption == f"step {i} of 12, action {names[buffer.actions[first + i]]}"
        again = evaluate.decoded(models, torch.from_numpy(codes)[None])[0]
        np.testing.assert_allclose(image, again, rtol=1e-5)
        if i:
            total += buffer.rewards[first + i - 1]
            assert real == f"real: reward {buffer.rewards[first + i - 1]:g}, sum {total:g}"
            assert dreamed.startswith("dream: reward ")
    seen = torch.from_numpy(steps[0][0][2][1])     # the dream starts at the real codes
    assert torch.equal(seen, models.encode_all(buffer).long()[first])

    steps = evaluate.video_pictures(models, buffer, names)
    assert len(steps) == 90
    for t in (0, 50, 89):
        (score, frame), (_, image), (_, codes) = steps[t][0]
        assert score == f"real: score {sum(buffer.rewards[:t]):g}"
        assert np.array_equal(frame, buffer.frames[t] / 255) and steps[t][1].endswith(
            names[buffer.actions[t]])
        assert np.array_equal(codes, models.vqvae.encode(torch.from_numpy(
            buffer.stacked([t])))[0].numpy())

    # The command line: the seed decides every byte; a .png is a strip.
    monkeypatch.setattr(evaluate, "load_models", lambda folder, device: (models, config, 0))
    from PIL import Image                      # comes with matplotlib
    files = {}
    for name, seed, flag in (("a.gif", 1, "--dream"), ("b.gif", 1, "--dream"),
                             ("c.gif", 2, "--dream"), ("d.png", 1, "--dream"),
                             ("e.gif", 1, "--video")):
        evaluate.main(["run", flag, str(tmp_path / name), "--steps", "9", "--seed", str(seed)])
        files[name] = (tmp_path / name).read_bytes()
    assert files["a.gif"] == files["b.gif"] != files["c.gif"]
    with Image.open(tmp_path / "a.gif") as dream_gif, Image.open(tmp_path / "e.gif") as video:
        assert (dream_gif.n_frames, video.n_frames) == (10, 9)
    with Image.open(tmp_path / "d.png") as strip:
        assert strip.width > 2 * strip.height
    for saying, arguments in (
            ("must end in .gif or .png", ("--dream", tmp_path / "a.mp4")),
            ("there is no folder", ("--video", tmp_path / "no" / "a.gif")),
            ("one run folder", ("second", "--dream", tmp_path / "a.gif")),
            ("one at a time", ("--fidelity", "--dream", tmp_path / "a.gif")),
            ("--steps must lie", ("--dream", tmp_path / "a.gif", "--steps", 0))):
        assert_main_refuses(saying, evaluate.main, "run", *arguments)


def test_dreams_are_shown_as_the_policy_dreamed_them(smoke, tmp_path, monkeypatch):
    """--dream, --fidelity, dream_env draw codes at the run's temperature, unless told otherwise."""
    models, config, _ = evaluate.load_models(smoke, "cpu")
    config.temperature, used = 0.7, []
    monkeypatch.setattr(evaluate, "load_models", lambda folder, device: (models, config, 0))
    plain, record = evaluate.open_loop, evaluate.record
    monkeypatch.setattr(evaluate, "open_loop", lambda *a: used.append(a[5]) or plain(*a))
    monkeypatch.setattr(evaluate, "record", lambda *given, most=0: record(*given[:4], 70))
    for given, expected in ([], 0.7), (["--temperature", "1.3"], 1.3):
        used.clear()
        evaluate.main(["run", "--dream", str(tmp_path / "a.png"), "--steps", "2", *given])
        evaluate.main(["run", "--fidelity", "--episodes", "1", *given])
        assert len(used) > 1 and set(used) == {expected}
    assert evaluate.dream_env("run", 2).temperature == 0.7
    assert evaluate.dream_env("run", 2, temperature=1.3).temperature == 1.3


def test_virtual_scores_against_plain_loops(monkeypatch, capsys):
    """Ha & Schmidhuber, Table 2: what the policy is paid in the game and in dreams from there."""
    rng, steps = np.random.default_rng(1), 20
    models = tiny_models(policy_memory=True, dream_context=2)
    buffer, ends = ExperienceBuffer(120), np.zeros(120, bool)
    ends[[5, 40, 119]] = True                  # episodes of 6, 35 and 79 steps
    buffer.add(rng.integers(0, 256, (120, 96, 96), np.uint8), rng.integers(M, size=120),
               rng.choice([-3., 0, 1, 7], 120), ends, np.zeros(120, bool))
    starts = [s for s in range(101) if not ends[s:s + steps - 1].any()]
    assert len(starts) == 16 + 60

    def made_up(*given, **named):              # `dream` itself says which argument is which
        given = inspect.signature(dream).bind(*given, **named)
        given.apply_defaults()
        length, temperature, memory, state = (given.arguments[name] for name in (
            "steps", "temperature", "memory", "start_state"))
        codes, remembered = models.starts(buffer, np.array(starts), models.encode_all(buffer))
        assert torch.equal(given.arguments["start_codes"], codes) and memory
        torch.testing.assert_close(state, remembered)
        dones = torch.zeros(length, 76, dtype=torch.bool)
        dones[[3, 7], 9] = True                # a predicted end: what comes then is another dream
        return {"rewards": temperature * torch.arange(76.).expand(length, 76), "dones": dones}

    monkeypatch.setattr(evaluate, "dream", made_up)
    scores = evaluate.virtual_scores(models, buffer, steps)
    assert scores["real"].tolist() == [np.clip(buffer.rewards[s:s + steps], -1, 1).sum()
                                       for s in starts]
    assert list(scores) == ["real", 0.1, 0.5, 1.0, 1.15, 1.3]
    lasted = np.where(np.arange(76) == 9, 4, steps)
    np.testing.assert_allclose(scores[0.5], 0.5 * lasted * np.arange(76), rtol=1e-6)
    with pytest.raises(train.UserError, match="no episode lasted the 80 steps"):
        evaluate.virtual_scores(models, buffer, 80)

    models.config.dream_steps, models.config.temperature = steps, 1.5
    monkeypatch.setattr(evaluate, "read_config", lambda folder: {"preset": "small"})
    monkeypatch.setattr(evaluate, "load_models", lambda *_: (models, models.config, 0))
    monkeypatch.setattr(evaluate, "record", lambda *_, most: buffer)
    row, = json.loads(judged(capsys, "run", "--sweep-temperature", "--json"))
    returns = [buffer.rewards[a:b].sum() for a, b in ((0, 6), (6, 41), (41, 120))]
    assert row["actual_score"] == pytest.approx(np.mean(returns))
    assert row["actual_std"] == pytest.approx(np.std(returns))
    assert row["actual_steps"] == pytest.approx(scores["real"].mean())
    virtual = 1.15 * lasted * np.arange(76)
    assert row["virtual_1.15"] == pytest.approx(virtual.mean())
    assert row["virtual_1.15_std"] == pytest.approx(virtual.std())
    assert (row["trained_at"], row["steps"], row["moments"]) == (1.5, steps, 76)
    text = judged(capsys, "run", "--sweep-temperature")
    assert "at 1.15" in text and f"{virtual.mean():.2f} (" in text
    assert_main_refuses("one at a time", evaluate.main, "run", "--sweep-temperature", "--play")


def test_keys_become_the_games_actions():
    """--play: arrows and fire, whatever of them the game has."""
    pong, freeway, all_ = "NOOP FIRE RIGHT LEFT RIGHTFIRE LEFTFIRE", "NOOP UP DOWN", (
        "NOOP FIRE UP RIGHT LEFT DOWN UPRIGHT UPLEFT DOWNRIGHT DOWNLEFT UPFIRE RIGHTFIRE LEFTFIRE "
        "DOWNFIRE UPRIGHTFIRE UPLEFTFIRE DOWNRIGHTFIRE DOWNLEFTFIRE")
    for names, held, expected in (
            (pong, "", "NOOP"), (pong, "x", "NOOP"), (pong, "right", "RIGHT"),
            (pong, "up", "RIGHT"),
            (pong, "down f", "LEFTFIRE"), (pong, "enter", "FIRE"),
            (freeway, "up", "UP"), (freeway, "up f", "UP"), (freeway, "left", "NOOP"),
            (freeway, "down right", "DOWN"),
            (all_, "up right enter", "UPRIGHTFIRE"), (all_, "down left", "DOWNLEFT")):
        names = names.split()
        assert names[evaluate.action_of(set(held.split()), names)] == expected, held


def test_a_person_plays_in_the_dream(monkeypatch, tmp_path):
    """--play, by key events: steps under the keys held, restart, temperature, policy and back."""
    from matplotlib.backend_bases import KeyEvent
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    models = certain_models()
    names = ["NOOP", "FIRE", "UP"]
    starts = torch.randint(128, (3, 6, 6))
    figure = matplotlib.figure.Figure()
    canvas = FigureCanvasAgg(figure)
    player = evaluate.Player(models, (starts, None), names, figure, seed=4)

    def keys(kind, *pressed):
        for name in pressed:
            event = KeyEvent(f"key_{kind}_event", canvas, name)
            canvas.callbacks.process(event.name, event)

    def said():
        return player.caption.get_text()

    assert "score 0   step 0   NOOP" in said() and "you play" in said()
    keys("press", "up")
    z, state = player.env.codes, models.dynamics.initial_state(1)
    assert any(torch.equal(z[0], start) for start in starts)
    score = 0
    for t, action in enumerate([2, 2, 0, 1]):
        if t == 2:
            keys("release", "up")
        if t == 3:
            keys("press", "F")                 # with caps lock
        player.tick()
        with torch.no_grad():
            logits, rewards, state = models.dynamics(models.vqvae.embed(z), torch.tensor([action]),
                                                     state)
        z, score = logits.argmax(1), score + int(rewards.argmax()) - 1
        assert torch.equal(player.env.codes, z)
        assert said().startswith(f"score {score:g}   step {t + 1}   {names[action]} ")
        shown = models.vqvae.decode(z)[0, -1].detach().numpy()
        np.testing.assert_allclose(player.images[0].get_array(), shown, rtol=1e-5)
        assert np.array_equal(player.images[1].get_array(), z[0].numpy())

    keys("press", "t", "T")
    assert player.env.temperature == pytest.approx(1.21) and "temperature 1.21" in said()
    keys("press", "g", "G", "shift+g")
    assert player.env.temperature == pytest.approx(1 / 1.1)
    with torch.no_grad():
        models.policy.actor.bias[2] = 1e6      # a policy that always goes up
    keys("press", " ")
    player.tick()
    assert "the policy plays" in said() and "UP" in said()
    keys("press", " ")
    player.tick()
    assert "you play" in said() and "FIRE" in said()       # the key is still held down
    keys("press", "r")
    assert said().startswith("score 0   step 0")
    assert any(torch.equal(player.env.codes[0], start) for start in starts)
    began = set()
    for _ in range(20):
        keys("press", "r")
        began.add(tuple(player.env.codes.flatten().tolist()))
    canvas.draw()
    assert len(began) == 3                     # every real moment is a start

    with monkeypatch.context() as patch:       # where there is no display
        patch.setattr(evaluate, "load_models", lambda *_: pytest.fail("too early"))
        assert_main_refuses("no display here", evaluate.main, tmp_path, "--play")


class CountingWorld:
    """A dynamics made by hand. Codes 0..7 as one-hot vectors; every place moves on by the action,
    in the n-th step of an episode by n more; action 2 pays 1, action 0 costs 1 and, if predicted,
    ends the episode.
    """

    num_actions, end_head = 3, None

    def embed(self, codes):
        return F.one_hot(codes, 8).permute(0, 3, 1, 2).float()

    def initial_state(self, batch):
        return [(torch.zeros(batch, 1, 6, 6),) * 2] * 2

    def __call__(self, z, action, state):
        count = state[1][0]                    # [B, 1, 6, 6]
        following = (z.argmax(1) + action[:, None, None] + count.long()[:, 0]) % 8
        return (1e6 * self.embed(following), 1e6 * F.one_hot(action, 3).float(),
                [(count + 1, count + 1)] * 2)

    def end_logits(self, action, state):
        return torch.where(action == 0, 1e6, -1e6)


def test_dream_env_is_a_gymnasium_vector_env():
    """Ha & Schmidhuber 4.1, "as if it were a real Gym environment", in a world made by hand."""
    world, n, T = CountingWorld(), 4, 5
    starts = torch.randint(8, (20, 6, 6), generator=torch.Generator().manual_seed(0))
    env = DreamEnv(world, world, starts, n, steps=T)
    assert isinstance(env, gym.vector.VectorEnv) and env.num_envs == n
    assert env.metadata["autoreset_mode"] == gym.vector.AutoresetMode.SAME_STEP
    assert env.single_observation_space == gym.spaces.Box(-np.inf, np.inf, (8, 6, 6), np.float32)
    assert env.single_action_space == gym.spaces.Discrete(3)
    assert env.observation_space == gym.vector.utils.batch_space(env.single_observation_space, n)
    assert env.action_space == gym.vector.utils.batch_space(env.single_action_space, n)
    with pytest.raises(gym.error.ResetNeeded):
        env.step(np.zeros(n, int))

    observation, info = env.reset(seed=7)
    env.action_space.seed(7)
    assert info == {}
    known, seen_starts = {tuple(s.flatten().tolist()) for s in starts}, []
    for episode in range(3):
        codes = observation.argmax(1)
        for i in range(n):                     # every episode begins at a real observation
            assert tuple(codes[i].flatten()) in known
        seen_starts.append(codes)
        for t in range(T):
            actions = env.action_space.sample()
            observation, rewards, terminated, truncated, info = env.step(actions)
            assert observation in env.observation_space and observation.dtype == np.float32
            assert rewards.tolist() == (actions - 1).tolist() and rewards.dtype == np.float64
            codes = (codes + (actions + t)[:, None, None]) % 8
            # Ends exactly after T steps, as terminal (Section 3.4).
            assert terminated.tolist() == [t == T - 1] * n and not truncated.any()
            assert terminated.dtype == truncated.dtype == bool
            if t < T - 1:
                assert np.array_equal(observation.argmax(1), codes) and info == {}
        assert info["_final_obs"].all() and info["_final_info"].all() and info["final_info"] == {}
        assert np.array_equal(np.stack(info["final_obs"]).argmax(1), codes)
    assert not np.array_equal(seen_starts[0], seen_starts[1])        # a new start each time

    for wrong in (np.full(n, 3), np.full(n, -1), np.zeros(n + 1, int), np.zeros(n)):
        with pytest.raises(gym.error.InvalidAction):
            env.step(wrong)
    for settings in (dict(num_envs=0), dict(steps=0), dict(temperature=0.0), dict(steps=2.5),
                     dict(steps=math.inf), dict(num_envs=2.0), dict(temperature=math.nan),
                     dict(starts=starts[:0]), dict(starts=starts[0]), dict(starts=starts.float())):
        with pytest.raises(ValueError):
            DreamEnv(**dict(dynamics=world, vqvae=world, starts=starts, num_envs=n) | settings)

    # gymnasium's own statistics understand how it ends.
    env = gym.wrappers.vector.RecordEpisodeStatistics(DreamEnv(world, world, starts, n, steps=T))
    env.reset(seed=0)
    for t in range(2 * T):
        _, _, _, _, info = env.step(np.full(n, 2))
        if t % T == T - 1:
            assert info["episode"]["r"].tolist() == info["episode"]["l"].tolist() == [T] * n


def test_a_strangers_agent_learns_in_the_dream(monkeypatch, capsys):
    """The README's own lines, one linear layer and REINFORCE, in a world where action 2 pays."""
    (lines,) = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    world, starts = CountingWorld(), torch.randint(8, (20, 6, 6))
    monkeypatch.setattr(evaluate, "dream_env", lambda folder, num_envs, steps:
                        DreamEnv(world, world, starts, num_envs, steps))
    torch.manual_seed(0)
    exec(lines, {})
    scores = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert len(scores) == 100
    assert abs(scores[0]) < 4 and scores[-1] > 16                    # 20 would be perfect


def test_dream_env_of_a_run(smoke, monkeypatch):
    """evaluate.dream_env: a run's own dream; equal seeds begin at equal moments."""
    record, asked = evaluate.record, []
    monkeypatch.setattr(evaluate, "record", lambda *given, most: (
        asked.append(most), record(*given, 30))[1])
    first, again, other = (evaluate.dream_env(smoke, 2, steps=3, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.starts, again.starts) and len(first.starts) == 30
    assert not torch.equal(first.starts, other.starts) and asked == [500] * 3
    observation, _ = first.reset(seed=0)
    assert observation.shape == (2, 32, 6, 6) and first.single_action_space.n == 4
    assert [first.step(np.zeros(2, int))[2].all() for _ in range(3)] == [False, False, True]


def test_dream_env_ends_where_the_model_says(monkeypatch):
    """--predict-ends: an end is terminated, the last of `steps` truncated; each goes on alone."""
    world, n, T, rng = CountingWorld(), 4, 5, np.random.default_rng(0)
    monkeypatch.setattr(world, "end_head", True, raising=False)
    starts = torch.randint(8, (20, 6, 6), generator=torch.Generator().manual_seed(0))
    known = {tuple(s.flatten().tolist()) for s in starts}
    env = DreamEnv(world, world, starts, n, steps=T)
    codes, age, kinds = env.reset(seed=1)[0].argmax(1), np.zeros(n, int), set()
    for _ in range(60):
        actions = rng.integers(3, size=n)
        observation, _, terminated, truncated, info = env.step(actions)
        following, age = (codes + (actions + age)[:, None, None]) % 8, age + 1
        assert terminated.tolist() == (actions == 0).tolist()
        assert truncated.tolist() == ((age == T) & (actions != 0)).tolist()
        codes = observation.argmax(1)
        for i in range(n):
            if terminated[i] or truncated[i]:
                assert np.array_equal(info["final_obs"][i].argmax(0), following[i])
                assert info["_final_obs"][i] and tuple(codes[i].flatten()) in known
                age[i] = 0
            else:
                assert np.array_equal(codes[i], following[i])
                assert not info or not info["_final_obs"][i]
        kinds.add((bool(terminated.any()), bool(truncated.any())))
    assert len(kinds) == 4


@pytest.mark.filterwarnings("ignore:.*A Box observation space")        # codes have no bounds
def test_dream_env_seeds_decide_everything():
    """reset(seed) fixes starts and samples; torch's global dice are neither used nor moved."""
    dynamics, embed, (codes, _, _, _) = small_world(B=5)
    vqvae = types.SimpleNamespace(embed=embed)

    def play(env, seed):
        trace = [env.reset(seed=seed)[0]]
        for t in range(9):
            trace += env.step(np.array([t % M, 1]))[:2]
        return trace

    def equal(a, b):
        return all(np.array_equal(x, y) for x, y in zip(a, b))

    before = torch.get_rng_state()
    envs = [DreamEnv(dynamics, vqvae, codes[:, 0], 2, steps=4) for _ in range(2)]
    first = play(envs[0], 3)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    assert equal(first, play(envs[1], 3)) and equal(first, play(envs[0], 3))
    assert not equal(first, play(envs[0], 4))
    flat = DreamEnv(dynamics, vqvae, codes[:, 0], 2, steps=4, temperature=100.0)
    assert not equal(first, play(flat, 3))

    class One(gym.Env):                        # gymnasium's checker takes single environments
        """DreamEnv with one dream, as a gymnasium.Env."""

        def __init__(self):
            self.envs = DreamEnv(dynamics, vqvae, codes[:, 0], 1, steps=1000)
            self.observation_space = self.envs.single_observation_space
            self.action_space = self.envs.single_action_space

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return self.envs.reset(seed=seed)[0][0], {}

        def step(self, action):
            observation, *numbers, _ = self.envs.step(np.array([action]))
            return observation[0], *(value[0].item() for value in numbers), {}

    check_env(One(), skip_render_check=True)


def test_dream_env_is_the_dream_of_the_policy():
    """Section 3.4: `dream` and DreamEnv share one step; equal dice give equal dreams."""
    dynamics, embed, (codes, _, _, _) = small_world(B=5)
    policy = ActorCritic(M, code_dim=D, width=0.1)
    torch.nn.init.normal_(policy.actor.weight)
    env = DreamEnv(dynamics, types.SimpleNamespace(embed=embed), codes[:, 0], 6, steps=8,
                   temperature=1.5)
    observation, _ = env.reset(seed=1)
    torch.manual_seed(5)
    expected = dream(dynamics, embed, policy, env.codes, steps=8, temperature=1.5)
    env.generator.manual_seed(5)               # the dice that `dream` threw, in the same order
    for t in range(8):
        assert np.array_equal(observation, embed(expected["codes"][t]).numpy())
        with torch.no_grad():
            action = sample(policy(torch.from_numpy(observation))[0], generator=env.generator)
        observation, rewards, terminated, _, _ = env.step(action.numpy())
        assert torch.equal(action, expected["actions"][t])
        assert np.array_equal(rewards, expected["rewards"][t].numpy())
        assert np.array_equal(terminated, expected["dones"][t].numpy())


# ----------------------------------------------------------------------------------------------
# A long run can be trusted: nothing is lost, and resuming changes nothing
# ----------------------------------------------------------------------------------------------
# These tests fork a child that trains a tiny run. An event in it is an update, a real step, an
# fsync or a rename: before any of them the run may be killed, or its folder copied.

TINY = ("--game Breakout --preset smoke --iterations 2 --first_interactions 120 --interactions 60 "
        "--warmup_epochs 0.5 --warmup_batch 8 --dynamics_batch 2 --dreams 2 --dream_steps 6 "
        "--hidden 4 --vqvae_width 0.125 --policy_width 0.125 --world_model_epochs 1 "
        "--ppo_updates 2 --eval_episodes 0 --final_episodes 1 --checkpoint_minutes 0.00001 "
        "--random_segment 16 --vqvae_share 0.7 --dream_context 2 --dynamics_lr_end 1e-4 "
        "--device cpu").split()
SELDOM = ("--checkpoint_minutes", "99")     # TINY saves after every update, this after every stage
RUN = "Breakout-smoke-s0"


def in_child(*arguments, at_event=lambda number: None, patch=lambda: None):
    """train.main in a forked child -> exit status, negative for a signal; all that it said.

    at_event: called before each event with its number, from 1. patch: called first, to break
    something.
    """
    def work():
        numbers = itertools.count(1)

        def counted(function):
            def wrapper(*args, **kwargs):
                at_event(next(numbers))
                return function(*args, **kwargs)
            return wrapper

        os.fsync, os.replace = counted(os.fsync), counted(os.replace)
        train.Run.add = counted(train.Run.add)
        train.ExperienceBuffer.add = counted(train.ExperienceBuffer.add)
        train.measure_rates = lambda config, n: dict.fromkeys(train.STAGES, 1.0)
        evaluate.progress_picture = lambda run: None                 # seconds each, and no state
        evaluate.world_model_picture = lambda run: torch.zeros(())
        evaluate.play_episodes = lambda m, game, seeds, **_: torch.rand(len(seeds)).tolist()
        patch()
        train.main([*map(str, arguments)])

    status, stdout, lines = forked(work)
    return status, "\n".join([stdout, *lines])


def resumed(folder, *flags):
    """Goes on with a run to its end, saving after each stage alone."""
    status, said = in_child("--resume", folder, *SELDOM, "--override", "checkpoint_minutes", *flags)
    assert status == 0, said
    return said


def the_error(status, said):
    """The only line of a run that the user must mend."""
    line, = [line for line in said.splitlines() if line.startswith("error:")]
    assert status == 1 and "Traceback" not in said, said
    return line


def same(a, b):
    """Bit for bit, through dicts, lists and tensors."""
    if isinstance(a, torch.Tensor):
        return (a.dtype, a.shape, a.numpy().tobytes()) == (b.dtype, b.shape, b.numpy().tobytes())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


CLOCKS = ("rates", "times", "config")       # wall-clock, and the folder's name: all else must agree


def outcome(folder):
    """What must not depend on kills: the final checkpoint without its clocks, and metrics.csv."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    return {k: v for k, v in state.items() if k not in CLOCKS}, (folder / "metrics.csv").read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The unbroken run's outcome, its folder and, in their order, copies of it that were taken at
    24 moments: what a kill just then would have left."""
    out = tmp_path_factory.mktemp("whole")

    def at_event(number):
        if number % 24 == 1:
            shutil.copytree(out / RUN, out / f"{number:03d}" / RUN)

    status, said = in_child(*TINY, "--out", out, at_event=at_event)
    assert status == 0, said
    state, metrics = outcome(out / RUN)
    assert state["iteration"] == 2 and len(metrics.splitlines()) == 3
    return (state, metrics), out / RUN, sorted(out.glob("*/" + RUN))


def position(folder):
    """Where a run goes on: round, stage, updates done."""
    state = evaluate.newest_checkpoint(folder)
    return state["iteration"], state["stage"], state["update"]


def test_killed_at_any_moment_and_resumed_is_bit_for_bit_the_same(whole):
    """From what is there at 24 moments, spread over all stages and the inside of saves, a run ends
    with the weights, optimiser states, random states and metrics of the unbroken run. (While
    nothing is written, in the game, one moment is as good as another.)"""
    (expected, _, copies), places, tried = whole, set(), set()
    assert len(copies) == 24
    for copied in copies:
        data = b"".join(path.read_bytes() for path in sorted(copied.iterdir()))
        if (digest := hashlib.sha256(data).digest()) in tried:
            continue
        tried.add(digest)
        folder = copied.with_name("again") / RUN
        shutil.copytree(copied, folder)
        if any(folder.glob("checkpoint*.pt")):
            places.add(position(folder))
        if (folder / "config.json").exists():
            resumed(folder)
        else:                                  # there is nothing to resume
            assert in_child(*TINY, "--out", folder.parent)[0] == 0
        assert same(outcome(folder), expected)
        shutil.rmtree(folder)
    assert {stage for _, stage, _ in places} >= {"collect", "warm_up", "world_model", "policy"}
    assert any(update > 0 for _, _, update in places)                # inside a stage too
    assert len(tried) > 15


def test_killed_and_resumed_with_memory_and_predicted_ends(tmp_path):
    """The same with --policy-memory, --predict-ends, a temperature, an even start."""
    def at_event(number):
        if number == 380:                      # of some 570
            shutil.copytree(tmp_path / RUN, tmp_path / "killed")

    status, said = in_child(*TINY, "--policy-memory", "--predict-ends", "--temperature", 1.2,
                            "--explore", 0.2, "--random-segment", 0, "--out", tmp_path,
                            at_event=at_event)
    assert status == 0, said
    expected = outcome(tmp_path / RUN)
    row = next(csv.DictReader(expected[1].splitlines()))
    assert float(row["end_loss"]) > 0 and row["end_recall"] != ""    # lives were lost
    resumed(tmp_path / "killed")
    assert same(outcome(tmp_path / "killed"), expected)


def test_killed_again_and_again(tmp_path, whole):
    """By SIGKILL every 150 events until nothing is left to do: still the same run."""
    def at_event(number):
        if number == 150:
            os.kill(os.getpid(), signal.SIGKILL)

    arguments, kills = (*TINY, "--out", tmp_path), 0
    while (status := in_child(*arguments, at_event=at_event)[0]) != 0:
        arguments, kills = ("--resume", tmp_path / RUN), kills + 1
        assert status == -signal.SIGKILL and kills < 40
    assert kills > 2
    assert same(outcome(tmp_path / RUN), whole[0])


def test_signals_save_and_say_how_to_go_on(tmp_path, whole):
    """Ctrl-C and SIGTERM: finish the update, save, print the command, exit 130 and 143."""
    for number, expected in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        def interrupt():
            signal.signal(number, signal.SIG_DFL)      # a shell's background job ignores Ctrl-C
            original = train.Run.add

            def add(run, parts, update):
                original(run, parts, update)
                if run.stage == "policy" and update == 1:
                    os.kill(os.getpid(), number)
            train.Run.add = add

        folder = tmp_path / str(number) / RUN
        status, said = in_child(*TINY, *SELDOM, "--out", folder.parent, patch=interrupt)
        assert status == expected and f"--resume {folder}" in said and "Traceback" not in said
        assert position(folder) == (0, "policy", 2)
        resumed(folder)
        assert same(outcome(folder), whole[0])


def test_damaged_files_never_give_a_wrong_run(tmp_path, whole, monkeypatch):
    """Bits flipped and files cut at 54 random places of checkpoint and shards: the run either goes
    on from the older checkpoint, with all that it holds, or is refused in one clear line."""
    expected, _, copies = whole
    copied = next(c for c in reversed(copies) if position(c)[:2] == (1, "policy"))
    folder, game = shutil.copytree(copied, tmp_path / RUN), AtariEnv("Breakout")
    monkeypatch.setattr(train, "AtariEnv", lambda *_, **__: game)    # made once: it takes long
    names = ("checkpoint.pt", "checkpoint.pt", "experience-01.npz", "experience-02.npz")
    files = {name: (folder / name).read_bytes() for name in names}
    older = evaluate.unsealed(folder / "checkpoint-previous.pt")
    experience = train.start(["--resume", str(folder)]).buffer.to_bytes(0, 180)
    rng, refused = random.Random(0), []
    for trial in range(54):
        name = rng.choice(names)
        data = bytearray(files[name])
        place = rng.randrange(len(data))
        if trial % 3 == 0:
            data = data[:place]
        else:
            data[place] ^= 1 << rng.randrange(8)
        (folder / name).write_bytes(data)
        try:
            run = train.start(["--resume", str(folder)])
        except ValueError as error:            # which train.main prints
            assert name in str(error) and "\n" not in str(error)
            refused.append(name)
        else:
            assert same(run.state(), older), (trial, name, place)
            assert run.buffer.to_bytes(0, 180) == experience
            run.lock.close()
        (folder / name).write_bytes(files[name])
    assert 5 < len(refused) < 49 and "checkpoint.pt" not in refused
    # And as commands, one of each.
    (folder / "experience-02.npz").write_bytes(b"")
    assert "experience-02.npz" in the_error(*in_child("--resume", folder))
    (folder / "experience-02.npz").write_bytes(files["experience-02.npz"])
    (folder / "checkpoint.pt").write_bytes(b"")
    assert "going on from checkpoint-previous.pt" in resumed(folder)
    assert same(outcome(folder), expected)


def test_a_checkpoint_of_other_types_is_refused_in_one_line(tmp_path, monkeypatch):
    """Sealed, but not what `state` writes: names, types and sizes are checked before any work."""
    monkeypatch.setattr(train, "measure_rates", lambda c, n: dict.fromkeys(train.STAGES, 1.0))
    given = vars(train.parse(TINY))
    run = train.Run(train.settings_from({k: given[k] for k in given if k not in
                                         ("resume", "override")}), tmp_path)
    for parameter in run.models.policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    run.models.optimizers["policy"].step()
    good, two = copy.deepcopy(run.state()), torch.ones(2)

    def first(state, part):
        optimizer = state["optimizers"]["policy"]
        return (optimizer["param_groups"] if part else optimizer["state"])[0]

    begun = {"stage": "warm_up", "shards": ["0"], "rows": [{"iteration": 1, "interactions": 120}],
             "times": [dict.fromkeys(train.TIMES, 1.0)]}
    run.restore(good | {"times": []})
    with pytest.raises(ValueError, match="cannot read"):         # what begun stands for is right
        run.restore(good | begun)
    for wrong in ({"update": 0.0}, {"iteration": False}, {"shards": ()}, {"shards": None},
                  begun | {"rows": [{}]}, begun | {"rows": [{"iteration": 10**400}]},
                  begun | {"times": [dict.fromkeys(train.TIMES, math.inf)]},
                  begun | {"times": 2 * begun["times"]}, begun | {"returns": [math.nan]},
                  {"iteration": 2, "rows": 2 * begun["rows"], "times": 2 * begun["times"],
                   "shards": ["0", "0"]}, {"rates": dict.fromkeys(train.STAGES, 10**400)},
                  *({"sums": {"entropy": v}} for v in (two.long(), two.to_sparse(), two * 1j))):
        with pytest.raises(train.UserError, match="does not fit its own settings"):
            run.restore(good | wrong)
    for part, name, value in ((1, "lr", None), (1, "lr", two), (0, "exp_avg", two.to_sparse()),
                              (0, "exp_avg_sq", first(good, 0)["exp_avg_sq"].to_sparse())):
        state = copy.deepcopy(good)
        first(state, part)[name] = value
        with pytest.raises(train.UserError, match="does not fit its own settings"):
            run.restore(state)
    state = copy.deepcopy(good)
    first(state, 1).update(betas=None, amsgrad=True, eps="x")    # not taken from there
    run.restore(state)
    assert same(run.state(), good)
    seen = ExperienceBuffer(120)
    seen.add(np.zeros((120, 96, 96), np.uint8), np.full(120, 4), *np.zeros((3, 120)))
    (tmp_path / "experience-01.npz").write_bytes(data := seen.to_bytes(0, 120))
    with pytest.raises(train.UserError, match="does not fit its own settings"):     # Breakout has 4
        run.restore(good | begun | {"shards": [hashlib.sha256(data).hexdigest()]})


def test_settings_of_other_types_or_of_no_machine_are_refused(tmp_path):
    """A checkpoint without settings, keys that are no names, numbers beyond all bounds."""
    (tmp_path / "checkpoint.pt").write_bytes(train.sealed({"schema": train.SCHEMA}))
    assert_main_refuses("no settings at all", train.main, "--resume", tmp_path)
    with pytest.raises(train.UserError, match="another version of train.py: 1, x"):
        evaluate.config_from({"x": 1, 1: 2}, {})
    for wrong in ({"ppo_updates": (10**400,) * 15}, {"scale": 1e300}, {"gamma": math.nan}):
        with pytest.raises(train.UserError, match="from 0 to 1e12"):
            train.check(train.Config(**wrong))
    for wrong in ({"vqvae_width": 1e9}, {"policy_width": 1e9}, {"hidden": 10**9}):
        with pytest.raises(train.UserError, match="GB of memory"):
            train.check(train.Config(**wrong))


def test_full_disk_keeps_the_old_checkpoint_and_goes_on(tmp_path, whole):
    """No space left during some saves: a warning, the old checkpoint stays whole, and the run ends
    as if nothing had been."""
    def fill_disk():
        original, calls = os.fsync, [0]

        def fsync(descriptor):
            calls[0] += 1
            if 20 <= calls[0] < 40:
                evaluate.unsealed(folder / "checkpoint.pt")      # whole, or it raises
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(descriptor)
        os.fsync = fsync

    folder = tmp_path / RUN
    status, said = in_child(*TINY, "--out", tmp_path, patch=fill_disk)
    assert status == 0 and "is full" in said and "Traceback" not in said, said
    assert same(outcome(folder), whole[0])
    assert not list(folder.glob("*.tmp"))


def test_nan_stops_the_run_and_spares_the_checkpoint(tmp_path):
    """A NaN in a loss: one line with stage, update and last good checkpoint, which has none."""
    def poison():
        original = train.Run.add

        def add(run, parts, update):
            if run.stage == "world_model" and update == 2:
                run.models.policy.critic.bias.data.fill_(math.nan)
                parts = parts | {"code_loss": torch.tensor(math.nan)}
            original(run, parts, update)
        train.Run.add = add

    error = the_error(*in_child(*TINY, "--out", tmp_path, patch=poison))
    assert "world_model" in error and "update 2" in error and "checkpoint.pt" in error
    state = evaluate.unsealed(tmp_path / RUN / "checkpoint.pt")
    assert all(t.isfinite().all() for net in state["networks"].values() for t in net.values())


def test_one_process_per_folder_and_honest_refusals(tmp_path, whole):
    """A second process, a changed setting, a missing shard: one line that says what to do."""
    folder = shutil.copytree(whole[1], tmp_path / RUN)

    def refused(*words, arguments=("--resume", folder), flags=()):
        error = the_error(*in_child(*arguments, *flags))
        assert all(word in error for word in words), error

    lock = atari.lock_folder(folder)                                 # this process is the first
    refused("another process")
    lock.close()
    assert in_child("--resume", folder, patch=lambda: setattr(               # nothing is missing
        shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000)))[0] == 0
    os.rename(folder / "lock", folder / "lock.tmp")
    os.mkfifo(folder / "lock")
    refused("lock", "not seekable")
    os.replace(folder / "lock.tmp", folder / "lock")
    refused("game", "Breakout", "Pong", flags=["--game", "Pong"])
    refused("gamma", "0.99", "0.5", flags=["--gamma", "0.5"])
    refused("--override final_episodes", flags=["--final_episodes", "2"])
    refused("gamma", flags=["--override", "gamma", "--gamma", "0.5"])
    refused("--resume", RUN, arguments=(*TINY, "--out", tmp_path))
    (folder / "experience-01.npz").unlink()
    refused("experience-01.npz")


# ----------------------------------------------------------------------------------------------
# Close to the machine's limit: the fast code against a straightforward one
# ----------------------------------------------------------------------------------------------
# `python test_all.py` measures one against the other, side by side. The tests below hold them to
# the same losses and gradients.


class Straightforward:
    """The same mathematics, written down as it comes, with the methods of train.Models: float32,
    torch.distributions for every draw and every likelihood, frames looked up sample by sample, each
    step's losses in the step, plain Adam. Works on copies of the networks of `models`."""

    def __init__(self, models):
        c = self.config = models.config
        self.device, self.to_device = models.device, models.to_device
        self.vqvae, self.dynamics, self.policy = map(
            copy.deepcopy, (models.vqvae, models.dynamics, models.policy))
        head = list(self.dynamics.reward_head.parameters())
        trunk = [p for n, p in self.dynamics.named_parameters() if not n.startswith("reward_head")]
        self.vqvae_adam = torch.optim.Adam(self.vqvae.parameters(), lr=c.vqvae_lr)
        self.dynamics_adam = torch.optim.Adam([
            {"params": trunk, "lr": c.dynamics_lr},
            {"params": head, "lr": c.reward_lr, "eps": 1e-8 * c.reward_weight}])
        self.policy_adam = torch.optim.Adam(self.policy.parameters(), lr=c.policy_lr, eps=1e-5)

    @staticmethod
    def draw(distribution):
        return distribution.sample()

    def acting(self):
        return contextlib.nullcontext()

    def observations(self, buffer, rows):
        batch = []
        for row in rows:
            frames = [buffer.frames[max(row - k, buffer.start[row])] for k in (3, 2, 1, 0)]
            batch.append(torch.tensor(np.stack(frames), dtype=torch.float32) / 255)
        return torch.stack(batch).to(self.device)                        # [B, 4, 96, 96]

    def encode_all(self, buffer):
        """Nothing is kept: every window is encoded again."""

    def starts(self, buffer, rows, codes=None):
        """Dreams begin with nothing remembered, as in `paper`."""
        return (self.observations(buffer, rows),)

    def windows(self, buffer, rows, codes=None):
        x = torch.stack([self.observations(buffer, window) for window in rows])
        actions, rewards, ends = (torch.tensor([[column[row] for row in window] for window in rows])
                                  for column in (buffer.actions, buffer.rewards, buffer.ends))
        return x, actions.long(), rewards, ends, ends

    def quantise(self, z_e):
        book = self.vqvae.codebook.codes
        vectors = z_e.permute(0, 2, 3, 1).reshape(-1, book.shape[1])                     # [N, D]
        one_hot = F.one_hot(torch.cdist(vectors, book).argmin(1), len(book)).float()     # [N, K]
        z_q = (one_hot @ book).view(len(z_e), 6, 6, -1).permute(0, 3, 1, 2)
        return vectors, one_hot, z_q

    def scalar(self, weight):
        assert not weight                                                # of the foreground: none

    def vqvae_update(self, x, weight=None):
        self.vqvae.train()
        z_e = self.vqvae.encoder(x)
        vectors, one_hot, z_q = self.quantise(z_e)
        self.vqvae.codebook.update(vectors.detach(), one_hot)
        logits = self.vqvae.decoder(z_e + (z_q - z_e).detach()).clamp(-15.9, 15.9)
        log_p = torch.distributions.ContinuousBernoulli(logits=logits).log_prob(x)
        loss = -log_p.sum((1, 2, 3)).mean() + 36 * math.log(one_hot.shape[1]) \
            + self.vqvae.commitment * (z_e - z_q.detach()).square().mean()
        self.vqvae_adam.zero_grad()
        loss.backward()
        self.vqvae_adam.step()
        self.vqvae.eval()
        return loss

    def dynamics_step(self, one_hot, action, state):
        """Codes as one-hot rows [B, 6, 6, K] -> p(z_{t+1}), p(r_t), state."""
        d = self.dynamics
        z = (one_hot.float() @ self.vqvae.codebook.codes).permute(0, 3, 1, 2)
        planes = F.one_hot(action, d.num_actions).float()[:, :, None, None].repeat(1, 1, 6, 6)
        first = d.cell1(torch.cat([z, planes], 1), state[0])
        second = d.cell2(torch.cat([first[0], planes], 1), state[1])
        y = torch.cat([second[0], planes], 1)
        code_p = torch.distributions.OneHotCategorical(logits=d.code_head(y).permute(0, 2, 3, 1))
        return code_p, torch.distributions.Categorical(logits=d.reward_head(y)), [first, second]

    def world_model_update(self, x, actions, rewards, ends, end_targets, context):
        B, L = ends.shape
        with torch.no_grad():
            z = self.quantise(self.vqvae.encoder(x.flatten(0, 1)))[1].view(B, L, 6, 6, -1)
        state, given, code_loss, reward_loss = self.dynamics.initial_state(B), z[:, 0], 0, 0
        for t in range(L - 1):
            code_p, reward_p, state = self.dynamics_step(given, actions[:, t], state)
            inside = 1 - ends[:, t].float()
            code_loss = code_loss - (code_p.log_prob(z[:, t + 1]).sum((1, 2)) * inside).sum()
            target = rewards[:, t].clamp(-1, 1).round().long() + 1
            reward_loss = reward_loss - reward_p.log_prob(target).mean() / (L - 1)
            given = z[:, t + 1].clone()
            if t + 1 >= context:
                drawn = self.draw(code_p)
                for b in range(B):
                    if not ends[b, t]:
                        given[b] = drawn[b]
            state = [[s * inside[:, None, None, None] for s in pair] for pair in state]
        loss = code_loss / (~ends[:, :-1]).sum() + self.config.reward_weight * reward_loss
        self.dynamics_adam.zero_grad()
        loss.backward()
        self.dynamics_adam.step()
        return loss

    def see(self, one_hot):
        """Codes as one-hot rows [B, 6, 6, K] -> the policy's p(a | z) and value."""
        logits, value = self.policy((one_hot @ self.vqvae.codebook.codes).permute(0, 3, 1, 2))
        return torch.distributions.Categorical(logits=logits), value

    def policy_update(self, x):
        c, rows = self.config, []
        with torch.no_grad():
            z = self.quantise(self.vqvae.encoder(x))[1].view(len(x), 6, 6, -1)
            state = self.dynamics.initial_state(len(x))
            for _ in range(c.dream_steps):
                p, value = self.see(z)
                action = self.draw(p)
                code_p, reward_p, state = self.dynamics_step(z, action, state)
                rows.append((z, action, p.log_prob(action), value, self.draw(reward_p) - 1.0))
                z = self.draw(code_p)
            advantage, following, advantages = 0, 0, []
            for _, _, _, value, reward in reversed(rows):
                advantage = reward + c.gamma * following - value + c.gamma * c.lam * advantage
                following = value
                advantages.insert(0, advantage)
        z, action, old_log_p, old_value = (torch.stack(column).flatten(0, 1)
                                           for column in list(zip(*rows))[:4])
        advantage = torch.stack(advantages).flatten()
        returns = advantage + old_value
        for _ in range(c.ppo_epochs):
            for i in torch.randperm(len(z)).split(c.minibatch):
                a = (advantage[i] - advantage[i].mean()) / (advantage[i].std() + 1e-8)
                p, value = self.see(z[i])
                ratio = torch.exp(p.log_prob(action[i]) - old_log_p[i])
                policy_loss = -torch.min(ratio * a, ratio.clamp(1 - c.clip, 1 + c.clip) * a).mean()
                clipped = old_value[i] + (value - old_value[i]).clamp(-0.1, 0.1)
                value_loss = torch.max((value - returns[i]) ** 2,
                                       (clipped - returns[i]) ** 2).mean() / 2
                loss = policy_loss + 0.5 * value_loss - c.entropy_coef * p.entropy().mean()
                self.policy_adam.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 0.5)
                self.policy_adam.step()
        return loss

    @torch.no_grad()
    def act(self, observations, temperature):
        x = torch.stack([torch.tensor(o, dtype=torch.float32) / 255 for o in observations])
        one_hot = self.quantise(self.vqvae.encoder(x.to(self.device)))[1].view(len(x), 6, 6, -1)
        logits = self.see(one_hot)[0].logits
        return self.draw(torch.distributions.Categorical(logits=logits / temperature)).numpy()


def written(save, *values, **arrays):
    """The bytes that np.save and its like write into a file."""
    data = io.BytesIO()
    save(data, *values, **arrays)
    return data.getvalue()


def noise(rows):
    """An ExperienceBuffer full of it."""
    rng, buffer = np.random.default_rng(0), ExperienceBuffer(rows)
    for start in range(0, rows, 400):
        n = min(400, rows - start)
        buffer.add(rng.integers(256, size=(n, 96, 96), dtype=np.uint8), 0, 0.0,
                   np.arange(n) == n - 1, False)
    return buffer


def both_ways(monkeypatch, **settings):
    """(models, straightforward, a buffer): the same weights, away from their even start; every draw
    is the most likely value."""
    torch.manual_seed(0)
    models, buffer = tiny_models(**settings), noise(60)
    buffer.actions[:], buffer.rewards[:] = np.arange(60) % M, np.arange(60) % 4 - 2.0
    buffer.frames //= np.arange(1, 61, dtype=np.uint8)[:, None, None]    # of every brightness
    with torch.no_grad():
        models.vqvae.train()
        for _ in range(20):                                              # batch norms settle
            z_e = models.vqvae.features(models.observations(buffer, np.arange(0, 60, 2)))
        models.vqvae.eval()
        vectors = z_e.permute(0, 2, 3, 1).flatten(0, 2)
        models.vqvae.codebook.codes.copy_(vectors[torch.randperm(len(vectors))[:128]])
        models.vqvae.decoder[-1].weight *= 5                             # pictures with contrast
        for block in models.vqvae.decoder[2:4]:
            torch.nn.init.normal_(block.conv2.weight, std=0.1)
        models.policy.actor.weight *= 300                                # decided,
        models.dynamics.reward_head.linear2.weight *= 30                 # and sure of its rewards
    straight = Straightforward(models)
    for module in ("dynamics", "train"):
        monkeypatch.setattr(f"{module}.sample", lambda logits, *_, **__: logits.argmax(1))

    def most_likely(p):
        best = p.logits.argmax(-1)
        one_hot = isinstance(p, torch.distributions.OneHotCategorical)
        return F.one_hot(best, p.logits.shape[-1]).float() if one_hot else best

    straight.draw = most_likely
    return models, straight, buffer


def assert_same_step(ours, reference, rtol=1e-3):
    """The same gradients, to a share of the largest in each tensor; the same weights after it."""
    for (name, p), q in zip(ours.named_parameters(), reference.parameters()):
        assert p.grad.abs().max() > 0, name
        bound = rtol * q.grad.abs().max().item()
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=bound, msg=name)
    for (name, p), q in zip(ours.named_buffers(), reference.buffers()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=name)


def test_vqvae_update_is_the_straightforward_one(monkeypatch):
    """Section 3.3: same loss, gradients, codebook and batch norms in the warm-up's update."""
    # So that the commitment's share of the gradients is as large as the likelihood's.
    models, straight, buffer = both_ways(monkeypatch)
    models.vqvae.commitment = straight.vqvae.commitment = 1000.0
    parts = models.vqvae_update(models.observations(buffer, np.arange(5, 17)))
    loss = straight.vqvae_update(straight.observations(buffer, range(5, 17)))
    ours = models.vqvae.commitment * parts["commitment"] - parts["elbo"]
    # torch's continuous Bernoulli loses digits where a logit is near 0.
    assert ours.item() == pytest.approx(loss.item(), rel=1e-4)
    assert_same_step(models.vqvae, straight.vqvae)


def test_world_model_update_is_the_straightforward_one(monkeypatch):
    """Section 3.4: same loss and gradients, with an episode's end in a window, fed by samples."""
    models, straight, buffer = both_ways(monkeypatch)
    buffer.terminated[[13, 33]] = True
    rows = np.array([[10], [30]]) + np.arange(7)
    parts = models.world_model_update(*models.windows(buffer, rows), 3)
    loss = straight.world_model_update(*straight.windows(buffer, rows), 3)
    ours = 36 * parts["code_loss"] + models.config.reward_weight * parts["reward_loss"]
    assert ours.item() == pytest.approx(loss.item(), rel=1e-5)
    assert_same_step(models.dynamics, straight.dynamics)


def test_policy_update_is_the_straightforward_one(monkeypatch):
    """Section 3.4: the same dream, the same gradients of PPO's last minibatch."""
    models, straight, buffer = both_ways(monkeypatch, dream_steps=6, minibatch=9)
    torch.manual_seed(1)
    parts = models.policy_update(*models.starts(buffer, np.arange(5), models.encode_all(buffer)))
    torch.manual_seed(1)
    straight.policy_update(*straight.starts(buffer, range(5)))
    assert parts["value_loss"] > 0 and parts["dream_return"] != 0
    assert_same_step(models.policy, straight.policy, rtol=1e-2)          # after 15 steps of Adam


def test_acting_is_the_straightforward_one(monkeypatch):
    """Eq. 8: the same actions on the same observations."""
    models, straight, buffer = both_ways(monkeypatch)
    x = buffer.stacked(np.arange(40))
    actions, _ = models.act(x, 1.5)
    assert np.array_equal(actions, straight.act(x, 1.5)) and len(set(actions)) > 1


# ----------------------------------------------------------------------------------------------
# The house itself
# ----------------------------------------------------------------------------------------------


def test_every_component_stands_alone(tmp_path):
    """A file alone in an empty folder imports; dynamics.py brings convlstm.py."""
    needs = {"atari": [], "vqvae": [], "convlstm": [], "ppo": [], "dynamics": ["convlstm"]}
    for name, others in needs.items():
        (tmp_path / name).mkdir()
        for file in (name, *others):
            shutil.copy(HERE / f"{file}.py", tmp_path / name)
    # One process for all: torch is slow to import. Each name is forgotten before the next.
    script = "import sys\n" + "".join(
        f"sys.path[0] = {str(tmp_path / name)!r}\nimport {name}\n"
        f"for n in {list(needs)!r}: sys.modules.pop(n, None)\n" for name in needs)
    status, _, lines = command("-c", script)
    assert status == 0, lines


def test_the_top_level_is_as_promised():
    """The files that the README lists, and nothing else."""
    listing = subprocess.run(["git", "ls-files"], cwd=HERE, capture_output=True, text=True)
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    names = {line.split("/")[0] for line in listing.stdout.splitlines()}
    assert {n for n in names if not n.startswith(".")} - {"results"} == {
        "README.md", "requirements.txt", "LICENSE", "vqvae.py", "convlstm.py", "dynamics.py",
        "ppo.py", "atari.py", "train.py", "evaluate.py", "test_all.py", "world_models_2018"}


def test_the_readme_tells_the_truth_about_the_code():
    """The README's map points at the right lines, its tables are complete, its counts are right."""
    text = (HERE / "README.md").read_text()
    places = re.findall(r"\[`([\w.]+)`\]\((\w+\.py)#L(\d+)\)", text)
    assert len(places) > 20
    for name, file, number in places:
        line = (HERE / file).read_text().splitlines()[int(number) - 1]
        assert re.search(rf"\b{name.split('.')[-1]}\b", line), (name, file, number, line)
    counts = re.findall(r"\| \[(\w+\.py)\]\(\1\) \| (\d+) \|", text)
    assert len(counts) == 8
    for file, count in counts:
        assert int(count) == len((HERE / file).read_text().splitlines()), file
    for column in train.METRICS:
        assert f"| `{column}` |" in text, column
    assert "@@" not in text


def test_no_line_is_longer_than_100_characters():
    """The house style: files that can be read side by side."""
    long = [f"{path.name}:{number}" for path in sorted(HERE.glob("*.py"))
            for number, line in enumerate(path.read_text().splitlines(), 1)
            if len(line) > 100]
    assert not long, f"{len(long)} long lines: {' '.join(long[:20])}"


def test_the_speed_comparison_runs(capsys):
    """python test_all.py, with tiny networks: a line for each stage, and what a run adds up to."""
    config = comparable("small", vqvae_width=1 / 16, hidden=4, policy_width=1 / 16, dreams=4,
                        dream_steps=3, warmup_batch=2, dynamics_batch=2, vqvae_batch=2, minibatch=8)
    compare_speed(config, rounds=1)
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line[:18].strip() for line in lines] == [
        "collect", "warm_up", "vqvae", "world_model", "policy", "evaluate", "whole run"]
    for line in lines:
        gflop, straight, *ours = map(float, re.findall(r"[\d.]+(?= )", line[18:]))
        assert ours and (min(straight, *ours) > 0 or line.startswith("whole")), line  # hours: 0


# ----------------------------------------------------------------------------------------------
# python test_all.py: how much faster?
# ----------------------------------------------------------------------------------------------


def comparable(preset, **settings):
    """The preset's settings without what `small` adds to the paper's VQ-VAE, to the beginning of
    dreams and to their end, which has no straightforward counterpart."""
    return train.settings_from({"preset": preset, "device": "cpu", "foreground": 0.0,
                                "predict_ends": False, "dream_context": 0} | settings)


def stage_jobs(config, models, buffer):
    """Work of each stage on random rows: {name: (units, function that does so many at once)}. Of
    collect a unit is a step of one environment, of evaluate one step of eight, else an update."""
    c, rng = config, np.random.default_rng(0)
    codes = torch.zeros(len(buffer), 6, 6, dtype=torch.uint8, device=models.device)

    def observations(n):
        return models.observations(buffer, rng.integers(len(buffer), size=n))

    def world_model():
        starts = rng.integers(len(buffer) - c.window, size=(c.dynamics_batch, 1))
        rows = starts + np.arange(c.window)
        models.world_model_update(*models.windows(buffer, rows), c.context)

    def act(environments, steps):
        with models.acting():
            for _ in range(steps):
                models.act(buffer.stacked(np.arange(environments)), 1.0)

    return {
        "collect": (20, lambda: act(1, 20)),
        "warm_up": (1, lambda: models.vqvae_update(observations(c.warmup_batch))),
        "vqvae": (1, lambda: models.vqvae_update(observations(c.vqvae_batch))),
        "world_model": (1, world_model),
        "policy": (1, lambda: models.policy_update(*models.starts(
            buffer, rng.integers(len(buffer), size=c.dreams), codes))),
        "evaluate": (10, lambda: act(8, 10))}


def seconds_of(job):
    begun = time.perf_counter()
    job()
    return time.perf_counter() - begun


def by_turns(jobs, rounds):
    """{way: (units, job)} -> units, {way: seconds per unit in the fastest of the rounds}: what
    other processes add is no property of the code. The first turn warms up."""
    measured = {way: [] for way in jobs}
    for _ in range(rounds + 1):
        for way, (units, job) in jobs.items():
            measured[way].append(seconds_of(job) / units)
    return units, {way: min(times[1:]) for way, times in measured.items()}


def matmul_rate(dtype):
    """GFLOP/s of a large matrix product: what this machine can do at best."""
    a, b = torch.randn(2, 2048, 2048).to(dtype)
    a @ b
    return 2 * 2048**3 / min(seconds_of(lambda: a @ b) for _ in range(5)) / 1e9


def whole_run(config, costs):
    """Of one call of each of stage_jobs -> of all rounds, whatever the cost is measured in. The
    emulator is left out, and that codes may be computed once: both are the same for all."""
    costs = costs | {"world_model": costs["world_model"] + costs["vqvae"] / config.vqvae_every,
                     "evaluate": costs["evaluate"] / 8 * 1500}           # steps of an episode
    return sum(costs[stage] * count for iteration in range(config.iterations)
               for stage, count in train.work(config, iteration).items())


def compare_speed(config, rounds):
    """Prints ms per unit of work of each stage: straightforward, ours in float32, ours in bfloat16,
    by turns. 18 actions, as in the paper's tables."""
    fp32 = train.Models(dataclasses.replace(config, bf16=False), 18)
    ways = {"straight": Straightforward(fp32), "float32": fp32}
    if train.Models(dataclasses.replace(config, bf16=True), 18).use_bf16:
        ways["bfloat16"] = train.Models(dataclasses.replace(config, bf16=True), 18)
    buffer = noise(2000)
    jobs = {way: stage_jobs(config, models, buffer) for way, models in ways.items()}
    rate = {way: matmul_rate(torch.bfloat16 if way == "bfloat16" else torch.float32)
            for way in ways}
    seconds = {way: {} for way in ways}
    print(f"{config.preset}, {torch.get_num_threads()} threads; matrix products: "
          + ", ".join(f"{way} {rate[way]:.0f} GFLOP/s" for way in list(ways)[1:]))
    print(f"{'stage':18s} {'GFLOP':>12s}" + "".join(f"{way:>12s}" for way in ways)
          + "   of matmul straight / ours")
    gflops = {}
    for stage in jobs["float32"]:
        with FlopCounterMode(display=False) as counter:
            jobs["float32"][stage][1]()
        units, fastest = by_turns({way: jobs[way][stage] for way in ways}, rounds)
        for way in ways:
            seconds[way][stage] = fastest[way]
        gflops[stage] = counter.get_total_flops() / units / 1e9
        print_row(stage, gflops[stage], {w: seconds[w][stage] for w in ways}, rate)
    whole = {way: whole_run(config, seconds[way]) for way in ways}
    print_row("whole run", whole_run(config, gflops), whole, rate, unit="h ")


def print_row(name, gflop, seconds, rate, unit="ms"):
    """seconds: of each way; the share of the matrix products' rate is the last way's."""
    scale, best = 1000 if unit == "ms" else 1 / 3600, list(seconds)[-1]
    share = gflop / seconds[best] / rate[best]
    print(f"{name:18s} {gflop:12.2f}" + "".join(f"{scale * s:12.1f}" for s in seconds.values())
          + f" {unit} {share:8.0%} {seconds['straight'] / seconds[best]:9.2f}", flush=True)


def compare_sizes(config, rounds):
    """Prints ms per unit of work of each stage with 12,800 and with 102,400 frames in the buffer:
    it should be the same. Also what is done once per epoch, shared out among its updates."""
    models, sizes = train.Models(config, 18), (12_800, 102_400)
    buffers = {size: noise(size) for size in sizes}
    jobs = {size: stage_jobs(config, models, buffers[size]) for size in sizes}
    for size in sizes:
        jobs[size] |= {
            "background": (1, functools.partial(models.find_background, buffers[size])),
            "an epoch's windows": (
                batches_per_epoch(size, config.window, config.dynamics_batch), functools.partial(
                    buffers[size].epoch, config.window, config.dynamics_batch,
                    np.random.default_rng(0)))}
    print("\nframes in the buffer" + "".join(f"{size:12,d}" for size in sizes) + "     ratio")
    for stage in jobs[sizes[0]]:
        few, many = (1000 * s for s in by_turns({size: jobs[size][stage] for size in sizes},
                                                rounds)[1].values())
        print(f"{stage:20s}{few:12.4f}{many:12.4f} ms {many / few:6.2f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measures the code against a straightforward "
                                                 "version. (The tests: python -m pytest.)")
    parser.add_argument("--preset", choices=("paper", "small"), default="paper")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each, by turns")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = comparable(arguments.preset)
    train.keep_freed_memory()                                            # for all alike
    compare_speed(config, arguments.rounds)
    compare_sizes(config, arguments.rounds)
