"""How good is a run? Whole real episodes with its checkpoint, beside the numbers of the paper.

    python evaluate.py runs/Freeway-small-s0             # 32 episodes with the newest checkpoint
    python evaluate.py --random --game Freeway           # the random policy, by the same protocol

Protocol, as the paper's (Section 4, and the authors' released code): 32 whole episodes of the final
policy, actions sampled from its softmax at temperature 1, up to 30 no-ops at reset, no sticky
actions, the end of a life does not end an episode, the score is the game's own, unclipped, at most
108,000 frames.
"""
import argparse
import json
import pathlib
import sys

import numpy as np
import torch

from atari import AtariEnv
from train import PROTOCOL, Models, UserError, check, config_from, newest_checkpoint, play_episodes

# Published: scores of a random policy and a human (Mnih et al., 2015, as the Atari 100K benchmark
# uses them), and the paper's Tables 4 and 5 after 100K interactions: mean (standard deviation) of
# five runs, median, best; SimPLe (SD, gamma 0.99) and model-free PPO as the paper quotes them.
PUBLISHED = {
    #                random    human     paper              median   best     SimPLe   PPO 100K
    "BankHeist":    (14.2,     753.1,    (101.2, 17.4),     101.2,   121.6,   8.2,     16.0),
    "Breakout":     (1.7,      30.5,     (8.8, 1.5),        8.4,     11.6,    12.7,    5.9),
    "CrazyClimber": (10780.5,  35829.4,  (47536.9, 6114.9), 45256.2, 59609.4, 39827.8, 18400.0),
    "Freeway":      (0.0,      29.6,     (24.6, 3.4),       26.2,    29.0,    20.3,    8.0),
    "Pong":         (-20.7,    14.6,     (11.8, 6.9),       8.2,     20.2,    5.2,     -20.5),
    "Seaquest":     (68.4,     42054.7,  (458.1, 155.7),    472.5,   635.0,   370.9,   370.0),
}


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

    def __init__(self, num_actions, seed):
        self.num_actions, self.rng = num_actions, np.random.default_rng(seed)

    def act(self, observations, temperature):
        return self.rng.integers(self.num_actions, size=len(observations))


def load_models(folder, device):
    """Run folder -> (models with the checkpoint's weights, its settings, interactions so far)."""
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no run folder {folder}")
    state, _ = newest_checkpoint(folder)
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
             + ("" if normalised is None else f"  human-normalised {normalised:.3f}")]
    if game in PUBLISHED:
        chance, human, (mean, std), median, best, simple, ppo = PUBLISHED[game]
        lines.append(f"published: paper mean {mean} (std {std} over 5 runs), median {median}, best "
                     f"{best}; SimPLe {simple}; PPO 100K {ppo}; random {chance}; human {human}")
    else:
        lines.append(f"published: {game} is not in the paper")
    return "\n".join(lines)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", nargs="?", help="a run folder, e.g. runs/Freeway-small-s0")
    parser.add_argument("--random", action="store_true",
                        help="judge the uniformly random policy instead")
    parser.add_argument("--game", help="the game for --random (default: the run's)")
    parser.add_argument("--episodes", type=int, default=32)
    parser.add_argument("--parallel", type=int, default=8, help="games played at once")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the policy's softmax")
    parser.add_argument("--seed", type=int, default=1000,
                        help="of the episodes and the sampled actions")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    args = parser.parse_args(arguments)
    try:
        if args.episodes < 1 or args.parallel < 1 or args.temperature <= 0:
            raise UserError("--episodes, --parallel and --temperature must be more than 0")
        if args.run is None and not (args.random and args.game):
            raise UserError("name a run folder, or --random with --game")
        if args.random:
            game = args.game or load_models(args.run, args.device)[1].game
            models, interactions, what = (RandomPolicy(AtariEnv(game).num_actions, args.seed), 0,
                                          "random policy")
        else:
            models, config, interactions = load_models(args.run, args.device)
            game, what = config.game, f"{args.run}, preset {config.preset}, seed {config.seed}"
        torch.manual_seed(args.seed)
        scores = []
        while len(scores) < args.episodes:
            first = args.seed * 10_000 + len(scores)
            n = min(args.parallel, args.episodes - len(scores))
            scores += play_episodes(models, game, range(first, first + n), args.temperature)
    except (UserError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    if args.json:
        normalised = human_normalised(game, float(np.mean(scores)))
        print(json.dumps({"game": game, "policy": what, "interactions": interactions,
                          "episodes": len(scores), "mean": float(np.mean(scores)),
                          "std": float(np.std(scores)), "median": float(np.median(scores)),
                          "best": float(np.max(scores)), "human_normalised": normalised,
                          "returns": scores}))
        return
    print(f"{what}, after {interactions:,} real interactions")
    print(f"protocol: {PROTOCOL}; temperature {args.temperature:g}")
    print(describe(game, scores))


if __name__ == "__main__":
    main()
