"""The things that stand in a demo scene: each knows its place, its shadow's outline and how it is painted.

Places are road coordinates (see demo_paint).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import numpy as np

from segfleet.sources.demo_paint import Canvas, Colour, Shape

STATIC, DYNAMIC, BUILDING, WALL, FENCE = 4, 5, 11, 12, 13
POLE, TRAFFIC_LIGHT, TRAFFIC_SIGN, VEGETATION = 17, 19, 20, 21
PERSON, RIDER, CAR, TRUCK, BUS, TRAIN, MOTORCYCLE, BICYCLE = 24, 25, 26, 27, 28, 31, 32, 33

Point = tuple[float, float]


class Thing(Protocol):
    """Something upright in the scene."""

    @property
    def place(self) -> Point:
        """(u, z) of its middle, metres."""

    def shadow(self) -> list[tuple[list[Point], float, float]]:
        """Return (outline (u, z) on the ground, lowest and highest metres of what throws the shadow) of each part."""

    def paint(self, canvas: Canvas, lit: float) -> None:
        """Paint it; `lit` 0 stands in shadow, 1 in the sun."""


def _disc(u: float, z: float, radius: float, corners: int = 10) -> list[Point]:
    angles = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    return [(u + radius * float(np.cos(a)), z + radius * float(np.sin(a))) for a in angles]


# ---------------------------------------------------------------------------------------------------- flat figures


@dataclass
class Figure:
    """Flat shapes in an upright plane, in metres: a across (to the right), y up; `lean` narrows them (side view 1)."""

    canvas: Canvas
    place: Point
    lit: float
    lean: float = 1.0
    shapes: list[Shape] = field(default_factory=list)

    def __post_init__(self) -> None:
        light = self.canvas.light
        self._factor = light.on((-0.35, 0.25, -0.9), self.lit)
        self._scale = self.canvas.camera.scale(self.place[1])
        self._foot = self.canvas.camera.project(self.place[0], 0.0, self.place[1])

    def polygon(
        self, points: Sequence[Point], colour: Colour | None, id: int, *, glows: bool = False
    ) -> None:
        """Add a polygon; one that glows is not shaded."""
        self.shapes.append(Shape(self._pixels(points), self._shaded(colour, glows), id))

    def disc(
        self, centre: Point, radius: float, colour: Colour | None, id: int, *, glows: bool = False
    ) -> None:
        """Add a filled circle."""
        self.polygon(_disc(*centre, radius, self._corners(radius)), colour, id, glows=glows)

    def ring(self, centre: Point, radius: float, width: float, colour: Colour, id: int) -> None:
        """Add a circle's outline."""
        pixels = self._pixels(_disc(*centre, radius, self._corners(radius)))
        self.shapes.append(Shape(pixels, self._shaded(colour, False), id, max(1.0, width * self._scale)))

    def limb(self, points: Sequence[Point], width: float, colour: Colour, id: int) -> None:
        """Add a bent stroke of constant width with square ends."""
        for (a0, y0), (a1, y1) in pairwise(points):
            length = max(1e-6, float(np.hypot(a1 - a0, y1 - y0)))
            da, dy = (y1 - y0) / length * width / 2, -(a1 - a0) / length * width / 2
            da /= max(self.lean, 0.35)
            self.polygon(
                [(a0 + da, y0 + dy), (a1 + da, y1 + dy), (a1 - da, y1 - dy), (a0 - da, y0 - dy)], colour, id
            )

    def box(self, left: float, low: float, right: float, high: float, colour: Colour | None, id: int) -> None:
        """Add an upright rectangle."""
        self.polygon([(left, low), (right, low), (right, high), (left, high)], colour, id)

    def paint(self, grain: float = 0.1) -> None:
        """Put all shapes on the canvas at the figure's depth."""
        self.canvas.shapes(self.shapes, self.place[1], grain)

    def _corners(self, radius: float) -> int:
        """Return how many corners make a circle of this radius look round."""
        return 10 if radius * self._scale < 10 else 24

    def _pixels(self, points: Sequence[Point]) -> list[Point]:
        column, row = self._foot
        return [(column + a * self.lean * self._scale, row - y * self._scale) for a, y in points]

    def _shaded(self, colour: Colour | None, glows: bool) -> Colour | None:
        return colour if colour is None or glows else np.asarray(colour) * self._factor


