"""The world model's dynamics: what the next codes and the reward will be (Section 3.2-3.3,
Figure 3), and the dream in which the policy lives.

Time alignment, the same everywhere in this repository. Row t of a buffer, a batch or a dream is:

    t            0           1           2                  L-1
    o_t       o_0         o_1         o_2        ...     o_{L-1}  observation, codes z_t
    a_t          a_0         a_1         a_2     ...              action chosen at o_t
    r_t             r_0         r_1         r_2  ...              reward for a_t, comes with o_{t+1}
    end_t           e_0         e_1         e_2  ...              the episode ended after a_t
                   /           /           /
    h_t   0 --> [cells] --> [cells] --> [cells] --> ...           step t reads (z_t, a_t, h_{t-1})
                   |           |           |
                (z_1,r_0)   (z_2,r_1)   (z_3,r_2)                 and predicts (z_{t+1}, r_t)

    If e_t: z_{t+1} is the first observation of another episode. It can't be predicted, so step t
    has no code loss (but its reward counts), and step t + 1 starts from h = 0 and the true z_{t+1}.

    python dynamics.py       # learn a small world of codes, dream in it, save the strip (a minute)

Dimension key:  B batch   L observations in a window, L-1 predictions   T steps dreamed
                K = 128 codes   D = 32 code dimensions   M actions   C = 128 hidden channels
"""
import os
import signal
if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))     # Ctrl-C: no traceback, from now on

import argparse
import math
import sys
import time

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from convlstm import ConvLSTMCell


def sample(logits, temperature=1.0, generator=None):
    """Draws from Cat(Softmax(logits / temperature)) along dimension 1: [B, K, ..] -> int64 [B, ..].

    Inverse transform sampling: with u uniform in [0, 1), as many cumulative probabilities are at
    most u as there are values below the drawn one. One random number per draw, no copy to the host.
    generator: of the u; torch's global one if None.
    """
    cumulative = (logits.float() / temperature).softmax(1).cumsum(1)[:, :-1]
    u = torch.rand(cumulative[:, :1].shape, device=logits.device, generator=generator)
    return (cumulative <= u).sum(1)


def reward_class(rewards):
    """Game rewards, any float shape -> int64 class 0, 1, 2 for -1, 0, 1:
    clipped and rounded (Section 3.3).
    """
    return rewards.clamp(-1, 1).round().long() + 1


# A game ends once in a thousand steps or so. Such a step counts 100 times in the loss of the head
# that predicts ends; what it says is put right again by the same factor (Dynamics.end_logits).
END_WEIGHT = 100.0


def forget(state, over):
    """The cells' state with zeros where over, bool [B]: there another episode begins."""
    alive = (~over).float()[:, None, None, None]
    return [(h * alive, c * alive) for h, c in state]


def begin_again(state, over, starts, rows):
    """The cells' state with that of `starts` in rows (int64 [B]) where over, bool [B]."""
    over = over[:, None, None, None]
    return [tuple(torch.where(over, start[rows].to(now.dtype), now)
                  for start, now in zip(*cell)) for cell in zip(starts, state)]


class RewardHead(nn.Module):
    """g(y_t): 1x1 conv, layer norm, two linear layers -> scores of the rewards -1, 0, 1 (Eq. 7).
    With outputs=1 the head that predicts ends.
    """

    def __init__(self, channels, size, outputs=3):
        super().__init__()
        self.conv = nn.Conv2d(channels, 32, 1)
        self.norm = nn.LayerNorm([32, *size])
        self.linear1 = nn.Linear(32 * size[0] * size[1], 512)
        self.linear2 = nn.Linear(512, outputs)

    def forward(self, y):
        g = F.leaky_relu(self.norm(self.conv(y)))                        # [B, 32, 6, 6]
        return self.linear2(F.leaky_relu(self.linear1(g.flatten(1))))    # [B, 3]


