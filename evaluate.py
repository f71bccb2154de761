"""How good is a run? Whole real episodes with its checkpoint, beside the numbers of the paper.

    python evaluate.py runs/Freeway-small-s0             # 32 episodes with the newest checkpoint
    python evaluate.py --random --game Freeway           # the random policy, by the same protocol
    python evaluate.py runs/*                            # one table of all runs, Tables 4 and 5
    python evaluate.py results/* --markdown              # the tables of the README
    python evaluate.py runs/* --plot curves.png          # their learning curves, Figures 4 and 5
    python evaluate.py runs/Pong-small-s0 --fidelity     # where does its dream go wrong?
    python evaluate.py runs/* --sweep-temperature        # does its policy exploit its dream?
    python evaluate.py runs/Pong-small-s0 --dream dream.gif    # the dream beside the real game
    python evaluate.py runs/Pong-small-s0 --video play.gif     # the policy, and what it sees
    python evaluate.py runs/Pong-small-s0 --play         # play inside the dream yourself

Protocol, as the paper's (Section 4, and the authors' released code): 32 whole episodes of the final
policy, actions sampled from its softmax at temperature 1, up to 30 no-ops at reset, no sticky
actions, the end of a life does not end an episode, the score is the game's own, unclipped, at most
108,000 frames. The score of a run is the mean of these episodes; the figures of a game are taken
over its runs, one for each seed.
"""
import argparse
import contextlib
import csv
import dataclasses
import io
import json
import math
import pathlib
import sys

import numpy as np
import torch

from atari import AtariEnv, ExperienceBuffer
from dynamics import DreamEnv, dream, policy_input, reward_class, sample
from train import (MAY_CHANGE, PRESETS, PROTOCOL, STAGES, TIMES, Config, Models, UserError, check,
                   clock, config_from, newest_checkpoint, open_loop, play_episodes, real_steps,
                   some_frames, write_atomically)
from vqvae import backgrounds, foreground_error

# Published: scores of a random policy and a human (Mnih et al., 2015, as the Atari 100K benchmark
# uses them), and the paper's Tables 4 and 5, final scores of five runs after 100K interactions:
# (mean, standard deviation, median, best). SimPLe is the variant "SD, gamma 0.99", PPO model-free;
# the paper quotes both, PPO without median and best.
PUBLISHED = {
    #                random    human     paper
    #                          SimPLe                               PPO 100K
    "BankHeist":    (14.2,     753.1,    (101.2, 17.4, 101.2, 121.6),
                               (8.2, 4.4, 8.9, 13.9),               (16.0, 12.4)),
    "Breakout":     (1.7,      30.5,     (8.8, 1.5, 8.4, 11.6),
                               (12.7, 3.8, 11.0, 19.5),             (5.9, 3.3)),
    "CrazyClimber": (10780.5,  35829.4,  (47536.9, 6114.9, 45256.2, 59609.4),
                               (39827.8, 22582.6, 41396.9, 67250.0), (18400.0, 5275.1)),
    "Freeway":      (0.0,      29.6,     (24.6, 3.4, 26.2, 29.0),
                               (20.3, 18.5, 33.5, 34.0),            (8.0, 9.8)),
    "Pong":         (-20.7,    14.6,     (11.8, 6.9, 8.2, 20.2),
                               (5.2, 9.7, 1.4, 21.0),               (-20.5, 0.6)),
    "Seaquest":     (68.4,     42054.7,  (458.1, 155.7, 472.5, 635.0),
                               (370.9, 128.2, 386.9, 497.2),        (370.0, 103.3)),
}
UNPUBLISHED = (None, None, (None,) * 4, (None,) * 4, (None,) * 2)       # any other game


def human_normalised(game, score):
    """(score - random) / (human - random): 0 plays like chance, 1 like a human.
    None for games not listed.
    """
    if game not in PUBLISHED:
        return None
    chance, human = PUBLISHED[game][:2]
    return (score - chance) / (human - chance)


class RandomPolicy:
    """Plays uniformly at random through the same function as a trained policy."""

    acting = contextlib.nullcontext             # there is nothing to cast

    def __init__(self, num_actions, seed):
        self.num_actions, self.rng = num_actions, np.random.default_rng(seed)

    def act(self, observations, temperature, state=None):
        return self.rng.integers(self.num_actions, size=len(observations)), None


def is_ppo(folder):
    """Is this the folder of a run of ppo.py, the model-free baseline?"""
    path = pathlib.Path(folder) / "config.json"
    return path.exists() and read_json(path).get("preset") == "ppo"


def result_only(folder):
    """Is there nothing to play with: a run of ppo.py, or one kept without its checkpoint?"""
    folder = pathlib.Path(folder)
    kept = (folder / "evaluation.json").exists() and not any(folder.glob("checkpoint*.pt"))
    return kept or is_ppo(folder)


def load_models(folder, device):
    """Run folder -> (models with the checkpoint's weights, its settings, interactions so far)."""
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no run folder {folder}")
    if is_ppo(folder):
        raise UserError(f"{folder} is a run of ppo.py, which keeps no weights to play with")
    state = newest_checkpoint(folder)
    config = config_from(state["config"])
    config.device = device
    check(config)
    models = Models(config, AtariEnv(config.game).num_actions)
    try:
        for name, network in models.networks().items():
            network.load_state_dict(state["networks"][name])
    except (KeyError, RuntimeError):
        raise UserError(f"the checkpoint in {folder} does not fit its own settings") from None
    return models, config, sum(shard["length"] for shard in state["shards"])


def describe(game, scores):
    """One line on our episodes, one on the published row of the game."""
    scores = np.array(scores)
    normalised = human_normalised(game, scores.mean())
    lines = [f"{game}: mean {scores.mean():.1f}  std {scores.std():.1f}  "
             f"median {np.median(scores):.1f}  best {scores.max():.1f}  over {len(scores)} episodes"
             + ("" if normalised is None else f"  human-normalised {figure(normalised, 3)}")]
    if game in PUBLISHED:
        chance, human, (mean, std, median, best), simple, ppo = PUBLISHED[game]
        lines.append(f"published: paper mean {mean} (std {std} over 5 runs), median {median}, best "
                     f"{best}; SimPLe {simple[0]}; PPO 100K {ppo[0]}; random {chance}; "
                     f"human {human}")
    else:
        lines.append(f"published: {game} is not in the paper")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# Judge: many runs, one table
# --------------------------------------------------------------------------------------------------


