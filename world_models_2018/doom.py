"""VizDoom's Take Cover, and the dream of it in which the policy is evolved (Section 4).

One room. The player may step left or right along one wall; monsters appear along the other and throw
fireballs. Every step alive pays 1, a game lasts 2,100 steps at most, and an average of 750 over 100
games counts as solved. Time alignment, in the game, in what is recorded and in the dream:

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
import os
import sys
import tempfile
import time

import gymnasium as gym
import numpy as np
import torch
from PIL import Image

#from mdnrnn import sample

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
        self.max_steps, self.frame = max_steps, None
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
