"""C: a linear controller with a few hundred numbers, and CMA-ES, which evolves them (Section 2).

    what C reads                     V      M               numbers
    car    z (32), h (256)          z_t    h_t       288 -> 3     288 x 3 + 3 = 867
           z only, Table 1          z_t               32 -> 3      32 x 3 + 3 =  99
           z, 40 hidden units       z_t         32 -> 40 -> 3               1,443
    Doom   z (64), c (512), h (512) z_t    c_t, h_t  1088 -> 1           1,088 (no biases)

CMA-ES draws a population around a mean, has it judged, and moves the mean towards the better half;
a covariance C (so called in these formulas only) learns along which directions steps paid:

    x_k = m + sigma y_k,  y_k ~ N(0, C)      ask: lambda candidates
    f(x_1) <= f(x_2) <= .. (sorted)          judged from outside, smaller is better
    m, sigma, C <- ranks of the y_k          tell: nothing but their order counts

Equations as numbered in N. Hansen, The CMA Evolution Strategy: A Tutorial (arXiv 1604.00772v2),
Appendix A.

    python controller.py        # minimise Rosenbrock's banana, draw the ellipse moving (a second)

Dimension key:  n numbers that are evolved   lambda candidates   mu = lambda / 2, the better half
                B rollouts   F features   A actions
"""
import argparse

import numpy as np


class Controller:
    """a = tanh(W x + b), or with hidden units a = tanh(W2 tanh(W1 x + b1) + b2).

    features F, actions A, hidden 0 or the number of units; bias: whether there is one. The numbers
    live outside, in one vector theta [size], as evolution likes them.
    """

    def __init__(self, features, actions, hidden=0, bias=True):
        widths = [features, hidden, actions] if hidden else [features, actions]
        self.layers = list(zip(widths[1:], widths[:-1]))                         # (out, in)
        self.bias = bias
        self.size = sum(out * (width + bias) for out, width in self.layers)

    def act(self, theta, x):
        """theta float [size], x float [B, F] -> actions [B, A] in (-1, 1)."""
        if np.shape(theta) != (self.size,):
            raise ValueError(f"theta must have shape [{self.size}], not {list(np.shape(theta))}")
        start = 0
        for out, width in self.layers:
            w = theta[start:start + out * width].reshape(out, width)
            start += out * width
            x = x @ w.T
            if self.bias:
                x = x + theta[start:start + out]
                start += out
            x = np.tanh(x)
        return x


