"""Proximal policy optimisation (Schulman et al., 2017), from rollout to update,
and the policy network.

The paper trains this agent on dreams alone (Section 3.4); nothing here knows that. The functions
take any network that returns (action logits, values), so the same lines solve CartPole below.

Time alignment, row t of a rollout:

    z_t --policy--> a_t, log p(a_t | z_t), V(z_t) --world--> r_t, done_t        t = 0 .. T-1
    done_t: the episode ended after a_t. Then nothing of row t + 1 belongs to row t.

    python ppo.py             # solves CartPole-v1 on a CPU in under two minutes

Dimension key:  T steps   B parallel worlds   N = T * B samples, or a minibatch of them   M actions
"""
import argparse
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

    clipped = old_values + (values - old_values).clamp(-value_clip, value_clip)
    value_loss = 0.5 * torch.max((values - returns).square(), (clipped - returns).square()).mean()

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


def main():
    parser = argparse.ArgumentParser(description="Solve CartPole-v1 with PPO.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=150_000,
                        help="steps at most, over all environments")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)                  # 64 units: threads would only wait for each other

    num_envs, T, start = 8, 128, time.time()
    # SAME_STEP: when an episode ends, step() already returns the first observation of the next one.
    envs = gym.make_vec("CartPole-v1", num_envs=num_envs, vectorization_mode="sync",
                        vector_kwargs={"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP})
    network = CartPoleNet(4, 2)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, eps=1e-5)

    def play(observation, steps):
        """Rolls the current policy out:
        (last observation, observations [T, B, 4], dict of [T, B]).
        """
        observations, rows = [], []
        for _ in range(steps):
            x = torch.as_tensor(observation, dtype=torch.float32)
            with torch.no_grad():
                logits, value = network(x)
            distribution = torch.distributions.Categorical(logits=logits)
            action = distribution.sample()
            observation, reward, terminated, truncated, info = envs.step(action.numpy())
            reward = torch.as_tensor(reward, dtype=torch.float32)
            if truncated.any():
                # Cut by the clock at 500 steps, the pole still stands: the last observation's value
                # stands for the rewards that would have come. (A fallen pole is worth nothing.)
                final = torch.as_tensor(np.stack(info["final_obs"][truncated]), dtype=torch.float32)
                with torch.no_grad():
                    reward[torch.as_tensor(truncated)] += 0.99 * network(final)[1]
            observations.append(x)
            rows.append((action, distribution.log_prob(action), value, reward,
                         torch.as_tensor(terminated | truncated)))
        names = ("actions", "log_probs", "values", "rewards", "dones")
        return (observation, torch.stack(observations),
                {n: torch.stack(c) for n, c in zip(names, zip(*rows))})

    def evaluate(episodes=100):
        """Mean return of the sampled policy over whole episodes."""
        returns, observation, score = [], envs.reset(seed=args.seed + 1)[0], np.zeros(num_envs)
        while len(returns) < episodes:
            with torch.no_grad():
                logits, _ = network(torch.as_tensor(observation, dtype=torch.float32))
            action = torch.distributions.Categorical(logits=logits).sample().numpy()
            observation, reward, terminated, truncated, _ = envs.step(action)
            score += reward
            for i in np.flatnonzero(terminated | truncated):
                returns.append(score[i])
                score[i] = 0
        return float(np.mean(returns[:episodes]))

    observation, steps, mean_return = envs.reset(seed=args.seed)[0], 0, 0.0
    updates = args.steps // (num_envs * T)
    for update in range(1, updates + 1):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - (update - 1) / updates)
        observation, observations, rollout = play(observation, T)
        with torch.no_grad():
            last_value = network(torch.as_tensor(observation, dtype=torch.float32))[1]
        parts = ppo_update(network, optimizer, observations, rollout, last_value, epochs=8,
                           clip=0.2, value_clip=1e9, entropy_coef=0.0)
        steps += num_envs * T
        if update % 10 == 0 or update == updates:
            mean_return = evaluate()
            print(f"{steps:7d} steps  mean return over 100 episodes {mean_return:5.1f}  "
                  f"entropy {parts['entropy']:.2f}  {time.time() - start:5.1f} s", flush=True)
            observation, _ = envs.reset()
            if mean_return >= 475:
                print(f"CartPole-v1 solved: mean return {mean_return:.1f} >= 475 over 100 "
                      f"episodes, after {steps} steps and {time.time() - start:.0f} s")
                return
    sys.exit(f"error: CartPole-v1 not solved in {steps} steps (mean return {mean_return:.1f}); "
             f"try another --seed or more --steps")


if __name__ == "__main__":
    main()
