"""Algorithm 1 of the paper, from top to bottom: random rollouts, V, M, C.

    python train.py --task car                      # drives on what V and M make of the pictures
    python train.py --task doom                     # learns to dodge in M's dream, then plays Doom
    python train.py --task car --preset smoke       # every stage, in two minutes
    python train.py --resume runs/car-small-s0      # goes on where a run was stopped or killed

      1 rollouts           2 V                 3 M                          4 C
    random play  -->  frame -> z  -->  z_t, a_t, h_t -> z_{t+1}  -->  CMA-ES, the car's judged on
                      [look at it]     [held-out likelihood,          the road, Doom's in dreams
                                        Doom: dreamed survival]

In brackets are the gates: a bad V cannot be repaired by a good C. Look at vae.png. An M that
predicts no better than "the next z is this z", or whose dreams are easier or harder to survive than
the game, stops the run with one line. The folder of a run:

    runs/car-small-s0/
        config.json      all settings              metrics.csv   all figures   curves.png
        checkpoint.pt    all that --resume needs   checkpoint-previous.pt      the one before
        rollouts.bin     what random play saw      vae.png       held-out frames, reconstructed

Random numbers are pure functions of (seed, stage, update), or of (seed, stage, generation,
rollout): all candidates of a generation meet the same tracks and dreams, so that luck does not
choose among them. Neither an interruption nor the number of workers changes a result.

Dimension key:  B batch   T steps   N records of random play   Z z
"""
import argparse
import csv
import dataclasses
import hashlib
import io
import json
import math
import os
import pathlib
import signal
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from functools import partial

import matplotlib
import numpy as np
import torch
from tqdm import tqdm

from controller import CMAES
from mdnrnn import log_likelihood
from rollout import (ACTUAL, LEARN_M, LEARN_V, VIRTUAL, dream, estimate, make_env, new_controller,
                     new_models, open_pool, pack, play, random_rollout, record_type, seed_of)

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def setting(default, text):
    """A field with its line of help. Sources: "paper", or "code": the one behind the paper."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass
class Config:
    """Every setting of a run; each is a flag. The defaults are preset `small` for the car."""

    task: str = setting("car", "car: CarRacing; doom: VizDoom's Take Cover")
    preset: str = setting("small", "small: two cores; paper: its sizes; smoke: two minutes")
    seed: int = setting(0, "seed of all randomness")
    out: str = setting("runs", "the run's folder is made in this one")
    workers: int = setting(os.cpu_count() or 1, "processes that play; results do not depend on it")
    scheduler: str = setting("", "address of a Dask scheduler whose workers play instead")
    models: str = setting("", "a run whose V and M to take over: only C is evolved")

    rollouts: int = setting(320, "1: random rollouts; paper: 10,000")
    rollout_steps: int = setting(300, "their longest length; paper: 1000, of a car long lost")
    steps: int = setting(1000, "longest rollout of C; paper: 1000 (car), 2100 (Doom)")
    vae_updates: int = setting(3500, "2: updates of V; paper: one pass")
    vae_batch: int = setting(32, "frames per update; code: 100")
    vae_lr: float = setting(3e-4, "Adam's learning rate; code: 1e-4, with many more updates")
    m_updates: int = setting(1000, "3: updates of M; code: 4000")
    m_batch: int = setting(32, "sequences per update; code: 100")
    m_steps: int = setting(64, "their length; code: 999 (car), 500 (Doom)")
    gate: float = setting(0.15, "Doom: largest relative error of dreamed survival; inf: go on")
    reads: str = setting("zh", "4: C reads zh; for Table 1 also z, or z40: z, 40 hidden units")
    temperature: float = setting(1.15, "Doom: tau of the dreams C is evolved in (paper, Table 2)")
    population: int = setting(24, "candidates per generation; paper: 64")
    trials: int = setting(4, "rollouts averaged per candidate; paper: 16")
    generations: int = setting(50, "of CMA-ES; paper: 1800 for the car")
    eval_every: int = setting(10, "generations between measurements of the actual score; code: 25")
    eval_rollouts: int = setting(24, "rollouts per measurement; code: 1024")


SMOKE = dict(rollouts=8, rollout_steps=80, steps=80, vae_updates=40, vae_batch=16, m_updates=30,
             m_batch=8, m_steps=32, gate=math.inf, population=4, trials=2, generations=3,
             eval_every=2, eval_rollouts=2)
PAPER = dict(rollouts=10_000, rollout_steps=1000, vae_updates=100_000, vae_batch=100, vae_lr=1e-4,
             m_updates=4000, m_batch=100, m_steps=999, population=64, trials=16, generations=1800,
             eval_every=25, eval_rollouts=1024)
DOOM = dict(rollout_steps=2100, steps=2100)
PRESETS = {                                             # what differs from the defaults above
    ("small", "car"): {},
    ("small", "doom"): DOOM | dict(rollouts=600, vae_updates=9000, m_updates=2500, population=32,
                                   trials=8, eval_rollouts=32),
    ("paper", "car"): PAPER,
    ("paper", "doom"): PAPER | DOOM | dict(vae_updates=30_000, m_updates=24_000, m_steps=500),
    ("smoke", "car"): SMOKE,
    ("smoke", "doom"): SMOKE | dict(rollout_steps=150)}
# What may differ when a run goes on: it changes no finished work.
MAY_CHANGE = "workers", "scheduler", "gate", "m_updates", "generations"
SAVE_SECONDS = 120                                      # no more than this is ever lost


class UserError(Exception):
    """Something the user can put right; its text is printed, in one line."""


def write_atomically(path, data, keep=None):
    """At any moment the path holds all of the old or all of the new bytes. keep: the old's name."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if keep is not None and path.exists():
        os.replace(path, keep)
    os.replace(temporary, path)


