"""What `make faults` ends with: a line for each row, and one line of JSON (`-p tests.faults.table`)."""

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pytest

START, END = "<!-- table of make faults -->", "<!-- end of the table -->"


class Table:
    """Collects the outcome of each test that is marked as a row."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], list[tuple[bool, dict[str, float]]]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties: dict[str, Any] = dict(report.user_properties)
        if "fault" not in properties or (report.when != "call" and report.outcome == "passed"):
            return
        if report.outcome != "skipped":
            row = self.rows.setdefault(tuple(properties["fault"]), [])
            row.append((report.passed, properties))

    def lines(self) -> Iterator[str]:
        """Yield the table in Markdown."""
        yield "| row | fault | held | recovery in s, median (worst) | steps redone |"
        yield "| --- | --- | --- | --- | --- |"
        for (row, what), outcomes in sorted(self.rows.items(), key=_order):
            seconds = [values["recovery_s"] for _, values in outcomes if "recovery_s" in values]
            steps = [int(values["steps_redone"]) for _, values in outcomes if "steps_redone" in values]
            recovery = f"{median(seconds):.1f} ({max(seconds):.1f})" if seconds else "-"
            if noticed := [values["noticed_s"] for _, values in outcomes if "noticed_s" in values]:
                recovery += f", noticed after {max(noticed):.0f}"
            redone = (
                (f"{min(steps)} to {max(steps)}" if min(steps) < max(steps) else steps[0]) if steps else "-"
            )
            held = sum(passed for passed, _ in outcomes)
            yield f"| {row} | {what} | {held} of {len(outcomes)} | {recovery} | {redone} |"

    def summary(self) -> str:
        """Return the line of JSON."""
        held = sum(all(passed for passed, _ in outcomes) for outcomes in self.rows.values())
        return json.dumps({"rows": len(self.rows), "held": held})


def _order(item: tuple[tuple[str, str], Any]) -> tuple[str, int, str]:
    (row, what), _ = item
    return row[0], int(row[1:]), what


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-faults", default="", help="also put the table into this Markdown file")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Table(), "fault-table")


def pytest_itemcollected(item: pytest.Item) -> None:
    marker = item.get_closest_marker("fault")
    if marker is not None:
        item.user_properties.append(("fault", list(marker.args)))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    table = config.pluginmanager.get_plugin("fault-table")
    assert isinstance(table, Table)
    lines = "\n".join(table.lines())
    if path := config.getoption("--write-faults"):
        before, _, rest = Path(path).read_text().partition(START)
        _, _, after = rest.partition(END)
        Path(path).write_text(f"{before}{START}\n{lines}\n\n`{table.summary()}`\n{END}{after}")
    terminalreporter.write_line("")
    terminalreporter.write_line(lines)
    terminalreporter.write_line(table.summary())
