"""VizDoom's Take Cover, and the dream of it in which the policy is evolved (Section 4).

One room. The player may step left or right along one wall; monsters appear along the other and
throw fireballs. Two hits kill, mostly. Every step alive pays 1, a game lasts 2,100 steps at most,
and an average of 750 over 100 games counts as solved. Time alignment, in the game, in what is
recorded and in the dream:

    t             0           1           2                 L-1
    z_t        z_0         z_1         z_2        ...     z_{L-1}     what V sees
    restart_t   1           0           0         ...       0         a game begins with z_t
    a_t           a_0         a_1         a_2     ...         a_{L-1} in [-1, 1], chosen at z_t
    done_t         0           0           0      ...          1      the player died after a_t
                  /           /           /
    h_t  0 --> [LSTM] ---> [LSTM] ---> [LSTM] --> ...                 reads (z_t, a_t, restart_t)
                  |           |           |
             (z_1,done_0) (z_2,done_1) (z_3,done_2)                   and predicts these

The policy acts at z_t, knowing the h and c that the step before left behind.

    python doom.py        # do nothing, play at random, save a strip of what is seen (half a minute)

Dimension key:  n dreams side by side   S recorded starts   Z = 64 (z)   H = 512 (h, c)
                frames 64 x 64 x 3
"""
import argparse
import contextlib
import itertools
import os
import sys
import tempfile
import time

import gymnasium as gym
import numpy as np
import torch
from PIL import Image

from mdnrnn import sample

try:
    import vizdoom
except ImportError:                                     # the dream does without it
    vizdoom = None

MAX_STEPS = 2100  # 60 seconds of the game (Section 4)


