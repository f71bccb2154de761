"""How good is a run, and what does it dream? Beside the numbers of the paper.

    python evaluate.py runs/car-small-s0                     # 100 episodes, beside the paper's row
    python evaluate.py runs/*                                # all runs, one table
    python evaluate.py runs/* --table1                       # the paper's Table 1 (car) and ours
    python evaluate.py runs/* --table2                       # its Table 2 (Doom, five temperatures)
    python evaluate.py runs/car-small-s0 --dream dream.gif   # V and M beside the real thing
    python evaluate.py runs/doom-small-s0 --play             # drive or dodge in the dream yourself

Protocol, the paper's: mean and standard deviation of 100 episodes, of 1000 steps (Doom: 2100) at
most, of the controller that the run keeps. Their seeds are a stream of their own, UNSEEN: nothing
was trained, evolved or chosen on them. Doom's virtual score is that of as many dreams, at the
temperature that the run evolved in. A finished run's scores are stored in its folder, as
evaluation.json, and printed again from there; --episodes plays anew.

Dimension key:  Z z   A actions   frames 64 x 64 x 3
"""
import argparse
import io
import json
import os
import pathlib
import sys
from concurrent.futures.process import BrokenProcessPool
from functools import partial

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from mdnrnn import sample
from rollout import (TASKS, UNSEEN, dream, make_env, new_controller, new_models, open_pool, pack,
                     play, policy_of, seed_of)
from train import Config, UserError, fours, read_checkpoint, write_atomically

# Published, means and standard deviations over 100 trials. What C reads as in train.py's --reads.
TABLE_1 = [                                             # CarRacing-v0
    ("DQN", None, (343, 18)), ("A3C (continuous)", None, (591, 45)),
    ("A3C (discrete)", None, (652, 10)), ("Gym Leader", None, (838, 11)),
    ("V model", "z", (632, 251)), ("V model with hidden layer", "z40", (788, 141)),
    ("Full World Model", "zh", (906, 21))]
TABLE_2 = [                                             # DoomTakeCover-v0: virtual, actual
    (0.10, (2086, 140), (193, 58)), (0.50, (2060, 277), (196, 50)),
    (1.00, (1145, 690), (868, 511)), (1.15, (918, 546), (1092, 556)),
    (1.30, (732, 269), (753, 139)), ("Random Policy", None, (210, 108)),
    ("Gym Leader", None, (820, 58))]
READS = {"zh": "reads z, h", "z": "reads z", "z40": "reads z, 40 hidden"}
STEPS = {"car": 1000, "doom": 2100}                     # longest episode, whatever the preset
CONTEXT = 60                                            # real steps before a dream leaves them


def load(folder, need):
    """Run folder -> Config, state of its newest checkpoint (see train.Run), V, M.
    need "theta" (C) or "M". Raises UserError if it is not there yet, or if the file is not ours.
    """
    if not any(folder.glob("checkpoint*.pt")):
        raise UserError(f"{folder} holds no checkpoint; name the folder of a run")
    try:
        state = read_checkpoint(folder)
        config = Config(**state["config"] | dict(workers=os.cpu_count() or 1, scheduler=""))
        config.steps = STEPS[config.task]
        if need not in state:
            raise UserError(f"{folder} has no {'M' if need == 'M' else 'controller'} yet: go on "
                            f"with train.py --resume {folder}")
        v, m = new_models(config)
        v.load_state_dict(state["V"])
        m.load_state_dict(state["M"])
        if "theta" in state and state["theta"].shape != (new_controller(config).size,):
            raise ValueError
    except (UserError, OSError):
        raise
    except Exception:                                   # whatever a foreign file provokes
        raise UserError(f"{folder}: its checkpoint is of another version, or not ours") from None
    return config, state, v, m


FIELDS = {"task": str, "preset": str, "seed": int, "reads": str, "temperature": float,
          "generation": int, "generations": int, "actual": list, "virtual": list}


def read_evaluation(path):
    """evaluation.json -> dict with FIELDS. Raises UserError if it is damaged."""
    try:
        result = json.loads(path.read_text())
        if not (all(isinstance(result[name], kind) for name, kind in FIELDS.items())
                and result["task"] in TASKS and result["reads"] in READS and result["actual"]
                and np.isfinite(result["actual"] + result["virtual"]).all()):
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path} is damaged; --episodes 100 plays anew") from None
    return result


