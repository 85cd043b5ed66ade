"""The world of moving shapes: what can be said about a clip, which combinations are held out, and how one is drawn.

A clip shows one shape of one colour that moves at constant speed left, right, up or down over a plain background.
6 colours x 4 shapes x 4 directions x 3 backgrounds = 288 combinations, of which every sixth is held out: a model that
draws those has understood the words, because it has never seen the combination.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from kinema.shapes.video import write_video

SIZE = 64
"""Width and height of a clip in pixels."""
FRAMES = 17
"""Frames of a clip: four for every latent frame after the first."""
FPS = 16

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 30, 35),
    "green": (35, 175, 60),
    "blue": (40, 75, 235),
    "yellow": (240, 200, 20),
    "purple": (170, 45, 205),
    "cyan": (30, 200, 215),
}
SHAPES = ("circle", "square", "triangle", "cross")
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Unit steps (x, y) in pixels; y grows downwards."""
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (12, 12, 12),
    "gray": (125, 125, 125),
    "white": (243, 243, 243),
}

_CAPTION = re.compile(
    rf"an? ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) moving ({'|'.join(DIRECTIONS)})"
    rf" on an? ({'|'.join(BACKGROUNDS)}) background"
)


@dataclass(frozen=True)
class Combo:
    """One combination of the four attributes."""

    colour: str
    shape: str
    direction: str
    background: str


@dataclass(frozen=True)
class Prompt:
    """A held-out prompt to sample: what to draw, its caption, and the seed of the noise to start from."""

    combo: Combo
    text: str
    seed: int


@dataclass(frozen=True)
class Motion:
    """Where a shape is in every frame and how large: centres [T, 2] as (x, y) and a radius, in pixels."""

    centres: np.ndarray
    radius: float


def all_combos() -> list[Combo]:
    """The 288 combinations in a fixed order."""
    return [Combo(*values) for values in product(COLOURS, SHAPES, DIRECTIONS, BACKGROUNDS)]


def is_held_out(combo: Combo) -> bool:
    """Whether a combination is kept from training: one colour of six for every (shape, direction, background).

    The 48 held-out combinations hold 8 of each colour, 12 of each shape and direction and 16 of each background.
    """
    colour = list(COLOURS).index(combo.colour)
    shape = SHAPES.index(combo.shape)
    direction = list(DIRECTIONS).index(combo.direction)
    background = list(BACKGROUNDS).index(combo.background)
    return (colour + shape + 3 * direction + 2 * background) % len(COLOURS) == 0


def train_combos() -> list[Combo]:
    """The 240 combinations that training may see."""
    return [combo for combo in all_combos() if not is_held_out(combo)]


def held_out_combos() -> list[Combo]:
    """The 48 combinations that only sampling may ask for."""
    return [combo for combo in all_combos() if is_held_out(combo)]


def caption(combo: Combo) -> str:
    """The sentence that names all four attributes."""
    return f"a {combo.colour} {combo.shape} moving {combo.direction} on a {combo.background} background"


def parse_caption(text: str) -> Combo | None:
    """The combination a caption names, or None where it is no sentence of this world."""
    match = _CAPTION.fullmatch(text.strip().lower().rstrip("."))
    return Combo(*match.groups()) if match else None


def held_out_prompts(count: int = 96, seed: int = 0) -> list[Prompt]:
    """`count` prompts over the held-out combinations, each in turn, with the seeds of their noise.

    A count that is a multiple of 48 asks for every held-out combination equally often.
    """
    combos = held_out_combos()
    order = np.random.default_rng([seed, 48]).permutation(len(combos))
    chosen = [combos[order[i % len(combos)]] for i in range(count)]
    return [Prompt(combo, caption(combo), seed * 1_000_000 + i) for i, combo in enumerate(chosen)]


def _inside_circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return x * x + y * y <= 1.0


def _inside_square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) <= 0.92


def _inside_triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Points up; base 2.3, height 1.95, its centroid at the origin."""
    return (y <= 0.65) & (np.abs(x) <= (y + 1.3) * (1.15 / 1.95))


def _inside_cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = np.abs(x), np.abs(y)
    return (np.maximum(x, y) <= 1.12) & (np.minimum(x, y) <= 0.38)


OUTLINES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": _inside_circle,
    "square": _inside_square,
    "triangle": _inside_triangle,
    "cross": _inside_cross,
}
"""Whether points, in units of the shape's radius about its centre, lie inside it."""


def coverage(shape: str, centre: tuple[float, float], radius: float, size: int, samples: int = 4) -> np.ndarray:
    """How much of each pixel a shape covers, [size, size] in [0, 1], from samples x samples points a pixel."""
    cover = np.zeros((size, size), np.float32)
    reach = 1.5 * radius + 1
    x0, x1 = (int(np.clip(v, 0, size)) for v in (centre[0] - reach, centre[0] + reach + 1))
    y0, y1 = (int(np.clip(v, 0, size)) for v in (centre[1] - reach, centre[1] + reach + 1))
    if x1 <= x0 or y1 <= y0:
        return cover
    offsets = (np.arange(samples) + 0.5) / samples
    xs = ((np.arange(x0, x1)[:, None] + offsets).ravel() - centre[0]) / radius
    ys = ((np.arange(y0, y1)[:, None] + offsets).ravel() - centre[1]) / radius
    inside = OUTLINES[shape](xs[None, :], ys[:, None]).astype(np.float32)
    cover[y0:y1, x0:x1] = inside.reshape(y1 - y0, samples, x1 - x0, samples).mean((1, 3))
    return cover


