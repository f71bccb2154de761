"""Proximal policy optimisation (Schulman et al., 2017), from rollout to update,
and the policy network.

    gae, ppo_loss, ppo_update     the algorithm, for any network that returns (logits, values)
    ActorCritic                   the network of the paper, on embedded codes
    from CartPoleNet on           the same algorithm without a world model: CartPole, and Atari from
                                  pixels, the baseline of Figure 5

The paper trains this agent on dreams alone (Section 3.4); nothing here knows that.

Time alignment, row t of a rollout:

    z_t --policy--> a_t, log p(a_t | z_t), V(z_t) --world--> r_t, done_t        t = 0 .. T-1
    done_t: the episode ended after a_t. Then nothing of row t + 1 belongs to row t.

    python ppo.py                     # solves CartPole-v1 on a CPU in under two minutes
    python ppo.py --game Freeway      # model-free, 102,400 interactions, judged as train.py judges

Dimension key:  T steps   B parallel worlds   N = T * B samples, or a minibatch of them   M actions
"""
import os
import signal
if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))     # Ctrl-C: no traceback, from now on

import argparse
import csv
import difflib
import json
import pathlib
import sys
import time

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


def gae(rewards, values, dones, last_value, gamma=0.99, lam=0.95):
    """Generalised advantage estimation (Schulman et al., 2016, Eq. 16):
    [T, B] each -> advantages float [T, B].

        delta_t = r_t + gamma V_{t+1} (1 - done_t) - V_t
        A_t     = delta_t + gamma lam (1 - done_t) A_{t+1}

    dones bool [T, B]; last_value [B] is V of the observation after the last row (not used where
    done). The targets of the value function are A + V.
    """
    assert rewards.shape == values.shape == dones.shape and last_value.shape == rewards.shape[1:]
    alive, advantages = 1 - dones.float(), []
    advantage, next_value = torch.zeros_like(last_value), last_value
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * next_value * alive[t] - values[t]
        advantage, next_value = delta + gamma * lam * alive[t] * advantage, values[t]
        advantages.append(advantage)
    return torch.stack(advantages[::-1])


def ppo_loss(logits, values, actions, old_log_probs, advantages, returns, old_values,
             clip=0.1, value_clip=0.1, value_coef=0.5, entropy_coef=0.01):
    """PPO's loss on N samples -> (scalar, dict of detached parts).

    logits [N, M] and values [N] of the network now; actions int64 [N], old_log_probs [N] and
    old_values [N] as they were in the rollout; advantages [N] (normalise them first), returns [N].

        ratio    = p(a | z) / p_old(a | z)                                  Eq. 6
        policy   = -mean min(ratio A, clip(ratio, 1 - eps, 1 + eps) A)      Eq. 7
        value    = mean max((V - R)^2,
                            (V_old + clip(V - V_old, +-eps_v) - R)^2) / 2   as OpenAI's code does
                   (value_clip=None: mean (V - R)^2 / 2)
        loss     = policy + value_coef * value - entropy_coef * entropy     Eq. 9
    (equations of Schulman et al., 2017). The minimum makes the objective a lower bound: moving the
    ratio further than 1 +- eps gains nothing, but a move in the wrong direction still costs.
    """
    # (N, 1) against (N,) would broadcast to (N, N) and train on nonsense without an error.
    assert (logits.shape[:1] == values.shape == actions.shape == old_log_probs.shape
            == advantages.shape == returns.shape == old_values.shape), "N of each"
    log_p = F.log_softmax(logits, dim=1)                                         # [N, M]
    log_probs = log_p.gather(1, actions[:, None])[:, 0]                          # [N]
    ratio = torch.exp(log_probs - old_log_probs)
    policy_loss = -torch.min(ratio * advantages,
                             ratio.clamp(1 - clip, 1 + clip) * advantages).mean()

    value_loss = (values - returns).square()
    if value_clip is not None:
        clipped = old_values + (values - old_values).clamp(-value_clip, value_clip)
        value_loss = torch.max(value_loss, (clipped - returns).square())
    value_loss = 0.5 * value_loss.mean()

    entropy = -(log_p.exp() * log_p).sum(1).mean()
    loss = policy_loss + value_coef * value_loss - entropy_coef * entropy
    parts = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy,
             "approx_kl": (ratio - 1 - (log_probs - old_log_probs)).mean(),  # E[k3] after Schulman
             "clip_fraction": ((ratio - 1).abs() > clip).float().mean()}
    return loss, {k: v.detach() for k, v in parts.items()}


