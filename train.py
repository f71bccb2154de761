"""The whole algorithm (Section 3.4): collect, warm up, world model, policy in dreams, evaluate.

    python train.py --game Freeway                   # paper preset on CUDA, small preset elsewhere
    python train.py --game Pong --preset smoke       # every stage once or twice, in two minutes
    python train.py --resume runs/Freeway-small-s0   # goes on where a run was stopped or killed

Read from the top: the settings; the loop of the paper (`train`); its five stages in the order in
which they run; the three networks and one update of each (`Models`). Below the line *what every
long run needs* stands the rest: speed, the clock, checkpoints, the command line.

    collect       a_t ~ policy (round 1: uniformly random)        real steps -> buffer
    warm_up       round 1 only: the VQ-VAE alone, x_t -> z_t -> x_t
    world_model   dynamics (z_t, a_t, h_{t-1}) -> z_{t+1}, r_t    on windows of the buffer;
                  the VQ-VAE goes on learning, slowed down
    policy        dreams from real moments, PPO on what was dreamed, and on nothing else
    evaluate      whole real episodes, from which nothing learns

All randomness follows from `seed`: numpy generators, each a function of (seed, round, stage, epoch
or update) alone, draw batches and seed the emulator; torch's global generator, whose state is in
the checkpoint, draws the rest. So a run that was killed ends bit for bit as one that never was.

Dimension key:  B batch   L = 11 observations in a window   T = 50 dreamed steps   K = 128 codes
                M actions   N rows of the buffer
"""
import signal
if __name__ == "__main__":                      # Ctrl-C while torch is still being imported
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import ctypes
import dataclasses
import errno
import functools
import hashlib
import io
import itertools
import json
import os
import pathlib
import shlex
import shutil
import sys
import time

import numpy as np
import torch
from torch.utils._pytree import tree_flatten, tree_map_only
from tqdm import tqdm

from atari import (AtariEnv, ExperienceBuffer, batches_per_epoch, canonical_name, held_at_random,
                   lock_folder, random_play, read_regular, write_atomically)
from dynamics import Dynamics, dream, forget, imagine, policy_input, sample
from ppo import ActorCritic, ppo_update
from vqvae import VQVAE, is_foreground

# --------------------------------------------------------------------------------------------------
# Settings
# --------------------------------------------------------------------------------------------------


