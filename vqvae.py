"""The observation model: a VQ-VAE with continuous Bernoulli outputs (Section 3.3, Figure 2).

    x_t  four stacked grey frames, 96x96            p(z_t | x_t)   encoder + nearest code
    z_t  6x6 matrix of code indices in [0, 128)     p(x_t | z_t)   decoder + continuous Bernoulli

      x [B,4,96,96] --encoder--> z_e [B,32,6,6] --nearest of 128 codes--> codes [B,6,6]
                                                                             | look up
      logits [B,4,96,96] <------------decoder------------- z_q [B,32,6,6] <--+

36 codes of 7 bits for 36,864 pixels: what they forget is lost to the dynamics and the policy, who
see nothing else. Look at the reconstruction before anything else.

    python vqvae.py      # learn Boxing from random play in two minutes, save a picture to look at

Dimension key:  B batch   C = 4 frames   H = W = 96 pixels   D = 32 code dimensions   K = 128 codes
                N = B * 36 code positions         (channels: those of Table 3's counts)
"""
import os
import signal
if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))     # Ctrl-C: no traceback, from now on

import argparse
import difflib
import math
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F


class ResidualBlock(nn.Module):
    """x + [3x3, (norm), ReLU, 1x1, (norm)](x), then ReLU. The decoder's blocks have no norm."""

    def __init__(self, channels, norm):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels) if norm else nn.Identity()

    def forward(self, x):
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(h)))


def encoder_trunk(in_channels, code_dim, widths):
    """[B,4,96,96] -> [B,32,6,6]: four strided convolutions, two residual blocks, a 1x1."""
    layers, c_in = [], in_channels
    for c in widths:                                        # 96 -> 48 -> 24 -> 12 -> 6
        layers += [nn.Conv2d(c_in, c, 4, 2, 1, bias=False), nn.BatchNorm2d(c), nn.ReLU()]
        c_in = c
    # Figure 2 has a ReLU after the last convolution as well; codes had better have both signs.
    return nn.Sequential(*layers, ResidualBlock(c, norm=True), ResidualBlock(c, norm=True),
                         nn.Conv2d(c, code_dim, 1, bias=False), nn.BatchNorm2d(code_dim))


def decoder_trunk(out_channels, code_dim, widths):
    """[B,32,6,6] -> logits [B,4,96,96]: the encoder backwards (transposed), without norms."""
    c = widths[-1]
    layers = [nn.Conv2d(code_dim, c, 3, padding=1, bias=False), nn.ReLU(),
              ResidualBlock(c, norm=False), ResidualBlock(c, norm=False)]
    for c_out in [*reversed(widths[:-1]), out_channels]:    # 6 -> 12 -> 24 -> 48 -> 96
        layers += [nn.ConvTranspose2d(c, c_out, 4, 2, 1), nn.ReLU()]
        c = c_out
    decoder = nn.Sequential(*layers[:-1])                   # the last layer's outputs are logits

    # Without norms the decoder's signal lives on its initial weights alone. PyTorch's default would
    # shrink its variance six times a layer; He et al. (2015) keeps it. (The paper is silent on it.)
    for layer in decoder.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
        elif isinstance(layer, nn.ConvTranspose2d):
            nn.init.normal_(layer.weight, std=math.sqrt(2 / (4 * layer.in_channels)))   # 4x4 / 2^2
            nn.init.zeros_(layer.bias)
    with torch.no_grad():
        decoder[-1].weight *= 0.3                           # the first picture is nearly even
        decoder[2].conv2.weight.zero_(), decoder[3].conv2.weight.zero_()    # blocks: the identity
    return decoder