def judged(folder, episodes):
    """Run folder -> its scores, a dict with FIELDS, and `run`: stored, or played now if episodes
    is not None.
    """
    path = folder / "evaluation.json"
    if episodes is None and path.exists():
        return read_evaluation(path) | {"run": folder.name}
    config, state, *_ = load(folder, "theta")
    make_env(config, 1).close()                         # says what is missing
    weights, theta, pool = pack(state), state["theta"].numpy(), open_pool(config)
    seeds = fours([seed_of(config.seed, UNSEEN, i) for i in range(episodes or 100)])
    try:
        scores = {
            name: [score for four in tqdm(
                pool.map(partial(how, config, weights, theta), seeds),
                f"{folder.name}, {name}", len(seeds), unit="x4", disable=None) for score in four]
            for name, how in (("actual", play), ("virtual", dream))
            if name == "actual" or config.task == "doom"}
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    result = vars(config) | dict(generation=state["es"]["generation"], virtual=[]) | scores
    result = {name: result[name] for name in FIELDS}
    if state["stage"] == "done":                        # else tomorrow's scores would be others
        try:
            write_atomically(path, json.dumps(result, indent=1).encode())
        except OSError as error:
            print(f"warning: {path} is not stored: {error.strerror}", file=sys.stderr)
    return result | {"run": folder.name}


def score(values):
    """Scores of episodes, or the published (mean, standard deviation) -> text."""
    if not values:
        return "-"
    mean, std = values if isinstance(values, tuple) else (np.mean(values), np.std(values))
    return f"{mean:.0f} +- {std:.0f}"


def table(*rows):
    """Rows of texts, the first the header -> a table in Markdown."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def of_runs(results):
    """The scores of all runs, one row each, beside the paper's."""
    rows = [("run", "preset", "seed", "C", "generation", "episodes", "actual", "virtual",
             "paper: actual", "virtual")]
    for r in results:
        if r["task"] == "car":
            what = READS[r["reads"]]
            published = next((actual, None) for _, reads, actual in TABLE_1 if reads == r["reads"])
        else:
            what = f"tau {r['temperature']:.2f}"
            published = next(((actual, virtual) for tau, virtual, actual in TABLE_2
                              if tau == r["temperature"]), (None, None))
        rows.append((r["run"], r["preset"], str(r["seed"]), what,
                     f"{r['generation']} of {r['generations']}", str(len(r["actual"])),
                     score(r["actual"]), score(r["virtual"]), *map(score, published)))
    return table(*rows) + ("\nMeans and standard deviations over episodes on seeds that nothing was"
                           " trained or chosen on.\nPaper: as published, 100 trials.")


def cell(results, name, **only):
    """The scores of the runs that are so, for one cell."""
    return "; ".join(
        f"{score(r[name])} ({r['preset']}, seed {r['seed']}, generation {r['generation']})"
        for r in results if only.items() <= r.items()) or "not run yet"


def table_1(results):
    """The paper's Table 1 and the runs of the car among the results."""
    return table(("CarRacing", "paper, published", "ours"), *(
        (name, score(published), cell(results, "actual", task="car", reads=reads) if reads else "")
        for name, reads, published in TABLE_1))


def table_2(results):
    """The paper's Table 2 and the runs of Doom among the results."""
    rows = [("Take Cover", "virtual, published", "actual, published", "virtual", "actual, ours")]
    for tau, virtual, actual in TABLE_2:
        ours = "", ""                                   # others' policies are not ours to run
        if isinstance(tau, float):
            ours = [cell(results, name, task="doom", temperature=tau)
                    for name in ("virtual", "actual")]
            tau = f"tau {tau:.2f}"
        rows.append((tau, score(virtual), score(actual), *ours))
    return table(*rows)


def features(config, z, state):
    """What C reads: float32 [1, F]."""
    h, c = state
    memory = {"car": [h], "doom": [c, h]}[config.task] if config.reads == "zh" else []
    return torch.cat([z, *memory], 1).numpy()


def step_of_m(m, z, action, state, first, temperature, generator):
    """z float [1, Z], action float32 [1, A] -> the z that M draws [1, Z], the chance that the
    player dies of this action, M's next state.
    """
    *mixture, log_odds, state = m(z[:, None], torch.from_numpy(action)[:, None], state,
                                  torch.full((1, 1), first))
    z = sample(*(p[:, 0] for p in mixture), temperature, generator)
    return z, 0.0 if log_odds is None else log_odds.sigmoid().item(), state


def decoded(v, z):
    """z float [1, Z] -> picture uint8 [64, 64, 3]."""
    return (v.decode(z)[0].permute(1, 2, 0) * 255).round().byte().numpy()


