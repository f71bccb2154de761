"""Atari games as the paper sees them: 96x96 grey frames, four emulator frames per step.

Section 3.3: "The observations x_t are the last four frames of the Atari game, stacked and converted
from RGB to grayscale." Everything between the emulator and that sentence is in this file:

    emulator   210x160 grey        210x160 grey        210x160 grey        210x160 grey
               frame 1 of 4        frame 2 of 4        frame 3 of 4        frame 4 of 4
                                                             \\    pixel-wise max   /
    AtariEnv                                             area resize -> 96x96 uint8  one step
    ExperienceBuffer                     the last four such frames, stacked -> x_t   one observation

One *step* (or interaction) is one decision of the agent = four emulator frames. The 100K
interactions of the paper are therefore 400K frames, 1.9 hours of play.

    python atari.py --game Pong        # play at random, save a picture of what the network sees

Dimension key:  B samples   L window length   n windows   N frames stored   H = W = 96 pixels
"""
import os
import signal
if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))     # Ctrl-C: no traceback, from now on

import argparse
import contextlib
import difflib
import errno
import io
import itertools
import pathlib
import stat
import sys

import ale_py
import gymnasium as gym
import numpy as np

gym.register_envs(ale_py)
ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)      # no banner for each new emulator

STACK = 4  # frames per observation (Section 3.3)


def area_matrix(n_in, n_out):
    """Rows of overlap fractions:
    out = area_matrix(n_in, n_out) @ in averages the pixels under each output.

    Output pixel i covers the interval [i*s, (i+1)*s) of the input, s = n_in / n_out; its weight on
    input pixel j is the length of their overlap, divided by s. For 4 -> 3 pixels (s = 4/3):
        [[.75 .25  0   0 ]
         [ 0  .5  .5   0 ]
         [ 0   0  .25 .75]]
    Returns float32 [n_out, n_in]; each row sums to 1.
    Equal to OpenCV's INTER_AREA, one axis at a time.
    """
    scale = n_in / n_out
    left = np.arange(n_out)[:, None] * scale                     # [n_out, 1]
    pixel = np.arange(n_in)[None, :]                             # [1, n_in]
    overlap = np.minimum(left + scale, pixel + 1) - np.maximum(left, pixel)
    return (np.clip(overlap, 0, None) / scale).astype(np.float32)


def canonical_name(game):
    """The name as the tables of the papers write it: "space_invaders" -> "SpaceInvaders".
    Raises ValueError naming the nearest games if unknown.
    """
    names = {spec[4:-3].lower(): spec[4:-3] for spec in gym.registry
             if spec.startswith("ALE/") and spec.endswith("-v5")}
    plain = "".join(filter(str.isalnum, str(game).lower()))
    if plain not in names:
        close = difflib.get_close_matches(plain, names, n=3, cutoff=0.5)
        hint = ", ".join(names[c] for c in close) or "Pong, Freeway, Breakout"
        raise ValueError(f"unknown game {game!r}; the nearest names: {hint}")
    return names[plain]


def make_ale(game, **kwargs):
    """The bare emulator at 60 frames a second. game: as `canonical_name` takes it."""
    # "-v5" would repeat the last action with probability 0.25 ("sticky actions"); the 100K protocol
    # does not. The minimal action set is the default (full_action_space=False), and losing a life
    # does not end an episode.
    return gym.make(f"ALE/{canonical_name(game)}-v5", frameskip=1, repeat_action_probability=0.0,
                    obs_type="grayscale", disable_env_checker=True, **kwargs).unwrapped