class DoomEnv(gym.Env):
    """Take Cover at the paper's settings: skill 4, one action per game tic, no frame repeated.

    Observations uint8 [64, 64, 3]: the upper 400 of 480 rows (without the floor at the player's
    feet), each output pixel the mean of its area. Actions float [1] in [-1, 1]: below -1/3 a step
    to the left, above 1/3 one to the right, else none. Reward 1 per step, the last one included.
    *Terminated*: the player died; the observation is then the last one that was seen.
    *Truncated* after max_steps. Equal seeds and actions give equal games.

    Raises ImportError without vizdoom, ValueError for a skill that does not exist (1 to 5),
    gymnasium.error.InvalidAction and ResetNeeded.
    """

    metadata = {"render_modes": []}
    observation_space = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, max_steps=MAX_STEPS, skill=4):
        if vizdoom is None:
            raise ImportError("vizdoom is missing: pip install vizdoom")
        if skill not in range(1, 6) or max_steps < 1:
            raise ValueError("skill must be 1 to 5, max_steps 1 or more")
        self.max_steps, self.frame, self.elapsed = max_steps, None, 0
        game = self.game = vizdoom.DoomGame()
        game.load_config(os.path.join(vizdoom.scenarios_path, "take_cover.cfg"))
        game.set_doom_skill(skill)
        game.set_window_visible(False)
        game.set_screen_format(vizdoom.ScreenFormat.RGB24)
        # A quarter of the paper's 640x480 pixels: the game is the same, five times as fast.
        game.set_screen_resolution(vizdoom.ScreenResolution.RES_320X240)
        game.set_doom_config_path(os.devnull)

    def reset(self, *, seed=None, options=None):
        """-> (observation, {}). Begins another game; no options."""
        super().reset(seed=seed)
        self.game.set_seed(int(self.np_random.integers(2**32)))
        if self.game.is_running():
            self.game.new_episode()
        else:
            # The engine leaves a folder of its own wherever it is started: not in the user's.
            with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
                self.game.init()
        self.elapsed = 0
        return self._look(), {}

    def step(self, action):
        """Action float [1] -> (observation, 1.0, terminated, truncated, {})."""
        if self.frame is None:
            raise gym.error.ResetNeeded("call reset before step")
        a = np.asarray(action, np.float32)
        if a.shape != (1,) or not -1 <= a[0] <= 1:                               # nan neither
            raise gym.error.InvalidAction("action must be one number in [-1, 1], shape [1]")
        self.game.make_action([bool(a[0] < -1 / 3), bool(a[0] > 1 / 3)])         # left, right
        self.elapsed += 1
        terminated = self.game.is_episode_finished()
        truncated = not terminated and self.elapsed >= self.max_steps
        return self._look(), 1.0, terminated, truncated, {}

    def _look(self):
        state = self.game.get_state()
        if state is not None:                                       # the dead see nothing new
            screen = state.screen_buffer                                         # [240, 320, 3]
            screen = Image.fromarray(screen[:len(screen) * 400 // 480])
            self.frame = np.asarray(screen.resize((64, 64), Image.Resampling.BOX))
        return self.frame.copy()

    def close(self):
        self.game.close()


def random_actions(rng):
    """Endless actions float32 [1] of random play: uniform in [-1, 1], each held for 1 to 10 steps.
    rng: a numpy Generator. (The code behind the paper; a new action every step dithers in place.)
    """
    while True:
        action = rng.uniform(-1, 1, 1).astype(np.float32)
        for _ in range(rng.integers(1, 11)):
            yield action


class DoomDream(gym.vector.VectorEnv):
    """M as an environment, "as if it were a real Gym environment" (Section 4.1): n dreams of the
    game side by side, in which no frame is ever drawn.

    model        a trained MDNRNN with predict_done
    starts       float [S, 2, Z]: mu and logvar of V for the first frames of S real games. Each
                 dream begins at a random one, z drawn from N(mu, exp(logvar)), with an empty memory
    num_envs     n
    steps        no dream lasts longer
    temperature  tau of the next z; deaths are drawn from the odds M gives them, whatever tau

    Observations float32 [n, Z + 2H], what C of Section 4 reads: z_t, c and h of the step before.
    Actions float [n, 1] in [-1, 1]. Reward 1 per step, the last one included. *Terminated*: M says
    that the player died. *Truncated* after `steps`. reset(seed=..) decides all that follows;
    torch's global random numbers stay untouched.

    The step in which a dream ends already returns the observation of the next one
    (gymnasium's AutoresetMode.SAME_STEP); infos holds "final_obs" and "final_info".

    Raises ValueError for settings that can't work, gymnasium.error.InvalidAction and ResetNeeded.
    """

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP, "render_modes": []}

    def __init__(self, model, starts, num_envs, steps=MAX_STEPS, temperature=1.0):
        starts = torch.as_tensor(starts)
        if not model.predict_done or model.action_size != 1:
            raise ValueError("the model must have one action and predict_done")
        if starts.ndim != 3 or not len(starts) or starts.shape[1:] != (2, model.z_size):
            raise ValueError(f"starts must be float [S, 2, {model.z_size}], at least one")
        if num_envs < 1 or steps < 1 or not 0 < temperature < float("inf"):
            raise ValueError("num_envs, steps and temperature must be more than 0")
        self.model, self.starts, self.num_envs = model, starts, num_envs
        self.steps, self.temperature = steps, temperature
        self.z, self.generator = None, None
        size = model.z_size + 2 * model.hidden
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)
        self.single_action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
        self.observation_space, self.action_space = (
            gym.vector.utils.batch_space(space, num_envs)
            for space in (self.single_observation_space, self.single_action_space))

    def reset(self, *, seed=None, options=None):
        """-> (observations float32 [n, Z + 2H], {}). Begins n new dreams; no options."""
        super().reset(seed=seed)
        if seed is not None or self.generator is None:
            self.generator = torch.Generator(self.starts.device)
            self.generator.manual_seed(int(self.np_random.integers(2**62)))
        self.z = self.starts.new_zeros(self.num_envs, self.model.z_size)
        self.h, self.c = self.model.initial_state(self.num_envs)
        self.elapsed = np.zeros(self.num_envs, np.int64)
        self._begin(np.ones(self.num_envs, bool))
        return self._observations(), {}

    @torch.no_grad()
    def step(self, actions):
        """Actions float [n, 1] -> (observations, rewards float64 [n], terminations, truncations,
        infos).
        """
        if self.z is None:
            raise gym.error.ResetNeeded("call reset before step")
        actions = np.asarray(actions, np.float32)
        if not self.action_space.contains(actions):                              # nan neither
            raise gym.error.InvalidAction(f"actions must be numbers in [-1, 1], shape "
                                          f"[{self.num_envs}, 1]")
        a = torch.from_numpy(actions).to(self.starts.device)
        restart = torch.from_numpy(self.elapsed == 0).to(self.starts.device)
        *mixture, log_odds, (self.h, self.c) = self.model(                       # one step: T = 1
            self.z[:, None], a[:, None], (self.h, self.c), restart[:, None])
        self.z = sample(*(p[:, 0] for p in mixture), self.temperature, self.generator)
        u = torch.rand(self.num_envs, device=self.starts.device, generator=self.generator)
        terminated = (u < log_odds[:, 0].sigmoid()).cpu().numpy()
        self.elapsed += 1
        truncated = (self.elapsed >= self.steps) & ~terminated
        over, infos, observations = terminated | truncated, {}, self._observations()
        if over.any():
            for i in np.flatnonzero(over):
                infos = self._add_info(infos, {"final_obs": observations[i], "final_info": {}}, i)
            self._begin(over)
            observations = self._observations()
        return observations, np.ones(self.num_envs), terminated, truncated, infos

    def _begin(self, over):
        """Another dream from another start where over, bool [n]."""
        rows = self.np_random.integers(len(self.starts), size=self.num_envs)
        self.elapsed[over] = 0
        rows, over = (torch.from_numpy(x).to(self.starts.device) for x in (rows, over))
        mu, logvar = self.starts[rows].unbind(1)                                 # each [n, Z]
        noise = torch.randn(mu.shape, device=mu.device, generator=self.generator)
        self.z = torch.where(over[:, None], mu + (logvar / 2).exp() * noise, self.z)
        self.h, self.c = (x * ~over[:, None] for x in (self.h, self.c))

    def _observations(self):
        return torch.cat([self.z, self.c, self.h], 1).cpu().numpy()