class Dynamics(nn.Module):
    """Two ConvLSTM cells and two heads; 6,552,547 parameters for M = 18 (Table 3).

    predict_ends adds a third head, for the end of the episode: the paper's conclusion, and Ha &
    Schmidhuber's done_t (section 4.1).

    The action enters as M one-hot planes at both cells and at both heads, "since the action
    information might get lost during the forward pass" (Figure 3).
    """

    def __init__(self, num_actions, num_codes=128, code_dim=32, hidden=128, size=(6, 6),
                 predict_ends=False):
        super().__init__()
        self.num_actions = num_actions
        self.cell1 = ConvLSTMCell(code_dim + num_actions, hidden, size=size)
        self.cell2 = ConvLSTMCell(hidden + num_actions, hidden, size=size)
        self.code_head = nn.Conv2d(hidden + num_actions, num_codes, 1)   # f(y_t), Eq. 6
        self.reward_head = RewardHead(hidden + num_actions, size)        # g(y_t), Eq. 7
        self.end_head = RewardHead(hidden + num_actions, size, 1) if predict_ends else None

        # Initial weights, on which the paper is silent. h = o * tanh(c) starts out near 0.2, from
        # which a default head makes no confident prediction for hundreds of updates: open the gates
        # i and o, as the cell does f, and enlarge the head. And most codes stay where they are:
        # start from convolutions that look at the place itself. (The released code: torch's
        # defaults, and peepholes from N(0, 1); ours begin at 0, as biases do.)
        with torch.no_grad():
            for cell in (self.cell1, self.cell2):
                cell.bias.view(4, -1)[[0, 3]] = 1.0
                for conv in (cell.conv_x, cell.conv_h):
                    centre = torch.empty_like(conv.weight[:hidden, :, 2, 2])
                    conv.weight *= 0.2
                    for gate in range(4):
                        rows = slice(gate * hidden, (gate + 1) * hidden)
                        conv.weight[rows, :, 2, 2] = nn.init.orthogonal_(centre)
            self.code_head.weight *= 5

    def initial_state(self, batch):
        """((h, c), (h, c)) of the two cells, zeros [batch, C, 6, 6]."""
        return self.cell1.initial_state(batch), self.cell2.initial_state(batch)

    def advance(self, z, action, state):
        """Eq. 4, arguments as in forward -> y_t [B, C+M, 6, 6], which the heads read; new state."""
        planes = self.planes(action, z)
        state1 = self.cell1(torch.cat([z, planes], 1), state[0])
        state2 = self.cell2(torch.cat([state1[0], planes], 1), state[1])
        return torch.cat([state2[0], planes], 1), (state1, state2)

    def forward(self, z, action, state):
        """One step of Eq. 4, 6 and 7.

        z       float [B, D, 6, 6]    embedded codes of o_t
        action  int64 [B] in [0, M)   a_t; RuntimeError for others
        state   as initial_state      h_{t-1} (and c) of both cells
        -> code logits [B, K, 6, 6] of z_{t+1}, reward logits [B, 3] of r_t in {-1, 0, 1},
           the new state
        """
        y, state = self.advance(z, action, state)
        return self.code_head(y).float(), self.reward_head(y).float(), state

    def planes(self, action, like):
        """int64 [B] -> one-hot planes [B, M, 6, 6], of the type and map of `like`."""
        one_hot = F.one_hot(action, self.num_actions).to(like.dtype)                 # [B, M]
        return one_hot[:, :, None, None].expand(-1, -1, *like.shape[2:])

    def end_logits(self, action, state):
        """The third head: log-odds float [B] that the episode ends after a_t.
        state: the one that the step with this action returned.
        """
        h = state[1][0]
        y = torch.cat([h, self.planes(action, h)], 1)                        # y_t, as above
        # Trained on data in which ends are END_WEIGHT times as frequent, it overrates their odds by
        # just this factor.
        return self.end_head(y).float()[:, 0] - math.log(END_WEIGHT)

    def loss(self, codes, actions, rewards, ends, embed, context=4, reward_weight=1e-6,
             end_targets=None, temperature=1.0):
        """Maximum likelihood of Eq. 6 and 7 over windows of L observations
        -> (scalar, dict of parts).

        codes    int64 [B, L, 6, 6]   z_t of L consecutive observations
        actions  int64 [B, L]         a_t; here and below the last column is not needed and not read
        rewards  float [B, L]         r_t as the game pays them
        ends     bool  [B, L]         the episode ended after a_t
        embed    codes [B, 6, 6] -> embedding vectors [B, D, 6, 6]; no gradient flows into it
        context  the first `context` inputs are true codes; from there on the model reads its own
                 samples, as it will in the dream
        reward_weight  the paper scales the reward loss down so that its gradient can't disturb the
                 trunk (Section 3.4), and raises the head's learning rate
        end_targets bool [B, L], what the third head is to predict, if there is one: the game or a
                 life was over after a_t (not: recording was cut there); None: the same as ends
        temperature  of the model's own samples, as in `dream`

        Parts, detached: code_loss (nats per code), reward_loss (nats per step),
        code_accuracy (share of codes whose most likely value is right),
        reward_accuracy_minus / _zero / _plus (share of steps with that true reward whose most
        likely class is right; nan where there was none); with a third head also end_loss (nats per
        step, weighted), end_true, end_predicted, end_right (shares of all steps: the game ends,
        an end is likelier than not, both).
        """
        assert ends.dtype == torch.bool, "ends must be bool: ~ends of numbers is not their opposite"
        B, L = codes.shape[:2]
        state, z, ys, code_logits = self.initial_state(B), codes[:, 0], [], []
        for t in range(L - 1):
            y, state = self.advance(embed(z).detach(), actions[:, t], state)
            ys.append(y)
            code_logits.append(self.code_head(y).float())

            # The next input: the truth while in context and at the start of another episode,
            # else a sample of what was just predicted. (It is an integer: no gradient through it.)
            z = codes[:, t + 1]
            if context <= t + 1 < L - 1:
                drawn = sample(code_logits[t].detach(), temperature)
                z = torch.where(ends[:, t, None, None], z, drawn)
            state = forget(state, ends[:, t])

        # Whatever need not wait for the step before is computed for all steps at once.
        code_logits, targets = torch.stack(code_logits, 2), codes[:, 1:]         # [B, K, L-1, 6, 6]
        ys = torch.stack(ys, 1).flatten(0, 1)                                    # [B (L-1), ..]
        reward_logits = self.reward_head(ys).float()
        reward_logits = reward_logits.unflatten(0, (B, L - 1)).transpose(1, 2)   # [B, 3, L-1]
        reward_targets = reward_class(rewards[:, :L - 1])                        # [B, L-1]
        # No code loss across an episode end. (The released code masks with end_{t+1}, a step late.)
        inside = (~ends[:, :L - 1]).float()                                      # [B, L-1]
        count = inside.sum().clamp(min=1)
        code_loss = F.cross_entropy(code_logits, targets, reduction="none").mean((2, 3))
        code_loss = (code_loss * inside).sum() / count
        reward_loss = F.cross_entropy(reward_logits, reward_targets, reduction="none").mean()

        with torch.no_grad():
            code_right = (code_logits.argmax(1) == targets).float().mean((2, 3))
            right = (reward_logits.argmax(1) == reward_targets).float()
            parts = {"code_loss": code_loss, "reward_loss": reward_loss,
                     "code_accuracy": (code_right * inside).sum() / count}
            for k, name in enumerate(("minus", "zero", "plus")):
                mine = (reward_targets == k).float()
                parts[f"reward_accuracy_{name}"] = (right * mine).sum() / mine.sum()
        heads_loss = reward_loss
        if self.end_head is not None:
            over = (ends if end_targets is None else end_targets)[:, :L - 1].float()   # [B, L-1]
            logits = self.end_head(ys).float().view(B, L - 1)    # overrated: see end_logits
            end_loss = F.binary_cross_entropy_with_logits(
                logits, over, weight=1 + (END_WEIGHT - 1) * over)
            heads_loss = heads_loss + end_loss
            said = (logits > math.log(END_WEIGHT)).float()
            parts |= {"end_loss": end_loss, "end_true": over.mean(), "end_predicted": said.mean(),
                      "end_right": (said * over).mean()}
        # Eq. 6 is a product over the places: its log-likelihood is their sum, here 36 means.
        places = codes[0, 0].numel()
        return (places * code_loss + reward_weight * heads_loss,
                {k: v.detach() for k, v in parts.items()})