class AtariEnv:
    """One Atari game under the protocol of the Atari 100K papers.

    game        name in any spelling, e.g. "BankHeist" or "bank heist"; `game` then has the former
    seed        None or an int from 0 to 2**31 - 1 (the emulator takes no other; else ValueError) of
                the first reset. Equal seeds and actions give equal frames.
    size        side of the square output frames, pixels
    frame_skip  emulator frames per step; the action is held, the rewards are summed
    noop_max    at reset, between 1 and noop_max emulator frames of doing nothing (0: none), so that
                episodes of these deterministic games differ

    Frames are uint8 [size, size], 0 black, 255 white. `num_actions` is M of the paper (minimal
    action set of the game), `action_meanings` their names.
    """

    def __init__(self, game, seed=None, size=96, frame_skip=4, noop_max=30):
        self.game, self.ale = canonical_name(game), make_ale(game)
        self.size, self.frame_skip, self.noop_max = size, frame_skip, noop_max
        self.num_actions = int(self.ale.action_space.n)
        self.action_meanings = list(self.ale.get_action_meanings())
        height, width = self.ale.observation_space.shape     # 210 x 160, some games 250 x 160
        self.rows, self.columns = area_matrix(height, size), area_matrix(width, size).T
        self.restart_randomness(seed)

    @property
    def lives(self):
        """Lives left, int; 0 in games that do not count any."""
        return self.ale.ale.lives()

    def resize(self, screen):
        """uint8 [210, 160] -> uint8 [96, 96]:
        the mean over each output pixel's area, two small products.
        """
        return np.rint(self.rows @ screen.astype(np.float32) @ self.columns).astype(np.uint8)

    def restart_randomness(self, seed):
        if seed is not None and not 0 <= seed < 2**31:
            raise ValueError(f"a seed must be from 0 to {2**31 - 1}, not {seed}")
        self.seed, self.rng = seed, np.random.default_rng(seed)

    def reset(self, seed=None):
        """Starts an episode and returns its first frame, uint8 [size, size].
        A seed restarts all randomness.
        """
        if seed is not None:
            self.restart_randomness(seed)
        screen, _ = self.ale.reset(seed=self.seed)
        self.seed = None                                 # seed the emulator once, not each episode
        if self.noop_max > 0:
            for _ in range(self.rng.integers(1, self.noop_max + 1)):
                self.ale.ale.act(ale_py.Action.NOOP)     # two minimal action sets lack it
                if self.ale.ale.game_over():
                    self.ale.reset()
            screen = self.ale.ale.getScreenGrayscale()
        return self.resize(screen)

    def step(self, action):
        """Holds `action` (int in [0, M), else ValueError) for `frame_skip` emulator frames.

        Returns (frame uint8 [size, size], reward float in the game's own points,
                 terminated bool: the game is over,
                 truncated bool: it was cut after the usual 108,000 emulator frames,
                                 30 minutes of play).
        """
        if action not in range(self.num_actions):
            raise ValueError(f"an action must be from 0 to {self.num_actions - 1}, not {action}")
        reward, previous = 0.0, None
        for _ in range(self.frame_skip):
            older, (screen, r, terminated, truncated, _) = previous, self.ale.step(int(action))
            reward, previous = reward + float(r), screen
            if terminated or truncated:
                break
        # Sprites flicker: many games draw half of them in even and half in odd frames.
        if older is not None:
            screen = np.maximum(older, screen)
        return self.resize(screen), reward, bool(terminated), bool(truncated)


