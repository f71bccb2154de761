"""The whole algorithm (Section 3.4): collect, warm up, world model, policy in dreams, evaluate.

    python train.py --game Freeway                   # paper preset on CUDA, small preset elsewhere
    python train.py --game Pong --preset smoke       # every stage once or twice, in two minutes
    python train.py --resume runs/Freeway-small-s0   # goes on where a run was stopped or killed
    python train.py --preset paper --benchmark       # how long would it take here?

The loop at the end of `train` is the paper's; above it, one function per stage, in the order of the
loop; above those, what every long run needs: settings, checkpoints, and an honest clock.

Random numbers: batches are drawn by numpy generators that are a pure function of (seed, iteration,
stage, epoch), everything else by torch's global generator, whose state is in the checkpoint. So a
run that was killed and resumed ends bit for bit as one that never was.

Dimension key:  B batch   L = 11 observations in a window   T = 50 dreamed steps   K = 128 codes
                M actions
"""
import argparse
import contextlib
import copy
import csv
import ctypes
import dataclasses
import errno
import hashlib
import io
import json
import math
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import time
import zipfile

import numpy as np
import torch
from tqdm import tqdm

from atari import AtariEnv, ExperienceBuffer
from dynamics import Dynamics, dream, dream_step, forget, imagine, policy_input, sample
from ppo import ActorCritic, ppo_update
from vqvae import (DOUBLINGS, VQVAE, Whitening, backgrounds, foreground_error,
                   foreground_weight)

# --------------------------------------------------------------------------------------------------
# Settings
# --------------------------------------------------------------------------------------------------


def setting(default, text):
    """A dataclass field with its line of help.
    Sources: "paper 3.4" its section, "released" the authors' code.
    """
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass
class Config:
    """Every setting of a run; the defaults are the `paper` preset.
    Each field is a flag of the same name.
    """

    game: str = setting("Freeway", "Atari game as in the paper's tables, e.g. Pong or BankHeist")
    preset: str = setting("paper", "paper: the paper's size; small: 2 CPU cores; smoke: 2 minutes")
    seed: int = setting(0, "seed of all randomness")
    device: str = setting("cpu", "torch device: cuda, cpu (default: cuda where it is there)")
    out: str = setting("runs", "folder in which the run's own folder is made")
    checkpoint_minutes: float = setting(4.0, "save at least this often: no more work can be lost")
    bf16: bool = setting(True, "bfloat16 if the hardware computes in it (ours: same sizes, faster)")
    compile: bool = setting(False, "fuse kernels of dynamics update and dream step (ours: faster)")
    cuda_graphs: bool = setting(True, "on CUDA updates are recorded and replayed (ours: faster)")
    scale: float = setting(1.0, "multiplies all numbers of updates: more time, or less (ours)")

    # Real experience
    iterations: int = setting(15, "rounds of collect, world model, policy (paper 3.4)")
    first_interactions: int = setting(12_800, "4-frame steps in round 1, random policy (paper 3.4)")
    interactions: int = setting(6_400, "steps in every later round (paper 3.4)")
    random_segment: int = setting(0, "round 1: new odds of actions every n steps, if n (ours)")
    collect_temperature: float = setting(1.5, "softmax temperature when collecting (released)")
    explore: float = setting(0.0, "collecting: chance of a random action, held 2-16 steps (ours)")

    # Observation model (Section 3.3, "Latent Representations")
    vqvae_width: float = setting(1.0, "channels of encoder and decoder, times (paper, Table 3)")
    max_logit: float = setting(15.9, "pixel logits are clamped to +- this (as torch.distributions)")
    vqvae_lr: float = setting(1e-4, "Adam's learning rate after the warm-up (released)")
    warmup_lr: float = setting(1e-3, "learning rate in the warm-up, 'higher' (paper 3.4; released)")
    warmup_lr_end: float = setting(1e-3, "warm-up's learning rate falls to this, linearly (ours)")
    warmup_epochs: float = setting(50, "passes over round 1's data, VQ-VAE alone (paper 3.4)")
    warmup_batch: int = setting(40, "observations per warm-up update (released)")
    foreground: float = setting(0.0, "extra weight of foreground pixels, a tenth at the end (ours)")
    newest: float = setting(1.0, "weight of the newest of the four frames; the others' is 1 (ours)")
    commitment: float = setting(0.25, "weight of commitment loss, a mean over elements (released)")
    revive_codes: bool = setting(False, "warm-up moves unused codes to encoder outputs (ours)")
    vqvae_every: int = setting(3, "after the warm-up, VQ-VAE update in every n-th step (paper 3.4)")
    vqvae_share: float = setting(1.0, "first share of a round in which the VQ-VAE learns (ours)")
    vqvae_batch: int = setting(44, "observations per such update; 44: the whole batch (released)")

    # Dynamics (Section 3.2-3.3)
    whiten: bool = setting(False, "dynamics and policy read whitened codes (ours)")
    hidden: int = setting(128, "channels of each ConvLSTM cell (paper, Table 3)")
    dynamics_lr: float = setting(5e-4, "Adam's learning rate (released)")
    dynamics_lr_end: float = setting(5e-4, "falls to this in each round, linearly (ours)")
    reward_lr: float = setting(1e-3, "reward head's learning rate, 'higher' (paper 3.4; released)")
    reward_lr_end: float = setting(1e-3, "falls to this in each round, linearly (ours)")
    head_decay: float = setting(0.0, "AdamW decay of the heads for rewards and ends (ours)")
    reward_weight: float = setting(1e-6, "weight of the reward loss, tiny (paper 3.4; released)")
    dynamics_batch: int = setting(4, "windows per update (released)")
    window: int = setting(11, "observations per window: 10 predictions (released)")
    context: int = setting(4, "inputs that are true codes; then the model's samples (released)")
    own_temperature: float = setting(1.0, "of these samples, as --temperature in dreams (ours)")
    predict_ends: bool = setting(False, "a third head ends dreams (paper 5; Ha & Schmidhuber 4.1)")
    lives: bool = setting(False, "a lost life ends a dream too (as DQN, Mnih et al. 2015, trains)")
    teacher: float = setting(0.0, "first share of a round's updates with all inputs true (ours)")
    reward_windows: float = setting(0.0, "share of each batch from windows with a reward (ours)")
    recent_windows: float = setting(0.0, "share of it from the newest `first_interactions` (ours)")
    weight_decay: float = setting(0.0, "decoupled (AdamW) decay of the dynamics' weights (ours)")
    world_model_epochs: tuple = setting(
        (140, 32, 24, 20, 16, 14, 12, 11, 10, 9, 8, 8, 7, 7, 6), "passes in each round (released)")

    # Policy (Section 3.3, "Policy", and 3.4)
    policy_width: float = setting(1.0, "hidden units, times (paper, Table 3)")
    dreams: int = setting(16, "dreams side by side (released)")
    dream_steps: int = setting(50, "steps until every dream ends (paper 3.4)")
    dream_context: int = setting(0, "real steps the dynamics has seen when a dream begins (ours)")
    bootstrap: bool = setting(False, "a dream's last step is not its end: add its value (ours)")
    expected_rewards: bool = setting(False, "dreams pay the mean of Eq. 7, not a draw (ours)")
    reward_starts: float = setting(0.0, "share of dreams from shortly before a real reward (ours)")
    temperature: float = setting(1.0, "of the codes in dreams (Ha & Schmidhuber, Table 2)")
    policy_memory: bool = setting(False, "the policy also sees h of the second cell (paper, Eq. 5)")
    ppo_updates: tuple = setting(
        (1000,) * 7 + (2000,) + (1000,) * 3 + (2000,) + (1000,) * 2 + (3000,),
        "rollouts and PPO updates in each round (released)")
    policy_lr: float = setting(2.5e-4, "Adam's learning rate (released)")
    policy_average: float = setting(0.0, "acts with a moving average of weights, this its decay, "
                                    "if any (ours)")
    ppo_epochs: int = setting(4, "passes over each rollout (released)")
    minibatch: int = setting(256, "samples per gradient step (released)")
    gamma: float = setting(0.99, "discount (paper 4)")
    lam: float = setting(0.95, "lambda of GAE (released)")
    clip: float = setting(0.1, "clip range of the probability ratio (released)")
    value_clip: float = setting(0.1, "clip range of the value (released)")
    value_coef: float = setting(0.5, "weight of the value loss (released)")
    entropy_coef: float = setting(0.01, "weight of the entropy bonus (released)")
    advantage_floor: float = setting(0.0, "advantages are divided by their std or by this (ours)")
    max_grad_norm: float = setting(0.5, "gradient norm is clipped to this (released)")

    # Evaluation: whole real episodes, never trained on
    eval_episodes: int = setting(8, "episodes after each round (ours)")
    final_episodes: int = setting(32, "episodes after the last round (released)")
    eval_temperature: float = setting(1.0, "softmax temperature when evaluated (released)")


PRESETS = {
    "paper": {},
    "small": dict(
        random_segment=128, explore=0.03,
        vqvae_width=0.5, warmup_epochs=7, warmup_batch=12, warmup_lr_end=1e-4, foreground=40,
        newest=4, commitment=50, revive_codes=True, vqvae_every=1, vqvae_share=0.15, vqvae_batch=16,
        hidden=32, dynamics_batch=16, dynamics_lr=3e-3, dynamics_lr_end=2e-4, teacher=0.5,
        own_temperature=0.5, predict_ends=True, lives=True,
        reward_windows=0.25, recent_windows=0.5, weight_decay=0.3, head_decay=1,
        reward_lr_end=1e-5, world_model_epochs=(
            33, 4.62, 3.44, 2.75, 2.31, 1.94, 1.72, 1.53, 1.38, 1.25, 1.15, 1.06, 0.98, 0.92, 0.86),
        policy_width=0.25, dreams=200, dream_steps=16, dream_context=3, bootstrap=True,
        temperature=0.5, expected_rewards=True, reward_starts=0.25, ppo_updates=(100,) * 15,
        policy_lr=4e-4, policy_average=0.98, minibatch=800, clip=0.2, value_clip=1e9,
        advantage_floor=0.2, eval_episodes=4),
    "smoke": dict(
        iterations=2, first_interactions=400, interactions=200,
        vqvae_width=0.25, warmup_epochs=6, warmup_batch=12, warmup_lr_end=1e-4, foreground=40,
        commitment=50, revive_codes=True, vqvae_batch=8, hidden=16,
        world_model_epochs=(2, 1.5), policy_width=0.25, dreams=8, ppo_updates=(3, 3),
        eval_episodes=1, final_episodes=1),
}
# What may change when a run is resumed, with --override: where it runs, how often it is judged.
MAY_CHANGE = ("device", "checkpoint_minutes", "bf16", "compile", "cuda_graphs",
              "eval_episodes", "final_episodes")