def setting(default, text):
    """A field with its help. Sources: "paper 3.4" its section, "released" the authors' code."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass
class Config:
    """Every setting of a run; the defaults are the `paper` preset.
    Each field is a flag of the same name.
    """

    game: str = setting("Freeway", "Atari game as in the paper's tables, e.g. Pong or BankHeist")
    preset: str = setting("paper", "paper (default on CUDA): the paper's size; small (default "
                          "elsewhere): 2 CPU cores; smoke: 2 minutes")
    seed: int = setting(0, "seed of all randomness, below 2**31")
    device: str = setting("cpu", "torch device: cuda (default where it is there) or cpu")
    out: str = setting("runs", "folder in which the run's own folder is made")
    scale: float = setting(1.0, "multiplies all numbers of updates: more time, or less (ours)")
    checkpoint_minutes: float = setting(4.0, "save at least this often: no more work can be lost")
    bf16: bool = setting(True, "bfloat16 if the hardware computes in it (ours: same sizes, faster)")
    compile: bool = setting(False, "fuse kernels of dynamics update and dream step (ours: faster)")

    # Real experience
    iterations: int = setting(15, "rounds of collect, world model, policy (paper 3.4)")
    first_interactions: int = setting(12_800, "4-frame steps in round 1, random policy (paper 3.4)")
    interactions: int = setting(6_400, "steps in every later round (paper 3.4)")
    random_segment: int = setting(0, "round 1: new odds of actions every n steps, if n (ours)")
    collect_temperature: float = setting(1.5, "softmax temperature when collecting (released)")
    explore: float = setting(0.0, "collecting: chance of a random action, held 2-16 steps (ours)")

    # Observation model (Section 3.3, "Latent Representations")
    vqvae_width: float = setting(1.0, "channels of encoder and decoder, times (paper, Table 3)")
    commitment: float = setting(0.25, "weight of the commitment loss (released)")
    vqvae_lr: float = setting(1e-4, "Adam's learning rate after the warm-up (released)")
    warmup_lr: float = setting(1e-3, "learning rate in the warm-up, 'higher' (paper 3.4; released)")
    warmup_lr_end: float = setting(1e-3, "warm-up's learning rate falls to this, linearly (ours)")
    warmup_epochs: float = setting(50, "passes over round 1's data, VQ-VAE alone (paper 3.4)")
    warmup_batch: int = setting(40, "observations per warm-up update (released)")
    foreground: float = setting(0.0, "extra weight of foreground pixels, a tenth at the end (ours)")
    vqvae_every: int = setting(3, "after the warm-up, VQ-VAE update in every n-th step (paper 3.4)")
    vqvae_share: float = setting(1.0, "first share of a round in which the VQ-VAE learns (ours)")
    vqvae_batch: int = setting(40, "observations per such update, of all experience (released)")

    # Dynamics (Section 3.2-3.3)
    hidden: int = setting(128, "channels of each ConvLSTM cell (paper, Table 3)")
    dynamics_lr: float = setting(5e-4, "Adam's learning rate (released)")
    dynamics_lr_end: float = setting(5e-4, "falls to this in each round, linearly; later rounds "
                                     "start nearer to it (ours)")
    reward_lr: float = setting(1e-3, "of the heads for rewards and ends, 'higher' (paper 3.4; "
                               "released); falls to this * dynamics_lr_end / dynamics_lr (ours)")
    reward_weight: float = setting(1e-6, "weight of the reward loss, tiny (paper 3.4; released)")
    dynamics_batch: int = setting(4, "windows per update (released)")
    window: int = setting(11, "observations per window: 10 predictions (released)")
    context: int = setting(4, "inputs that are true codes; then the model's samples (released)")
    teacher: float = setting(0.0, "first share of a round's updates with all inputs true (ours)")
    predict_ends: bool = setting(False, "a third head ends dreams where the game or a life ends "
                                 "(paper 5; Ha & Schmidhuber 4.1)")
    world_model_epochs: tuple = setting(
        (140, 32, 24, 20, 16, 14, 12, 11, 10, 9, 8, 8, 7, 7, 6), "passes in each round (released)")

    # Policy (Section 3.3, "Policy", and 3.4)
    policy_width: float = setting(1.0, "hidden units, times (paper, Table 3)")
    dreams: int = setting(16, "dreams side by side (released)")
    dream_steps: int = setting(50, "steps until every dream ends (paper 3.4)")
    dream_context: int = setting(0, "real steps the dynamics has seen when a dream begins (ours)")
    temperature: float = setting(1.0, "of all codes drawn by the model (Ha & Schmidhuber, Table 2)")
    policy_memory: bool = setting(False, "the policy also sees h of the second cell (paper, Eq. 5)")
    ppo_updates: tuple = setting(
        (1000,) * 7 + (2000,) + (1000,) * 3 + (2000,) + (1000,) * 2 + (3000,),
        "rollouts and PPO updates in each round (released)")
    policy_lr: float = setting(2.5e-4, "Adam's learning rate (released)")
    ppo_epochs: int = setting(4, "passes over each rollout (released)")
    minibatch: int = setting(256, "samples per gradient step (released)")
    gamma: float = setting(0.99, "discount (paper 4)")
    lam: float = setting(0.95, "lambda of GAE (released)")
    clip: float = setting(0.1, "clip range of the probability ratio (released)")
    entropy_coef: float = setting(0.01, "weight of the entropy bonus (released)")

    # Evaluation: whole real episodes, never trained on
    eval_episodes: int = setting(8, "episodes after each round (ours)")
    final_episodes: int = setting(32, "episodes after the last round (released)")

    def all_interactions(self):
        """12,800 + 14 x 6,400 = 102,400 in the paper."""
        return self.first_interactions + self.interactions * (self.iterations - 1)


PRESETS = {
    "paper": {},
    "small": dict(
        random_segment=128, explore=0.03,
        vqvae_width=0.5, commitment=50, warmup_epochs=7, warmup_batch=12, warmup_lr_end=1e-4,
        foreground=40, vqvae_every=1, vqvae_share=0.15, hidden=32, dynamics_batch=16,
        dynamics_lr=3e-3, dynamics_lr_end=2e-4, teacher=0.5, predict_ends=True, world_model_epochs=(
            33, 4.62, 3.44, 2.75, 2.31, 1.94, 1.72, 1.53, 1.38, 1.25, 1.15, 1.06, 0.98, 0.92, 0.86),
        policy_width=0.25, dreams=64, dream_context=3, temperature=0.5,
        ppo_updates=(100,) * 15, policy_lr=4e-4, minibatch=800, eval_episodes=4),
    "smoke": dict(
        iterations=2, first_interactions=400, interactions=200,
        vqvae_width=0.25, warmup_epochs=6, warmup_batch=12, warmup_lr_end=1e-4, foreground=40,
        vqvae_batch=8, hidden=16, world_model_epochs=(2, 1.5), policy_width=0.25, dreams=8,
        ppo_updates=(3, 3), eval_episodes=1, final_episodes=1),
}


# --------------------------------------------------------------------------------------------------
# The algorithm (Section 3.4, "Iterative Training")
# --------------------------------------------------------------------------------------------------


def train(run):
    """15 rounds, each with more real experience than the one before; the networks are never reset.

    `run.do` skips what a resumed run has behind it, books the figures of a stage and saves.
    """
    from evaluate import report                     # evaluate.py imports this file
    for iteration in run.rounds():
        run.do(collect)                             # 12,800 steps at first, then 6,400 a round
        if iteration == 0:
            run.do(warm_up)                         # the VQ-VAE alone, at a higher rate
        run.do(learn_world_model)                   # the dynamics, and the VQ-VAE, slowed down
        run.do(learn_policy)                        # PPO, only in dreams
        run.do(evaluate)                            # whole real episodes, for us to see
        report(run)


def work(config, iteration):
    """How much each stage does in one round: steps, updates, updates, updates, episodes."""
    c, first, last = config, iteration == 0, iteration == config.iterations - 1
    rows = c.first_interactions + iteration * c.interactions
    per_epoch = batches_per_epoch(rows, c.window, c.dynamics_batch)     # windows side by side
    return {
        "collect": c.first_interactions if first else c.interactions,
        "warm_up": round(c.scale * c.warmup_epochs * (c.first_interactions // c.warmup_batch))
        if first else 0,
        "world_model": round(c.scale * c.world_model_epochs[iteration] * per_epoch),
        "policy": round(c.scale * c.ppo_updates[iteration]),
        "evaluate": c.final_episodes if last else c.eval_episodes,
    }


def falling(start, end, done):
    """From `start` to `end` along a straight line, done in [0, 1]."""
    return start + (end - start) * done


def collect(run):
    """Real experience: uniformly random actions in the first round, then those of the policy as the
    dreams left it, drawn at a higher temperature.

    Each round starts with a new episode and cuts the last one (truncated): no state of the emulator
    has to outlive a round.
    """
    c, env, buffer, rng = run.config, run.env, run.buffer, run.numpy_rng()
    begin, steps = len(buffer), work(c, run.iteration)["collect"]
    frame = env.reset(seed=int(rng.integers(2**31)))
    stack, score, returns = np.stack([frame] * 4), 0.0, []
    state = None                                    # what the policy remembers, with policy_memory
    # Round 1: uniformly random, or with changing odds. Later: None, or a random action to be held.
    at_random = (random_play(env.num_actions, rng, c.random_segment) if run.iteration == 0
                 else held_at_random(env.num_actions, rng, c.explore))
    with run.models.acting():
        for step in run.updates(steps, saving=False):
            action = next(at_random)                    # None: the policy's turn
            if run.iteration > 0:
                instead = None if action is None else np.array([action])
                actions, state = run.models.act(stack[None], c.collect_temperature, state, instead)
                action = int(actions[0])
            lives = env.lives
            next_frame, reward, terminated, truncated = env.step(action)
            buffer.add(frame, action, reward, terminated, truncated or step == steps - 1,
                       env.lives < lives)
            score += reward
            if terminated or truncated:
                returns.append(score)
                frame, score, state = env.reset(), 0.0, None
                stack = np.stack([frame] * 4)
            else:
                frame = next_frame
                stack = np.concatenate([stack[1:], frame[None]])
    rewarded = np.mean(buffer.rewards[begin:len(buffer)] != 0)
    figures = {"collect_episodes": len(returns), "collect_rewards": rewarded}
    return figures | ({"collect_return": np.mean(returns)} if returns else {})


def warm_up(run):
    """"Warming Up Latent Representations": the VQ-VAE alone, for 50 epochs over the first data, at
    a higher learning rate, so that the dynamics has something to predict.
    """
    c, models, buffer, order = run.config, run.models, run.buffer, None
    models.find_background(buffer)
    if run.update == 0:                             # not resumed
        models.vqvae.start_at_brightness(models.background.float().mean() / 255)
    per_epoch, total = len(buffer) // c.warmup_batch, work(c, run.iteration)["warm_up"]
    for update in run.updates(total):
        epoch, batch = divmod(update, per_epoch)
        if batch == 0 or order is None:             # None: resumed in the middle of an epoch
            order = run.numpy_rng(epoch).permutation(len(buffer))
        rows = order[batch * c.warmup_batch:(batch + 1) * c.warmup_batch]
        # The learning rate falls all the way; the foreground's weight holds for half, then falls.
        done = update / total
        models.set_rates("vqvae", falling(c.warmup_lr, c.warmup_lr_end, done))
        weight = c.foreground * 0.1 ** min(max((done - 0.5) / 0.4, 0), 1)
        run.add(models.vqvae_update(models.observations(buffer, rows), models.scalar(weight)),
                update)


def learn_world_model(run):
    """Dynamics on windows of real experience; the VQ-VAE, slowed down, in every third step
    (vqvae_every; "Fixed Representation Learning": the targets of the dynamics move with it).

    After vqvae_share of a round the VQ-VAE stands still, and all codes are computed once.
    """
    c, models, buffer, order = run.config, run.models, run.buffer, None
    run.codes = None                                # the VQ-VAE is about to change
    models.find_background(buffer)
    models.set_rates("vqvae", c.vqvae_lr)
    total = work(c, run.iteration)["world_model"]
    per_epoch = batches_per_epoch(len(buffer), c.window, c.dynamics_batch)
    # The learning rates fall within each round; the dynamics' starts lower from round to round.
    first_lr = c.dynamics_lr_end + (c.dynamics_lr - c.dynamics_lr_end) / (run.iteration + 1)**0.5
    reward_lr_end = c.reward_lr * (c.dynamics_lr_end / c.dynamics_lr)
    for update in run.updates(total):
        done = update / total
        epoch, batch = divmod(update, per_epoch)
        if batch == 0 or order is None:
            order = buffer.epoch(c.window, c.dynamics_batch, run.numpy_rng(epoch))
        rows = order[batch]                                              # [B, L]
        vqvae_learns = done < c.vqvae_share
        codes = None if vqvae_learns else run.all_codes()
        if vqvae_learns and update % c.vqvae_every == c.vqvae_every - 1:
            some = run.numpy_rng(epoch, batch).integers(len(buffer), size=c.vqvae_batch)
            run.add(models.vqvae_update(models.observations(buffer, some),
                                        models.scalar(0.1 * c.foreground)), update)
        models.set_rates("dynamics", falling(first_lr, c.dynamics_lr_end, done),
                         falling(c.reward_lr, reward_lr_end, done))
        context = c.window if done < c.teacher else c.context
        run.add(models.world_model_update(*models.windows(buffer, rows, codes), context), update)
    from evaluate import world_model_picture
    figures = {"foreground_error": world_model_picture(run)}
    for name, of in (("end_precision", "end_predicted"), ("end_recall", "end_true")):
        if of in run.sums and run.sums[of][0] > 0:
            figures[name] = run.sums["end_right"][0] / run.sums[of][0]
    return figures


def learn_policy(run):
    """PPO inside the dream, and nowhere else. Each update dreams anew, from real moments drawn at
    random from all that was collected ("randomly selecting the initial observation").
    """
    c, models, buffer = run.config, run.models, run.buffer
    codes = run.all_codes()                         # the VQ-VAE stands still by now
    for update in run.updates(work(c, run.iteration)["policy"]):
        rows = run.numpy_rng(update).integers(len(buffer), size=c.dreams)
        run.add(models.policy_update(*models.starts(buffer, rows, codes)), update)


def evaluate(run):
    """The policy in the real game: whole episodes that nothing learns from, eight side by side."""
    from evaluate import play_episodes
    c, returns = run.config, run.returns
    episodes, group = work(c, run.iteration)["evaluate"], 8
    for first in run.updates(episodes, group):
        seeds = run.numpy_rng(first).integers(2**31, size=min(group, episodes - first)).tolist()
        with run.other_dice(seeds[0]):
            scores = play_episodes(run.models, c.game, seeds, temperature=1.0,     # (released)
                                   stopped=lambda: run.stop_signal, label=run.label())
        if scores is None:
            run.leave()                             # the group is played again
        returns += scores
    return {} if not episodes else {
        "real_return": np.mean(returns), "real_std": np.std(returns),
        "real_median": np.median(returns), "real_best": np.max(returns), "real_episodes": episodes}


# --------------------------------------------------------------------------------------------------
# The three networks and one update of each. No look at a value in here: a GPU never waits
# --------------------------------------------------------------------------------------------------


def replayed(update):
    """A method of Models that on CUDA is recorded and then replayed as a whole (`Replayed`)."""
    @functools.wraps(update)
    def launch(models, *arguments):
        if not models.graphs:
            return update(models, *arguments)
        if update.__name__ not in models.recorded:
            models.recorded[update.__name__] = Replayed(functools.partial(update, models))
        return models.recorded[update.__name__](*arguments)
    return launch


class Models:
    """The three networks and their optimisers on one device."""

    def __init__(self, config, num_actions):
        self.config, self.device = config, torch.device(config.device)
        self.use_bf16 = config.bf16 and (       # emulated it would be slower than float32
            torch.cuda.is_bf16_supported(including_emulation=False) if self.device.type == "cuda"
            else self.device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())
        with self.device:
            self.vqvae = VQVAE(width=config.vqvae_width, commitment=config.commitment)
            self.dynamics = Dynamics(num_actions, hidden=config.hidden,
                                     predict_ends=config.predict_ends)
            self.policy = ActorCritic(num_actions, width=config.policy_width,
                                      code_dim=32 + config.hidden * config.policy_memory)
            # What the game looks like without what moves, for `foreground`.
            self.background = torch.zeros(96, 96, dtype=torch.uint8)
        self.embed = self.vqvae.embed           # codes -> what dynamics and policy see of them
        self.vqvae.eval()                       # train() only around its own updates: batch norms
        self.acting = functools.partial(acting, self)       # a context that makes `act` faster
        self.graphs, self.recorded = self.device.type == "cuda", {}
        self.dynamics_loss, self.imagine = self.dynamics.loss, imagine
        if config.compile:
            self.dynamics_loss = torch.compile(self.dynamics.loss, fullgraph=True, dynamic=False)
            self.imagine = torch.compile(imagine, fullgraph=True, dynamic=False)
        # "Reward Loss": scaled down by reward_weight for the trunk's sake, and a higher learning
        # rate for the heads. Adam divides the scale out again, if the heads' eps shrinks with it.
        heads, trunk = [], []                   # the head for codes is of the trunk
        for name, p in self.dynamics.named_parameters():
            (heads if name.startswith(("reward_head.", "end_head.")) else trunk).append(p)
        fast = dict(fused=self.device.type in ("cpu", "cuda"), capturable=self.graphs)
        self.optimizers = {
            "vqvae": torch.optim.Adam(self.vqvae.parameters(), lr=config.vqvae_lr, **fast),
            "dynamics": torch.optim.Adam([
                {"params": trunk, "lr": config.dynamics_lr},
                {"params": heads, "lr": config.reward_lr, "eps": 1e-8 * config.reward_weight}],
                **fast),
            # eps as in PPO's reference code: with 1e-8 Adam's first steps, all of full size, can
            # throw the critic off and with it, through the shared trunk, the policy.
            "policy": torch.optim.Adam(self.policy.parameters(), lr=config.policy_lr, eps=1e-5,
                                       **fast),
        }
        if self.graphs:                         # a number would be a constant in a recorded update
            for group in itertools.chain(*(o.param_groups for o in self.optimizers.values())):
                group["lr"] = torch.tensor(group["lr"], device=self.device)

    def networks(self):
        return {"vqvae": self.vqvae, "dynamics": self.dynamics, "policy": self.policy}

    def step(self, name, loss):
        self.optimizers[name].zero_grad()
        loss.backward()
        self.optimizers[name].step()

    @replayed
    def vqvae_update(self, x, weight=None):
        """One gradient step of the VQ-VAE on observations uint8 [B, 4, 96, 96] -> its loss's parts.
        weight: extra weight of foreground pixels, a scalar tensor, or None.
        """
        if weight is not None:
            weight = 1 + weight * is_foreground(x, self.background)
        self.vqvae.train()
        with self.autocast():
            loss, parts = self.vqvae.loss(x, weight)
        self.step("vqvae", loss)
        self.vqvae.eval()
        return parts

    @replayed
    def world_model_update(self, x, actions, rewards, ends, end_targets, context):
        """One gradient step of the dynamics on windows (`windows`) -> parts of its loss. The VQ-VAE
        learns nothing from it: codes are integers, and the codebook moves by averages alone.

        x uint8 [B, L, 4, 96, 96] or, where they are known, its codes int64 [B, L, 6, 6];
        actions int64, rewards float [B, L];
        ends bool [B, L]: another episode follows; end_targets bool [B, L]: a game or a life was
        lost, what predict_ends is to predict, or None;
        context: so many inputs are true, the others the model's own samples.
        """
        with self.autocast():
            codes = x
            if x.ndim == 5:
                codes = self.vqvae.encode(x.flatten(0, 1)).unflatten(0, x.shape[:2])
            loss, parts = self.dynamics_loss(
                codes, actions, rewards, ends, self.embed, context, self.config.reward_weight,
                end_targets, self.config.temperature)
        self.step("dynamics", loss)
        return parts

    @replayed
    def policy_update(self, codes, state=None):
        """Dreams from codes int64 [B, 6, 6], with what the dynamics remembers there (None:
        nothing), T steps, where with predict_ends another dream begins when the dynamics ends one;
        then PPO on what was dreamed -> parts.
        """
        c = self.config
        with self.autocast():
            rollout = dream(self.dynamics, self.embed, self.policy, codes, c.dream_steps,
                            c.temperature, memory=c.policy_memory, start_state=state,
                            step=self.imagine)
            T, B = rollout["actions"].shape
            observations = self.embed(rollout["codes"].flatten(0, 1)).unflatten(0, (T, B))
            if c.policy_memory:
                observations = torch.cat([observations, rollout["memory"]], 2)
        with self.autocast(cache=False):
            parts = ppo_update(self.policy, self.optimizers["policy"], observations, rollout,
                               rollout["last_value"], c.gamma, c.lam, c.ppo_epochs, c.minibatch,
                               clip=c.clip, entropy_coef=c.entropy_coef)
        return parts | {"dream_return": rollout["rewards"].sum(0).mean()}

    @torch.no_grad()
    def act(self, observations, temperature, state=None, instead=None):
        """Observations uint8 numpy [B, 4, 96, 96] -> (actions numpy int64 [B], state),
        sampled (Eq. 2: z, then a; with policy_memory Eq. 5). Best inside `acting()`.

        state: of the dynamics after the step before, as it was returned; None at the first step of
        an episode, and always without policy_memory.
        instead: int64 numpy [B], actions to take instead of the policy's.
        """
        if instead is not None:
            if not self.config.policy_memory:
                return instead, state               # nothing to see, nothing to remember
            instead = self.to_device(instead)
        actions, state = self.choose(self.to_device(observations), temperature, state, instead)
        return actions.cpu().numpy(), state

    @replayed
    def choose(self, observations, temperature, state, actions):
        """act, on the device."""
        memory = self.config.policy_memory
        with self.autocast():
            z = self.embed(self.vqvae.encode(observations))
            if memory and state is None:
                state = self.dynamics.initial_state(len(z))
            if actions is None:
                actions = sample(self.policy(policy_input(z, state, memory))[0], temperature)
            if memory:
                state = self.dynamics(z, actions, state)[2]
        return actions, state

    # ---- from the buffer to the device

    def observations(self, buffer, rows):
        """Rows of the buffer, int of any shape [..] -> observations uint8 [.., 4, 96, 96]."""
        return self.to_device(buffer.stacked(rows))

    def windows(self, buffer, rows, codes=None):
        """Rows int [B, L] -> what world_model_update wants: x, actions, rewards, ends,
        end_targets; x are codes instead of observations if those of the whole buffer are given.
        """
        terminated, end_targets = buffer.terminated[rows], None
        if self.config.predict_ends:
            end_targets = self.to_device(terminated | buffer.lost[rows])
        return (self.observations(buffer, rows) if codes is None
                else codes[self.to_device(rows)].long(),
                self.to_device(buffer.actions[rows].astype(np.int64)),
                self.to_device(buffer.rewards[rows]),
                self.to_device(terminated | buffer.truncated[rows]), end_targets)

    @torch.no_grad()
    def starts(self, buffer, rows, codes):
        """What a dream begins with: the codes of rows, int numpy [B], and the dynamics' state after
        the `dream_context` real steps that lead there (fewer where the episode is younger; none in
        the paper) -> int64 [B, 6, 6], state. codes: those of the whole buffer (`encode_all`).
        """
        state = self.dynamics.initial_state(len(rows))
        for back in range(self.config.dream_context, 0, -1):
            before = np.maximum(rows - back, 0)
            z = codes[self.to_device(before)].long()
            actions = self.to_device(buffer.actions[before].astype(np.int64))
            with self.autocast():
                _, _, state = self.dynamics(self.embed(z), actions, state)
            # What was seen of another episode is forgotten.
            state = forget(state, self.to_device(rows - back < buffer.start[rows]))
        return codes[self.to_device(rows)].long(), state

    def encode_all(self, buffer):
        """Codes of all that was collected, uint8 [N, 6, 6]."""
        parts = np.array_split(np.arange(len(buffer)), -(-len(buffer) // 256))
        with self.autocast():
            return torch.cat([self.vqvae.encode(self.observations(buffer, rows)).to(torch.uint8)
                              for rows in parts])

    def find_background(self, buffer):
        """Each pixel's median over some 800 frames of the buffer. In place, where a recorded update
        reads it.
        """
        frames = self.to_device(buffer.some_frames())
        self.background.copy_(frames.median(0).values)

    # ---- numbers, on the device

    def scalar(self, weight):
        """A weight of the foreground as a tensor; None for 0."""
        return torch.full((), weight, device=self.device) if weight else None

    def set_rates(self, name, *rates):
        """Learning rates of an optimiser's parameter groups."""
        for group, rate in zip(self.optimizers[name].param_groups, rates):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def to_device(self, array):
        """numpy -> device. Frames travel as bytes; pinned memory needs no waiting."""
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def autocast(self, cache=True):
        """bfloat16 where it is fast. The cache keeps the cast weights until the context ends: it
        must be off where weights change inside, or later steps would go on with the old ones.
        """
        if self.use_bf16:
            return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=cache)
        return contextlib.nullcontext()


