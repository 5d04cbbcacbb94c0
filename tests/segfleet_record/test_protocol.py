"""Laws of the protocol: one record, one digest; different ones are not compared; names stand for what others do."""

import dataclasses
import hashlib
from typing import Any

import pytest

from pspnet.errors import InputError
from segfleet.protocol import Protocol, ViewOptions, named_views, require_same_protocol
from segfleet.scores import Scores

PLAIN = Protocol(store_digest="d", split="val")
OTHERS: list[dict[str, Any]] = [
    {"store_digest": "e"},
    {"split": "test"},
    {"scales": (0.5, 1.0)},
    {"flip": True},
    {"window": 713},
    {"window": 713, "stride": 400},
    {"window": 713, "average": "logits"},
    {"window": "512x1024"},
    {"window": "512x1024", "stride": "400x800"},
    {"precision": "bf16"},
]


def test_the_digest_is_the_sha256_of_the_record_as_json() -> None:
    text = (
        '{"average":"probabilities","flip":false,"precision":"fp32","scales":[1.0],'
        '"split":"val","store_digest":"d","stride":0,"window":0}'
    )
    assert PLAIN.digest == hashlib.sha256(text.encode()).hexdigest()[:12]


def test_different_records_have_different_digests_and_equal_ones_the_same() -> None:
    records = [PLAIN, *(dataclasses.replace(PLAIN, **change) for change in OTHERS)]
    assert len({record.digest for record in records}) == len(records)
    assert dataclasses.replace(PLAIN, window=713) == dataclasses.replace(PLAIN, window=713, stride=476)
    assert dataclasses.replace(PLAIN, scales=(1,)).digest == PLAIN.digest


def test_windows_may_be_rectangles_and_those_of_squares_are_recorded_as_before() -> None:
    square = dataclasses.replace(PLAIN, window="713x713", stride="476x476")
    assert square == dataclasses.replace(PLAIN, window=713)
    assert (square.window, square.stride) == (713, 476)
    text = (
        '{"average":"probabilities","flip":false,"precision":"fp32","scales":[1.0],'
        '"split":"val","store_digest":"d","stride":476,"window":713}'
    )
    assert square.digest == hashlib.sha256(text.encode()).hexdigest()[:12]
    rectangle = dataclasses.replace(PLAIN, window="512x1024")
    assert rectangle == dataclasses.replace(PLAIN, window="512x1024", stride="342x683")
    assert "sliding window 512x1024 stride 342x683" in str(rectangle)
    assert Protocol.from_dict(rectangle.to_dict()) == rectangle
    assert ViewOptions(protocol="semseg").views("512x1024").window == "512x1024"
    assert ViewOptions(protocol="mmseg").views("512x1024").window == 0
    for refused in ({"window": "0x9"}, {"window": "512by9"}, {"window": "33x65", "stride": "33x66"}):
        with pytest.raises(InputError, match=r"512by9|0x9|33x66"):
            dataclasses.replace(PLAIN, **refused)  # type: ignore[arg-type]


@pytest.mark.parametrize("change", OTHERS)
def test_different_protocols_are_not_compared_and_the_difference_is_shown(change: dict[str, Any]) -> None:
    other = dataclasses.replace(PLAIN, **change)
    require_same_protocol(other, dataclasses.replace(PLAIN, **change))
    with pytest.raises(InputError) as refused:
        require_same_protocol(PLAIN, other)
    for name in change:
        assert f"{name} {getattr(PLAIN, name)} and {getattr(other, name)}" in str(refused.value)
    assert PLAIN.digest in str(refused.value)
    assert other.digest in str(refused.value)


def test_scores_read_back_with_their_protocol_and_from_before_there_was_a_stride() -> None:
    protocol = dataclasses.replace(PLAIN, window=713, flip=True, scales=(0.5, 1.0))
    scores = Scores(miou=0.5, mean_accuracy=0.5, pixel_accuracy=0.5, protocol=protocol)
    stored = scores.to_dict()
    assert stored["protocol"]["digest"] == protocol.digest
    assert Scores.from_dict(stored) == scores
    for name in ("digest", "stride", "average"):
        del stored["protocol"][name]
    assert Scores.from_dict(stored) == scores


SIX = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


@pytest.mark.parametrize(
    ("name", "crop_size", "expected"),
    [
        ("whole", 713, {}),
        ("semseg", 713, {"window": 713, "stride": 476, "flip": True}),
        ("semseg_ms", 473, {"window": 473, "stride": 316, "flip": True, "scales": SIX}),
        ("mmseg", 713, {}),
        ("mmseg", 769, {"window": 769, "stride": 513, "average": "logits"}),
        ("mmseg_ms", 769, {"window": 769, "stride": 513, "average": "logits", "flip": True, "scales": SIX}),
        ("mmseg_ms", 713, {"average": "logits", "flip": True, "scales": SIX}),
    ],
)
def test_named_protocols_are_what_the_references_do(
    name: Any, crop_size: int, expected: dict[str, Any]
) -> None:
    stated = {"scales": (1.0,), "flip": False, "window": 0, "stride": 0, "average": "probabilities"}
    views = dataclasses.asdict(named_views(name, crop_size))
    assert views == stated | {"precision": "fp32"} | expected


def test_flags_override_the_named_protocol() -> None:
    assert ViewOptions(protocol="semseg").views(713) == named_views("semseg", 713)
    views = ViewOptions(protocol="semseg", flip=False, window=257, scales=(2.0,), precision="bf16").views(713)
    assert (views.flip, views.window, views.stride) == (False, 257, 172)
    assert (views.scales, views.precision) == ((2.0,), "bf16")
    assert ViewOptions(protocol="mmseg", stride=500).views(769).stride == 500
    assert ViewOptions(protocol="mmseg", window=513).views(713).average == "logits"
    assert ViewOptions(protocol="mmseg", average="probabilities").views(769).average == "probabilities"
    assert ViewOptions(protocol="semseg", average="logits").views(713).average == "logits"
    assert ViewOptions(protocol="mmseg", window=0).views(769) == named_views("whole", 769)
    protocol = ViewOptions(protocol="semseg").protocol_on("d", "val", crop_size=713)
    assert protocol == dataclasses.replace(PLAIN, flip=True, window=713)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(InputError, match="window must be"):
        dataclasses.replace(PLAIN, window=-1)
    for window, stride in ((0, 3), (33, 34), (33, -1)):
        with pytest.raises(InputError, match="stride must be"):
            dataclasses.replace(PLAIN, window=window, stride=stride)


def test_a_protocol_in_words_says_all_that_counts() -> None:
    text = str(dataclasses.replace(PLAIN, flip=True, window=129, scales=(0.5, 1.0)))
    for part in ("split val", "with flip", "sliding window 129 stride 86", "scales 0.5, 1.0", "fp32"):
        assert part in text