class Codebook(nn.Module):
    """The quantiser of van den Oord et al. (2017): K vectors of D dimensions, moved by averages
    instead of gradients (Appendix A.1). Each code follows the mean of the encoder outputs assigned
    to it; n_i of this batch's vectors are nearest to code i, their sum is s_i:
        N_i <- decay N_i + (1 - decay) n_i    m_i <- decay m_i + (1 - decay) s_i    e_i = m_i / N_i

    Both averages start at zero and are divided by 1 - decay^t, as Adam does. (The released code
    corrects m alone, which multiplies the codes by 1 / (1 - decay) = 100 in the first updates.)
    Table 3 counts the codes, both m's, N and t: 128*32 + 2*128*32 + 128 + 1 = 12,417.
    """

    def __init__(self, num_codes=128, code_dim=32, decay=0.99, eps=1e-5):
        super().__init__()
        self.decay, self.eps = decay, eps
        # Mean 0 and variance 1, as the encoder's outputs have: it ends in a batch norm.
        self.register_buffer("codes", torch.randn(num_codes, code_dim))          # e  [K, D]
        self.register_buffer("sums", torch.zeros(num_codes, code_dim))           # m  [K, D]
        self.register_buffer("sums_debiased", torch.zeros(num_codes, code_dim))  #    [K, D]
        self.register_buffer("usage", torch.zeros(num_codes))                    # N  [K]
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))         # t

    def nearest(self, z):
        """Vectors [N, D] -> indices int64 [N] of the nearest code in Euclidean distance."""
        # |z - e|^2 = |z|^2 - 2 z.e + |e|^2, and |z|^2 is the same for every code.
        return (self.codes.square().sum(1) - 2 * z @ self.codes.T).argmin(1)

    def update(self, z, assigned):
        """One EMA step. z [N, D] encoder outputs, assigned [N, K] one-hot rows of their codes."""
        self.step += 1
        correction = 1 - self.decay ** self.step
        self.usage.lerp_(assigned.sum(0), 1 - self.decay)
        self.sums.lerp_(assigned.T @ z, 1 - self.decay)
        self.sums_debiased.copy_(self.sums / correction)
        # A code nobody used would be 0 / 0. Laplace smoothing gives every code eps vectors more.
        usage = self.usage / correction
        usage = (usage + self.eps) / (usage.sum() + len(usage) * self.eps) * usage.sum()
        self.codes.copy_(self.sums_debiased / usage[:, None])


# ---- The continuous Bernoulli (Loaiza-Ganem and Cunningham, 2019), written in logits -------------
# A pixel x in [0, 1] is no coin flip: the Bernoulli likelihood does not integrate to one over it.
# The continuous Bernoulli divides by the integral. In the logit l it is an exponential family:
#     p(x | l) = exp(x l) / A(l),     A(l) = integral_0^1 exp(x l) dx = (exp(l) - 1) / l
# from which everything follows:  -log p = log A(l) - x l   and   d(-log p)/dl = mean(l) - x.
#     logit l      -15.9    -2      0      2     15.9
#     mean          0.063   0.343   0.5   0.657  0.937      the picture to show, and not
#     sigmoid(l)    0.000   0.119   0.5   0.881  1.000      which is the usual mistake
#
# torch has it: .log_prob(x) and .mean of torch.distributions.ContinuousBernoulli(logits=l). The two
# functions below replace them in 0.4 of the time (with gradient), right to 1e-6 in float32 (near
# l = 0 torch's mean and gradient are 0.002 off). How stands below the VQVAE, not needed here.


def continuous_bernoulli_nll(logits, x):
    """-log p(x | l), elementwise, in nats (negative values are densities > 1). Section 3.3.
    logits any real, x in [0, 1], floats of one shape; exact from -60 through 0 to 60 and beyond.
    """
    return _ContinuousBernoulliNLL.apply(logits, x)


def continuous_bernoulli_mean(logits):
    """E[x] under the continuous Bernoulli: 1 / (1 - exp(-l)) - 1 / l, any shape, in (0, 1)."""
    return 0.5 + _mean_minus_half(logits)


