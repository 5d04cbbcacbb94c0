"""A store in words and in two pictures: what it holds, how its pixels are shared out, what it looks like."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import matplotlib.figure
import matplotlib.ticker
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image, ImageDraw, ImageFont

from pspnet.labels import IGNORE_INDEX
from pspnet.manifest import SELECTION, Manifest
from pspnet.pictures import FAINT_INK, GAP, IGNORED, INK, MARGIN, PAPER, colourise, legend
from pspnet.store import Split, Store

MAX_SIZES = 8
CELL_WIDTH = 300
_CAPTION = 22
_HEADING = 40


def describe_store(store: Store) -> str:
    """Return all that the manifest says, as text."""
    manifest = store.manifest
    kind = manifest.source.get("kind", "unknown kind")
    lines = [
        f"store   {store.location.text}",
        f"name    {manifest.name}, from {manifest.source.get('root', manifest.source.get('mat', '?'))} ({kind})",
        f"digest  {manifest.digest}",
        f"disk    {_disk(store)}",
        f"mean    {_three(manifest.mean)}   std {_three(manifest.std)}   (red, green, blue of train, 0 to 255)",
        "",
        *_split_lines(manifest),
        "",
        *_selection_lines(manifest),
        *_class_lines(manifest),
        "",
        *_shard_lines(manifest),
    ]
    if manifest.left_out:
        lines += ["", f"left out: {len(manifest.left_out)}", *(f"  {line}" for line in manifest.left_out)]
    return "\n".join(lines)


def draw_class_histogram(store: Store, path: Path) -> Path:
    """Write a PNG to `path`: the share of each class in the pixels of each split, on a logarithmic axis."""
    manifest = store.manifest
    names = [*manifest.class_table.class_names, "ignored"]
    colours = np.vstack([manifest.class_table.colours, IGNORED]) / 255
    splits = [split for split in manifest.split_names if sum(manifest.class_counts(split))]
    figure = matplotlib.figure.Figure(
        figsize=(3 + 2.6 * max(1, len(splits)), 1.3 + 0.27 * len(names)), layout="constrained"
    )
    FigureCanvasAgg(figure)
    figure.suptitle(f"{manifest.name}: pixels of each class, % of the split")
    columns = figure.subplots(1, max(1, len(splits)), sharex=True, sharey=True, squeeze=False)[0]
    for axes, split in zip(columns, splits, strict=False):
        counts = np.array(manifest.class_counts(split), dtype=np.float64)
        shares = 100 * counts / counts.sum()
        places = np.arange(len(names))
        axes.barh(places, shares, color=colours, edgecolor="#6e7176", linewidth=0.5)
        for place, share in zip(places, shares, strict=True):
            text = "none" if share == 0 else f"{share:.2g}" if share < 10 else f"{share:.0f}"
            axes.text(max(share, 0.01) * 1.15, place, text, va="center", fontsize=8, color="#202124")
        axes.set(title=f"{split}, {manifest.num_images(split)} images", xscale="log", xlim=(0.01, 400))
        axes.set_yticks(places, names)
        axes.set_xticks([0.01, 0.1, 1, 10, 100])
        axes.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
    columns[0].invert_yaxis()
    figure.savefig(path, dpi=110)
    return path


def draw_contact_sheet(store: Store, path: Path, *, num_images: int = 6) -> Path:
    """Write a PNG to `path`: so many images of each split, evenly spread, each beside its label, and a legend."""
    cells: list[tuple[str, list[tuple[str, Image.Image, np.ndarray | None]]]] = []
    for name in _sheet_splits(store.manifest):
        split = store.split(name)
        made = [_cell(split, index) for index in _spread(len(split), num_images)]
        cells.append((f"{name}: {len(split)} images", made))
    num_columns = 3
    pair_width = 2 * CELL_WIDTH + GAP // 2
    rows = [
        [made[start : start + num_columns] for start in range(0, len(made), num_columns)] for _, made in cells
    ]
    width = 2 * MARGIN + num_columns * pair_width + (num_columns - 1) * 2 * GAP
    height = MARGIN + sum(
        _HEADING + sum(_CAPTION + max(image.height for _, image, _ in row) + GAP for row in of_split)
        for of_split in rows
    )
    page = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(page)
    present: set[int] = set()
    top = MARGIN
    for (heading, _), of_split in zip(cells, rows, strict=True):
        draw.text((MARGIN, top), heading, fill=INK, font=_font(22))
        top += _HEADING
        for row in of_split:
            for column, (name, image, label) in enumerate(row):
                left = MARGIN + column * (pair_width + 2 * GAP)
                draw.text((left, top), _fitting(name, 15, pair_width), fill=FAINT_INK, font=_font(15))
                page.paste(image, (left, top + _CAPTION))
                if label is None:
                    continue
                present |= set(np.unique(label).tolist())
                coloured = Image.fromarray(colourise(label, store.class_table))
                page.paste(coloured, (left + CELL_WIDTH + GAP // 2, top + _CAPTION))
            top += _CAPTION + max(image.height for _, image, _ in row) + GAP
    legend(np.asarray(page), _holding(present, page), store.class_table).save(path)
    return path


def _split_lines(manifest: Manifest) -> list[str]:
    rows = [["split", "images", "labelled", "pixels", "ignored", "sizes (height x width)"]]
    for split, shards in manifest.splits.items():
        sizes: Counter[str] = Counter()
        for shard in shards:
            sizes.update(shard.sizes)
        counts = manifest.class_counts(split)
        listed = ", ".join(f"{count} of {size}" for size, count in sizes.most_common(MAX_SIZES))
        more = f", and {len(sizes) - MAX_SIZES} other sizes" if len(sizes) > MAX_SIZES else ""
        rows.append(
            [
                split,
                str(manifest.num_images(split)),
                str(sum(shard.num_labelled for shard in shards)),
                f"{sum(shard.num_pixels for shard in shards):,}",
                f"{counts[-1] / max(1, sum(counts)):.1%}",
                listed + more,
            ]
        )
    return _columns(rows)


def _selection_lines(manifest: Manifest) -> list[str]:
    cut = manifest.selection
    if cut is None:
        return ["train is not cut into fit and selection", ""]
    kept = f"whole groups {', '.join(cut.groups)}" if cut.rule == "group" else "single images by name"
    return [
        f"train is cut: selection has {len(cut.indices)} images, fit the other {manifest.num_images('fit')} "
        f"({cut.fraction:.0%} asked for; {kept})",
        "",
    ]


def _class_lines(manifest: Manifest) -> list[str]:
    """Return a line for each class of the table, with its share in each split; merged classes share theirs."""
    shares = {}
    for split in manifest.split_names:
        counts = manifest.class_counts(split)
        shares[split] = [count / max(1, sum(counts)) for count in counts]
    rows = [["id", "class", "train id", "colour", *shares]]
    for info in manifest.class_table.classes:
        is_ignored = info.train_id == IGNORE_INDEX
        cells = ["" if is_ignored else f"{of_split[info.train_id]:.3%}" for of_split in shares.values()]
        train_id = "ignored" if is_ignored else str(info.train_id)
        rows.append([str(info.id), info.name, train_id, "#{:02x}{:02x}{:02x}".format(*info.colour), *cells])
    rows.append(["", "all ignored", "", "", *(f"{of_split[-1]:.3%}" for of_split in shares.values())])
    return _columns(rows)


def _shard_lines(manifest: Manifest) -> list[str]:
    rows = [["shard", "images", "sha256 of its pixels"]]
    rows += [
        [shard.file, str(shard.num_images), shard.digest]
        for shards in manifest.splits.values()
        for shard in shards
    ]
    return _columns(rows)


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _three(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


def _disk(store: Store) -> str:
    """Return in words what the store takes: all, an image, and in which format."""
    shards = [shard for shards in store.manifest.splits.values() for shard in shards]
    num_bytes = store.num_bytes()
    num_images, num_pixels = (
        sum(getattr(shard, of) for shard in shards) for of in ("num_images", "num_pixels")
    )
    return (
        f"{num_bytes / 1e6:,.1f} MB in {len(shards)} shards ({', '.join(sorted({s.format for s in shards}))}), "
        f"{num_bytes / max(1, num_images) / 1e6:.3f} MB an image, {num_bytes / max(1, num_pixels):.2f} bytes a pixel"
    )


def _sheet_splits(manifest: Manifest) -> list[str]:
    """Return fit and selection in place of train where it is cut."""
    if manifest.selection is None:
        return manifest.split_names
    return ["fit", SELECTION, *(split for split in manifest.splits if split != "train")]


def _spread(num_images: int, num_wanted: int) -> list[int]:
    """Return so many indices, evenly spread over all."""
    num_wanted = min(num_images, num_wanted)
    return [place * num_images // num_wanted for place in range(num_wanted)]


def _cell(split: Split, index: int) -> tuple[str, Image.Image, np.ndarray | None]:
    """Return name, image and train ids at the width of a cell; ids are picked, not mixed."""
    image, label = split.image(index), split.label(index)
    size = (CELL_WIDTH, max(1, round(CELL_WIDTH * image.shape[0] / image.shape[1])))
    small = Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)
    if label is None:
        return split.name(index), small, None
    return split.name(index), small, np.asarray(Image.fromarray(label).resize(size, Image.Resampling.NEAREST))


def _holding(present: set[int], page: Image.Image) -> np.ndarray:
    """Return train ids of the page's size in which just the present ones occur: those that the legend is to name."""
    values = sorted(present) or [IGNORE_INDEX]
    ids = np.full((page.height, page.width), values[0], dtype=np.uint8)
    ids.ravel()[: len(values)] = values
    return ids


def _fitting(text: str, size: int, width: int) -> str:
    """Return `text`, its middle left out where it is wider than `width` pixels."""
    font, kept = _font(size), len(text)
    shown = text
    while font.getlength(shown) > width and kept > 2:
        kept -= 1
        shown = f"{text[: kept // 2]}…{text[len(text) - kept // 2 :]}"
    return shown


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