@torch.no_grad()
def dream_step(dynamics, z, action, state, temperature=1.0, generator=None):
    """One step of imagination, the same in `dream`, in DreamEnv and wherever else one dreams.

    z float [B, D, 6, 6] embedded codes, action int64 [B], state as the dynamics returns it
    -> (next codes int64 [B, 6, 6], rewards float [B] in {-1, 0, 1}, ends bool [B], next state),
    all sampled; without a head for ends none ends.
    """
    code_logits, reward_logits, state = dynamics(z, action, state)
    reward = sample(reward_logits, generator=generator).float() - 1              # Eq. 7
    codes = sample(code_logits, temperature, generator)                          # Eq. 6
    end = torch.zeros_like(reward, dtype=torch.bool)
    if dynamics.end_head is not None:
        u = torch.rand(end.shape, device=end.device, generator=generator)
        end = u < dynamics.end_logits(action, state).sigmoid()
    return codes, reward, end, state


def policy_input(z, state, memory):
    """What the policy sees: embedded codes z [B, D, 6, 6] (Eq. 2), with memory also h of the second
    cell after the step before (Eq. 5), as further channels [B, D + C, 6, 6].
    """
    return torch.cat([z, state[1][0]], 1) if memory else z


@torch.no_grad()
def imagine(dynamics, embed, policy, codes, state, temperature=1.0, memory=False):
    """One step of `dream`: the policy acts on codes int64 [B, 6, 6], the model answers
    -> action [B], its log-probability [B], value [B], reward [B], end bool [B], next codes, state.
    """
    z = embed(codes)
    action_logits, value = policy(policy_input(z, state, memory))
    action_logits = action_logits.float()
    action = sample(action_logits)                                               # Eq. 8
    log_prob = action_logits.log_softmax(1).gather(1, action[:, None])[:, 0]
    next_codes, reward, end, state = dream_step(dynamics, z, action, state, temperature)
    return action, log_prob, value.float(), reward, end, next_codes, state


