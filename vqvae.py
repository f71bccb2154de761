"""The observation model: a VQ-VAE with continuous Bernoulli outputs (Section 3.3, Figure 2).

    x_t  four stacked grey frames, 96x96            p(z_t | x_t)   encoder + nearest code
    z_t  6x6 matrix of code indices in [0, 128)     p(x_t | z_t)   decoder + continuous Bernoulli

      x [B,4,96,96] --encoder--> z_e [B,32,6,6] --nearest of 128 codes--> codes [B,6,6]
                                                                             | look up
      logits [B,4,96,96] <------------decoder------------- z_q [B,32,6,6] <--+

36 codes of 7 bits are 252 bits for 36,864 pixels. Everything after this file (dynamics, policy)
sees only the codes, so what the codes forget is lost:
look at the reconstruction before anything else.

    python vqvae.py --game Pong        # learn real frames for two minutes, save pictures of them

Dimension key:  B batch   C = 4 frames   H = W = 96 pixels   D = 32 code dimensions   K = 128 codes
                N = B * 36 code positions
"""
import argparse
import contextlib
import math
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

# --------------------------------------------------------------------------------------------------
# The continuous Bernoulli (Loaiza-Ganem and Cunningham, 2019), written in logits
# --------------------------------------------------------------------------------------------------
# A pixel x in [0, 1] is no coin flip: the Bernoulli likelihood does not integrate to one over it.
# The continuous Bernoulli divides by the integral. In the logit l it is an exponential family:
#
#     p(x | l) = exp(x l) / A(l),     A(l) = integral_0^1 exp(x l) dx = (exp(l) - 1) / l
#
# from which everything follows:  -log p = log A(l) - x l   and   d(-log p)/dl = mean(l) - x.
#
#     logit l      -15.9    -2      0      2     15.9
#     mean          0.063   0.343   0.5   0.657  0.937      the picture to show, and not
#     sigmoid(l)    0.000   0.119   0.5   0.881  1.000      which is the usual mistake


# Through l = 0 the closed forms are 0/0 and lose digits, so for |l| < 1 the Taylor series takes
# over. Each branch gets an argument clamped to where it is sound, and lerp with a weight of 0 or 1
# picks one (on a CPU some 30 times faster than torch.where).


def _mean_minus_half(logits):
    """1 / (1 - exp(-l)) - 1 / l - 1/2,
    an odd function, accurate to the last digits also where it is tiny.
    """
    a = logits.abs()
    big, s = a.clamp(min=1), logits.clamp(-1, 1)
    exact = torch.copysign(-1 / torch.expm1(-big) - 1 / big - 0.5, logits)
    s2 = s * s
    series = s * (1 / 12 - s2 * (1 / 720 - s2 * (1 / 30240 - s2 * (1 / 1209600 - s2 / 47900160))))
    return torch.lerp(exact, series, (a < 1).to(a.dtype))


def continuous_bernoulli_mean(logits):
    """E[x] under the continuous Bernoulli: 1 / (1 - exp(-l)) - 1 / l, any shape, in (0, 1)."""
    return 0.5 + _mean_minus_half(logits)


class _ContinuousBernoulliNLL(torch.autograd.Function):
    """The closed form with its closed-form gradient:
    several times faster than differentiating it.
    """

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


def continuous_bernoulli_nll(logits, x):
    """-log p(x | l) of the continuous Bernoulli, elementwise,
    in nats (negative values are densities > 1).

    logits  any real, float; exact and stable through 0 and to +-60 and beyond
    x       same shape, in [0, 1]
    The gradient to the logits is mean(logits) - x. Source: Loaiza-Ganem and Cunningham (2019),
    Section 3; the paper's Section 3.3.
    """
    return _ContinuousBernoulliNLL.apply(logits, x)


# At x = 0 and x = 1 the density has no maximum: a black pixel pushes its logit to minus infinity, and
# Atari is full of black: the decoder would learn nothing else. So the logits end at the logit of
# 1 - 2^-23, where torch.distributions, too, ends its float32 probabilities.
MAX_LOGIT = 15.9