class VQVAE(nn.Module):
    """Observation encoder p(z | x) and decoder p(x | z) of Table 1.
    width scales the hidden channels (1.0: Table 3), not the codes: who uses those does not notice.
    """

    def __init__(self, in_channels=4, num_codes=128, code_dim=32, width=1.0, commitment=0.25):
        super().__init__()
        widths = [max(4, round(c * width)) for c in (32, 64, 128, 256)]
        self.encoder = encoder_trunk(in_channels, code_dim, widths)
        self.codebook = Codebook(num_codes, code_dim)
        self.decoder = decoder_trunk(in_channels, code_dim, widths)
        self.commitment = commitment

    def features(self, x):
        """Images [B,C,H,W], uint8 or float in [0,1] -> encoder outputs z_e, float32 [B,D,6,6]."""
        return self.encoder(to_unit(x)).float()

    def quantise(self, z_e):
        """z_e [B,D,6,6] -> (codes int64 [B,6,6], the same vectors as rows [N,D])."""
        B, D, h, w = z_e.shape
        flat = z_e.permute(0, 2, 3, 1).reshape(-1, D)                       # [N, D]
        with full_precision(z_e.device):                                    # distances need it
            return self.codebook.nearest(flat).view(B, h, w), flat

    @torch.no_grad()
    def encode(self, x):
        """Observations [B,C,H,W], uint8 or float in [0,1] -> codes int64 [B,6,6], z ~ p(z | x).
        With the batch norms' running averages: the same codes whatever else is in the batch.
        """
        training = self.training
        codes, _ = self.eval().quantise(self.features(x))
        self.train(training)
        return codes

    def embed(self, codes):
        """Codes int64 [B,6,6] -> vectors float32 [B,D,6,6]: what dynamics and policy see."""
        return F.embedding(codes, self.codebook.codes).permute(0, 3, 1, 2)

    @torch.no_grad()
    def start_at_brightness(self, mean):
        """Before training: makes the first pictures as bright as this, a scalar tensor in [0, 1].
        1 / (1 - m) - 1 / m is nearly the logit whose mean is m, and in dark games far beyond the
        clamp. Adam would take thousands of steps there, or back.
        """
        logit = 1 / (1 - mean) - 1 / mean
        self.decoder[-1].bias.fill_(logit.clamp(-MAX_LOGIT, MAX_LOGIT))

    def logits(self, z_q):
        """Embedded codes [B,D,6,6] -> logits float32 [B,C,H,W] within +-MAX_LOGIT."""
        return _Clamp.apply(self.decoder(z_q).float())

    @torch.no_grad()
    def decode(self, codes):
        """Codes int64 [B,6,6] -> images float32 [B,C,H,W] in [0,1]: the mean of p(x | z)."""
        return continuous_bernoulli_mean(self.logits(self.embed(codes)))

    def loss(self, x, weight=None):
        """-ELBO + commitment on observations [B,C,H,W], uint8 or float in [0,1] -> (scalar, dict).
        Only in training mode the codebook moves. weight [B,C,H,W] multiplies each pixel's -log p in
        the scalar (None: the ELBO proper), never in the parts: detached scalars, nats if not said,
          elbo            -reconstruction - kl; reconstruction: -log p(x | z), all pixels' sum
          kl              36 log 128 = 174.67: p(z | x) is certain, the prior uniform (Section 3.4)
          commitment      mean of (z_e - z_q)^2 over elements, before its weight 0.25
          usage           share of the K codes in this batch; perplexity: exp(their entropy)
        """
        assert x.dtype == torch.uint8 or x.is_cuda or 0 <= x.min() and x.max() <= 1, \
            "floats must be in [0, 1]"                      # (a look at CUDA's would wait for it)
        x = to_unit(x)
        z_e = self.features(x)                                                   # [B, D, 6, 6]
        codes, flat = self.quantise(z_e)
        z_q = self.embed(codes)
        # The encoder is drawn to its codes; these follow by moving average, without a gradient.
        commitment = F.mse_loss(z_e, z_q.detach())
        # Straight-through: forward z_q, backward as if the quantiser were the identity.
        z_st = z_e + (z_q - z_e).detach()

        pixels = continuous_bernoulli_nll(self.logits(z_st), x)                  # [B, C, H, W]
        nll = pixels.sum() / len(x)
        weighted = nll if weight is None else (pixels * weight).sum() / len(x)
        K = len(self.codebook.codes)
        kl = codes[0].numel() * math.log(K)
        with torch.no_grad(), full_precision(x.device):
            assigned = (codes.view(-1, 1) == torch.arange(K, device=x.device)).float()  # [N, K]
            if self.training:
                self.codebook.update(flat.detach(), assigned)
            share = assigned.mean(0)                                             # [K]
            parts = {"elbo": -(nll + kl), "reconstruction": nll, "kl": torch.full_like(nll, kl),
                     "commitment": commitment, "usage": (share > 0).float().mean(),
                     "perplexity": torch.exp(-torch.xlogy(share, share).sum())}
        loss = weighted + kl + self.commitment * commitment
        return loss, {k: v.detach() for k, v in parts.items()}


def full_precision(device):
    """float32 inside an autocast region. (`meta`, torch's device without numbers, has none.)"""
    return torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)


def to_unit(x):
    """uint8 images 0..255 -> float32 in [0, 1], on their device; floats pass."""
    return x.float() / 255 if x.dtype == torch.uint8 else x