@torch.no_grad()
def dream(dynamics, embed, policy, start_codes, steps=50, temperature=1.0, memory=False,
          start_state=None, step=imagine):
    """Imagined experience: the only experience the policy is ever trained on (Section 3.4).

    start_codes  int64 [B, 6, 6]: codes of real observations, drawn at random from all that was
                 collected
    embed        codes -> embedding vectors [B, D, 6, 6]
    policy       embedding vectors -> (action logits [B, M], values [B])
    steps        T = 50; then every dreamed episode ends, unless the model predicts ends itself
    temperature  above 1 the next codes are drawn from a flatter distribution
                 (Ha & Schmidhuber, Table 2)
    memory       the policy sees h_{t-1} of the second cell too (`policy_input`)
    start_state  what the dynamics remembers of the real steps before the start, as it returned it
                 there (None: nothing, zeros)
    step         `imagine`, or the same compiled

    Returns a dict of tensors with time first: codes [T, B, 6, 6], actions [T, B],
    log_probs [T, B], values [T, B], rewards float [T, B] in {-1, 0, 1}, dones bool [T, B] (true in
    the last row only); last_value [B], the value after the last row: 0; with memory also
    memory [T, B, C, 6, 6], the h that the policy saw.

    If the dynamics predicts ends, dones are these, and an ended dream goes on as another one, from
    a random one of start_codes, so that no step is lost. After T steps the dream is only cut:
    last_value is the policy's own value of what was reached.
    """
    B, device = len(start_codes), start_codes.device
    if start_state is None:
        start_state = dynamics.initial_state(B)
    codes, state, rows = start_codes, start_state, []
    for _ in range(steps):
        h = (state[1][0],) if memory else ()
        *row, next_codes, state = step(dynamics, embed, policy, codes, state, temperature, memory)
        rows.append((codes, *row, *h))
        codes = next_codes
        if dynamics.end_head is not None:
            another, over = torch.randint(B, (B,), device=device), row[-1]       # over: bool [B]
            codes = torch.where(over[:, None, None], start_codes[another], codes)
            state = begin_again(state, over, start_state, another)
    names = ("codes", "actions", "log_probs", "values", "rewards", "dones", "memory")
    batch = {name: torch.stack(column) for name, column in zip(names, zip(*rows))}
    if dynamics.end_head is None:                # the last step is terminal (Section 3.4)
        batch["dones"][-1] = True
        return batch | {"last_value": torch.zeros(B, device=device)}
    last_value = policy(policy_input(embed(codes), state, memory))[1]
    return batch | {"last_value": last_value.float()}


