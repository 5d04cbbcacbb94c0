"""Laws of the ledger: every reserved second is in it once, whatever died."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segfleet.ledger import ATTEMPTS, begun, entry, ledger, ledger_table, seen
from segfleet.study import TrialRecord


def trial(number: int, attempts: list[dict[str, float]]) -> TrialRecord:
    attributes: dict[str, Any] = {ATTEMPTS: attempts}
    return TrialRecord(
        number=number, changes={}, reason="complete", detail="", miou_by_epoch={}, attributes=attributes
    )


def report(useful_s: float, at_start: float = 0.0) -> dict[str, float]:
    return {"useful_s": useful_s, "useful_s_at_start": at_start}


def test_a_trial_without_a_death_is_useful_but_for_its_start() -> None:
    attempts = begun([], 100.0)
    attempts = seen(attempts, 115.0, report(5.0))
    attempts = seen(attempts, 121.0, report(10.0))
    attempts = seen(attempts, 122.0)
    found = entry(trial(0, attempts), num_workers=2)
    assert (found.reserved, found.useful, found.redone, found.around) == (44.0, 20.0, 0.0, 24.0)


def test_what_is_computed_again_after_a_death_is_said() -> None:
    attempts = seen(
        begun([], 0.0), 30.0, report(20.0)
    )  # two epochs of 10, the second one's checkpoint is damaged
    attempts = begun(attempts, 1000.0)  # nobody was reserved in between
    attempts = seen(attempts, 1005.0, report(10.0, at_start=10.0))
    attempts = seen(attempts, 1030.0, report(31.0, at_start=10.0))
    found = entry(trial(0, attempts), num_workers=1)
    assert (found.num_attempts, found.reserved, found.useful, found.redone) == (2, 60.0, 31.0, 10.0)


def test_workers_that_begin_anew_within_an_attempt_do_not_hide_what_they_lost() -> None:
    attempts = seen(begun([], 0.0), 30.0, report(20.0))
    attempts = seen(attempts, 50.0, report(10.0, at_start=10.0))
    attempts = seen(attempts, 70.0, report(25.0, at_start=10.0))
    found = entry(trial(0, attempts), num_workers=1)
    assert (found.num_attempts, found.reserved, found.useful, found.redone) == (1, 70.0, 25.0, 10.0)


def test_an_attempt_that_never_reported_is_all_around() -> None:
    attempts = seen(begun([], 0.0), 30.0, report(20.0))
    attempts = begun(seen(begun(attempts, 50.0), 60.0), 70.0)
    attempts = seen(attempts, 100.0, report(40.0, at_start=20.0))
    found = entry(trial(0, attempts), num_workers=1)
    assert (found.reserved, found.useful, found.redone, found.around) == (70.0, 40.0, 0.0, 30.0)


def test_a_trial_from_before_the_ledger_has_no_entry_in_the_sums() -> None:
    old = TrialRecord(number=3, changes={}, reason="complete", detail="", miou_by_epoch={}, attributes={})
    assert ledger([old], 2)[-1].reserved == 0
    assert ledger_table(ledger([old], 2)).splitlines()[-1].split() == ["all", "0", *["0.0"] * 4, "-"]


def test_workers_that_wait_between_trials_are_counted() -> None:
    one = seen(begun([], 110.0), 130.0, report(15.0))
    two = seen(begun([], 135.0), 155.0, report(12.0))
    entries = ledger([trial(0, one), trial(1, two)], 2, {"a": [100.0, 160.0]})
    assert [item.name for item in entries] == ["0", "1", "between", "all"]
    between, everything = entries[2:]
    assert (between.reserved, between.useful) == (2 * 20.0, 0.0)
    assert (everything.reserved, everything.useful) == (2 * 60.0, 2 * 27.0)


@given(st.data())
def test_the_parts_add_up_to_the_wall_clock(data: st.DataObject) -> None:
    """Trials one after the other on one group of workers: their entries are the time that passed, but for the gaps."""
    now, gaps, records, lost, kept_s = 0.0, 0.0, [], 0.0, 0.0
    for number in range(data.draw(st.integers(1, 4))):
        attempts: list[dict[str, float]] = []
        useful = 0.0
        for _ in range(data.draw(st.integers(1, 3))):
            gap = data.draw(st.floats(0, 50))
            now, gaps = now + gap, gaps + gap
            attempts = begun(attempts, now)
            num_epochs = data.draw(st.integers(0, 3))
            if num_epochs:
                start = data.draw(st.floats(0, 1)) * useful
                lost, useful = lost + useful - start, start
            for _ in range(num_epochs):
                step = data.draw(st.floats(0.1, 20))
                now, useful = now + step + data.draw(st.floats(0, 5)), useful + step
                attempts = seen(attempts, now, report(useful, start))
            now += data.draw(st.floats(0, 5))
            attempts = seen(attempts, now)
        kept_s += useful
        records.append(trial(number, attempts))
    total = ledger(records, num_workers=3)[-1]
    assert total.reserved == pytest.approx(3 * (now - gaps))
    assert total.useful == pytest.approx(3 * kept_s)
    assert total.redone == pytest.approx(3 * lost, abs=1e-6)
    assert total.around >= -1e-6
