"""Paint for the demo scenes: a camera, light, noise, and a canvas that keeps colour, id and depth of each pixel.

Road coordinates, metres: u across (right is positive, 0 is the middle of the road), y up, z along the road. Pixel
coordinates, canvas pixels: columns to the right, rows downwards. Colours are 0..255.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

Colour = Sequence[float] | np.ndarray
Texture = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray | None]]
"""(s, y) in metres along and up a wall, (n,) each -> colour (n, 3) and where it is opaque (n,), None for everywhere."""

NEAR_M = 0.7
NOISE_SIZE = 256


@dataclass(frozen=True, kw_only=True)
class Camera:
    """A pinhole camera above a road that bends as a parabola; pitch is the height of the horizon in the picture."""

    width: int
    height: int
    focal: float
    horizon: float
    height_m: float
    u: float
    yaw: float
    bend: float
    """Curvature of the road in 1 / metres; positive bends to the right."""

    def x(self, u: float, z: float) -> float:
        """Return the metres to the right of the camera's axis."""
        return u - self.u + 0.5 * self.bend * z * z - self.yaw * z

    def project(self, u: float, y: float, z: float) -> tuple[float, float]:
        """Return (column, row) of a point; what is behind the camera is taken to be just in front of it."""
        z_seen = max(z, NEAR_M)
        column = self.width / 2 + self.focal * self.x(u, z) / z_seen
        return column, self.horizon - self.focal * (y - self.height_m) / z_seen

    def scale(self, z: float) -> float:
        """Return pixels per metre at distance z."""
        return self.focal / max(z, NEAR_M)


@dataclass(frozen=True, kw_only=True)
class Light:
    """Sun, sky and air: what a face of given normal receives, and what distance does to colours."""

    to_sun: tuple[float, float, float]
    sun: np.ndarray
    sky: np.ndarray
    haze: np.ndarray
    haze_per_m: float

    def on(self, normal: tuple[float, float, float], lit: float = 1.0) -> np.ndarray:
        """Return the factor (3,) of a face's colour; `lit` 0 is in shadow, 1 in the sun."""
        cosine = max(0.0, sum(a * b for a, b in zip(normal, self.to_sun, strict=True)))
        return self.sky * (0.82 + 0.18 * normal[1]) + self.sun * (cosine * lit)

    def shift(self, height_m: float) -> tuple[float, float]:
        """Return how far (u, z) the shadow of a point at this height falls."""
        x, y, z = self.to_sun
        return -x / y * height_m, -z / y * height_m


@lru_cache(maxsize=1)
def _noise() -> np.ndarray:
    """Return a tile of value noise in five octaves, 0..1 with mean 0.5, that repeats without a seam."""
    rng = np.random.default_rng(20160427)
    steps = np.arange(NOISE_SIZE)
    total = np.zeros((NOISE_SIZE, NOISE_SIZE))
    for octave in range(3, 8):
        cells = 2**octave
        grid = rng.random((cells, cells))
        position = steps * cells / NOISE_SIZE
        low = position.astype(int)
        part = position - low
        part = part * part * (3 - 2 * part)
        high = (low + 1) % cells
        rows = grid[low] * (1 - part)[:, None] + grid[high] * part[:, None]
        total += (rows[:, low] * (1 - part) + rows[:, high] * part) * 0.62 ** (octave - 3)
    total = (total - total.mean()) / (4.5 * total.std()) + 0.5
    return np.clip(total, 0, 1).astype(np.float32)