@dataclass(frozen=True, kw_only=True)
class Person:
    """A walking or standing person; `step` -1..1 is the phase of the walk, `lean` how far seen from the side."""

    place: Point
    height_m: float
    step: float
    lean: float
    skin: Colour
    top: Colour
    trousers: Colour
    hair: Colour
    has_bag: bool
    has_skirt: bool

    def shadow(self) -> list[tuple[list[Point], float, float]]:
        """Return what throws its shadow."""
        return [(_disc(*self.place, 0.22), 0.0, self.height_m)]

    def paint(self, canvas: Canvas, lit: float) -> None:
        """Paint it."""
        figure = Figure(canvas, self.place, lit)
        h, swing = self.height_m, self.step * 0.2 * self.height_m * self.lean
        hip, neck, width = 0.5 * h, 0.83 * h, (0.27 - 0.07 * self.lean) * h
        dark = np.asarray(self.trousers) * 0.8
        figure.limb(
            [(0.03 * h, hip), (swing + 0.02, 0.27 * h), (1.1 * swing, 0.02 * h)],
            0.1 * h,
            self.trousers,
            PERSON,
        )
        figure.limb(
            [(-0.03 * h, hip), (-swing - 0.02, 0.27 * h), (-1.3 * swing, 0.04 * h)], 0.1 * h, dark, PERSON
        )
        for foot in (1.1 * swing, -1.3 * swing):
            figure.box(foot - 0.05 * h, 0, foot + 0.07 * h, 0.045 * h, (32, 28, 28), PERSON)
        if self.has_skirt:
            figure.polygon(
                [(-0.1 * h, hip + 0.03), (0.1 * h, hip + 0.03), (0.15 * h, 0.3 * h), (-0.15 * h, 0.3 * h)],
                dark,
                PERSON,
            )
        arm = np.asarray(self.top) * 0.82
        figure.limb(
            [(-width / 2, 0.8 * h), (-width / 2 - 0.4 * swing, 0.62 * h), (-width / 2, 0.47 * h)],
            0.07 * h,
            arm,
            PERSON,
        )
        figure.polygon(
            [
                (-width / 2, 0.8 * h),
                (-width / 4, neck),
                (width / 4, neck),
                (width / 2, 0.8 * h),
                (0.42 * width, hip - 0.03),
                (-0.42 * width, hip - 0.03),
            ],
            self.top,
            PERSON,
        )
        figure.limb(
            [(width / 2, 0.8 * h), (width / 2 + 0.5 * swing, 0.63 * h), (width / 2 + swing, 0.48 * h)],
            0.07 * h,
            arm,
            PERSON,
        )
        figure.disc((width / 2 + swing, 0.47 * h), 0.03 * h, self.skin, PERSON)
        if self.has_bag:
            figure.box(
                -0.75 * width, 0.55 * h, -0.3 * width, 0.76 * h, np.asarray(self.trousers) * 0.6 + 25, PERSON
            )
        figure.box(-0.03 * h, 0.8 * h, 0.03 * h, 0.88 * h, self.skin, PERSON)
        figure.disc((0, 0.925 * h), 0.068 * h, self.skin, PERSON)
        figure.polygon([p for p in _disc(0, 0.94 * h, 0.072 * h) if p[1] > 0.93 * h], self.hair, PERSON)
        figure.paint()


def _bicycle(figure: Figure, colour: Colour) -> None:
    tyre = (34, 34, 36)
    back, front, pedals, saddle, bar = (-0.53, 0.34), (0.53, 0.34), (-0.05, 0.3), (-0.2, 0.9), (0.4, 0.98)
    for hub in (back, front):
        figure.disc(hub, 0.34, None, BICYCLE)
        figure.ring(hub, 0.33, 0.045, tyre, BICYCLE)
        figure.disc(hub, 0.04, (120, 120, 125), BICYCLE)
    for ends in (
        (back, pedals),
        (pedals, saddle),
        (saddle, back),
        (pedals, (0.35, 0.8)),
        (saddle, (0.35, 0.8)),
        (front, bar),
    ):
        figure.limb(ends, 0.045, colour, BICYCLE)
    figure.limb([(-0.34, 0.93), (-0.1, 0.93)], 0.07, (30, 28, 28), BICYCLE)
    figure.limb([bar, (0.26, 1.02)], 0.05, (40, 40, 42), BICYCLE)