@torch.no_grad()
def open_loop(dynamics, embed, codes, actions, context=4, temperature=1.0):
    """Dreams along real stretches, all of them side by side, under the real actions.

    codes    int64 [B, L, 6, 6]; the first `context` are seen, the others only give the length
    actions  int64 [B, L]; the last column is not read
    -> dreamed codes [B, L, 6, 6] (the first `context` are the real ones), rewards float [B, L - 1]
       in {-1, 0, 1}; both sampled, each step from the dreamed codes of the one before

        t          0    1    2    3  |  4    5   ..  53       context 4, L = 54
        codes    z_0  z_1  z_2  z_3  | z^_4 z^_5 .. z^_53     z^_4 is dreamed step 1, z^_53 step 50
        rewards  r^_0 r^_1 r^_2 r^_3   r^_4 ..  r^_52         r^_3 comes with z^_4: step 1
    """
    state, dreamed, rewards = dynamics.initial_state(len(codes)), [codes[:, 0]], []
    for t in range(codes.shape[1] - 1):
        following, reward, _, state = dream_step(dynamics, embed(dreamed[t]), actions[:, t], state,
                                                 temperature)
        dreamed.append(codes[:, t + 1] if t + 1 < context else following)
        rewards.append(reward)
    return torch.stack(dreamed, 1), torch.stack(rewards, 1)