def noise(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return smooth noise 0..1 at (a, b); one unit is one grain, 32 units one blotch."""
    tile = _noise()
    return tile[a.astype(np.int32) & (NOISE_SIZE - 1), b.astype(np.int32) & (NOISE_SIZE - 1)]


class Shape(NamedTuple):
    """A polygon in canvas pixels; colour None leaves the picture and sets the id only (spokes, gaps)."""

    points: Sequence[tuple[float, float]]
    colour: Colour | None
    id: int
    line_width: float = 0.0
    """Above 0: the closed outline in this width instead of the area."""


class Canvas:
    """Colour (h, w, 3), id (h, w) and depth (h, w); of two things on one pixel the nearer stays."""

    def __init__(self, camera: Camera, light: Light) -> None:
        self.camera = camera
        self.light = light
        self.rgb = np.zeros((camera.height, camera.width, 3), np.float32)
        self.ids = np.zeros((camera.height, camera.width), np.uint8)
        self.depth = np.full((camera.height, camera.width), np.inf, np.float32)
        self.ground_depth = np.zeros((camera.height, camera.width), np.float32)

    def put(
        self,
        top: int,
        left: int,
        rgb: np.ndarray,
        ids: np.ndarray | int,
        depth: np.ndarray | float,
        inside: np.ndarray,
        opaque: np.ndarray | None = None,
    ) -> None:
        """Lay a patch where `inside` and nearer; where not `opaque` it has an id but lets the picture through."""
        height, width = inside.shape
        window = (slice(top, top + height), slice(left, left + width))
        nearer = inside & (self.depth[window] > depth)
        np.copyto(self.ids[window], ids, where=nearer, casting="unsafe")
        np.copyto(self.depth[window], depth, where=nearer, casting="unsafe")
        seen = nearer if opaque is None else nearer & opaque
        np.copyto(self.rgb[window], rgb, where=seen[..., None], casting="unsafe")

    def wall(
        self,
        start: tuple[float, float],
        end: tuple[float, float],
        y: tuple[float, float],
        texture: Texture,
        id: int,
    ) -> None:
        """Paint an upright plane from `start` to `end` (u, z), between two heights, in true perspective."""
        camera = self.camera
        xa, za = camera.x(*start), start[1]
        xb, zb = camera.x(*end), end[1]
        length = float(np.hypot(xb - xa, zb - za))
        if max(za, zb) <= NEAR_M or length == 0:
            return
        clipped = [
            (x0 + (x1 - x0) * max(0.0, (NEAR_M - z0) / (z1 - z0)) if z0 < NEAR_M else x0, max(z0, NEAR_M))
            for x0, z0, x1, z1 in ((xa, za, xb, zb), (xb, zb, xa, za))
        ]
        edges = sorted(camera.width / 2 + camera.focal * x / z for x, z in clipped)
        left, right = max(0, round(edges[0])), min(camera.width, round(edges[1]))
        if left >= right:
            return
        ray = (np.arange(left, right, dtype=np.float32) + 0.5 - camera.width / 2) / camera.focal
        slope = (xb - xa) - ray * (zb - za)
        slope = np.where(np.abs(slope) < 1e-6, 1e-6, slope)
        part = np.clip((ray * za - xa) / slope, 0, 1)
        z = np.maximum(za + part * (zb - za), NEAR_M)
        top = max(0, int(np.floor(camera.horizon - camera.focal * ((y[1] - camera.height_m) / z).max())))
        bottom = min(
            camera.height, int(np.ceil(camera.horizon - camera.focal * ((y[0] - camera.height_m) / z).min()))
        )
        if top >= bottom:
            return
        rows = np.arange(top, bottom, dtype=np.float32)[:, None] + 0.5
        up = camera.height_m - (rows - camera.horizon) * (z / camera.focal)
        window = (slice(top, bottom), slice(left, right))
        nearer = (up >= y[0]) & (up < y[1]) & (self.depth[window] > z)
        at = np.nonzero(nearer)
        if not len(at[0]):
            return
        rgb, opaque = texture((part * length).astype(np.float32)[at[1]], up[at])
        self.depth[window][at] = z[at[1]]
        self.ids[window][at] = id
        if opaque is not None:
            at = (at[0][opaque], at[1][opaque])
            rgb = rgb[opaque]
        self.rgb[window][at] = rgb

    def shapes(self, shapes: Sequence[Shape], depth: float, grain: float = 0.06) -> None:
        """Paint polygons, later ones over earlier ones, all at one depth; `grain` is the strength of their texture."""
        if not shapes:
            return
        points = np.array([point for shape in shapes for point in shape.points])
        left, top = np.maximum(0, np.floor(points.min(0)) - 1).astype(int)
        right, bottom = np.ceil(points.max(0)).astype(int) + 2
        right, bottom = min(right, self.camera.width), min(bottom, self.camera.height)
        if left >= right or top >= bottom:
            return
        if not (self.depth[top:bottom, left:right] > depth).any():
            return
        size = (right - left, bottom - top)
        rgba_image, id_image = Image.new("RGBA", size), Image.new("L", size)
        draw_rgba, draw_ids = ImageDraw.Draw(rgba_image), ImageDraw.Draw(id_image)
        for shape in shapes:
            outline = [(x - left, y - top) for x, y in shape.points]
            if shape.line_width:
                outline.append(outline[0])
                width = max(1, round(shape.line_width))
                draw_ids.line(outline, fill=shape.id, width=width)
                if shape.colour is not None:
                    draw_rgba.line(outline, fill=_whole(shape.colour), width=width)
            else:
                draw_ids.polygon(outline, fill=shape.id)
                if shape.colour is not None:
                    draw_rgba.polygon(outline, fill=_whole(shape.colour))
        rgba = np.asarray(rgba_image)
        rgb = rgba[..., :3].astype(np.float32)
        ids = np.asarray(id_image)
        if grain:
            height, width = ids.shape
            shift = int(depth * 37)
            grains = _noise()[
                (np.arange(height) + shift)[:, None] & (NOISE_SIZE - 1), np.arange(width) & (NOISE_SIZE - 1)
            ]
            rgb = rgb * (1 + grain * 2 * (grains - 0.5))[..., None]
        self.put(top, left, rgb, ids, depth, ids > 0, rgba[..., 3] > 0)

    def blob(
        self,
        centre: tuple[float, float],
        radii: tuple[float, float],
        colour: Colour,
        *,
        depth: float,
        id: int,
        seed: int,
        lit: float,
        roundness: float = 2.0,
        holes: float = 0.0,
    ) -> None:
        """Paint a leafy mass: an ellipse with an irregular edge, bright to the sun, dark below, with a few holes."""
        (x, y), (rx, ry) = centre, radii
        if rx < 1 or ry < 1:
            return
        reach = 1.3
        left, right = max(0, int(x - reach * rx)), min(self.camera.width, int(x + reach * rx) + 1)
        top, bottom = max(0, int(y - reach * ry)), min(self.camera.height, int(y + reach * ry) + 1)
        if left >= right or top >= bottom:
            return
        if not (self.depth[top:bottom, left:right] > depth).any():
            return
        across = ((np.arange(left, right, dtype=np.float32) + 0.5 - x) / rx)[None, :]
        down = ((np.arange(top, bottom, dtype=np.float32) + 0.5 - y) / ry)[:, None]
        radius = np.abs(across) ** roundness + np.abs(down) ** roundness
        unit = min(rx, ry)
        lumps = noise(down * (26 * ry / unit) + seed, across * (26 * rx / unit) + seed * 7)
        leaves = noise(down * (95 * ry / unit) + seed * 3, across * (95 * rx / unit) + seed)
        inside = radius + 1.5 * (lumps - 0.5) + 0.5 * (leaves - 0.5) < 1
        to_sun = self.light.to_sun
        towards = across * to_sun[0] - down * (0.4 + 0.6 * to_sun[1])
        brightness = 0.5 + 0.9 * (lumps - 0.5) + 1.1 * (leaves - 0.5) + 0.24 * towards
        sky = self.light.sky * np.clip(0.62 + 0.5 * (brightness - 0.5), 0.2, 1.2)[..., None]
        sun = self.light.sun * (np.clip(brightness - 0.15, 0, 1.2) * 0.75 * lit)[..., None]
        rgb = np.asarray(colour, np.float32) * (sky + sun)
        opaque = None
        if holes:
            opaque = leaves + 0.3 * lumps > holes * (0.4 + 0.6 * np.minimum(radius, 1))
        self.put(top, left, rgb, id, depth, inside, opaque)


def _whole(colour: Colour) -> tuple[int, int, int, int]:
    """Return the colour, opaque, as Pillow takes it."""
    red, green, blue = (min(255, max(0, round(float(value)))) for value in colour)
    return red, green, blue, 255
