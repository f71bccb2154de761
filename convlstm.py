"""One cell of a convolutional LSTM with layer normalisation and peepholes
(Section 3.3, "Dynamics").

An LSTM whose vectors have become maps [B, channels, 6, 6] and whose matrix products have become
convolutions (Shi et al., 2015): what happens at a place depends on what was near it. Per step t

    x_t ---- 5x5 conv --- LayerNorm --+                     W * x       "*" is a convolution
    h_{t-1} - 5x5 conv -- LayerNorm --+--> i, f, g, o       V * h       "." is elementwise
    c_{t-1} - peephole per channel ---+                     p . c

    i = sigmoid(LN(W_i * x) + LN(V_i * h) + p_i . c_{t-1} + b_i)        input gate
    f = sigmoid(LN(W_f * x) + LN(V_f * h) + p_f . c_{t-1} + b_f + 1)    forget gate, open at first
    g =    tanh(LN(W_g * x) + LN(V_g * h) + b_g)                        candidate
    c_t = f . c_{t-1} + i . g
    o = sigmoid(LN(W_o * x) + LN(V_o * h) + p_o . c_t + b_o)            output gate, sees the new c
    h_t = o . tanh(c_t)

    python convlstm.py        # learn to predict a bouncing ball, save the strip (about a minute)

Dimension key:  B batch   I input channels   C hidden channels   H = W = 6 (the map)   T steps
"""
import os
import signal
if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))     # Ctrl-C: no traceback, from now on

import argparse
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F


class ConvLSTMCell(nn.Module):
    """The recurrent dynamics p(h_t | z_t, a_t, h_{t-1}) of Table 1 stacks two of these.

    in_channels I, hidden_channels C, kernel_size odd, size (H, W) of the map (the layer norms have
    one weight per position, so it is fixed). On a 1x1 map without norms and peepholes this is
    nn.LSTMCell with a forget bias of 1.
    """

    def __init__(self, in_channels, hidden_channels, kernel_size=5, size=(6, 6)):
        super().__init__()
        self.hidden_channels, self.size = hidden_channels, tuple(size)
        gates = 4 * hidden_channels                                      # in the order i, f, g, o
        padding = kernel_size // 2
        self.conv_x = nn.Conv2d(in_channels, gates, kernel_size, padding=padding, bias=False)
        self.conv_h = nn.Conv2d(hidden_channels, gates, kernel_size, padding=padding, bias=False)
        # Input and state are normalised apart: else one would drown the other as scales drift.
        self.norm_x = nn.LayerNorm([gates, *self.size])
        self.norm_h = nn.LayerNorm([gates, *self.size])
        self.bias = nn.Parameter(torch.zeros(gates))
        self.peephole = nn.Parameter(torch.zeros(3, hidden_channels))    # i, f (old c), o (new c)

    def initial_state(self, batch):
        """(h, c) of zeros, each float32 [batch, C, H, W], on the cell's device."""
        shape = batch, self.hidden_channels, *self.size
        return self.bias.new_zeros(shape), self.bias.new_zeros(shape)

    def forward(self, x, state):
        """x float [B, I, H, W], state (h, c) each [B, C, H, W] in (-1, 1) and R
        -> the next (h, c).
        """
        h, c = state
        p_i, p_f, p_o = self.peephole[:, :, None, None]                  # each [C, 1, 1]
        gates = self.norm_x(self.conv_x(x)) + self.norm_h(self.conv_h(h)) + self.bias[:, None, None]
        i, f, g, o = gates.chunk(4, dim=1)                               # each [B, C, H, W]
        i = torch.sigmoid(i + p_i * c)
        f = torch.sigmoid(f + p_f * c + 1)
        c = f * c + i * torch.tanh(g)
        o = torch.sigmoid(o + p_o * c)
        return o * torch.tanh(c), c


def bouncing_balls(batch, steps, size=12):
    """Synthetic film float32 [B, T, 1, size, size]: a blurred ball that bounces off four walls."""
    position = 1 + torch.rand(batch, 2) * (size - 3)
    angle = torch.rand(batch) * 6.2832
    velocity = torch.stack([angle.cos(), angle.sin()], 1)                # one pixel a step
    grid = torch.arange(size).float()
    film = []
    for _ in range(steps):
        position = position + velocity
        hit = (position < 1) | (position > size - 2)
        velocity = torch.where(hit, -velocity, velocity)
        position = position.clamp(1, size - 2)
        d2 = ((grid[None, :, None] - position[:, :1, None]) ** 2
              + (grid[None, None] - position[:, 1:, None]) ** 2)
        film.append(torch.exp(-d2 / 1.5))
    return torch.stack(film, 1)[:, :, None]


def main():
    parser = argparse.ArgumentParser(description="A ConvLSTM cell learns to predict "
                                                 "a bouncing ball.")
    parser.add_argument("--updates", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="convlstm_ball.png")
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

    # Watch 5 frames, then live on one's own predictions: the dream of the paper in miniature.
    size, watch, total = 12, 5, 20
    cell = ConvLSTMCell(1, 16, size=(size, size))
    head = nn.Conv2d(16, 1, 1)
    optimizer = torch.optim.Adam([*cell.parameters(), *head.parameters()], lr=3e-3)

    def predict(film):
        state, x, out = cell.initial_state(len(film)), film[:, 0], []
        for t in range(total - 1):
            state = cell(x, state)
            out.append(head(state[0]))                                   # logits of frame t + 1
            x = film[:, t + 1] if t + 1 < watch else torch.sigmoid(out[-1])
        return torch.stack(out, 1)                                       # [B, T-1, 1, size, size]

    start = time.time()
    for update in range(1, args.updates + 1):
        film = bouncing_balls(16, total)
        loss = F.binary_cross_entropy_with_logits(predict(film), film[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(cell.parameters(), 1.0)
        optimizer.step()
        if update % 50 == 0 or update == 1:
            print(f"update {update:4d}  loss {loss.item():.4f}  {time.time() - start:5.1f} s",
                  flush=True)

    with torch.no_grad():
        film = bouncing_balls(64, total)
        dreamed = torch.sigmoid(predict(film))
        error = (dreamed - film[:, 1:]).square().sum((2, 3, 4)).mean(0)          # [T-1]
        still = (film[:, watch - 1:watch] - film[:, 1:]).square().sum((2, 3, 4)).mean(0)
    print("squared error of the prediction, and of 'the ball stays where it was last seen':")
    for t in (watch - 1, watch + 1, watch + 4, total - 2):
        print(f"  {t - watch + 2:2d} steps after the last real frame: {error[t]:.2f}   "
              f"still: {still[t]:.2f}", flush=True)

    figure, axes = plt.subplots(2, total - 1, figsize=(total - 1, 2.4))
    for t in range(total - 1):
        axes[0, t].imshow(film[0, t + 1, 0].numpy(), cmap="gray", vmin=0, vmax=1)
        axes[1, t].imshow(dreamed[0, t, 0].numpy(), cmap="gray", vmin=0, vmax=1)
        axes[0, t].set_title("seen" if t + 1 < watch else f"+{t + 2 - watch}", fontsize=8)
        for ax in axes[:, t]:
            ax.set_xticks([]), ax.set_yticks([])
    axes[0, 0].set_ylabel("real")
    axes[1, 0].set_ylabel("predicted")
    figure.tight_layout()
    figure.savefig(args.out, dpi=80)
    print(f"saved {args.out}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except (OSError, UnicodeError) as error:        # nowhere to write: a closed pipe, a full disk
        sys.stdout = None                           # or it is tried once more at the end
        sys.exit(f"error: {error}")