def read_json(path):
    """The object in a JSON file; UserError if it can't be read or is none."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged or cannot be read")
    return value


def read_numbers(path, fits):
    """A .csv of a run -> its rows as dicts of floats; empty fields are left out. [] if there is no
    such file; UserError if it is damaged or a row does not fit: fits(row) -> bool.
    """
    if not path.exists():
        return []
    try:
        with open(path, newline="") as file:
            rows = [{name: float(text) for name, text in row.items() if text}
                    for row in csv.DictReader(file)]
        if all(all(map(math.isfinite, row.values())) and fits(row) for row in rows):
            return rows
    except (OSError, ValueError, TypeError, AttributeError, csv.Error):
        pass
    raise UserError(f"{path} is damaged or cannot be read")


def read_run(folder):
    """Run folder -> dict of what it says about itself, without a look at its checkpoint:

    folder, game, preset, seed, interactions
    changed   {setting: value} where it differs from its preset: such a run has another row
    returns   the scores of the final policy's episodes; None for a run that stopped early
    rows      of metrics.csv, one dict a round
    rounds    how many there are to be, None if unknown
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no run folder {folder}")
    evaluation, settings = folder / "evaluation.json", folder / "config.json"
    if not evaluation.exists() and not settings.exists():
        raise UserError(f"{folder} is no run folder: no config.json and no evaluation.json in it")
    config = read_json(settings) if settings.exists() else {}
    result = read_json(evaluation) if evaluation.exists() else {}
    run = {name: result.get(name, config.get(name)) for name in ("game", "preset", "seed")}
    if any(config.get(name, value) != value for name, value in run.items()):
        raise UserError(f"{evaluation} belongs to another run than {settings}")
    returns = result.get("returns")
    whole = (isinstance(run["game"], str) and isinstance(run["preset"], str)
             and type(run["seed"]) is int)
    if result:
        whole &= (isinstance(returns, list) and len(returns) > 0
                  and all(type(r) in (int, float) and abs(r) < 1e12 for r in returns)
                  and type(result.get("interactions")) is int)
    if not whole:
        raise UserError(f"{evaluation if result else settings} is damaged or of another version")
    rows = read_numbers(folder / "metrics.csv", lambda row: (
        {"iteration", "interactions"} <= set(row)
        and ("real_return" in row) == ("real_episodes" in row)))
    interactions = int(rows[-1]["interactions"]) if rows else 0

    expected = dataclasses.asdict(Config(**PRESETS.get(run["preset"], {})))
    if run["preset"] == "ppo":                          # of ppo.py, which has other settings
        expected = config | {"interactions": 102_400}
    changed, default = {}, dataclasses.asdict(Config())   # a setting younger than the run: default
    for name in sorted(set(config) | set(expected)) if config else ():
        value, usual = config.get(name, default.get(name)), expected.get(name)
        usual = list(usual) if isinstance(usual, tuple) else usual
        if name not in ("game", "preset", "seed", "out", *MAY_CHANGE) and value != usual:
            changed[name] = value
    return run | {"folder": folder, "changed": changed,
                  "interactions": result.get("interactions", interactions),
                  "returns": returns, "rows": rows, "rounds": config.get("iterations", "?")}


def grouped(runs):
    """Runs -> list of groups that may be averaged: same game, preset and changed settings.

    A run that stopped early is a group of its own. Raises UserError if a seed is there twice: one
    run counted as two would make the spread too small.
    """
    groups, seen = {}, {}
    order = list(PRESETS)
    for run in runs:
        key = (run["game"], order.index(run["preset"]) if run["preset"] in order else len(order),
               run["preset"], len(run["changed"]), json.dumps(run["changed"]))
        twin = seen.setdefault((*key, run["seed"]), run)
        if twin is not run:
            raise UserError(f"{twin['folder']} and {run['folder']} are the same game, preset and "
                            f"seed; name one of them")
        stopped = -1 if run["finished"] else run["seed"]
        groups.setdefault((*key, stopped), []).append(run)
    return [sorted(groups[key], key=lambda run: run["seed"]) for key in sorted(groups)]


def summary(group):
    """One row of the table as a dict: statistics over the runs of a group, each run one score.

    std is the square root of the mean squared deviation; None with a single run, which has none.
    """
    first, stopped = group[0], not group[0]["finished"]
    scores = np.array([np.mean(run["returns"]) for run in group if not stopped])
    row = {"game": first["game"], "preset": first["preset"], "changed": first["changed"],
           "seeds": [run["seed"] for run in group], "finished": not stopped, "over": "seeds",
           "mean": None, "std": None, "median": None, "best": None,
           "episodes": sum(len(run["returns"] or ()) for run in group),
           "interactions": max(run["interactions"] for run in group), "human_normalised": None}
    if len(scores):
        row |= {"mean": float(scores.mean()), "median": float(np.median(scores)),
                "best": float(scores.max()),
                "human_normalised": human_normalised(first["game"], float(scores.mean()))}
    if len(scores) > 1:
        row["std"] = float(scores.std())
    return row


def interquartile_mean(scores):
    """Mean of the middle half along the last axis, a quarter (rounded down) cut at either end.

    For 1 2 3 4 9: (2 + 3 + 4) / 3 = 3. As in Agarwal et al. (2021): with a handful of runs the mean
    hangs on the best and the median on one score.
    """
    cut, n = scores.shape[-1] // 4, scores.shape[-1]
    return np.sort(scores, -1)[..., cut:n - cut].mean(-1)


def aggregates(scores):
    """Human-normalised scores, a list with an array [..., runs] for each game -> float [..., 3]:
    mean and median over games of the games' means, interquartile mean over all games x runs.
    """
    means = np.stack([s.mean(-1) for s in scores], -1)                       # [..., games]
    return np.stack([means.mean(-1), np.median(means, -1),
                     interquartile_mean(np.concatenate(scores, -1))], -1)


def bootstrap(scores, resamples=10_000, seed=0):
    """95 % interval of each of the aggregates, float [2, 3] (low, high).

    scores: a list with an array [runs] for each game. Stratified: runs are drawn with replacement
    within each game, so that no resample lacks one (Agarwal et al., 2021).
    """
    rng = np.random.default_rng(seed)
    drawn = [s[rng.integers(len(s), size=(resamples, len(s)))] for s in scores]     # [R, runs]
    return np.percentile(aggregates(drawn), [2.5, 97.5], axis=0)


def changes(run):
    """["setting=value", ..] where a run differs from its preset."""
    return [f"{name}={value}" for name, value in run["changed"].items()]


