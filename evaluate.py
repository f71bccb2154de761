"""How good is a run, and what does it dream? Beside the numbers of the paper.

    python evaluate.py runs/Freeway-small-s0             # its final scores, beside the published
    python evaluate.py runs/*                            # of all runs: Tables 4 and 5
    python evaluate.py runs/* --plot curves.png          # their learning curves: Figure 4
    python evaluate.py runs/Pong-small-s0 --episodes 32  # plays anew with the newest checkpoint
    python evaluate.py --random --game Freeway           # the random policy, by the same protocol
    python evaluate.py runs/Pong-small-s0 --fidelity     # where does its dream go wrong?
    python evaluate.py runs/* --sweep-temperature        # does its policy exploit its dream?
    python evaluate.py runs/Pong-small-s0 --dream dream.gif    # the dream beside the real game
    python evaluate.py runs/Pong-small-s0 --video play.gif     # the policy, and what it sees
    python evaluate.py runs/Pong-small-s0 --play         # play inside the dream yourself

Protocol, as the paper's (Section 4, and the authors' released code): 32 whole episodes of the final
policy; train.py's PROTOCOL says how. The score of a run is the mean of these episodes; the figures
of a game are taken over its runs, one for each seed.
"""
import signal
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # Ctrl-C: no traceback, from now on

import argparse
import contextlib
import csv
import dataclasses
import glob
import hashlib
import io
import json
import os
import pathlib
import sys

import numpy as np
import torch
from tqdm import tqdm

from atari import AtariEnv, ExperienceBuffer, canonical_name
from dynamics import DreamEnv, dream, open_loop, policy_input, reward_class, sample
from train import (MAY_CHANGE, PRESETS, PROTOCOL, SCHEMA, STAGES, TIMES, Config, Models, UserError,
                   check, clock, read_regular, say, sealed, work, write_atomically)
from vqvae import foreground_error

# Published: scores of a random policy and a human (Mnih et al., 2015, as the Atari 100K benchmark
# uses them), and the paper's Tables 4 and 5, final scores of five runs after 100K interactions:
# (mean, standard deviation, median, best). SimPLe is the variant "SD, gamma 0.99", PPO model-free;
# the paper quotes both, PPO without median and best.
PUBLISHED = {       # random, human, paper, SimPLe, PPO 100K
    "BankHeist": (14.2, 753.1, (101.2, 17.4, 101.2, 121.6), (8.2, 4.4, 8.9, 13.9), (16.0, 12.4)),
    "Breakout": (1.7, 30.5, (8.8, 1.5, 8.4, 11.6), (12.7, 3.8, 11.0, 19.5), (5.9, 3.3)),
    "CrazyClimber": (10780.5, 35829.4, (47536.9, 6114.9, 45256.2, 59609.4),
                     (39827.8, 22582.6, 41396.9, 67250.0), (18400.0, 5275.1)),
    "Freeway": (0.0, 29.6, (24.6, 3.4, 26.2, 29.0), (20.3, 18.5, 33.5, 34.0), (8.0, 9.8)),
    "Pong": (-20.7, 14.6, (11.8, 6.9, 8.2, 20.2), (5.2, 9.7, 1.4, 21.0), (-20.5, 0.6)),
    "Seaquest": (68.4, 42054.7, (458.1, 155.7, 472.5, 635.0), (370.9, 128.2, 386.9, 497.2),
                 (370.0, 103.3)),
}
UNPUBLISHED = (None, None, (None,) * 4, (None,) * 4, (None,) * 2)       # any other game


def human_normalised(game, score):
    """(score - random) / (human - random): 0 plays like chance, 1 like a human. None: unlisted."""
    chance, human = PUBLISHED.get(game, UNPUBLISHED)[:2]
    return None if chance is None else (score - chance) / (human - chance)


# --------------------------------------------------------------------------------------------------
# The folder of a run: its figures, its networks
# --------------------------------------------------------------------------------------------------

OLDER = "149dcc7"                               # the last commit whose checkpoints have no SCHEMA 2
MODEL = "model.pt"                              # a run to play with, without its checkpoint


def read_json(path, fits, parse=json.loads):
    """What a file of a run holds; UserError if it is damaged or not as it should be: fits(it)."""
    try:
        value = parse(read_regular(path, 2**24))
        if fits(value):
            return value
    except (ValueError, TypeError, RecursionError, csv.Error):
        pass
    raise UserError(f"{path} is damaged")


def is_number(value):
    """Can it be a score or a count? The largest float would overflow a sum; NaN is none."""
    return type(value) in (int, float) and abs(value) < 1e12


def read_numbers(path, fits):
    """A .csv -> its rows, each fit, as dicts of floats without the empty fields; [] if missing."""
    if not path.exists():
        return []
    return read_json(path, lambda rows: all(
        all(map(is_number, row.values())) and fits(row) for row in rows), lambda data: [
            {name: float(value) for name, value in row.items() if value}
            for row in csv.DictReader(io.StringIO(data.decode(), newline=""))])


def read_config(folder):
    """config.json of a run folder; UserError if there is none."""
    path = pathlib.Path(folder) / "config.json"
    if not os.path.isdir(folder):
        raise UserError(f"there is no run folder {path.parent}")
    if not path.exists():
        raise UserError(f"{path.parent} is no run folder: no config.json in it")
    config = read_json(path, lambda value: isinstance(value, dict))
    if [type(config.get(name)) for name in ("game", "preset", "seed")] != [str, str, int]:
        raise UserError(f"{path} is damaged: no game, preset or seed in it")
    return config


def read_run(folder):
    """Run folder -> dict of what it says about itself, without a look at its checkpoint:

    folder, game, preset, seed, interactions
    changed   {setting: value} where it differs from its preset: such a run has another row
    old       was it written by an older version, which had other settings?
    returns   scores of the final policy's episodes; None for a run that stopped early, which is not
              `finished`: it is shown, and enters no mean
    rows      of metrics.csv, one dict a round; rounds: how many there are to be, "?" if unknown
    """
    folder, config = pathlib.Path(folder), read_config(folder)
    run = {name: config[name] for name in ("game", "preset", "seed")}
    rows = read_numbers(folder / "metrics.csv", lambda row: (
        {"iteration", "interactions"} <= set(row)
        and ("real_return" in row) == ("real_episodes" in row)))
    returns, interactions = None, int(rows[-1]["interactions"]) if rows else 0
    path = folder / "evaluation.json"
    if path.exists():
        result = read_json(path, lambda r: (
            isinstance(r, dict) and isinstance(r.get("returns"), list) and r["returns"]
            and type(r.get("interactions")) is int
            and all(map(is_number, [*r["returns"], r["interactions"]]))))
        if any(result.get(name) != value for name, value in run.items()):
            raise UserError(f"{path} belongs to another run than {folder / 'config.json'}")
        returns, interactions = result["returns"], result["interactions"]

    # A setting younger than the run has its default; one older than the program it does not know.
    default, usual = (json.loads(json.dumps(dataclasses.asdict(Config(**preset))))
                      for preset in ({}, PRESETS.get(run["preset"], {})))
    if run["preset"] == "ppo":                          # of ppo.py, which has other settings
        default = usual = config | {"interactions": 102_400}
    changed = {name: value for name, value in sorted((default | config).items())
               if name not in ("game", "preset", "seed", "out", *MAY_CHANGE)
               and value != usual.get(name)}
    return run | {"folder": folder, "changed": changed, "old": not set(config) <= set(default),
                  "interactions": interactions, "returns": returns, "rows": rows,
                  "finished": returns is not None, "rounds": config.get("iterations", "?")}


