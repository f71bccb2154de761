"""Proximal policy optimisation (Schulman et al., 2017), from rollout to update,
and the policy network.

The paper trains this agent on dreams alone (Section 3.4); nothing here knows that. The functions
take any network that returns (action logits, values), so the same lines solve CartPole below, and
learn Atari games from pixels without a world model: the baseline of Figure 5.

Time alignment, row t of a rollout:

    z_t --policy--> a_t, log p(a_t | z_t), V(z_t) --world--> r_t, done_t        t = 0 .. T-1
    done_t: the episode ended after a_t. Then nothing of row t + 1 belongs to row t.

    python ppo.py                     # solves CartPole-v1 on a CPU in under two minutes
    python ppo.py --game Freeway      # model-free, 102,400 interactions, judged as train.py judges

Dimension key:  T steps   B parallel worlds   N = T * B samples, or a minibatch of them   M actions
"""
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
        nn.init.orthogonal_(self.actor.weight, 0.01)
        nn.init.orthogonal_(self.critic.weight, 0.1)
        nn.init.zeros_(self.actor.bias)
        nn.init.zeros_(self.critic.bias)

    def forward(self, z):
        """z float [N, D, 6, 6] -> (logits float32 [N, M], values float32 [N])."""
        y = self.trunk(z)
        return self.actor(y).float(), self.critic(y).float()[:, 0]


def gae(rewards, values, dones, last_value, gamma=0.99, lam=0.95):
    """Generalised advantage estimation (Schulman et al., 2016, Eq. 16):
    float [T, B] each -> advantages [T, B].

        delta_t = r_t + gamma V_{t+1} (1 - done_t) - V_t
        A_t     = delta_t + gamma lam (1 - done_t) A_{t+1}

    dones bool [T, B]; last_value [B] is V of the observation after the last row (not used where
    done). The targets of the value function are A + V.
    """
    assert rewards.shape == values.shape == dones.shape and last_value.shape == rewards.shape[1:]
    alive = 1 - dones.float()
    advantages, advantage, next_value = (torch.zeros_like(rewards), torch.zeros_like(last_value),
                                         last_value)
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * next_value * alive[t] - values[t]
        advantage = delta + gamma * lam * alive[t] * advantage
        advantages[t], next_value = advantage, values[t]
    return advantages


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
    assert values.shape == actions.shape == advantages.shape == returns.shape == old_values.shape
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
            mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
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


def cartpole(seed, steps):
    """Solves CartPole-v1: mean return of at least 475 over 104 episodes, or an error."""
    torch.set_num_threads(1)                  # 64 units: threads would only wait for each other
    num_envs, T, start = 8, 128, time.time()
    envs, test_envs = [gym.make_vec(
        "CartPole-v1", num_envs=num_envs, vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}) for _ in range(2)]
    network = CartPoleNet(4, 2)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, eps=1e-5)
    observation, mean_return, updates = envs.reset(seed=seed)[0], 0.0, steps // (num_envs * T)
    for update in range(1, updates + 1):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - (update - 1) / updates)
        observation, observations, rollout = play(network, envs, observation, T)
        with torch.no_grad():
            last_value = network(torch.as_tensor(observation))[1]
        parts = ppo_update(network, optimizer, observations, rollout, last_value, epochs=8,
                           clip=0.2, value_clip=None, entropy_coef=0.0)
        if update % 10 == 0 or update == updates:
            mean_return = np.mean([whole_episodes(network, test_envs, 1000 * seed + 8 * i)
                                   for i in range(13)])
            print(f"{update * num_envs * T:7d} steps  mean return over 104 episodes "
                  f"{mean_return:5.1f}  entropy {parts['entropy']:.2f}  "
                  f"{time.time() - start:5.1f} s", flush=True)
            if mean_return >= 475:
                print(f"CartPole-v1 solved: mean return {mean_return:.1f} >= 475 over 104 episodes,"
                      f" after {update * num_envs * T} steps and {time.time() - start:.0f} s")
                return
    sys.exit(f"error: CartPole-v1 not solved in {steps} steps (mean return {mean_return:.1f}); "
             f"try another --seed or more --steps")


def atari_envs(game, num_envs):
    """num_envs Atari games side by side, observations uint8 [B, 4, 84, 84], under the protocol of
    the Atari 100K papers. ValueError names the nearest games if it is unknown.
    """
    import ale_py
    from ale_py.vector_env import AtariVectorEnv
    gym.register_envs(ale_py)
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    names = {name[4:-3].lower(): name[4:-3] for name in gym.registry
             if name.startswith("ALE/") and name.endswith("-v5")}
    if game not in names.values():
        close = difflib.get_close_matches(game.lower().replace("_", ""), names, cutoff=0.5)
        hint = ", ".join(names[c] for c in close) or "Pong, Freeway, Breakout"
        raise ValueError(f"unknown game {game!r}; the nearest names: {hint}")
    # Defaults are: grey, four frames skipped, the maximum of the last two, four of these stacked,
    # up to 30 no-ops, no sticky actions, no end at a lost life, cut after 108,000 frames. Rewards
    # are clipped by `play` instead, which needs the unclipped ones too.
    return AtariVectorEnv(gym.spec(f"ALE/{game}-v5").kwargs["game"], num_envs,
                          reward_clipping=False, use_fire_reset=False,
                          autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)


