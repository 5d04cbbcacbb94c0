"""The plan of a demo scene: what street the random numbers build, in metres, without a size in pixels."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from segfleet.sources import demo_things as things
from segfleet.sources import demo_vehicles as vehicles
from segfleet.sources.demo_houses import Facade, Style
from segfleet.sources.demo_paint import Light
from segfleet.sources.demo_things import Litter, Person, Post, Thing, Tree, TwoWheeler
from segfleet.sources.demo_vehicles import Vehicle

END_M = 190.0
STEP_M = 0.5
"""Resolution of the skyline that throws shadows."""

FEATURES = ("bus", "wall", "train", "fence", "truck", "motorcycle", "rider", "crossing")
"""Scene k surely has feature k modulo their number, so that a dozen scenes hold every class."""

CAR_COLOURS = np.array(
    [
        (34, 36, 40),
        (96, 100, 104),
        (150, 152, 154),
        (205, 206, 204),
        (120, 22, 26),
        (28, 48, 92),
        (60, 74, 66),
        (172, 148, 110),
        (70, 72, 76),
        (186, 170, 30),
    ],
    float,
)
PLASTER = np.array(
    [
        (206, 196, 172),
        (186, 168, 132),
        (164, 152, 140),
        (198, 188, 182),
        (150, 96, 78),
        (170, 132, 92),
        (124, 128, 134),
        (200, 176, 118),
        (140, 150, 140),
        (178, 128, 112),
        (104, 96, 92),
    ],
    float,
)
CLOTHES = np.array(
    [
        (30, 34, 48),
        (60, 60, 64),
        (120, 30, 36),
        (36, 60, 100),
        (160, 156, 148),
        (80, 90, 60),
        (196, 190, 60),
        (24, 24, 26),
        (110, 84, 66),
    ],
    float,
)
SKIN = np.array([(214, 170, 146), (190, 140, 112), (140, 98, 76), (100, 70, 54)], float)


@dataclass(frozen=True, kw_only=True)
class Side:
    """The strips beside the road on one side, by their outer edges in metres from the middle of the road."""

    road: float
    parking: float
    sidewalk: float
    front: float
    """Where houses or a park begin; between sidewalk and front lies a strip of grass, or nothing."""
    grass_from: float
    """Inner edge of a grass strip with trees between kerb and sidewalk; equal to `parking` where there is none."""
    parking_has_id: bool
    open: tuple[tuple[float, float], ...]
    """(from, to) along the road where no house stands: park or crossing."""
    skyline: np.ndarray
    """Height of what throws shadow, each STEP_M from z = 0."""


@dataclass(frozen=True, kw_only=True)
class Street:
    """A scene: everything that is drawn, without sizes in pixels."""

    sides: tuple[Side, Side]
    """Left and right."""
    crossing: tuple[float, float] | None
    """(from, to) along the road of a street that crosses."""
    has_zebra: bool
    lines: tuple[tuple[float, bool], ...]
    """(u, dashed) of each marked line."""
    rails: tuple[float, ...]
    repairs: tuple[tuple[float, float, float, float], ...]
    """(from, to, left, right) of darker patches in the asphalt."""
    things: tuple[Thing, ...]
    light: Light
    overcast: float
    focal: float
    """In picture widths."""
    horizon: float
    """In picture heights from the top."""
    camera_height_m: float
    camera_u: float
    yaw: float
    bend: float
    asphalt: np.ndarray
    pavement: np.ndarray
    grass: np.ndarray
    seed: int
    exposure: float
    noise_level: float
    hood: float
    """Part of the picture's height that the own car's bonnet takes; 0 where it is not seen."""
    border: float
    """Part of the picture's size that is out of the region of interest."""