def _motorcycle(figure: Figure, colour: Colour) -> None:
    dark, metal = (36, 36, 38), (130, 130, 135)
    back, front = (-0.68, 0.32), (0.7, 0.32)
    for hub in (back, front):
        figure.disc(hub, 0.32, dark, MOTORCYCLE)
        figure.disc(hub, 0.18, metal, MOTORCYCLE)
    figure.polygon([(-0.5, 0.3), (0.35, 0.28), (0.42, 0.6), (-0.45, 0.62)], (62, 62, 66), MOTORCYCLE)
    figure.polygon([(-0.95, 0.82), (-0.4, 0.58), (0.1, 0.72), (-0.1, 0.84)], dark, MOTORCYCLE)
    figure.polygon([(-0.15, 0.68), (0.4, 0.6), (0.5, 0.9), (0.05, 0.98)], colour, MOTORCYCLE)
    figure.polygon([(0.35, 0.6), (0.62, 0.62), (0.6, 1.02), (0.42, 1.1)], colour, MOTORCYCLE)
    figure.limb([front, (0.45, 1.0), (0.25, 1.05)], 0.07, metal, MOTORCYCLE)
    figure.limb([(-0.8, 0.35), (0.0, 0.3)], 0.1, metal, MOTORCYCLE)


@dataclass(frozen=True, kw_only=True)
class TwoWheeler:
    """A bicycle or motorcycle, ridden where it has a rider; `lean` 1 from the side, near 0 from behind."""

    place: Point
    id: int
    lean: float
    colour: Colour
    rider: Person | None

    def shadow(self) -> list[tuple[list[Point], float, float]]:
        """Return what throws its shadow."""
        return [(_disc(*self.place, 0.35), 0.0, 1.0 if self.rider is None else 1.6)]

    def paint(self, canvas: Canvas, lit: float) -> None:
        """Paint it."""
        figure = Figure(canvas, self.place, lit, lean=self.lean)
        is_bicycle = self.id == BICYCLE
        (_bicycle if is_bicycle else _motorcycle)(figure, self.colour)
        if abs(self.lean) < 0.5:
            dark = (30, 30, 32)
            width = (0.04 if is_bicycle else 0.1) / max(abs(self.lean), 0.1)
            figure.box(-width, 0, width, 0.68, dark, self.id)
            bar = (0.27 if is_bicycle else 0.38) / max(abs(self.lean), 0.1)
            figure.limb([(-bar, 1.0), (bar, 1.0)], 0.05, (60, 60, 62), self.id)
        if self.rider is not None:
            self._paint_rider(figure, self.rider, 0.93 if is_bicycle else 0.78)
        figure.paint()

    def _paint_rider(self, figure: Figure, rider: Person, seat: float) -> None:
        wide = 1.0 / max(abs(self.lean), 0.3)
        shoulder, head = (0.14, seat + 0.52), (0.22, seat + 0.74)
        hip, bar = (-0.18, seat), (0.38, 1.02)
        dark = np.asarray(rider.trousers) * 0.8
        figure.limb([hip, (0.16, seat - 0.22), (-0.02, 0.24)], 0.17, dark, RIDER)
        figure.limb([hip, (0.2, seat - 0.05), (0.06, 0.42)], 0.17, rider.trousers, RIDER)
        figure.polygon(
            [
                (hip[0] - 0.13 * wide, hip[1] - 0.02),
                (hip[0] + 0.13 * wide, hip[1] + 0.02),
                (shoulder[0] + 0.12 * wide, shoulder[1] - 0.06),
                (shoulder[0] + 0.04 * wide, shoulder[1] + 0.1),
                (shoulder[0] - 0.16 * wide, shoulder[1] + 0.02),
            ],
            rider.top,
            RIDER,
        )
        figure.limb([shoulder, (0.3, seat + 0.28), bar], 0.11, np.asarray(rider.top) * 0.8, RIDER)
        ellipse = [(head[0] + (a - head[0]) * wide, y) for a, y in _disc(*head, 0.12)]
        figure.polygon(ellipse, rider.skin, RIDER)
        helmet = rider.hair if self.id == BICYCLE else self.colour
        figure.polygon([(a, y) for a, y in ellipse if y > head[1] - 0.02], helmet, RIDER)


# ---------------------------------------------------------------------------------------------------- street furniture


