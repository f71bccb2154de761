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
import io
import itertools
import threading

import numpy as np
import torch

from controller import Controller
from mdnrnn import MDNRNN
from vae import VAE

TASKS = {"car": dict(z=32, actions=3, hidden=256, done=False, steps=1000),
         "doom": dict(z=64, actions=1, hidden=512, done=True, steps=2100)}
COLLECT, LEARN_V, LEARN_M, VIRTUAL, ACTUAL, UNSEEN = range(6)   # streams of random numbers


def seed_of(*numbers):
    """A seed below 2^31 for this tuple of numbers >= 0."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0]) >> 1


ENGINES = {}                                            # Doom's start slowly: each worker keeps its


def make_env(config, steps, slot=0):
    """The real environment, with this time limit. Raises ImportError if a package is missing."""
    if config.task == "car":
        from carracing import CarRacing
        return CarRacing(max_steps=steps)
    from doom import DoomEnv
    key = threading.get_ident(), slot
    if key not in ENGINES:
        ENGINES[key] = DoomEnv()
    ENGINES[key].max_steps = steps
    return ENGINES[key]


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
    envs = [make_env(config, config.steps, i) for i in range(len(seeds))]
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
    return score.tolist()


def dream(config, weights, policy, seeds, temperature=None):
    """Doom: the same in M's dream, one per seed -> steps survived, a list of floats."""
    from doom import DoomDream
    _, m, starts = unpack(config, weights)
    env = DoomDream(m, starts, len(seeds), config.steps, temperature or config.temperature)
    act = policy_of(config, policy, seeds)
    x, alive, score = env.reset(seed=seeds[0])[0], np.ones(len(seeds), bool), np.zeros(len(seeds))
    while alive.any():
        x, reward, done, truncated, _ = env.step(act(x))
        score += alive * reward
        alive &= ~(done | truncated)
    return score.tolist()
