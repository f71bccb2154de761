"""V: the variational autoencoder that turns each frame into a small vector z (Section 2, Appendix
A.1).

    x   64x64 colour frame, 12,288 numbers          q(z | x) = N(mu, exp(logvar))     encoder
    z   32 numbers (car) or 64 (Doom)               p(x | z) = N(x^, I), up to scale  decoder

      x [B,3,64,64] --conv--> 31x31x32 --conv--> 14x14x64 --conv--> 6x6x128 --conv--> 2x2x256
                                                                                         | linear
      x^ [B,3,64,64] <-- 30x30x32 <-- 13x13x64 <-- 5x5x128 <-- 1x1x1024 <--linear-- z <-- mu, logvar
                     ----------- transposed convolutions -----------

All that M and C ever learn of the world passes through z, so what z forgets is lost: look at the
reconstruction before anything else.

    python vae.py        # learn frames of CarRacing for a minute, save pictures of them

Dimension key:  B batch   Z = z_size, 32 or 64   3 colours   H = W = 64 pixels
"""
import argparse
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F


class VAE(nn.Module):
    """4,348,547 parameters with z_size 32, 4,446,915 with 64 (Appendix A.1).

    Frames, wherever they enter: uint8 [B, 64, 64, 3] as environments give them, or float
    [B, 3, 64, 64] in [0, 1]. Raises ValueError for anything else.
    """

    def __init__(self, z_size=32):
        super().__init__()
        self.z_size = z_size
        # Nothing is padded: 64 -> 31 -> 14 -> 6 -> 2, and 1 -> 5 -> 13 -> 30 -> 64.
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 32, 4, stride=2), nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2), nn.ReLU(),
            nn.Conv2d(64, 128, 4, stride=2), nn.ReLU(),
            nn.Conv2d(128, 256, 4, stride=2), nn.ReLU(), nn.Flatten())           # [B, 1024]
        self.mu = nn.Linear(1024, z_size)
        self.logvar = nn.Linear(1024, z_size)
        self.decoder = nn.Sequential(
            nn.Linear(z_size, 1024), nn.Unflatten(1, (1024, 1, 1)),              # no activation
            nn.ConvTranspose2d(1024, 128, 5, stride=2), nn.ReLU(),
            nn.ConvTranspose2d(128, 64, 5, stride=2), nn.ReLU(),
            nn.ConvTranspose2d(64, 32, 6, stride=2), nn.ReLU(),
            nn.ConvTranspose2d(32, 3, 6, stride=2), nn.Sigmoid())

    def encode(self, x):
        """Frames -> mu, logvar of q(z | x), each float [B, Z]."""
        h = self.encoder(pixels(x))
        return self.mu(h), self.logvar(h)

    def sample(self, mu, logvar, generator=None):
        """z = mu + sigma * epsilon, float [B, Z]; generator of epsilon: torch's own if None."""
        epsilon = torch.randn(mu.shape, device=mu.device, dtype=mu.dtype, generator=generator)
        return mu + (logvar / 2).exp() * epsilon

    def decode(self, z):
        """z float [B, Z] -> pictures float [B, 3, 64, 64] in (0, 1)."""
        return self.decoder(z)

    def loss(self, x, generator=None):
        """The negative evidence lower bound, up to scale and constants -> (scalar, dict of parts).

        Both terms are sums per frame and means over the batch. As in the code behind the paper the
        divergence costs nothing below 0.5 nats per dimension of z: it is clipped as a whole, so
        that z may spend its Z / 2 nats on whichever dimensions it likes.

        Parts, detached: error (squared, per frame), kl (nats per frame, not clipped).
        """
        x = pixels(x)
        mu, logvar = self.encode(x)
        error = (self.decode(self.sample(mu, logvar, generator)) - x).square().sum((1, 2, 3))
        # KL(N(mu, sigma^2) || N(0, 1)) = (mu^2 + sigma^2 - 1 - log sigma^2) / 2
        kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1)              # [B]
        loss = (error + kl.clamp(min=0.5 * self.z_size)).mean()
        return loss, {"error": error.mean().detach(), "kl": kl.mean().detach()}