def ppo_update(network, optimizer, observations, rollout, last_value, gamma=0.99, lam=0.95,
               epochs=4, minibatch=256, max_grad_norm=0.5, **loss_settings):
    """All of PPO's work on one rollout -> dict of detached parts, averaged over the minibatches.

    network       observations [N, ...] -> (logits [N, M], values [N])
    observations  [T, B, ...], whatever the network reads
    rollout       dict of [T, B]: actions int64, log_probs, values, rewards, dones bool
    last_value    [B], the value after the last row
    epochs passes over the N = T * B samples in random minibatches
    (the last one of a pass takes the rest).
    """
    assert all(rollout[k].shape == observations.shape[:2] for k in ("actions", "log_probs")), "T, B"
    advantages = gae(rollout["rewards"], rollout["values"], rollout["dones"], last_value,
                     gamma, lam)
    b_observations = observations.flatten(0, 1)                                  # [N, ...]
    b = {k: v.flatten() for k, v in rollout.items() if k in ("actions", "log_probs", "values")}
    b_advantages = advantages.flatten()
    b_returns = b_advantages + b["values"]
    n, totals, count = len(b_returns), {}, 0
    for _ in range(epochs):
        for rows in torch.randperm(n, device=b_returns.device).split(minibatch):
            mb_advantages = b_advantages[rows]
            # A single one, left over, has no spread: 0 (and no policy loss), not 0 / 0.
            std = mb_advantages.std(correction=min(1, len(rows) - 1))
            mb_advantages = (mb_advantages - mb_advantages.mean()) / (std + 1e-8)
            logits, values = network(b_observations[rows])
            loss, parts = ppo_loss(logits, values, b["actions"][rows], b["log_probs"][rows],
                                   mb_advantages, b_returns[rows], b["values"][rows],
                                   **loss_settings)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), max_grad_norm)
            optimizer.step()
            count += 1
            for k, v in parts.items():
                totals[k] = totals.get(k, 0) + v
    return {k: v / count for k, v in totals.items()}


class ActorCritic(nn.Module):
    """p(a_t | z_t) of Eq. 8 and its value function on embedded codes;
    1,303,571 parameters for M = 18 (Table 3).

    width scales the hidden layers (1.0 = the paper's).
    """

    def __init__(self, num_actions, code_dim=32, width=1.0, size=(6, 6)):
        super().__init__()
        channels, features = max(4, round(64 * width)), max(16, round(512 * width))
        self.trunk = nn.Sequential(
            nn.Conv2d(code_dim, channels, 1, bias=False),
            nn.LayerNorm([channels, *size]), nn.LeakyReLU(),
            nn.Conv2d(channels, channels, 5, padding=2, bias=False),
            nn.LayerNorm([channels, *size]), nn.LeakyReLU(),
            nn.Flatten(),
            nn.Linear(channels * size[0] * size[1], features), nn.LeakyReLU(),
        )
        self.actor = nn.Linear(features, num_actions)
        self.critic = nn.Linear(features, 1)
        # Start near the uniform policy and value 0: the first advantages are then the rewards' own.
        # (The paper is silent; the released code leaves both heads at torch's default.)
        nn.init.orthogonal_(self.actor.weight, 0.01)
        nn.init.orthogonal_(self.critic.weight, 0.1)
        nn.init.zeros_(self.actor.bias)
        nn.init.zeros_(self.critic.bias)

    def forward(self, z):
        """z float [N, D, 6, 6] -> (logits float32 [N, M], values float32 [N])."""
        y = self.trunk(z)
        return self.actor(y).float(), self.critic(y).float()[:, 0]


class CartPoleNet(nn.Module):
    """Two small networks for a vector of observations: actor and critic share nothing."""

    def __init__(self, num_inputs, num_actions):
        super().__init__()
        self.actor = nn.Sequential(nn.Linear(num_inputs, 64), nn.Tanh(),
                                   nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, num_actions))
        self.critic = nn.Sequential(nn.Linear(num_inputs, 64), nn.Tanh(),
                                    nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))

    def forward(self, x):
        return self.actor(x), self.critic(x)[:, 0]