def footnote(notes, text):
    """The mark " [n]" of this text among the notes, to which it is added if it is new."""
    if text not in notes:
        notes.append(text)
    return f" [{notes.index(text) + 1}]"


def numbered(notes):
    """The notes as lines, each after the number that `footnote` gave it."""
    return [f"[{i}] {text}" for i, text in enumerate(notes, 1)]


def variant(run, notes, quote=""):
    """The preset of a run or a row, with the mark of a footnote that says what differs from it."""
    if not run["changed"]:
        return run["preset"]
    return run["preset"] + footnote(notes, f"{run['preset']} with " + ", ".join(
        f"{quote}{change}{quote}" for change in changes(run)))


def figure(value, digits=1):
    """A number for the tables, "-" for None; what rounds to zero has no sign."""
    return "-" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"


def with_std(mean, std):
    return figure(mean) + ("" if std is None else f" ({std:.1f})")


def table(groups):
    """Groups of runs -> the text of the table, of its footnotes and of the aggregates."""
    notes, body = [], []
    for group in groups:
        row, rows = summary(group), group[0]["rows"]
        preset = variant(row, notes)
        ours = [with_std(row["mean"], row["std"]), figure(row["median"]), figure(row["best"]),
                figure(row["human_normalised"], 3)]
        if not row["finished"]:
            played, scored = group[0]["returns"], [r for r in rows if "real_return" in r]
            last = (f"played now: {np.mean(played):.1f} over {len(played)} episodes" if played else
                    f"last evaluated after {scored[-1]['interactions']:,.0f} interactions: "
                    f"{scored[-1]['real_return']:.1f} over {scored[-1]['real_episodes']:.0f} "
                    f"episodes" if scored else "never evaluated")
            ours[0] = "stopped" + footnote(
                notes, f"{group[0]['folder']} stopped early or still runs: in round "
                f"{rows[-1]['iteration'] if rows else 1:.0f} of {group[0]['rounds']}; {last}")
        _, _, paper, simple, ppo = PUBLISHED.get(row["game"], UNPUBLISHED)
        body.append([row["game"], preset, ",".join(map(str, row["seeds"])),
                     str(row["episodes"] or "-"), f"{row['interactions']:,}", *ours,
                     with_std(*paper[:2]), *map(figure, paper[2:]),
                     with_std(*simple[:2]), *map(figure, simple[2:]), with_std(*ppo[:2])])

    header = ["game", "preset", "seeds", "episodes", "interactions", "mean (std)", "median", "best",
              "human", "mean (std)", "median", "best", "mean (std)", "median", "best", "mean (std)"]
    widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]

    def ruled(cells):
        padded = [cell.ljust(w) if i < 3 else cell.rjust(w)
                  for i, (cell, w) in enumerate(zip(cells, widths))]
        return " | ".join("  ".join(part) for part in (
            padded[:5], padded[5:9], padded[9:12], padded[12:15], padded[15:])).rstrip()

    def above(text, first, last):
        return text.ljust(sum(widths[first:last]) + 2 * (last - first - 1))

    titles = " | ".join((above("", 0, 5), above("ours", 5, 9), above("paper, published", 9, 12),
                         above("SimPLe, published", 12, 15), "PPO 100K, published"))
    lines = [titles, *map(ruled, [header, *body])]
    lines += numbered(notes)
    lines.append("Ours: each run is the mean of its episodes; mean, standard deviation, median and "
                 "best over runs.\nhuman: (mean - random) / (human - random). Published: Tables 4 "
                 "and 5 of the paper, five runs each.")

    # The aggregates, for each preset alone.
    finished = [g for g in groups if g[0]["finished"] and g[0]["game"] in PUBLISHED]
    for kind in dict.fromkeys(variant(g[0], notes) for g in finished):
        mine = [g for g in finished if variant(g[0], notes) == kind]
        games = [g[0]["game"] for g in mine]
        scores = [np.array([human_normalised(run["game"], np.mean(run["returns"])) for run in g])
                  for g in mine]
        low, high = bootstrap(scores)
        single = [game for game, s in zip(games, scores) if len(s) == 1]
        lines.append(f"human-normalised, {kind}, {len(games)} "
                     f"game{'s' if len(games) > 1 else ''}: " + ", ".join(
            f"{name} {value:.3f}" + ("" if single else f" [{a:.3f}, {b:.3f}]")
            for name, value, a, b in zip(("mean", "median", "interquartile mean"),
                                         aggregates(scores), low, high))
            + (f"; no interval: one run only of {', '.join(single)}" if single
               else "; 95 % stratified bootstrap"))
        published = {name: [human_normalised(game, PUBLISHED[game][column][0]) for game in games]
                     for name, column in (("paper", 2), ("SimPLe", 3), ("PPO 100K", 4))}
        lines.append("    the same games, published means: " + "; ".join(
            f"{name} mean {np.mean(s):.3f}, median {np.median(s):.3f}"
            for name, s in published.items()))
    return "\n".join(lines)


def costs(run):
    """Where the time of a run went, from its times.csv: ("h:mm:ss", {stage: share}, peak memory in
    MB); None for a run without one.
    """
    rows = read_numbers(run["folder"] / "times.csv", lambda row: set(TIMES) == set(row))
    seconds = {stage: sum(row[stage] for row in rows) for stage in STAGES}
    whole = sum(seconds.values())
    if not whole:
        return None
    return (clock(whole), {stage.replace("_", " "): part / whole for stage, part in
                           seconds.items()}, max(row["peak_mb"] for row in rows))


def cost_lines(runs):
    """The costs of all runs that tell them, a line each."""
    return "\n".join(
        f"{run['folder'].name}: {cost[0]} (h:mm:ss), of it "
        + ", ".join(f"{stage} {share:.0%}" for stage, share in cost[1].items())
        + f"; memory at most {cost[2]:,.0f} MB" for run in runs if (cost := costs(run)))


def random_scores(folder):
    """{game: its row} of the random policy, from the folder's random.json; {} without one."""
    path = folder / "random.json"
    try:
        rows = json.loads(path.read_text()) if path.exists() else []
        return {row["game"]: row for row in rows if math.isfinite(row["mean"] + row["std"])}
    except (OSError, ValueError, TypeError, KeyError):
        raise UserError(f"{path} is damaged or cannot be read") from None


