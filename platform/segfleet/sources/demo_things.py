"""The things that stand in a demo scene: each knows its place, its shadow's outline and how it is painted.

Places are road coordinates (see demo_paint). A vehicle's own coordinates are l ahead, y up, w to its right.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import numpy as np

from segfleet.sources.demo_paint import Canvas, Colour, Shape, noise

STATIC, DYNAMIC, BUILDING, WALL, FENCE = 4, 5, 11, 12, 13
POLE, TRAFFIC_LIGHT, TRAFFIC_SIGN, VEGETATION = 17, 19, 20, 21
PERSON, RIDER, CAR, TRUCK, BUS, TRAIN, MOTORCYCLE, BICYCLE = 24, 25, 26, 27, 28, 31, 32, 33

Point = tuple[float, float]
Solid = tuple[float, float, float, float]


class Thing(Protocol):
    """Something upright in the scene."""

    @property
    def place(self) -> Point:
        """(u, z) of its middle, metres."""

    def shadow(self) -> list[tuple[list[Point], float, float]]:
        """Return (outline (u, z) on the ground, lowest and highest metres of what throws the shadow) of each part."""

    def paint(self, canvas: Canvas, lit: float) -> None:
        """Paint it; `lit` 0 stands in shadow, 1 in the sun."""


def _disc(u: float, z: float, radius: float) -> list[Point]:
    angles = np.linspace(0, 2 * np.pi, 12, endpoint=False)
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
        self.polygon(_disc(*centre, radius), colour, id, glows=glows)

    def ring(self, centre: Point, radius: float, width: float, colour: Colour, id: int) -> None:
        """Add a circle's outline."""
        pixels = self._pixels(_disc(*centre, radius))
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
        figure.limb([hip, shoulder], 0.34, rider.top, RIDER)
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


# ---------------------------------------------------------------------------------------------------- vehicles


