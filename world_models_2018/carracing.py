"""CarRacing seen by a fast camera: the same car, tracks, rewards and ends, the 64x64 picture drawn
directly (Section 3).

gymnasium draws a window of 1000x800 pixels for every step and shrinks it to 96x96; the paper cuts
the bar of indicators off (rows 84 to 95) and shrinks the rest to 64x64. Drawing takes 97 % of the
time. Here the world is drawn once per track, as a map of palette numbers seen from above, and
each frame looks up what its pixels see:

    map, once per track (4 cells a metre)                     frame, 64 x 64
    . . . . . . . . . .                               +-----------------+   the car stands at
    . . 5 6 7 . . . . .      pixel -> camera -> cell  |       | |       |   column 32, row 54.9,
    . 5 5 6 7 8 . . . .      turn by the hull's       |       / /       |   nose up: the world
    . 4 5 . . 8 8 9 . .      angle, divide by zoom,   |      / /        |   turns around it
    . 4 . . . . 9 9 . .      add the car's place      |     |#|         |
    0 outside  1, 2 grass  3, 4 kerb  5.. tiles       +-----------------+

A tile's colour changes when the car first touches it: that is one row of the palette, not the map.

    python carracing.py       # ten times gymnasium's speed? the same rewards? (half a minute)

Dimension key:  H = W = 64 pixels   s samples per pixel and axis   N tiles   V corners of a polygon
"""
import argparse
import math
import time

import gymnasium as gym
import numpy as np

try:
    from gymnasium.envs.box2d import car_dynamics, car_racing
    from gymnasium.envs.box2d.car_racing import GRASS_DIM, PLAYFIELD, SCALE, ZOOM
except gym.error.DependencyNotInstalled:
    raise ImportError("Box2D is missing: pip install 'gymnasium[box2d]'") from None

CELL = 0.25                                             # metres of the world per cell of the map
SIDE = int(2 * PLAYFIELD / CELL) + 2                    # the playfield's cells and a ring outside
OUTSIDE, MEADOW, GRASS, WHITE, RED, TILE = range(6)     # palette numbers; tile i is TILE + i
BOX = slice(50, 60), slice(29, 35)                      # rows and columns that the car can cover
HULL = [np.array(polygon) * car_dynamics.SIZE for polygon in (
    car_dynamics.HULL_POLY1, car_dynamics.HULL_POLY2,
    car_dynamics.HULL_POLY3, car_dynamics.HULL_POLY4)]