def markdown(groups):
    """Groups of runs -> the two tables of the README: scores beside the published ones, costs. The
    random policy's scores come from random.json beside the runs, where there is one.
    """
    chance, notes = random_scores(groups[0][0]["folder"].parent), []
    lines = ["| game | preset | each run, ours (standard error) | mean, ours (std) | "
             "human-normalised | random, ours | random, published | paper, published | "
             "SimPLe, published | PPO 100K, published |", "|" + "---|" * 10]

    for group in groups:
        row, runs, mean = summary(group), "stopped early", "-"
        if row["finished"]:
            runs = ", ".join(with_std(np.mean(run["returns"]),
                                      np.std(run["returns"]) / len(run["returns"])**0.5)
                             for run in group)
            mean = f"**{row['mean']:.1f}**" + ("" if row["std"] is None else f" ({row['std']:.1f})")
        random, _, paper, simple, ppo = PUBLISHED.get(row["game"], UNPUBLISHED)
        mine = chance.get(row["game"], {})
        lines.append("| " + " | ".join((
            row["game"], variant(row, notes, "`"), runs, mean,
            figure(row["human_normalised"], 3), with_std(mine.get("mean"), mine.get("std")),
            figure(random), *(with_std(*column[:2]) for column in (paper, simple, ppo)))) + " |")
    lines += [""] + [f"{note}  " for note in numbered(notes)] + [""] * bool(notes)

    stages = [stage.replace("_", " ") for stage in STAGES]
    lines += ["| run | h:mm:ss | " + " | ".join(stages) + " | peak memory, MB |", "|---" * 8 + "|"]
    for run in (run for group in groups for run in group):
        if cost := costs(run):
            lines.append(f"| {run['folder'].name} | {cost[0]} | " + " | ".join(
                f"{share:.0%}" for share in cost[1].values()) + f" | {cost[2]:,.0f} |")
    return "\n".join(lines)


def curves(group):
    """Scores of a group's runs over time -> (interactions int [P], scores float [runs, P]).

    P: the rounds after which every run of the group was evaluated. Of a run of ppo.py: where
    episodes of its training ended; it is evaluated only at the end.
    """
    name = "collect_return" if group[0]["preset"] == "ppo" else "real_return"
    runs = [{int(row["interactions"]): row[name] for row in run["rows"] if name in row}
            for run in group]
    points = sorted(set.intersection(*map(set, runs)))
    return np.array(points, int), np.array([[run[x] for x in points] for run in runs])


# Line styles and hatches of curves.
LOOKS = (("-", "//"), ("--", "\\\\"), ("-.", ".."), (":", "xx"), ((0, (8, 2, 1, 2, 1, 2)), "oo"),
         ((0, (3, 1, 1, 1)), "||"))