# ==================================================================================================
# From here on: what every long run needs
# ==================================================================================================


class Replayed:
    """A function of tensors, recorded as a CUDA graph and then replayed: an update is thousands of
    small kernels, and to launch one costs the CPU more than the GPU needs to compute it.

    It reads and writes the same memory each time, and what was not a tensor is a constant in it:
    the function may depend on its arguments, on memory that stays where it is (weights, optimiser
    state) and on torch's generator. Other shapes or numbers get a graph of their own. The first
    call just computes, which creates what is created once; the second records and replays.
    """

    def __init__(self, function):
        self.function, self.graphs = function, {}

    def __call__(self, *arguments):
        given, structure = tree_flatten(arguments)
        key = str(structure), *((a.shape, a.dtype) if isinstance(a, torch.Tensor) else a
                                for a in given)
        if key not in self.graphs:
            self.graphs[key] = None
            stream = torch.cuda.Stream()            # CUDA wants a side stream before a recording
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                results = self.function(*arguments)
            torch.cuda.current_stream().wait_stream(stream)
            return results
        if self.graphs[key] is None:
            memory = tree_map_only(torch.Tensor, torch.clone, arguments)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                results = self.function(*memory)
            self.graphs[key] = graph, tree_flatten(memory)[0], results
        graph, memory, results = self.graphs[key]
        for old, new in zip(memory, given):
            if isinstance(new, torch.Tensor):
                old.copy_(new)
        graph.replay()
        return tree_map_only(torch.Tensor, torch.clone, results)