class ExperienceBuffer:
    """All real experience, kept as single frames and stacked on demand.

    Row t holds what happened at one step, in the order it happened:

        frames[t] = o_t  --policy-->  actions[t] = a_t  --game-->  rewards[t] = r_t,
                                      terminated[t] / truncated[t]: the episode ended *after* a_t,
                                      so row t + 1 is the first frame of another episode.
                                      lost[t]: a life was lost with a_t; the episode goes on.

    The observation x_t is the stack (o_{t-3}, o_{t-2}, o_{t-1}, o_t). Storing x_t would cost four
    times the memory: 102,400 frames are 944 MB, 102,400 stacks 3.8 GB.
    """

    COLUMNS = ("frames", "actions", "rewards", "terminated", "truncated", "lost")     # as add takes

    def __init__(self, capacity, size=96):
        self.capacity, self.size = capacity, 0
        self.frames = np.zeros((capacity, size, size), np.uint8)  # untouched pages cost no memory
        self.actions = np.zeros(capacity, np.uint8)
        self.rewards = np.zeros(capacity, np.float32)             # the game's own points, unclipped
        self.terminated = np.zeros(capacity, bool)
        self.truncated = np.zeros(capacity, bool)
        self.lost = np.zeros(capacity, bool)
        self.start = np.zeros(capacity, np.int64)                 # row of the episode's first frame

    def __len__(self):
        return self.size

    @property
    def ends(self):
        """bool [N]: row t is the last of its episode, for whichever reason."""
        return (self.terminated | self.truncated)[:self.size]

    def add(self, frame, action, reward, terminated, truncated, lost=False):
        """Appends one step, or n steps at once when every argument has a leading axis n.

        frame uint8 [H, W] or [n, H, W]; lost: whether a life was.
        Raises IndexError when the capacity is exceeded, ValueError for what bytes cannot hold.
        """
        frame = np.asarray(frame)
        if frame.dtype != np.uint8:
            raise ValueError(f"frames must be uint8, 0 black, 255 white, not {frame.dtype}")
        if np.any(np.asarray(action).astype(np.uint8) != action):
            raise ValueError(f"actions must be integers from 0 to 255, not {action}")
        n = 1 if frame.ndim == 2 else len(frame)
        if self.size + n > self.capacity:
            raise IndexError(f"the buffer holds {self.capacity} steps, {self.size} are in it, "
                             f"{n} more do not fit")
        new = slice(self.size, self.size + n)
        self.frames[new], self.actions[new], self.rewards[new] = frame, action, reward
        self.terminated[new], self.truncated[new], self.lost[new] = terminated, truncated, lost

        # A row starts an episode if the row before it ended one. The running maximum of the rows
        # that do is each row's episode start; an open episode goes on from the row before.
        rows = np.arange(new.start, new.stop)
        before = np.maximum(rows - 1, 0)
        is_first = (rows == 0) | self.terminated[before] | self.truncated[before]
        open_start = self.start[new.start - 1] if new.start > 0 else 0
        self.start[new] = np.maximum.accumulate(np.where(is_first, rows, open_start))
        self.size += n

    def stacked(self, indices):
        """Observations x_t at rows `indices`: int [B] -> uint8 [B, 4, H, W], oldest frame first.

        Never reaches into the episode before: where there is no older frame the first one repeats.
        Works for any shape of indices, e.g. windows [n, L] -> [n, L, 4, H, W].
        """
        indices = np.asarray(indices)
        if indices.size and not (0 <= indices.min() and indices.max() < self.size):
            raise IndexError(f"rows must lie in [0, {self.size})")
        rows = indices[..., None] - np.arange(STACK - 1, -1, -1)     # [..., 4] = t-3, t-2, t-1, t
        return self.frames[np.maximum(rows, self.start[indices][..., None])]

    def some_frames(self, most=800):
        """uint8 [n, H, W]: some of all frames, evenly spread."""
        return self.frames[:self.size:-(-self.size // most)]

    def to_bytes(self, first, last):
        """Rows first .. last - 1 as the bytes of a compressed .npz."""
        data = io.BytesIO()
        np.savez_compressed(data, **{name: getattr(self, name)[first:last]
                                     for name in self.COLUMNS})
        return data.getvalue()

    def add_bytes(self, data):
        """Appends the rows that `to_bytes` wrote. Raises ValueError if it did not write them."""
        mine = [getattr(self, name) for name in self.COLUMNS]
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as file:
                # Before it unpacks to more than there is room for; 256: their headers.
                if (sum(member.file_size - 256 for member in file.zip.infolist())
                        > sum(column.nbytes for column in mine)):
                    raise TypeError
                columns = [file[name] for name in self.COLUMNS]
            if not np.isfinite(columns[2]).all() or any(
                    column.dtype != own.dtype or column.shape != (len(columns[0]), *own.shape[1:])
                    for column, own in zip(columns, mine)):
                raise TypeError
            self.add(*columns)
        except Exception:                                # another archive, or none at all
            raise ValueError("this is no experience of such a run") from None

    def windows(self, length, rng):
        """Cuts the whole buffer into windows of consecutive rows:
        int64 [n, length], in order of time.

        They do not overlap and start at a random offset, so one pass over them is an epoch and no
        pass cuts at the same places. Windows may span an episode end; `ends` tells where.
        Empty [0, length] while there is less than one window of data. rng: numpy Generator.
        """
        if self.size < length:
            return np.zeros((0, length), np.int64)
        offset = int(rng.integers(min(length, self.size - length + 1)))
        n = (self.size - offset) // length
        return offset + np.arange(n * length).reshape(n, length)

    def epoch(self, length, batch, rng):
        """One pass over all windows in random order, in batches: int64 [n, batch, length]."""
        windows = rng.permutation(self.windows(length, rng))
        n = batches_per_epoch(self.size, length, batch)
        return windows[:n * batch].reshape(n, batch, length)


def batches_per_epoch(rows, length, batch):
    """Full batches of windows in one pass over so many rows, whatever the windows' offset."""
    return (rows - length + 1) // length // batch


def random_play(num_actions, rng, segment=0):
    """A generator of uniformly random actions, int in [0, M), the policy of the first round.

    They never cross Freeway's road. With segment > 0 the odds are uneven, a few actions preferred,
    and drawn anew every so many steps.
    """
    for step in itertools.count():
        if segment and step % segment == 0:
            odds = rng.dirichlet(np.full(num_actions, 0.3))
        yield int(rng.choice(num_actions, p=odds) if segment else rng.integers(num_actions))


def held_at_random(num_actions, rng, chance):
    """A generator, for each step: None, or with this chance a random action, which is then held for
    2, 4, 8 or 16 steps (temporally extended exploration, Dabney et al., 2021). A policy that has
    made up its mind would never show the world model what the other actions lead to.
    """
    while True:
        if rng.random() < chance:
            action = int(rng.integers(num_actions))
            yield from [action] * 2 ** int(rng.integers(1, 5))
        else:
            yield None


# --------------------------------------------------------------------------------------------------
# Files: whole or not at all, never through a link. (All experience is on disk as well: train.py)
# --------------------------------------------------------------------------------------------------

DIRECT = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)       # Windows lacks the one


def read_regular(path, most=2**32):
    """The bytes of a regular file of at most `most` bytes. ValueError for whatever else is there: a
    link, a folder, a pipe that would never end.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | DIRECT | getattr(os, "O_NONBLOCK", 0))
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size > most:
                raise ValueError(f"{path} is no regular file, or too large for what it should be")
            return file.read(most)
    except OSError as error:
        reason = "it is a link" if error.errno == errno.ELOOP else error.strerror
        raise ValueError(f"cannot read {path}: {reason}") from error


def write_atomically(path, data, keep=None):
    """Bytes -> file, so that at any moment the path holds all of the old or all of the new content.
    ValueError if that is not possible; the old file is then as it was.

    keep: the old file gets this name, once the new one is whole on the disk.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)           # whatever it is, perhaps a link to elsewhere
        new = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | DIRECT, 0o666)
        with open(new, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise ValueError(f"cannot write {path}: {error.strerror}") from error
    with contextlib.suppress(OSError):              # not every system can, nor every file system
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)                    # the rename survives a power cut
        finally:
            os.close(descriptor)


