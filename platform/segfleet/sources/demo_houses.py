"""Upright planes of the demo scenes: facades of houses, roofs, walls, fences."""

from dataclasses import dataclass, field

import numpy as np

from segfleet.sources.demo_paint import Canvas, noise
from segfleet.sources.demo_things import Point


@dataclass(frozen=True, kw_only=True)
class Facade:
    """One upright plane of a building, wall or fence, from `start` to `end`; shadows of these come from the skyline."""

    start: Point
    end: Point
    low: float
    high: float
    id: int
    style: "Style"
    normal: tuple[float, float, float]

    @property
    def place(self) -> Point:
        """(u, z) of its middle."""
        return (self.start[0] + self.end[0]) / 2, (self.start[1] + self.end[1]) / 2

    def shadow(self) -> list[tuple[list[Point], float, float]]:
        """Return what throws its shadow."""
        return []

    def paint(self, canvas: Canvas, lit: float) -> None:
        """Paint it."""
        style, light = self.style, canvas.light
        factor = light.on(self.normal, lit).astype(np.float32)
        shade = light.on(self.normal, 0.0).astype(np.float32)

        def texture(s: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
            rgb, opaque = style.colour_at(s, y, light.haze)
            rise = np.clip((y - style.shadow_m) / 0.6 + 0.5, 0, 1)[..., None] if lit else 0.0
            return rgb * (shade + (factor - shade) * rise), opaque

        canvas.wall(self.start, self.end, (self.low, self.high), texture, self.id)


@dataclass(frozen=True, kw_only=True)
class Style:
    """How a facade looks: `kind` is house, office, blank, roof, wall, brick, railing, mesh, boards or hedge."""

    kind: str
    colour: np.ndarray
    trim: np.ndarray
    seed: int
    floor_m: float = 3.2
    bay_m: float = 2.6
    window: tuple[float, float] = (0.45, 0.55)
    """Part of a bay's width and of a floor's height."""
    has_shop: bool = False
    shop: np.ndarray = field(default_factory=lambda: np.array([60.0, 60.0, 60.0]))
    eaves_m: float = 100.0
    shadow_m: float = -10.0
    """Height up to which the houses across the street throw their shadow."""

    @property
    def is_solid(self) -> bool:
        """Whether nothing can be seen through it."""
        return self.kind not in ("railing", "mesh")

    def colour_at(
        self, s: np.ndarray, y: np.ndarray, sky: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Return colour (n, 3) and opacity (n,) or None at s metres along (n,) and y metres up (n,)."""
        grain = noise(y * 22 + self.seed, s * 22 + self.seed * 5)
        stain = noise(y * 3.1 + self.seed * 3, s * 5.3)
        rgb = self.colour.astype(np.float32) * (0.72 + 0.22 * grain + 0.34 * stain)[..., None]
        if self.kind in ("house", "office"):
            self._add_windows(rgb, s, y, sky)
        elif self.kind == "roof":
            rows = (y * 4) % 1 < 0.25
            rgb[rows] *= 0.8
        elif self.kind == "brick":
            mortar = ((y * 5) % 1 < 0.18) | (((s * 2 + np.floor(y * 5) * 0.5) % 1) < 0.1)
            rgb[mortar] *= 1.25
        elif self.kind == "wall":
            joints = (s % 2.4 < 0.05) | (y > self.eaves_m - 0.12)
            rgb[joints] *= 0.7
        elif self.kind == "boards":
            rgb *= np.where(s % 0.16 < 0.03, 0.55, 0.85 + 0.3 * ((np.floor(s / 0.16) * 7.3) % 1))[..., None]
            return rgb, None
        elif self.kind in ("railing", "mesh"):
            return rgb, self._bars(s, y)
        return rgb, None

    def _bars(self, s: np.ndarray, y: np.ndarray) -> np.ndarray:
        top = self.eaves_m
        rails = (y > top - 0.08) | ((y > 0.12) & (y < 0.2)) | (s % 2.2 < 0.1)
        if self.kind == "railing":
            return rails | (s % 0.17 < 0.06)
        return rails | (((s + y) % 0.24) < 0.055) | (((s - y) % 0.24) < 0.055)

    def _add_windows(self, rgb: np.ndarray, s: np.ndarray, y: np.ndarray, sky: np.ndarray) -> None:
        ground = 3.9 if self.has_shop else 0.9
        above = y - ground
        floor = np.floor(above / self.floor_m)
        up = above / self.floor_m - floor
        bay = np.floor(s / self.bay_m)
        across = s / self.bay_m - bay
        half_width = self.window[0] / 2
        low, high = 0.22, 0.22 + self.window[1]
        is_wall_top = y > self.eaves_m - 0.55
        off_centre = np.abs(across - 0.5)
        is_bay = (above > 0) & ~is_wall_top
        frame = is_bay & (off_centre < half_width + 0.05) & (up > low - 0.05) & (up < high + 0.04)
        pane = is_bay & (off_centre < half_width) & (up > low) & (up < high)
        rgb[frame] = self.trim
        chance = ((bay * 12.9898 + floor * 78.233 + self.seed) * 0.61803) % 1
        glass = np.empty_like(rgb)
        height = np.clip((up - low) / (high - low), 0, 1)
        glass[:] = np.array([38, 44, 52], np.float32) + (height * (0.1 + 0.45 * chance))[..., None] * (
            sky * 0.62
        )
        curtain = (chance > 0.72) & (np.abs(across - 0.5) > half_width * 0.45)
        glass[curtain] = self.trim * 0.75
        bars = (off_centre < 0.02) | (np.abs(height - 0.66) < 0.025)
        if self.kind == "house":
            glass[bars] = self.trim * 0.9
        np.copyto(rgb, glass, where=pane[..., None])
        sill = is_bay & (off_centre < half_width + 0.08) & (up > low - 0.09) & (up <= low - 0.05)
        rgb[sill] *= 0.7
        band = (above > -0.25) & (above < 0) | is_wall_top & (y < self.eaves_m - 0.3)
        rgb[band] = rgb[band] * 0.3 + self.trim * 0.62
        if self.has_shop:
            self._add_shop(rgb, s, y)
        else:
            rgb[y < 0.6] *= 0.66
            door = (bay % 4 == self.seed % 4) & (off_centre < 0.24) & (y < 2.3)
            rgb[door] = self.shop
            rgb[door & (off_centre < 0.03)] *= 0.6

    def _add_shop(self, rgb: np.ndarray, s: np.ndarray, y: np.ndarray) -> None:
        width = 2 * self.bay_m
        bay = np.floor(s / width)
        across = s / width - bay
        glass = (y > 0.5) & (y < 2.75) & (across > 0.06) & (across < 0.94)
        chance = (bay * 0.377 + self.seed * 0.173) % 1
        goods = noise(y * 30 + self.seed, s * 30)
        inside = np.stack([40 + 120 * goods * chance, 42 + 95 * goods, 46 + 80 * goods * (1 - chance)], -1)
        np.copyto(rgb, inside.astype(np.float32), where=glass[..., None])
        rgb[(y <= 0.5)] *= 0.6
        board = (y > 2.85) & (y < 3.6)
        rgb[board] = self.shop * (0.8 + 0.3 * chance[board])[..., None]
        letters = (
            board
            & (y > 3.02)
            & (y < 3.42)
            & (across > 0.15)
            & (across < 0.75)
            & (noise(s * 26, y * 3 + self.seed) > 0.52)
        )
        rgb[letters] = 232 - 0.6 * self.shop
        door = (y < 2.6) & (np.abs(across - 0.5) < 0.1) & (bay % 2 == 0)
        rgb[door] *= 0.55