@contextlib.contextmanager
def acting(models):
    """Casts the weights once for all, which else costs an observation as much as its arithmetic;
    below the paper's width keeps the CPU to one thread: there is too little work to share."""
    threads = torch.get_num_threads()
    if models.config.vqvae_width < 1:
        torch.set_num_threads(1)
    try:
        # A replayed graph casts them itself: it must not read copies that are gone later.
        with contextlib.nullcontext() if models.graphs else models.autocast():
            yield
    finally:
        torch.set_num_threads(threads)


def keep_freed_memory():
    """glibc gives large freed blocks back to the system, and each update would have it clear the
    same pages anew: 7 to 11 % of an update on a CPU. Without glibc nothing happens."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 2**25)                          # M_MMAP_THRESHOLD: the most it allows, 32 MiB
        mallopt(-1, 2**31 - 1)                      # M_TRIM_THRESHOLD


def measure_rates(c, num_actions):
    """A first guess at the seconds per unit of `work` of each stage, in a few seconds."""
    models, buffer = Models(c, num_actions), ExperienceBuffer(200 + c.window)
    env, rng, begun = AtariEnv(c.game, seed=0), np.random.default_rng(0), time.perf_counter()
    frame = env.reset()
    for action in rng.integers(num_actions, size=buffer.capacity):
        buffer.add(frame, action, 0.0, False, False)
        frame, _, terminated, truncated = env.step(action)
        frame = env.reset() if terminated or truncated else frame
    emulator = (time.perf_counter() - begun) / len(buffer)

    def seconds(update, *arguments, warm=1):
        for _ in range(1 + warm + models.graphs):   # the first calls pay for one-time work
            begun = time.perf_counter()
            update(*arguments)
            if models.graphs:
                torch.cuda.synchronize()
        return time.perf_counter() - begun

    some = functools.partial(rng.integers, 200)     # rows
    codes, weight = models.encode_all(buffer), models.scalar(c.foreground)
    warm_up, vqvae = (
        seconds(models.vqvae_update, models.observations(buffer, some(size=n)), weight)
        for n in (c.warmup_batch, c.vqvae_batch))
    rows = some(size=(c.dynamics_batch, c.window))
    moving, still = (seconds(models.world_model_update, *models.windows(buffer, rows, known),
                             c.context) for known in (None, codes))
    # All codes are computed once a round: so many observations for one update of the policy.
    encoded = (sum(c.first_interactions + i * c.interactions for i in range(c.iterations))
               / max(1, sum(work(c, i)["policy"] for i in range(c.iterations))))
    encoding = seconds(models.encode_all, buffer) / len(buffer) * encoded
    starts = models.starts(buffer, some(size=c.dreams), codes)
    with models.acting():
        one, eight = (seconds(models.act, buffer.stacked(some(size=n)), 1.0) for n in (1, 8))
    return {"collect": one + emulator, "warm_up": warm_up, "world_model": c.vqvae_share * (
        moving + vqvae / c.vqvae_every) + (1 - c.vqvae_share) * still,
            "policy": seconds(models.policy_update, *starts, warm=0) + encoding,
            "evaluate": (eight / 8 + emulator) * 1500}              # steps of an episode


def clock(seconds):
    """Seconds -> h:mm:ss."""
    minutes, s = divmod(int(round(seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{s:02d}"


def peak_memory(device):
    """MB: of the GPU if there is one, else of the process (0 where the system does not tell)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(ImportError):
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 2**10)     # macOS tells bytes
    return 0.0


