"""Laws of the page of a search: every trial and its reason, nothing from elsewhere, and what matters is found."""

import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from segfleet.importance import compared, importances, interactive_plots
from segfleet.override import override
from segfleet.presets import search_preset
from segfleet.search_config import SearchConfig
from segfleet.search_page import SearchFacts, write_page
from segfleet.search_report import draw_slices
from segfleet.study import Reason, Study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """24 trials whose mIoU follows from the learning rate alone."""
    config: SearchConfig = override(
        search_preset("demo"),
        {
            "training.tracking.storage_dir": str(tmp_path_factory.mktemp("page")),
            "study": "s",
            "sampler": "random",
            "fidelity": "epochs",
        },
    )
    study = Study(config, store_digest="d")
    for number in range(24):
        proposal = study.ask()
        miou = 0.3 - 0.1 * abs(math.log10(proposal.changes["optim.base_lr"]) + 2)
        for epoch in (1, 3) if number % 3 else (1,):
            study.report(proposal.number, epoch=epoch, miou=miou + 0.01 * epoch)
        reason: Reason = "complete" if number % 3 else "pruned"
        study.finish(proposal.number, reason, f"<b>{number}</b> & why")
    oom = study.ask()
    study.finish(oom.number, "oom", "too large")
    return study


def test_the_setting_that_matters_is_found_at_an_epoch_that_half_of_the_trials_reached(study: Study) -> None:
    comparison = study.comparison()
    assert comparison is not None
    assert (comparison.epoch, comparison.num_trials) == (3, 16)
    found = importances(comparison)
    assert found[0].name == "base_lr"
    assert found[0].share > 0.8
    assert sum(item.share for item in found) == pytest.approx(1.0)
    assert all(0 <= item.low <= item.high <= 1 for item in found)
    assert found[0].low > max(item.high for item in found[1:])


def test_too_few_or_equal_trials_say_nothing(study: Study) -> None:
    trials = [
        (trial, {float(epoch): miou for epoch, miou in trial.intermediate_values.items()})
        for trial in study._study.get_trials(deepcopy=False)
    ]
    assert compared(trials[:5]) is None
    assert compared(trials[:6]) is not None
    assert compared([]) is None


def test_the_page_says_why_every_trial_ended_and_loads_nothing(study: Study, tmp_path: Path) -> None:
    comparison = study.comparison()
    assert comparison is not None
    picture = draw_slices(comparison.points, title="mIoU & settings", path=tmp_path / "settings.png")
    with Image.open(picture) as opened:
        assert opened.width > 1000
    page = write_page(
        tmp_path / "report.html",
        study.leaderboard(),
        SearchFacts(
            study="<script>alert(1)</script>",
            facts={"data": "a & b"},
            class_iou={"road": 0.9, "<i>": None, "car": 0.1},
            importances=importances(comparison),
            compared_epoch=comparison.epoch,
            num_compared=comparison.num_trials,
            pictures={"a caption": picture, "absent": tmp_path / "absent.png"},
            commands=["python jobs/promote.py --name 'x'"],
        ),
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "settings.png"]
    text = page.read_text()
    assert list(loaded(text)) == []
    assert "<script" not in text
    seen = " ".join(words(text))
    assert "<script>alert(1)</script>" in seen
    for trial in study.trials():
        assert trial.detail in seen
    for reason, count in (("complete", 16), ("pruned", 8), ("oom", 1)):
        assert re.search(rf"{reason} {count} ", seen)
    assert "road 0.9000 car 0.1000 <i> absent" in seen


def test_interactive_plots_load_nothing(study: Study) -> None:
    comparison = study.comparison()
    assert comparison is not None
    assert [
        address for address in loaded(interactive_plots(comparison, "a <study>")) if "://" in address
    ] == []


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def loaded(text: str) -> Iterator[str]:
    """Yield every address of the page that is not its own content."""
    reader = _Reader()
    reader.feed(text)
    yield from (address for address in reader.addresses if not address.startswith("data:"))


def words(text: str) -> list[str]:
    reader = _Reader()
    reader.feed(text)
    return [text for text in reader.texts if text]