class PixelNet(nn.Module):
    """The usual network for Atari pixels (Mnih et al., 2015): three convolutions, 512 units."""

    def __init__(self, num_actions):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(4, 32, 8, stride=4), nn.ReLU(),                    # 84x84 -> 20x20
            nn.Conv2d(32, 64, 4, stride=2), nn.ReLU(),                   # -> 9x9
            nn.Conv2d(64, 64, 3), nn.ReLU(),                             # -> 7x7
            nn.Flatten(), nn.Linear(64 * 7 * 7, 512), nn.ReLU())
        self.actor, self.critic = nn.Linear(512, num_actions), nn.Linear(512, 1)
        for layer in self.trunk[0::2]:
            if hasattr(layer, "weight"):
                nn.init.orthogonal_(layer.weight, 2**0.5)
        nn.init.orthogonal_(self.actor.weight, 0.01)
        nn.init.orthogonal_(self.critic.weight, 1.0)

    def forward(self, x):
        """x uint8 [N, 4, 84, 84] -> (logits [N, M], values [N])."""
        y = self.trunk(x.float() / 255)
        return self.actor(y), self.critic(y)[:, 0]


@torch.no_grad()
def play(network, envs, observation, steps, gamma=0.99, clip_rewards=False):
    """Rolls the current policy out in a gymnasium vector environment (SAME_STEP autoreset: when an
    episode ends, step() already returns the first observation of the next one).

    observation: of the B environments now, numpy. clip_rewards: learn from rewards in [-1, 1].
    -> (the last observation, observations [T, B, ...], dict of [T, B]: what ppo_update wants, and
    points, the rewards as the environments paid them).
    """
    device = next(network.parameters()).device
    observations, rows = [], []
    for _ in range(steps):
        x = torch.as_tensor(observation, device=device)
        logits, value = network(x)
        distribution = torch.distributions.Categorical(logits=logits)
        action = distribution.sample()
        observation, points, terminated, truncated, info = envs.step(action.cpu().numpy())
        points = torch.as_tensor(points, dtype=torch.float32)
        reward = (points.clamp(-1, 1) if clip_rewards else points).to(device)
        if truncated.any():
            # Cut by the clock: the value of the last observation stands for the rewards that would
            # have come. (A fallen pole is worth nothing.)
            final = torch.as_tensor(np.stack(list(info["final_obs"][truncated])), device=device)
            reward[torch.as_tensor(truncated, device=device)] += gamma * network(final)[1]
        observations.append(x)
        rows.append((action, distribution.log_prob(action), value, reward,
                     torch.as_tensor(terminated | truncated, device=device), points))
    names = ("actions", "log_probs", "values", "rewards", "dones", "points")
    return (observation, torch.stack(observations),
            {n: torch.stack(c) for n, c in zip(names, zip(*rows))})


@torch.no_grad()
def whole_episodes(network, envs, seed):
    """One whole episode in each environment, from seeds seed, seed + 1, ..; actions are sampled
    -> list of scores.
    """
    device = next(network.parameters()).device
    observation, _ = envs.reset(seed=seed)
    scores, playing = np.zeros(envs.num_envs), np.ones(envs.num_envs, bool)
    while playing.any():
        logits, _ = network(torch.as_tensor(observation, device=device))
        action = torch.distributions.Categorical(logits=logits).sample()
        observation, points, terminated, truncated, _ = envs.step(action.cpu().numpy())
        scores += points * playing
        playing &= ~(terminated | truncated)
    return scores.tolist()


def learn(network, envs, seed, updates, lr, T=128, clip_rewards=False, **settings):
    """The whole of PPO: play T steps, learn from them, and again, at a rate that falls to 0.
    A generator: after each update (its number, what was played as `play` returns it, parts).
    """
    device = next(network.parameters()).device
    optimizer = torch.optim.Adam(network.parameters(), lr=lr, eps=1e-5)
    observation, _ = envs.reset(seed=seed)
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = lr * (1 - update / updates)
        observation, observations, rollout = play(network, envs, observation, T,
                                                  clip_rewards=clip_rewards)
        with torch.no_grad():
            last_value = network(torch.as_tensor(observation, device=device))[1]
        parts = ppo_update(network, optimizer, observations, rollout, last_value, **settings)
        yield update + 1, rollout, parts