@dataclass(frozen=True)
class Vehicle:
    """Tapering boxes with wheels, panes and lamps, at any heading (0 drives away, pi comes towards the camera)."""

    place: Point
    id: int
    heading: float
    solids: tuple["Block", ...]
    wheels: tuple[float, ...]
    """l of each axle."""
    wheel_radius: float
    half_width: float

    def shadow(self) -> list[tuple[list[Point], float, float]]:
        """Return what throws its shadow."""
        parts = []
        for block in self.solids:
            outline = [self.at(x, w) for x, w in _corners(block.bottom)]
            parts.append((outline, block.low if block.low > 0.5 else 0.0, block.high))
        return parts

    def nearest(self) -> float:
        """Return the smallest z of any corner."""
        return min(self.at(x, w)[1] for block in self.solids for x, w in _corners(block.bottom))

    def at(self, ahead: float, right: float) -> Point:
        """Return road coordinates (u, z) of a place in the vehicle's own."""
        sine, cosine = float(np.sin(self.heading)), float(np.cos(self.heading))
        return self.place[0] + ahead * sine + right * cosine, self.place[1] + ahead * cosine - right * sine

    def paint(self, canvas: Canvas, lit: float) -> None:
        """Paint it."""
        shapes: list[Shape] = []
        self._add_treads(canvas, shapes)
        for block in self.solids:
            for name, corners, normal in block.faces():
                self._add_face(canvas, shapes, block, name, corners, normal, lit)
            if block.carries_wheels:
                self._add_wheels(canvas, shapes, lit)
        canvas.shapes(shapes, self.place[1], 0.04)

    def _pixel(self, canvas: Canvas, point: tuple[float, float, float]) -> Point:
        u, z = self.at(point[0], point[2])
        return canvas.camera.project(u, point[1], z)

    def _add_face(
        self,
        canvas: Canvas,
        shapes: list[Shape],
        block: "Block",
        name: str,
        corners: np.ndarray,
        normal: tuple[float, float, float],
        lit: float,
    ) -> None:
        pixels = [self._pixel(canvas, tuple(corner)) for corner in corners]
        if _area(pixels) >= 0:
            return
        sine, cosine = float(np.sin(self.heading)), float(np.cos(self.heading))
        turned = (normal[0] * sine + normal[2] * cosine, normal[1], normal[0] * cosine - normal[2] * sine)
        factor = canvas.light.on(turned, lit)
        shapes.append(Shape(pixels, np.asarray(block.colour) * factor, self.id))
        for detail in block.details:
            if detail.face != name:
                continue
            quad = [
                self._pixel(canvas, _inside(corners, s, t))
                for s, t in (
                    (detail.left, detail.low),
                    (detail.right, detail.low),
                    (detail.right, detail.high),
                    (detail.left, detail.high),
                )
            ]
            colour = np.asarray(detail.colour) * (1.0 if detail.glows else factor)
            shapes.append(Shape(quad, colour, self.id))
            if detail.is_glass:
                sky = np.asarray(detail.colour) * factor * 0.4 + 0.35 * canvas.light.haze * (0.4 + 0.6 * lit)
                upper = [
                    self._pixel(canvas, _inside(corners, s, t))
                    for s, t in (
                        (detail.left, detail.high),
                        (detail.right, detail.high),
                        (
                            detail.left + 0.65 * (detail.right - detail.left),
                            detail.low + 0.55 * (detail.high - detail.low),
                        ),
                        (detail.left, detail.low + 0.4 * (detail.high - detail.low)),
                    )
                ]
                shapes.append(Shape(upper, sky, self.id))

    def _add_treads(self, canvas: Canvas, shapes: list[Shape]) -> None:
        """Add the tyres as seen from the vehicle's near end, below its body."""
        radius = self.wheel_radius
        end = -radius if np.cos(self.heading) > 0 else radius
        for axle in self.wheels:
            for side in (-1, 1):
                outer, inner = side * self.half_width, side * (self.half_width - 0.22)
                tread = [(0.0, outer), (0.0, inner), (1.3 * radius, inner), (1.3 * radius, outer)]
                shapes.append(
                    Shape([self._pixel(canvas, (axle + end, y, w)) for y, w in tread], (20, 20, 22), self.id)
                )

    def _add_wheels(self, canvas: Canvas, shapes: list[Shape], lit: float) -> None:
        """Add the wheels of the side that is seen, if one is."""
        radius = self.wheel_radius
        angles = np.linspace(0, 2 * np.pi, 14, endpoint=False)
        for side in (-1.0, 1.0):
            if not self._shows(canvas, side):
                continue
            factor = canvas.light.on((-side, 0.0, -0.5), lit)
            for axle in self.wheels:
                for size, colour in ((1.0, (26, 26, 28)), (0.62, (118, 120, 124)), (0.25, (60, 60, 64))):
                    rim = [
                        (axle + size * radius * np.cos(a), radius + size * radius * np.sin(a)) for a in angles
                    ]
                    pixels = [self._pixel(canvas, (x, y, side * self.half_width)) for x, y in rim]
                    shapes.append(Shape(pixels, np.asarray(colour) * factor, self.id))

    def _shows(self, canvas: Canvas, side: float) -> bool:
        """Tell whether the camera sees the vehicle's right side (1) or left side (-1)."""
        w = side * self.half_width
        corner = [(-side, 0.0, w), (side, 0.0, w), (side, 1.0, w)]
        return _area([self._pixel(canvas, point) for point in corner]) < 0


@dataclass(frozen=True, kw_only=True)
class Detail:
    """A pane, lamp or stripe on a block's face; left, right, low, high are fractions as seen from outside."""

    face: str
    left: float
    low: float
    right: float
    high: float
    colour: Colour
    glows: bool = False
    is_glass: bool = False


@dataclass(frozen=True, kw_only=True)
class Block:
    """A box between two heights whose top may be smaller than its bottom; each is (l rear, l front, half width)."""

    bottom: tuple[float, float, float]
    top: tuple[float, float, float]
    low: float
    high: float
    colour: Colour
    details: tuple[Detail, ...] = ()
    carries_wheels: bool = False

    def faces(self) -> list[tuple[str, np.ndarray, tuple[float, float, float]]]:
        """Return (name, corners from lower left as seen from outside, normal), all (l, y, w); roof first."""
        (rear, front, half), (rear_top, front_top, half_top) = self.bottom, self.top
        low, high = self.low, self.high
        outlines = {
            "top": [
                (rear_top, high, -half_top),
                (rear_top, high, half_top),
                (front_top, high, half_top),
                (front_top, high, -half_top),
            ],
            "left": [
                (front, low, -half),
                (rear, low, -half),
                (rear_top, high, -half_top),
                (front_top, high, -half_top),
            ],
            "right": [
                (rear, low, half),
                (front, low, half),
                (front_top, high, half_top),
                (rear_top, high, half_top),
            ],
            "front": [
                (front, low, half),
                (front, low, -half),
                (front_top, high, -half_top),
                (front_top, high, half_top),
            ],
            "rear": [
                (rear, low, -half),
                (rear, low, half),
                (rear_top, high, half_top),
                (rear_top, high, -half_top),
            ],
        }
        normals = {
            "top": (0.0, 1.0, 0.0),
            "left": (0.0, 0.0, -1.0),
            "right": (0.0, 0.0, 1.0),
            "front": (1.0, 0.0, 0.0),
            "rear": (-1.0, 0.0, 0.0),
        }
        return [(name, np.array(corners), normals[name]) for name, corners in outlines.items()]