def main():
    parser = argparse.ArgumentParser(description="Play Take Cover doing nothing and at random.")
    parser.add_argument("--games", type=int, default=20, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="doom_strip.png", help="the picture")
    args = parser.parse_args()
    if args.games < 1 or args.seed < 0:
        sys.exit("error: --games must be 1 or more, --seed 0 or more")
    try:
        env = DoomEnv()
    except ImportError as error:
        sys.exit(f"error: {error}")
    import matplotlib
    matplotlib.use("Agg", force=True)
    matplotlib.rcdefaults()
    import matplotlib.pyplot as plt

    rng, started, steps = np.random.default_rng(args.seed), time.monotonic(), 0
    nothing = itertools.repeat(np.zeros(1, np.float32))
    for name, actions in (("doing nothing", nothing), ("random play", random_actions(rng))):
        survival = []
        for game in range(args.games):
            frames = [env.reset(seed=args.seed + game)[0]]
            over = False
            while not over:
                frame, _, terminated, truncated, _ = env.step(next(actions))
                over = terminated or truncated
                frames.append(frame)
            survival.append(len(frames) - 1)
        steps += sum(survival)
        print(f"{name}: {args.games} games, alive for {np.mean(survival):.0f} +- "
              f"{np.std(survival):.0f} steps (mean and standard deviation)", flush=True)
    seconds = time.monotonic() - started
    print(f"{steps} steps in {seconds:.1f} s, {steps / seconds:.0f} a second")
    env.close()

    # The last random game, from its first frame to its last.
    figure, axes = plt.subplots(1, 8, figsize=(14, 2.1))
    for ax, t in zip(axes, np.linspace(0, len(frames) - 1, 8).astype(int)):
        ax.imshow(frames[t])
        ax.set(title=f"t = {t}", xticks=[], yticks=[])
    figure.tight_layout()
    figure.savefig(args.out, dpi=80)
    print(f"saved {args.out}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