def cartpole(seed, steps):
    """Solves CartPole-v1: mean return of at least 475 over 104 episodes, or an error."""
    torch.set_num_threads(1)                  # 64 units: threads would only wait for each other
    start, updates = time.time(), steps // (8 * 128)
    envs, test_envs = [gym.make_vec(
        "CartPole-v1", num_envs=8, vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}) for _ in range(2)]
    network = CartPoleNet(4, 2)
    for update, _, parts in learn(network, envs, seed, updates, lr=1e-3, epochs=8, clip=0.2,
                                  value_clip=None, entropy_coef=0.0):
        if update % 10 == 0 or update == updates:
            mean_return = np.mean([whole_episodes(network, test_envs, 1000 * seed + 8 * i)
                                   for i in range(13)])
            print(f"{update * 8 * 128:7d} steps  mean return over 104 episodes {mean_return:5.1f}  "
                  f"entropy {parts['entropy']:.2f}  {time.time() - start:5.1f} s", flush=True)
            if mean_return >= 475:
                print(f"CartPole-v1 solved: mean return {mean_return:.1f} >= 475 over 104 episodes"
                      f", after {update * 8 * 128} steps, {time.time() - start:.0f} s", flush=True)
                return
    sys.exit(f"error: CartPole-v1 not solved in {steps} steps (mean return {mean_return:.1f}); "
             f"try another --seed or more --steps")


def canonical_name(game):
    """The name as the tables of the papers write it: "space_invaders" -> "SpaceInvaders".
    Raises ValueError naming the nearest games if unknown.
    """
    import ale_py
    gym.register_envs(ale_py)
    names = {spec[4:-3].lower(): spec[4:-3] for spec in gym.registry
             if spec.startswith("ALE/") and spec.endswith("-v5")}
    plain = "".join(filter(str.isalnum, str(game).lower()))
    if plain not in names:
        close = difflib.get_close_matches(plain, names, n=3, cutoff=0.5)
        hint = ", ".join(names[c] for c in close) or "Pong, Freeway, Breakout"
        raise ValueError(f"unknown game {game!r}; the nearest names: {hint}")
    return names[plain]


def atari_envs(game, num_envs):
    """num_envs Atari games side by side, observations uint8 [B, 4, 84, 84], under the protocol of
    the Atari 100K papers. game: as `canonical_name` takes it.
    """
    rom = gym.spec(f"ALE/{canonical_name(game)}-v5").kwargs["game"]
    import ale_py
    from ale_py.vector_env import AtariVectorEnv
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    # Defaults are: grey, four frames skipped, the maximum of the last two, four of these stacked,
    # up to 30 no-ops, no sticky actions, no end at a lost life, cut after 108,000 frames. Rewards
    # are clipped by `play` instead, which needs the unclipped ones too.
    return AtariVectorEnv(rom, num_envs, reward_clipping=False, use_fire_reset=False,
                          autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)


def say(text):
    """print; if nobody listens any more, go on in silence: results are in the run's folder."""
    try:
        print(text, flush=True)
    except (OSError, UnicodeError):
        sys.stdout = None