@dataclass(frozen=True, kw_only=True)
class Post:
    """A pole, and what hangs on it: a lamp on an arm, traffic lights or signs."""

    place: Point
    height_m: float
    width_m: float
    colour: Colour
    arm_m: float = 0.0
    has_lamp: bool = False
    lights: tuple[tuple[float, float], ...] = ()
    """(metres across, metres up) of each traffic light."""
    shows: int = 0
    """0 red, 1 amber, 2 green."""
    signs: tuple[tuple[str, float, float], ...] = ()
    """(kind, metres up, size) of each traffic sign."""

    def shadow(self) -> list[tuple[list[Point], float, float]]:
        """Return what throws its shadow."""
        return [(_disc(*self.place, max(0.06, self.width_m / 2)), 0.0, self.height_m)]

    def paint(self, canvas: Canvas, lit: float) -> None:
        """Paint it."""
        figure = Figure(canvas, self.place, lit)
        half = self.width_m / 2
        figure.box(-half, 0, half, self.height_m, self.colour, POLE)
        figure.box(0, 0, half, self.height_m, np.asarray(self.colour) * 0.72, POLE)
        figure.box(-1.6 * half, 0, 1.6 * half, 0.5, np.asarray(self.colour) * 0.85, POLE)
        if self.arm_m:
            figure.limb([(0, self.height_m), (self.arm_m, self.height_m + 0.2)], 0.09, self.colour, POLE)
        if self.has_lamp:
            end = self.arm_m
            figure.limb(
                [(end - 0.3, self.height_m + 0.18), (end + 0.4, self.height_m + 0.24)],
                0.17,
                (150, 152, 150),
                POLE,
            )
        for across, up in self.lights:
            self._paint_light(figure, across, up)
        for kind, up, size in self.signs:
            _paint_sign(figure, kind, up, size)
        figure.paint(0.05)

    def _paint_light(self, figure: Figure, across: float, up: float) -> None:
        if across:
            figure.limb([(0, up + 0.9), (across, up + 0.9)], 0.07, self.colour, POLE)
        figure.box(across - 0.17, up, across + 0.17, up + 0.95, (38, 42, 40), TRAFFIC_LIGHT)
        for index, (dim, bright) in enumerate(
            (((62, 22, 20), (255, 60, 40)), ((60, 48, 18), (255, 190, 50)), ((18, 52, 36), (60, 255, 170)))
        ):
            centre = (across, up + 0.78 - 0.3 * index)
            figure.disc(
                centre,
                0.115,
                bright if index == self.shows else dim,
                TRAFFIC_LIGHT,
                glows=index == self.shows,
            )


def _paint_sign(figure: Figure, kind: str, up: float, size: float) -> None:
    white, red, blue, yellow = (232, 232, 228), (196, 30, 36), (24, 84, 168), (236, 190, 30)
    half = size / 2
    if kind == "warning":
        outer = [(-half, up), (half, up), (0, up + 0.88 * size)]
        inner = [(-0.6 * half, up + 0.11 * size), (0.6 * half, up + 0.11 * size), (0, up + 0.66 * size)]
        figure.polygon(outer, red, TRAFFIC_SIGN)
        figure.polygon(inner, white, TRAFFIC_SIGN)
        figure.box(-0.05 * size, up + 0.18 * size, 0.05 * size, up + 0.42 * size, (30, 30, 30), TRAFFIC_SIGN)
    elif kind in ("limit", "duty", "stop"):
        figure.disc((0, up + half), half, blue if kind == "duty" else red, TRAFFIC_SIGN)
        if kind == "limit":
            figure.disc((0, up + half), 0.72 * half, white, TRAFFIC_SIGN)
        else:
            figure.box(-0.6 * half, up + 0.4 * size, 0.6 * half, up + 0.6 * size, white, TRAFFIC_SIGN)
        if kind == "limit":
            figure.box(
                -0.3 * half, up + 0.36 * size, 0.3 * half, up + 0.64 * size, (40, 40, 40), TRAFFIC_SIGN
            )
    elif kind == "priority":
        figure.polygon([(0, up), (half, up + half), (0, up + size), (-half, up + half)], white, TRAFFIC_SIGN)
        core = 0.68 * half
        figure.polygon(
            [(0, up + half - core), (core, up + half), (0, up + half + core), (-core, up + half)],
            yellow,
            TRAFFIC_SIGN,
        )
    elif kind == "parking":
        figure.box(-half, up, half, up + size, blue, TRAFFIC_SIGN)
        figure.box(-0.4 * half, up + 0.15 * size, -0.1 * half, up + 0.85 * size, white, TRAFFIC_SIGN)
        figure.box(-0.1 * half, up + 0.45 * size, 0.4 * half, up + 0.85 * size, white, TRAFFIC_SIGN)
    else:
        colour = yellow if kind == "direction" else (40, 110, 80)
        figure.box(-1.6 * half, up, 1.6 * half, up + size, (40, 40, 40), TRAFFIC_SIGN)
        figure.box(-1.53 * half, up + 0.03, 1.53 * half, up + size - 0.03, colour, TRAFFIC_SIGN)
        for line in (0.25, 0.62):
            figure.box(
                -1.2 * half,
                up + line * size,
                0.7 * half,
                up + (line + 0.12) * size,
                (50, 46, 40),
                TRAFFIC_SIGN,
            )