class DreamEnv(gym.vector.VectorEnv):
    """The dream as an environment for any agent,
    "as if it were a real Gym environment" (Ha & Schmidhuber, 4.1).

    dynamics     a trained Dynamics
    vqvae        its .embed turns codes int64 [n, 6, 6] into vectors [n, D, 6, 6]: a VQVAE, or
                 whoever else knows what the dynamics was trained to read
    starts       int64 [S, 6, 6]: codes of real observations; every episode begins at a random one,
                 on whose device everything is computed
    num_envs     n dreams side by side
    steps        every episode has so many steps
    temperature  of the codes, as in `dream`
    start_state  what the dynamics remembers at each of the starts (None: nothing)

    Observations are embedded codes, float32 numpy [n, D, 6, 6]; actions int [n] in [0, M); rewards
    float64 [n] in {-1, 0, 1}. reset(seed=..) decides all that follows; torch's global random
    numbers stay untouched.

    The last step is *terminated*, not truncated: the paper's agent treats it as the end and adds no
    value of what would follow (Section 3.4, "Episodic Environments"; the `dones` of `dream`), so
    that an agent trained here solves the problem that the paper's agent solves. Who prefers to
    bootstrap finds the last observation in infos["final_obs"]. If the dynamics predicts ends, these
    are *terminated*, and an episode that lasts all `steps` is *truncated*.

    The step in which an episode ends already returns the observation of the new start
    (gymnasium's AutoresetMode.SAME_STEP): no step is wasted, and infos holds "final_obs" and
    "final_info" with their masks, as gymnasium's own vector environments do.

    Raises ValueError for settings that can't work, gymnasium.error.InvalidAction and ResetNeeded.
    """

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP, "render_modes": []}

    def __init__(self, dynamics, vqvae, starts, num_envs, steps=50, temperature=1.0,
                 start_state=None):
        starts = torch.as_tensor(starts)
        if starts.ndim != 3 or not len(starts) or starts.dtype != torch.int64:
            raise ValueError("starts must be codes, int64 [S, 6, 6], at least one")
        if not all(isinstance(n, (int, np.integer)) and n > 0 for n in (num_envs, steps)):
            raise ValueError("num_envs and steps must be whole numbers, more than 0")
        if not temperature > 0:
            raise ValueError("temperature must be more than 0")
        self.dynamics, self.embed, self.starts = dynamics, vqvae.embed, starts
        self.num_envs, self.steps, self.temperature = num_envs, steps, temperature
        self.start_state = start_state or dynamics.initial_state(len(starts))
        self.codes, self.generator = None, None
        self.single_observation_space = gym.spaces.Box(
            -np.inf, np.inf, tuple(self.embed(starts[:1]).shape[1:]), np.float32)
        self.single_action_space = gym.spaces.Discrete(dynamics.num_actions)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space,
                                                              num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed=None, options=None):
        """-> (observations [n, D, 6, 6], {}). Begins n new episodes; no options."""
        super().reset(seed=seed)
        if seed is not None or self.generator is None:
            self.generator = torch.Generator(self.starts.device)
            self.generator.manual_seed(int(self.np_random.integers(2**62)))
        self.codes = self.starts[:1].expand(self.num_envs, -1, -1)
        self.state = self.dynamics.initial_state(self.num_envs)
        self.elapsed = np.zeros(self.num_envs, np.int64)
        self._begin(np.ones(self.num_envs, bool))
        return self._observations(), {}

    def step(self, actions):
        """Actions int [n] -> (observations, rewards, terminations, truncations, infos)."""
        if self.codes is None:
            raise gym.error.ResetNeeded("call reset before step")
        actions = np.asarray(actions)
        # An action that does not exist would enter the dynamics as planes of zeros, unnoticed.
        if actions.dtype.kind not in "iu" or not self.action_space.contains(actions):
            raise gym.error.InvalidAction(f"actions must be {self.num_envs} whole numbers in "
                                          f"[0, {self.dynamics.num_actions})")
        action = torch.from_numpy(actions.astype(np.int64)).to(self.starts.device)
        self.codes, reward, end, self.state = dream_step(
            self.dynamics, self.embed(self.codes), action, self.state, self.temperature,
            self.generator)
        self.elapsed += 1
        terminated, truncated = end.cpu().numpy(), self.elapsed == self.steps
        if self.dynamics.end_head is None:
            terminated, truncated = truncated, terminated
        truncated &= ~terminated
        over, infos, observations = terminated | truncated, {}, self._observations()
        if over.any():
            for i in np.flatnonzero(over):
                infos = self._add_info(infos, {"final_obs": observations[i], "final_info": {}}, i)
            self._begin(over)
            observations = self._observations()
        return observations, reward.double().cpu().numpy(), terminated, truncated, infos

    def _begin(self, over):
        """Another episode from another start where over, bool [n]."""
        rows = self.np_random.integers(len(self.starts), size=self.num_envs)
        self.elapsed[over] = 0
        rows, over = (torch.from_numpy(a).to(self.starts.device) for a in (rows, over))
        self.codes = torch.where(over[:, None, None], self.starts[rows], self.codes)
        self.state = begin_again(self.state, over, self.start_state, rows)

    def _observations(self):
        return np.ascontiguousarray(self.embed(self.codes).detach().float().cpu().numpy())