def page(panels, caption):
    """[(title, uint8 [64, 64, 3]), ..] side by side, each pixel three times -> PIL image."""
    side, gap = 192, 20
    image = Image.new("RGB", (len(panels) * (side + 6) - 6, side + 2 * gap), "white")
    draw = ImageDraw.Draw(image)
    for x, (title, pixels) in zip(range(0, image.width, side + 6), panels):
        draw.text((x + 4, 4), title, "black")
        image.paste(Image.fromarray(pixels).resize((side, side), 0), (x, gap))   # 0: nearest
    draw.text((4, side + gap + 4), caption, "black")
    return image


@torch.no_grad()
def pages(config, state, v, m, steps, temperature, seed):
    """An episode that C plays (or random play, where there is no C yet) and a dream that leaves it
    after CONTEXT steps and goes on under the same actions -> images, one a step from there on.
    """
    seed, result = seed_of(config.seed, UNSEEN, seed), []
    act = policy_of(config, state["theta"].numpy() if "theta" in state else "random", [seed])
    generator, env = torch.Generator().manual_seed(seed), make_env(config, CONTEXT + steps)
    frame, over, t, real, alive = env.reset(seed=seed)[0], False, 0, m.initial_state(1), 1.0
    while not over:
        z = v.encode(torch.from_numpy(frame)[None])[0]
        if t <= CONTEXT:
            dreamed_z, dreamed, alive = z, real, 1.0
        if t >= CONTEXT:
            result.append(page(
                [("the real thing", frame), ("what V sees", decoded(v, z)),
                 ("what M dreams", decoded(v, dreamed_z))],
                f"step {t - CONTEXT}, temperature {temperature:g}"
                + (f", alive in the dream with {alive:.0%}" if config.task == "doom" else "")))
        action = act(features(config, z, real))
        dreamed_z, death, dreamed = step_of_m(
            m, dreamed_z, action, dreamed, t == 0, temperature, generator)
        real = step_of_m(m, z, action, real, t == 0, temperature, None)[-1]
        frame, _, done, truncated, _ = env.step(action[0])
        t, over, alive = t + 1, done or truncated, alive * (1 - death)
    env.close()
    if not result:
        raise UserError(f"the episode was over before step {CONTEXT}; try another --seed")
    return result


def show_dream(args, folder):
    config, state, v, m = load(folder, "M")
    images = pages(config, state, v, m, args.steps, args.temperature, args.seed)
    # One palette for all, taken from some of them: the colours do not flicker.
    some = np.linspace(0, len(images) - 1, 8).astype(int)
    palette = Image.fromarray(np.hstack([np.asarray(images[i]) for i in some])).quantize(128)
    images = [i.quantize(palette=palette, dither=Image.Dither.NONE) for i in images[::2]]
    data = io.BytesIO()
    images[0].save(data, "GIF", save_all=True, append_images=images[1:], duration=50, loop=0)
    write_atomically(args.dream, data.getvalue())
    print(f"saved {args.dream}", file=sys.stderr)


class Player:
    """The window of --play, a matplotlib figure: keys, a picture and M in between."""

    HELP = ("left, right: steer or step   up, down: gas, brake   space: C / you   r: again   "
            "t / g: temperature up / down")

    def __init__(self, config, state, v, m, figure, tau, seed):
        self.config, self.v, self.m, self.tau, self.starts = config, v, m, tau, state["starts"]
        self.figure, self.held, self.by_c = figure, set(), False
        self.generator = torch.Generator().manual_seed(seed)
        self.act = "theta" in state and policy_of(config, state["theta"].numpy(), [seed])
        self.image = figure.add_axes((0.05, 0.08, 0.9, 0.82)).imshow(np.zeros((64, 64, 3)))
        self.image.axes.axis("off")
        self.caption = figure.suptitle("")
        figure.text(0.5, 0.02, self.HELP, ha="center", fontsize=7)
        figure.canvas.mpl_connect("key_press_event", self.press)
        figure.canvas.mpl_connect("key_release_event", lambda event: self.held.discard(event.key))
        self.restart()

    @torch.no_grad()
    def restart(self, last=""):
        """Another recorded start: z from N(mu, exp(logvar)), an empty memory."""
        row = torch.randint(len(self.starts), (1,), generator=self.generator)
        self.z = self.v.sample(*self.starts[row].unbind(1), self.generator)      # [1, Z]
        self.state, self.step, self.last = self.m.initial_state(1), 0, last
        self.show()

    def press(self, event):
        if event.key == "r":
            self.restart()
        elif event.key in ("t", "g"):
            self.tau = min(max(self.tau * (1.1 if event.key == "t" else 1 / 1.1), 0.05), 5)
        elif event.key == " " and self.act:
            self.by_c = not self.by_c
        else:
            self.held.add(event.key)
        self.show()

    @torch.no_grad()
    def tick(self):
        """One step of the dream under the keys that are held, or under C."""
        if self.by_c:
            action = self.act(features(self.config, self.z, self.state))
        else:
            action = np.array([[("right" in self.held) - ("left" in self.held),
                                "up" in self.held, "down" in self.held]], np.float32)
            action = action[:, :self.m.action_size]
        self.z, death, self.state = step_of_m(
            self.m, self.z, action, self.state, self.step == 0, self.tau, self.generator)
        self.step += 1
        if torch.rand(1, generator=self.generator) < death:
            self.restart(f"   the last dream ended after {self.step} steps")
        self.show()

    @torch.no_grad()
    def show(self):
        self.image.set_data(decoded(self.v, self.z))
        self.caption.set_text(f"step {self.step}   temperature {self.tau:.2f}   "
                              f"{'C plays' if self.by_c else 'you play'}{self.last}")
        self.figure.canvas.draw_idle()