class UserError(ValueError):
    """Something the user can mend: printed as one line, exit status 1."""


def sealed(state):
    """A dict of tensors and plain values -> bytes: what torch.save writes, and its SHA-256."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue() + hashlib.sha256(buffer.getbuffer()).digest()


# --------------------------------------------------------------------------------------------------
# A run: where it stands, what it has seen
# --------------------------------------------------------------------------------------------------

PROTOCOL = ("sampled actions, up to 30 no-ops at reset, no sticky actions, no life-loss "
            "termination, unclipped game score, at most 108,000 frames")
STAGES = ("collect", "warm_up", "world_model", "policy", "evaluate")
TIMES = ("iteration", *STAGES, "peak_mb")       # seconds of each stage; peak memory of the process
METRICS = ("iteration", "interactions", "collect_episodes", "collect_return", "collect_rewards",
           "elbo", "reconstruction", "commitment", "usage", "perplexity", "foreground_error",
           "code_loss", "code_accuracy", "reward_loss", "reward_accuracy_minus",
           "reward_accuracy_zero", "reward_accuracy_plus", "end_loss", "end_precision",
           "end_recall", "dream_return", "policy_loss", "value_loss", "entropy", "approx_kl",
           "clip_fraction", "real_return", "real_std", "real_median", "real_best", "real_episodes")
SCHEMA = 2                                      # of a checkpoint; what it holds of a run as it is:
PLAIN = ("iteration", "stage", "update", "sums", "rows", "times", "returns", "shards", "rates")


class Run:
    """Everything that a run is: settings, models, experience, position, figures so far.

    The position is (iteration, stage, update): so many updates of this stage are done. A stage's
    figures are summed up in `sums` and end in `rows` (a dict per round -> metrics.csv), its seconds
    in `times`, its seconds per unit of work, for the estimate, in `rates`.
    """

    def __init__(self, config, folder, state=None):
        self.config, self.folder = config, folder
        self.env = AtariEnv(config.game, seed=config.seed)
        self.rates = measure_rates(config, self.env.num_actions) if state is None else {}
        torch.manual_seed(config.seed)
        self.models = Models(config, self.env.num_actions)
        self.device = self.models.device
        self.buffer = ExperienceBuffer(config.all_interactions())
        self.iteration, self.stage, self.update = 0, STAGES[0], 0
        self.sums, self.rows, self.times, self.shards, self.returns = {}, [], [], [], []
        self.codes = None                       # of all experience: see all_codes
        self.first_bad = torch.full((), -1, device=self.device)
        self.stop_signal, self.saved_at, self.saved = None, time.monotonic(), True
        if state is not None:
            self.restore(state)

    def rounds(self):
        """The rounds still to do, 0 .. 14."""
        while self.iteration < self.config.iterations:
            yield self.iteration

    def do(self, stage):
        """Does a stage, unless it was done before the run was resumed; its figures (averages over
        all its updates, and what it returns) go into this round's row; saves."""
        name, here = stage.__name__.removeprefix("learn_"), self.iteration
        if STAGES.index(name) < STAGES.index(self.stage):
            return
        self.stage = name
        figures = stage(self)
        self.check_finite()
        if len(self.rows) <= here:
            self.rows.append({"iteration": here + 1, "interactions": len(self.buffer)})
        averages = {k: float(v[0] / v[1]) for k, v in self.sums.items() if v[1] > 0}
        self.rows[here] |= averages | {k: float(v) for k, v in (figures or {}).items()}
        self.sums, self.update = {}, 0
        self.stage = STAGES[(STAGES.index(name) + 1) % len(STAGES)]
        if name == "evaluate":
            self.iteration += 1
            if self.iteration < self.config.iterations:
                self.returns = []
        seconds = self.times[here][name]
        if sys.stderr and not sys.stderr.isatty() and seconds >= 1:
            say(f"    {name.replace('_', ' '):11s} {clock(seconds)}   whole run: "
                f"{clock(self.seconds_left())} left", "stderr")
        self.save()

    def updates(self, total, group=1, saving=True):
        """Yields the numbers of the updates of this stage that are still to do (of the first of a
        group that is done at once), counting and saving on the way."""
        begun, first = time.monotonic(), self.update
        with tqdm(desc=self.label(), total=total, initial=self.update, leave=False,
                  dynamic_ncols=True, disable=not sys.stderr or not sys.stderr.isatty()) as bar:
            while self.update < total:
                yield self.update
                done = min(group, total - self.update)
                self.update += done
                bar.update(done)
                self.rates[self.stage] = (time.monotonic() - begun) / (self.update - first)
                if not bar.disable:
                    bar.set_postfix_str(f"whole run: {clock(self.seconds_left())} left",
                                        refresh=False)
                overdue = time.monotonic() - self.saved_at > 60 * self.config.checkpoint_minutes
                if saving and (self.stop_signal or overdue):
                    self.add_time(begun)
                    begun, first = time.monotonic(), self.update
                    self.save()
                if self.stop_signal:
                    self.leave()
        self.add_time(begun)

    def label(self):
        """Of this stage's progress bar."""
        stage = self.stage.replace("_", " ")
        return f"{self.iteration + 1:2d}/{self.config.iterations} {stage:11s}"

    def add_time(self, begun):
        """Books the wall-clock seconds since `begun` under this round and stage."""
        while len(self.times) <= self.iteration:
            self.times.append(dict.fromkeys(TIMES, 0.0) | {"iteration": len(self.times) + 1})
        self.times[self.iteration][self.stage] += time.monotonic() - begun
        self.times[self.iteration]["peak_mb"] = peak_memory(self.device)

    def seconds_left(self):
        """What is still to do at the pace measured last; later rounds cost something else."""
        seconds = 0.0
        for iteration in range(self.iteration, self.config.iterations):
            for stage, count in work(self.config, iteration).items():
                if iteration == self.iteration and stage == self.stage:
                    count = max(0, count - self.update)
                if iteration > self.iteration or STAGES.index(stage) >= STAGES.index(self.stage):
                    seconds += count * self.rates[stage]
        return seconds

    def numpy_rng(self, *numbers):
        """A generator that depends on the seed, the position and nothing else."""
        return np.random.default_rng([self.config.seed, self.iteration,
                                      STAGES.index(self.stage), *numbers])

    @contextlib.contextmanager
    def other_dice(self, seed):
        """Inside, torch's generators start from this seed; afterwards the run's own go on."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield

    def add(self, parts, update):
        """Adds an update's figures to the stage's averages, on the device; NaN: there was none."""
        for k, v in parts.items():
            pair = torch.stack([v.nan_to_num(), v.isfinite().to(v.dtype)])
            self.sums[k] = self.sums[k] + pair if k in self.sums else pair
        bad = ~torch.stack([v for k, v in parts.items()
                            if not k.startswith("reward_accuracy")]).isfinite().all()
        self.first_bad = torch.where(bad & (self.first_bad < 0), update, self.first_bad)

    def check_finite(self):
        """Stops the run before a NaN or infinity can reach a checkpoint."""
        bad = int(self.first_bad)
        if bad >= 0:
            raise UserError(f"a loss became NaN or infinite in round {self.iteration + 1}, stage "
                            f"{self.stage}, update {bad}; {self.folder / 'checkpoint.pt'} has none")

    def all_codes(self):
        """uint8 [N, 6, 6] of all experience, once a round, when the VQ-VAE stands still."""
        if self.codes is None:
            self.codes = self.models.encode_all(self.buffer)
        return self.codes

    def state(self):
        """What a checkpoint holds."""
        optimizers = {name: o.state_dict() for name, o in self.models.optimizers.items()}
        for group in itertools.chain(*(o["param_groups"] for o in optimizers.values())):
            group["lr"] = float(group["lr"])                # on CUDA it is a tensor
        cuda = self.device.type == "cuda"
        return {name: getattr(self, name) for name in PLAIN} | {
            "schema": SCHEMA, "config": dataclasses.asdict(self.config),
            "networks": {name: m.state_dict() for name, m in self.models.networks().items()},
            "optimizers": optimizers, "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if cuda else None}

    def restore(self, state):
        """Takes on what `state` returned; UserError if that was not a run with these settings."""
        try:
            fits = all(type(state[name]) is type(getattr(self, name)) for name in PLAIN)
            for name in PLAIN:
                setattr(self, name, state[name])
            self.sums = {k: v.to(self.device) for k, v in self.sums.items()}
            for name, network in self.models.networks().items():
                network.load_state_dict(state["networks"][name])
            for name, optimizer in self.models.optimizers.items():
                saved = state["optimizers"][name]       # of its settings the rates: ours fit us
                optimizer.load_state_dict({"state": saved["state"], "param_groups":
                                           optimizer.state_dict()["param_groups"]})
                self.models.set_rates(name, *(float(g["lr"]) for g in saved["param_groups"]))
            torch.set_rng_state(state["torch_rng"])
            if state["cuda_rng"] is not None and self.device.type == "cuda":
                torch.cuda.set_rng_state(state["cuda_rng"], self.device)
            fits = fits and self.is_consistent()
        except Exception:                           # whatever other types and shapes provoke
            fits = False
        rounds = range(len(self.shards) if fits else 0)
        for i in rounds:
            path = self.folder / f"experience-{i + 1:02d}.npz"
            data = read_regular(path)
            if hashlib.sha256(data).hexdigest() != self.shards[i]:
                raise UserError(f"{path} was altered: its SHA-256 is not the one in the checkpoint")
            self.buffer.add_bytes(data)
        fits &= bool(self.buffer.actions.max() < self.env.num_actions)
        if not fits or len(self.buffer) != sum(work(self.config, i)["collect"] for i in rounds):
            raise UserError(f"{self.folder}: the checkpoint does not fit its own settings")

    def is_consistent(self):
        """Do position and figures fit the settings, and has each moment its weight's size?"""
        c, begun = self.config, self.iteration + (self.stage != "collect")
        here = work(c, self.iteration)[self.stage] if self.iteration < c.iterations else 0
        figures = [*self.rows, *self.times, self.rates, dict(enumerate(self.returns))]
        return (all(type(v) in (int, float) and abs(v) < 1e300 for f in figures for v in f.values())
                and all({"iteration", "interactions"} <= set(row) for row in self.rows)
                and all(set(row) == set(TIMES) for row in self.times)
                and set(self.rates) == set(STAGES) and 0 <= self.update <= here
                and bool(self.returns) == (self.stage == "evaluate" and self.update > 0
                                           or self.iteration == c.iterations)
                and all(type(sha256) is str for sha256 in self.shards)
                and len(self.shards) == len(self.rows) == len(self.times) == begun
                and all(v.shape == (2,) and v.is_floating_point() and not v.is_sparse
                        for v in self.sums.values())
                and all(m.shape == p.shape and not m.is_sparse and s["step"].shape == ()
                        for o in self.models.optimizers.values() for p, s in o.state.items()
                        for m in (s["exp_avg"], s["exp_avg_sq"])))

    def save(self):
        """Experience first, a file for each round, then the checkpoint with their SHA-256, then
        what people read. A full disk is survived: `saved` says whether all is there."""
        c, self.saved, self.saved_at = self.config, False, time.monotonic()
        self.check_finite()
        try:
            for i in range(len(self.shards), self.iteration + (self.stage != "collect")):
                first = c.first_interactions + c.interactions * (i - 1) if i else 0
                data = self.buffer.to_bytes(first, first + work(c, i)["collect"])
                write_atomically(self.folder / f"experience-{i + 1:02d}.npz", data)
                self.shards.append(hashlib.sha256(data).hexdigest())
            write_atomically(self.folder / "checkpoint.pt", sealed(self.state()),
                             keep=self.folder / "checkpoint-previous.pt")
            self.write_tables()
            self.saved = True
        except ValueError as error:
            if getattr(error.__cause__, "errno", None) not in (errno.ENOSPC, errno.EDQUOT):
                raise
            say(f"warning: the disk of {self.folder} is full, some {self.disk_need() >> 20} MB are "
                f"missing; the last checkpoint is untouched, the next save tries again", "stderr")

    def write_tables(self):
        """metrics.csv, times.csv and at the end evaluation.json, from what the checkpoint holds."""
        for name, columns, rows in (("metrics", METRICS, self.rows), ("times", TIMES, self.times)):
            lines = [columns, *([f"{row[c]:.6g}" if c in row else "" for c in columns]
                                for row in rows)]
            write_atomically(self.folder / f"{name}.csv",
                             "".join(",".join(line) + "\n" for line in lines).encode())
        c, scores = self.config, self.returns
        if self.iteration == c.iterations:
            result = {"game": c.game, "preset": c.preset, "seed": c.seed,
                      "interactions": len(self.buffer), "episodes": len(scores),
                      "protocol": PROTOCOL, "temperature": 1.0, "mean": np.mean(scores),
                      "std": np.std(scores), "median": np.median(scores), "best": np.max(scores),
                      "returns": scores}
            write_atomically(self.folder / "evaluation.json", json.dumps(result, indent=1).encode())

    def disk_need(self):
        """Bytes still missing: three checkpoints (two are kept while one is written), each the
        weights and two Adam moments of each, and 2 kB a compressed frame."""
        checkpoint = 3 * sum(t.numel() * t.element_size() for m in self.models.networks().values()
                             for t in m.state_dict().values())
        missing, c = 3 - len(list(self.folder.glob("checkpoint*.pt"))), self.config
        frames = sum(work(c, i)["collect"] for i in range(len(self.shards), c.iterations))
        return missing * checkpoint + 2000 * frames

    def leave(self):
        """After Ctrl-C or SIGTERM: says how to go on, exits 130 or 143."""
        say(f"\nstopped; go on with: {again(self.folder)}", "stderr")
        sys.exit(128 + self.stop_signal)