def unsealed(path):
    """The dict in a file of `sealed` bytes; UserError if it is damaged, foreign or carries code."""
    data = memoryview(read_regular(path))           # checked before torch sees any of it
    if hashlib.sha256(data[:-32]).digest() != data[-32:]:
        raise UserError(f"{path} is damaged or no checkpoint of this version (commit {OLDER} reads "
                        f"those of the one before)")
    try:
        state = torch.load(io.BytesIO(data[:-32]), map_location="cpu", weights_only=True)
        if state["schema"] == SCHEMA:
            return state
    except Exception:                               # whatever a malicious file provokes
        pass
    raise UserError(f"{path} is no checkpoint of this version of train.py")


def newest_checkpoint(folder):
    """The state in the newer of the two checkpoints that is whole; says so if it is the older."""
    problems = []
    for name in ("checkpoint.pt", "checkpoint-previous.pt"):
        if os.path.lexists(folder / name):
            try:
                state = unsealed(folder / name)
            except ValueError as error:
                problems.append(str(error))
                continue
            for problem in problems:
                say(f"warning: {problem}; going on from {name}", "stderr")
            return state
    raise UserError("; ".join(problems) or f"{folder} holds no checkpoint to go on from")


def config_from(state, described):
    """The Config inside a checkpoint or a config.json; a setting younger than that has its default.
    UserError for settings that are not ours, not in the types that they should have, or others than
    `described`, those in the config.json beside it.
    """
    kinds = {f.name: f.type for f in dataclasses.fields(Config)}
    odd = ["no settings at all"]
    if isinstance(state, dict):
        odd = sorted(str(name) for name in state if name not in kinds)
    if odd:
        raise UserError(f"settings of another version of train.py: {', '.join(odd)}; "
                        f"commit {OLDER} reads those of the one before")
    state = {k: tuple(v) if isinstance(v, list) else v for k, v in state.items()}
    for name, value in state.items():
        kind = (int, float) if kinds[name] is float else (kinds[name],)
        parts = value if type(value) is tuple else ()
        if type(value) not in kind or any(type(v) not in (int, float) for v in parts):
            raise UserError(f"{name} = {value!r} is no {kinds[name].__name__}: damaged settings")
        own = list(value) if type(value) is tuple else value            # as JSON has it
        if name not in ("out", *MAY_CHANGE) and described.get(name, own) != own:
            raise UserError(f"the checkpoint belongs to another run than config.json beside it: "
                            f"{name} is {own}, not {described[name]}")
    return Config(**state)


def export_model(args):
    """--export: a run's weights in bfloat16, its settings and interactions, sealed."""
    models, config, interactions = load_models(args.runs[0], args.device)
    networks = {name: {key: value.cpu().bfloat16() if value.is_floating_point() else value.cpu()
                       for key, value in network.state_dict().items()}
                for name, network in models.networks().items()}
    write_atomically(args.export, sealed({
        "schema": SCHEMA, "networks": networks, "rows": [{"interactions": interactions}],
        "config": dataclasses.asdict(dataclasses.replace(config, out="runs"))}))   # no path of ours
    print(f"saved {args.export}", file=sys.stderr)


def load_models(folder, device):
    """Run folder -> models as in its newest checkpoint or model.pt, settings, interactions."""
    folder, described = pathlib.Path(folder), {}
    if not os.path.isdir(folder) or (folder / "config.json").exists():
        described = read_config(folder)
    if described.get("preset") == "ppo":
        raise UserError(f"{folder} is a run of ppo.py, which keeps no weights to play with")
    where = folder / ("checkpoint.pt" if any(folder.glob("checkpoint*.pt")) else MODEL)
    if where.name == MODEL and not where.exists():
        raise UserError(f"{folder} holds no checkpoint and no {MODEL}, so there is nothing to play "
                        f"with or to dream in; name a run that has one, or train one")
    state = unsealed(where) if where.name == MODEL else newest_checkpoint(folder)
    try:
        # Judging needs no compiler, and may happen on another device.
        config = config_from(state["config"] | {"device": device, "compile": False}, described)
        check(config)
        models = Models(config, AtariEnv(config.game).num_actions)
        for name, network in models.networks().items():
            network.load_state_dict(state["networks"][name])
        return models, config, int(state["rows"][-1]["interactions"] if state["rows"] else 0)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except Exception as error:      # whatever other names, types and shapes, or code in it, provoke
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{where} is damaged or none of ours ({reason[0][:80]})") from None


# --------------------------------------------------------------------------------------------------
# Playing whole episodes
# --------------------------------------------------------------------------------------------------


class RandomPolicy:
    """Plays uniformly at random through the same function as a trained policy."""
    acting = contextlib.nullcontext             # there is nothing to cast

    def __init__(self, num_actions, seed):
        self.num_actions, self.rng = num_actions, np.random.default_rng(seed)

    def act(self, observations, temperature, state=None):
        return self.rng.integers(self.num_actions, size=len(observations)), None


def real_steps(models, game, seeds, temperature):
    """Plays one whole real episode for each seed, side by side, by the PROTOCOL; actions sampled
    from softmax(logits / temperature). Each step yields, for all that still play, (number of the
    episode, frame uint8 [96, 96], action taken on it, reward, terminated, truncated).
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
        goes_on = np.array([not (terminated or truncated) for *_, terminated, truncated in rows])
        playing, state = playing[goes_on], still_playing(state, goes_on)


def still_playing(state, goes_on):
    """The dynamics' state (None: there is none) of those episodes, bool [B], that go on."""
    rows = np.flatnonzero(goes_on)
    return state and [(h[rows], c[rows]) for h, c in state]


def play_episodes(models, game, seeds, temperature, stopped=lambda: False, label="playing"):
    """Scores of whole real episodes, one for each seed, as a list; None if stopped."""
    scores = np.zeros(len(seeds))
    with models.acting(), tqdm(desc=label, unit=" steps", leave=False, disable=not (
            sys.stderr and sys.stderr.isatty())) as bar:
        for rows in real_steps(models, game, seeds, temperature):
            if stopped():
                return None
            for i, _, _, reward, _, _ in rows:
                scores[i] += reward
            bar.update(len(rows))
    return scores.tolist()


def record(models, game, seeds, temperature, most):
    """Up to `most` steps of a real episode for each seed -> ExperienceBuffer, one after another."""
    episodes = [[] for _ in seeds]
    with models.acting():
        for step, rows in zip(range(most), real_steps(models, game, seeds, temperature)):
            for i, *row, truncated in rows:
                episodes[i].append((*row, truncated or step == most - 1))
    buffer = ExperienceBuffer(sum(map(len, episodes)))
    for episode in episodes:
        buffer.add(*map(np.array, zip(*episode)))
    return buffer


def episode_seeds(seed, numbers):
    """Of real episodes with these numbers, within what the emulator takes."""
    return [(seed * 10_000 + i) % 2**31 for i in numbers]


def play(models, game, episodes, seed, temperature):
    """Whole real episodes, eight of them side by side -> list of scores."""
    torch.manual_seed(seed)
    scores = []
    while len(scores) < episodes:
        numbers = range(len(scores), min(len(scores) + 8, episodes))
        scores += play_episodes(models, game, episode_seeds(seed, numbers), temperature)
    return scores


# --------------------------------------------------------------------------------------------------
# Judge: many runs, one table
# --------------------------------------------------------------------------------------------------


def statistics(scores):
    """mean, standard deviation (root of the mean squared one), median and best of some scores."""
    return {"mean": float(np.mean(scores)), "std": float(np.std(scores)),
            "median": float(np.median(scores)), "best": float(np.max(scores))}


def describe(game, scores):
    """One line on our episodes, one on the published row of the game."""
    line = f"{game}: " + "  ".join(f"{name} {value:.1f}" for name, value in
                                   statistics(scores).items()) + f"  over {len(scores)} episodes"
    if game not in PUBLISHED:
        return f"{line}\npublished: {game} is not in the paper"
    chance, human, (mean, std, median, best), simple, ppo = PUBLISHED[game]
    return (f"{line}  human-normalised {figure(human_normalised(game, np.mean(scores)), 3)}\n"
            f"published: paper mean {mean} (std {std} over 5 runs), median {median}, best {best}; "
            f"SimPLe {simple[0]}; PPO 100K {ppo[0]}; random {chance}; human {human}")