def show_play(args, folder):
    """Opens the window; 30 steps a second, about the pace of the game."""
    import matplotlib.pyplot as plt
    for toolkit in "tkagg", "qtagg", "gtk4agg", "macosx":       # train.py has chosen none
        try:
            plt.switch_backend(toolkit)
            figure = plt.figure(figsize=(6, 6.4), num="the dream")
            break
        except Exception:                               # each has an error of its own
            pass
    else:
        raise UserError("--play needs a window: no display here, or no tkinter or the like")
    for name in [name for name in plt.rcParams if name.startswith("keymap.")]:
        plt.rcParams[name] = []                         # g would mean grid, r home, ..
    player = Player(*load(folder, "M"), figure, args.temperature, args.seed)
    timer = figure.canvas.new_timer(1000 // 30, [(player.tick, (), {})])
    timer.start()
    plt.show()


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("runs", nargs="*", type=pathlib.Path, metavar="RUN", help="folders, e.g. runs/*")
    add("--episodes", type=int, help="play so many anew; else what is stored, or 100")
    add("--table1", action="store_true", help="Table 1 of the paper and the runs of the car")
    add("--table2", action="store_true", help="Table 2 of the paper and the runs of Doom")
    add("--dream", type=pathlib.Path, metavar="dream.gif", help="V and M beside the real thing")
    add("--play", action="store_true", help=f"a person in the dream; {Player.HELP}")
    add("--temperature", type=float, default=1.0, help="tau of --dream and --play [1.0]")
    add("--steps", type=int, default=200, help="longest --dream [200]")
    add("--seed", type=int, default=0, help="of --dream and --play [0]")
    args = parser.parse_args(arguments)
    for name, low, high in (("episodes", 1, 10_000), ("temperature", 0.01, 100),
                            ("steps", 1, 2000), ("seed", 0, 2**31 - 1)):
        if getattr(args, name) is not None and not low <= getattr(args, name) <= high:
            raise UserError(f"--{name} must lie in {low} .. {high}")
    if not args.runs and not args.table1 and not args.table2:
        raise UserError("name a run folder, e.g. runs/car-small-s0")
    if (args.dream or args.play) and len(args.runs) != 1:
        raise UserError("--dream and --play look into one run: name one folder")
    if args.dream and (args.dream.suffix != ".gif" or not args.dream.parent.is_dir()):
        raise UserError(f"{args.dream} must end in .gif and lie in a folder that exists")
    return args


def main(arguments=None):
    """-> exit status."""
    try:
        args = parse(arguments)
        if args.dream:
            show_dream(args, args.runs[0])
        elif args.play:
            show_play(args, args.runs[0])
        else:
            results = [judged(folder, args.episodes) for folder in args.runs]
            tables = [table_1] * args.table1 + [table_2] * args.table2 or [of_runs]
            print("\n\n".join(show(results) for show in tables), flush=True)
        return 0
    except (UserError, ImportError) as error:
        message = str(error)
    except KeyboardInterrupt:
        message = "stopped"
    except BrokenProcessPool:
        message = "a worker died, perhaps for want of memory"
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    print(f"error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    status = main()
    os._exit(status)                                    # at once; workers see it and follow
