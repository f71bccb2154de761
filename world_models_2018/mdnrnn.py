"""M: the LSTM with a mixture density output that predicts what V will see next (Section 2,
Appendix A.2).

Time alignment. Step t has seen everything up to z_t and a_t, and predicts z_{t+1}:

    t           0           1           2
    z_t       z_0         z_1         z_2        what V makes of frame t
    a_t          a_0         a_1         a_2     action chosen at z_t, knowing (h, c) of step t-1
                /           /           /
    h, c   0 -->[LSTM] ---> [LSTM] ---> [LSTM] --> ...
                  |           |           |
               p(z_1)      p(z_2)      p(z_3)    and, for Doom, done_t: the player died after a_t

The future isn't one: a monster throws its fireball or does not. So each of the Z numbers gets a
mixture of K = 5 Gaussians of its own,

    p(z_i) = sum_k  pi_ik  N(z_i | mean_ik, std_ik^2)

and the temperature tau makes the draws from it bolder or tamer: pi from logits / tau, noise times
sqrt(tau). For two logits that differ by log 9:

    tau            0.1       0.5       1.0       1.3
    pi         1.0, 0.0  .99, .01   0.9, 0.1  .84, .16      tame dreams forget what is rare
    noise        0.32      0.71      1.00      1.14

    python mdnrnn.py     # learns a path that forks, and shows what a mixture is for (a minute)

Dimension key:  B batch   T steps   Z = z_size   A = action_size   H = hidden   K mixture components
"""
import argparse
import math
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

# A player of Doom dies once in 300 steps. Such a step counts ten times in the loss, as in the code
# behind the paper.
DONE_WEIGHT = 10.0