def grouped(runs):
    """Runs -> groups that may be averaged: same game, preset and changed settings; a run that
    stopped early is one of its own. UserError for two of one seed, which vary too little.
    """
    groups, seen = {}, {}
    for run in runs:
        key = (run["game"], [*PRESETS, run["preset"]].index(run["preset"]), run["preset"],
               len(run["changed"]), json.dumps(run["changed"]))
        twin = seen.setdefault((*key, run["seed"]), run)
        if twin is not run:
            raise UserError(f"{twin['folder']} and {run['folder']} are the same game, preset and "
                            f"seed; name one of them")
        groups.setdefault((*key, -1 if run["finished"] else run["seed"]), []).append(run)
    return [sorted(groups[key], key=lambda run: run["seed"]) for key in sorted(groups)]


def summary(group):
    """One row of the table as a dict: statistics over the runs of a group, each run one score."""
    first = group[0]
    row = {"game": first["game"], "preset": first["preset"], "changed": first["changed"],
           "seeds": [run["seed"] for run in group], "finished": first["finished"], "over": "seeds",
           "episodes": sum(len(run["returns"] or ()) for run in group),
           "interactions": max(run["interactions"] for run in group), "human_normalised": None}
    if not first["finished"]:
        return row | dict.fromkeys(("mean", "std", "median", "best"))
    row |= statistics([np.mean(run["returns"]) for run in group])
    return row | {"human_normalised": human_normalised(row["game"], row["mean"]),
                  "std": row["std"] if len(group) > 1 else None}     # a single run has none


def interquartile_mean(scores):
    """Of the middle half (Agarwal et al., 2021) along the last axis. 1 2 3 4 9: (2 + 3 + 4) / 3."""
    cut = scores.shape[-1] // 4                         # at either end, rounded down
    return np.sort(scores, -1)[..., cut:scores.shape[-1] - cut].mean(-1)


def aggregates(scores):
    """Human-normalised scores, a list with an array [..., runs] for each game -> float [..., 3]:
    mean and median over games of the games' means, interquartile mean over all games x runs.
    """
    means = np.stack([s.mean(-1) for s in scores], -1)                       # [..., games]
    return np.stack([means.mean(-1), np.median(means, -1),
                     interquartile_mean(np.concatenate(scores, -1))], -1)


def bootstrap(scores, resamples=10_000, seed=0):
    """95 % interval of each aggregate, float [2, 3] (low, high), runs redrawn within each game."""
    rng = np.random.default_rng(seed)
    drawn = [s[rng.integers(len(s), size=(resamples, len(s)))] for s in scores]     # [R, runs]
    return np.percentile(aggregates(drawn), [2.5, 97.5], axis=0)


def mark(notes, key, text):
    """The mark " [n]" of a footnote, which is added to the notes {key: text} if it is new."""
    notes.setdefault(key, text)
    return f" [{list(notes).index(key) + 1}]"


def kind(run, notes, quote=""):
    """The preset of a run, with the mark of a footnote on what differs from it, if anything."""
    preset, changed = run["preset"], run["changed"]
    if not changed:
        return preset
    text = (f"{preset} of an older version (commit {OLDER} or before), see config.json of "
            f"{run['folder'].name}" if run["old"] else f"{preset} with " + ", ".join(
                f"{quote}{name}={value}{quote}" for name, value in changed.items()))
    return preset + mark(notes, json.dumps([preset, changed]), text)


def figure(value, digits=1):
    """A number for the tables, "-" for None; what rounds to zero has no sign."""
    return "-" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"


def with_std(mean, std, bold=""):
    return bold + figure(mean) + bold + ("" if std is None else f" ({std:.1f})")


def stopped_where(run):
    """Of a run without final evaluation: how far it is and what it scored last."""
    rows, played = run["rows"], run["returns"]
    scored = [row for row in rows if "real_return" in row]
    last = (f"played now: {np.mean(played):.1f} over {len(played)} episodes" if played else
            f"last evaluated after {scored[-1]['interactions']:,.0f} interactions: "
            f"{scored[-1]['real_return']:.1f} over {scored[-1]['real_episodes']:.0f} episodes"
            if scored else "never evaluated")
    return (f"{run['folder']} stopped early or still runs: in round "
            f"{rows[-1]['iteration'] if rows else 1:.0f} of {run['rounds']}; {last}")


def ruled(parts, rows, left=0):
    """A table as lines. parts: {title: columns below it}; rows of texts, the first `left` flush."""
    lines, first = [[] for _ in range(2 + len(rows))], 0
    for title, columns in parts.items():
        block = [columns, *(row[first:first + len(columns)] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*block)]
        gaps = 2 * (len(widths) - 1)
        widths[-1] += max(0, len(title) - sum(widths) - gaps)
        lines[0].append(title.ljust(sum(widths) + gaps))
        for line, row in zip(lines[1:], block):
            line.append("  ".join(f"{text:{'<' if i < left else '>'}{width}}" for i, (text, width)
                                  in enumerate(zip(row, widths), first)))
        first += len(columns)
    return [" | ".join(line).rstrip() for line in lines]


def table(groups):
    """Groups of runs -> the text of the table, of its footnotes, of the aggregates and costs."""
    notes, body, columns, kinds = {}, [], ("mean (std)", "median", "best"), {}
    for group in groups:
        row, first, preset = summary(group), group[0], kind(group[0], notes)
        mean = (with_std(row["mean"], row["std"]) if row["finished"] else
                "stopped" + mark(notes, first["folder"], stopped_where(first)))
        body.append([row["game"], preset, ",".join(map(str, row["seeds"])),
                     str(row["episodes"] or "-"), f"{row['interactions']:,}", mean, *map(
                         figure, (row["median"], row["best"], row["human_normalised"]), (1, 1, 3))])
        for published in PUBLISHED.get(row["game"], UNPUBLISHED)[2:]:
            body[-1] += [with_std(*published[:2]), *map(figure, published[2:])]
        if row["human_normalised"] is not None:
            kinds.setdefault(preset, {})[row["game"]] = np.array([
                human_normalised(run["game"], np.mean(run["returns"])) for run in group])
    lines = ruled({"": ("game", "preset", "seeds", "episodes", "interactions"),
                   "ours": (*columns, "human"), "paper, published": columns,
                   "SimPLe, published": columns, "PPO 100K, published": columns[:1]}, body, left=3)
    lines += [f"[{i}] {text}" for i, text in enumerate(notes.values(), 1)]
    lines.append("Ours: each run is the mean of its episodes; statistics are over runs. human: "
                 "(mean - random) / (human - random).\nPublished: Tables 4 and 5, five runs each.")

    for name, scores in kinds.items():                  # the aggregates, for each preset alone
        ours, (low, high) = aggregates(list(scores.values())), bootstrap(list(scores.values()))
        single = ", ".join(game for game, s in scores.items() if len(s) == 1)
        lines.append(
            f"human-normalised, {name}, {len(scores)} game{'s' if len(scores) > 1 else ''}: "
            + ", ".join(f"{what} {value:.3f}" + ("" if single else f" [{a:.3f}, {b:.3f}]")
                        for what, value, a, b in zip(("mean", "median", "interquartile mean"),
                                                     ours, low, high))
            + (f"; no interval: one run only of {single}" if single
               else "; 95 % stratified bootstrap"))
        published = {what: [human_normalised(game, PUBLISHED[game][i][0]) for game in scores]
                     for i, what in ((2, "paper"), (3, "SimPLe"), (4, "PPO 100K"))}
        lines.append("    the same games, published means: " + "; ".join(
            f"{what} mean {np.mean(s):.3f}, median {np.median(s):.3f}"
            for what, s in published.items()))
    header, rows = costs(groups)
    return "\n".join(lines + ["", *ruled({"": header}, rows, left=1)] * bool(rows))


