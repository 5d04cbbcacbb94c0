"""The report of an ingest: a table on the screen, all of it as JSON, and an HTML page with the offenders' pictures."""

import base64
import html
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pspnet.errors import InputError
from pspnet.labels import IGNORE_INDEX, ClassTable
from pspnet.pictures import WRONG, colourise
from segfleet.checks import Finding, PairFacts, to_json
from segfleet.sources import Pair, Source
from segfleet.sources.files import preview

MAX_ON_SCREEN = 20
MAX_WARNINGS_ON_SCREEN = 5
MAX_PICTURED = 200
_THUMBNAIL = (160, 120)

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #202124; margin: 2rem auto; max-width: 75rem; padding: 0 1rem }
table { border-collapse: collapse; width: 100% } th { text-align: left }
td, th { padding: .4rem .8rem .4rem 0; border-bottom: 1px solid #dadce0; vertical-align: top }
td.pictures { width: 21rem; line-height: 0 } td img { margin: 0 4px 4px 0 } td.pictures p { line-height: 1.5 }
.faint { color: #6e7176 } .path { overflow-wrap: anywhere }
.bar { height: .8rem; min-width: 1px; display: inline-block; border: 1px solid #dadce0 }
"""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the checks found, and where it is written."""

    problems: list[Finding]
    warnings: list[Finding]
    is_refused: bool
    """Whether more pairs have problems than may be left out."""
    html_path: Path
    json_path: Path


def write_report(
    source: Source,
    pairs: Sequence[Pair],
    store_path: Path,
    *,
    problems: list[Finding],
    warnings: list[Finding],
    facts: Sequence[PairFacts],
    is_refused: bool,
) -> Report:
    """Write STORE-report.json and STORE-report.html beside the store; `facts` are of the pairs that can be used."""
    report = Report(
        problems=problems,
        warnings=warnings,
        is_refused=is_refused,
        html_path=store_path.with_name(f"{store_path.name}-report.html"),
        json_path=store_path.with_name(f"{store_path.name}-report.json"),
    )
    counts = class_counts(facts)
    values = {
        "source": source.describe(),
        "store": str(store_path),
        "is_refused": is_refused,
        "num_pairs": len(pairs),
        "num_usable": len(facts),
        "problems": to_json(problems),
        "warnings": to_json(warnings),
        "class_names": [*source.class_table.class_names, "ignored"],
        "class_counts": counts,
    }
    report.json_path.write_text(json.dumps(values, indent=1) + "\n")
    report.html_path.write_text(_page(source, pairs, store_path, report, counts), encoding="utf-8")
    return report


def table(findings: Sequence[Finding], *, max_lines: int = MAX_ON_SCREEN) -> str:
    """Return the first findings, one a line, and how many there are of each kind."""
    kinds = Counter(finding.kind for finding in findings)
    width = max(len(kind) for kind in kinds)
    lines = [f"  {finding.kind:{width}}  {finding.text}" for finding in findings[:max_lines]]
    if len(findings) > max_lines:
        lines.append(f"  {'…':{width}}  and {len(findings) - max_lines} more, all in the report")
    lines.append("  " + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()))
    return "\n".join(lines)


def class_counts(facts: Sequence[PairFacts]) -> dict[str, list[int]]:
    """Return the pixels of each train id, and of ignored ones, in each split."""
    counts: dict[str, list[int]] = {}
    for item in facts:
        before = counts.get(item.split, [0] * len(item.class_counts))
        counts[item.split] = [old + new for old, new in zip(before, item.class_counts, strict=True)]
    return dict(sorted(counts.items()))


def _page(
    source: Source, pairs: Sequence[Pair], store_path: Path, report: Report, counts: dict[str, list[int]]
) -> str:
    num_bad = len({(finding.split, finding.name) for finding in report.problems})
    outcome = "no store was made" if report.is_refused else f"{num_bad} left out" if num_bad else "all used"
    by_key = {(pair.split, pair.name): pair for pair in pairs}
    sections = [
        _section(source, by_key, title, findings)
        for title, findings in (("Problems", report.problems), ("Worth a look", report.warnings))
    ]
    title = html.escape(f"Ingest of {source.name}")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"<h1>{title}</h1><p>{len(pairs)} pairs, {num_bad} with problems: {outcome}.<br>"
        f'<span class="faint path">store {html.escape(str(store_path))}</span></p>'
        + "".join(sections)
        + _histogram(source.class_table, counts)
        + "</html>\n"
    )


def _section(
    source: Source, by_key: dict[tuple[str, str], Pair], title: str, findings: Sequence[Finding]
) -> str:
    if not findings:
        return f"<h2>{title}</h2><p>None.</p>"
    rows = []
    for number, finding in enumerate(findings):
        pictures = ""
        if number < MAX_PICTURED:
            keys = [(finding.split, finding.name), *([finding.other] if finding.other else [])]
            pictures = "".join(_pictures_of(source, by_key[key]) for key in keys)
        rows.append(
            f'<tr><td class="pictures">{pictures}</td>'
            f"<td>{html.escape(finding.kind)}</td>"
            f"<td>{html.escape(finding.split)}/{html.escape(finding.name)}</td>"
            f'<td class="path">{html.escape(finding.text)}</td></tr>'
        )
    more = (
        f'<p class="faint">Pictures of the first {MAX_PICTURED}.</p>' if len(findings) > MAX_PICTURED else ""
    )
    return (
        f"<h2>{title}: {len(findings)}</h2>{more}<table><tr><th>image, label<th>kind<th>pair<th>what, and what to do"
        f"</tr>{''.join(rows)}</table>"
    )


def _pictures_of(source: Source, pair: Pair) -> str:
    """Return the image and the coloured label as far as they can be read; unknown ids are red."""
    try:
        image, ids = source.read(pair)
    except InputError:
        shown = preview(pair.image)
        return (
            '<p class="faint">cannot be shown</p>'
            if shown is None
            else _embedded(shown, Image.Resampling.BOX)
        )
    page = _embedded(image, Image.Resampling.BOX)
    if ids is None:
        return page
    return page + _embedded(_coloured(ids, source.class_table), Image.Resampling.NEAREST)


def _coloured(ids: np.ndarray, class_table: ClassTable) -> np.ndarray:
    picture = np.empty((*ids.shape, 3), dtype=np.uint8)
    for value in np.unique(ids):
        try:
            train_id = class_table.train_id_of(np.array([[value]]), where="")
            colour = colourise(train_id, class_table)[0, 0]
        except InputError:
            colour = np.array(WRONG, dtype=np.uint8)
        picture[ids == value] = colour
    return picture


def _embedded(pixels: np.ndarray, resample: Image.Resampling) -> str:
    picture = Image.fromarray(pixels)
    scale = min(_THUMBNAIL[0] / picture.width, _THUMBNAIL[1] / picture.height)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    file, is_photograph = io.BytesIO(), resample is not Image.Resampling.NEAREST
    picture.resize(size, resample).save(file, "JPEG" if is_photograph else "PNG", quality=85)
    data = base64.b64encode(file.getvalue()).decode("ascii")
    kind = "jpeg" if is_photograph else "png"
    return f'<img width="{size[0]}" height="{size[1]}" alt="" src="data:image/{kind};base64,{data}">'


def _histogram(class_table: ClassTable, counts: dict[str, list[int]]) -> str:
    names = [*class_table.class_names, "ignored"]
    colours = colourise(
        np.array([[*range(class_table.num_classes), IGNORE_INDEX]], dtype=np.uint8), class_table
    )[0]
    rows = []
    for index, name in enumerate(names):
        colour = "#{:02x}{:02x}{:02x}".format(*colours[index].tolist())
        cells = []
        for of_split in counts.values():
            share = of_split[index] / max(1, sum(of_split))
            bar = f'<span class="bar" style="width:{10 * share:.2f}rem;background:{colour}"></span>'
            cells.append(f"<td>{bar if of_split[index] else ''} {share:.2%}</td>")
        rows.append(f"<tr><td>{html.escape(name)}</td>{''.join(cells)}</tr>")
    heads = "".join(f"<th>{html.escape(split)}" for split in counts)
    return f"<h2>Pixels of each class</h2><table><tr><th>class{heads}</tr>{''.join(rows)}</table>"