def _corners(outline: tuple[float, float, float]) -> list[Point]:
    rear, front, half = outline
    return [(rear, -half), (rear, half), (front, half), (front, -half)]


def _inside(corners: np.ndarray, s: float, t: float) -> tuple[float, float, float]:
    low = corners[0] * (1 - s) + corners[1] * s
    high = corners[3] * (1 - s) + corners[2] * s
    x, y, w = low * (1 - t) + high * t
    return float(x), float(y), float(w)


def _area(pixels: Sequence[Point]) -> float:
    """Return twice the area, negative where the corners run counter-clockwise to the eye (rows go down)."""
    x, y = np.array(pixels).T
    return float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))


GLASS = (34, 40, 46)
RED, AMBER, LAMP, PLATE = (190, 22, 24), (230, 140, 30), (226, 228, 224), (222, 222, 214)


def _pane(face: str, left: float, low: float, right: float, high: float, colour: Colour = GLASS) -> Detail:
    return Detail(face=face, left=left, low=low, right=right, high=high, colour=colour, is_glass=True)


def _patch(
    face: str, left: float, low: float, right: float, high: float, colour: Colour, *, glows: bool = False
) -> Detail:
    return Detail(face=face, left=left, low=low, right=right, high=high, colour=colour, glows=glows)


def _lamps(height: float, size: float, *, braking: bool) -> list[Detail]:
    red = (255, 40, 36) if braking else RED
    high = height + size
    return [
        _patch("rear", 0.03, height, 0.03 + 1.2 * size, high, red, glows=braking),
        _patch("rear", 0.97 - 1.2 * size, height, 0.97, high, red, glows=braking),
        _patch("front", 0.04, height, 0.04 + 1.3 * size, high, LAMP),
        _patch("front", 0.96 - 1.3 * size, height, 0.96, high, LAMP),
    ]


def car(rng: np.random.Generator, place: Point, heading: float, colour: Colour) -> Vehicle:
    """Return a saloon, hatchback, estate, off-roader or van."""
    kind = rng.choice(["saloon", "hatch", "estate", "suv", "van"], p=[0.25, 0.3, 0.2, 0.15, 0.1])
    length, half, belt, roof = {
        "saloon": (4.5, 0.89, 0.92, 1.43),
        "hatch": (3.9, 0.86, 0.93, 1.48),
        "estate": (4.6, 0.89, 0.94, 1.5),
        "suv": (4.5, 0.93, 1.08, 1.72),
        "van": (4.9, 0.95, 1.15, 2.0),
    }[kind]
    rear, front = -length / 2, length / 2
    boot = {"saloon": 0.75, "hatch": 0.06, "estate": 0.04, "suv": 0.05, "van": 0.03}[kind]
    bonnet = 0.75 if kind == "van" else 1.05
    rake = 0.25 if kind == "van" else 0.7
    braking = bool(rng.random() < 0.3)
    sill, dark = tuple(np.asarray(colour) * 0.35 + 8), (28, 28, 30)
    body = Block(
        bottom=(rear, front, half),
        top=(rear + 0.06, front - 0.12, half - 0.03),
        low=0.28,
        high=belt,
        colour=colour,
        carries_wheels=True,
        details=(
            *(_patch(side, 0.0, 0.0, 1.0, 0.16, sill) for side in ("left", "right")),
            *(_patch(side, 0.5, 0.2, 0.506, 0.95, sill) for side in ("left", "right")),
            _patch("rear", 0.0, 0.0, 1.0, 0.28, dark if rng.random() < 0.5 else sill),
            _patch("front", 0.0, 0.0, 1.0, 0.24, dark),
            _patch("front", 0.3, 0.42, 0.7, 0.72, dark),
            _patch("rear", 0.35, 0.36, 0.65, 0.54, PLATE),
            _patch("front", 0.36, 0.18, 0.64, 0.34, PLATE),
            *_lamps(0.56, 0.2, braking=braking),
        ),
    )
    cabin = Block(
        bottom=(rear + boot + 0.02, front - bonnet, half - 0.05),
        top=(rear + boot + (0.55 if kind == "saloon" else 0.28), front - bonnet - rake, half - 0.2),
        low=belt,
        high=roof,
        colour=colour,
        details=(
            *(
                _pane(side, left, 0.08, right, 0.84)
                for side in ("left", "right")
                for left, right in ((0.07, 0.46), (0.51, 0.92))
            ),
            _pane("rear", 0.08, 0.1, 0.92, 0.86),
            _pane("front", 0.06, 0.06, 0.94, 0.9),
        ),
    )
    return Vehicle(place, CAR, heading, (body, cabin), (rear + 0.8, front - 0.85), 0.32, half + 0.01)