@dataclass(frozen=True, kw_only=True)
class Litter:
    """Small things that no class of the benchmark holds: bins and boxes (static), carts (dynamic)."""

    place: Point
    id: int
    width_m: float
    height_m: float
    colour: Colour

    def shadow(self) -> list[tuple[list[Point], float, float]]:
        """Return what throws its shadow."""
        return [(_disc(*self.place, self.width_m / 2), 0.0, self.height_m)]

    def paint(self, canvas: Canvas, lit: float) -> None:
        """Paint it."""
        figure = Figure(canvas, self.place, lit)
        half = self.width_m / 2
        figure.box(-half, 0, half, self.height_m, self.colour, self.id)
        figure.box(0.2 * half, 0, half, self.height_m, np.asarray(self.colour) * 0.75, self.id)
        figure.box(
            -1.08 * half,
            0.88 * self.height_m,
            1.08 * half,
            self.height_m,
            np.asarray(self.colour) * 0.6,
            self.id,
        )
        figure.paint()


# ---------------------------------------------------------------------------------------------------- plants


@dataclass(frozen=True, kw_only=True)
class Tree:
    """A trunk and an irregular crown, or a bush where the trunk has no height."""

    place: Point
    trunk_m: float
    crown_m: tuple[float, float]
    """Half width and half height of the crown."""
    colour: Colour
    bark: Colour
    seed: int
    holes: float

    def shadow(self) -> list[tuple[list[Point], float, float]]:
        """Return what throws its shadow."""
        u, z = self.place
        width, height = self.crown_m
        crown = (_disc(u, z, 0.85 * width), self.trunk_m + 0.5 * height, self.trunk_m + 1.4 * height)
        return [crown, (_disc(u, z, 0.2), 0.0, self.trunk_m)] if self.trunk_m else [crown]

    def paint(self, canvas: Canvas, lit: float) -> None:
        """Paint it."""
        camera = canvas.camera
        u, z = self.place
        scale = camera.scale(z)
        width, height = self.crown_m
        if self.trunk_m:
            figure = Figure(canvas, self.place, lit)
            girth = 0.05 * width + 0.09
            top = self.trunk_m + 0.7 * height
            figure.polygon(
                [(-1.25 * girth, 0), (1.25 * girth, 0), (0.7 * girth, top), (-0.7 * girth, top)],
                self.bark,
                VEGETATION,
            )
            figure.polygon(
                [(0.3 * girth, 0), (1.25 * girth, 0), (0.7 * girth, top), (0.2 * girth, top)],
                np.asarray(self.bark) * 0.62,
                VEGETATION,
            )
            for side in (-1, 1):
                figure.limb(
                    [(0, 0.75 * self.trunk_m + 0.2), (side * 0.45 * width, self.trunk_m + 0.6 * height)],
                    0.8 * girth,
                    self.bark,
                    VEGETATION,
                )
            figure.paint(0.3)
        column, row = camera.project(u, self.trunk_m + 0.85 * height, z)
        canvas.blob(
            (column, row),
            (width * scale, height * scale),
            self.colour,
            depth=z - 0.05,
            id=VEGETATION,
            seed=self.seed,
            lit=lit,
            roundness=2.0 if self.trunk_m else 2.6,
            holes=self.holes,
        )