class CMAES:
    """Minimises a function of n numbers that can only be evaluated; n up to a few thousand.

    mean float [n], where the search begins; sigma > 0, the first step size; population lambda >= 4
    (None: 4 + 3 ln n); seed of the draws of all generations. ask() gives candidates, tell() takes
    their values. The same draw is given until tell is called, so a run can be continued from
    `state()` and ends as if it had not been interrupted.
    """

    def __init__(self, mean, sigma=0.1, population=None, seed=0):
        mean = np.array(mean, float)
        n = self.n = len(mean)
        lam = self.population = population or 4 + int(3 * np.log(n))             # (48)
        if lam < 4 or sigma <= 0:
            raise ValueError("population must be at least 4 and sigma positive")
        self.seed = seed
        # What moves from generation to generation.
        self.generation, self.mean, self.sigma = 0, mean, float(sigma)
        self.p_sigma, self.p_c = np.zeros((2, n))                                # evolution paths
        self.C = np.eye(n)
        self.B, self.D, self.decomposed = np.eye(n), np.ones(n), 0       # C = B diag(D^2) B^T

        # w'_i = ln((lambda + 1) / 2) - ln i: positive for the better half                    (49)
        w = np.log((lam + 1) / 2) - np.log(np.arange(1, lam + 1))
        mu = self.mu = lam // 2
        # mu_eff = (sum w')^2 / sum w'^2, of the better half and of the rest
        mu_eff = w[:mu].sum() ** 2 / (w[:mu] ** 2).sum()
        mu_eff_minus = w[mu:].sum() ** 2 / (w[mu:] ** 2).sum()
        self.mu_eff = mu_eff
        # c_sigma, d_sigma: step-size control                                                 (55)
        self.c_sigma = (mu_eff + 2) / (n + mu_eff + 5)
        self.d_sigma = 1 + 2 * max(0, np.sqrt((mu_eff - 1) / (n + 1)) - 1) + self.c_sigma
        # c_c, c_1, c_mu: covariance                                                     (56)-(58)
        self.c_c = (4 + mu_eff / n) / (n + 4 + 2 * mu_eff / n)
        self.c_1 = 2 / ((n + 1.3) ** 2 + mu_eff)
        self.c_mu = min(1 - self.c_1,
                        2 * (1 / 4 + mu_eff + 1 / mu_eff - 2) / ((n + 2) ** 2 + mu_eff))
        # The better half's weights sum to 1, the others' to minus the smallest of three bounds:
        # so much may be unlearnt that C shrinks nowhere below zero.                     (50)-(53)
        bound = min(1 + self.c_1 / self.c_mu, 1 + 2 * mu_eff_minus / (mu_eff + 2),
                    (1 - self.c_1 - self.c_mu) / (n * self.c_mu))
        self.w = np.where(w >= 0, w / w[w >= 0].sum(), bound * w / -w[w < 0].sum())
        # E||N(0, I)||, how long a random vector is
        self.chi = np.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n ** 2))

    def ask(self):
        """-> candidates float64 [lambda, n] of this generation."""
        # A draw is a pure function of (seed, generation).
        z = np.random.default_rng((self.seed, self.generation)).standard_normal(
            (self.population, self.n))
        # y_k = B D z_k ~ N(0, C)                                                        (38), (39)
        self.y = z * self.D @ self.B.T
        # x_k = m + sigma y_k                                                                 (40)
        return self.mean + self.sigma * self.y

    def tell(self, values):
        """values [lambda] of ask()'s candidates, in their order; smaller is better.
        Raises ValueError for a value that is not a number, and if ask() was not called.
        """
        values = np.asarray(values, float)
        if values.shape != (self.population,) or not np.isfinite(values).all():
            raise ValueError(f"tell needs {self.population} finite values")
        if getattr(self, "y", None) is None:
            raise ValueError("call ask before tell")
        y, self.y = self.y[values.argsort(kind="stable")], None                  # y_{i:lambda}
        n, w, mu_eff, c_c, c_1, c_mu = self.n, self.w, self.mu_eff, self.c_c, self.c_1, self.c_mu
        self.generation += 1

        # <y>_w = sum_{i <= mu} w_i y_{i:lambda}                                              (41)
        step = w[:self.mu] @ y[:self.mu]
        # m <- m + sigma <y>_w                                                                (42)
        self.mean = self.mean + self.sigma * step

        # p_sigma <- (1 - c_sigma) p_sigma + sqrt(c_sigma (2 - c_sigma) mu_eff) C^-1/2 <y>_w  (43)
        c = self.c_sigma
        self.p_sigma = (1 - c) * self.p_sigma + np.sqrt(c * (2 - c) * mu_eff) * (
            self.B @ (self.B.T @ step / self.D))
        length = np.linalg.norm(self.p_sigma)
        # sigma <- sigma exp(c_sigma / d_sigma (||p_sigma|| / E||N(0, I)|| - 1))              (44)
        self.sigma *= float(np.exp(c / self.d_sigma * (length / self.chi - 1)))

        # h_sigma = 0 stalls p_c while the steps are too long for their size (after (47))
        expected = np.sqrt(1 - (1 - c) ** (2 * self.generation)) * self.chi
        h = float(length / expected < 1.4 + 2 / (n + 1))
        # p_c <- (1 - c_c) p_c + h_sigma sqrt(c_c (2 - c_c) mu_eff) <y>_w                     (45)
        self.p_c = (1 - c_c) * self.p_c + h * np.sqrt(c_c * (2 - c_c) * mu_eff) * step
        # w_i^o = w_i, if it is negative times n / ||C^-1/2 y_{i:lambda}||^2                  (46)
        lengths2 = ((y @ self.B / self.D) ** 2).sum(1)
        w_o = np.where(w >= 0, w, w * n / lengths2)
        # C <- (1 + c_1 delta - c_1 - c_mu sum_j w_j) C + c_1 p_c p_c^T
        #      + c_mu sum_i w_i^o y_{i:lambda} y_{i:lambda}^T,  delta = (1 - h) c_c (2 - c_c) (47)
        delta = (1 - h) * c_c * (2 - c_c)
        self.C = ((1 + c_1 * delta - c_1 - c_mu * w.sum()) * self.C
                  + c_1 * np.outer(self.p_c, self.p_c) + c_mu * (y.T * w_o) @ y)

        # B and D cost n^3 and change slowly: every 1 / (10 n (c_1 + c_mu)) generations suffices
        # (B.2: three generations for Doom's n = 1,088).
        if self.generation - self.decomposed > 1 / (10 * n * (c_1 + c_mu)):
            self.C = (self.C + self.C.T) / 2
            eigenvalues, self.B = np.linalg.eigh(self.C)
            self.D = np.sqrt(eigenvalues.clip(min=1e-30))
            self.decomposed = self.generation

    STATE = "generation", "mean", "sigma", "p_sigma", "p_c", "C", "B", "D", "decomposed"

    def state(self):
        """All that moves, as a dict of arrays and numbers: where a later CMAES may go on."""
        return {name: getattr(self, name) for name in self.STATE}

    def load(self, state):
        """Goes on from a state() of an instance with the same arguments."""
        for name in self.STATE:
            setattr(self, name, state[name])