def truck(rng: np.random.Generator, place: Point, heading: float, colour: Colour) -> Vehicle:
    """Return a lorry: chassis, load box or flat bed, and a cab in its own colour."""
    length = float(rng.uniform(6.5, 9.0))
    rear, front, half, roof = -length / 2, length / 2, 1.22, float(rng.uniform(2.9, 3.6))
    cab = (rng.uniform(30, 235, 3) * 0.7 + 30).round()
    split = front - 1.9
    stripe = np.asarray(colour) * 0.55
    load = Block(
        bottom=(rear, split - 0.15, half),
        top=(rear, split - 0.15, half),
        low=0.95,
        high=roof,
        colour=colour,
        details=(
            *(_patch(side, 0.0, 0.0, 1.0, 0.05, stripe) for side in ("left", "right", "rear")),
            *(_patch(side, 0.2, 0.35, 0.75, 0.65, rng.uniform(30, 220, 3)) for side in ("left", "right")),
            _patch("rear", 0.49, 0.05, 0.51, 0.97, stripe),
            _patch("rear", 0.1, 0.1, 0.13, 0.9, stripe),
            _patch("rear", 0.87, 0.1, 0.9, 0.9, stripe),
        ),
    )
    chassis = Block(
        bottom=(rear + 0.1, front - 0.1, half - 0.12),
        top=(rear + 0.1, front - 0.1, half - 0.12),
        low=0.45,
        high=0.95,
        colour=(48, 48, 50),
        carries_wheels=True,
        details=(
            *_lamps(0.2, 0.14, braking=False),
            _patch("rear", 0.38, 0.1, 0.62, 0.4, PLATE),
            _patch("rear", 0.0, 0.7, 1.0, 0.85, (200, 60, 40)),
        ),
    )
    cabin = Block(
        bottom=(split, front, half - 0.02),
        top=(split, front - 0.12, half - 0.1),
        low=0.6,
        high=roof - float(rng.uniform(0.2, 0.8)),
        colour=cab,
        details=(
            _pane("front", 0.06, 0.48, 0.94, 0.86),
            _patch("front", 0.15, 0.14, 0.85, 0.38, (40, 40, 42)),
            *_lamps(0.03, 0.09, braking=False)[2:],
            _pane("left", 0.08, 0.5, 0.6, 0.85),
            _pane("right", 0.4, 0.5, 0.92, 0.85),
        ),
    )
    forwards = np.cos(heading) > 0
    order = (chassis, cabin, load) if forwards else (chassis, load, cabin)
    return Vehicle(place, TRUCK, heading, order, (rear + 0.9, rear + 2.0, front - 1.0), 0.46, half)


def bus(rng: np.random.Generator, place: Point, heading: float, colour: Colour) -> Vehicle:
    """Return a city bus with a band of windows, doors and a destination board."""
    length = float(rng.uniform(9.5, 12.0))
    rear, front, half, high = -length / 2, length / 2, 1.26, 3.05
    panes = [(0.03 + 0.158 * i, 0.03 + 0.158 * i + 0.146) for i in range(6)]
    board = (255, 176, 40)
    body = Block(
        bottom=(rear, front, half),
        top=(rear + 0.05, front - 0.1, half - 0.05),
        low=0.32,
        high=high,
        colour=colour,
        carries_wheels=True,
        details=(
            *(_patch(side, 0.0, 0.0, 1.0, 0.1, (46, 46, 50)) for side in ("left", "right")),
            *(
                _patch(side, 0.0, 0.27, 1.0, 0.31, np.asarray(colour) * 0.4 + 90)
                for side in ("left", "right")
            ),
            *(_pane(side, left, 0.4, right, 0.85) for side in ("left", "right") for left, right in panes),
            *(_pane("right", left, 0.06, left + 0.1, 0.85) for left in (0.42, 0.86)),
            _pane("rear", 0.1, 0.52, 0.9, 0.85),
            _patch("rear", 0.32, 0.87, 0.68, 0.95, board, glows=True),
            _patch("rear", 0.12, 0.2, 0.88, 0.42, np.asarray(colour) * 0.55),
            _patch("rear", 0.4, 0.08, 0.6, 0.14, PLATE),
            _pane("front", 0.05, 0.34, 0.95, 0.84),
            _patch("front", 0.15, 0.86, 0.85, 0.96, (20, 20, 20)),
            _patch("front", 0.2, 0.88, 0.8, 0.94, board, glows=True),
            _patch("front", 0.0, 0.0, 1.0, 0.08, (40, 40, 42)),
            *_lamps(0.12, 0.09, braking=bool(rng.random() < 0.4)),
        ),
    )
    return Vehicle(place, BUS, heading, (body,), (rear + 2.6, front - 2.5), 0.48, half + 0.01)