def draw_motion(
    combo: Combo, rng: np.random.Generator, frames: int = FRAMES, size: int = SIZE, roaming: bool = False
) -> Motion:
    """A path that keeps the shape in view and its direction plain: two pixels a frame through the middle, on one of
    three lines.

    At 64 pixels the radius is 12.5, the lines lie 8 pixels apart, and the centre goes from 16 to 48: 8 pixels, one
    cell of an autoencoder's 8 x 8 grid, for every four frames. So each latent frame is a shifted copy of the one
    before, which is what makes shapes learnable in minutes. ``roaming`` begins up to 8 pixels sooner or later, so that
    what follows a clip is in view, and has been seen.
    """
    unit = size / 64
    across = (32 + 8 * rng.integers(-1, 2)) * unit
    start = 16 + (8 * int(rng.integers(-1, 2)) if roaming else 0)
    along = (start + 2 * np.arange(frames)) * unit
    dx, dy = DIRECTIONS[combo.direction]
    if dx + dy < 0:
        along = size - along
    line = np.full(frames, float(across))
    return Motion(np.stack([along, line] if dx else [line, along], 1), 12.5 * unit)


def render(
    combo: Combo, seed: int | Sequence[int], frames: int = FRAMES, size: int = SIZE, roaming: bool = False
) -> np.ndarray:
    """One antialiased clip, uint8 [T, H, W, 3]; the seed decides where the shape is (`draw_motion`)."""
    return render_motion(combo, draw_motion(combo, np.random.default_rng(seed), frames, size, roaming), size)


def render_motion(combo: Combo, motion: Motion, size: int = SIZE) -> np.ndarray:
    """The clip of a combination on a given path, uint8 [T, H, W, 3]."""
    cover = np.stack([coverage(combo.shape, (x, y), motion.radius, size) for x, y in motion.centres])[..., None]
    colour = np.array(COLOURS[combo.colour], np.float32)
    background = np.array(BACKGROUNDS[combo.background], np.float32)
    return np.rint(background + cover * (colour - background)).astype(np.uint8)


def training_clips(count: int, seed: int = 0) -> Iterator[tuple[Combo, tuple[int, int]]]:
    """`count` pairs of a training combination and the seed of its clip; each combination equally often, in turn."""
    combos = train_combos()
    for i in range(count):
        yield combos[i % len(combos)], (seed, i)


def _write_clip(path: Path, combo: Combo, seed: tuple[int, int], shape: tuple[int, int], roaming: bool) -> Path:
    write_video(path, render(combo, seed, *shape, roaming), FPS)
    path.with_suffix(".txt").write_text(caption(combo) + "\n", encoding="utf-8")
    return path


def write_dataset(
    folder: Path | str,
    count: int,
    seed: int = 0,
    *,
    frames: int = FRAMES,
    size: int = SIZE,
    workers: int = 2,
    roaming: bool = False,
) -> list[Path]:
    """Writes `count` training clips as NNNNN.mp4 with NNNNN.txt beside them; held-out combinations never occur."""
    return write_clips(folder, training_clips(count, seed), frames=frames, size=size, workers=workers, roaming=roaming)


def write_pictures(folder: Path | str, count: int, seed: int = 0) -> list[Path]:
    """Writes `count` pictures of training combinations as NNNNN.png with NNNNN.txt beside them: one of the frames of a
    `roaming` clip that begin a latent frame."""
    from PIL import Image

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i, (combo, key) in enumerate(training_clips(count, seed)):
        rng = np.random.default_rng(key)
        motion = draw_motion(combo, rng, roaming=True)
        frame = 4 * int(rng.integers(FRAMES // 4 + 1))
        paths.append(folder / f"{i:05d}.png")
        still = render_motion(combo, Motion(motion.centres[frame : frame + 1], motion.radius))
        Image.fromarray(still[0]).save(paths[-1])
        paths[-1].with_suffix(".txt").write_text(caption(combo) + "\n", encoding="utf-8")
    return paths


def write_clips(
    folder: Path | str,
    clips: Iterable[tuple[Combo, tuple[int, int]]],
    *,
    frames: int = FRAMES,
    size: int = SIZE,
    workers: int = 2,
    roaming: bool = False,
) -> list[Path]:
    """Writes clips, pairs of a combination and a seed, as NNNNN.mp4 with NNNNN.txt beside them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(folder / f"{i:05d}.mp4", combo, key, (frames, size), roaming) for i, (combo, key) in enumerate(clips)]
    if workers <= 1 or len(jobs) < 64:
        return [_write_clip(*job) for job in jobs]
    with ProcessPoolExecutor(workers) as pool:
        return list(pool.map(_write_clip, *zip(*jobs, strict=True), chunksize=32))