def plot(groups, path):
    """Figure 4: score against real interactions, one panel per game. With runs of ppo.py also
    Figure 5: model-free PPO beside it.

    Mean over seeds with its standard deviation, the best seed (by its final score), and the
    published final means as horizontal lines. A run that stopped early is a line of its own.
    Line styles, hatches and markers tell everything apart without colour; what differs from a
    preset stands below, with the numbers that --markdown's table gives it.
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    games = list(dict.fromkeys(group[0]["game"] for group in groups))
    columns = min(len(games), 3)
    lines = -(-len(games) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(5.2 * columns, 4.8 * lines), squeeze=False)
    notes = []
    variants = [variant(group[0], notes) for group in groups]
    # The same settings look alike in all panels; from the seventh on it takes colour to tell.
    looks = {}
    for i, name in enumerate(dict.fromkeys(v for v in variants if not v.startswith("ppo"))):
        turn, place = divmod(i, len(LOOKS))
        looks[name] = (f"C{'012456'[(place + turn) % 6]}", *LOOKS[place])
    for ax in axes.flat[len(games):]:
        ax.axis("off")
    for ax, game in zip(axes.flat, games):
        for group, name in zip(groups, variants):
            if group[0]["game"] != game:
                continue
            x, scores = curves(group)
            is_free = group[0]["preset"] == "ppo"
            color, line, hatch = ("C3", (0, (1, 1)), "++") if is_free else looks[name]
            name = (f"model-free PPO{name.removeprefix('ppo')} in training" if is_free
                    else f"preset {name}")
            if not group[0]["finished"]:
                ax.plot(x, scores.T, ":", color="0.5", marker="x", markersize=4,
                        label=f"{name}, seed {group[0]['seed']}, stopped early")
                continue
            mean, std, n = scores.mean(0), scores.std(0), len(group)
            ax.plot(x, mean, linestyle=line, color=color, linewidth=2.5,
                    label=f"{name}, mean of {n} seeds" if n > 1 else f"{name}, one seed")
            if n > 1:
                ax.fill_between(x, mean - std, mean + std, facecolor="none", edgecolor=color,
                                hatch=hatch, alpha=0.4, linewidth=0.5, label="+- std over seeds")
                best = max(range(n), key=lambda i: np.mean(group[i]["returns"]))
                ax.plot(x, scores[best], linestyle=line, color=color, linewidth=1, marker="o",
                        markersize=4, label=f"best seed ({group[best]['seed']})")
        if game in PUBLISHED:
            _, _, paper, simple, free = PUBLISHED[game]
            ax.axhline(paper[0], color="k", linestyle=(0, (7, 2)), linewidth=1.2,
                       label=f"paper, published final mean {paper[0]:g}")
            ax.axhline(simple[0], color="k", linestyle=(0, (1, 2)), linewidth=1.6,
                       label=f"SimPLe, published final mean {simple[0]:g}")
            ax.axhline(free[0], color="k", linestyle=(0, (5, 2, 1, 2)), linewidth=0.8,
                       label=f"PPO 100K, published final mean {free[0]:g}")
        ax.set_title(game)
        ax.set_xlabel("real interactions (x4 = frames)")
        ax.set_ylabel("score of an episode")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    figure.supxlabel("\n".join(numbered(notes)), x=0.01, ha="left", fontsize=8)
    figure.tight_layout()
    data = io.BytesIO()
    figure.savefig(data, format=pathlib.Path(path).suffix[1:], dpi=100)
    plt.close(figure)
    write_file(path, data.getbuffer())


def check_name(path, *endings):
    """Before hours of work: can a picture be written there, under a name with one of the endings?
    """
    path = pathlib.Path(path)
    if path.suffix.lower() not in endings:
        raise UserError(f"{path} must end in {' or '.join(endings)}")
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {path.parent} for {path.name}")


def write_file(path, data):
    """Bytes -> file, whole or not at all; says so on standard error (stdout may be JSON)."""
    try:
        write_atomically(pathlib.Path(path), data)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    print(f"saved {path}", file=sys.stderr)


def play(models, game, episodes, parallel, seed, temperature):
    """Whole real episodes, `parallel` of them side by side -> list of scores."""
    torch.manual_seed(seed)
    scores = []
    while len(scores) < episodes:
        first, n = seed * 10_000 + len(scores), min(parallel, episodes - len(scores))
        scores += play_episodes(models, game, range(first, first + n), temperature)
    return scores


# --------------------------------------------------------------------------------------------------
# Dream fidelity: where does the dream leave the road?
# --------------------------------------------------------------------------------------------------

CONTEXT = 4                                     # observations seen, as in training (released code)
HORIZONS = (1, 2, 5, 10, 25, 50)                # steps dreamed after them


def record(models, game, seeds, temperature, most):
    """Plays one real episode for each seed, side by side, at most `most` steps of each
    -> ExperienceBuffer with one episode after the other. Nothing learns from it.
    """
    episodes = [[] for _ in seeds]
    with models.acting():
        for step, rows in zip(range(most), real_steps(models, game, seeds, temperature)):
            for i, *row, truncated in rows:
                episodes[i].append((*row, truncated or step == most - 1))
    buffer = ExperienceBuffer(sum(map(len, episodes)))
    for episode in episodes:
        buffer.add(*map(np.array, zip(*episode)))
    return buffer


def moments(models, game, seed):
    """The first 500 moments, or fewer, of one real episode, to begin dreams at: codes int64
    [N, 6, 6] and what the dynamics remembers there (Models.starts).
    """
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
    """Codes int64 [N, 6, 6] -> the newest frame of each decoded observation,
    float32 [N, 96, 96] in [0, 1], on the host.
    """
    with models.autocast():
        return torch.cat([models.vqvae.decode(z)[:, -1].float().cpu() for z in codes.split(batch)])


def stretches(buffer, length, most, purpose):
    """Rows of up to `most` stretches of so many steps, evenly spread, each inside one episode:
    int64 [n, length]. UserError, ending in `purpose`, if no episode is long enough.
    """
    starts = np.flatnonzero(buffer.start[:max(0, len(buffer) - length + 1)]
                            == buffer.start[length - 1:len(buffer)])
    if not len(starts):
        raise UserError(f"no episode lasted the {length} steps {purpose}")
    return starts[::-(-len(starts) // most), None] + np.arange(length)


def fidelity(models, buffer, temperature=1.0, most=256):
    """Open loop from up to `most` moments of real episodes -> (number of them, list of dicts,
    one for each of HORIZONS):

    step               k, steps dreamed after the last of 4 observations
    code_accuracy      share of the 36 codes that are the real observation's own, in step k;
                       _still: if nothing moved since the last observation
    pixel_error        root mean square, in grey levels of 0 .. 255, of decoded minus real frame;
                       _still: the last observation's codes decoded; _codes: the true codes decoded,
                       what a perfect dynamics would get
    foreground_error   the same three on what moves (vqvae.py): 0 perfect, 1 background only
    reward_precision   share of the dream's non-zero rewards in steps 1 .. k that the game paid too,
                       in the same step with the same sign; None where there were none
    reward_recall      share of the game's non-zero rewards that the dream paid, likewise
    rewards_real, rewards_dreamed   how many there were

    Raises UserError if no episode is long enough.
    """
    length, frames = CONTEXT + HORIZONS[-1], torch.from_numpy(buffer.frames[:len(buffer)])
    rows = stretches(buffer, length, most, "that --fidelity needs")                  # [n, L]
    real = models.encode_all(buffer)[models.to_device(rows)].long()                # [n, L, 6, 6]
    actions = models.to_device(buffer.actions[rows].astype(np.int64))
    parts = [open_loop(models, z, a, CONTEXT, temperature)
             for z, a in zip(real.split(128), actions.split(128))]
    dreamed, paid = (torch.cat(part) for part in zip(*parts))
    paid = paid.cpu().long()                                                         # [n, L - 1]
    true_paid = reward_class(torch.from_numpy(buffer.rewards[rows[:, :-1]])) - 1

    pictures = backgrounds(some_frames(models, buffer)).cpu()
    table, still = [], real[:, CONTEXT - 1]
    still_frames = decoded(models, still)
    for k in HORIZONS:
        t = CONTEXT - 1 + k
        row = {"step": k, "code_accuracy": float((dreamed[:, t] == real[:, t]).float().mean()),
               "code_accuracy_still": float((still == real[:, t]).float().mean())}
        truth = frames[rows[:, t]].float() / 255                                     # [n, 96, 96]
        shown = {"": decoded(models, dreamed[:, t]), "_still": still_frames,
                 "_codes": decoded(models, real[:, t])}
        for name, image in shown.items():
            row["pixel_error" + name] = 255 * float((image - truth).square().mean().sqrt())
        for name, image in shown.items():
            row["foreground_error" + name] = float(foreground_error(truth[:, None], image[:, None],
                                                                    pictures=pictures))
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
    episodes = args.episodes or 4
    # Up to 2,000 steps of each: more would only cost memory.
    buffer = record(models, config.game, [args.seed * 10_000 + i for i in range(episodes)], 1.0,
                    most=2000)
    moments, rows = fidelity(models, buffer, temperature)
    if args.json:
        print(json.dumps(rows))
        return
    print(f"{args.runs[0]}, preset {config.preset}, seed {config.seed}, after {interactions:,} "
          f"real interactions\n{moments} moments of {episodes} fresh episodes ({len(buffer):,} "
          f"steps): {CONTEXT} observations seen, then open loop under the real actions, codes "
          f"drawn at temperature {temperature:g}\n"
          "still: nothing moves after the last observation seen; codes: the true codes decoded\n")
    print("      | codes right   | pixel error, grey levels | foreground error      "
          "| rewards in steps 1 .. step")
    print(" step | dream   still |  dream    still    codes | dream   still   codes "
          "| precision  recall  real  dreamed")
    for r in rows:
        pixel = "   ".join(f"{r['pixel_error' + part]:6.2f}" for part in ("", "_still", "_codes"))
        moving = "   ".join(f"{r['foreground_error' + part]:5.3f}"
                            for part in ("", "_still", "_codes"))
        precision, recall = ("-" if r[name] is None else f"{r[name]:.3f}"
                             for name in ("reward_precision", "reward_recall"))
        print(f"{r['step']:5d} | {r['code_accuracy']:.3f}   {r['code_accuracy_still']:.3f} | "
              f"{pixel} | {moving} | {precision:>9s}  {recall:>6s}  {r['rewards_real']:4d}  "
              f"{r['rewards_dreamed']:7d}")


TEMPERATURES = (0.1, 0.5, 1.0, 1.15, 1.3)       # those of Ha & Schmidhuber, Table 2


def virtual_scores(models, buffer, steps, most=256):
    """From up to `most` moments of real episodes of this policy (at least `steps` steps before
    their ends): what it is paid in the next `steps` steps -> dict of float [n], rewards clipped:

    "real"       in the game, in just these episodes
    temperature  in a dream from there, codes drawn at that temperature, one of TEMPERATURES
    """
    rows = stretches(buffer, steps, most, "of a dream")                              # [n, steps]
    paid = reward_class(torch.from_numpy(buffer.rewards[rows])) - 1
    (codes, state), scores = models.starts(buffer, rows[:, 0]), {"real": paid.sum(1)}
    for temperature in TEMPERATURES:
        with models.autocast():
            rollout = dream(models.dynamics, models.embed, models.policy, codes, steps,
                            temperature, memory=models.config.policy_memory, start_state=state)
        # After the first end, if the model predicts ends, it is another dream.
        before = rollout["dones"].long().cumsum(0) - rollout["dones"].long() == 0
        scores[temperature] = (rollout["rewards"] * before).sum(0).cpu()
    return {name: score.double().numpy() for name, score in scores.items()}


def show_sweep(args):
    """--sweep-temperature: virtual against actual score of each run's policy, in one table.
    Runs of ppo.py have no dreams: they are left out.
    """
    folders, result = [folder for folder in args.runs if not is_ppo(folder)], []
    if not folders:
        raise UserError("none of these runs has a world model to dream in")
    for folder in folders:
        models, config, interactions = load_models(folder, args.device)
        torch.manual_seed(args.seed)
        episodes = args.episodes or 8
        buffer = record(models, config.game, [args.seed * 10_000 + i for i in range(episodes)], 1.0,
                        most=27_000)
        steps = args.steps or config.dream_steps
        scores = virtual_scores(models, buffer, steps)
        returns = np.add.reduceat(buffer.rewards, np.unique(buffer.start)).tolist()
        result.append({
            "run": str(folder), "game": config.game, "preset": config.preset, "seed": config.seed,
            "trained_at": config.temperature, "steps": steps, "moments": len(scores["real"]),
            "actual_score": float(np.mean(returns)), "actual_std": float(np.std(returns)),
            "episodes": episodes} | {
            f"virtual_{name}" if name != "real" else "actual_steps": float(score.mean())
            for name, score in scores.items()} | {
            f"virtual_{name}_std" if name != "real" else "actual_steps_std": float(score.std())
            for name, score in scores.items()})
    if args.json:
        print(json.dumps(result))
        return
    print("actual: mean score of whole episodes (std). Then sums of clipped rewards over so many "
          "steps from the same moments of these episodes, mean (std):\nin the game, and in dreams "
          "with codes drawn at each temperature (Ha & Schmidhuber, Table 2).\n")
    width = max(len(r["run"]) for r in result)
    print(f"{'run':{width}s}  trained at         actual  episodes  steps  moments |        in game "
          "| " + " ".join(f"{f'at {t:g}':>14s}" for t in TEMPERATURES))
    for r in result:
        def cell(name):
            return f"{r[name]:.2f} ({r[name + '_std']:.2f})"
        actual = f"{r['actual_score']:.1f} ({r['actual_std']:.1f})"
        print(f"{r['run']:{width}s}  {r['trained_at']:10g}  {actual:>13s}  {r['episodes']:8d}  "
              f"{r['steps']:5d}  {r['moments']:7d} | {cell('actual_steps'):>14s} | "
              + " ".join(f"{cell(f'virtual_{t}'):>14s}" for t in TEMPERATURES))


# --------------------------------------------------------------------------------------------------
# See: the dream beside the real game, the policy beside what it sees
# --------------------------------------------------------------------------------------------------


SIDE = 192                                      # pixels of a panel: each of the game's twice


def panel(image):
    """One square of a picture, as a PIL image of SIDE x SIDE pixels.

    image  float [96, 96] in [0, 1]: a frame; or int [6, 6]: codes, as colours with their numbers
    """
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont
    if image.dtype.kind == "f":
        pixels = np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)
        return Image.fromarray(pixels).convert("RGB").resize((SIDE, SIDE), Image.Resampling.NEAREST)
    colours = matplotlib.colormaps["nipy_spectral"](image / 127)[..., :3]            # [6, 6, 3]
    picture = Image.fromarray(np.rint(255 * colours).astype(np.uint8))
    picture = picture.resize((SIDE, SIDE), Image.Resampling.NEAREST)
    draw, cell = ImageDraw.Draw(picture), SIDE / len(image)
    font = ImageFont.load_default(cell / 3)
    for (i, j), code in np.ndenumerate(image):
        bright = colours[i, j] @ (0.3, 0.6, 0.1) > 0.5
        draw.text((cell * (j + 0.5), cell * (i + 0.5)), str(code), anchor="mm", font=font,
                  fill="black" if bright else "white")
    return picture


def picture(panels, caption, upright=False):
    """Panels [(title, image), ...] side by side (upright: one over the other) and a caption below
    -> PIL image. Sizes are even and the same for every step.
    """
    from PIL import Image, ImageDraw, ImageFont
    bar, gap, n = 20, 6, len(panels)
    across, down = (1, n) if upright else (n, 1)
    page = Image.new("RGB", (across * (SIDE + gap) + gap, down * (SIDE + bar) + bar + gap), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    for i, (title, image) in enumerate(panels):
        x = gap + (0 if upright else i * (SIDE + gap))
        y = i * (SIDE + bar) if upright else 0
        draw.text((x, y + bar - 4), title, anchor="ls", font=font, fill="black")
        page.paste(panel(image), (x, y + bar))
    draw.text((gap, page.height - 7), caption, anchor="ls", font=font, fill="black")
    return page


def save_pictures(path, steps):
    """Steps [(panels, caption), ...] -> an animation, .gif, 10 steps a second (the game: 15),
    or a strip of up to 8 of the steps, .png, from left to right.
    """
    from PIL import Image
    data = io.BytesIO()
    shown = np.unique(np.linspace(0, len(steps) - 1, 8).round().astype(int))
    if pathlib.Path(path).suffix.lower() == ".gif":
        pages = [picture(panels, caption) for panels, caption in steps]
        # One palette for all, taken from some: without, each page has its own, the colours flicker
        # and the file is twice as large.
        some = np.hstack([np.asarray(pages[i]) for i in shown])
        palette = Image.fromarray(some).quantize(96)
        pages = [page.quantize(palette=palette, dither=Image.Dither.NONE) for page in pages]
        pages[0].save(data, "GIF", save_all=True, append_images=pages[1:], duration=100, loop=0)
    else:
        pages = [picture(*steps[i], upright=True) for i in shown]
        strip = Image.new("RGB", (sum(page.width for page in pages), pages[0].height), "white")
        for i, page in enumerate(pages):
            strip.paste(page, (i * page.width, 0))
        strip.save(data, "PNG")
    write_file(path, data.getbuffer())


def dream_pictures(models, buffer, names, steps, temperature, rng):
    """A stretch of the recorded episode in the real game and as the dream goes on from its first 4
    observations under the same actions -> steps for save_pictures, from the last one seen on.

    names: of the actions. rng: numpy Generator, chooses where the stretch begins.
    """
    steps = min(steps, len(buffer) - CONTEXT)
    if steps < 1:
        raise UserError("the episode was over before a dream could begin; try another --seed")
    start = int(rng.integers(len(buffer) - CONTEXT - steps + 1))
    rows = np.arange(start, start + CONTEXT + steps)
    actions = models.to_device(buffer.actions[rows].astype(np.int64))
    real = models.encode_all(buffer)[models.to_device(rows)].long()
    dreamed, rewards = open_loop(models, real[None], actions[None], CONTEXT, temperature)
    images, maps = decoded(models, dreamed[0]).numpy(), dreamed[0].cpu().numpy()
    # The reward r_{t-1} comes with o_t; it is written over the picture of o_t.
    result, sums = [], np.zeros(2)
    for t in range(CONTEXT - 1, len(rows)):
        came = np.zeros(2)
        if t >= CONTEXT:
            came[:] = buffer.rewards[rows[t - 1]], float(rewards[0, t - 1])
        sums += came
        titles = [f"{name}: reward {r:g}, sum {total:g}" if t >= CONTEXT else f"{name}: start"
                  for name, r, total in zip(("real", "dream"), came, sums)]
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
    path = args.dream or args.video
    check_name(path, ".gif", ".png")
    models, config, _ = load_models(args.runs[0], args.device)
    names = AtariEnv(config.game).action_meanings
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    if args.dream:
        steps = args.steps or 50
        # The dream begins at a random moment of the first 300 steps or so.
        buffer = record(models, config.game, [args.seed], 1.0, CONTEXT + steps + 300)
        save_pictures(path, dream_pictures(models, buffer, names, steps,
                                           args.temperature or config.temperature, rng))
    else:
        buffer = record(models, config.game, [args.seed], args.temperature, args.steps or 200)
        save_pictures(path, video_pictures(models, buffer, names))


# --------------------------------------------------------------------------------------------------
# Play: a person inside the dream
# --------------------------------------------------------------------------------------------------


def action_of(held, names):
    """Keys held down -> number of the game's action. names: as AtariEnv.action_meanings.

    up + right + f -> UPRIGHTFIRE; what the game does not have is left out, fire first. A game that
    knows no UP takes up for RIGHT and down for LEFT: that is how Pong's paddle moves.
    """
    if not any(name.startswith("UP") for name in names):
        held = {{"up": "right", "down": "left"}.get(key, key) for key in held}
    vertical = "UP" if "up" in held else "DOWN" if "down" in held else ""
    across = "RIGHT" if "right" in held else "LEFT" if "left" in held else ""
    fire = "FIRE" if held & {"f", "enter"} else ""
    for name in (vertical + across + fire, vertical + across, across + fire, vertical + fire,
                 across, vertical, fire):
        if name in names:
            return names.index(name)
    return 0                                            # NOOP


class Player:
    """The window of --play: keys, pictures and a DreamEnv in between.

    figure: of matplotlib; its key events are listened to. `tick` is one step of the dream.
    """

    HELP = ("arrows: move   f or enter: fire   space: policy / you   r: another start   "
            "t / g: temperature up / down")

    def __init__(self, models, starts, names, figure, temperature=1.0, seed=0):
        self.models, self.names, self.figure = models, names, figure
        codes, state = starts
        self.env = DreamEnv(models.dynamics, models, codes, 1, steps=10**9,
                            temperature=temperature, start_state=state)
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
        figure.canvas.mpl_connect("key_press_event", self.press)
        figure.canvas.mpl_connect("key_release_event", lambda event: self.held.discard(key(event)))
        self.restart(seed)

    def restart(self, seed=None):
        """Another real moment, score and step 0. A seed decides all that follows."""
        self.observation, _ = self.env.reset(seed=seed)
        self.score, self.step, self.action = 0.0, 0, 0
        self.show()

    def press(self, event):
        pressed = key(event)
        if pressed == "r":
            self.restart()
        elif pressed in ("t", "g"):
            factor = 1.1 if pressed == "t" else 1 / 1.1
            self.env.temperature = min(max(self.env.temperature * factor, 0.05), 20)
        elif pressed == " ":
            self.by_policy = not self.by_policy
        else:
            self.held.add(pressed)
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
        self.score += float(reward[0])
        self.step += 1
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


def key(event):
    """The key of a matplotlib event, without shift and its like, in lower case."""
    name = event.key or ""
    return name.lower().split("+")[-1]


def show_play(args):
    """--play: opens the window; 15 steps a second, the pace of the game."""
    import matplotlib
    try:
        import matplotlib.pyplot as plt
        figure = plt.figure(figsize=(9, 5.2), num="the dream")
    except Exception:                                   # each toolkit has an error of its own
        figure = None
    if figure is None or figure.canvas.required_interactive_framework is None:
        raise UserError("--play needs a window: there is no display here, or none that matplotlib "
                        "knows how to use (it needs e.g. tkinter)")
    for name in [name for name in matplotlib.rcParams if name.startswith("keymap.")]:
        matplotlib.rcParams[name] = []                  # f would mean full screen, r home, ..
    models, config, _ = load_models(args.runs[0], args.device)
    print("playing a real episode: dreams begin at its moments", flush=True)
    player = Player(models, moments(models, config.game, args.seed),
                    AtariEnv(config.game).action_meanings, figure,
                    args.temperature or config.temperature, args.seed)
    timer = figure.canvas.new_timer(interval=1000 // 15)
    timer.add_callback(player.tick)
    timer.start()
    plt.show()


def judge_one(args):
    """Plays episodes with one run's newest checkpoint, or at random, and prints the scores."""
    if args.random:
        game = args.game or load_models(args.runs[0], args.device)[1].game
        models, interactions, what = (RandomPolicy(AtariEnv(game).num_actions, args.seed), 0,
                                      "random policy")
        preset = seeds = None
    else:
        models, config, interactions = load_models(args.runs[0], args.device)
        game, what = config.game, f"{args.runs[0]}, preset {config.preset}, seed {config.seed}"
        preset, seeds = config.preset, [config.seed]
    scores = play(models, game, args.episodes or 32, args.parallel, args.seed, args.temperature)
    if args.json:
        mean = float(np.mean(scores))
        print(json.dumps([{
            "game": game, "preset": preset, "seeds": seeds, "policy": what, "over": "episodes",
            "mean": mean, "std": float(np.std(scores)), "median": float(np.median(scores)),
            "best": float(np.max(scores)), "episodes": len(scores), "interactions": interactions,
            "human_normalised": human_normalised(game, mean), "returns": scores}]))
        return
    print(f"{what}, after {interactions:,} real interactions")
    print(f"protocol: {PROTOCOL}; temperature {args.temperature:g}")
    print(describe(game, scores))