def main():
    parser = argparse.ArgumentParser(description="Learn the dynamics of a small world "
                                                 "made of codes, and dream in it.")
    parser.add_argument("--updates", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="dynamics_dream.png")
    args = parser.parse_args()
    for name, low, high in ("updates", 1, 10**6), ("seed", 0, 2**31 - 1):
        if not low <= getattr(args, name) <= high:
            sys.exit(f"error: --{name} must be from {low} to {high}")
    if not args.out.endswith(".png"):
        sys.exit("error: --out must end in .png")
    open(args.out, "ab").close()                    # fails now, not after the work
    if not os.path.getsize(args.out):
        os.remove(args.out)
    os.environ["MPLBACKEND"] = "Agg"                # whatever a notebook or the user's settings say
    import matplotlib.pyplot as plt
    plt.rcdefaults()
    torch.manual_seed(args.seed)

    # A world of 6x6 cells with a runner (code 1) on empty ground (code 0). Actions 0..3 move it
    # up, down, left, right, as far as the walls allow; being in row 0 then pays 1, row 5 costs 1.
    moves = torch.tensor([[-1, 0], [1, 0], [0, -1], [0, 1]])
    K, D, L, B = 8, 8, 4, 16

    def play(batch, length):
        position = torch.randint(6, (batch, 2))
        actions = torch.randint(4, (batch, length))
        codes, rewards = (torch.zeros(batch, length, 36, dtype=torch.int64),
                          torch.zeros(batch, length))
        for t in range(length):
            codes[:, t].scatter_(1, (position[:, 0] * 6 + position[:, 1])[:, None], 1)
            position = (position + moves[actions[:, t]]).clamp(0, 5)
            rewards[:, t] = (position[:, 0] == 0).float() - (position[:, 0] == 5).float()
        return codes.view(batch, length, 6, 6), actions, rewards

    vectors = torch.randn(K, D)

    def embed(codes):
        return F.embedding(codes, vectors).permute(0, 3, 1, 2)

    dynamics = Dynamics(4, num_codes=K, code_dim=D, hidden=16)
    # As in train.py: the reward loss is scaled by 1e-6, Adam undoes the scale for the head alone;
    # at first all inputs are true codes, later the model reads its own samples.
    head = list(dynamics.reward_head.parameters())
    trunk = [p for name, p in dynamics.named_parameters() if not name.startswith("reward_head")]
    optimizer = torch.optim.Adam([{"params": trunk}, {"params": head, "eps": 1e-14}])
    ends = torch.zeros(B, L, dtype=torch.bool)
    start = time.time()
    for update in range(1, args.updates + 1):
        context = L if update < 0.8 * args.updates else 2
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - 0.95 * update / args.updates)
        loss, parts = dynamics.loss(*play(B, L), ends, embed, context, temperature=0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if update % 50 == 0 or update == 1:
            print(f"update {update:4d}  code loss {parts['code_loss']:.4f}  code accuracy "
                  f"{parts['code_accuracy']:.4f}  reward loss {parts['reward_loss']:.4f}  "
                  f"{time.time() - start:5.1f} s", flush=True)

    # Dream along 64 real stretches, of which the first frame is seen, and compare.
    codes, actions, rewards = play(64, 50)
    shown, films = list(range(0, 50, 4)) + [49], {"real": codes}
    print("50 frames dreamed from the first one, under the actions of real play. Right are")
    for temperature in (1.0, 0.5):
        dreamed, paid = open_loop(dynamics, embed, codes, actions, 1, temperature)
        films[f"dreamed, {temperature}"] = dreamed
        right = (dreamed == codes).flatten(2).all(2).float().mean(0)                     # [50]
        print(f"  at temperature {temperature}: after 1 step {right[1]:.0%} of the frames, after "
              f"10 {right[10]:.0%}, after 49 {right[49]:.0%}; of all rewards "
              f"{(paid == rewards[:, :-1]).float().mean():.0%}", flush=True)
    print("(The 36 codes of a frame are drawn one by one. A single unlikely draw adds a runner or\n"
          "loses him, and the dream goes on from there; a temperature below 1 makes them rarer.)",
          flush=True)
    figure, axes = plt.subplots(3, len(shown), figsize=(len(shown), 3.6), layout="tight",
                                subplot_kw={"xticks": [], "yticks": []})
    for row, (label, film) in zip(axes, films.items()):
        row[0].set_ylabel(label)
        for ax, t in zip(row, shown):
            ax.imshow(film[0, t].numpy(), cmap="tab10", vmin=0, vmax=9)
            ax.set_title(f"+{t}" if t else "seen", fontsize=8)
    figure.savefig(args.out, dpi=80)
    print(f"saved {args.out}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except (OSError, UnicodeError) as error:        # nowhere to write: a closed pipe, a full disk
        sys.stdout = None                           # or it is tried once more at the end
        sys.exit(f"error: {error}")