def atari(game, interactions, seed, out, device, episodes=32):
    """Model-free PPO from pixels (Figure 5), with the settings for Atari of Schulman et al. (2017),
    Table 5; then `episodes` whole episodes of the final policy.

    Writes config.json, metrics.csv (a row for each five updates; collect_return is the mean score
    of the training episodes that ended in it) and, at the end, evaluation.json into the folder
    <out>/<game>-ppo-s<seed>, in the form of train.py's, where evaluate.py finds them. No weights:
    a run that is stopped must start again.
    """
    num_envs, T, start = 8, 128, time.time()
    updates = interactions // (num_envs * T)
    if updates < 1:
        raise ValueError(f"--interactions must be {num_envs * T} or more, a rollout of each "
                         f"environment")
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError):
        raise ValueError(f"device {device!r} is not available here") from None
    envs = atari_envs(game, num_envs)
    folder = pathlib.Path(out) / f"{game}-ppo-s{seed}"
    if (folder / "evaluation.json").exists():
        raise ValueError(f"{folder} already holds a run; choose another --seed or --out")
    folder.mkdir(parents=True, exist_ok=True)
    run = {"game": game, "preset": "ppo", "seed": seed, "interactions": updates * num_envs * T}
    (folder / "config.json").write_text(json.dumps(run | {"iterations": -(-updates // 5)}))
    network = PixelNet(int(envs.single_action_space.n)).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=2.5e-4, eps=1e-5)
    print(f"model-free PPO, {game}, {run['interactions']:,} interactions on {device}, into "
          f"{folder}", flush=True)

    def clock(seconds):
        return time.strftime("%H:%M:%S", time.gmtime(seconds))

    observation, rows = envs.reset(seed=seed)[0], []
    running, ended = np.zeros(num_envs), []       # scores of the open episodes, of the ended ones
    for update in range(1, updates + 1):
        optimizer.param_groups[0]["lr"] = 2.5e-4 * (1 - (update - 1) / updates)
        observation, observations, rollout = play(network, envs, observation, T, clip_rewards=True)
        for points, done in zip(rollout["points"].numpy(), rollout["dones"].cpu().numpy()):
            running += points
            ended += running[done].tolist()
            running[done] = 0
        with torch.no_grad():
            last_value = network(torch.as_tensor(observation, device=device))[1]
        parts = ppo_update(network, optimizer, observations, rollout, last_value)
        if update == 1:
            print(f"training takes about {clock((time.time() - start) * updates)} (h:mm:ss)",
                  flush=True)
        if update % 5 == 0 or update == updates:
            row = {"iteration": len(rows) + 1, "interactions": update * num_envs * T,
                   "collect_episodes": len(ended)}
            if ended:
                row["collect_return"] = np.mean(ended)
            rows.append(row | {name: float(value) for name, value in parts.items()})
            if update == updates:
                print(f"playing {episodes} episodes", flush=True)
                scores = []
                while len(scores) < episodes:
                    scores += whole_episodes(network, envs, seed + 10**6 + len(scores))
                scores = scores[:episodes]
                rows[-1] |= {"real_return": np.mean(scores), "real_episodes": len(scores)}
            columns = dict.fromkeys(name for row in rows for name in row)
            with open(folder / "metrics.csv", "w", newline="") as file:
                table = csv.DictWriter(file, columns, lineterminator="\n")
                table.writeheader()
                table.writerows(rows)
            elapsed = time.time() - start
            print(f"{row['interactions']:7d} interactions  "
                  + (f"mean score {np.mean(ended):.1f} of {len(ended)} episodes  " if ended else "")
                  + f"entropy {parts['entropy']:.2f}  {clock(elapsed)}, training ends in about "
                    f"{clock(elapsed / update * (updates - update))}", flush=True)
            ended = []
    result = run | {"episodes": len(scores), "temperature": 1.0, "mean": np.mean(scores),
                    "std": np.std(scores), "median": np.median(scores), "best": np.max(scores),
                    "returns": scores, "protocol":
                    "sampled actions, up to 30 no-ops at reset, no sticky actions, no life-loss "
                    "termination, unclipped game score, at most 108,000 frames"}
    (folder / "evaluation.json").write_text(json.dumps(result, indent=1))
    print(f"{game}: mean {np.mean(scores):.1f}  std {np.std(scores):.1f}  median "
          f"{np.median(scores):.1f}  best {np.max(scores):.1f}  over {len(scores)} episodes")


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
    torch.manual_seed(args.seed)
    try:
        if args.game is None:
            cartpole(args.seed, args.steps)
        else:
            atari(args.game, args.interactions, args.seed, args.out, args.device)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
