"""Rollouts: V, M and C meet the environment, or M's dream of it (Figure 2).

        +---------------------- environment ----------------------+
        |                                                         |
       x_t --> V --> z_t --+--> C(z_t, h_t) --> a_t --------------+--> x_{t+1}, reward
                           |         ^           |
                           +--> M <--+-- h_t     |                h_{t+1} = M(z_t, a_t, h_t)
                                ^----------------+

In Doom's dream M itself draws z_{t+1}, and V and the environment stay out.

Every rollout is a pure function of its arguments, so that it can run anywhere: in this process, in
another, on another machine. `config` is a train.Config, or anything with its fields.

Dimension key:  n rollouts side by side   T steps   Z z   H hidden   F features of C   A actions
"""
import dataclasses
import gc
import io
import itertools
import multiprocessing
import os
import pathlib
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch

from controller import Controller
from mdnrnn import MDNRNN
from vae import VAE

TASKS = {"car": dict(z=32, actions=3, hidden=256, done=False),
         "doom": dict(z=64, actions=1, hidden=512, done=True)}
COLLECT, LEARN_V, LEARN_M, VIRTUAL, ACTUAL, UNSEEN = range(6)   # streams of random numbers


def seed_of(*numbers):
    """A seed below 2^31 for this tuple of numbers >= 0."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0]) >> 1


def make_env(config, steps):
    """The real environment, with this time limit. Raises ImportError if a package is missing."""
    if config.task == "car":
        from carracing import CarRacing
        return CarRacing(max_steps=steps)
    from doom import DoomEnv
    return DoomEnv(steps)


def to_action(config, a):
    """C's outputs in (-1, 1) -> the environment's action."""
    if config.task == "car":
        from carracing import pedals
        return pedals(a)
    return np.asarray(a, np.float32)


def random_actions(config, seed):
    """Endless random play: uniform actions, each held for 1 to 10 steps (code; for Doom)."""
    rng = np.random.default_rng(seed)
    while True:
        a = to_action(config, rng.uniform(-1, 1, TASKS[config.task]["actions"]))
        yield from itertools.repeat(a, rng.integers(1, 11))


def record_type(config):
    """One step of random play on disk: what was seen, what was done then, and what became of it."""
    return np.dtype([("frame", np.uint8, (64, 64, 3)),
                     ("action", np.float32, (TASKS[config.task]["actions"],)),
                     ("first", np.bool_), ("done", np.bool_)])


def random_rollout(config, number):
    """-> records [T] of random rollout `number`."""
    seed = seed_of(config.seed, COLLECT, number)
    env = make_env(config, config.rollout_steps)
    frame, records, over = env.reset(seed=seed)[0], [], False
    for action in random_actions(config, seed):
        if over:
            env.close()
            return np.array(records, record_type(config))
        next_frame, _, done, truncated, _ = env.step(action)
        records.append((frame, action, not records, done))
        frame, over = next_frame, done or truncated


def new_models(config):
    t = TASKS[config.task]
    return VAE(t["z"]), MDNRNN(t["z"], t["actions"], t["hidden"], predict_done=t["done"])


def new_controller(config):
    """C: 867 numbers for the car, 99 or 1,443 without M (Table 1); 1,088 for Doom."""
    t = TASKS[config.task]
    memory = 0 if config.reads != "zh" else t["hidden"] * (2 if config.task == "doom" else 1)
    return Controller(t["z"] + memory, t["actions"], hidden=40 if config.reads == "z40" else 0,
                      bias=config.task == "car")


def pack(state):
    """What workers need of a run's state, as bytes: M, Doom's starts, and V, but not its decoder.
    """
    data = io.BytesIO()
    encoder = {k: v for k, v in state["V"].items() if not k.startswith("decoder")}
    torch.save({"V": encoder, "M": state["M"], "starts": state["starts"]}, data)
    return data.getvalue()


def unpack(config, weights):
    """The inverse -> V, M, starts."""
    torch.set_num_threads(1)                            # equal numbers everywhere; cores are taken
    state = torch.load(io.BytesIO(weights), weights_only=True)
    with torch.device("meta"):                          # no time lost on initial weights
        v, m = new_models(config)
    v.load_state_dict(state["V"], strict=False, assign=True)
    v.encoder.to(memory_format=torch.channels_last)     # as frames are: a fifth faster
    m.load_state_dict(state["M"], assign=True)
    return v, m, state["starts"]


def policy_of(config, policy, seeds):
    """policy "nothing", "random" or theta -> function: features [n, F] -> actions [n, A]."""
    if isinstance(policy, str):
        still = np.zeros(TASKS[config.task]["actions"], np.float32)
        streams = [random_actions(config, s) if policy == "random" else itertools.repeat(still)
                   for s in seeds]
        return lambda x: np.stack([next(s) for s in streams])
    c, theta = new_controller(config), policy.astype(np.float32)
    return lambda x: to_action(config, c.act(theta, x))


@torch.no_grad()
def play(config, weights, policy, seeds):
    """Real rollouts side by side, one per seed -> their sums of rewards, a list of floats.

        z_t = V(x_t);  a_t = C(z_t, h_t);  x_{t+1} = env(a_t);  h_{t+1} = M(z_t, a_t, h_t)
    """
    act = policy_of(config, policy, seeds)
    envs = [make_env(config, config.steps) for _ in seeds]
    frames = np.stack([env.reset(seed=s)[0] for env, s in zip(envs, seeds)])     # [n, 64, 64, 3]
    score, alive, x, first = np.zeros(len(seeds)), np.ones(len(seeds), bool), None, True
    if weights is not None:
        v, m, _ = unpack(config, weights)
        h, c = m.initial_state(len(seeds))
    while alive.any():
        if weights is not None:
            z = v.encode(torch.from_numpy(frames))[0]                            # mu [n, Z]
            memory = {"car": [h], "doom": [c, h]}[config.task] if config.reads == "zh" else []
            x = torch.cat([z, *memory], 1).numpy()                               # [n, F]
        actions = act(x)
        for i in np.flatnonzero(alive):
            frames[i], reward, done, truncated, _ = envs[i].step(actions[i])
            score[i] += reward
            alive[i] = not (done or truncated)
        if weights is not None and config.reads == "zh":
            restart = torch.full((len(seeds), 1), first)
            h, c = m(z[:, None], torch.from_numpy(actions)[:, None], (h, c), restart)[-1]
        first = False
    for env in envs:
        env.close()
    del envs, env
    gc.collect()                            # Box2D's worlds hold themselves: 2 to 4 MB a rollout
    return score.tolist()


def dream(config, weights, policy, seeds):
    """Doom: len(seeds) rollouts in M's dream at config.temperature -> steps survived, a list of
    floats. The first seed decides all.
    """
    from doom import DoomDream
    _, m, starts = unpack(config, weights)
    env = DoomDream(m, starts, len(seeds), config.steps, config.temperature)
    act = policy_of(config, policy, seeds)
    x, alive, score = env.reset(seed=seeds[0])[0], np.ones(len(seeds), bool), np.zeros(len(seeds))
    while alive.any():
        x, reward, done, truncated, _ = env.step(act(x))
        score += alive * reward
        alive &= ~(done | truncated)
    return score.tolist()


def start_worker():
    """A worker is a process group of its own: Ctrl-C does not reach it, and when the main process
    dies, however it dies, the group goes too, Doom's engines included.
    """
    os.setpgrp()
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os.killpg(0, signal.SIGKILL)),
                     daemon=True).start()


def open_pool(config):
    """An executor: this machine's cores, or a Dask cluster's."""
    if not config.scheduler:
        os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"   # it complains when we just leave
        return ProcessPoolExecutor(config.workers, multiprocessing.get_context("spawn"),
                                   initializer=start_worker)
    try:
        from distributed import Client
    except ImportError:
        raise ImportError("--scheduler needs Dask: pip install distributed") from None
    try:
        client = Client(config.scheduler, timeout=10)
    except (OSError, ValueError) as error:
        raise OSError(f"no Dask scheduler at {config.scheduler} ({error})") from None
    for name in "vae", "mdnrnn", "controller", "carracing", "doom", "rollout", "train":
        client.upload_file(str(pathlib.Path(__file__).with_name(f"{name}.py")), load=False)
    return client.get_executor()


def estimate(config, stage, update):
    """Minutes for what is left of this stage and for the later ones, a dict: a few steps of each
    are measured here.
    """
    c, minutes, threads = config, {}, torch.get_num_threads()
    left = dict(rollouts=c.rollouts, V=c.vae_updates, M=c.m_updates, C=c.generations, done=0)
    left[stage] -= update
    few = dataclasses.replace(c, steps=min(200, c.steps), rollout_steps=min(300, c.rollout_steps))
    theta = np.zeros(new_controller(c).size)
    v, m = new_models(c)
    x = torch.zeros(c.vae_batch, 64, 64, 3, dtype=torch.uint8)
    z = torch.zeros(c.m_batch, c.m_steps, v.z_size)
    weights = pack(dict(V=v.state_dict(), M=m.state_dict(), starts=z[:1, :2]))
    # Doom's players die early, how early is a guess.
    rollout, short, long = (dream, 0.15, 0.4) if c.task == "doom" else (play, 1, 1)
    stages = {                                          # what is measured, and how often it comes
        "rollouts": (lambda: random_rollout(few, 0),
                     left["rollouts"] / c.workers * short * c.rollout_steps / few.rollout_steps),
        "V": (lambda: v.loss(x)[0].backward(), left["V"]),
        "M": (lambda: m.loss(z, z[..., :m.action_size], z, z[..., 0])[0].backward(), left["M"]),
        "C": (lambda: rollout(few, weights, theta, list(range(c.trials))),
              left["C"] * c.population / c.workers * long * c.steps / few.steps)}
    for name in list(left)[list(left).index(stage):-1]:
        job, times = stages[name]
        job()                                           # the first time warms up
        start = time.perf_counter()
        job()
        minutes[name] = (time.perf_counter() - start) * times / 60
    torch.set_num_threads(threads)                      # rollouts set it to 1
    return minutes