def tram(rng: np.random.Generator, place: Point, heading: float, colour: Colour) -> list[Vehicle]:
    """Return the sections of a tram (class train): long, two-coloured, with dark joints and a collector."""
    section, half, high = 8.5, 1.18, 3.25
    second = rng.choice([(228, 226, 220), (60, 60, 66), (214, 186, 60)])
    panes = [(0.04 + 0.24 * i, 0.04 + 0.24 * i + 0.2) for i in range(4)]
    sections = []
    for index in range(int(rng.integers(2, 4))):
        is_head, end = index == 0, section / 2
        nose = 0.5 if is_head else 0.0
        body = Block(
            bottom=(-end, end, half),
            top=(-end + nose, end, half - 0.06),
            low=0.2,
            high=high,
            colour=colour,
            details=(
                *(_patch(side, 0.0, 0.0, 1.0, 0.34, second) for side in ("left", "right", "rear", "front")),
                *(
                    _patch(side, 0.0, 0.0, 1.0, 0.06, (50, 50, 52))
                    for side in ("left", "right", "rear", "front")
                ),
                *(_patch(side, 0.0, 0.4, 1.0, 0.85, (30, 32, 36)) for side in ("left", "right")),
                *(
                    _pane(side, left, 0.42, right, 0.83)
                    for side in ("left", "right")
                    for left, right in panes
                ),
                *(
                    _patch(side, left, 0.0, left + 0.025, 1.0, (24, 24, 26))
                    for side in ("left", "right")
                    for left in (0.0, 0.975)
                ),
                _pane("rear", 0.1, 0.38, 0.9, 0.82),
                _patch("rear", 0.25, 0.85, 0.75, 0.94, (255, 176, 40), glows=True),
                _patch(
                    "rear", 0.08, 0.16, 0.2, 0.23, (255, 240, 210) if np.cos(heading) < 0 else RED, glows=True
                ),
                _patch(
                    "rear", 0.8, 0.16, 0.92, 0.23, (255, 240, 210) if np.cos(heading) < 0 else RED, glows=True
                ),
            ),
        )
        hood = Block(
            bottom=(-1.6, 1.6, 0.7), top=(-1.4, 1.4, 0.6), low=high, high=high + 0.3, colour=(120, 122, 124)
        )
        collector = Block(
            bottom=(-0.2, 0.2, 0.5), top=(0.5, 0.7, 0.6), low=high + 0.3, high=high + 1.3, colour=(40, 40, 42)
        )
        blocks = (body, hood, collector) if is_head else (body, hood)
        away = index * section
        sections.append(Vehicle((place[0], place[1] + away), TRAIN, 0.0, blocks, (), 0.3, half))
    return sections


# ---------------------------------------------------------------------------------------------------- buildings, walls


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

    def colour_at(
        self, s: np.ndarray, y: np.ndarray, sky: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Return colour (h, w, 3) and opacity at s metres along (1, w) and y metres up (h, w)."""
        s = np.broadcast_to(s, y.shape)
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


def outline_hull(points: Sequence[Point]) -> list[Point]:
    """Return the convex hull of points, in order (monotone chain)."""
    ordered = sorted(set(points))
    if len(ordered) < 3:
        return list(ordered)
    chains: list[list[Point]] = []
    for run in (ordered, ordered[::-1]):
        chain: list[Point] = []
        for point in run:
            while len(chain) > 1 and _turn(chain[-2], chain[-1], point) <= 0:
                chain.pop()
            chain.append(point)
        chains.append(chain[:-1])
    return chains[0] + chains[1]


def _turn(a: Point, b: Point, c: Point) -> float:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])