def lock_folder(folder):
    """Keeps a second process out of a run folder, as long as the file it returns is open; the lock
    dies with the process, however it dies. ValueError if another one has it.
    """
    try:
        file = open(os.open(folder / "lock", os.O_RDWR | os.O_CREAT | DIRECT, 0o666), "r+b")
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another process is writing {folder}; wait for it or stop it") from None
    except ImportError:
        pass                                        # no such locks on this system, or
    except OSError as error:                        # on this file system
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise ValueError(f"cannot write {folder}/lock: {error.strerror or error}") from error
    return file


def main():
    parser = argparse.ArgumentParser(description="Play an Atari game at random; "
                                                 "save what the network sees.")
    parser.add_argument("--game", default="Pong")
    parser.add_argument("--steps", type=int, default=1000, help="steps of four emulator frames")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="the picture (default: atari_<game>.png)")
    args = parser.parse_args()
    if not 1 <= args.steps <= 10**6:
        sys.exit("error: --steps must be from 1 to 1000000 (half an hour, 9 GB)")
    try:
        env = AtariEnv(args.game, seed=args.seed)
    except ValueError as error:
        sys.exit(f"error: {error}")
    out = args.out or f"atari_{env.game}.png"
    if not out.endswith(".png"):
        sys.exit("error: --out must end in .png")
    open(out, "ab").close()                         # fails now, not after the work
    if not os.path.getsize(out):
        os.remove(out)
    os.environ["MPLBACKEND"] = "Agg"                # whatever a notebook or the user's settings say
    import matplotlib.pyplot as plt
    plt.rcdefaults()

    # Play at random, as the very first iteration of the algorithm does.
    buffer, rng = ExperienceBuffer(args.steps), np.random.default_rng(args.seed)
    frame, returns, score = env.reset(), [], 0.0
    for _ in range(args.steps):
        action = int(rng.integers(env.num_actions))
        next_frame, reward, terminated, truncated = env.step(action)
        buffer.add(frame, action, reward, terminated, truncated)
        score += reward
        frame = next_frame
        if terminated or truncated:
            returns.append(score)
            frame, score = env.reset(), 0.0
    print(f"{env.game}: M = {env.num_actions} actions: {', '.join(env.action_meanings)}")
    print(f"{args.steps} random steps = {args.steps * 4} frames, "
          f"rewarded steps: {np.count_nonzero(buffer.rewards)}, finished episodes: {len(returns)}"
          + (f", mean score {np.mean(returns):.1f}" if returns else ""), flush=True)

    # The raw screen, then one observation: four frames, and in colour what moved between them.
    stack = buffer.stacked([args.steps - 1])[0]                                     # [4, 96, 96]
    figure, axes = plt.subplots(1, 6, figsize=(15, 3.1))
    axes[0].imshow(env.ale.ale.getScreenRGB())
    axes[0].set_title("emulator 210x160")
    for i in range(STACK):
        axes[1 + i].imshow(stack[i], cmap="gray", vmin=0, vmax=255)
        axes[1 + i].set_title(f"x_t, frame t-{STACK - 1 - i}" if i < STACK - 1 else "x_t, frame t")
    motion = np.stack([stack[3], stack[1], stack[0]], axis=-1)           # grey where nothing moves
    axes[5].imshow(motion)
    axes[5].set_title("motion: t red, t-3 blue")
    for ax in axes:
        ax.axis("off")
    figure.tight_layout()
    figure.savefig(out, dpi=80)
    print(f"saved {out}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except (OSError, UnicodeError) as error:        # nowhere to write: a closed pipe, a full disk
        sys.stdout = None                           # or it is tried once more at the end
        sys.exit(f"error: {error}")