# --------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------

# What may change when a run is resumed, with --override.
MAY_CHANGE = ("device", "checkpoint_minutes", "bf16", "compile", "eval_episodes", "final_episodes")
# --help shows the first group of settings, --help-all the others too: names of their first fields.
GROUPS = {"game": "what most people change", "iterations": "real experience",
          "vqvae_width": "observation model", "hidden": "dynamics", "policy_width": "policy",
          "eval_episodes": "evaluation"}
POSITIVE = ("scale", "checkpoint_minutes", "collect_temperature", "vqvae_width", "policy_width",
            "temperature", "dynamics_lr", "clip", "iterations", "first_interactions",
            "interactions", "warmup_batch", "vqvae_every", "vqvae_batch", "hidden", "context",
            "dynamics_batch", "dreams", "dream_steps", "ppo_epochs", "final_episodes")


def check(c):
    """Raises UserError for settings that can't work, naming the field."""
    for name, value in dataclasses.asdict(c).items():
        for v in value if isinstance(value, tuple) else (value,):
            if type(v) in (int, float) and not 0 <= v <= 1e12:
                raise UserError(f"--{name} must be a number from 0 to 1e12, not {v}")
        if name in POSITIVE and value == 0:
            raise UserError(f"--{name} must be more than 0")
        if name in ("vqvae_share", "teacher", "gamma", "lam", "explore") and value > 1:
            raise UserError(f"--{name} must be from 0 to 1, not {value}")
        if name in ("world_model_epochs", "ppo_updates") and len(value) != c.iterations:
            raise UserError(f"--{name} needs {c.iterations} numbers, one a round, not {len(value)}")
    if c.seed >= 2**31 or c.window < 2 or c.minibatch < 2:
        raise UserError("--seed must be less than 2**31, --window and --minibatch 2 or more")
    need = max(c.window * (c.dynamics_batch + 1), c.warmup_batch)
    if c.first_interactions < need:
        raise UserError(f"--first_interactions must be {need} or more for these batch sizes")
    # Bytes at least: all frames; weights, gradients, moments; pictures and codes of a batch.
    need = (9216 * (c.all_interactions() + 16 * (c.warmup_batch + c.vqvae_batch
                                              + c.dynamics_batch * c.window))
            + 3200 * c.hidden**2 + 6e7 * c.vqvae_width**2 + 2e7 * c.policy_width**2
            + 144 * (32 + c.hidden) * c.dreams * c.dream_steps)
    pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**28
    if need > 4096 * pages:
        raise UserError(f"these settings need {need / 2**30:,.0f} GB of memory at least, here are "
                        f"{pages >> 18:,}; lower what is far above the preset's")
    try:
        torch.zeros(1, device=c.device).cpu()
    except Exception:                               # each device has an error of its own
        raise UserError(f"device {c.device!r} is not available here; use --device cpu") from None
    if c.compile:
        try:
            torch.compile(torch.sin)(torch.zeros(2, device=c.device))
        except Exception as error:                  # whatever a missing compiler provokes
            raise UserError(f"--compile needs a C++ compiler, and Triton on CUDA "
                            f"({' '.join(str(error).split())[:80]})") from None