# Through l = 0 the closed forms are 0/0 and lose digits, so for |l| < 1 the Taylor series takes
# over. Each branch gets an argument clamped to where it is sound, and lerp with a weight of 0 or 1
# picks one (on a CPU some 30 times faster than torch.where). The gradient is a closed form as well.


def _mean_minus_half(logits):
    """1 / (1 - exp(-l)) - 1 / l - 1/2: odd, accurate to the last digits also where it is tiny."""
    a = logits.abs()
    big, s = a.clamp(min=1), logits.clamp(-1, 1)
    exact = torch.copysign(-1 / torch.expm1(-big) - 1 / big - 0.5, logits)
    s2 = s * s
    series = s * (1 / 12 - s2 * (1 / 720 - s2 * (1 / 30240 - s2 * (1 / 1209600 - s2 / 47900160))))
    return torch.lerp(exact, series, (a < 1).to(a.dtype))


class _ContinuousBernoulliNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, x):
        ctx.save_for_backward(logits, x)
        a = logits.abs()
        big, s = a.clamp(min=1), logits.clamp(-1, 1)
        # log A(l) = max(l, 0) + log((1 - exp(-|l|)) / |l|)
        exact = logits.clamp(min=0) - logits * x + torch.log(-torch.expm1(-big) / big)
        # log A(l) = l/2 + S(l), S even:  -log p = l (1/2 - x) + l^2/24 - l^4/2880 + ...
        s2 = s * s
        series = s * (0.5 - x) + s2 * (1 / 24 - s2 * (1 / 2880 - s2 * (1 / 181440 - s2 / 9676800)))
        return torch.lerp(exact, series, (a < 1).to(a.dtype))

    @staticmethod
    def backward(ctx, grad):
        logits, x = ctx.saved_tensors
        grad_x = -logits * grad if ctx.needs_input_grad[1] else None
        return (_mean_minus_half(logits) + (0.5 - x)) * grad, grad_x         # mean - x


# At x = 0 and x = 1 the likelihood has no maximum. Atari is full of black; driving its logits to
# minus infinity would drown all else. So they end at +-15.9, as torch.distributions' probabilities
# do (at 1 - 2^-23). A plain clamp has no gradient beyond: black could not learn the ball in front
# of it. Ours leads back (at x = 0.3, l = -20: -0.237, as at the end; torch.distributions': -0.3).
MAX_LOGIT = 15.9


class _Clamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits):
        ctx.save_for_backward(logits)
        return logits.clamp(-MAX_LOGIT, MAX_LOGIT)

    @staticmethod
    def backward(ctx, grad):
        logits, = ctx.saved_tensors                         # descent moves them along -grad
        outwards = ((logits > MAX_LOGIT) & (grad < 0)) | ((logits < -MAX_LOGIT) & (grad > 0))
        return grad * ~outwards


# ---- What moves: the preset `small` weighs it more; how much of it does a reconstruction lose? ---
# A ball of 3 pixels is worth 13 nats of 11,000, and only once it is drawn in the right place: its
# cell of 16x16 pixels alone gains next to nothing, so plain likelihood hardly ever learns it.
# Foreground is what differs from the background, each pixel's median over many frames of the game:
# second row of the picture of `python vqvae.py`. In `loss` its pixels get the weight 1 + n.


def is_foreground(x, background):
    """Pixels more than 10 of 255 levels off it: uint8 [..,H,W], uint8 [H,W] -> bool [..,H,W]."""
    return (x.int() - background.int()).abs() > 10


def foreground_error(images, reconstructions):
    """How much of what moves is lost: 0 nothing, 1 all, as if only the background (here the batch's
    median) were shown. Both squared, where an image is more than 0.04 off the background. (Over all
    pixels Pong without a ball looks perfect.) float [B,C,H,W] in [0,1], twice -> scalar.
    """
    background = images.median(0, keepdim=True).values
    foreground = (images - background).abs() > 0.04
    error = ((reconstructions - images).square() * foreground).sum()
    return error / ((background - images).square() * foreground).sum().clamp(min=1e-8)


# ---- python vqvae.py: learn a game, look at what is left of it after 36 codes --------------------