class _Clamp(torch.autograd.Function):
    """Clamp to +-MAX_LOGIT whose gradient still passes where it leads back inside."""

    @staticmethod
    def forward(ctx, logits):
        ctx.save_for_backward(logits)
        return logits.clamp(-MAX_LOGIT, MAX_LOGIT)

    @staticmethod
    def backward(ctx, grad):
        logits, = ctx.saved_tensors                         # descent moves them along -grad
        outwards = ((logits > MAX_LOGIT) & (grad < 0)) | ((logits < -MAX_LOGIT) & (grad > 0))
        return grad * ~outwards


# --------------------------------------------------------------------------------------------------
# Encoder and decoder (Figure 2; channel counts from Table 3)
# --------------------------------------------------------------------------------------------------


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
    """[B,4,96,96] -> [B,32,6,6]:
    four strided convolutions, two residual blocks, one 1x1 convolution.
    """
    layers, c_in = [], in_channels
    for c in widths:                                        # 96 -> 48 -> 24 -> 12 -> 6
        layers += [nn.Conv2d(c_in, c, 4, stride=2, padding=1, bias=False), nn.BatchNorm2d(c),
                   nn.ReLU()]
        c_in = c
    layers += [ResidualBlock(c_in, norm=True), ResidualBlock(c_in, norm=True)]
    layers += [nn.Conv2d(c_in, code_dim, 1, bias=False), nn.BatchNorm2d(code_dim)]
    return nn.Sequential(*layers)


def decoder_trunk(out_channels, code_dim, widths):
    """[B,32,6,6] -> logits [B,4,96,96]: the encoder backwards, transposed convolutions, no norm."""
    c = widths[-1]
    layers = [nn.Conv2d(code_dim, c, 3, padding=1, bias=False), nn.ReLU()]
    layers += [ResidualBlock(c, norm=False), ResidualBlock(c, norm=False)]
    for c_out in [*reversed(widths[:-1]), out_channels]:    # 6 -> 12 -> 24 -> 48 -> 96
        layers += [nn.ConvTranspose2d(c, c_out, 4, stride=2, padding=1), nn.ReLU()]
        c = c_out
    decoder = nn.Sequential(*layers[:-1])                   # the last layer's outputs are logits

    # Without norms the decoder's signal lives on its initial weights alone. PyTorch's default would
    # shrink its variance six times a layer; He et al. (2015) keeps it. (The paper is silent on it.)
    # A stride of 2 leaves 4 of a transposed convolution's 16 taps for each output pixel.
    for layer in decoder.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
        elif isinstance(layer, nn.ConvTranspose2d):
            nn.init.normal_(layer.weight, std=math.sqrt(2 / (4 * layer.in_channels)))
            nn.init.zeros_(layer.bias)
    with torch.no_grad():
        decoder[-1].weight *= 0.3                           # the first picture is nearly even
        for block in decoder:
            if isinstance(block, ResidualBlock):
                block.conv2.weight.zero_()                  # and the blocks are the identity
    return decoder


# --------------------------------------------------------------------------------------------------
# The vector quantiser (van den Oord et al., 2017)
# --------------------------------------------------------------------------------------------------