def judge_many(args):
    """One table of many runs: from their stored final evaluations, or with --episodes played anew.
    A run without evaluation.json has stopped early: it is shown, and enters no mean.
    """
    runs = [read_run(folder) for folder in args.runs]
    for run in runs:
        run["finished"] = run["returns"] is not None
    groups = grouped(runs)                              # refuses duplicates before hours of play
    if args.episodes:
        for run in runs:
            models, _, run["interactions"] = load_models(run["folder"], args.device)
            run["returns"] = play(models, run["game"], args.episodes, args.parallel, args.seed,
                                  args.temperature)
    if args.plot and not any(curves(group)[0].size for group in groups):
        raise UserError("there is nothing to plot: none of these runs was evaluated yet")
    if args.json:
        print(json.dumps([summary(group) for group in groups]))
    elif args.markdown:
        print(markdown(groups))
    else:
        print("\n\n".join(filter(None, (table(groups), cost_lines(runs)))))
    if args.plot:
        plot(groups, args.plot)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folders, e.g. runs/Freeway-"
                        "small-s0; of one the policy plays, of several the results are compared; "
                        "files beside them (results/*) are passed over")
    parser.add_argument("--plot", metavar="curves.png",
                        help="draw the learning curves of the runs, a panel for each game")
    parser.add_argument("--fidelity", action="store_true", help="open loop along fresh real "
                        "episodes (--episodes, default 4): how long is the dream right?")
    parser.add_argument("--dream", metavar="dream.gif", help="draw a dream beside the real game "
                        "under the same actions (.gif, or .png: a strip)")
    parser.add_argument("--video", metavar="play.gif", help="draw the policy in the real game and "
                        "what the world model sees (.gif, or .png: a strip)")
    parser.add_argument("--sweep-temperature", action="store_true", help="the policy's score in "
                        "dreams of several temperatures beside its score in the game (--episodes, "
                        "default 8)")
    parser.add_argument("--play", action="store_true", help="play inside the dream, in a window. "
                        + Player.HELP)
    parser.add_argument("--steps", type=int, help="of --dream (default 50), --video (200) or of "
                        "the dreams of --sweep-temperature (as in training)")
    parser.add_argument("--random", action="store_true",
                        help="judge the uniformly random policy instead")
    parser.add_argument("--game", help="the game for --random (default: the run's)")
    parser.add_argument("--episodes", type=int, help="how many to play (default: 32; for several "
                        "runs: none, their stored evaluations are read)")
    parser.add_argument("--parallel", type=int, default=8, help="games played at once")
    parser.add_argument("--temperature", type=float, help="of the policy's softmax (default: 1); "
                        "with --fidelity, --dream and --play of the dreamed codes (default: the "
                        "run's own)")
    parser.add_argument("--seed", type=int, default=1000,
                        help="of the episodes and the sampled actions")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true",
                      help="print a list of JSON objects instead of text")
    form.add_argument("--markdown", action="store_true", help="print stored evaluations as two "
                      "tables in Markdown, scores and costs: the README's")
    args = parser.parse_args(arguments)
    # Files that lie beside the runs, as in results/*, are none.
    args.runs = [run for run in args.runs if not pathlib.Path(run).is_file()]
    try:
        if args.episodes is not None and args.episodes < 1 or args.parallel < 1 or (
                args.temperature is not None and not 0 < args.temperature < math.inf):
            raise UserError("--episodes, --parallel and --temperature must be more than 0")
        if not 0 <= args.seed < 2**31:
            raise UserError("--seed must lie in 0 .. 2**31 - 1")
        if not args.runs and not (args.random and args.game):
            raise UserError("name a run folder, or --random with --game")
        if args.random and len(args.runs) > 1:
            raise UserError("--random judges one policy: name at most one run")
        if args.plot:
            if args.random or not args.runs:
                raise UserError("--plot draws the curves of runs: name one or more")
            check_name(args.plot, ".png", ".pdf", ".svg")
        looks = [name for name in ("fidelity", "dream", "video", "play") if getattr(args, name)]
        if looks and (len(args.runs) != 1 or args.random or args.plot or len(looks) > 1):
            raise UserError(f"--{looks[0]} looks into one run: name one run folder, and neither "
                            f"--random nor --plot nor a second look")
        if args.sweep_temperature and (not args.runs or args.random or args.plot or looks):
            raise UserError("--sweep-temperature takes one run folder or more, and neither "
                            "--random nor --plot nor another look")
        if args.markdown and (not args.runs or args.random or args.sweep_temperature or looks):
            raise UserError("--markdown prints tables of runs: name one or more, and no look")
        if args.steps is not None and not 1 <= args.steps <= 2000:
            raise UserError("--steps must lie in 1 .. 2000")
        if not (args.fidelity or args.dream or args.play):      # which have the run's own instead
            args.temperature = args.temperature or 1.0
        if args.fidelity:
            show_fidelity(args)
        elif args.sweep_temperature:
            show_sweep(args)
        elif args.play:
            show_play(args)
        elif looks:
            show_pictures(args)
        elif (len(args.runs) > 1 or args.plot or args.markdown
              or not args.random and result_only(args.runs[0])):
            judge_many(args)
        else:
            judge_one(args)
    except (UserError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