def parse(arguments):
    """Command line (hyphens or underscores) -> namespace of what was given explicitly."""
    split = [a.partition("=") for a in (sys.argv[1:] if arguments is None else arguments)]
    arguments = ["--" + flag[2:].replace("-", "_") + equals + value if flag.startswith("--")
                 else flag + equals + value for flag, equals, value in split]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], add_help=False,
                                     epilog="Defaults depend on --preset; shown are `paper`'s.")
    parser.add_argument("-h", "--help", action="help", help="what most people change")
    parser.add_argument("--help_all", action="help", help="all settings")
    parser.add_argument("--resume", metavar="RUN", help="go on with the run in this folder")
    parser.add_argument("--override", metavar="FIELD", action="append", default=[], help="with "
                        f"--resume: let this setting change (one of: {', '.join(MAY_CHANGE)})")
    for f in dataclasses.fields(Config):
        if f.name in GROUPS:
            shown = f.name == "game" or "--help_all" in arguments
            group = parser.add_argument_group(GROUPS[f.name]) if shown else parser
        how = {bool: dict(type=boolean, metavar="true|false", nargs="?", const=True),
               tuple: dict(type=numbers, metavar="N,N,..")}.get(
            f.type, dict(type=f.type, metavar=f.type.__name__))
        if f.name == "preset":
            how = dict(choices=tuple(PRESETS))
        default = ",".join(map(str, f.default)) if f.type is tuple else f.default
        text = f.metadata["help"] + (f" [{default}]" if f.name not in ("preset", "device") else "")
        group.add_argument(f"--{f.name}", default=argparse.SUPPRESS, **how,
                           help=text.replace("%", "%%") if shown else argparse.SUPPRESS)
    return parser.parse_args(arguments)


