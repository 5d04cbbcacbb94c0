"""Vehicles of the demo scenes: tapering boxes with wheels, panes and lamps. Own coordinates: l ahead, y up, w right."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from segfleet.sources.demo_paint import Canvas, Colour, Shape
from segfleet.sources.demo_things import BUS, CAR, TRAIN, TRUCK, Point


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
        area = -_area(pixels)
        if area <= 0:
            return
        sine, cosine = float(np.sin(self.heading)), float(np.cos(self.heading))
        turned = (normal[0] * sine + normal[2] * cosine, normal[1], normal[0] * cosine - normal[2] * sine)
        factor = canvas.light.on(turned, lit)
        shapes.append(Shape(pixels, np.asarray(block.colour) * factor, self.id))
        if area < SMALLEST_WITH_DETAILS:
            return
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


SMALLEST_WITH_DETAILS = 120.0
"""Twice a face's canvas pixels below which its panes and lamps would be lost anyway."""
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
        arm = Block(
            bottom=(-0.1, 0.1, 0.07),
            top=(0.5, 0.6, 0.05),
            low=high + 0.3,
            high=high + 1.2,
            colour=(48, 48, 50),
        )
        bar = Block(
            bottom=(0.4, 0.7, 0.75),
            top=(0.4, 0.7, 0.7),
            low=high + 1.2,
            high=high + 1.28,
            colour=(48, 48, 50),
        )
        blocks = (body, hood, arm, bar) if is_head else (body, hood)
        away = index * section
        sections.append(Vehicle((place[0], place[1] + away), TRAIN, 0.0, blocks, (), 0.3, half))
    return sections