STAGES = ("collect", "warm_up", "world_model", "policy", "evaluate")
SCHEMA = 1                                          # of the checkpoint, and what is in it:
STATE = {"schema", "config", "iteration", "stage", "update", "networks", "optimizers", "torch_rng",
         "cuda_rng", "sums", "rows", "times", "returns", "shards", "rates"}


class UserError(Exception):
    """Something the user can mend: printed as one line, exit status 1."""


def check(config):
    """Raises UserError for settings that can't work, naming the field."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        for v in value if isinstance(value, tuple) else (value,):
            if (isinstance(v, (int, float)) and not isinstance(v, bool)
                    and not (math.isfinite(v) and v >= 0)):
                raise UserError(f"--{f.name} must be a number of 0 or more, not {v}")
    for name in ("iterations", "interactions", "warmup_batch", "vqvae_every", "vqvae_batch",
                 "hidden", "dynamics_batch", "dreams", "dream_steps", "ppo_epochs",
                 "final_episodes", "vqvae_width", "policy_width", "collect_temperature",
                 "eval_temperature", "temperature", "own_temperature", "scale",
                 "checkpoint_minutes", "max_logit"):
        if getattr(config, name) <= 0:
            raise UserError(f"--{name} must be more than 0")
    for name in ("vqvae_share", "teacher", "reward_windows", "recent_windows", "reward_starts",
                 "gamma", "lam", "explore", "policy_average"):
        if getattr(config, name) > 1:
            raise UserError(f"--{name} must be from 0 to 1, not {getattr(config, name)}")
    if config.policy_average == 1:
        raise UserError("--policy_average must be less than 1, or the policy never changes")
    if config.window < 2 or config.context < 1 or config.minibatch < 2:
        raise UserError("--window must be 2 or more, --context 1 or more, --minibatch 2 or more")
    for name in ("world_model_epochs", "ppo_updates"):
        if len(getattr(config, name)) != config.iterations:
            raise UserError(f"--{name} needs one number per iteration: {config.iterations}, "
                            f"not {len(getattr(config, name))}")
    need = max(config.window * (config.dynamics_batch + 1), config.warmup_batch)
    if config.first_interactions < need:
        raise UserError(f"--first_interactions must be {need} or more for these batch sizes")
    if config.lives and not config.predict_ends:
        raise UserError("--lives is about what --predict_ends predicts; give both or neither")
    if config.seed >= 2**63:
        raise UserError("--seed must be less than 2**63")
    try:
        torch.zeros(1, device=config.device).cpu()
    except (RuntimeError, AssertionError):
        there = "cuda or cpu" if torch.cuda.is_available() else "cpu"
        raise UserError(f"device {config.device!r} is not available here; "
                        f"use --device {there}") from None
    if config.compile:
        try:
            torch.compile(torch.sin)(torch.zeros(2, device=config.device))
        except Exception as error:                  # whatever a missing compiler provokes
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(f"--compile needs a C++ compiler, and Triton on CUDA "
                            f"({reason[0][:80]})") from None


def has_bf16(device):
    """Does the processor itself compute in bfloat16? Emulated, it would be slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


# --------------------------------------------------------------------------------------------------
# The models and one update of each: no host synchronisation in here, so that a GPU never waits
# --------------------------------------------------------------------------------------------------


def each_tensor(function, nested):
    """The same nesting of tuples and dicts, with function(tensor) in place of each tensor."""
    if isinstance(nested, torch.Tensor):
        return function(nested)
    if isinstance(nested, dict):
        return {k: each_tensor(function, v) for k, v in nested.items()}
    if isinstance(nested, (tuple, list)):
        return tuple(each_tensor(function, v) for v in nested)
    return nested


def copy_tensors(new, old):
    """Copies each tensor of one nesting into that of another at the same place."""
    tensors = []
    each_tensor(tensors.append, new)
    each_tensor(lambda t: t.copy_(tensors.pop(0)), old)


class Replayed:
    """A function of tensors, recorded as a CUDA graph and then replayed.

    An update is thousands of small kernels. To launch one costs the CPU more than the GPU needs to
    compute it; a recorded update is launched as a whole. What a graph does is fixed: it reads and
    writes the same memory each time, and whatever was not a tensor is a constant in it. So the
    function may depend on its arguments, on memory that stays where it is (weights, buffers,
    optimiser state: all changed in place) and on torch's generator, and on nothing else; numbers
    that change from call to call must come as tensors. Arguments of other shapes, or with other
    numbers among them, get a graph of their own.

    The first call just computes, which also creates what is created once (optimiser state,
    libraries' workspaces); the second records, which computes nothing, and replays; the others
    replay. Their results are copies: a replay writes over those of the replay before.
    """

    def __init__(self, function):
        self.function, self.graphs = function, {}

    def __call__(self, *arguments):
        key = each_tensor(lambda t: (t.shape, t.dtype), arguments)
        if key not in self.graphs:
            self.graphs[key] = None
            stream = torch.cuda.Stream()            # CUDA wants a side stream before a recording
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                results = self.function(*arguments)
            torch.cuda.current_stream().wait_stream(stream)
            return results
        if self.graphs[key] is None:
            graph, inputs = torch.cuda.CUDAGraph(), each_tensor(torch.clone, arguments)
            with torch.cuda.graph(graph):
                outputs = self.function(*inputs)
            self.graphs[key] = graph, inputs, outputs
        graph, inputs, outputs = self.graphs[key]
        copy_tensors(arguments, inputs)
        graph.replay()
        return each_tensor(torch.clone, outputs)