class MDNRNN(nn.Module):
    """422,368 parameters for the car (the defaults); 1,678,785 for Doom (64, 1, 512, 5, True).

    predict_done adds an output, the log-odds of done_t, and an input, the flag restart_t: 1 where
    another game begins with z_t.
    """

    def __init__(self, z_size=32, action_size=3, hidden=256, mixtures=5, predict_done=False):
        super().__init__()
        self.z_size, self.action_size, self.hidden = z_size, action_size, hidden
        self.mixtures, self.predict_done = mixtures, predict_done
        # An LSTM with one vector of biases: torch's own has two, one of them superfluous.
        self.input = nn.Linear(z_size + action_size + predict_done, 4 * hidden)
        self.recurrent = nn.Linear(hidden, 4 * hidden, bias=False)
        self.head = nn.Linear(hidden, 3 * mixtures * z_size + predict_done)

    def initial_state(self, batch):
        """(h, c) of zeros, each float [batch, H], on the model's device."""
        zeros = self.head.weight.new_zeros(batch, self.hidden)
        return zeros, zeros

    def forward(self, z, action, state, restart=None):
        """Reads T steps.

        z        float [B, T, Z]
        action   float [B, T, A]    a_t, chosen at z_t
        state    (h, c), each float [B, H], h in (-1, 1): what the step before left
        restart  [B, T], bool or 0 / 1: the state is zeros before this step (None: nowhere)
        -> log_pi, mean, log_std, each float [B, T, Z, K], of p(z_{t+1}); log-odds of done_t float
           [B, T], or None; the state after the last step
        """
        x = [z, action]
        if restart is not None:
            restart = restart.to(z.dtype)[..., None]                             # [B, T, 1]
        if self.predict_done:
            x.append(torch.zeros_like(z[..., :1]) if restart is None else restart)
        from_input = self.input(torch.cat(x, 2))                                 # [B, T, 4H]
        h, c = state
        hs = []
        for t, from_x in enumerate(from_input.unbind(1)):
            if restart is not None:
                h, c = h * (1 - restart[:, t]), c * (1 - restart[:, t])
            i, f, g, o = (from_x + self.recurrent(h)).chunk(4, 1)                # each [B, H]
            c = torch.sigmoid(f + 1) * c + torch.sigmoid(i) * torch.tanh(g)      # +1: open at first
            h = torch.sigmoid(o) * torch.tanh(c)
            hs.append(h)
        y = self.head(torch.stack(hs, 1))                                        # [B, T, 3KZ (+ 1)]
        y, done = (y[..., :-1], y[..., -1]) if self.predict_done else (y, None)
        logits, mean, log_std = y.unflatten(2, (3, self.z_size, self.mixtures)).unbind(2)
        return logits.log_softmax(3), mean, log_std, done, (h, c)

    def loss(self, z, action, next_z, done=None, restart=None, inside=None):
        """Maximum likelihood over T steps from a state of zeros -> (scalar, dict of parts).

        z, action  as in forward
        next_z   float [B, T, Z]    z_{t+1}
        done     [B, T], bool or 0 / 1: the player died after a_t. Needed with predict_done.
        restart  as in forward
        inside   [B, T], bool or 0 / 1: next_z belongs to the same game (None: wherever not done).
                 Elsewhere it can't be predicted and does not count.

        Parts, detached: z_loss (nats per number of z, the average over all that count); with
        predict_done also done_loss (nats per step, deaths counted DONE_WEIGHT times).
        """
        state = self.initial_state(len(z))
        log_pi, mean, log_std, done_logit, _ = self(z, action, state, restart)
        nats = -log_likelihood(next_z, log_pi, mean, log_std).mean(2)            # [B, T]
        if inside is None:
            inside = torch.ones_like(nats) if done is None else 1 - done.to(nats.dtype)
        inside = inside.to(nats.dtype)
        z_loss = (nats * inside).sum() / inside.sum().clamp(min=1)
        parts = {"z_loss": z_loss.detach()}
        if not self.predict_done:
            return z_loss, parts
        done = done.to(nats.dtype)
        # In this loss deaths are DONE_WEIGHT times as frequent as they are, and so are the odds to
        # be learned. What M itself says are the true ones, and dreams may draw deaths from them.
        done_loss = F.binary_cross_entropy_with_logits(
            done_logit + math.log(DONE_WEIGHT), done, weight=1 + (DONE_WEIGHT - 1) * done)
        return z_loss + done_loss, parts | {"done_loss": done_loss.detach()}


def log_likelihood(z, log_pi, mean, log_std):
    """log p(z_i), float [.., Z], of z float [.., Z] under mixtures [.., Z, K]."""
    # log sum_k exp(log pi_k + log N(z | mean_k, std_k^2)), never leaving the logarithms
    error = (z[..., None] - mean) * (-log_std).exp()                             # [.., Z, K]
    log_normal = -0.5 * error.square() - log_std - 0.5 * math.log(2 * math.pi)
    return (log_pi + log_normal).logsumexp(-1)


def sample(log_pi, mean, log_std, temperature=1.0, generator=None):
    """A draw from mixtures, each argument float [.., Z, K] -> float [.., Z].

    temperature tau > 0: pi from the logits divided by tau, the noise times sqrt(tau).
    generator: of the random numbers; torch's own if None.
    """
    like = dict(size=mean.shape[:-1], device=mean.device, dtype=mean.dtype, generator=generator)
    u, epsilon = torch.rand(**like), torch.randn(**like)                         # each [.., Z]
    # As many cumulative probabilities are at most u as there are components below the drawn one.
    cumulative = (log_pi / temperature).softmax(-1).cumsum(-1)[..., :-1]
    k = (cumulative <= u[..., None]).sum(-1, keepdim=True)                       # [.., Z, 1]
    mean, log_std = mean.gather(-1, k)[..., 0], log_std.gather(-1, k)[..., 0]
    return mean + log_std.exp() * math.sqrt(temperature) * epsilon