def boolean(text):
    return ("false", "true").index(text.lower()) == 1           # a ValueError for all others


def numbers(text):
    """"3,2,1" -> (3, 2, 1); a single number stands for all iterations."""
    return tuple(int(v) if v.is_integer() else v for v in map(float, text.split(",")))


def settings_from(given):
    """Explicit flags over the preset over the defaults."""
    has_cuda = torch.cuda.is_available()
    given = dict(preset=("small", "paper")[has_cuda], device=("cpu", "cuda")[has_cuda]) | given
    config = Config(**(PRESETS[given["preset"]] | given))
    config.game = canonical_name(config.game)
    for name in ("world_model_epochs", "ppo_updates"):
        values = getattr(config, name)
        if len(values) != config.iterations and (len(values) == 1 or name not in given):
            # One number stands for all rounds; a preset's list is cut, or its last number repeated.
            rounds = min(config.iterations, 10**5)
            setattr(config, name, (values + values[-1:] * rounds)[:rounds])
    return config


def resume_settings(config, given, override):
    """The checkpoint's settings, changed where --override allows it; UserError if others differ."""
    for name in {*override, *given} - {"out"}:
        old, new = getattr(config, name, None), given.get(name)
        if name in override and name not in MAY_CHANGE:
            raise UserError(f"--override {name}: only {', '.join(MAY_CHANGE)} may change")
        if name in given and new != old and name not in override:
            hint = (f"add --override {name} to change it" if name in MAY_CHANGE
                    else "start a new run to change it")
            raise UserError(f"this run has {name} = {old}, the command line says {new}; {hint}")
    return dataclasses.replace(config, **{k: v for k, v in given.items() if k in override})


def start(arguments):
    """Command line -> a Run, new or resumed, with its folder locked."""
    from evaluate import config_from, newest_checkpoint, read_config
    given = vars(parse(arguments))
    folder, override, state = given.pop("resume"), given.pop("override"), None
    if folder is None:
        config = settings_from(given)
        folder = pathlib.Path(config.out) / f"{config.game}-{config.preset}-s{config.seed}"
        if any(folder.glob("checkpoint*.pt")):
            raise UserError(f"{folder} already holds a run; go on with it: {again(folder)}   "
                            f"(or choose another --out or --seed, or delete it)")
    else:
        folder = pathlib.Path(folder)
        bare = folder.is_dir() and not (folder / "config.json").exists()
        described = {} if bare else read_config(folder)
        if any(folder.glob("checkpoint*.pt")) or not described:
            state = newest_checkpoint(folder)
        config = config_from(state.get("config") if state else described, described)
        config = resume_settings(config, given, override)
    # Without a checkpoint nothing to lose: only what a kill before the first save leaves.
    others = sorted(path.name for path in folder.glob("*") if path.suffix != ".tmp"
                    and path.name not in ("config.json", "lock"))
    if state is None and others:
        raise UserError(f"{folder} holds {others[0]} but no checkpoint to go on from; nothing was "
                        f"touched; choose another --out or --seed")
    check(config)
    folder.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(folder)
    write_atomically(folder / "config.json",
                     json.dumps(dataclasses.asdict(config), indent=1).encode())
    run = Run(config, folder, state)
    run.lock = lock
    free, need, hours = shutil.disk_usage(folder).free, run.disk_need(), run.seconds_left() / 3600
    if free < need and run.iteration < run.config.iterations:
        raise UserError(f"{folder} has {free >> 20} MB free, this run needs about {need >> 20} MB; "
                        f"make room or choose another --out")
    if hours > 10_000:
        raise UserError(f"this run would take {hours:.3g} hours; lower --scale and its like")
    (run.save if state is None else run.write_tables)()     # cut back to where the checkpoint is
    return run


def say(text, stream="stdout"):
    """Prints a line. Lost output (`| head -1`) is told once on the other stream and ends no run."""
    try:
        print(text, file=getattr(sys, stream), flush=True)
    except (OSError, ValueError):                   # ValueError: it was closed
        setattr(sys, stream, None)
        say("warning: output is lost; the run goes on", {"stdout": "stderr"}.get(stream, "stdout"))


def again(folder, script="train.py --resume"):
    """A command to be pasted into a shell, with bytes for letters that the terminal lacks."""
    text, encoding = str(folder), getattr(sys.stderr, "encoding", None) or "utf-8"
    if text != text.encode(encoding, "ignore").decode(encoding):
        return f"python {script} $'" + repr(b'"' + os.fsencode(text))[3:]   # ": repr quotes with '
    return f"python {script} {shlex.quote(text)}"


def main(arguments=None):
    keep_freed_memory()
    sys.stdout, sys.stderr = sys.stdout or open(os.devnull), sys.stderr or open(os.devnull)
    for stream in (sys.stdout, sys.stderr):         # closed: takes nothing; odd letters are escaped
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")
    try:
        run, begun = start(arguments), 0.0

        def on_signal(number, frame):
            nonlocal begun
            if run.stop_signal is None:
                run.stop_signal, begun = number, time.monotonic()
                say("\nfinishing this update and saving; once more to leave at once", "stderr")
            elif time.monotonic() - begun > 1:      # wrappers pass the first one on twice
                os._exit(128 + number)

        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, signal.SIGINT)               # Windows lacks one
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, on_signal)
        c, steps = run.config, run.config.all_interactions()
        say(f"{c.game}, preset {c.preset}, {steps:,} interactions ({4 * steps:,} frames) in "
            f"{c.iterations} rounds, on {c.device}"
            f"{' with bfloat16' if run.models.use_bf16 else ''}; "
            f"about {clock(run.seconds_left())} (h:mm:ss) to go; into {run.folder}")
        train(run)
        for wait in (1, 2, 4, 8):                   # a full disk: all is still to be saved
            if not run.saved:
                time.sleep(wait)
                run.save()
        if not run.saved:
            raise UserError(f"full disk, the last save failed; make room, then {again(run.folder)}")
        say(f"done: {again(run.folder, 'evaluate.py')}")
    except (UserError, ValueError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:                        # a name too long, no permission
        sys.exit(f"error: {error.filename or 'cannot go on'}: {error.strerror}")
    except KeyboardInterrupt:                       # before there was anything to save
        sys.exit(130)
    except (torch.OutOfMemoryError, MemoryError):
        sys.exit("error: out of memory; lower --warmup_batch, --dynamics_batch or --minibatch")


if __name__ == "__main__":
    sys.modules["train"] = sys.modules["__main__"]  # evaluate.py imports this file: once is enough
    main()