class Codebook(nn.Module):
    """K vectors of D dimensions, moved by exponential moving averages instead of gradients.

    Each code follows the mean of the encoder outputs assigned to it: with n_i of this batch's
    vectors nearest to code i and their sum s_i (van den Oord et al., Appendix A.1),

        N_i <- decay N_i + (1 - decay) n_i    m_i <- decay m_i + (1 - decay) s_i    e_i = m_i / N_i

    Both averages start at zero and are divided by 1 - decay^t, as Adam does.
    (The authors' released code corrects m alone, which multiplies the codes by
    1 / (1 - decay) = 100 in the first updates.)
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
        total, num_codes = usage.sum(), len(usage)
        usage = (usage + self.eps) / (total + num_codes * self.eps) * total
        self.codes.copy_(self.sums_debiased / usage[:, None])


class VQVAE(nn.Module):
    """Observation encoder p(z | x) and decoder p(x | z) of Table 1.

    width scales the hidden channels (1.0 = Table 3: 4,102,510 parameters and buffers); the codes
    keep their dimension, so dynamics and policy do not notice.
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

        Always with the batch norms' running averages, so that an observation has the same codes
        whatever else is in its batch.
        """
        training = self.training
        codes, _ = self.eval().quantise(self.features(x))
        self.train(training)
        return codes

    def embed(self, codes):
        """Codes int64 [B,6,6] -> embedding vectors float32 [B,D,6,6]:
        what dynamics and policy see.
        """
        return F.embedding(codes, self.codebook.codes).permute(0, 3, 1, 2)

    @torch.no_grad()
    def start_at_brightness(self, mean):
        """Before training: lets the decoder's first pictures have this mean brightness,
        scalar in (0, 1).

        1 / (1 - m) - 1 / m is nearly the logit whose mean is m;
        Adam would take thousands of steps there.
        """
        self.decoder[-1].bias.fill_(1 / (1 - mean) - 1 / mean)

    def logits(self, z_q):
        """Embedded codes [B,D,6,6]
        -> continuous Bernoulli logits float32 [B,C,H,W] within +-MAX_LOGIT.
        """
        return _Clamp.apply(self.decoder(z_q).float())

    @torch.no_grad()
    def decode(self, codes):
        """Codes int64 [B,6,6] -> images float32 [B,C,H,W] in [0,1]: the mean of p(x | z)."""
        return continuous_bernoulli_mean(self.logits(self.embed(codes)))

    def loss(self, x, weight=None):
        """-ELBO + commitment on observations [B,C,H,W], uint8 or float in [0,1] -> (scalar, dict).

        In training mode the codebook moves; in evaluation mode nothing changes. weight [B,C,H,W]
        multiplies each pixel's -log p in the scalar (None: the ELBO proper), never in the parts.
        Parts, all detached scalars, in nats per observation where not said:
          elbo            log p(x | z) - KL, sum over 36,864 pixels, mean over the batch
          reconstruction  -log p(x | z)
          kl              36 log 128 = 174.67: q(z | x) is certain, the prior uniform
                          ("Constant KL", 3.4)
          commitment      mean of (z_e - z_q)^2 over elements, before its weight 0.25
          usage           share of the K codes that this batch uses
          perplexity      exp(entropy of the codes in this batch), in [1, K]
        """
        x = to_unit(x)
        z_e = self.features(x)                                                   # [B, D, 6, 6]
        codes, flat = self.quantise(z_e)
        z_q = self.embed(codes)

        # The encoder is drawn to its codes; the codes follow by moving average, so they get no
        # gradient. Before the straight-through line: after it z_q - z_e would be zero.
        commitment = F.mse_loss(z_e, z_q.detach())
        # Straight-through: forward z_q, backward as if the quantiser were the identity.
        z_st = z_e + (z_q - z_e).detach()

        pixels = continuous_bernoulli_nll(self.logits(z_st), x)                  # [B, C, H, W]
        nll = pixels.sum() / len(x)
        weighted = nll if weight is None else (pixels * weight).sum() / len(x)
        num_codes = len(self.codebook.codes)
        kl = codes[0].numel() * math.log(num_codes)
        with torch.no_grad(), full_precision(x.device):
            assigned = (codes.flatten()[:, None]
                        == torch.arange(num_codes, device=x.device)).float()     # [N, K]
            if self.training:
                self.codebook.update(flat.detach(), assigned)
            share = assigned.mean(0)                                             # [K]
            parts = {
                "elbo": -(nll + kl), "reconstruction": nll, "kl": torch.full_like(nll, kl),
                "commitment": commitment, "usage": (share > 0).float().mean(),
                "perplexity": torch.exp(-torch.xlogy(share, share).sum()),
            }
        return (weighted + kl + self.commitment * commitment,
                {k: v.detach() for k, v in parts.items()})


def full_precision(device):
    """float32 inside an autocast region. (torch's `meta` device, on which tests run, has none.)"""
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def to_unit(x):
    """uint8 images 0..255 -> float32 in [0, 1]; floats pass.
    On x's device: bytes are cheaper to copy there.
    """
    return x.float() / 255 if x.dtype == torch.uint8 else x


DOUBLINGS = 6                   # of the number of backgrounds: there are 2**6 = 64 at most


def backgrounds(frames, share=0.1):
    """What a game looks like without whatever moves in it: uint8 [n, H, W], n from 1 to
    2**DOUBLINGS. frames uint8 [N,H,W]: some hundred of the game's, well spread.

    One picture, each pixel's median, will do where no more than `share` of a frame's pixels are off
    it (`is_foreground`), in 95 of 100 frames. In mazes that change and explosions that light up the
    screen it is neither of them: then the frames are put into groups that look alike, each with
    its own medians (k-medians; a new group starts at the frame furthest from all, Gonzalez 1985),
    twice as many groups each time.
    """
    pictures = frames.median(0).values[None]
    for _ in range(DOUBLINGS):
        off = is_foreground(frames, pictures).float().mean((1, 2))
        if (off > share).float().mean() <= 0.05:
            break
        for _ in range(len(pictures)):
            furthest = distances(frames, pictures).amin(1).argmax()
            pictures = torch.cat([pictures, frames[furthest][None]])
        for _ in range(8):
            group = most_alike(frames, pictures)
            pictures = torch.stack([frames[group == g].median(0).values for g in group.unique()])
    return pictures


def distances(frames, pictures):
    """Euclidean, of all frames uint8 [N, H, W] to all pictures uint8 [n, H, W]: float32 [N, n]."""
    return torch.cdist(frames.flatten(1).float(), pictures.flatten(1).float())


def most_alike(frames, pictures):
    """Which of the pictures uint8 [n, H, W] each of the frames uint8 [N, H, W] is most like:
    int64 [N].
    """
    return distances(frames, pictures).argmin(1)


def is_foreground(frames, pictures):
    """Pixels that differ by more than 10 levels of 255 from the background that their frame is
    most like: bool [N, H, W]. frames uint8 [N, H, W], pictures as `backgrounds` finds them.
    """
    return (frames.int() - pictures[most_alike(frames, pictures)].int()).abs() > 10


def foreground_weight(x, pictures, weight):
    """1 + weight where a pixel is foreground, 1 elsewhere: [B,C,H,W] for `loss`.

    x uint8 [B,C,H,W], pictures uint8 [n,H,W] as `backgrounds` finds them. A ball of 3 pixels
    is worth 13 nats of 11,000, but only once it is drawn in the right place: knowing just its cell
    of 16x16 pixels gains next to nothing, so plain likelihood hardly ever starts to learn it.
    """
    return 1 + weight * is_foreground(x.flatten(0, 1), pictures).view(x.shape)


def foreground_error(images, reconstructions, threshold=0.04, pictures=None):
    """How much of what moves is lost:
    0 perfect, 1 as bad as showing the background alone (or worse, above 1).

    Squared error on the pixels that differ from the background by more than `threshold`, over their
    squared deviation from it. Mean squared error over all pixels hides everything: Pong without a
    ball looks perfect. The background is the median over the batch, or, where `backgrounds` found
    several pictures, uint8 [n,H,W], the one that each frame is most like.
    images, reconstructions: float [B,C,H,W] in [0,1]; returns a scalar.
    """
    if pictures is None or len(pictures) == 1:
        background = images.median(0, keepdim=True).values
    else:
        frames = (255 * images.flatten(0, 1)).round().to(torch.uint8)
        background = pictures[most_alike(frames, pictures)].view(images.shape) / 255
    foreground = (images - background).abs() > threshold
    error = ((reconstructions - images).square() * foreground).sum()
    return error / ((background - images).square() * foreground).sum().clamp(min=1e-8)


def random_frames(game, steps, seed):
    """Plays at random: uint8 [steps, 96, 96] frames and the row where each row's episode began.

    A quick stand-in for atari.py, so that this file can be copied alone.
    """
    import ale_py
    import gymnasium as gym
    gym.register_envs(ale_py)
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    try:
        env = gym.make(f"ALE/{game}-v5", frameskip=4, repeat_action_probability=0.0,
                       obs_type="grayscale")
    except gym.error.Error:
        sys.exit(f"error: unknown game {game!r}; names are written as in Pong, Freeway, BankHeist")
    env.action_space.seed(seed)
    screen, _ = env.reset(seed=seed)
    screens, starts, start = [], [], 0
    for step in range(steps):
        screens.append(torch.from_numpy(screen.copy()))
        starts.append(start)
        screen, _, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            screen, _ = env.reset()
            start = step + 1
    frames = F.interpolate(torch.stack(screens)[:, None].float(), size=(96, 96), mode="area")
    return frames[:, 0].round().to(torch.uint8), torch.tensor(starts)


def main():
    parser = argparse.ArgumentParser(description="Learn a VQ-VAE of an Atari game, save pictures.")
    parser.add_argument("--game", default="Pong")
    parser.add_argument("--seconds", type=float, default=90, help="of training")
    parser.add_argument("--steps", type=int, default=3000, help="random steps to learn from")
    parser.add_argument("--width", type=float, default=0.5, help="hidden channels, times")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=None, help="the picture (default: vqvae_<game>.png)")
    args = parser.parse_args()
    if args.steps < 400:
        sys.exit("error: --steps must be 400 or more")
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    torch.manual_seed(args.seed)

    frames, starts = random_frames(args.game, args.steps, args.seed)
    held_out = args.steps // 10                              # the last tenth is not trained on

    def stacked(rows):
        """Rows [B] -> observations uint8 [B, 4, 96, 96], never across an episode start."""
        t = rows[:, None] - torch.arange(3, -1, -1)
        return frames[torch.maximum(t, starts[rows][:, None])]

    some = frames[:-held_out:4]
    pictures = backgrounds(some)
    model = VQVAE(width=args.width)
    model.start_at_brightness(some.median(0).values.float().mean() / 255)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    print(f"{args.game}: {args.steps} random steps, {args.seconds:.0f} s of training", flush=True)
    begun, update, shown, done = time.monotonic(), 0, 0, 0.0
    while done < 1:
        # The weight of what moves holds for the first half, then falls; so does the learning rate.
        weight = 40 * 0.1 ** min(max((done - 0.5) / 0.4, 0), 1)
        optimizer.param_groups[0]["lr"] = 1e-3 + (1e-4 - 1e-3) * done
        x = stacked(torch.randint(args.steps - held_out, (12,)))
        loss, parts = model.loss(x, weight=foreground_weight(x, pictures, weight))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update += 1
        done = (time.monotonic() - begun) / args.seconds
        if done >= shown / 10:
            shown += 1
            print(f"update {update:5d}  elbo {parts['elbo']:9.1f}  commitment "
                  f"{parts['commitment']:.3f}  codes in use {parts['usage']:.0%}  "
                  f"perplexity {parts['perplexity']:5.1f}", flush=True)

    # Frames that were never trained on: what is left of them after 36 codes.
    x = stacked(torch.arange(args.steps - held_out, args.steps))
    codes = model.encode(x)
    images = model.decode(codes)
    error = foreground_error(x.float() / 255, images, pictures=pictures)
    print(f"held-out foreground error {error:.2f} (0 perfect, 1 background only)")
    figure, axes = plt.subplots(3, 8, figsize=(14, 5.6))
    for column, i in enumerate(torch.linspace(0, held_out - 1, 8).long()):
        axes[0, column].imshow(x[i, -1], cmap="gray", vmin=0, vmax=255)
        axes[1, column].imshow(codes[i], cmap="nipy_spectral", vmin=0, vmax=127)
        axes[2, column].imshow(images[i, -1], cmap="gray", vmin=0, vmax=1)
        for ax in axes[:, column]:
            ax.set_xticks([]), ax.set_yticks([])
    for ax, label in zip(axes[:, 0], ("original", "36 codes", "reconstruction")):
        ax.set_ylabel(label)
    figure.tight_layout()
    out = args.out or f"vqvae_{args.game}.png"
    figure.savefig(out, dpi=80)
    print(f"saved {out}")


if __name__ == "__main__":
    main()