def read_checkpoint(folder):
    """The newest whole checkpoint, a dict (see Run). Raises UserError if there is none."""
    problem = f"{folder} holds no checkpoint; start a run without --resume"
    for name in "checkpoint.pt", "checkpoint-previous.pt":
        if (folder / name).exists():
            data = (folder / name).read_bytes()
            # The first 32 bytes are the checksum of all others: torch sees none that are damaged.
            if hashlib.sha256(data[32:]).digest() == data[:32]:
                if name != "checkpoint.pt":
                    print(f"warning: {problem}; going on from {name}", file=sys.stderr)
                try:
                    return torch.load(io.BytesIO(data[32:]), weights_only=True)
                except Exception:                       # more than tensors and numbers: not ours
                    pass
            problem = f"{folder / name} is damaged"
    raise UserError(problem)


class Run:
    """Settings, folder, and `state`, the dict that is the checkpoint: stage and update (the next
    one of that stage), records (their number), V, M, optimizer, starts, es, theta (C), rows.
    """

    def __init__(self, config, folder, state=None):
        self.config, self.folder = config, folder
        self.state = state or dict(stage="rollouts", update=0, records=0, starts=None, rows=[])
        self.saved = time.monotonic()

    def save(self, always=True):
        """Everything onto the disk; unless always, only if the last time is long ago."""
        if not always and time.monotonic() - self.saved < SAVE_SECONDS:
            return
        self.state["config"] = dataclasses.asdict(self.config)
        data = io.BytesIO()
        torch.save(self.state, data)
        data = data.getvalue()
        write_atomically(self.folder / "checkpoint.pt", hashlib.sha256(data).digest() + data,
                         keep=self.folder / "checkpoint-previous.pt")
        text = io.StringIO()
        names = dict.fromkeys(name for row in self.state["rows"] for name in row)
        table = csv.DictWriter(text, list(names), lineterminator="\n")
        table.writeheader()
        table.writerows(self.state["rows"])
        write_atomically(self.folder / "metrics.csv", text.getvalue().encode())
        write_atomically(self.folder / "config.json",
                         json.dumps(self.state["config"], indent=1).encode())
        draw_curves(self)
        self.saved = time.monotonic()

    def log(self, **row):
        place = dict(stage=self.state["stage"], update=self.state["update"])
        self.state["rows"].append(place | {k: round(float(v), 5) for k, v in row.items()})

    def records(self):
        """All records [N] of random play, where rollouts begin, and where the last twentieth of
        the rollouts begins: it is held out, nothing learns from it.
        """
        path, kind = self.folder / "rollouts.bin", record_type(self.config)
        if not path.exists() or path.stat().st_size != self.state["records"] * kind.itemsize:
            raise UserError(f"{path} is missing or not whole: start the run anew")
        data = np.memmap(path, kind, "c")
        firsts = np.flatnonzero(data["first"])
        return data, firsts, firsts[-max(1, len(firsts) // 20)]


def save_figure(figure, path):
    figure.tight_layout()
    data = io.BytesIO()
    figure.savefig(data, dpi=80)
    plt.close(figure)
    write_atomically(path, data.getvalue())


def draw_curves(run):
    """curves.png: the losses of V and M, and the scores of C."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6))
    for ax, stage, names, label in (
            (axes[0], "V", ("error",), "squared error per frame"),
            (axes[1], "M", ("z_loss", "done_loss"), "nats per number of z, per step (done)"),
            (axes[2], "C", ("mean", "best", "actual"), "score")):
        for name in names:
            points = [(row["update"], row[name]) for row in run.state["rows"]
                      if row["stage"] == stage and name in row]
            ax.plot(*zip(*points) if points else ((), ()), ".-" if stage == "C" else "-",
                    label=name)
        ax.set(title=stage, xlabel="generation" if stage == "C" else "update", ylabel=label)
        ax.legend()
    axes[0].set_yscale("log")
    save_figure(figure, run.folder / "curves.png")


def collect_rollouts(run, pool):
    """1: random rollouts, appended to rollouts.bin in their order."""
    c, state = run.config, run.state
    with open(run.folder / "rollouts.bin", "ab") as file:
        # Cut off what was written after the checkpoint.
        file.truncate(state["records"] * record_type(c).itemsize)
        left = range(state["update"], c.rollouts)
        for records in tqdm(pool.map(partial(random_rollout, c), left), "rollouts", c.rollouts,
                            initial=state["update"], disable=None):
            file.write(records.tobytes())
            state["update"] += 1
            state["records"] += len(records)
            if time.monotonic() - run.saved > SAVE_SECONDS or state["update"] == c.rollouts:
                file.flush()
                os.fsync(file.fileno())
                run.save()
    print(f"1 rollouts: {c.rollouts} of random play, {state['records']:,} frames")


def learn(run, model, lr, updates, loss_of, end=1.0, clip=math.inf):
    """The loop that V and M share: Adam, its rate falling from lr to lr * end.
    loss_of(rng, generator) -> (loss, parts). Goes on where the checkpoint stands.
    """
    state, stage = run.state, run.state["stage"]
    optimizer = torch.optim.Adam(model.parameters(), lr)
    if state.get("optimizer"):
        model.load_state_dict(state[stage])
        optimizer.load_state_dict(state["optimizer"])
    state[stage] = model.state_dict()                   # the model's own tensors: always current
    bar = tqdm(range(state["update"], updates), stage, updates, initial=state["update"],
               disable=None)
    for update in bar:
        seed = seed_of(run.config.seed, LEARN_V if stage == "V" else LEARN_M, update)
        optimizer.param_groups[0]["lr"] = lr * end ** (update / updates)
        loss, parts = loss_of(np.random.default_rng(seed), torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_value_(model.parameters(), clip)
        optimizer.step()
        state["update"] = update + 1
        if update % 10 == 9:
            bar.set_postfix({k: f"{v:.3f}" for k, v in parts.items()})
            run.log(**parts)
        state["optimizer"] = optimizer.state_dict()
        run.save(always=False)


def learn_v(run, pool):
    """2: V learns to reconstruct frames. Its gate is a picture to look at."""
    c = run.config
    data, _, held = run.records()
    torch.manual_seed(seed_of(c.seed, LEARN_V))         # initial weights
    v = new_models(c)[0]

    def loss_of(rng, generator):
        rows = np.sort(rng.integers(held, size=c.vae_batch))
        return v.loss(torch.from_numpy(data["frame"][rows]), generator)

    learn(run, v, c.vae_lr, c.vae_updates, loss_of)

    x = torch.from_numpy(data["frame"][np.linspace(held, len(data) - 1, 200).astype(int)])
    with torch.no_grad():
        seen, real = v.decode(v.encode(x)[0]), x.permute(0, 3, 1, 2) / 255       # [200, 3, 64, 64]
    error, spread = ((y - real).square().sum((1, 2, 3)).mean() for y in (seen, real.mean(0)))
    run.log(held_out_error=error, mean_frame_error=spread)
    figure, axes = plt.subplots(2, 10, figsize=(15, 3.4))
    for row, frames, label in zip(axes, (real, seen), ("held out", "through z")):
        row[0].set_ylabel(label)
        for ax, frame in zip(row, frames[::20]):
            ax.imshow(frame.permute(1, 2, 0).numpy())
            ax.set(xticks=[], yticks=[])
    save_figure(figure, run.folder / "vae.png")
    print(f"2 V: squared error of held-out frames {error:.1f}, of the mean frame {spread:.1f}; "
          f"look at {run.folder / 'vae.png'}")


def learn_m(run, pool):
    """3: M learns to predict the next z. Its gates: held-out likelihood, Doom: dreamed survival."""
    c, state = run.config, run.state
    data, firsts, held = run.records()
    torch.manual_seed(seed_of(c.seed, LEARN_M))         # initial weights
    v, m = new_models(c)
    v.load_state_dict(state["V"])
    with torch.no_grad():                               # mu, logvar of all frames [N, 2, Z]
        latents = torch.cat([torch.stack(v.encode(torch.from_numpy(data["frame"][i:i + 500])), 1)
                             for i in tqdm(range(0, len(data), 500), "V sees", disable=None)])
    action, first, done = (torch.from_numpy(data[name].copy())
                           for name in ("action", "first", "done"))
    state["starts"] = latents[firsts[:1000]].clone()    # where Doom's dreams begin (code: 1000)

    def windows(begin, generator):
        """Sequences that begin at these records -> what M.loss takes."""
        rows = torch.as_tensor(begin)[:, None] + torch.arange(c.m_steps + 1)     # [B, T + 1]
        z = v.sample(*latents[rows].unbind(2), generator)   # anew: M must not learn V's noise
        rows, next_rows = rows[:, :-1], rows[:, 1:]
        return dict(z=z[:, :-1], action=action[rows], next_z=z[:, 1:], restart=first[rows],
                    done=done[rows], inside=~first[next_rows])

    if min(held, len(data) - held) <= c.m_steps:
        raise UserError("fewer frames than --m_steps: more --rollouts are needed")
    learn(run, m, 1e-3, c.m_updates, lambda rng, generator: m.loss(**windows(
        rng.integers(held - c.m_steps, size=c.m_batch), generator)), end=0.1, clip=1.0)

    # The gate: nats per number of held-out z, for M, for one Gaussian with the mean and variance of
    # M's mixture, and for "the next z is this z" give or take what is usual in training.
    generator = torch.Generator().manual_seed(c.seed)
    known, w = (windows(np.arange(low, high - c.m_steps, c.m_steps)[:64], generator)
                for low, high in ((0, held), (held, len(data))))
    with torch.no_grad():
        log_pi, mean, log_std, *_ = m(w["z"], w["action"], m.initial_state(len(w["z"])),
                                      w["restart"])
    middle = (log_pi.exp() * mean).sum(-1)                                       # [B, T, Z]
    variance = (log_pi.exp() * (mean ** 2 + (2 * log_std).exp())).sum(-1) - middle ** 2
    usual = (known["next_z"] - known["z"])[known["inside"]].std(0)               # [Z]
    normal = torch.distributions.Normal
    nats, gauss, stays = (x[w["inside"]].mean() for x in (
        log_likelihood(w["next_z"], log_pi, mean, log_std),
        normal(middle, variance.sqrt()).log_prob(w["next_z"]),
        normal(w["z"], usual).log_prob(w["next_z"])))
    run.log(held_out=nats, one_gaussian=gauss, next_is_this=stays)
    print(f"3 M: log-likelihood of held-out z {nats:.3f} nats per number; one Gaussian "
          f"{gauss:.3f}; 'the next z is this z' {stays:.3f}")
    passed = bool(nats > max(gauss, stays))

    # Doom's second gate: at tau 1, doing nothing and random play last as long as in the game.
    calm = dataclasses.replace(c, temperature=1.0)
    for policy in ("nothing", "random") if c.task == "doom" else ():
        seeds = fours([seed_of(c.seed, ACTUAL, i, 1) for i in range(3 * c.eval_rollouts)])
        dreamed, real = (np.concatenate(list(pool.map(partial(how, calm, weights, policy), seeds)))
            for how, weights in ((dream, pack(state)), (play, None)))
        error = dreamed.mean() / real.mean() - 1
        passed = passed and abs(error) <= c.gate
        run.log(**{f"dreamed_{policy}": dreamed.mean(), f"real_{policy}": real.mean()})
        print(f"3 M: {policy}: {dreamed.mean():.0f} +- {dreamed.std():.0f} steps survived in "
              f"dreams, {real.mean():.0f} +- {real.std():.0f} in the game: {error:+.0%}")
    if not passed and c.gate < math.inf:
        run.save()
        raise UserError("M does not pass its gate: no controller is evolved on it. Train it longer"
                        f": --resume {run.folder} --m_updates {2 * c.m_updates}   (or --gate inf)")


def fours(seeds):
    """Groups of rollouts that are played side by side, on however many workers."""
    return [seeds[i:i + 4] for i in range(0, len(seeds), 4)]


def evolve_c(run, pool):
    """4: CMA-ES evolves C, the car's on the road, Doom's in dreams alone."""
    c, state = run.config, run.state
    es = CMAES(np.zeros(new_controller(c).size), 0.1, c.population, seed_of(c.seed, VIRTUAL))
    if "es" in state:
        es.load({k: v.numpy() if torch.is_tensor(v) else v for k, v in state["es"].items()})
    weights, rollout = pack(state), dream if c.task == "doom" else play
    bar = tqdm(total=c.generations * c.population, initial=es.generation * c.population, desc="C",
               disable=None)
    while es.generation < c.generations:
        candidates, scores = es.ask(), []
        seeds = [seed_of(c.seed, VIRTUAL, es.generation, i) for i in range(c.trials)]
        for returns in pool.map(partial(rollout, c, weights), candidates,
                                [seeds] * c.population):
            scores.append(np.mean(returns))
            bar.update()
        scores = np.array(scores)
        # Smaller is better to CMA-ES. Large weights cost a little (code).
        es.tell(0.01 * (candidates ** 2).mean(1) - scores)
        state["update"] = es.generation
        row = dict(mean=scores.mean(), best=scores.max(), sigma=es.sigma)
        if es.generation % c.eval_every == 0 or es.generation == c.generations:
            # The actual score of the mean, always from the same seeds, which nothing is evolved on.
            seeds = [seed_of(c.seed, ACTUAL, i) for i in range(c.eval_rollouts)]
            actual = np.concatenate(list(pool.map(partial(play, c, weights, es.mean),
                                                  fours(seeds))))
            row |= dict(actual=actual.mean(), actual_std=actual.std())
            # The car keeps its best mean. Doom keeps the last: the game judges, it does not choose.
            if c.task == "doom" or actual.mean() > state.get("best_actual", -math.inf):
                state.update(best_actual=float(actual.mean()), theta=torch.tensor(es.mean))
        bar.write(f"4 C: generation {es.generation}: "
                  + ", ".join(f"{k} {v:.3g}" if k == "sigma" else f"{k} {v:.1f}"
                              for k, v in row.items()))
        run.log(**row)
        state["es"] = {k: torch.tensor(v) if isinstance(v, np.ndarray) else v
                       for k, v in es.state().items()}
        run.save()
    bar.close()


def train(run, pool):
    """Algorithm 1; what is done already is skipped."""
    for stage, work, following in (("rollouts", collect_rollouts, "V"), ("V", learn_v, "M"),
                                   ("M", learn_m, "C"), ("C", evolve_c, "done")):
        if run.state["stage"] == stage:
            work(run, pool)
            run.state.update(stage=following, update=0, optimizer=None)
            run.save()


def start(arguments):
    """Command line -> a Run, new or resumed. Raises UserError for whatever cannot work."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage="%(prog)s --task car"
                                     "|doom [--SETTING VALUE ..], or --resume FOLDER")
    parser.add_argument("--resume", type=pathlib.Path, help="go on with the run in this folder")
    for f in dataclasses.fields(Config):
        parser.add_argument(f"--{f.name}", type=f.type, default=argparse.SUPPRESS,
                            metavar=f.type.__name__, help=f"{f.metadata['help']} [{f.default}]")
    given = vars(parser.parse_args(arguments))
    folder, state = given.pop("resume"), None
    if folder is not None:
        state = read_checkpoint(folder)
        for name in given:
            if name not in MAY_CHANGE and given[name] != state["config"][name]:
                raise UserError(f"--{name} cannot change when a run goes on; start a new one")
        c = Config(**state["config"] | given)
    else:
        preset = given.get("preset", "small"), given.get("task")
        if preset not in PRESETS:
            raise UserError("--task is car or doom, --preset is small, paper or smoke")
        c = Config(**PRESETS[preset] | given)
    if c.reads not in (("zh", "z", "z40") if c.task == "car" else ("zh",)):
        raise UserError("--reads is zh, for the car also z or z40")
    for f in dataclasses.fields(c):
        low = {"seed": 0, "population": 4, "rollouts": 2}.get(f.name, 1 if f.type is int else 1e-9)
        if f.type in (int, float) and not getattr(c, f.name) >= low:
            raise UserError(f"--{f.name} must be {low} or more")
    make_env(c, c.steps).close()                        # says what is missing
    if state is not None:
        return Run(c, folder, state)

    name = f"{c.task}-{c.preset}-s{c.seed}" + (f"-{c.reads}" if c.reads != "zh" else "")
    if c.temperature != Config.temperature:
        name += f"-tau{c.temperature:.2f}"
    run = Run(c, pathlib.Path(c.out) / name)
    if any(run.folder.glob("checkpoint*.pt")):
        raise UserError(f"{run.folder} already holds a run: go on with --resume {run.folder}, or "
                        "choose another --out or --seed")
    if c.models:
        other = read_checkpoint(pathlib.Path(c.models))
        if other["config"]["task"] != c.task or other["stage"] not in ("C", "done"):
            raise UserError(f"{c.models} holds no finished V and M for --task {c.task}")
        run.state.update(stage="C", **{part: other[part] for part in ("V", "M", "starts")})
    run.folder.mkdir(parents=True, exist_ok=True)
    run.save()
    return run


def main(arguments=None):
    """-> exit status."""
    run = pool = None
    signal.signal(signal.SIGTERM, signal.default_int_handler)   # as Ctrl-C
    try:
        run = start(arguments)
        minutes = estimate(run.config, run.state["stage"], run.state["update"])
        print(f"{run.config.task}, preset {run.config.preset}, into {run.folder}: "
              f"about {sum(minutes.values()):.0f} minutes to go "
              f"({', '.join(f'{stage} {m:.1f}' for stage, m in minutes.items())})", flush=True)
        pool = open_pool(run.config)
        train(run, pool)
        print(f"done: python evaluate.py {run.folder}")
        return 0
    except (UserError, ImportError) as error:
        message = str(error)
    except KeyboardInterrupt:
        message = "stopped"
    except BrokenProcessPool:
        message = "a worker died, perhaps for want of memory: try fewer --workers"
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    finally:
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)
    if run is not None and "--resume" not in message:
        message += f"; go on with --resume {run.folder}"
    print(f"error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    import train                                        # where workers will look functions up
    status = train.main()
    sys.stdout.flush()
    os._exit(status)                                    # at once; workers see it and follow
