"""The picture and the label of a demo scene at any size, from the plan of its street."""

import numpy as np

from segfleet.sources import demo_things as things
from segfleet.sources.demo_ground import paint_ground
from segfleet.sources.demo_houses import Facade
from segfleet.sources.demo_paint import Camera, Canvas, noise
from segfleet.sources.demo_street import STEP_M, Street

EGO_VEHICLE, OUT_OF_ROI, SKY = 1, 3, 23
SUPERSAMPLE = 2


def draw_street(street: Street, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the picture uint8 (h, w, 3) and the official label ids uint8 (h, w) at size (width, height)."""
    width, height = size
    canvas = _canvas_of(street, size)
    _paint_sky(canvas, street)
    paint_ground(canvas, street)
    _paint_distance(canvas, street)
    solid = [thing for thing in street.things if isinstance(thing, Facade) and thing.style.is_solid]
    others = [thing for thing in street.things if not (isinstance(thing, Facade) and thing.style.is_solid)]
    # solid planes from the near to the far, so that what they hide costs nothing; then what one can see through
    for thing in sorted(solid, key=lambda plane: min(plane.start[1], plane.end[1])):
        thing.paint(canvas, _lit(street, thing.place))
    for other in sorted(others, key=lambda thing: -thing.place[1]):
        other.paint(canvas, _lit(street, other.place))
    depth = np.where(np.isfinite(canvas.depth), canvas.depth, canvas.ground_depth)
    clear = _halved(np.exp(depth * -street.light.haze_per_m))[..., None]
    rgb = _halved(canvas.rgb) * clear + street.light.haze * (1 - clear)
    ids = canvas.ids[1::2, 1::2].copy()
    _add_hood(rgb, ids, street)
    picture = _expose(rgb, street)
    if street.border:
        edge = max(1, round(street.border * height))
        for strip in (np.s_[:edge], np.s_[-edge:], np.s_[:, :edge], np.s_[:, -edge:]):
            picture[strip] = 0
            ids[strip] = OUT_OF_ROI
    assert picture.shape == (height, width, 3)
    return picture, ids


def _halved(values: np.ndarray) -> np.ndarray:
    """Return the means of two by two pixels."""
    rows = values[0::2] + values[1::2]
    return (rows[:, 0::2] + rows[:, 1::2]) * np.float32(0.25)


def _canvas_of(street: Street, size: tuple[int, int]) -> Canvas:
    width, height = size[0] * SUPERSAMPLE, size[1] * SUPERSAMPLE
    camera = Camera(
        width=width,
        height=height,
        focal=street.focal * width,
        horizon=street.horizon * height,
        height_m=street.camera_height_m,
        u=street.camera_u,
        yaw=street.yaw,
        bend=street.bend,
    )
    return Canvas(camera, street.light)


def _paint_sky(canvas: Canvas, street: Street) -> None:
    camera, light = canvas.camera, street.light
    bottom = min(camera.height, int(camera.horizon) + 3)
    if bottom <= 0:
        return
    rows, columns = (
        np.arange(bottom, dtype=np.float32)[:, None],
        np.arange(camera.width, dtype=np.float32)[None, :],
    )
    rise = np.maximum((camera.horizon - rows) / camera.focal, 0.004)
    aside = (columns - camera.width / 2) / camera.focal
    blue = np.array([92, 138, 196], np.float32) * (1 - street.overcast)
    blue += np.array([176, 180, 184], np.float32) * street.overcast
    height = np.clip(rise * 2.6, 0, 1) ** 0.7
    cloud = noise(street.seed + 16 / (rise + 0.12) + 0 * aside, street.seed * 3 + aside * 30 / (rise + 0.12))
    cover = np.clip((cloud - 0.62 + 0.35 * street.overcast) * 3.5, 0, 1) * (
        0.35 + 0.65 * np.clip(rise * 6, 0, 1)
    )
    base = light.haze * (1 - height[..., None]) + blue * height[..., None]
    white = np.array([236, 236, 234], np.float32) * (1 - 0.22 * street.overcast)
    rgb = base + (white - base) * (0.85 * cover)[..., None]
    sun_x, sun_y, sun_z = light.to_sun
    if sun_z > 0:
        away = (aside - sun_x / sun_z) ** 2 + (rise - sun_y / sun_z) ** 2
        rgb = rgb + (90 * (1 - street.overcast) * np.exp(-away * 5))[..., None]
    canvas.rgb[:bottom] = rgb
    canvas.ids[:bottom] = SKY


def _lit(street: Street, place: things.Point) -> float:
    """Return 0 where a house shades the foot of the thing, else 1."""
    sun_x, sun_y, sun_z = street.light.to_sun
    if abs(sun_x) <= 0.05:
        return 1.0
    side = street.sides[0 if sun_x < 0 else 1]
    gap = side.front - place[0] * float(np.sign(sun_x))
    if gap <= 0:
        return 1.0
    over = gap / abs(sun_x)
    cell = int(np.clip((place[1] + over * sun_z) / STEP_M, 0, len(side.skyline) - 1))
    return float(over * sun_y + 0.9 > side.skyline[cell])


def _paint_distance(canvas: Canvas, street: Street) -> None:
    """Close the horizon with far trees and far houses."""
    camera = canvas.camera
    columns = np.arange(camera.width, dtype=np.float32)
    scale = camera.focal / 230.0
    for shift, id, colour, depth in (
        (11, things.VEGETATION, (74.0, 92, 58), 330.0),
        (5, things.BUILDING, (150.0, 140, 130), 300.0),
        (0, things.VEGETATION, (66.0, 86, 50), 230.0),
    ):
        zeros = np.zeros_like(columns)
        wide = noise(zeros + street.seed + shift * 17, columns / scale * 0.35 + shift * 31)
        if id == things.BUILDING:
            block = np.floor(columns / (scale * 14))
            tall = np.where((block * 0.618 + street.seed * 0.01) % 1 < 0.4, 9 + 16 * ((block * 0.377) % 1), 0)
        else:
            tall = 3 + 14 * wide + 5 * noise(zeros + street.seed, columns / scale * 3)
        reach = int(tall.max() * scale) + 2
        top, bottom = max(0, int(camera.horizon) - reach), min(camera.height, int(camera.horizon) + 4)
        rows = np.arange(top, bottom, dtype=np.float32)[:, None]
        inside = rows > camera.horizon - tall * scale
        grain = noise(rows / scale * 4 + 0 * columns, columns / scale * 4 + 0 * rows)
        lit = street.light.on((0.0, 0.6, -0.8))
        rgb = np.array(colour, np.float32) * lit * (0.7 + 0.6 * grain)[..., None]
        canvas.put(top, 0, rgb, id, depth, inside)


def _add_hood(rgb: np.ndarray, ids: np.ndarray, street: Street) -> None:
    """Paint the own car's bonnet along the bottom edge."""
    if not street.hood:
        return
    height, width = ids.shape
    across = (np.arange(width) + 0.5) / width * 2 - 1
    rows = np.arange(height)[:, None] + 0.5
    edge = height * (1 - street.hood * (1 - 0.35 * across**2))
    inside = rows > edge
    shine = np.clip((rows - edge) / (street.hood * height), 0, 1)
    colour = (street.light.haze * (0.3 - 0.2 * shine[..., None])) + np.array([14.0, 15, 17])
    np.copyto(rgb, colour, where=inside[..., None])
    ids[inside] = EGO_VEHICLE


def _expose(rgb: np.ndarray, street: Street) -> np.ndarray:
    """Return what the sensor makes of the light: vignette, a soft shoulder, noise, 8 bits."""
    height, width, _ = rgb.shape
    across, down = (
        np.linspace(-1, 1, width, dtype=np.float32)[None, :],
        np.linspace(-1, 1, height, dtype=np.float32)[:, None],
    )
    vignette = 1 - 0.13 * (across**2 + down**2)
    rgb = rgb * (vignette * (street.exposure / 255))[..., None]
    rgb = rgb / (1 + np.maximum(rgb - 0.7, 0) * 0.7)
    sensor = np.random.default_rng([street.seed, 77])
    grain = sensor.standard_normal((height, width, 1), dtype=np.float32)
    tint = sensor.standard_normal((height, width, 3), dtype=np.float32)
    level = street.noise_level * (0.6 + 0.6 * np.sqrt(np.clip(rgb, 0, 1)))
    return np.clip(np.rint(rgb * 255 + level * (0.8 * grain + 0.5 * tint)), 0, 255).astype(np.uint8)