def pixels(x):
    """uint8 [B, 64, 64, 3] -> float [B, 3, 64, 64] in [0, 1]; a float [B, 3, 64, 64] stays itself.
    """
    if x.dtype == torch.uint8 and x.shape[1:] == (64, 64, 3):
        return x.permute(0, 3, 1, 2).float() / 255
    if x.is_floating_point() and x.shape[1:] == (3, 64, 64):
        return x
    raise ValueError(f"frames must be uint8 [B, 64, 64, 3] or float [B, 3, 64, 64], "
                     f"not {x.dtype} {list(x.shape)}")


def car_frames(count, seed=0):
    """uint8 [count, 64, 64, 3] of a car that mostly accelerates and steers at random:
    the upper 84 of gymnasium's 96 rows (without the bar), shrunk to 64x64.
    """
    import gymnasium as gym
    try:
        env = gym.make("CarRacing-v3", max_episode_steps=250)
        env.reset(seed=seed)
    except (ImportError, gym.error.Error):
        sys.exit("error: CarRacing needs Box2D: pip install 'gymnasium[box2d]'")
    env.action_space.seed(seed)
    frames, step = [], 0
    while len(frames) < count:
        if step % 8 == 0:
            action = env.action_space.sample()
            action[1:] = action[1], 0                                            # no brake
        frame, _, terminated, truncated, _ = env.step(action)
        if step % 4 == 0:
            frames.append(torch.from_numpy(frame[:84]))
        if terminated or truncated:
            env.reset()
        step += 1
    env.close()
    x = torch.stack(frames).permute(0, 3, 1, 2).float()                          # [N, 3, 84, 96]
    x = F.interpolate(x, (64, 64), mode="area")
    return x.round().byte().permute(0, 2, 3, 1).contiguous()


def main():
    parser = argparse.ArgumentParser(description="Learn frames of CarRacing, save pictures "
                                                 "of them.")
    parser.add_argument("--seconds", type=float, default=60, help="of training")
    parser.add_argument("--frames", type=int, default=400, help="to learn from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="vae_car.png", help="the picture")
    args = parser.parse_args()
    if args.frames < 40 or args.seed < 0 or not 0 < args.seconds < float("inf"):
        sys.exit("error: --frames must be 40 or more, --seed 0 or more, --seconds more than 0")
    import matplotlib
    matplotlib.use("Agg", force=True)
    matplotlib.rcdefaults()
    import matplotlib.pyplot as plt
    torch.manual_seed(args.seed)

    print(f"collecting {args.frames} frames (gymnasium draws slowly)", flush=True)
    frames = car_frames(args.frames, args.seed)
    held_out = args.frames // 8                              # the last eighth is not trained on
    model = VAE(z_size=32)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    begun, update, shown, done = time.monotonic(), 0, 0, 0.0
    while done < 1:
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - 0.9 * done)
        loss, parts = model.loss(frames[torch.randint(args.frames - held_out, (32,))])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update += 1
        done = (time.monotonic() - begun) / args.seconds
        if done >= shown / 10:
            shown += 1
            print(f"update {update:5d}  squared error {parts['error']:7.2f} per frame  "
                  f"KL {parts['kl']:5.1f} nats", flush=True)

    # Frames that were never trained on: what is left of them after 32 numbers.
    x = pixels(frames[-held_out:])
    with torch.no_grad():
        images = model.decode(model.encode(x)[0])
    error = (images - x).square().sum((1, 2, 3)).mean()
    mean = (x.mean(0) - x).square().sum((1, 2, 3)).mean()
    print(f"held-out squared error {error:.2f} per frame; the mean frame has {mean:.2f}")
    figure, axes = plt.subplots(2, 8, figsize=(14, 3.8))
    for column, i in enumerate(torch.linspace(0, held_out - 1, 8).long()):
        for ax, pictures in zip(axes[:, column], (x, images)):
            ax.imshow(pictures[i].permute(1, 2, 0).numpy())
            ax.set(xticks=[], yticks=[])
    axes[0, 0].set_ylabel("original")
    axes[1, 0].set_ylabel("reconstruction")
    figure.tight_layout()
    figure.savefig(args.out, dpi=80)
    print(f"saved {args.out}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