def costs(groups):
    """What the runs took, of those that tell -> header and rows; stages as shares of h:mm:ss."""
    lines = []
    for run in (run for group in groups for run in group):
        rows = read_numbers(run["folder"] / "times.csv", lambda row: set(TIMES) == set(row))
        seconds = [sum(row[stage] for row in rows) for stage in STAGES]
        if whole := sum(seconds):
            lines.append([run["folder"].name, clock(whole),
                          *(f"{part / whole:.0%}" for part in seconds),
                          f"{max(row['peak_mb'] for row in rows):,.0f}"])
    stages = [stage.replace("_", " ") for stage in STAGES]
    return ["run", "h:mm:ss", *stages, "peak memory, MB"], lines


def markdown(groups):
    """The two tables of results/README.md: scores, also random play's if in random.json; costs."""
    def lines(header, rows):
        first, *others = ("| " + " | ".join(row) + " |" for row in (header, *rows))
        return [first, "|" + "---|" * len(header), *others]

    path, chance, notes, body = groups[0][0]["folder"].parent / "random.json", (), {}, []
    if path.exists():
        chance = read_json(path, lambda rows: isinstance(rows, list) and all(
            isinstance(row, dict) and isinstance(row.get("game"), str)
            and is_number(row.get("mean")) and is_number(row.get("std")) for row in rows))
    chance = {row["game"]: (row["mean"], row["std"]) for row in chance}
    for group in groups:
        row, runs, mean = summary(group), "stopped early", "-"
        if row["finished"]:
            runs = ", ".join(with_std(np.mean(r), np.std(r) / len(r)**0.5)
                             for r in (run["returns"] for run in group))
            mean = with_std(row["mean"], row["std"], bold="**")
        random, _, paper, simple, ppo = PUBLISHED.get(row["game"], UNPUBLISHED)
        body.append((row["game"], kind(group[0], notes, "`"), runs, mean,
                     figure(row["human_normalised"], 3),
                     with_std(*chance.get(row["game"], (None, None))), figure(random),
                     *(with_std(*column[:2]) for column in (paper, simple, ppo))))
    scores = lines(("game", "preset", "each run, ours (standard error)", "mean, ours (std)",
                    "human-normalised", "random, ours", "random, published", "paper, published",
                    "SimPLe, published", "PPO 100K, published"), body)
    footnotes = [f"[{i}] {text}  " for i, text in enumerate(notes.values(), 1)]
    return "\n".join([*scores, "", *(footnotes + [""] if notes else []), *lines(*costs(groups))])


def curves(group):
    """Scores of a group's runs over time -> (interactions int [P], scores float [runs, P]), P: the
    rounds after which every run was evaluated; of ppo.py, where episodes of its training ended.
    """
    name = "collect_return" if group[0]["preset"] == "ppo" else "real_return"
    runs = [{int(row["interactions"]): row[name] for row in run["rows"] if name in row}
            for run in group]
    points = sorted(set.intersection(*map(set, runs)))
    return np.array(points, int), np.array([[run[x] for x in points] for run in runs])


@contextlib.contextmanager
def drawing(path, width, height, dpi=80):
    """A matplotlib Figure of so many inches, free of the user's settings; saved after the block."""
    os.environ["MPLBACKEND"] = "agg"            # one that a notebook names may not be here
    import matplotlib.style
    from matplotlib.figure import Figure
    with matplotlib.style.context("default"):
        page = Figure(figsize=(width, height))
        yield page
        data = io.BytesIO()
        page.savefig(data, format=pathlib.Path(path).suffix[1:], dpi=dpi)
    write_atomically(pathlib.Path(path), data.getbuffer())