def atari(game, interactions, seed, out, device):
    """Model-free PPO from pixels (Figure 5), with the settings for Atari of Schulman et al. (2017),
    Table 5; then 32 whole episodes of the final policy.

    Leaves the folder <out>/<game>-ppo-s<seed> in the form of train.py's, for evaluate.py:
    config.json, metrics.csv (a row for each five updates; collect_return is the mean score of the
    training episodes that ended in them), in the end evaluation.json. No weights: a run that is
    stopped must start again.
    """
    start, game, updates = time.time(), canonical_name(game), interactions // (8 * 128)
    try:
        torch.zeros(1, device=device).cpu()
    except Exception:
        raise ValueError(f"device {device!r} is not available here") from None
    envs, folder = atari_envs(game, 8), pathlib.Path(out) / f"{game}-ppo-s{seed}"
    if (folder / "evaluation.json").exists():
        raise ValueError(f"{folder} already holds a run; choose another --seed or --out")
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "metrics.csv", "evaluation.json"):      # of a stopped run, or links
        (folder / name).unlink(missing_ok=True)
    run = {"game": game, "preset": "ppo", "seed": seed, "interactions": updates * 8 * 128}
    (folder / "config.json").write_text(json.dumps(run | {"iterations": -(-updates // 5)}))
    say(f"model-free PPO, {game}, {run['interactions']:,} interactions on {device}, into "
        f"{ascii(str(folder))}")

    network = PixelNet(int(envs.single_action_space.n)).to(device)
    last_seed = 2**31 - 8                                # the emulators' seeds are seed .. seed + 7
    running, ended = torch.zeros(8), []                  # scores of the open episodes, of the ended
    with open(folder / "metrics.csv", "w", newline="", buffering=1) as file:
        table = csv.DictWriter(file, lineterminator="\n", fieldnames=(
            "iteration interactions collect_episodes collect_return policy_loss value_loss entropy "
            "approx_kl clip_fraction real_return real_episodes").split())
        table.writeheader()
        for update, rollout, parts in learn(network, envs, seed % last_seed, updates, lr=2.5e-4,
                                            clip_rewards=True):
            for points, done in zip(rollout["points"], rollout["dones"].cpu()):
                running += points
                ended += running[done].tolist()
                running[done] = 0
            if update == 1:
                say(f"training takes about {(time.time() - start) * updates / 60:.0f} minutes")
            if update % 5 and update < updates:
                continue
            row = {"iteration": -(-update // 5), "interactions": update * 8 * 128,
                   "collect_episodes": len(ended)}
            if ended:
                row["collect_return"] = np.mean(ended)
            say(f"{row['interactions']:7d} interactions  mean score "
                + (f"{np.mean(ended):.1f} of {len(ended)} episodes" if ended else "not known yet")
                + f"  entropy {parts['entropy']:.2f}  {(time.time() - start) / 60:.0f} minutes")
            if update == updates:
                say("playing 32 episodes")
                scores = sum((whole_episodes(network, envs, (seed + 10**6 + n) % last_seed)
                              for n in range(0, 32, 8)), [])
                row |= {"real_return": np.mean(scores), "real_episodes": len(scores)}
                say(f"{game}: mean {np.mean(scores):.1f}  std {np.std(scores):.1f}  median "
                    f"{np.median(scores):.1f}  best {np.max(scores):.1f}  over 32 episodes")
            table.writerow(row | {name: float(value) for name, value in parts.items()})
            ended = []
    (folder / "evaluation.json").write_text(json.dumps(run | {
        "episodes": len(scores), "temperature": 1.0, "mean": np.mean(scores),
        "std": np.std(scores), "median": np.median(scores), "best": np.max(scores),
        "returns": scores, "protocol":
        "sampled actions, up to 30 no-ops at reset, no sticky actions, no life-loss termination, "
        "unclipped game score, at most 108,000 frames"}, indent=1))


def main():
    parser = argparse.ArgumentParser(description="Solve CartPole-v1 with PPO, or learn an Atari "
                                                 "game from pixels (--game).")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=150_000,
                        help="of CartPole at most, over all environments")
    parser.add_argument("--game", help="Atari game, e.g. Freeway: the model-free baseline")
    parser.add_argument("--interactions", type=int, default=102_400,
                        help="with --game: steps of four frames, over all environments")
    parser.add_argument("--out", default="runs", help="with --game: where the run's folder is made")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="with --game")
    args = parser.parse_args()
    # 50 million interactions are 200 million frames, what Atari agents without a budget get.
    for name, low, high in (("seed", 0, 2**31 - 1), ("steps", 8 * 128, 10**7),
                            ("interactions", 8 * 128, 5 * 10**7)):
        if not low <= getattr(args, name) <= high:
            sys.exit(f"error: --{name} must be from {low} to {high}")
    torch.manual_seed(args.seed)
    try:
        if args.game is None:
            cartpole(args.seed, args.steps)
        else:
            atari(args.game, args.interactions, args.seed, args.out, args.device)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except OSError as error:                     # nowhere to write: a closed pipe, a full disk
        sys.stdout = None                        # or it is tried once more at the end
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
