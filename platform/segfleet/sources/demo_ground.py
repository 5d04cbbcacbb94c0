"""What lies flat in a demo scene: road, markings, pavement, grass, and the light and shadow on them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from segfleet.sources.demo_paint import Camera, Canvas, noise
from segfleet.sources.demo_street import STEP_M, Side, Street
from segfleet.sources.demo_things import Point, Thing

ROAD, SIDEWALK, PARKING, TERRAIN = 7, 8, 9, 22
CELLS_PER_M = 100
REACH_M = 60
"""Across the road the ground is a table of this resolution and reach; along the road it is computed row by row."""
FARTHEST_M = 600.0
SHADOWS_UP_TO_M = 70.0


class Surface(NamedTuple):
    """What one kind of ground looks like: colour, how strong its fine and its coarse texture are."""

    id: int
    colour: np.ndarray
    fine: float
    coarse: float


@dataclass(frozen=True)
class _Row:
    """All that is the same along one picture row, that is at one distance."""

    houses: tuple[bool, bool]
    crossing: str
    """"" away from it, "edge" on its pavement, "road" on its carriageway."""
    before_crossing: bool
    dashes: bool
    stops: bool
    zebra: bool
    joint: bool
    repairs: tuple[bool, ...]


def paint_ground(canvas: Canvas, street: Street) -> None:
    """Paint the ground pixel by pixel, from where its ray meets it."""
    camera = canvas.camera
    top = min(camera.height, max(0, int(camera.horizon) + 1))
    rows = np.arange(top, camera.height, dtype=np.float32)[:, None] + 0.5
    z = np.minimum(camera.focal * camera.height_m / np.maximum(rows - camera.horizon, 0.3), FARTHEST_M)
    ray = ((np.arange(camera.width, dtype=np.float32) + 0.5 - camera.width / 2) / camera.focal)[None, :]
    u = ray * z + (camera.u - 0.5 * camera.bend * z * z + camera.yaw * z)
    surfaces = _surfaces(street)
    row_kinds = [_row_at(street, float(distance)) for distance in z[:, 0]]
    kinds = {kind: number for number, kind in enumerate(dict.fromkeys(row_kinds))}
    table = np.stack([_across(street, kind) for kind in kinds])
    cells = np.clip((u + REACH_M) * CELLS_PER_M, 0, table.shape[1] - 1).astype(np.int32)
    cells += np.array([kinds[kind] for kind in row_kinds], np.int32)[:, None] * table.shape[1]
    surface = np.take(table, cells)
    fade = 1 / (1 + z / 16)
    fine = (noise(z * 26 + street.seed, u * 26) - 0.5) * fade
    coarse = noise(z * 1.7 + street.seed * 3, u * 5) - 0.5
    fine *= np.take(np.array([kind.fine for kind in surfaces], np.float32), surface)
    coarse *= np.take(np.array([kind.coarse for kind in surfaces], np.float32), surface)
    rgb = np.take(np.array([kind.colour for kind in surfaces], np.float32), surface, axis=0)
    rgb *= _sunlight(street, camera, u, z, top)
    rgb *= (1 + fine + coarse)[..., None]
    canvas.rgb[top:] = rgb
    canvas.ids[top:] = np.take(np.array([kind.id for kind in surfaces], np.uint8), surface)
    canvas.ground_depth[top:] = z


NAMES = (
    "grass",
    "road",
    "sidewalk",
    "joint",
    "kerb",
    "gutter",
    "bay",
    "parking",
    "line",
    "repair",
    "groove",
    "steel",
)
GRASS, ASPHALT, PAVEMENT, JOINT, KERB, GUTTER, BAY, PARKING_BAY, LINE, REPAIR, GROOVE, STEEL = range(
    len(NAMES)
)


def _surfaces(street: Street) -> list[Surface]:
    """Return the surfaces in the order of NAMES."""
    asphalt, pavement = street.asphalt, street.pavement
    white = np.array([212.0, 212, 206])
    return [
        Surface(TERRAIN, street.grass, 0.6, 0.5),
        Surface(ROAD, asphalt, 0.44, 0.26),
        Surface(SIDEWALK, pavement, 0.32, 0.22),
        Surface(SIDEWALK, pavement * 0.78, 0.3, 0.2),
        Surface(SIDEWALK, pavement * 1.2, 0.2, 0.15),
        Surface(ROAD, asphalt * 0.72, 0.4, 0.2),
        Surface(ROAD, asphalt * 1.1, 0.4, 0.3),
        Surface(PARKING, asphalt * 1.1, 0.4, 0.3),
        Surface(ROAD, white * 0.8 + asphalt * 0.15, 0.35, 0.3),
        Surface(ROAD, asphalt * 0.84, 0.3, 0.15),
        Surface(ROAD, asphalt * 0.55, 0.3, 0.2),
        Surface(ROAD, asphalt * 1.3 + 20, 0.2, 0.2),
    ]


def _row_at(street: Street, z: float) -> _Row:
    crossing, zebra, stops, before = "", False, False, False
    if street.crossing:
        start, end = street.crossing
        crossing = "road" if start <= z < end else "edge" if start - 3 <= z < end + 3 else ""
        zebra = street.has_zebra and (start - 4.6 <= z < start - 1.6 or end + 1.6 <= z < end + 4.6)
        stops = start - 5.4 <= z < start - 5.0 or end + 5.0 <= z < end + 5.4
        before = start - 5.5 < z < end + 5.5
    return _Row(
        houses=tuple(not any(start <= z < end for start, end in side.open) for side in street.sides),  # type: ignore[arg-type]
        crossing=crossing,
        before_crossing=before,
        dashes=(z + street.seed % 9) % 9 < 4.2,
        stops=stops,
        zebra=zebra,
        joint=z < 25 and (z * 1.3) % 1 < 0.06,
        repairs=tuple(near <= z < far for near, far, _, _ in street.repairs),
    )


def _across(street: Street, row: _Row) -> np.ndarray:
    """Return the number of the surface in each cell across the road."""
    cells = np.full(2 * REACH_M * CELLS_PER_M, GRASS, np.uint8)
    half = max(side.road for side in street.sides)

    def lay(surface: int, start: float, end: float) -> None:
        cells[
            max(0, round((start + REACH_M) * CELLS_PER_M)) : max(0, round((end + REACH_M) * CELLS_PER_M))
        ] = surface

    for sign, side, has_houses in zip((-1, 1), street.sides, row.houses, strict=True):
        strips = _strips(side, row, has_houses=has_houses)
        for surface, inner, outer in strips:
            lay(surface, *sorted((sign * inner, sign * outer)))
    if row.crossing == "road":
        cells[:] = ASPHALT
    else:
        for (_, _, left, right), is_here in zip(street.repairs, row.repairs, strict=True):
            if is_here:
                lay(REPAIR, left, right)
    if not row.before_crossing:
        for at, is_dashed in street.lines:
            if row.dashes or not is_dashed:
                lay(LINE, at - 0.08, at + 0.08)
    if row.stops:
        lay(LINE, 0, half)
    if row.zebra:
        for start in np.arange(-half + 0.25, half - 0.25, 1.0):
            lay(LINE, float(start), float(start) + 0.5)
    for rail in street.rails:
        lay(GROOVE, rail - 0.11, rail + 0.11)
        lay(STEEL, rail - 0.04, rail + 0.04)
    return cells


def _strips(side: Side, row: _Row, *, has_houses: bool) -> list[tuple[int, float, float]]:
    """Return (surface, inner edge, outer edge) on one side, later ones over earlier ones."""
    strips = [(ASPHALT, 0.0, side.parking)]
    if side.parking > side.road and not row.crossing:
        strips.append((PARKING_BAY if side.parking_has_id else BAY, side.road, side.parking))
    strips.append((GUTTER, side.parking - 0.22, side.parking))
    outer = [(side.grass_from, side.sidewalk)]
    if row.crossing:
        outer = [(side.parking, float(REACH_M))]
    elif has_houses:
        outer.append((side.front, float(REACH_M)))
    for start, end in outer:
        strips.append((PAVEMENT, start, end))
        if row.joint:
            strips.append((JOINT, start, end))
        strips += [(JOINT, at, at + 0.03) for at in np.arange(start, min(end, start + 8), 0.5)]
    strips.append((KERB, side.parking, side.parking + 0.2))
    return strips


# ---------------------------------------------------------------------------------------------------- light


def _sunlight(street: Street, camera: Camera, u: np.ndarray, z: np.ndarray, top: int) -> np.ndarray:
    """Return the light (h, w, 3) on flat ground: sky everywhere, sun where nothing stands before it."""
    light = street.light
    sun_x, sun_y, sun_z = light.to_sun
    has_sun = float(light.sun.max()) > 0.04
    sun: np.ndarray = np.ones(u.shape, np.float32)
    if has_sun and abs(sun_x) > 0.05:
        side = street.sides[0 if sun_x < 0 else 1]
        over = np.maximum(side.front - u * float(np.sign(sun_x)), 0) / abs(sun_x)
        cells = np.clip((z + over * sun_z) / STEP_M, 0, len(side.skyline) - 1).astype(np.int32)
        sun = np.clip((over * sun_y - np.take(side.skyline, cells)) * 4 + 0.5, 0, 1)
    cast = Image.new("L", (camera.width, camera.height - top))
    under = Image.new("L", cast.size)
    draw_cast, draw_under = ImageDraw.Draw(cast), ImageDraw.Draw(under)
    for thing in street.things:
        if thing.place[1] < SHADOWS_UP_TO_M:
            _draw_shadows(thing, street, camera, top, draw_cast if has_sun else None, draw_under)
    blur = max(1.0, camera.width / 400)
    contact = np.asarray(under.filter(ImageFilter.BoxBlur(2 * blur)), np.float32)
    if has_sun:
        sun *= 1 - np.asarray(cast.filter(ImageFilter.BoxBlur(blur)), np.float32) * (0.92 / 255)
    open_sky = 1 - contact * (0.8 / 255)
    return (light.sky + sun[..., None] * (light.sun * sun_y)) * open_sky[..., None]


def _draw_shadows(
    thing: Thing,
    street: Street,
    camera: Camera,
    top: int,
    draw_cast: ImageDraw.ImageDraw | None,
    draw_under: ImageDraw.ImageDraw,
) -> None:
    for outline, low, high in thing.shadow():
        if draw_cast is not None:
            ends = [street.light.shift(low), street.light.shift(high)]
            points = [(u + du, z + dz) for du, dz in ends for u, z in outline]
            _draw_flat(draw_cast, camera, top, points, 255)
        if low < 0.5:
            _draw_flat(draw_under, camera, top, outline, 150)


def _draw_flat(
    draw: ImageDraw.ImageDraw, camera: Camera, top: int, points: Sequence[Point], value: int
) -> None:
    """Fill the convex hull of points on the ground."""
    if max(z for _, z in points) < 1.2:
        return
    hull = convex_hull([camera.project(u, 0.0, max(z, 1.2)) for u, z in points])
    if len(hull) > 2:
        draw.polygon([(x, y - top) for x, y in hull], fill=value)


def convex_hull(points: Sequence[Point]) -> list[Point]:
    """Return the corners of the convex hull in order (Andrew's monotone chain)."""
    ordered = sorted(set(points))
    if len(ordered) < 3:
        return ordered
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