def make_street(rng: np.random.Generator, index: int) -> Street:
    """Return the street that these random numbers build; `index` chooses the feature that it surely has."""
    feature = FEATURES[index % len(FEATURES)]
    overcast = float(np.clip(rng.beta(1.0, 1.1), 0, 1))
    light = _make_light(rng, overcast)
    num_lanes = int(rng.choice([2, 2, 3, 4]))
    lane = float(rng.uniform(3.0, 3.6))
    half = num_lanes * lane / 2
    lane_middles = [-half + lane * (i + 0.5) for i in range(num_lanes)]
    own = lane_middles[int(rng.integers(num_lanes // 2, num_lanes))]
    crossing = None
    if feature == "crossing" or rng.random() < 0.4:
        start = float(rng.uniform(14, 45))
        crossing = (start, start + float(rng.uniform(7, 10)))
    builder = _Builder(rng, light, feature, crossing)
    sides = (builder.side(-1, half), builder.side(1, half))
    builder.fill_road(half, lane_middles, own, sides)
    lines: list[tuple[float, bool]] = [
        (-half + lane * i, num_lanes % 2 == 1 or i != num_lanes // 2 or bool(rng.random() < 0.6))
        for i in range(1, num_lanes)
    ]
    if rng.random() < 0.5:
        lines += [(-half + 0.25, False), (half - 0.25, False)]
    grey = float(rng.uniform(66, 100))
    return Street(
        sides=sides,
        crossing=crossing,
        has_zebra=bool(rng.random() < 0.6),
        lines=tuple(lines),
        rails=builder.rails,
        repairs=tuple(_repairs(rng, half)),
        things=tuple(builder.things),
        light=light,
        overcast=overcast,
        focal=float(rng.uniform(0.95, 1.2)),
        horizon=float(rng.uniform(0.36, 0.48)),
        camera_height_m=float(rng.uniform(1.25, 1.9)),
        camera_u=own + float(rng.normal(0, 0.25)),
        yaw=float(rng.normal(0, 0.035)),
        bend=float(np.clip(rng.normal(0, 1 / 350), -1 / 110, 1 / 110)),
        asphalt=np.array([grey, grey * 1.0, grey * 1.01]) + rng.normal(0, 2.5, 3),
        pavement=np.array([1.0, 0.96, 0.9]) * rng.uniform(96, 150) + rng.normal(0, 4, 3),
        grass=np.array([rng.uniform(70, 118), rng.uniform(98, 122), rng.uniform(44, 66)]),
        seed=int(rng.integers(1 << 16)),
        exposure=float(rng.uniform(0.95, 1.4)),
        noise_level=float(rng.uniform(1.0, 3.5)),
        hood=float(rng.uniform(0.05, 0.1)) if rng.random() < 0.35 else 0.0,
        border=float(rng.uniform(0.004, 0.012)) if rng.random() < 0.15 else 0.0,
    )


def _repairs(rng: np.random.Generator, half: float) -> list[tuple[float, float, float, float]]:
    patches = []
    for _ in range(int(rng.integers(0, 4))):
        near, left = float(rng.uniform(3, 30)), float(rng.uniform(-half, half - 1))
        patches.append(
            (near, near + float(rng.uniform(1, 9)), left, min(half - 0.3, left + float(rng.uniform(0.8, 3))))
        )
    return patches


def _make_light(rng: np.random.Generator, overcast: float) -> Light:
    azimuth, elevation = float(rng.uniform(-np.pi, np.pi)), float(rng.uniform(0.35, 1.15))
    level = np.cos(elevation)
    to_sun = (float(level * np.sin(azimuth)), float(np.sin(elevation)), float(level * np.cos(azimuth)))
    low = (1.15 - elevation) / 0.8
    sun = np.array([1.0, 0.95 - 0.1 * low, 0.84 - 0.26 * low]) * 0.85 * (1 - overcast) ** 1.3
    blue = np.array([0.50, 0.55, 0.62]) * (1 - 0.4 * overcast) + np.array([0.38, 0.385, 0.38]) * overcast
    tint = np.array([1.0, 1.0, 1.0]) + rng.normal(0, 0.03, 3)
    haze = np.array([190.0, 206, 224]) * (1 - overcast) + np.array([214.0, 216, 216]) * overcast
    return Light(
        to_sun=to_sun,
        sun=(sun * tint).astype(np.float32),
        sky=(blue * tint).astype(np.float32),
        haze=(haze * tint * rng.uniform(0.85, 1.08)).astype(np.float32),
        haze_per_m=float(rng.uniform(0.0008, 0.005)),
    )


class _Builder:
    """Places things along one street; all random choices are drawn here, in one order."""

    def __init__(
        self, rng: np.random.Generator, light: Light, feature: str, crossing: tuple[float, float] | None
    ) -> None:
        self.rng = rng
        self.light = light
        self.feature = feature
        self.crossing = crossing
        self.things: list[Thing] = []
        self.rails: tuple[float, ...] = ()
        self.feature_side = int(rng.choice([-1, 1]))

    # ------------------------------------------------------------------------------------------------ beside the road

    def side(self, sign: int, half: float) -> Side:
        rng = self.rng
        parking = half + (2.2 if rng.random() < 0.42 else 0.0)
        has_grass_strip = bool(rng.random() < 0.3)
        grass_from = parking + (float(rng.uniform(1.2, 2.4)) if has_grass_strip else 0.0)
        sidewalk = grass_from + float(rng.uniform(2.2, 5.5))
        front = sidewalk + (float(rng.uniform(1.0, 4.0)) if rng.random() < 0.4 else 0.0)
        stretches = self._stretches(sign)
        skyline = np.zeros(int(END_M / STEP_M) + 1, np.float32)
        opened = []
        trees = has_grass_strip or bool(rng.random() < 0.45)
        for start, end, kind in stretches:
            if kind == "houses":
                self._add_houses(sign, front, start, end, skyline)
            else:
                opened.append((start, end))
            if kind == "park":
                self._add_park(sign, front, start, end)
        if trees:
            row = (parking + grass_from) / 2 if has_grass_strip else sidewalk - 0.6
            self._add_tree_row(sign, row)
        side = Side(
            road=half,
            parking=parking,
            grass_from=grass_from,
            sidewalk=sidewalk,
            front=front,
            parking_has_id=bool(rng.random() < 0.12),
            open=tuple(opened),
            skyline=skyline,
        )
        self._add_people(sign, side)
        self._add_furniture(sign, side)
        if parking > half:
            self._add_parked_cars(sign, half, float(rng.uniform(0.2, 0.85)))
        return side

    def _stretches(self, sign: int) -> list[tuple[float, float, str]]:
        rng = self.rng
        spans: list[tuple[float, float, str]] = []
        z = -8.0
        wants_park = self.feature in ("wall", "fence") and sign == self.feature_side
        while z < END_M:
            kind = "park" if (wants_park and z < 35) or rng.random() < 0.3 else "houses"
            end = z + float(rng.uniform(24, 60) if kind == "park" else rng.uniform(25, 80))
            if self.crossing and z < self.crossing[0] - 3 < end:
                spans.append((z, self.crossing[0] - 3, kind))
                spans.append((self.crossing[0] - 3, self.crossing[1] + 3, "crossing"))
                z = self.crossing[1] + 3
                continue
            spans.append((z, end, kind))
            z = end
        return spans

    def _add_houses(self, sign: int, front: float, start: float, end: float, skyline: np.ndarray) -> None:
        rng = self.rng
        z = start
        is_tall_town = rng.random() < 0.4
        while z < end - 4:
            width = min(float(rng.uniform(9, 22)), end - z)
            if end - z - width < 6:
                width = end - z
            set_back = front + (float(rng.uniform(0.5, 2.5)) if rng.random() < 0.2 else 0.0)
            self._add_house(sign, set_back, z, z + width, is_tall=is_tall_town, skyline=skyline)
            z += width + (float(rng.uniform(2, 6)) if rng.random() < 0.12 else 0.0)

    def _add_house(
        self, sign: int, front: float, start: float, end: float, *, is_tall: bool, skyline: np.ndarray
    ) -> None:
        rng = self.rng
        floor = float(rng.uniform(2.8, 3.6))
        floors = int(rng.integers(3, 7) if is_tall else rng.integers(2, 5))
        has_shop = bool(rng.random() < 0.4)
        eaves = floors * floor + (3.9 if has_shop else 1.0) - 0.2
        colour = PLASTER[rng.integers(len(PLASTER))] * rng.uniform(0.72, 1.12) + rng.normal(0, 7, 3)
        is_office = bool(rng.random() < 0.25)
        trim = np.array([220.0, 216, 206]) * rng.uniform(0.55, 1.0)
        window = (0.86, 0.5) if is_office else (float(rng.uniform(0.38, 0.55)), float(rng.uniform(0.45, 0.6)))
        half_street = front * 2
        slope = self.light.to_sun[1] / max(0.1, abs(self.light.to_sun[0]))
        style = Style(
            kind="office" if is_office else "house",
            colour=colour,
            trim=trim,
            seed=int(rng.integers(1 << 12)),
            floor_m=floor,
            bay_m=float(rng.uniform(1.9, 3.2)),
            window=window,
            has_shop=has_shop,
            shop=rng.uniform(20, 200, 3),
            eaves_m=eaves,
            shadow_m=float(rng.uniform(9, 17)) - half_street * slope,
        )
        depth = float(rng.uniform(9, 14))
        inner, outer = sign * front, sign * (front + depth)
        faces_road, faces_us = (float(-sign), 0.0, 0.0), (0.0, 0.0, -1.0)

        def plane(
            a: things.Point,
            b: things.Point,
            low: float,
            high: float,
            look: Style,
            normal: tuple[float, float, float],
        ) -> None:
            self.things.append(
                Facade(start=a, end=b, low=low, high=high, id=things.BUILDING, style=look, normal=normal)
            )

        plane((inner, start), (inner, end), 0.0, eaves, style, faces_road)
        gable_kind = "blank" if rng.random() < 0.45 else style.kind
        gable = Style(
            kind=gable_kind,
            colour=colour * 0.95,
            trim=trim,
            seed=style.seed + 9,
            floor_m=floor,
            bay_m=3.0,
            window=window,
            has_shop=has_shop,
            shop=style.shop,
            eaves_m=eaves,
        )
        plane((inner, start), (outer, start), 0.0, eaves, gable, faces_us)
        plane((outer, end), (inner, end), 0.0, eaves, gable, (0.0, 0.0, 1.0))
        roof_height = 0.0
        if not is_office:
            roof_height = float(rng.uniform(1.2, 3.4))
            tiles = np.array([(132.0, 70, 52), (84, 80, 82), (110, 88, 74)])[rng.integers(3)] * rng.uniform(
                0.8, 1.1
            )
            roof = Style(kind="roof", colour=tiles, trim=trim, seed=style.seed + 3)
            set_back = sign * (front + 0.9)
            plane(
                (set_back, start + 0.15),
                (set_back, end - 0.15),
                eaves,
                eaves + roof_height,
                roof,
                (-0.6 * sign, 0.8, 0.0),
            )
            plane(
                (set_back, start + 0.15),
                (outer, start + 0.15),
                eaves,
                eaves + 0.6 * roof_height,
                roof,
                faces_us,
            )
            for _ in range(int(rng.integers(0, 3))):
                z = float(rng.uniform(start + 1, end - 1))
                u = sign * (front + 1.5)
                chimney = Style(kind="brick", colour=np.array([120.0, 74, 60]), trim=trim, seed=1)
                plane((u - 0.4, z), (u + 0.4, z), eaves, eaves + roof_height + 0.9, chimney, faces_us)
        cells = slice(max(0, int(start / STEP_M)), max(0, int(end / STEP_M)))
        skyline[cells] = eaves + 0.5 * roof_height

    def _add_park(self, sign: int, front: float, start: float, end: float) -> None:
        rng = self.rng
        for _ in range(int((end - start) * rng.uniform(0.12, 0.4))):
            u = sign * (front + 1.5 + float(rng.gamma(1.6, 7)))
            self._add_tree(u, float(rng.uniform(start, end)), bush=bool(rng.random() < 0.35))
        for z in np.arange(start, end, 7.0):
            self._add_tree(sign * (front + float(rng.uniform(18, 40))), float(z), bush=False, big=True)
        edge = front - 0.1
        wanted = self.feature if self.feature in ("wall", "fence") and sign == self.feature_side else ""
        kind = wanted or str(rng.choice(["none", "hedge", "fence", "wall"], p=[0.3, 0.2, 0.27, 0.23]))
        first = max(start, 0.0)
        if kind == "hedge":
            for z in np.arange(first + 3, end, 2.0):
                self._add_tree(sign * (edge + 0.6), float(z), bush=True)
        elif kind in ("fence", "wall"):
            high = float(rng.uniform(1.1, 2.1) if kind == "fence" else rng.uniform(1.3, 3.0))
            look = str(
                rng.choice(["railing", "mesh", "boards"] if kind == "fence" else ["wall", "brick", "wall"])
            )
            grey = np.array([1.0, 0.97, 0.92]) * rng.uniform(95, 175)
            colours = {
                "railing": np.array([52.0, 58, 54]),
                "mesh": np.array([110.0, 122, 112]),
                "boards": np.array([142.0, 108, 74]),
                "wall": grey,
                "brick": np.array([142.0, 84, 66]),
            }
            style = Style(
                kind=look,
                colour=colours[look] * rng.uniform(0.8, 1.15),
                trim=grey,
                seed=int(rng.integers(999)),
                eaves_m=high,
            )
            id = things.FENCE if kind == "fence" else things.WALL
            for z in np.arange(first, end, 12.0):
                self.things.append(
                    Facade(
                        start=(sign * edge, float(z)),
                        end=(sign * edge, float(min(z + 12, end))),
                        low=0.0,
                        high=high,
                        id=id,
                        style=style,
                        normal=(float(-sign), 0.0, 0.0),
                    )
                )
            self._add_return(sign, edge, end, high, id, style)

    def _add_return(self, sign: int, edge: float, z: float, high: float, id: int, style: Style) -> None:
        """Turn the far end of a fence or wall away from the road, so that it faces the camera."""
        far = sign * (edge + 8)
        self.things.append(
            Facade(
                start=(sign * edge, z),
                end=(far, z),
                low=0.0,
                high=high,
                id=id,
                style=style,
                normal=(0.0, 0.0, -1.0),
            )
        )

    def _add_tree_row(self, sign: int, u: float) -> None:
        rng = self.rng
        gap = float(rng.uniform(7, 14))
        z = float(rng.uniform(5, 12))
        while z < 110:
            if not self._is_on_crossing(z, 1.0) and rng.random() < 0.85:
                self._add_tree(sign * u, z, bush=False)
            z += gap

    def _add_tree(self, u: float, z: float, *, bush: bool, big: bool = False) -> None:
        rng = self.rng
        if z < 3 or self._is_on_crossing(z, 0.5):
            return
        size = float(rng.uniform(0.7, 1.5) if bush else rng.uniform(2.0, 3.6)) * (1.5 if big else 1.0)
        height = size * float(rng.uniform(0.6, 0.9) if bush else rng.uniform(0.8, 1.3))
        autumn = rng.random() < 0.12
        green = np.array([rng.uniform(56, 100), rng.uniform(84, 122), rng.uniform(36, 64)])
        self.things.append(
            Tree(
                place=(u, z),
                trunk_m=0.0 if bush else float(rng.uniform(1.8, 3.2)),
                crown_m=(size, height),
                colour=np.array([168.0, 116, 44]) * rng.uniform(0.7, 1.0) if autumn else green,
                bark=np.array([92.0, 78, 64]) * rng.uniform(0.7, 1.25),
                seed=int(rng.integers(1 << 14)),
                holes=0.0 if bush else float(rng.uniform(0.2, 0.36)),
            )
        )

    def _add_people(self, sign: int, side: Side) -> None:
        rng = self.rng
        for _ in range(int(rng.integers(1, 5))):
            z = float(rng.uniform(7, 55))
            u = float(rng.uniform(side.grass_from + 0.4, side.sidewalk - 0.2))
            for _ in range(int(rng.choice([1, 1, 2, 3]))):
                self.things.append(self._person((sign * u, z)))
                u += float(rng.uniform(0.5, 0.8))
                z += float(rng.uniform(-0.4, 0.4))
        if self.crossing and rng.random() < 0.5:
            for _ in range(int(rng.integers(1, 4))):
                z = self.crossing[0] - float(rng.uniform(2.2, 4.6))
                if z > 7:
                    self.things.append(self._person((float(sign * rng.uniform(0, side.road)), z), lean=1.0))
        for _ in range(int(rng.choice([0, 0, 1, 2, 3]))):
            place = (sign * (side.sidewalk - float(rng.uniform(0.3, 0.8))), float(rng.uniform(7, 30)))
            self.things.append(self._two_wheeler(place, things.BICYCLE, ridden=False))
        chance = 1.0 if self.feature == "motorcycle" and sign == self.feature_side else 0.12
        if rng.random() < chance:
            for _ in range(int(rng.integers(1, 4))):
                place = (sign * (side.grass_from + float(rng.uniform(0.3, 0.9))), float(rng.uniform(7, 16)))
                self.things.append(self._two_wheeler(place, things.MOTORCYCLE, ridden=False))
        if rng.random() < 0.06:
            place = (sign * (side.sidewalk - 0.5), float(rng.uniform(8, 20)))
            self.things.append(
                Litter(
                    place=place, id=things.DYNAMIC, width_m=0.6, height_m=1.0, colour=rng.uniform(30, 200, 3)
                )
            )

    def _person(self, place: things.Point, lean: float | None = None) -> Person:
        rng = self.rng
        clothes = CLOTHES[rng.integers(len(CLOTHES), size=2)] * rng.uniform(0.7, 1.25, (2, 1))
        return Person(
            place=place,
            height_m=float(np.clip(rng.normal(1.72, 0.1), 1.2, 1.95)),
            step=float(rng.uniform(-1, 1)),
            lean=float(rng.uniform(0, 1)) if lean is None else lean,
            skin=SKIN[rng.integers(len(SKIN))],
            top=clothes[0],
            trousers=clothes[1],
            hair=np.array([(30.0, 26, 24), (92, 66, 44), (170, 140, 90), (120, 116, 112)])[rng.integers(4)],
            has_bag=bool(rng.random() < 0.3),
            has_skirt=bool(rng.random() < 0.15),
        )

    def _two_wheeler(self, place: things.Point, id: int, *, ridden: bool) -> TwoWheeler:
        rng = self.rng
        lean = float(rng.choice([0.2, 0.35, 0.7, 1.0]) if ridden else rng.choice([0.5, 0.8, 1.0]))
        return TwoWheeler(
            place=place,
            id=id,
            lean=lean * float(rng.choice([-1, 1])),
            colour=np.array([(30.0, 32, 36), (150, 34, 34), (40, 80, 140), (190, 190, 186), (60, 110, 70)])[
                rng.integers(5)
            ],
            rider=self._person(place) if ridden else None,
        )

    def _add_furniture(self, sign: int, side: Side) -> None:
        rng = self.rng
        kerb = side.parking + 0.5
        metal = np.array([112.0, 116, 114]) * rng.uniform(0.6, 1.2)
        spacing, z = float(rng.uniform(18, 30)), float(rng.uniform(6, 20))
        arm = float(-sign * rng.uniform(1.0, 2.4)) if rng.random() < 0.7 else 0.0
        high = float(rng.uniform(6.5, 9.0)) if arm else float(rng.uniform(4, 5.5))
        while z < 130:
            if not self._is_on_crossing(z, 0.0):
                lamp = Post(
                    place=(sign * kerb, z),
                    height_m=high,
                    width_m=0.16,
                    colour=metal,
                    arm_m=arm,
                    has_lamp=True,
                )
                self.things.append(lamp)
            z += spacing
        kinds = ["warning", "limit", "duty", "stop", "priority", "parking", "direction", "place"]
        for _ in range(int(rng.integers(1, 5))):
            z = float(rng.uniform(7, 45))
            if self._is_on_crossing(z, 0.0):
                continue
            kind = str(rng.choice(kinds))
            is_board = kind in ("direction", "place")
            size = float(rng.uniform(0.7, 1.2)) if is_board else float(rng.uniform(0.55, 0.85))
            up = 2.3
            signs = [(kind, up, size)]
            if rng.random() < 0.3:
                signs.append((str(rng.choice(kinds[:6])), up + size + 0.08, 0.6))
            post = Post(
                place=(sign * (kerb + float(rng.uniform(-0.1, 0.4))), z),
                height_m=up + 0.9,
                width_m=0.09,
                colour=metal * 1.15,
                signs=tuple(signs),
            )
            self.things.append(post)
        if self.crossing:
            shows = int(rng.choice([0, 0, 1, 2]))
            hangs = rng.random() < 0.4
            lights: tuple[tuple[float, float], ...] = ((0.0, 2.3),)
            if hangs:
                lights = (*lights, (-sign * float(rng.uniform(2.5, 4.0)), 4.8))
            for z in (self.crossing[0] - 1.6, self.crossing[1] + 1.4):
                if z > 6:
                    place = (sign * (side.road + (0.6 if side.parking == side.road else 1.2)), z)
                    self.things.append(
                        Post(
                            place=place,
                            height_m=5.9 if hangs else 3.4,
                            width_m=0.15,
                            colour=metal * 0.9,
                            lights=lights,
                            shows=shows,
                            signs=(("priority", 3.4, 0.6),) if rng.random() < 0.4 and hangs else (),
                        )
                    )
        for _ in range(int(rng.choice([0, 0, 1, 2]))):
            place = (sign * (side.sidewalk - float(rng.uniform(0.3, 1.0))), float(rng.uniform(6, 40)))
            colour = np.array([(60.0, 62, 64), (120, 76, 30), (40, 70, 110), (170, 150, 40)])[rng.integers(4)]
            self.things.append(
                Litter(
                    place=place,
                    id=things.STATIC,
                    width_m=float(rng.uniform(0.5, 0.8)),
                    height_m=float(rng.uniform(0.9, 1.4)),
                    colour=colour,
                )
            )

    # ------------------------------------------------------------------------------------------------ on the road

    def _car_colour(self) -> np.ndarray:
        rng = self.rng
        return CAR_COLOURS[rng.integers(len(CAR_COLOURS))] * rng.uniform(0.8, 1.15) + rng.normal(0, 5, 3)

    def _add_parked_cars(self, sign: int, half: float, share: float) -> None:
        rng = self.rng
        heading = 0.0 if sign > 0 or rng.random() < 0.3 else float(np.pi)
        z = float(rng.uniform(5, 12))
        while z < 100:
            if rng.random() < share and not self._is_on_crossing(z, 6.0):
                place = (sign * (half + 1.15 + float(rng.normal(0, 0.06))), z)
                self._add_vehicle(
                    vehicles.car(rng, place, heading + float(rng.normal(0, 0.02)), self._car_colour())
                )
            z += float(rng.uniform(5.6, 6.6))

    def fill_road(self, half: float, lanes: Sequence[float], own: float, sides: tuple[Side, Side]) -> None:
        """Put traffic on the lanes, surely with the scene's feature."""
        rng = self.rng
        special = self.feature if self.feature in ("bus", "truck", "train", "rider", "motorcycle") else ""
        if not special and rng.random() < 0.3:
            special = str(rng.choice(["bus", "truck", "train", "rider", "rider"]))
        taken: dict[float, float] = dict.fromkeys(lanes, 0.0)
        if special in ("bus", "truck", "train"):
            others = [u for u in lanes if u != own] if rng.random() < 0.7 or special == "train" else [own]
            u = float(rng.choice(others))
            heading = 0.0 if u > 0 or len(lanes) == 3 else float(np.pi)
            z = float(rng.uniform(17, 30))
            if special == "train":
                colour = np.array([(176.0, 34, 38), (36, 84, 140), (206, 170, 40), (40, 120, 90)])[
                    rng.integers(4)
                ]
                self.rails = (u - 0.72, u + 0.72)
                for section in vehicles.tram(rng, (u, z), heading, colour * rng.uniform(0.8, 1.1)):
                    self._add_vehicle(section)
                taken[u] = z + 30
            else:
                colour = (
                    np.array(
                        [(190.0, 60, 40), (214, 190, 60), (206, 208, 206), (50, 90, 130), (90, 140, 110)]
                    )
                    if special == "bus"
                    else np.array(
                        [(214.0, 212, 206), (60, 92, 140), (150, 146, 140), (180, 120, 50), (70, 100, 70)]
                    )
                )[rng.integers(5)] * rng.uniform(0.8, 1.1)
                make = vehicles.bus if special == "bus" else vehicles.truck
                self._add_vehicle(make(rng, (u, z), heading, colour))
                taken[u] = z + 9
        elif rng.random() < 0.2:
            self.rails = (lanes[0] - 0.72, lanes[0] + 0.72)
        for u in lanes:
            z = max(taken[u], float(rng.uniform(9, 30)) if u == own else float(rng.uniform(8, 35)))
            away = u > 0 or len(lanes) == 3
            while z < 110:
                if rng.random() < 0.4 and not (self.crossing and self._is_on_crossing(z, 1.0)):
                    place = (u + float(rng.normal(0, 0.15)), z)
                    heading = (0.0 if away else float(np.pi)) + float(rng.normal(0, 0.03))
                    self._add_vehicle(vehicles.car(rng, place, heading, self._car_colour()))
                z += float(rng.uniform(8, 26))
        if self.crossing and rng.random() < 0.45:
            middle = (self.crossing[0] + self.crossing[1]) / 2
            z = middle + float(rng.choice([-1.8, 1.8]))
            place = (float(rng.uniform(-8, 8)), z)
            self._add_vehicle(
                vehicles.car(rng, place, float(rng.choice([-1, 1])) * np.pi / 2, self._car_colour())
            )
        num_riders = (
            int(rng.integers(1, 4)) if special in ("rider", "motorcycle") else int(rng.choice([0, 0, 0, 1]))
        )
        for number in range(num_riders):
            id = things.MOTORCYCLE if special == "motorcycle" and number < 2 else things.BICYCLE
            sign = float(rng.choice([-1, 1]))
            near_kerb = half - float(rng.uniform(0.4, 1.0))
            place = (sign * near_kerb, float(rng.uniform(7, 20)))
            self.things.append(self._two_wheeler(place, id, ridden=True))

    def _add_vehicle(self, vehicle: Vehicle) -> None:
        if vehicle.nearest() > 3.2:
            self.things.append(vehicle)

    def _is_on_crossing(self, z: float, margin: float) -> bool:
        return self.crossing is not None and self.crossing[0] - 1 - margin < z < self.crossing[1] + 1 + margin