class Models:
    """The three networks and their optimisers on one device."""

    def __init__(self, config, num_actions):
        self.config, self.device = config, torch.device(config.device)
        self.use_bf16 = config.bf16 and has_bf16(self.device)
        with self.device:
            self.vqvae = VQVAE(width=config.vqvae_width, commitment=config.commitment,
                               max_logit=config.max_logit)
            self.whitening = Whitening() if config.whiten else None
            self.dynamics = Dynamics(num_actions, hidden=config.hidden,
                                     predict_ends=config.predict_ends)
            self.policy = ActorCritic(num_actions, width=config.policy_width,
                                      code_dim=32 + config.hidden * config.policy_memory)
        # The learner learns, in dreams; the policy, which acts in the game, is the same network or
        # the moving average of it.
        self.learner = copy.deepcopy(self.policy) if config.policy_average else self.policy
        self.graphs = config.cuda_graphs and self.device.type == "cuda"
        self.replayed = {}                      # name of a function: its Replayed
        self.dynamics_loss, self.imagine = self.dynamics.loss, imagine
        if config.compile:
            self.dynamics_loss = torch.compile(self.dynamics.loss, fullgraph=True, dynamic=False)
            self.imagine = torch.compile(imagine, fullgraph=True, dynamic=False)
        self.backgrounds = torch.zeros(1, 96, 96, dtype=torch.uint8, device=self.device)
        self.vqvae.eval()                       # train() only around its own updates: batch norms
        # The reward loss is scaled down by reward_weight for the trunk's sake. Adam divides the
        # scale out again for the head, whose eps must shrink with it.
        heads = ("reward_head.", "end_head.")
        head, trunk = ([p for name, p in self.dynamics.named_parameters()
                        if name.startswith(heads) == is_head] for is_head in (True, False))
        fast = dict(fused=self.device.type in ("cpu", "cuda"), capturable=self.graphs)
        self.optimizers = {
            "vqvae": torch.optim.Adam(self.vqvae.parameters(), lr=config.vqvae_lr, **fast),
            "dynamics": torch.optim.AdamW([     # Adam, where weight_decay is 0
                {"params": trunk, "lr": config.dynamics_lr, "weight_decay": config.weight_decay},
                {"params": head, "lr": config.reward_lr, "weight_decay": config.head_decay,
                 "eps": 1e-8 * config.reward_weight}], **fast),
            # eps as in PPO's reference code: with 1e-8 Adam's first steps, all of full size, can
            # throw the critic off and with it, through the shared trunk, the policy.
            "policy": torch.optim.Adam(self.learner.parameters(), lr=config.policy_lr, eps=1e-5,
                                       **fast),
        }
        if self.graphs:                         # a number would be a constant in a recorded update
            for optimizer in self.optimizers.values():
                for group in optimizer.param_groups:
                    group["lr"] = torch.tensor(group["lr"], device=self.device)

    def networks(self):
        networks = {"vqvae": self.vqvae, "whitening": self.whitening, "dynamics": self.dynamics,
                    "policy": self.policy}
        if self.learner is not self.policy:
            networks["learner"] = self.learner
        return {name: network for name, network in networks.items() if network is not None}

    def embed(self, codes):
        """Codes int64 [B, 6, 6] -> what dynamics and policy see of them, float32 [B, D, 6, 6]."""
        if self.whitening is None:
            return self.vqvae.embed(codes)
        return self.whitening(self.vqvae.codebook.codes)[codes].permute(0, 3, 1, 2)

    def autocast(self, cache=True):
        """bfloat16 where it is fast. The cache keeps the cast weights until the context ends: it
        must be off where weights change inside, or later steps would go on with the old ones.
        """
        if self.use_bf16:
            return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=cache)
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def acting(self):
        """Whoever acts often does so inside: it casts the weights once for all, which else costs a
        single observation as much as its arithmetic, and below the paper's width keeps the CPU to
        one thread: too little work to share, two would mostly wait for each other.
        """
        threads = torch.get_num_threads()
        if self.config.vqvae_width < 1:
            torch.set_num_threads(1)
        try:
            # A replayed graph casts them itself: it must not read copies that are gone later.
            with contextlib.nullcontext() if self.graphs else self.autocast():
                yield
        finally:
            torch.set_num_threads(threads)

    def to_device(self, array):
        """numpy -> device.
        Frames travel as bytes and become floats there; pinned memory needs no waiting.
        """
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def observations(self, buffer, rows):
        """Rows of the buffer, int of any shape [..] -> observations uint8 [.., 4, 96, 96]."""
        return self.to_device(buffer.stacked(rows))

    def windows(self, buffer, rows, codes=None):
        """Rows int [B, L] -> what world_model_update wants: x, actions, rewards, ends;
        x are codes instead of observations if those of the whole buffer are given.
        """
        ends = buffer.terminated[rows] | buffer.truncated[rows]
        return (self.observations(buffer, rows) if codes is None
                else codes[self.to_device(rows)].long(),
                self.to_device(buffer.actions[rows].astype(np.int64)),
                self.to_device(buffer.rewards[rows]), self.to_device(ends))

    def encode_all(self, buffer, rows=None):
        """Codes of all that was collected, or of rows (int [N]) of it, uint8 [N, 6, 6]: 3.7 MB
        where the frames are 944.
        """
        rows = np.arange(len(buffer)) if rows is None else rows
        with self.autocast():
            return torch.cat([self.vqvae.encode(self.observations(buffer, part)).to(torch.uint8)
                              for part in np.array_split(rows, -(-len(rows) // 256))])

    def launch(self, function, *arguments):
        """function(*arguments), on CUDA `Replayed`."""
        if not self.graphs:
            return function(*arguments)
        return self.replayed.setdefault(function.__name__, Replayed(function))(*arguments)

    def set_rates(self, name, *rates):
        """Learning rates of an optimiser's parameter groups."""
        for group, rate in zip(self.optimizers[name].param_groups, rates):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def step(self, name, loss):
        self.optimizers[name].zero_grad()
        loss.backward()
        self.optimizers[name].step()

    def vqvae_update(self, x, lr, foreground=0.0, revive=False):
        """One gradient step of the VQ-VAE on observations uint8 [B, 4, 96, 96]
        -> parts of its loss.
        """
        self.set_rates("vqvae", lr)
        return self.launch(self.vqvae_step, x, *self.weighting(foreground), revive)

    def weighting(self, foreground):
        """What weighs pixels, if anything does: backgrounds, extra weight (a scalar)."""
        if not foreground and self.config.newest == 1:
            return None, None
        pictures = self.backgrounds
        if self.graphs:                         # always as many: another number, another graph
            pictures = pictures[torch.arange(2**DOUBLINGS, device=self.device) % len(pictures)]
        return pictures, torch.full((), foreground, device=self.device)

    def vqvae_step(self, x, pictures, weight, revive):
        """vqvae_update, on the device."""
        if pictures is not None:
            weight = foreground_weight(x, pictures, weight, self.config.newest)
        self.vqvae.train()
        with self.autocast():
            loss, parts = self.vqvae.loss(x, revive, weight)
        self.step("vqvae", loss)
        self.vqvae.eval()
        return parts

    def world_model_update(self, x, actions, rewards, ends, lr, context, vqvae_rows=None,
                           terminated=None, window_weight=None, head_lr=None):
        """One gradient step of the dynamics on windows,
        and before it one of the VQ-VAE if vqvae_rows are given.

        x uint8 [B, L, 4, 96, 96] or, where the VQ-VAE stands still, its codes int64 [B, L, 6, 6];
        actions int64, rewards float, ends bool [B, L];
        vqvae_rows int64 [n]: which of the B * L observations the VQ-VAE learns from;
        terminated bool [B, L]: what predict_ends is to predict, ends of the game or of a life
        (None: all ends);
        window_weight float [B]: of each window in the losses of rewards and ends (None: 1);
        lr, head_lr: learning rates of the cells with the head for codes, of the other heads (None:
        reward_lr).
        """
        weighting = None, None
        if vqvae_rows is not None:
            self.set_rates("vqvae", self.config.vqvae_lr)
            weighting = self.weighting(0.1 * self.config.foreground)
        self.set_rates("dynamics", lr, self.config.reward_lr if head_lr is None else head_lr)
        return self.launch(self.world_model_step, x, actions, rewards, ends, context,
                           vqvae_rows, terminated, window_weight, *weighting)

    def world_model_step(self, x, actions, rewards, ends, context, vqvae_rows, terminated,
                         window_weight, pictures, extra_weight):
        """world_model_update, on the device."""
        B, L = x.shape[:2]
        flat = x.flatten(0, 1)
        parts = {}
        if vqvae_rows is not None:
            parts = self.vqvae_step(flat[vqvae_rows], pictures, extra_weight, False)
        with self.autocast():
            # Targets move with the VQ-VAE (3.4).
            codes = x if x.ndim == 4 else self.vqvae.encode(flat).view(B, L, 6, 6)
            loss, dynamics_parts = self.dynamics_loss(
                codes, actions, rewards, ends, self.embed, context, self.config.reward_weight,
                terminated, window_weight, self.config.own_temperature)
        self.step("dynamics", loss)
        return parts | dynamics_parts

    @torch.no_grad()
    def starts(self, buffer, rows, codes=None):
        """What a dream begins with: the codes of rows, int numpy [B], and the dynamics' state after
        the `dream_context` real steps that lead there (fewer where the episode is younger)
        -> int64 [B, 6, 6], state.

        codes: those of the whole buffer, where they are known.
        """
        def codes_of(rows):
            return (self.encode_all(buffer, rows) if codes is None
                    else codes[self.to_device(rows)]).long()

        state = self.dynamics.initial_state(len(rows))
        for back in range(self.config.dream_context, 0, -1):
            before = np.maximum(rows - back, 0)
            actions = self.to_device(buffer.actions[before].astype(np.int64))
            with self.autocast():
                _, _, state = self.dynamics(self.embed(codes_of(before)), actions, state)
            # What was seen of another episode is forgotten.
            state = forget(state, self.to_device(rows - back < buffer.start[rows]))
        return codes_of(rows), state

    def policy_update(self, codes, state=None):
        """Dreams from codes int64 [B, 6, 6], with what the dynamics remembers there
        (None: nothing), then PPO on what was dreamed -> parts.
        """
        return self.launch(self.policy_step, codes, state)

    def policy_step(self, codes, state):
        """policy_update, on the device."""
        c = self.config
        with self.autocast():
            rollout = dream(self.dynamics, self.embed, self.learner, codes, c.dream_steps,
                            c.temperature, c.bootstrap, c.policy_memory, self.imagine, state,
                            c.expected_rewards)
            T, B = rollout["actions"].shape
            observations = self.embed(rollout["codes"].flatten(0, 1)).unflatten(0, (T, B))
            if c.policy_memory:
                observations = torch.cat([observations, rollout["memory"]], 2)
        with self.autocast(cache=False):
            parts = ppo_update(self.learner, self.optimizers["policy"], observations, rollout,
                               rollout["last_value"], c.gamma, c.lam, c.ppo_epochs,
                               c.minibatch, c.max_grad_norm, c.advantage_floor, clip=c.clip,
                               value_clip=c.value_clip, value_coef=c.value_coef,
                               entropy_coef=c.entropy_coef)
        if c.policy_average:
            with torch.no_grad():
                for mean, weight in zip(self.policy.parameters(), self.learner.parameters()):
                    mean.lerp_(weight, 1 - c.policy_average)
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
        actions, state = self.launch(self.choose, self.to_device(observations), temperature, state,
                                   instead)
        return actions.cpu().numpy(), state

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


def still_playing(state, over):
    """The dynamics' state without the rows of finished episodes. over: list of bool."""
    if state is None or not any(over):
        return state
    rows = [i for i, ended in enumerate(over) if not ended]
    return [(h[rows], c[rows]) for h, c in state]


# --------------------------------------------------------------------------------------------------
# A run: where it stands, what it has seen, and how it gets onto the disk in one piece
# --------------------------------------------------------------------------------------------------


def sync_folder(folder):
    """Makes a rename in this folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path, data, keep=None):
    """Bytes -> file, so that at any moment the path holds all of the old or all of the new content.

    keep: the old file gets this name, once the new one is whole on the disk.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def lock_folder(folder):
    """Keeps a second process out of a run folder;
    the lock dies with the process, however it dies.
    """
    file = open(folder / "lock", "w")
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass                                        # no such locks on this system
    except BlockingIOError:
        raise UserError(f"another process is writing {folder}; wait for it or stop it") from None
    return file


def read_checkpoint(path):
    """The dict that Run.save wrote.
    Raises UserError with one line if it is damaged, foreign or carries code.
    """
    try:
        # The archive holds a checksum of each of its parts, which torch does not look at.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise UserError(f"{path} is damaged (checksum of {damaged})")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:                      # whatever a damaged or malicious file provokes
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{path} is damaged or no checkpoint of this program "
                        f"({reason[0][:80]})") from None
    if not isinstance(state, dict) or state.get("schema") != SCHEMA or set(state) != STATE:
        raise UserError(f"{path} is no checkpoint of this version of train.py")
    return state


def newest_checkpoint(folder):
    """The state in the newer of the two checkpoints that is whole; says so if it is the older."""
    problems = []
    for name in ("checkpoint.pt", "checkpoint-previous.pt"):
        if (folder / name).exists():
            try:
                state = read_checkpoint(folder / name)
            except UserError as error:
                problems.append(str(error))
                continue
            for problem in problems:
                print(f"warning: {problem}; going on from {name}", file=sys.stderr)
            return state
    raise UserError("; ".join(problems)
                    or f"{folder} holds no checkpoint; start a run without --resume")


def config_from(state):
    """The Config inside a checkpoint or a config.json. A setting that did not exist yet when it was
    written gets its default, which is to do as before.
    """
    odd = set(state) - {f.name for f in dataclasses.fields(Config)}
    if odd:
        raise UserError("these settings belong to another version of train.py: "
                        + ", ".join(sorted(odd)))
    return Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in state.items()})


class Run:
    """Everything that a run is: settings, models, experience, position, figures so far.

    The position is (iteration, stage, update): so many updates of this stage are done. `updates`
    counts it on, `finish_stage` moves to the next stage; both save. Reward sums and other averages
    of a stage are in `sums`, finished figures in `rows` (one dict per iteration -> metrics.csv),
    seconds in `times`.
    """

    def __init__(self, config, folder, state=None):
        self.config, self.folder = config, folder
        self.env = AtariEnv(config.game, seed=config.seed)
        rates = state["rates"] if state else measure_rates(config, self.env.num_actions)
        torch.manual_seed(config.seed)
        self.models = Models(config, self.env.num_actions)
        self.device = self.models.device
        self.buffer = ExperienceBuffer(len_experience(config))
        self.iteration, self.stage, self.update = 0, "collect", 0
        self.sums, self.rows, self.times, self.shards, self.returns = {}, [], [], [], []
        self.rates = rates                      # seconds per unit of work, for the estimate
        self.codes = None                       # of all experience: see all_codes
        self.first_bad = torch.full((), -1, device=self.device)
        self.stop_signal, self.saved_at = None, time.monotonic()
        if state:
            self.restore(state)

    # ---- state <-> disk

    def state(self):
        return {
            "schema": SCHEMA, "config": dataclasses.asdict(self.config),
            "iteration": self.iteration, "stage": self.stage, "update": self.update,
            "networks": {name: m.state_dict() for name, m in self.models.networks().items()},
            "optimizers": {name: o.state_dict() for name, o in self.models.optimizers.items()},
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": (torch.cuda.get_rng_state(self.device)
                         if self.device.type == "cuda" else None),
            "sums": self.sums, "rows": self.rows, "times": self.times, "returns": self.returns,
            "shards": self.shards, "rates": self.rates,
        }

    def restore(self, state):
        try:
            for name, network in self.models.networks().items():
                network.load_state_dict(state["networks"][name])
            for name, optimizer in self.models.optimizers.items():
                here = [{k: group[k] for k in ("lr", "capturable")}     # as this device has them
                        for group in optimizer.param_groups]
                optimizer.load_state_dict(state["optimizers"][name])
                for group, ours in zip(optimizer.param_groups, here):
                    group |= ours
            self.iteration, self.stage, self.update = (state["iteration"], state["stage"],
                                                       state["update"])
            self.sums = {k: v.to(self.device) for k, v in state["sums"].items()}
            self.rows, self.times, self.returns = state["rows"], state["times"], state["returns"]
            self.shards = state["shards"]
            torch.set_rng_state(state["torch_rng"])
            if state["cuda_rng"] is not None and self.device.type == "cuda":
                torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        except (KeyError, RuntimeError, TypeError, ValueError, AttributeError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(f"the checkpoint does not fit its own settings "
                            f"({reason[0][:80]})") from None
        for shard in self.shards:
            self.buffer.add(*read_shard(self.folder, shard))

    def save(self):
        """Experience first, then the checkpoint that names it.
        A full disk is reported and survived.
        """
        self.check_finite()
        try:
            for shard in self.shards:
                if shard.get("data") is not None:
                    write_atomically(self.folder / shard["file"], shard["data"])
                    del shard["data"]
            buffer = io.BytesIO()
            torch.save(self.state(), buffer)
            write_atomically(self.folder / "checkpoint.pt", buffer.getbuffer(),
                             keep=self.folder / "checkpoint-previous.pt")
            self.write_tables()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(f"cannot write {self.folder}: {error.strerror}; "
                                f"the last checkpoint is untouched") from None
            tqdm.write(f"warning: the disk of {self.folder} is full: a checkpoint needs about "
                       f"{self.checkpoint_bytes() / 2**20:.0f} MB. The last one is untouched; "
                       f"training goes on and tries again at the next save.", file=sys.stderr)
        self.saved_at = time.monotonic()

    def checkpoint_bytes(self):
        """Weights and two Adam moments of each."""
        return 3 * sum(t.numel() * t.element_size() for m in self.models.networks().values()
                       for t in m.state_dict().values())

    def disk_need(self):
        """Bytes: three checkpoints (two are kept while one is written), 2 kB a compressed frame."""
        left = len_experience(self.config) - len(self.buffer)
        return 3 * self.checkpoint_bytes() + 2000 * left

    def write_tables(self):
        write_table(self.folder / "metrics.csv", METRICS, self.rows)
        write_table(self.folder / "times.csv", TIMES, self.times)

    def check_finite(self):
        """Stops the run before a NaN or infinity can reach a checkpoint."""
        bad = int(self.first_bad)
        if bad >= 0:
            raise UserError(f"a loss became NaN or infinite in iteration {self.iteration + 1}, "
                            f"stage {self.stage}, update {bad}; the last good checkpoint is "
                            f"{self.folder / 'checkpoint.pt'}")

    def leave(self):
        """After Ctrl-C or SIGTERM: says how to go on, exits 130 or 143."""
        print(f"\nstopped; go on with: python train.py --resume {self.folder}", file=sys.stderr)
        sys.exit(128 + self.stop_signal)

    # ---- position

    def updates(self, total):
        """Yields the numbers of the updates of this stage that are still to do,
        counting and saving on the way.
        """
        begun, first = time.monotonic(), self.update
        with tqdm(total=total, initial=self.update, desc=self.label(), leave=False,
                  disable=not sys.stderr.isatty(), dynamic_ncols=True) as bar:
            while self.update < total:
                yield self.update
                self.update += 1
                bar.update()
                now = time.monotonic()
                self.rates[self.stage] = (now - begun) / (self.update - first)
                if not bar.disable:
                    bar.set_postfix_str(f"whole run: {clock(self.seconds_left())} left",
                                        refresh=False)
                if self.stop_signal or now - self.saved_at > 60 * self.config.checkpoint_minutes:
                    self.add_time(begun)
                    begun, first = time.monotonic(), self.update
                    self.save()
                if self.stop_signal:
                    self.leave()
        self.add_time(begun)

    def add_time(self, begun):
        """Books the wall-clock seconds since `begun` under this iteration and stage."""
        while len(self.times) <= self.iteration:
            self.times.append({"iteration": len(self.times) + 1} | {stage: 0.0 for stage in STAGES})
        self.times[self.iteration][self.stage] += time.monotonic() - begun
        self.times[self.iteration]["peak_mb"] = peak_memory(self.device)

    def add(self, parts, update):
        """Adds one update's figures to the stage's averages, on the device.
        NaN means "there was none".
        """
        for k, v in parts.items():
            pair = torch.stack([v.nan_to_num(), v.isfinite().to(v.dtype)])
            self.sums[k] = self.sums[k] + pair if k in self.sums else pair
        bad = ~torch.stack([v for k, v in parts.items()
                            if not k.startswith("reward_accuracy")]).isfinite().all()
        self.first_bad = torch.where(bad & (self.first_bad < 0), update, self.first_bad)

    def finish_stage(self, following, **figures):
        """Turns averages into figures of this iteration's row,
        moves on to the stage `following`, saves.
        """
        if len(self.rows) <= self.iteration:
            self.rows.append({"iteration": self.iteration + 1, "interactions": len(self.buffer)})
        self.check_finite()
        averages = {k: float(v[0] / v[1]) for k, v in self.sums.items() if v[1] > 0}
        self.rows[self.iteration] |= averages | {k: float(v) for k, v in figures.items()}
        self.sums, self.update, self.returns = {}, 0, []
        finished, seconds = self.stage, self.times[self.iteration][self.stage]
        self.stage = following
        if following == "collect":
            self.iteration += 1
        if not sys.stderr.isatty() and seconds >= 1:
            print(f"    {finished.replace('_', ' '):11s} {clock(seconds)}   whole run: "
                  f"{clock(self.seconds_left())} left", file=sys.stderr, flush=True)
        self.save()

    def label(self):
        """Of this stage's progress bar."""
        stage = self.stage.replace("_", " ")
        return f"{self.iteration + 1:2d}/{self.config.iterations} {stage:11s}"

    @contextlib.contextmanager
    def other_dice(self, seed):
        """Inside, torch's generators start from this seed; afterwards the run's own go on."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield

    def numpy_rng(self, *numbers):
        """A generator that depends on the seed, the position and nothing else."""
        return np.random.default_rng([self.config.seed, self.iteration,
                                      STAGES.index(self.stage), *numbers])

    # ---- the clock

    def seconds_left(self):
        """What is still to do, stage by stage, at the pace measured last.
        Later rounds cost something else.
        """
        units = 0.0
        for iteration in range(self.iteration, self.config.iterations):
            for stage, count in work(self.config, iteration).items():
                if iteration == self.iteration:
                    if STAGES.index(stage) < STAGES.index(self.stage):
                        continue
                    if stage == self.stage:
                        count = max(0, count - self.update)
                units += count * self.rates[stage]
        return units


def peak_memory(device):
    """MB: of the GPU if there is one, else of the process (0 where the system does not tell)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def clock(seconds):
    """Seconds -> h:mm:ss."""
    minutes, s = divmod(int(round(seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{s:02d}"


def write_table(path, columns, rows):
    """Rows of figures -> CSV, whole or not at all;
    a figure that an iteration does not have stays empty.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([f"{row[c]:.6g}" if c in row else "" for c in columns])
    write_atomically(path, text.getvalue().encode())


# As the buffer's add() takes them. Runs from before lives were counted lack the last one.
SHARD_ARRAYS = ("frames", "actions", "rewards", "terminated", "truncated", "lost")


def make_shard(buffer, start, number):
    """The rows from `start` on as a compressed .npz in memory, with its length and SHA-256."""
    data = io.BytesIO()
    np.savez_compressed(data, **{name: getattr(buffer, name)[start:len(buffer)]
                                 for name in SHARD_ARRAYS})
    data = data.getvalue()
    return {"file": f"experience-{number:02d}.npz", "length": len(buffer) - start,
            "sha256": hashlib.sha256(data).hexdigest(), "data": data}


def read_shard(folder, shard):
    """The SHARD_ARRAYS of one shard, refused unless every bit is as it was written."""
    path = folder / shard["file"]
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}, which the checkpoint names: "
                        f"{error.strerror}") from None
    if hashlib.sha256(data).hexdigest() != shard["sha256"]:
        raise UserError(f"{path} was altered: its SHA-256 is not the one in the checkpoint")
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return [arrays[name] for name in SHARD_ARRAYS if name in arrays]


# Columns of metrics.csv. Averages are over all updates of the stage.
METRICS = {
    "iteration": "1 .. 15", "interactions": "real steps so far (x4 = frames)",
    "collect_episodes": "episodes that ended while collecting",
    "collect_return": "their mean score",
    "collect_rewards": "share of collected steps with a reward other than 0",
    "elbo": "nats per observation, of the VQ-VAE's updates",
    "reconstruction": "-log p(x|z), nats per observation",
    "commitment": "mean squared distance of encoder output and code",
    "usage": "share of codes used in a batch",
    "perplexity": "exp(entropy) of the codes in a batch, 1 .. 128",
    "foreground_error": "0 perfect, 1 background only, on the newest data",
    "code_loss": "cross-entropy, nats per code",
    "code_accuracy": "share of next codes predicted right",
    "reward_loss": "cross-entropy, nats per step",
    "reward_accuracy_minus": "share of -1 rewards predicted right",
    "reward_accuracy_zero": "the same for 0", "reward_accuracy_plus": "the same for +1",
    "end_loss": "with --predict-ends: weighted cross-entropy, nats per step",
    "end_precision": "share of predicted ends that came true",
    "end_recall": "share of true ends that were predicted",
    "dream_return": "mean sum of rewards in a dream of `dream_steps` steps",
    "policy_loss": "PPO, clipped objective", "value_loss": "PPO, half squared error",
    "entropy": "of the policy in dreams, nats",
    "approx_kl": "KL(old, new policy) per update, nats", "clip_fraction": "share of clipped ratios",
    "real_return": "mean score of the evaluation episodes", "real_std": "their standard deviation",
    "real_median": "their median", "real_best": "their best", "real_episodes": "how many",
}
TIMES = ("iteration", *STAGES, "peak_mb")       # seconds of each stage; peak memory of the process


def batches_per_epoch(config, rows):
    """Full batches of windows in one pass over so many rows, whatever the windows' offset."""
    return (rows - config.window + 1) // config.window // config.dynamics_batch


def work(config, iteration):
    """Units of work of each stage in one iteration: steps, updates, updates, updates, episodes."""
    first = iteration == 0
    rows = config.first_interactions + iteration * config.interactions
    last = iteration == config.iterations - 1
    return {
        "collect": config.first_interactions if first else config.interactions,
        "warm_up": round(config.scale * config.warmup_epochs *
                         (config.first_interactions // config.warmup_batch)) if first else 0,
        "world_model": round(config.scale * config.world_model_epochs[iteration]
                             * batches_per_epoch(config, rows)),
        "policy": round(config.scale * config.ppo_updates[iteration]),
        "evaluate": config.final_episodes if last else config.eval_episodes,
    }


# --------------------------------------------------------------------------------------------------
# The stages (Section 3.4)
# --------------------------------------------------------------------------------------------------


def collect(run):
    """Real experience: a uniformly random policy in the first round,
    then the policy as the dreams left it.

    Each round starts with a new episode, and cuts the last one (truncated), so a round depends on
    nothing but its seed. It is over in a minute or so:
    a kill in the middle of it starts the round again.
    """
    c, begun = run.config, time.monotonic()
    rng = run.numpy_rng()
    frame = run.env.reset(seed=int(rng.integers(2**31)))
    start, stack, score, returns = len(run.buffer), np.stack([frame] * 4), 0.0, []
    state = None                                # what the policy remembers, with policy_memory
    free = 0                                    # the step at which no action is held any longer
    steps, M = work(c, run.iteration)["collect"], run.env.num_actions
    for step in tqdm(range(steps), desc=run.label(), leave=False, unit=" steps",
                     disable=not sys.stderr.isatty(), dynamic_ncols=True):
        if run.iteration == 0:
            # Uniformly random. That never crosses Freeway's road: with random_segment the odds are
            # uneven, a few actions preferred, and drawn anew every so many steps.
            if c.random_segment and step % c.random_segment == 0:
                odds = rng.dirichlet(np.full(M, 0.3))
            action = int(rng.choice(M, p=odds) if c.random_segment else rng.integers(M))
        else:
            # With `explore`, now and then a random action is held for 2, 4, 8 or 16 steps (as in
            # temporally extended exploration, Dabney et al., 2021): a policy that has made up its
            # mind would never show the model what the others lead to, and that may take a while.
            if step >= free and rng.random() < c.explore:
                held, free = rng.integers(M, size=1), step + 2 ** int(rng.integers(1, 5))
            actions, state = run.models.act(stack[None], c.collect_temperature, state,
                                            held if step < free else None)
            action = int(actions[0])
        lives = run.env.lives
        next_frame, reward, terminated, truncated = run.env.step(action)
        run.buffer.add(frame, action, reward, terminated, truncated or step == steps - 1,
                       run.env.lives < lives)
        score += reward
        if terminated or truncated:
            returns.append(score)
            next_frame, score, state = run.env.reset(), 0.0, None
            stack = np.stack([next_frame] * 4)
        else:
            stack = np.concatenate([stack[1:], next_frame[None]])
        frame = next_frame
        if run.stop_signal:
            run.leave()                         # nothing of this round is on disk: it starts again
    run.shards.append(make_shard(run.buffer, start, run.iteration + 1))
    run.add_time(begun)
    run.rates["collect"] = (time.monotonic() - begun) / steps
    figures = {"collect_return": np.mean(returns)} if returns else {}
    rewarded = np.mean(run.buffer.rewards[start:len(run.buffer)] != 0)
    run.finish_stage("warm_up" if run.iteration == 0 else "world_model",
                     collect_episodes=len(returns), collect_rewards=rewarded, **figures)


def warm_up(run):
    """Trains the VQ-VAE alone, at a higher learning rate,
    so that the dynamics has something to predict.
    """
    c, order = run.config, None
    frames = some_frames(run.models, run.buffer)
    run.models.backgrounds = backgrounds(frames)
    if run.iteration == 0 and run.update == 0:
        run.models.vqvae.start_at_brightness(frames.median(0).values.float().mean() / 255)
    per_epoch, total = len(run.buffer) // c.warmup_batch, work(c, run.iteration)["warm_up"]
    for update in run.updates(total):
        epoch, batch = divmod(update, per_epoch)
        if batch == 0 or order is None:             # None: resumed in the middle of an epoch
            order = run.numpy_rng(epoch).permutation(len(run.buffer))
        rows = order[batch * c.warmup_batch:(batch + 1) * c.warmup_batch]
        x = run.models.observations(run.buffer, rows)
        # The learning rate falls all the way; the foreground's weight holds for half, then falls.
        done = update / total
        lr = c.warmup_lr + (c.warmup_lr_end - c.warmup_lr) * done
        foreground = c.foreground * 0.1 ** min(max((done - 0.5) / 0.4, 0), 1)
        run.add(run.models.vqvae_update(x, lr, foreground, c.revive_codes), update)
    if c.whiten:
        run.models.whitening.fit(run.models.vqvae.codebook.codes)
    run.finish_stage("world_model")


def some_frames(models, buffer):
    """uint8 [N, 96, 96]: some 800 frames of all in the buffer, evenly spread."""
    frames = buffer.frames[:len(buffer)]
    return models.to_device(frames[::-(-len(frames) // 800)])


def learn_world_model(run):
    """Dynamics on windows of real experience; the VQ-VAE, slowed down, in every third step.

    With vqvae_share < 1 the VQ-VAE stands still in the rest of the round, and all codes are
    computed once.
    """
    c, buffer, order, codes = run.config, run.buffer, None, None
    run.codes = None                            # the VQ-VAE is about to change
    run.models.backgrounds = backgrounds(some_frames(run.models, buffer))
    per_epoch = batches_per_epoch(c, len(buffer))
    total = work(c, run.iteration)["world_model"]
    # The learning rate falls within each round, and starts lower from round to round.
    first_lr = c.dynamics_lr_end + (c.dynamics_lr - c.dynamics_lr_end) / (run.iteration + 1)**0.5
    for update in run.updates(total):
        epoch, batch = divmod(update, per_epoch)
        if batch == 0 or order is None:
            order, weights = epoch_of_windows(buffer, c, per_epoch, run.numpy_rng(epoch))
            weights = run.models.to_device(weights)
        rows = order[batch]                                              # [B, L]
        done = update / total
        lr = first_lr + (c.dynamics_lr_end - first_lr) * done
        head_lr = c.reward_lr + (c.reward_lr_end - c.reward_lr) * done
        context = c.window if done < c.teacher else c.context
        if codes is None and done >= c.vqvae_share:
            codes = all_codes(run)
        vqvae_rows = None
        if codes is None and update % c.vqvae_every == c.vqvae_every - 1:
            chosen = run.numpy_rng(epoch, batch).permutation(rows.size)[:c.vqvae_batch]
            vqvae_rows = run.models.to_device(chosen)
        over = None
        if c.predict_ends:
            over = run.models.to_device(buffer.terminated[rows] | buffer.lost[rows] & c.lives)
        run.add(run.models.world_model_update(*run.models.windows(buffer, rows, codes), lr, context,
                                              vqvae_rows, over, weights[batch], head_lr),
                update)
    figures = {"foreground_error": world_model_picture(run)}
    for name, of in (("end_precision", "end_predicted"), ("end_recall", "end_true")):
        if of in run.sums and run.sums[of][0] > 0:
            figures[name] = run.sums["end_right"][0] / run.sums[of][0]
    run.finish_stage("policy", **figures)


def all_codes(run):
    """uint8 [N, 6, 6] of all experience, computed once a round, when the VQ-VAE stands still."""
    if run.codes is None:
        run.codes = run.models.encode_all(run.buffer)
    return run.codes


def rewarded_rows(buffer):
    """bool [N]: the steps whose reward is of class -1 or 1 for the dynamics (`reward_class`)."""
    return np.round(np.clip(buffer.rewards[:len(buffer)], -1, 1)) != 0


def epoch_of_windows(buffer, config, batches, rng):
    """One pass over all windows in random order -> int64 [batches, B, L],
    weights of the windows in the losses of rewards and ends, float32 [batches, B].

    With reward_windows > 0, that share of each batch is replaced by windows that hold a reward,
    where there are any: three rewards among 32,000 steps are otherwise met once per pass and
    forgotten in between. Their weights make up for it: together they count no more than the
    windows with rewards would have, had none been replaced. With recent_windows > 0, that share of
    each batch is replaced by windows of the newest `first_interactions` steps: they show what the
    policy does now, and are the least known.
    """
    B, rewards = config.dynamics_batch, rewarded_rows(buffer)
    windows = rng.permutation(buffer.windows(config.window, rng))
    paid = rewards[windows[:, :-1]].any(1)
    is_recent = windows[:, 0] >= len(buffer) - config.first_interactions
    rewarded, recent = windows[paid], windows[is_recent]
    first, last = (round(share * B) for share in (config.reward_windows, config.recent_windows))
    order = windows[:batches * B].reshape(batches, B, config.window)
    if last:
        order[:, -last:] = recent[rng.integers(len(recent), size=(batches, last))]
    weights = np.ones((batches, B), np.float32)
    if first and len(rewarded):
        order[:, :first] = rewarded[rng.integers(len(rewarded), size=(batches, first))]
        # The share of windows with rewards, now and as it would be without these.
        now = rewards[order[..., :-1]].any(2)
        share = (1 - last / B) * paid.mean() + last / B * paid[is_recent].mean()
        if share < 1:
            weights[now] = share / (1 - share) * (1 - now.mean()) / now.mean()
    return order, weights


def dream_starts(buffer, config, rng):
    """Rows of the observations in which the dreams start, int64 [dreams]: drawn from all of them;
    with reward_starts > 0 that share from the last `dream_steps` before a real reward.
    """
    rows = rng.integers(len(buffer), size=config.dreams)
    rewarded = np.flatnonzero(rewarded_rows(buffer))
    near = round(config.reward_starts * config.dreams)
    if near and len(rewarded):
        before = rng.integers(config.dream_steps, size=near)
        rows[:near] = np.maximum(rewarded[rng.integers(len(rewarded), size=near)] - before, 0)
    return rows


def learn_policy(run):
    """PPO inside the dream, and nowhere else."""
    c = run.config
    codes = all_codes(run) if c.vqvae_share < 1 else None
    for update in run.updates(work(c, run.iteration)["policy"]):
        rows = dream_starts(run.buffer, c, run.numpy_rng(update))
        run.add(run.models.policy_update(*run.models.starts(run.buffer, rows, codes)), update)
    run.finish_stage("evaluate")


def real_steps(models, game, seeds, temperature):
    """Plays one whole real episode for each seed, all side by side. A generator: each step yields,
    for all that still play, (number of the episode, frame uint8 [96, 96], action taken on it,
    reward, terminated, truncated).

    Up to 30 no-ops, no sticky actions, no life-loss termination, actions sampled from
    softmax(logits / temperature), the reward as the game counts it.
    """
    envs = [AtariEnv(game, seed=seed) for seed in seeds]
    stacks = np.stack([[env.reset()] * 4 for env in envs])                       # [B, 4, 96, 96]
    playing, state = np.arange(len(envs)), None
    while len(playing):
        (actions, state), rows = models.act(stacks[playing], temperature, state), []
        for i, action in zip(playing, actions):
            frame, reward, terminated, truncated = envs[i].step(action)
            rows.append((i, stacks[i, -1].copy(), action, reward, terminated, truncated))
            stacks[i] = np.concatenate([stacks[i, 1:], frame[None]])
        yield rows
        over = [terminated or truncated for *_, terminated, truncated in rows]
        playing, state = playing[~np.array(over)], still_playing(state, over)


def play_episodes(models, game, seeds, temperature, stopped=lambda: False, label="playing"):
    """Scores of whole real episodes, one for each seed, as a list; None if stopped."""
    scores = np.zeros(len(seeds))
    with models.acting(), tqdm(desc=label, unit=" steps", disable=not sys.stderr.isatty(),
                               leave=False) as bar:
        for rows in real_steps(models, game, seeds, temperature):
            if stopped():
                return None
            for i, _, _, reward, _, _ in rows:
                scores[i] += reward
            bar.update(len(rows))
    return scores.tolist()


def evaluate(run):
    """The policy in the real game: whole episodes that nothing learns from, in groups of eight."""
    c = run.config
    last = run.iteration == c.iterations - 1
    episodes, group = work(c, run.iteration)["evaluate"], 8
    while len(run.returns) < episodes:
        begun, n = time.monotonic(), min(group, episodes - len(run.returns))
        seeds = [int(s) for s in run.numpy_rng(len(run.returns)).integers(2**31, size=n)]
        with run.other_dice(seeds[0]):
            scores = play_episodes(run.models, c.game, seeds, c.eval_temperature,
                                   lambda: run.stop_signal is not None, run.label())
        if scores is None:
            run.leave()
        run.returns += scores
        run.update = len(run.returns)
        run.add_time(begun)
        run.rates["evaluate"] = (time.monotonic() - begun) / n
        if len(run.returns) < episodes:
            run.save()
    returns = np.array(run.returns)
    if last:
        result = {"game": c.game, "preset": c.preset, "seed": c.seed,
                  "interactions": len(run.buffer), "episodes": len(returns), "protocol": PROTOCOL,
                  "temperature": c.eval_temperature, "mean": returns.mean(), "std": returns.std(),
                  "median": np.median(returns), "best": returns.max(), "returns": returns.tolist()}
        write_atomically(run.folder / "evaluation.json", json.dumps(result, indent=1).encode())
    if episodes:
        run.finish_stage("collect", real_return=returns.mean(), real_std=returns.std(),
                         real_median=np.median(returns), real_best=returns.max(),
                         real_episodes=episodes)
    else:
        run.finish_stage("collect")
    report(run)


PROTOCOL = ("sampled actions, up to 30 no-ops at reset, no sticky actions, no life-loss "
            "termination, unclipped game score, at most 108,000 frames")


# --------------------------------------------------------------------------------------------------
# What one sees
# --------------------------------------------------------------------------------------------------


def report(run):
    """One line for the iteration just finished, and the curves of all of them."""
    row = run.rows[-1]
    parts = [f"{row['iteration']:2d}/{run.config.iterations}", f"{row['interactions']:6d} steps"]
    for name, label, form in (
            ("elbo", "elbo", ".0f"), ("foreground_error", "fg", ".2f"),
            ("perplexity", "perplexity", ".0f"), ("code_loss", "code loss", ".3f"),
            ("code_accuracy", "acc", ".3f"), ("reward_loss", "reward loss", ".4f"),
            ("entropy", "entropy", ".2f"), ("dream_return", "dream return", ".3f"),
            ("collect_return", "collected", ".1f"), ("real_return", "real return", ".1f")):
        if name in row:
            parts.append(f"{label} {row[name]:{form}}")
    tqdm.write("  ".join(parts) + f"  | {clock(sum(sum(t[s] for s in STAGES) for t in run.times))}")
    sys.stdout.flush()
    progress_picture(run)


def save_figure(figure, path):
    import matplotlib.pyplot as plt
    data = io.BytesIO()
    figure.savefig(data, dpi=80)
    plt.close(figure)
    try:
        write_atomically(path, data.getvalue())
    except OSError as error:
        tqdm.write(f"warning: {path} could not be written: {error.strerror}", file=sys.stderr)


def progress_picture(run):
    """progress.png: the figures of metrics.csv against real interactions."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5))
    panels = (("score in the real game", ("real_return", "collect_return")),
              ("return of a dream", ("dream_return",)),
              ("policy entropy (nats)", ("entropy",)), ("foreground error", ("foreground_error",)),
              ("code accuracy", ("code_accuracy",)), ("reward accuracy", (
                  "reward_accuracy_minus", "reward_accuracy_zero", "reward_accuracy_plus")))
    for ax, (title, names) in zip(axes.flat, panels):
        for name, style in zip(names, ("-o", "--s", ":^")):
            points = [(r["interactions"], r[name]) for r in run.rows if name in r]
            if points:
                ax.plot(*zip(*points), style, label=name, markersize=4)
        ax.set_title(title)
        ax.set_xlabel("real interactions (x4 = frames)")
        ax.grid(alpha=0.3)
        if len(names) > 1 and ax.lines:
            ax.legend(fontsize=8)
    figure.suptitle(f"{run.config.game}, preset {run.config.preset}, seed {run.config.seed}")
    figure.tight_layout()
    save_figure(figure, run.folder / "progress.png")


@torch.no_grad()
def open_loop(models, codes, actions, context=4, temperature=1.0):
    """Dreams along real stretches, all of them side by side, under the real actions.

    codes    int64 [B, L, 6, 6]; the first `context` are seen, the others only give the length
    actions  int64 [B, L]
    -> dreamed codes [B, L, 6, 6] (the first `context` are the real ones), rewards [B, L - 1] in
       {-1, 0, 1}; both sampled, each step from the dreamed codes of the one before

        t          0    1    2    3  |  4    5   ..  53       context 4, L = 54
        codes    z_0  z_1  z_2  z_3  | z^_4 z^_5 .. z^_53     z^_4 is dreamed step 1, z^_53 step 50
        rewards  r^_0 r^_1 r^_2 r^_3   r^_4 ..  r^_52         r^_3 comes with z^_4: step 1
    """
    state, dreamed, rewards = models.dynamics.initial_state(len(codes)), [codes[:, 0]], []
    with models.autocast():
        for t in range(codes.shape[1] - 1):
            z = models.embed(dreamed[t])
            following, reward, _, state = dream_step(models.dynamics, z, actions[:, t], state,
                                                     temperature)
            dreamed.append(codes[:, t + 1] if t + 1 < context else following)
            rewards.append(reward)
    return torch.stack(dreamed, 1), torch.stack(rewards, 1)


@torch.no_grad()
def world_model_picture(run):
    """world_model_<iteration>.png from the newest experience
    -> foreground error on 256 of its observations.
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    models, buffer, rng = run.models, run.buffer, run.numpy_rng(0, 0, 0)
    start = len(buffer) - run.shards[-1]["length"]
    rows = rng.integers(start, len(buffer), size=256)
    errors, n = [], 64
    x = torch.cat([models.to_device(buffer.stacked(r)) for r in np.split(rows, 256 // n)])
    with models.autocast():
        decoded = torch.cat([models.vqvae.decode(models.vqvae.encode(part)) for part in x.split(n)])
    foreground = foreground_error(x.float() / 255, decoded, pictures=models.backgrounds)

    # One stretch of real play in which something moves, dreamed along from its 4th observation on.
    length, context, every = 28, 4, 3
    length = min(length, len(buffer) - start)
    starts = rng.integers(start, len(buffer) - length + 1, size=64)
    inside = [s for s in starts if not buffer.ends[s:s + length - 1].any()] or [starts[0]]
    motion = [buffer.frames[s:s + length].astype(np.float32).std(0).mean() for s in inside]
    rows = np.arange(length) + inside[int(np.argmax(motion))]
    with run.other_dice(int(rows[0])), models.autocast():
        codes = models.vqvae.encode(models.to_device(buffer.stacked(rows)))
        actions = models.to_device(buffer.actions[rows].astype(np.int64))
        dreamed = open_loop(models, codes[None], actions[None], context,
                            run.config.temperature)[0][0]
        images = [models.vqvae.decode(z)[:, -1].cpu().numpy() for z in (codes, dreamed)]

    shown = list(range(0, length, every))
    figure, axes = plt.subplots(5, len(shown), figsize=(1.35 * len(shown), 7.2), squeeze=False)
    labels = ("real", "reconstructed", "its codes", "dreamed", "its codes")
    for column, t in enumerate(shown):
        axes[0, column].imshow(buffer.frames[rows[t]], cmap="gray", vmin=0, vmax=255)
        axes[1, column].imshow(images[0][t], cmap="gray", vmin=0, vmax=1)
        axes[2, column].imshow(codes[t].cpu(), cmap="nipy_spectral", vmin=0, vmax=127)
        axes[3, column].imshow(images[1][t], cmap="gray", vmin=0, vmax=1)
        axes[4, column].imshow(dreamed[t].cpu(), cmap="nipy_spectral", vmin=0, vmax=127)
        axes[0, column].set_title("seen" if t < context else f"+{t - context + 1}", fontsize=9)
        for row in range(5):
            axes[row, column].set_xticks([])
            axes[row, column].set_yticks([])
    for row in range(5):
        axes[row, 0].set_ylabel(labels[row])
    figure.suptitle(f"{run.config.game} after {len(buffer)} interactions; "
                    f"+n: dreamed n steps under the real actions; "
                    f"foreground error {float(foreground):.2f}", fontsize=10)
    figure.tight_layout()
    save_figure(figure, run.folder / f"world_model_{run.iteration + 1:02d}.png")
    return foreground


def played_at_random(game, steps):
    """-> (ExperienceBuffer of so many random steps, seconds that each took)."""
    env, buffer, rng = AtariEnv(game, seed=0), ExperienceBuffer(steps), np.random.default_rng(0)
    frame, begun = env.reset(), time.perf_counter()
    for action in rng.integers(env.num_actions, size=steps):
        following, reward, terminated, truncated = env.step(action)
        buffer.add(frame, action, reward, terminated, truncated)
        frame = env.reset() if terminated or truncated else following
    return buffer, (time.perf_counter() - begun) / steps


def stage_jobs(config, models, buffer):
    """Work of each stage on random rows: {name: (units, function that does so many at once)}.

    A unit of collect is one step of one environment, of evaluate one step of eight, else an update;
    world_model leaves the VQ-VAE alone, world_model+vqvae updates it too, as every third one does;
    with vqvae_share < 1 there are also updates on codes computed once, and a frame's share of that.
    """
    c, rng = config, np.random.default_rng(0)

    def observations(*shape):
        return models.observations(buffer, rng.integers(len(buffer), size=shape))

    def world_model(vqvae_rows=None, codes=None):
        starts = rng.integers(len(buffer) - c.window, size=(c.dynamics_batch, 1))
        windows = models.windows(buffer, starts + np.arange(c.window), codes)
        models.world_model_update(*windows, c.dynamics_lr, c.context, vqvae_rows)

    def act(environments, steps):
        with models.acting():
            for _ in range(steps):
                models.act(buffer.stacked(np.arange(environments)), 1.0)

    size = c.dynamics_batch * c.window
    chosen = models.to_device(rng.permutation(size)[:c.vqvae_batch])
    on_codes, codes = {}, None
    if c.vqvae_share < 1:
        codes = models.encode_all(buffer)
        on_codes = {"dynamics": (1, lambda: world_model(codes=codes)),
                    "encode": (len(buffer), lambda: models.encode_all(buffer))}
    return on_codes | {
        "collect": (20, lambda: act(1, 20)),
        "warm_up": (1, lambda: models.vqvae_update(observations(c.warmup_batch), c.warmup_lr,
                                                   c.foreground, c.revive_codes)),
        "world_model": (1, world_model),
        "world_model+vqvae": (1, lambda: world_model(chosen)),
        "policy": (1, lambda: models.policy_update(*models.starts(
            buffer, rng.integers(len(buffer), size=c.dreams), codes))),
        "evaluate": (10, lambda: act(8, 10)),
    }


def seconds_of(job, device):
    """How long this call takes, until the device is done with it."""
    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()

    wait()
    begun = time.perf_counter()
    job()
    wait()
    return time.perf_counter() - begun


def matmul_rate(device, dtype):
    """GFLOP/s of a large matrix product: what this machine can do at best."""
    n = 2048 if device.type == "cpu" else 8192
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    a @ b
    return 2 * n**3 / min(seconds_of(lambda: a @ b, device) for _ in range(5)) / 1e9


def rates_from(seconds, config, emulator, episode=1500):
    """Seconds per unit of stage_jobs and per step of the emulator, steps of an episode
    -> seconds per unit of `work` of each stage.
    """
    every, share = 1 / config.vqvae_every, config.vqvae_share
    world_model = (1 - every) * seconds["world_model"] + every * seconds["world_model+vqvae"]
    if share < 1:
        rounds = range(config.iterations)
        frames = sum(config.first_interactions + i * config.interactions for i in rounds)
        updates = sum(work(config, i)["world_model"] for i in rounds)
        world_model = (share * world_model + (1 - share) * seconds["dynamics"]
                       + seconds["encode"] * frames / max(updates, 1))
    return {"collect": seconds["collect"] + emulator, "warm_up": seconds["warm_up"],
            "world_model": world_model,
            "policy": seconds["policy"],
            # Eight episodes are played side by side.
            "evaluate": (seconds["evaluate"] / 8 + emulator) * episode}


def measure_rates(config, num_actions):
    """A first guess at seconds per unit of work of each stage, in a few seconds."""
    if config.compile:
        print("compiling, which takes a minute or two", file=sys.stderr, flush=True)
    models, seconds = Models(config, num_actions), {}
    buffer, emulator = played_at_random(config.game, 200 + config.window)
    for name, (units, job) in stage_jobs(config, models, buffer).items():
        # The first calls of each pay for one-time work.
        for _ in range(2 if models.graphs else name != "policy"):
            job()
        seconds[name] = seconds_of(job, models.device) / units
    return rates_from(seconds, config, emulator)


def benchmark(config):
    """--benchmark: what each stage costs here and how long the whole run will take.
    All it writes goes into a temporary folder.
    """
    from torch.utils.flop_counter import FlopCounterMode
    with tempfile.TemporaryDirectory() as folder:
        run = Run(config, pathlib.Path(folder))
        device, dtype = run.device, torch.bfloat16 if run.models.use_bf16 else torch.float32
        rate = matmul_rate(device, dtype)
        print(f"{config.game}, preset {config.preset} on {config.device}, "
              f"{torch.get_num_threads()} threads, {dtype}; "
              f"large matrix products: {rate:.0f} GFLOP/s")
        print(f"{'one update of':18s} {'GFLOP':>8s} {'ms':>9s} {'GFLOP/s':>8s} {'of matmul':>9s}")
        run.buffer, emulator = played_at_random(config.game, 2500 + config.window)
        seconds, jobs = {}, stage_jobs(config, run.models, run.buffer)
        to_count, again = jobs, 0
        if config.compile or run.models.graphs:     # in which one can't count
            plain = Models(dataclasses.replace(config, compile=False, cuda_graphs=False),
                           run.env.num_actions)
            to_count, again = stage_jobs(config, plain, run.buffer), 2
        for name, (units, job) in jobs.items():
            with FlopCounterMode(display=False) as counter:
                to_count[name][1]()
            gflop = counter.get_total_flops() / units / 1e9
            for _ in range(again):
                job()                               # computes, or compiles; is recorded
            repeats = max(3, min(30, int(12 / max(seconds_of(job, device), 1e-3))))
            seconds[name] = float(np.median([seconds_of(job, device)
                                             for _ in range(repeats)])) / units
            speed = gflop / seconds[name]
            print(f"{name:18s} {gflop:8.2f} {1000 * seconds[name]:9.2f} {speed:8.0f} "
                  f"{speed / rate:9.0%}", flush=True)

        # How long random play lasts; 1,500 steps if no episode ended.
        lasts = np.diff(np.flatnonzero(run.buffer.ends), prepend=-1)
        rates = rates_from(seconds, config, emulator, np.mean(lasts) if len(lasts) else 1500)
        # What goes with every step of collecting, and with every round.
        rates["collect"] += seconds_of(lambda: make_shard(run.buffer, 0, 1),
                                       device) / len(run.buffer)
        run.shards = [{"length": len(run.buffer)}]

        def between_stages():
            backgrounds(some_frames(run.models, run.buffer))
            world_model_picture(run)
            progress_picture(run)
            for _ in range(4):
                run.save()

        between_stages()
        total = dict.fromkeys(STAGES, 0.0)
        total["pictures and saving"] = config.iterations * seconds_of(between_stages, device)
    for iteration in range(config.iterations):
        for stage, count in work(config, iteration).items():
            total[stage] += count * rates[stage]
    frames, peak = len_experience(config) * 96 * 96 / 2**20, peak_memory(device)
    print("the whole run: "
          + ", ".join(f"{s.replace('_', ' ')} {clock(t)}" for s, t in total.items()))
    where = "of the GPU, and" if device.type == "cuda" else "and with all frames collected"
    print(f"               about {clock(sum(total.values()))} (h:mm:ss); peak memory here "
          f"{peak:.0f} MB {where} up to {frames:.0f} MB more")


def len_experience(config):
    """Real interactions of the whole run: 12,800 + 14 x 6,400 = 102,400 in the paper."""
    return config.first_interactions + config.interactions * (config.iterations - 1)


# --------------------------------------------------------------------------------------------------
# The algorithm, and the command line
# --------------------------------------------------------------------------------------------------


def train(run):
    """Section 3.4, "Iterative Training". Each stage ends by naming the next one."""
    while run.iteration < run.config.iterations:
        if run.stage == "collect":
            with run.models.acting():
                collect(run)                        # 12,800 steps at first, then 6,400 a round
        if run.stage == "warm_up":
            warm_up(run)                            # round 1 only: the VQ-VAE alone
        if run.stage == "world_model":
            learn_world_model(run)                  # the dynamics, and the VQ-VAE every third step
        if run.stage == "policy":
            learn_policy(run)                       # PPO, only in dreams
        if run.stage == "evaluate":
            evaluate(run)                           # whole real episodes, for us to see


def parse(arguments):
    """Command line -> (namespace of what was given explicitly, set of field names given)."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog="All settings have a default that "
        "depends on --preset; the defaults shown are those of `paper`.")
    parser.add_argument("--resume", metavar="RUN", help="go on with the run in this folder")
    parser.add_argument("--benchmark", action="store_true",
                        help="measure each stage, in some two minutes, say how long the whole run "
                             "will take, leave no files")
    parser.add_argument("--override", metavar="FIELD", action="append", default=[],
                        help="with --resume: let this setting change "
                             f"(one of: {', '.join(MAY_CHANGE)})")
    for f in dataclasses.fields(Config):
        kind, shown = f.type, f.default
        if kind is bool:
            parser.add_argument(f"--{f.name}", metavar="true|false", default=argparse.SUPPRESS,
                                nargs="?", const=True, type=boolean,
                                help=f"{f.metadata['help']} [{str(shown).lower()}]")
        elif kind is tuple:
            shown = ",".join(str(v) for v in shown)
            parser.add_argument(f"--{f.name}", metavar="N,N,..", default=argparse.SUPPRESS,
                                type=numbers, help=f"{f.metadata['help']} [{shown}]")
        else:
            choices = tuple(PRESETS) if f.name == "preset" else None
            parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, type=kind,
                                choices=choices, metavar=None if choices else kind.__name__,
                                help=f"{f.metadata['help']} [{shown}]".replace("%", "%%"))
    arguments = sys.argv[1:] if arguments is None else arguments
    return parser.parse_args([underscores(argument) for argument in arguments])


def underscores(argument):
    """"--policy-memory=true" -> "--policy_memory=true": flags may be written either way."""
    flag, equals, value = argument.partition("=")
    if not flag.startswith("--"):
        return argument
    return "--" + flag[2:].replace("-", "_") + equals + value


def boolean(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError("true or false, please")
    return text.lower() == "true"


def numbers(text):
    """"3,2,1" -> (3, 2, 1); a single number stands for all iterations."""
    values = tuple(float(v) for v in text.split(","))
    return tuple(int(v) if v == int(v) else v for v in values)


def settings_from(given):
    """Explicit flags over the preset over the defaults."""
    has_cuda = torch.cuda.is_available()
    given.setdefault("preset", "paper" if has_cuda else "small")
    given.setdefault("device", "cuda" if has_cuda else "cpu")
    settings = PRESETS[given["preset"]] | given
    config = Config(**settings)
    for name in ("world_model_epochs", "ppo_updates"):
        values = getattr(config, name)
        if len(values) != config.iterations and (len(values) == 1 or name not in given):
            # One number stands for all rounds; a preset's list is cut, or its last number repeated.
            setattr(config, name, (values + values[-1:] * config.iterations)[:config.iterations])
    return config


def resume_settings(config, given, override):
    """The checkpoint's settings, changed where --override allows it;
    UserError names what differs.
    """
    for name in override:
        if name not in MAY_CHANGE:
            raise UserError(f"--override {name} is not possible; "
                            f"what may change: {', '.join(MAY_CHANGE)}")
    for name, value in given.items():
        old = getattr(config, name)
        if value == old or (name == "out"):
            continue
        if name not in override:
            hint = (f"add --override {name} to change it" if name in MAY_CHANGE
                    else "start a new run to change it")
            raise UserError(f"this run has {name} = {old}, the command line says {value}; {hint}")
        setattr(config, name, value)
    return config


def start(arguments):
    """Command line -> a Run, new or resumed, with its folder locked."""
    given = vars(parse(arguments))
    folder, override = given.pop("resume"), given.pop("override")
    if given.pop("benchmark"):
        config = settings_from(given)
        check(config)
        benchmark(config)
        sys.exit()
    if folder is None:
        config = settings_from(given)
        check(config)
        folder = pathlib.Path(config.out) / f"{config.game}-{config.preset}-s{config.seed}"
        AtariEnv(config.game)                       # an unknown game fails before a folder is made
        if any(folder.glob("checkpoint*.pt")) or any(folder.glob("experience-*.npz")):
            raise UserError(f"{folder} already holds a run; go on with it: python train.py --resume"
                            f" {folder}   (or choose another --out or --seed, or delete it)")
        state = None
    else:
        folder = pathlib.Path(folder)
        if not folder.is_dir():
            raise UserError(f"there is no run folder {folder}")
        if not any(folder.glob("checkpoint*.pt")) and (folder / "config.json").exists():
            # Killed before its first save.
            state, saved = None, json.loads((folder / "config.json").read_text())
        else:
            state = newest_checkpoint(folder)
            saved = state["config"]
        config = resume_settings(config_from(saved), given, override)
        check(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(folder)
        write_atomically(folder / "config.json",
                         json.dumps(dataclasses.asdict(config), indent=1).encode())
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from None
    run = Run(config, folder, state)
    run.lock = lock
    free, need = shutil.disk_usage(folder).free, run.disk_need()
    if free < need:
        raise UserError(f"{folder} has {free / 2**20:.0f} MB free, this run needs about "
                        f"{need / 2**20:.0f} MB; make room or choose another --out")
    if state is None:
        run.save()
    else:
        run.write_tables()                          # cut back to where the checkpoint stands
    return run


def keep_freed_memory():
    """glibc gives large freed blocks back to the system, and each update would have it clear the
    same pages anew: 7 to 11 % of an update on a CPU. Elsewhere than in glibc nothing happens.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(-3, 2**25)                              # M_MMAP_THRESHOLD: the most it allows, 32 MiB
    mallopt(-1, 2**31 - 1)                          # M_TRIM_THRESHOLD


def main(arguments=None):
    keep_freed_memory()
    try:
        run = start(arguments)
        c = run.config

        def on_signal(number, frame):
            if run.stop_signal is not None:
                os._exit(128 + number)              # the second time: at once
            run.stop_signal = number
            print("\nfinishing this update and saving; once more to leave at once", file=sys.stderr)

        signal.signal(signal.SIGINT, on_signal)
        signal.signal(signal.SIGTERM, on_signal)
        steps = len_experience(c)
        print(f"{c.game}, preset {c.preset}, {steps:,} interactions ({4 * steps:,} frames) in "
              f"{c.iterations} rounds, on {c.device}"
              f"{' with bfloat16' if run.models.use_bf16 else ''}; "
              f"about {clock(run.seconds_left())} (h:mm:ss) to go; into {run.folder}", flush=True)
        if run.iteration == c.iterations:
            print(f"this run is complete; judge it with: python evaluate.py {run.folder}")
        train(run)
        print(f"done: python evaluate.py {run.folder}")
    except (UserError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:                       # before there was anything to save
        sys.exit(130)
    except torch.OutOfMemoryError:
        sys.exit("error: out of GPU memory; "
                 "lower --warmup_batch, --dynamics_batch, --dreams or --minibatch")


if __name__ == "__main__":
    main()