class CarRacing(car_racing.CarRacing):
    """gymnasium's CarRacing-v3, its time limit included, but for the observations.

    Observations uint8 [64, 64, 3]: rows 0 to 83 of gymnasium's 96, shrunk (Section 3; the bar with
    the indicators is in the rest). Actions float [3]: steering in [-1, 1], gas and brake in [0, 1];
    see `pedals`. Reward -0.1 per step and 1000 / N for each new tile. *Terminated*: the lap is
    complete (95 % of the tiles, then the start), or the car left the playfield, which costs 100.
    *Truncated* after max_steps. `render()` with render_mode="rgb_array" still gives gymnasium's own
    large picture. Equal seeds and actions give equal episodes.
    """

    def __init__(self, render_mode=None, max_steps=1000):
        super().__init__(render_mode)
        self.max_steps, self.mapped, self.seen_zoom = max_steps, None, None
        self.observation_space = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)

    def reset(self, *, seed=None, options=None):
        """-> (observation, {}). Another track; no options."""
        self.elapsed = -1                               # gymnasium takes one step within reset
        return super().reset(seed=seed, options=options)

    def step(self, action):
        """Action float [3] -> (observation, reward, terminated, truncated, info)."""
        observation, reward, terminated, truncated, info = super().step(action)
        self.elapsed += 1
        return observation, reward, terminated, self.elapsed >= self.max_steps, info

    def _render(self, mode):
        """What gymnasium's step calls for its observation."""
        if mode != "state_pixels":
            return super()._render(mode)
        if self.mapped is not self.road:                                         # a new track
            self._draw_map()
        # In the first second the camera zooms in from high above; later it stays.
        zoom = 0.1 * SCALE * max(1 - self.t, 0) + ZOOM * SCALE * min(self.t, 1)
        # From high above, many cells lie in a pixel: take more samples of it.
        picture = self._ground(zoom, 2 if self.t >= 1 else 4)
        self._car(picture, zoom)
        return (picture + 0.5).astype(np.uint8)

    def _draw_map(self):
        """The world from above: self.map, cells [SIDE * SIZE], and self.palette [TILE + N, 3]."""
        cells = MEADOWS.copy()
        self.palette = np.zeros((TILE + len(self.road), 3), np.float32)
        self.palette[MEADOW:TILE] = self.bg_color, self.grass_color, (255,) * 3, (255, 0, 0)
        tile = -1
        for polygon, color in self.road_poly:
            # A kerb follows its tile in gymnasium's list; its colour is a tuple, red or white.
            kerb = isinstance(color, tuple)
            tile += not kerb
            number = (RED if color[1] == 0 else WHITE) if kerb else TILE + tile
            polygon = to_cells(np.array(polygon))                                # [V, 2]
            x0, y0 = np.floor(polygon.min(0)).astype(int)
            x1, y1 = np.ceil(polygon.max(0)).astype(int) + 1
            x, y = np.arange(x0, x1) + 0.5, np.arange(y0, y1)[:, None] + 0.5
            cells[y0:y1, x0:x1][inside(polygon, x, y)] = number
        for i, tile in enumerate(self.road):
            self.palette[TILE + i] = np.floor(tile.color)
            tile.color = self.palette[TILE + i]         # which gymnasium recolours in place
        self.map, self.mapped = cells.ravel(), self.road

    def _ground(self, zoom, s):
        """All but the car: float32 [64, 64, 3], each pixel the mean of s x s samples."""
        x, y = camera(s, zoom)                                                   # [64s], [64s]
        x, y = x / CELL, y / CELL
        cx, cy = to_cells(np.array(self.car.hull.position))
        cos, sin = math.cos(self.car.hull.angle), math.sin(self.car.hull.angle)
        # (column, row) of the map = car + R(angle) (x, y), for each pair of a row and a column.
        column = (cx + cos * x).astype(np.float32) - (sin * y).astype(np.float32)[:, None]
        row = (cy + sin * x).astype(np.float32) + (cos * y).astype(np.float32)[:, None]
        np.clip(column, 0, SIDE - 1, out=column)                                 # [64s, 64s]
        np.clip(row, 0, SIDE - 1, out=row)
        cell = row.astype(np.int32) * SIDE + column.astype(np.int32)
        picture = self.palette.take(self.map.take(cell), 0)                      # [64s, 64s, 3]
        picture = sum(picture[i::s] for i in range(s))                           # [64, 64s, 3]
        return sum(picture[:, i::s] for i in range(s)) / s ** 2

    def _car(self, picture, zoom):
        """Draws the car into its box of the picture, from 4 x 4 samples per pixel."""
        x, y = (side.reshape(-1, 4)[box].ravel()                                 # [24], [40]
                for side, box in zip(camera(4, zoom), BOX[::-1]))
        x, y = np.meshgrid(x, y)                                                 # [40, 24] each
        if zoom != self.seen_zoom:                      # the hull never moves in the picture
            self.hull = np.any([inside(polygon, x, y) for polygon in HULL], 0)
            self.seen_zoom = zoom
        hull = self.car.hull
        wheel, stripe = np.zeros((2, *x.shape), bool)
        for w in self.car.wheels:
            # Samples as the wheel sees them: it stands at `place`, turned by its steering angle.
            place = hull.GetLocalPoint(w.position)
            cos, sin = math.cos(w.angle - hull.angle), math.sin(w.angle - hull.angle)
            u = cos * (x - place[0]) + sin * (y - place[1])
            v = cos * (y - place[1]) - sin * (x - place[0])
            tread = abs(u) < car_dynamics.WHEEL_W * car_dynamics.SIZE
            wheel |= tread & (abs(v) < w.wheel_rad)
            # The stripe shows that the wheel rolls: on top while a sine of its phase is negative.
            a, b = w.phase, w.phase + 1.2
            if math.sin(a) <= 0 or math.sin(b) <= 0:
                ends = sorted(math.copysign(1, math.cos(p)) if math.sin(p) > 0 else math.cos(p)
                              for p in (a, b))
                stripe |= tread & (v > ends[0] * w.wheel_rad) & (v < ends[1] * w.wheel_rad)
        color = np.zeros((*x.shape, 4), np.float32)                              # r, g, b, covered
        color[wheel] = 0, 0, 0, 1
        color[stripe] = *car_dynamics.WHEEL_WHITE, 1
        color[self.hull] = 204, 0, 0, 1
        color = color.reshape(10, 4, 6, 4, 4).mean((1, 3))                       # [10, 6, 4]
        picture[BOX] = picture[BOX] * (1 - color[..., 3:]) + color[..., :3]