def random_play(game, steps, seed):
    """Observations uint8 [steps, 4, 96, 96]; a stand-in for atari.py: this file can go alone."""
    import ale_py
    import gymnasium as gym
    gym.register_envs(ale_py)
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    ids = {key[4:-3].lower(): key for key in gym.registry if key[:4] + key[-3:] == "ALE/-v5"}
    plain = "".join(filter(str.isalnum, game.lower()))           # "Space Invaders", space_invaders
    if plain not in ids:
        near = difflib.get_close_matches(plain, ids, cutoff=0.5) or ["pong", "freeway", "breakout"]
        near = ", ".join(ids[key][4:-3] for key in near)
        sys.exit(f"error: unknown game {game!r}; the nearest names: {near}")
    env = gym.make(ids[plain], frameskip=4, repeat_action_probability=0.0, obs_type="grayscale")
    env = gym.wrappers.FrameStackObservation(env, 4)
    env.action_space.seed(seed)
    observations, (x, _) = torch.zeros(steps, 4, 96, 96, dtype=torch.uint8), env.reset(seed=seed)
    for row in observations:
        x = torch.from_numpy(x)[None].float()                                   # [1, 4, 210, 160]
        row[:] = F.interpolate(x, 96, mode="area")[0].round()
        x, _, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            x, _ = env.reset()
    return observations


def main():
    parser = argparse.ArgumentParser(description="Learn a VQ-VAE of an Atari game, save pictures.")
    parser.add_argument("--game", default="Boxing")
    parser.add_argument("--updates", type=int, default=700, help="gradient steps, 0.1 s each")
    parser.add_argument("--width", type=float, default=0.5, help="channels, times those of Table 3")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="the picture (default: vqvae_<game>.png)")
    args = parser.parse_args()
    for name, low, high in ("updates", 1, 10**6), ("width", 0.01, 4), ("seed", 0, 2**31 - 1):
        if not low <= getattr(args, name) <= high:
            sys.exit(f"error: --{name} must be from {low} to {high}")
    out = args.out or f"vqvae_{args.game}.png"
    if not out.endswith(".png"):
        sys.exit("error: --out must end in .png")
    open(out, "ab").close()                         # fails now, not after two minutes
    if not os.path.getsize(out):
        os.remove(out)
    os.environ["MPLBACKEND"] = "Agg"                # whatever a notebook or the user's settings say
    import matplotlib.pyplot as plt
    plt.rcdefaults()
    torch.manual_seed(args.seed)

    observations, new = random_play(args.game, 3000, args.seed).tensor_split([2700])
    background = observations[::4, 3].median(0).values                           # [H, W]
    model = VQVAE(width=args.width)
    model.start_at_brightness(background.float().mean() / 255)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for update in range(args.updates):
        extra = 40 if update < args.updates / 2 else 4                  # what moves first, then all
        x = observations[torch.randint(len(observations), (12,))]
        loss, parts = model.loss(x, 1 + extra * is_foreground(x, background))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if update % 50 == 0 or update == args.updates - 1:
            print(f"update {update:4d}  elbo {parts['elbo']:8.0f}  of 128 codes in use "
                  f"{128 * parts['usage']:3.0f}  perplexity {parts['perplexity']:3.0f}", flush=True)

    codes = model.encode(new)
    images = model.decode(codes)
    whole, field = (foreground_error(new[:, :, rows] / 255, images[:, :, rows])
                    for rows in (slice(96), slice(16, 80)))
    print(f"foreground error (0 perfect, 1 background only) on 300 frames not learned from: "
          f"{whole:.2f}\nin rows 16 to 79, the playing field without scores: {field:.2f}")
    figure, axes = plt.subplots(4, 8, figsize=(14, 7.4), layout="tight",
                                subplot_kw={"xticks": [], "yticks": []})
    for row, label, top, pixels in zip(
            axes, ("original", "foreground", "36 codes", "reconstruction"), (255, 1, 127, 1),
            (new[:, 3], is_foreground(new[:, 3], background), codes, images[:, 3])):
        row[0].set_ylabel(label)
        for ax, image in zip(row, pixels[::40].numpy()):
            ax.imshow(image, cmap="nipy_spectral" if top == 127 else "gray", vmin=0, vmax=top)
    figure.savefig(out, dpi=80)
    print(f"saved {out}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except (OSError, UnicodeError) as error:        # nowhere to write: a closed pipe, a full disk
        sys.stdout = None                           # or it is tried once more at the end
        sys.exit(f"error: {error}")