def plot(groups, path):
    """Figure 4: score against real interactions, a panel for each game; of runs of ppo.py the score
    in training (Figure 5). Of several kinds of runs one is drawn: an unchanged preset before
    others, more before fewer.
    """
    notes, kinds, panels, entries = {}, {}, {}, {}
    for group in groups:
        if curves(group)[0].size:
            kinds.setdefault(kind(group[0], notes), []).append(group)
    if not kinds:
        raise UserError("there is nothing to plot: none of these runs was evaluated yet")
    name = max(kinds, key=lambda name: (kinds[name][0][0]["preset"] != "ppo", "[" not in name,
                                        sum(map(len, kinds[name]))))
    first = kinds[name][0][0]
    title = notes.get(json.dumps([first["preset"], first["changed"]]), f"preset {name}")
    for group in kinds.pop(name):
        panels.setdefault(group[0]["game"], []).append(group)
    lines, columns = -(-len(panels) // 3), min(len(panels), 3)
    with drawing(path, 4.2 * columns, 3.2 * lines + 0.8, dpi=100) as page:
        page.set_layout_engine("constrained")
        axes = page.subplots(lines, columns, squeeze=False).flatten()
        for ax, (game, groups) in zip(axes, panels.items()):
            ax.set_title(game)
            for group in groups:
                (x, scores), n = curves(group), len(group)
                if not group[0]["finished"]:
                    ax.plot(x, scores.T, ":x", color="0.5", label="stopped early or still runs")
                    continue
                mean, std = scores.mean(0), scores.std(0)
                ax.set_title(f"{game}, {n} seed{'s' if n > 1 else ''}")
                ax.plot(x, mean, color="k", linewidth=2.5, label="mean over seeds")
                if n > 1:
                    ax.fill_between(x, mean - std, mean + std, color="0.8",
                                    label="+- standard deviation over seeds")
            for label, figures, dashes in zip(
                    ("paper", "SimPLe", "PPO 100K"), PUBLISHED.get(game, ())[2:],
                    ((7, 2), (1, 2), (5, 2, 1, 2))):
                ax.axhline(figures[0], color="k", linestyle=(0, dashes), linewidth=1.2,
                           label=f"{label}, published final mean")
            ax.grid(alpha=0.3)
            entries |= {label: line for line, label in zip(*ax.get_legend_handles_labels())}
        for ax in axes[len(panels):]:
            ax.axis("off")
        order = sorted(entries, key=lambda label: "published" in label)
        page.legend([entries[label] for label in order], order, loc="outside upper center",
                    ncols=columns, title=title)
        page.supxlabel("real interactions (x4 = frames)")
        page.supylabel("score in training" if name == "ppo" else "mean score of an episode")
    print(f"saved {path}" + (f" without {', '.join(kinds)}: name these runs alone to see them"
                             if kinds else ""), file=sys.stderr)


def judge_one(args):
    """Plays episodes with one run's newest checkpoint, or at random, and prints the scores."""
    if args.random:
        game = canonical_name(args.game or read_config(args.runs[0])["game"])
        models, interactions = RandomPolicy(AtariEnv(game).num_actions, args.seed), 0
        preset, seeds, what = None, None, "random policy"
    else:
        models, config, interactions = load_models(args.runs[0], args.device)
        game, preset, seeds = config.game, config.preset, [config.seed]
        what = f"{args.runs[0]}, preset {preset}, seed {config.seed}"
    scores = play(models, game, args.episodes or 32, args.seed, args.temperature)
    print(json.dumps([{
        "game": game, "preset": preset, "seeds": seeds, "policy": what, "over": "episodes",
        "episodes": len(scores), "interactions": interactions, "returns": scores,
        "human_normalised": human_normalised(game, np.mean(scores)), **statistics(scores)}])
        if args.json else
        f"{what}, after {interactions:,} real interactions\nprotocol: {PROTOCOL}; temperature "
        f"{args.temperature:g}\n{describe(game, scores)}")


def judge_many(args):
    """One table of the runs: from their stored evaluations, or with --episodes played anew."""
    runs = [read_run(folder) for folder in args.runs]
    groups = grouped(runs)                              # refuses duplicates before hours of play
    if args.episodes:
        for run in runs:
            models, _, run["interactions"] = load_models(run["folder"], args.device)
            run["returns"] = play(models, run["game"], args.episodes, args.seed, args.temperature)
    if args.plot:
        plot(groups, args.plot)
    print(json.dumps([summary(group) for group in groups]) if args.json else
          markdown(groups) if args.markdown else table(groups))


# --------------------------------------------------------------------------------------------------
# Dream fidelity: where does the dream leave the road?
# --------------------------------------------------------------------------------------------------

CONTEXT = 4                                     # observations seen, as in training (released code)
HORIZONS = (1, 2, 5, 10, 25, 50)                # steps dreamed after them
TEMPERATURES = (0.1, 0.5, 1.0, 1.15, 1.3)       # those of Ha & Schmidhuber, Table 2


def moments(models, game, seed):
    """The first 500 moments, or fewer, of a real episode, to begin dreams at (as Models.starts)."""
    torch.manual_seed(seed)
    buffer = record(models, game, [seed], 1.0, most=500)
    return models.starts(buffer, np.arange(len(buffer)), models.encode_all(buffer))


def dream_env(folder, num_envs, steps=50, temperature=None, seed=0, device="cpu"):
    """The dream of the trained run in `folder` as an environment for any agent -> DreamEnv
    (dynamics.py), whose episodes begin at moments of a real one, played for that from `seed`.
    temperature: of the codes; None: the one at which the run's own policy dreamed.
    """
    models, config, _ = load_models(folder, device)
    temperature = config.temperature if temperature is None else temperature
    codes, state = moments(models, config.game, seed)
    return DreamEnv(models.dynamics, models, codes, num_envs, steps, temperature, state)


@torch.no_grad()
def decoded(models, codes, batch=64):
    """Codes int64 [N, 6, 6] -> the newest frames, float32 [N, 96, 96] in [0, 1], on the CPU."""
    with models.autocast():
        return torch.cat([models.vqvae.decode(z)[:, -1].float().cpu() for z in codes.split(batch)])


def stretches(buffer, length, most, purpose):
    """Rows of up to `most` stretches of so many steps, evenly spread, each inside one episode,
    int64 [n, length]; UserError, ending in `purpose`, if no episode is long enough.
    """
    starts = np.flatnonzero(buffer.start[:max(0, len(buffer) - length + 1)]
                            == buffer.start[length - 1:len(buffer)])
    if not len(starts):
        raise UserError(f"no episode lasted the {length} steps {purpose}")
    return starts[::-(-len(starts) // most), None] + np.arange(length)


def dream_along(models, buffer, rows, codes, temperature):
    """Open loop from the first CONTEXT of the codes int64 [n, L, 6, 6] of these rows, int [n, L],
    on under the real actions -> codes and rewards, as dynamics.open_loop returns them.
    """
    actions = models.to_device(buffer.actions[rows].astype(np.int64))
    with models.autocast():
        parts = [open_loop(models.dynamics, models.embed, z, a, CONTEXT, temperature)
                 for z, a in zip(codes.split(128), actions.split(128))]
    return [torch.cat(part) for part in zip(*parts)]


def fidelity(models, buffer, temperature=1.0, most=256):
    """Open loop from up to `most` moments of real episodes -> (number of them, list of dicts, one
    for each of HORIZONS; UserError if no episode is long enough):

    step               k, steps dreamed after the last of 4 observations
    code_accuracy      share of the 36 codes in step k that are the real observation's own
    pixel_error        root mean square of decoded minus real frame, in grey levels of 0 .. 255
    foreground_error   the same on what moves (vqvae.py): 0 perfect, 1 background only
    .._still, .._codes the same for the last observation seen; for the true codes, decoded
    reward_precision   share of the dream's non-zero rewards in steps 1 .. k that the game paid too,
                       in the same step with the same sign; None where there were none
    reward_recall      share of the game's non-zero rewards that the dream paid, likewise
    rewards_real, rewards_dreamed   how many there were
    """
    rows = stretches(buffer, CONTEXT + HORIZONS[-1], most, "that --fidelity needs")  # [n, L]
    real = models.encode_all(buffer)[models.to_device(rows)].long()                # [n, L, 6, 6]
    dreamed, paid = dream_along(models, buffer, rows, real, temperature)
    paid = paid.cpu().long()                                                         # [n, L - 1]
    true_paid = reward_class(torch.from_numpy(buffer.rewards[rows[:, :-1]])) - 1
    table, still = [], real[:, CONTEXT - 1]
    still_frames = decoded(models, still)
    for k in HORIZONS:
        t = CONTEXT - 1 + k
        row = {"step": k, "code_accuracy": float((dreamed[:, t] == real[:, t]).float().mean()),
               "code_accuracy_still": float((still == real[:, t]).float().mean())}
        truth = torch.from_numpy(buffer.frames[rows[:, t]]).float() / 255            # [n, 96, 96]
        shown = {"": decoded(models, dreamed[:, t]), "_still": still_frames,
                 "_codes": decoded(models, real[:, t])}
        for name, image in shown.items():
            row["pixel_error" + name] = 255 * float((image - truth).square().mean().sqrt())
        for name, image in shown.items():
            row["foreground_error" + name] = float(foreground_error(truth, image))
        mine, true = paid[:, CONTEXT - 1:t], true_paid[:, CONTEXT - 1:t]             # [n, k]
        right = int(((mine == true) & (true != 0)).sum())
        n_mine, n_true = int((mine != 0).sum()), int((true != 0).sum())
        table.append(row | {"reward_precision": right / n_mine if n_mine else None,
                            "reward_recall": right / n_true if n_true else None,
                            "rewards_real": n_true, "rewards_dreamed": n_mine})
    return len(rows), table


def show_fidelity(args):
    """--fidelity: plays fresh episodes, dreams along them, prints the table."""
    models, config, interactions = load_models(args.runs[0], args.device)
    temperature = args.temperature or config.temperature
    torch.manual_seed(args.seed)
    episodes = args.episodes or 4                       # 2,000 steps of each: more is only memory
    buffer = record(models, config.game, episode_seeds(args.seed, range(episodes)), 1.0, 2000)
    count, rows = fidelity(models, buffer, temperature)
    three = ["dream", "still", "codes"]
    lines = ruled({"": ["step"], "codes right": three[:2], "pixel error, grey levels": three,
                   "foreground error": three,
                   "rewards in steps 1 .. step": ["precision", "recall", "real", "dreamed"]},
                  [[figure(value, 0 if type(value) is int else 2 if "pixel" in name else 3)
                    for name, value in row.items()] for row in rows])
    print(json.dumps(rows) if args.json else "\n".join([
        f"{args.runs[0]}, after {interactions:,} real interactions",
        f"{count} moments of {episodes} fresh episodes ({len(buffer):,} steps): {CONTEXT} "
        f"observations seen, then open loop under the real actions, codes drawn at temperature "
        f"{temperature:g}",
        "still: nothing moves after the last observation seen; codes: the true codes decoded", "",
        *lines]))


def virtual_scores(models, buffer, steps, most=256):
    """What this policy is paid, rewards clipped, in so many steps after up to `most` real moments
    -> {"real": in the game, one of TEMPERATURES: in a dream from there at it}, each float [n].
    """
    rows = stretches(buffer, steps, most, "of a dream")                              # [n, steps]
    codes, state = models.starts(buffer, rows[:, 0], models.encode_all(buffer))
    scores = {"real": (reward_class(torch.from_numpy(buffer.rewards[rows])) - 1).sum(1)}
    for temperature in TEMPERATURES:
        with models.autocast():
            rollout = dream(models.dynamics, models.embed, models.policy, codes, steps,
                            temperature, memory=models.config.policy_memory, start_state=state)
        # After the first end, if the model predicts ends, it is another dream.
        before = rollout["dones"].long().cumsum(0) - rollout["dones"].long() == 0
        scores[temperature] = (rollout["rewards"] * before).sum(0).cpu()
    return {name: score.double().numpy() for name, score in scores.items()}


def show_sweep(args):
    """--sweep-temperature: virtual against actual score of each run's policy, if it has dreams."""
    folders, result = [run for run in args.runs if read_config(run)["preset"] != "ppo"], []
    if not folders:
        raise UserError("none of these runs has a world model to dream in")
    for folder in folders:
        models, config, _ = load_models(folder, args.device)
        torch.manual_seed(args.seed)
        episodes, steps = args.episodes or 8, args.steps or config.dream_steps
        buffer = record(models, config.game, episode_seeds(args.seed, range(episodes)), 1.0,
                        most=27_000)
        scores = virtual_scores(models, buffer, steps)
        returns = np.add.reduceat(buffer.rewards, np.unique(buffer.start)).tolist()
        result.append({
            "run": str(folder), "game": config.game, "preset": config.preset, "seed": config.seed,
            "trained_at": config.temperature, "steps": steps, "moments": len(scores["real"]),
            "episodes": episodes, "actual_score": float(np.mean(returns)),
            "actual_std": float(np.std(returns))})
        for name, score in scores.items():
            name = "actual_steps" if name == "real" else f"virtual_{name}"
            result[-1] |= {name: float(score.mean()), f"{name}_std": float(score.std())}
    sums = {"in game": "actual_steps"} | {f"at {t:g}": f"virtual_{t}" for t in TEMPERATURES}
    parts = {"": ["run", "trained at", "actual", "episodes", "steps", "moments"], "sums": sums}
    lines = ruled(parts, [[
        r["run"], f"{r['trained_at']:g}", with_std(r["actual_score"], r["actual_std"]),
        *(str(r[name]) for name in ("episodes", "steps", "moments")),
        *(f"{r[name]:.2f} ({r[name + '_std']:.2f})" for name in sums.values())]
        for r in result], left=1)
    print(json.dumps(result) if args.json else "\n".join([
        "actual: mean score of whole episodes (std). sums: of clipped rewards over so many steps "
        "from moments of these", "episodes, mean (std), in the game and in dreams (temperature).",
        "", *lines]))


# --------------------------------------------------------------------------------------------------
# Pictures: the dream beside the real game, the policy beside what it sees, a run in training
# --------------------------------------------------------------------------------------------------

SIDE = 288                                      # pixels of a panel: each of the game's three times


def panel(image):
    """A frame, float [96, 96] in [0, 1], or codes, int [6, 6], as numbered colours -> PIL image."""
    os.environ["MPLBACKEND"] = "agg"
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont
    codes = image.dtype.kind != "f"
    colours = (matplotlib.colormaps["nipy_spectral"](image / 127)[..., :3] if codes else
               np.stack([np.clip(image, 0, 1)] * 3, -1))                             # [H, W, 3]
    picture = Image.fromarray(np.rint(255 * colours).astype(np.uint8)).resize(
        (SIDE, SIDE), Image.Resampling.NEAREST)
    draw, cell = ImageDraw.Draw(picture), SIDE / len(image)
    for (i, j), code in np.ndenumerate(image) if codes else ():
        draw.text((cell * (j + 0.5), cell * (i + 0.5)), str(code), anchor="mm",
                  font=ImageFont.load_default(cell / 3),
                  fill="black" if colours[i, j] @ (0.3, 0.6, 0.1) > 0.5 else "white")
    return picture


def picture(panels, caption, upright=False):
    """Panels [(title, image), ...] side by side, or upright, a caption below -> PIL image."""
    from PIL import Image, ImageDraw, ImageFont
    bar, gap, n = 20, 6, len(panels)
    across, down = (1, n) if upright else (n, 1)
    page = Image.new("RGB", (across * (SIDE + gap) + gap, down * (SIDE + bar) + bar + gap), "white")
    draw, look = ImageDraw.Draw(page), dict(anchor="ls", fill="black",
                                            font=ImageFont.load_default(12))
    for i, (title, image) in enumerate(panels):
        x, y = (gap, i * (SIDE + bar)) if upright else (gap + i * (SIDE + gap), 0)
        draw.text((x, y + bar - 4), title, **look)
        page.paste(panel(image), (x, y + bar))
    draw.text((gap, page.height - 7), caption, **look)
    return page


def save_pictures(path, steps):
    """Steps [(panels, caption), ...] -> a .gif, 10 a second (the game: 15), or 8 in a .png."""
    from PIL import Image
    data = io.BytesIO()
    shown = np.unique(np.linspace(0, len(steps) - 1, 8).round().astype(int))
    if pathlib.Path(path).suffix.lower() == ".gif":
        pages = [picture(panels, caption) for panels, caption in steps]
        # One palette for all, taken from some: else colours flicker and the file is twice as large.
        palette = Image.fromarray(np.hstack([np.asarray(pages[i]) for i in shown])).quantize(96)
        pages = [page.quantize(palette=palette, dither=Image.Dither.NONE) for page in pages]
        pages[0].save(data, "GIF", save_all=True, append_images=pages[1:], duration=100, loop=0)
    else:
        strip = np.hstack([np.asarray(picture(*steps[i], upright=True)) for i in shown])
        Image.fromarray(strip).save(data, "PNG")
    write_atomically(pathlib.Path(path), data.getbuffer())
    print(f"saved {path}", file=sys.stderr)             # stdout may be JSON


def dream_pictures(models, buffer, names, steps, temperature, rng):
    """A stretch of the recorded episode, chosen by rng, and the dream along it -> steps for
    save_pictures, from the last observation seen on. names: of the actions.
    """
    steps = min(steps, len(buffer) - CONTEXT)
    if steps < 1:
        raise UserError("the episode was over before a dream could begin; try another --seed")
    rows = rng.integers(len(buffer) - CONTEXT - steps + 1) + np.arange(CONTEXT + steps)
    real = models.encode_all(buffer)[models.to_device(rows)].long()
    dreamed, rewards = dream_along(models, buffer, rows[None], real[None], temperature)
    images, maps = decoded(models, dreamed[0]).numpy(), dreamed[0].cpu().numpy()
    # The reward r_{t-1} comes with o_t; it is written over the picture of o_t.
    paid = np.array([buffer.rewards[rows[:-1]], rewards[0].cpu().numpy()])           # [2, L - 1]
    result = []
    for t in range(CONTEXT - 1, len(rows)):
        titles = [f"{name}: reward {r[t - 1]:g}, sum {r[CONTEXT - 1:t].sum():g}" if t >= CONTEXT
                  else f"{name}: start" for name, r in zip(("real", "dream"), paid)]
        panels = [(titles[0], buffer.frames[rows[t]] / 255), (titles[1], images[t]),
                  ("the dream's codes", maps[t])]
        result.append((panels, f"step {t - CONTEXT + 1} of {steps}, "
                               f"action {names[buffer.actions[rows[t]]]}"))
    return result


def video_pictures(models, buffer, names):
    """The recorded episode -> steps for save_pictures: game, reconstruction and codes."""
    codes = models.encode_all(buffer).long()
    images, maps = decoded(models, codes).numpy(), codes.cpu().numpy()
    scores = np.concatenate([[0], np.cumsum(buffer.rewards[:len(buffer)])])
    return [([(f"real: score {scores[t]:g}", buffer.frames[t] / 255),
              ("what the world model sees", images[t]), ("its codes", maps[t])],
             f"step {t}, action {names[buffer.actions[t]]}") for t in range(len(buffer))]


def show_pictures(args):
    """--dream and --video: plays one real episode and saves pictures of it."""
    models, config, _ = load_models(args.runs[0], args.device)
    names, steps = AtariEnv(config.game).action_meanings, args.steps or (50 if args.dream else 200)
    torch.manual_seed(args.seed)
    if args.dream:                  # which begins at a random moment of the first 300 steps or so
        buffer = record(models, config.game, [args.seed], 1.0, CONTEXT + steps + 300)
        pictures = dream_pictures(models, buffer, names, steps, args.temperature
                                  or config.temperature, np.random.default_rng(args.seed))
    else:
        buffer = record(models, config.game, [args.seed], args.temperature, steps)
        pictures = video_pictures(models, buffer, names)
    save_pictures(args.dream or args.video, pictures)


@contextlib.contextmanager
def or_warning(path):
    """A picture that cannot be drawn or written, for whatever reason, ends no run."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        say(f"warning: no picture {path}: {reason[0]}", "stderr")


def report(run):
    """One line for the round just finished, and the curves of all of them."""
    row = run.rows[-1]
    figures = [f"{label} {row[name]:{form}}" for name, label, form in (
        ("elbo", "elbo", ".0f"), ("foreground_error", "fg", ".2f"),
        ("perplexity", "perplexity", ".0f"), ("code_loss", "code loss", ".3f"),
        ("code_accuracy", "acc", ".3f"), ("reward_loss", "reward loss", ".4f"),
        ("entropy", "entropy", ".2f"), ("dream_return", "dream return", ".3f"),
        ("collect_return", "collected", ".1f"), ("real_return", "real return", ".1f"))
        if name in row]
    seconds = sum(sum(times[stage] for stage in STAGES) for times in run.times)
    say("  ".join([f"{row['iteration']:2d}/{run.config.iterations}",
                   f"{row['interactions']:6d} steps", *figures]) + f"  | {clock(seconds)}")
    progress_picture(run)


def progress_picture(run):
    """progress.png: the figures of metrics.csv against real interactions."""
    panels = (("score in the real game", ("real_return", "collect_return")),
              ("return of a dream", ("dream_return",)),
              ("policy entropy (nats)", ("entropy",)), ("foreground error", ("foreground_error",)),
              ("code accuracy", ("code_accuracy",)), ("reward accuracy", (
                  "reward_accuracy_minus", "reward_accuracy_zero", "reward_accuracy_plus")))
    path = run.folder / "progress.png"
    with or_warning(path), drawing(path, 13, 6.5) as page:
        for ax, (title, names) in zip(page.subplots(2, 3).flat, panels):
            for name, style in zip(names, ("-o", "--s", ":^")):
                points = [(r["interactions"], r[name]) for r in run.rows if name in r]
                if points:
                    ax.plot(*zip(*points), style, label=name, markersize=4)
            ax.set(title=title, xlabel="real interactions (x4 = frames)")
            ax.grid(alpha=0.3)
            if len(names) > 1 and ax.lines:
                ax.legend(fontsize=8)
        page.suptitle(f"{run.config.game}, preset {run.config.preset}, seed {run.config.seed}")
        page.tight_layout()


@torch.no_grad()
def world_model_picture(run):
    """world_model_<iteration>.png -> foreground error on 256 of the newest observations."""
    models, buffer, rng = run.models, run.buffer, run.numpy_rng(0, 0, 0)
    start = len(buffer) - work(run.config, run.iteration)["collect"]
    rows = rng.integers(start, len(buffer), size=256)
    x = torch.cat([models.observations(buffer, part) for part in np.split(rows, 4)])
    with models.autocast():
        images = torch.cat([models.vqvae.decode(models.vqvae.encode(part)) for part in x.split(64)])
    error = foreground_error(x.float() / 255, images)

    # One stretch of real play in which something moves, dreamed along from its 4th observation on.
    length = min(28, len(buffer) - start)
    starts = rng.integers(start, len(buffer) - length + 1, size=64)
    inside = [s for s in starts if not buffer.ends[s:s + length - 1].any()] or [starts[0]]
    motion = [buffer.frames[s:s + length].astype(np.float32).std(0).mean() for s in inside]
    rows = np.arange(length) + inside[int(np.argmax(motion))]
    with run.other_dice(int(rows[0])):
        with models.autocast():
            codes = models.vqvae.encode(models.observations(buffer, rows))
        dreamed = dream_along(models, buffer, rows[None], codes[None], run.config.temperature)[0][0]
    images = [decoded(models, z).numpy() for z in (codes, dreamed)]

    shown, path = range(0, length, 3), run.folder / f"world_model_{run.iteration + 1:02d}.png"
    grey, colours = dict(cmap="gray", vmin=0, vmax=1), dict(cmap="nipy_spectral", vmin=0, vmax=127)
    strips = (("real", buffer.frames[rows], grey | {"vmax": 255}),
              ("reconstructed", images[0], grey), ("its codes", codes.cpu().numpy(), colours),
              ("dreamed", images[1], grey), ("its codes", dreamed.cpu().numpy(), colours))
    with or_warning(path), drawing(path, 1.35 * len(shown), 7.2) as page:
        axes = page.subplots(5, len(shown), squeeze=False)
        for strip, (label, pictures, look) in zip(axes, strips):
            strip[0].set_ylabel(label)
            for ax, t in zip(strip, shown):
                ax.imshow(pictures[t], **look)
                ax.set(xticks=[], yticks=[])
        for ax, t in zip(axes[0], shown):
            ax.set_title("seen" if t < CONTEXT else f"+{t - CONTEXT + 1}", fontsize=9)
        page.suptitle(f"{run.config.game} after {len(buffer)} interactions; +n: dreamed n steps "
                      f"under the real actions; foreground error {float(error):.2f}", fontsize=10)
        page.tight_layout()
    return error


# --------------------------------------------------------------------------------------------------
# Play: a person inside the dream
# --------------------------------------------------------------------------------------------------


def action_of(held, names):
    """Keys held down -> number of the game's action: up + right + f -> UPRIGHTFIRE, without what a
    game does not have. Where there is no UP, as in Pong, up is RIGHT and down LEFT.
    """
    if not any(name.startswith("UP") for name in names):
        held = {{"up": "right", "down": "left"}.get(key, key) for key in held}
    vertical = "UP" if "up" in held else "DOWN" if "down" in held else ""
    across = "RIGHT" if "right" in held else "LEFT" if "left" in held else ""
    fire = "FIRE" if held & {"f", "enter"} else ""
    wanted = (vertical + across + fire, vertical + across, across + fire, vertical + fire, across,
              vertical, fire, "NOOP")
    return names.index(next(name for name in wanted if name in names))


class Player:
    """The window of --play, a matplotlib figure: keys, pictures and a DreamEnv in between."""

    HELP = ("arrows: move   f or enter: fire   space: policy / you   r: another start   "
            "t / g: temperature up / down")

    def __init__(self, models, starts, names, figure, temperature=1.0, seed=0):
        self.models, self.names, self.figure = models, names, figure
        self.env = DreamEnv(models.dynamics, models, starts[0], 1, 10**9, temperature, starts[1])
        self.held, self.by_policy, self.last = set(), False, ""
        axes = figure.subplots(1, 2, gridspec_kw=dict(
            left=0.02, right=0.98, bottom=0.08, top=0.87, wspace=0.05))
        self.images = [axes[0].imshow(np.zeros((96, 96)), cmap="gray", vmin=0, vmax=1),
                       axes[1].imshow(np.zeros((6, 6)), cmap="nipy_spectral", vmin=0, vmax=127)]
        for ax, title in zip(axes, ("the dream", "its codes")):
            ax.set_title(title)
            ax.axis("off")
        self.caption = figure.suptitle("")
        figure.text(0.5, 0.02, self.HELP, ha="center", fontsize=8)
        for event in ("key_press_event", "key_release_event"):
            figure.canvas.mpl_connect(event, self.on_key)
        self.restart(seed)

    def restart(self, seed=None):
        """Another real moment, score and step 0. A seed decides all that follows."""
        self.observation, _ = self.env.reset(seed=seed)
        self.score, self.step, self.action = 0.0, 0, 0
        self.show()

    def on_key(self, event):
        """A key goes down or up; which, without shift and its like, in lower case."""
        key = (event.key or "").lower().split("+")[-1]
        if event.name == "key_release_event":
            self.held.discard(key)
            return
        if key == "r":
            self.restart()
        elif key in ("t", "g"):
            factor = 1.1 if key == "t" else 1 / 1.1
            self.env.temperature = min(max(self.env.temperature * factor, 0.05), 20)
        elif key == " ":
            self.by_policy = not self.by_policy
        else:
            self.held.add(key)
        self.show()

    @torch.no_grad()
    def tick(self):
        """One step of the dream under the keys held, or under the policy."""
        with self.models.autocast():
            if self.by_policy:
                z = torch.from_numpy(self.observation).to(self.models.device)
                x = policy_input(z, self.env.state, self.models.config.policy_memory)
                self.action = int(sample(self.models.policy(x)[0], generator=self.env.generator))
            else:
                self.action = action_of(self.held, self.names)
            self.observation, reward, over, _, _ = self.env.step(np.array([self.action]))
        self.score, self.step = self.score + float(reward[0]), self.step + 1
        if over[0]:                                     # predicted: another dream has begun
            self.last = f"   the last dream ended with {self.score:g}"
            self.score, self.step = 0.0, 0
        self.show()

    def show(self):
        self.images[0].set_data(decoded(self.models, self.env.codes)[0].numpy())
        self.images[1].set_data(self.env.codes[0].cpu().numpy())
        self.caption.set_text(
            f"score {self.score:g}   step {self.step}   {self.names[self.action]}   "
            f"temperature {self.env.temperature:.2f}   "
            f"{'the policy plays' if self.by_policy else 'you play'}{self.last}")
        self.figure.canvas.draw_idle()


def show_play(args):
    """--play: opens the window; 15 steps a second, the pace of the game."""
    try:
        import matplotlib.pyplot as plt
        figure = plt.figure(figsize=(9, 5.2), num="the dream")
    except Exception:                                   # each toolkit has an error of its own
        figure = None
    if figure is None or figure.canvas.required_interactive_framework is None:
        raise UserError("--play needs a window: no display here, or no tkinter or the like")
    for name in [name for name in plt.rcParams if name.startswith("keymap.")]:
        plt.rcParams[name] = []                         # f would mean full screen, r home, ..
    models, config, _ = load_models(args.runs[0], args.device)
    print("playing a real episode: dreams begin at its moments", flush=True)
    player = Player(models, moments(models, config.game, args.seed),
                    AtariEnv(config.game).action_meanings, figure,
                    args.temperature or config.temperature, args.seed)
    timer = figure.canvas.new_timer(1000 // 15, [(player.tick, (), {})])
    timer.start()
    plt.show()


# --------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------

# What a flag of this name does; without any of them runs are judged.
ACTS = {"random": judge_one, "fidelity": show_fidelity, "sweep_temperature": show_sweep,
        "dream": show_pictures, "video": show_pictures, "play": show_play, "export": export_model}


def parse(arguments):
    parser = argparse.ArgumentParser(
        usage="evaluate.py RUN [RUN ..] [options]", epilog=f"Protocol: {PROTOCOL}.",
        description="Without options: the final scores of the runs beside the published ones.")
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folders, e.g. runs/Freeway-"
                        "small-s0 or runs/*; files beside them are passed over")
    add = parser.add_argument_group("judge").add_argument
    add("--episodes", type=int, metavar="N", help="play N whole games anew with the newest "
        "checkpoint; in --fidelity (4) and --sweep-temperature (8) so many")
    add("--random", action="store_true", help="judge the uniformly random policy instead (32)")
    add("--game", help="the game for --random (the run's)")
    add("--plot", metavar="curves.png", help="draw the learning curves, a panel for each game")
    add("--json", action="store_true", help="print a list of JSON objects instead of text")
    add("--markdown", action="store_true", help="print two tables in Markdown: scores, costs")
    add = parser.add_argument_group("look into a run").add_argument
    add("--fidelity", action="store_true", help="how long is the dream right along real episodes?")
    add("--sweep-temperature", action="store_true", help="the scores of policies in dreams of "
        "several temperatures and in the game")
    add("--dream", metavar="dream.gif", help="a dream beside the game (.gif, or .png: a strip)")
    add("--video", metavar="play.gif", help="the policy in the game, and what the model sees of it")
    add("--play", action="store_true", help="play inside the dream, in a window. " + Player.HELP)
    add("--export", metavar=MODEL, help="write the weights alone: all of this works with them")
    add = parser.add_argument_group("how").add_argument
    add("--temperature", type=float, metavar="T", help="of the policy's softmax (1); in "
        "--fidelity, --dream and --play of the dreamed codes (as the run's policy dreamed)")
    add("--steps", type=int, metavar="N", help="of --dream (50), --video (200), the sweep")
    add("--seed", type=int, default=1000, metavar="N", help="of episodes and samples (1000)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cpu")
    return parser.parse_args(arguments)


def check_flags(args, named):
    """Raises UserError for what cannot be or does not go together. named: the runs as typed."""
    for name, low, high in (("episodes", 1, 1000), ("steps", 1, 2000),
                            ("temperature", 0.01, 100), ("seed", 0, 2**31 - 1)):
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name} must lie in {low} .. {high}, not {value}")
    acts = [name for name in ACTS if getattr(args, name)]
    tables = [name for name in ("plot", "markdown") if getattr(args, name)]
    if len(acts) > 1 or acts and tables or args.json and args.markdown:
        names = acts + tables if acts else ["json", "markdown"]
        raise UserError(" and ".join(f"--{name.replace('_', '-')}" for name in names)
                        + " do not go together: one at a time")
    if args.random and len(args.runs) > 1:
        raise UserError("--random judges one policy: name at most one run")
    if not args.runs and not (args.random and args.game):
        raise UserError("name a run folder, e.g. runs/Freeway-small-s0, or --random with --game"
                        + (f"; {named[0]} is a file" if named else ""))
    if set(acts) - {"random", "sweep_temperature"} and len(args.runs) > 1:
        raise UserError(f"--{acts[0]} looks into one run: name one run folder")
    for name in ("plot", "dream", "video", "export"):   # before hours of work: can it be written?
        path, endings = pathlib.Path(getattr(args, name) or "."), {
            "plot": (".png", ".pdf", ".svg"), "export": (MODEL,)}.get(name, (".gif", ".png"))
        if path.name and not (path.suffix.lower() in endings or path.name in endings):
            raise UserError(f"{path} must end in {' or '.join(endings)}")
        if not path.parent.is_dir():
            raise UserError(f"there is no folder {path.parent} for {path.name}")
        if path.name and path.is_dir():
            raise UserError(f"{path} is a folder; choose another name")


def main(arguments=None):
    args = parse(arguments)
    sys.stderr = sys.stderr or open(os.devnull, "w")    # closed; a closed stdout takes no harm
    for stream in (sys.stdout, sys.stderr):             # names may have letters that it has not
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")
    # A Windows shell leaves patterns alone. Files beside the runs, as in results/*, are none.
    named = [path for name in args.runs for path in
             ([name] if os.path.lexists(name) else sorted(glob.glob(name)) or [name])]
    args.runs = [name for name in named if not os.path.isfile(name)]
    try:
        check_flags(args, named)
        if not (args.fidelity or args.dream or args.play):      # which have the run's own instead
            args.temperature = args.temperature or 1.0
        one = args.episodes and len(args.runs) == 1 and not (args.plot or args.markdown)
        acts = [act for name, act in ACTS.items() if getattr(args, name)]
        (acts or [judge_one if one else judge_many])[0](args)
    except (UserError, ValueError, MemoryError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    try:
        try:
            main()
        finally:
            print(end="", flush=True)
    except (OSError, UnicodeError) as error:        # nowhere to write: a closed pipe, a full disk
        sys.stdout = None                           # or it is tried once more at the end
        sys.exit(f"error: {error}")