def pedals(a):
    """Three numbers in [-1, 1] -> steering in [-1, 1], gas and brake in [0, 1], float32 [.., 3].
    (The code behind the paper: no output means half gas, and no brake.)
    """
    a = np.asarray(a, np.float32)
    return np.stack([a[..., 0], (a[..., 1] + 1) / 2, a[..., 2].clip(0, 1)], -1)


def camera(s, zoom):
    """Samples in metres from the car: x [64 s] to the right, by column, y [64 s] ahead, by row.
    The window of 1000 x 700 pixels has the car in the middle, 600 below its upper edge.
    """
    middle = (np.arange(64 * s) + 0.5) / (64 * s)
    return (1000 * middle - 500) / zoom, (600 - 700 * middle) / zoom


def to_cells(place):
    """Metres from the middle of the playfield [.., 2] -> (column, row) of the map."""
    return (place + PLAYFIELD) / CELL + 1


def inside(polygon, x, y):
    """Which points lie in a convex polygon [V, 2]: on the same side of all its edges.
    x, y: arrays that broadcast to two dimensions -> bool of their common shape.
    """
    (x1, y1), (x2, y2) = (p.T[..., None, None] for p in (polygon, np.roll(polygon, -1, 0)))
    side = (x2 - x1) * (y - y1) - (y2 - y1) * (x - x1)                           # [V, .., ..]
    return (side >= 0).all(0) | (side <= 0).all(0)


def meadows():
    """The map without a road: a chessboard of grass with one lighter square in four."""
    middle = (np.arange(SIDE) - 0.5) * CELL - PLAYFIELD
    light = np.floor(middle / GRASS_DIM) % 2 == 0
    cells = np.where(light[:, None] & light, GRASS, MEADOW).astype(np.uint16)
    cells[[0, -1]] = cells[:, [0, -1]] = OUTSIDE
    return cells


MEADOWS = meadows()


def shrink(frame):
    """gymnasium's uint8 [96, 96, 3] -> the paper's uint8 [64, 64, 3]: rows 0 to 83, area means."""
    def weights(old):                                   # [64, old], rows of sum 1
        edges = np.linspace(0, old, 65)
        overlap = np.minimum(edges[1:, None], np.arange(1, old + 1)) - np.maximum(
            edges[:-1, None], np.arange(old))
        return overlap.clip(0) * 64 / old
    shrunk = np.einsum("iy,jx,yxc->ijc", weights(84), weights(96), frame[:84], optimize=True)
    return (shrunk + 0.5).astype(np.uint8)


def main():
    parser = argparse.ArgumentParser(description="The fast camera beside gymnasium's.")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="carracing.png")
    args = parser.parse_args()
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # The same track and the same actions, each held for ten steps, in both.
    rng = np.random.default_rng(args.seed)
    actions = pedals(rng.uniform((-0.3, -1, -1), (0.3, 1, 0.2), (args.steps // 10 + 1, 3)))
    speeds, rewards, pictures = [], [], []
    for env in (gym.make("CarRacing-v3").unwrapped, CarRacing()):
        frame, start, total = env.reset(seed=args.seed)[0], time.process_time(), 0
        seen = []
        for t in range(args.steps):
            if t in (10, 60, 120, 200, 300):
                seen.append(frame if len(frame) == 64 else shrink(frame))
            frame, reward, terminated, _, _ = env.step(actions[t // 10])
            total += reward
            if terminated:
                break
        speeds.append((t + 1) / (time.process_time() - start))
        rewards.append(total)
        pictures.append(seen)
        name = "own camera" if isinstance(env, CarRacing) else "gymnasium"
        print(f"{name:>10}: {t + 1} steps, {speeds[-1]:5.0f} per CPU-second, "
              f"sum of rewards {total:.6f}", flush=True)
    print(f"{speeds[1] / speeds[0]:.1f} times as fast, rewards "
          f"{'equal' if rewards[0] == rewards[1] else 'DIFFERENT'}; mean difference of pictures "
          f"{np.mean([abs(a - 1. * b).mean() for a, b in zip(*pictures)]):.2f} of 255")

    figure, axes = plt.subplots(2, len(pictures[0]), figsize=(2 * len(pictures[0]), 4.3))
    for row, seen, name in zip(axes, pictures, ("gymnasium, shrunk", "own camera")):
        for ax, picture in zip(row, seen):
            ax.imshow(picture)
            ax.set_xticks([]), ax.set_yticks([])
        row[0].set_ylabel(name)
    figure.tight_layout()
    figure.savefig(args.out, dpi=100)
    print(f"saved {args.out}")


if __name__ == "__main__":
    main()