def forks(batch, steps, fork=5):
    """The toy: paths float [batch, steps, 1] that lead straight on for `fork` steps and then go up
    (seven of ten) or down, all a little shaken.
    """
    direction = torch.where(torch.rand(batch, 1) < 0.7, 1.0, -1.0)
    t = torch.arange(steps)
    path = direction * 0.2 * (t - fork + 1).clamp(min=0)
    return (path + 0.03 * torch.randn(batch, steps))[..., None]


@torch.no_grad()
def dream(model, path, steps, temperature=1.0):
    """path float [B, T, 1], the first real steps -> [B, T + steps, 1], the rest made up by M."""
    def no_action(z):
        return z.new_zeros(*z.shape[:2], 0)

    state = model.initial_state(len(path))
    z = path
    for _ in range(steps):
        log_pi, mean, log_std, _, state = model(z, no_action(z), state)
        z = sample(log_pi[:, -1:], mean[:, -1:], log_std[:, -1:], temperature)   # [B, 1, 1]
        path = torch.cat([path, z], 1)
    return path


def main():
    parser = argparse.ArgumentParser(description="A mixture of Gaussians keeps two futures apart "
                                                 "that one Gaussian averages.")
    parser.add_argument("--updates", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="mdnrnn_fork.png", help="the picture")
    args = parser.parse_args()
    if args.updates < 1:
        sys.exit("error: --updates must be 1 or more")
    import matplotlib
    matplotlib.use("Agg", force=True)
    matplotlib.rcdefaults()
    import matplotlib.pyplot as plt
    torch.manual_seed(args.seed)

    steps, seen = 16, 3
    models, started = {}, time.monotonic()
    for name, mixtures in (("five Gaussians", 5), ("one Gaussian", 1)):
        model = models[name] = MDNRNN(z_size=1, action_size=0, hidden=32, mixtures=mixtures)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for update in range(1, args.updates + 1):
            optimizer.param_groups[0]["lr"] = 3e-3 * (1 - 0.9 * update / args.updates)
            z = forks(64, steps)
            loss, _ = model.loss(z[:, :-1], z[:, :-1, :0], z[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_value_(model.parameters(), 1.0)
            optimizer.step()
            if update % 200 == 0 or update == 1:
                print(f"{name:14s}  update {update:4d}  {loss.item():7.3f} nats per number  "
                      f"{time.monotonic() - started:5.1f} s", flush=True)

    # Held-out paths: how likely does each model find them? Its own paths: where do they lead?
    held_out = forks(2000, steps)
    columns = [("real paths", held_out)]
    for name, model in models.items():
        with torch.no_grad():
            nats = -model.loss(held_out[:, :-1], held_out[:, :-1, :0], held_out[:, 1:])[0]
        print(f"{name}: log-likelihood of held-out paths {nats:.2f} nats per number")
        columns.append((name, dream(model, held_out[:, :seen], steps - seen)))
    columns.append(("five Gaussians, tau 0.1",
                    dream(models["five Gaussians"], held_out[:, :seen], steps - seen, 0.1)))
    ends = 0.2 * (steps - 5)
    print(f"where paths lead, {steps - seen} steps after the last real one:")
    figure, axes = plt.subplots(1, len(columns), figsize=(13, 3.2), sharey=True)
    for ax, (name, path) in zip(axes, columns):
        last = path[:, -1, 0]
        up, down = ((last - end).abs() < 0.4 for end in (ends, -ends))
        print(f"  {name:24s} up {up.float().mean():4.0%}   down {down.float().mean():4.0%}   "
              f"neither {(~up & ~down).float().mean():4.0%}")
        ax.plot(path[:100, :, 0].T, color="tab:blue", alpha=0.2)
        ax.axvline(seen - 1, color="grey", linestyle=":")
        ax.set(title=name, xlabel="step t")
    axes[0].set_ylabel("z")
    figure.tight_layout()
    figure.savefig(args.out, dpi=80)
    print(f"saved {args.out}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