def rosenbrock(x):
    """x [.., n] -> [..]: a banana-shaped valley, 0 at its lowest place (1, 1, ..)."""
    return (100 * (x[..., 1:] - x[..., :-1] ** 2) ** 2 + (1 - x[..., :-1]) ** 2).sum(-1)


def main():
    parser = argparse.ArgumentParser(description="CMA-ES walks down Rosenbrock's valley.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="controller_cmaes.png")
    args = parser.parse_args()
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(8, 6))
    x = np.stack(np.meshgrid(np.linspace(-1.6, 1.6, 200), np.linspace(-0.8, 2, 200)), -1)
    ax.contourf(x[..., 0], x[..., 1], np.log10(rosenbrock(x) + 1e-3), 25, cmap="Greys")
    circle = np.exp(1j * np.linspace(0, 2 * np.pi, 100))
    circle = np.stack([circle.real, circle.imag])                                # [2, 100]
    es, path = CMAES([-1.2, 1.0], sigma=0.3, seed=args.seed), []
    while es.generation < 200:
        candidates = es.ask()
        if es.generation % 8 == 0 and es.sigma * es.D.max() > 0.01:
            # One standard deviation of the next draw: m + sigma B D circle.
            color = plt.cm.plasma(min(1, es.generation / 60))
            ax.plot(*(es.mean[:, None] + es.sigma * (es.B * es.D) @ circle), color=color)
            ax.plot(*candidates.T, ".", color=color, markersize=4)
            ax.annotate(es.generation, es.mean, fontsize=8)
        path.append(es.mean)
        values = rosenbrock(candidates)
        if es.generation % 20 == 0:
            print(f"generation {es.generation:3d}  best {values.min():.3e}  sigma {es.sigma:.3f}")
        if values.min() < 1e-8:
            break
        es.tell(values)
    print(f"best {values.min():.3e} after {(es.generation + 1) * es.population} evaluations")
    ax.plot(*np.array(path).T, "w-", linewidth=1)
    ax.set_xlim(-1.6, 1.6), ax.set_ylim(-0.8, 2)
    ax.set_title("one standard deviation of the population, with its generation")
    figure.tight_layout()
    figure.savefig(args.out, dpi=80)
    print(f"saved {args.out}")


if __name__ == "__main__":
    main()
