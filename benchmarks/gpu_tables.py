"""What gpu.py says: its tables, the aim, and the numbers of its last line."""

from collections.abc import Sequence
from statistics import median

from gpu_rows import Card, Case, Row
from gpu_ways import Loss, Network, Way
from reporting import cell

from pspnet.inference import Precision
from pspnet.memory import GIB, Fit

AIM_SPEED, AIM_MFU = 2.0, 0.5
"""Times semseg's eager fp16; share of the card's peak in bf16."""


def step_table(card: Card, cases: Sequence[Case], flops: dict[Network, int], fit: Fit) -> str:
    """Return the table of training steps: speed, arithmetic, memory and how far the first loss is off."""
    lines = [
        "| batch | way | ms a step | images/s | times the reference, same autocast | times the reference, fp16 "
        "| TFLOP/s | MFU | MFU by the reference's arithmetic | peak GiB | predicted | reserved GiB | predicted "
        "| loss differs by |",
        "| --- " * 14 + "|",
    ]
    for case in cases:
        for row in case.rows:
            lines.append(f"| {case.batch_size} | {' | '.join(_step_cells(card, case, row, flops, fit))} |")
    return "\n".join(lines)


def _step_cells(card: Card, case: Case, row: Row, flops: dict[Network, int], fit: Fit) -> list[str]:
    way = row.way
    assert way is not None
    name = f"**{row.name}**" if way.of == "pspnet" else row.name
    if row.outcome:
        return [name, row.outcome, *["–"] * 11]
    seconds = median(row.seconds)
    images_per_s = case.batch_size / seconds
    counted = case.predicted.get(way.how, case.predicted[""])
    is_ours, has_memory = way.of == "pspnet", card.device.type == "cuda"
    base = row_of(case, Way(of="reference", precision=way.precision))
    return [
        name,
        f"{seconds * 1e3:.3g}",
        f"{images_per_s:.3g}",
        _cell(row.ratios(base)),
        _cell(row.ratios(row_of(case, Way(of="reference", precision="fp16")))),
        f"{images_per_s * flops[way.of] / 1e12:.3g}",
        _percent(mfu(card, case, row, flops[way.of])),
        _percent(mfu(card, case, row, flops["reference"])) if is_ours else "–",
        f"{row.peak_bytes / GIB:.2f}" if has_memory else "–",
        f"{counted / GIB:.2f}" if is_ours else "–",
        f"{row.reserved_bytes / GIB:.2f}" if has_memory else "–",
        f"{(fit.factor * counted + fit.constant) / GIB:.2f}" if is_ours else "–",
        "–"
        if way.of == "fcn" or row.loss is None or base.loss is None
        else f"{_differs(row.loss, base.loss):.0e}",
    ]


def row_of(case: Case, way: Way) -> Row:
    """Return the row of a way; an empty one where it was not asked for."""
    return next((row for row in case.rows if row.way == way), Row(way.name, way, outcome="not measured"))


def mfu(card: Card, case: Case, row: Row, flops_per_image: int) -> float | None:
    """Return the share of the card's peak that `flops_per_image`, in operations, are; None where it is not known."""
    assert row.way is not None
    peak = card.peak(row.way.precision)
    if peak is None or not row.seconds or row.outcome:
        return None
    return flops_per_image * case.batch_size / median(row.seconds) / peak


def _differs(loss: Loss, other: Loss) -> float:
    return max(abs(mine / theirs - 1) for mine, theirs in zip(loss, other, strict=True))


def _cell(ratios: Sequence[float]) -> str:
    return cell(ratios) if ratios else "–"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def aim_line(card: Card, case: Case, flops: dict[Network, int]) -> str:
    """Return what is wanted of the largest batch and what there is of it."""
    reference = row_of(case, Way(of="reference", precision="fp16"))
    said = []
    for row in case.rows:
        if row.way is None or row.way.of != "pspnet" or row.outcome:
            continue
        ratios = row.ratios(reference)
        speed = f"{median(ratios):.2f} times" if ratios else "–"
        said.append(f"{row.name} {speed}, {_percent(mfu(card, case, row, flops['pspnet']))}")
    return (
        f"Wanted: {AIM_SPEED:g} times the reference's eager fp16, and {AIM_MFU:.0%} MFU in bf16; there is, with batch "
        f"{case.batch_size}: {'; '.join(said) or 'nothing'}."
    )


def prediction_table(predictions: dict[str, list[Row]]) -> str:
    """Return the table of predictions, each size of picture against the reference on the same size."""
    lines = [
        "| picture | way | ms | times the reference, same precision | other class than its fp32 without TF32 "
        "| peak GiB |",
        "| --- " * 6 + "|",
    ]
    for size, rows in predictions.items():
        bases = {row.name.rpartition(", ")[2]: row for row in rows if row.name.startswith("reference")}
        for row in rows:
            name = f"**{row.name}**" if row.name.startswith("pspnet") else row.name
            if row.outcome:
                lines.append(f"| {size} | {name} | {row.outcome} | – | – | – |")
                continue
            ratios = row.ratios(bases[row.name.rpartition(", ")[2]])
            memory = f"{row.peak_bytes / GIB:.2f}" if row.peak_bytes else "–"
            disagreement = "–" if row.disagreement is None else f"{row.disagreement:.1e}"
            lines.append(
                f"| {size} | {name} | {median(row.seconds) * 1e3:.3g} | {_cell(ratios)} | {disagreement} | {memory} |"
            )
    return "\n".join(lines)


def crop_table(crops: Sequence[Row], batch_size: int) -> str:
    """Return the table of crops made of windows on the device."""
    lines = ["| crops made on the device | ms a batch | images/s |", "| --- " * 3 + "|"]
    for row in crops:
        seen = f"{row.outcome} | –"
        if not row.outcome:
            rates = [batch_size / each for each in row.seconds]
            seen = f"{median(row.seconds) * 1e3:.3g} | {cell(rates)}"
        lines.append(f"| {row.name}, batch {batch_size} | {seen} |")
    return "\n".join(lines)


def summary(
    card: Card, case: Case, flops: dict[Network, int], predictions: dict[str, list[Row]]
) -> dict[str, float | None]:
    """Return the numbers of the largest batch and the smallest picture; None where there is none."""

    def speed(precision: Precision, compiled: bool = False) -> float | None:
        row = row_of(case, Way(of="pspnet", precision=precision, how="compiled" if compiled else ""))
        return _rounded(row.ratios(row_of(case, Way(of="reference", precision=precision))))

    mine = row_of(case, Way(of="pspnet", precision="bf16"))
    compiled = row_of(case, Way(of="pspnet", precision="bf16", how="compiled"))
    rows = {row.name: row for row in next(iter(predictions.values()))}
    return {
        "gpu_step_bf16": speed("bf16"),
        "gpu_step_fp16": speed("fp16"),
        "gpu_step_bf16_compiled": speed("bf16", compiled=True),
        "gpu_step_bf16_vs_fp16": _rounded(mine.ratios(row_of(case, Way(of="reference", precision="fp16")))),
        "gpu_mfu_bf16": _share(mfu(card, case, mine, flops["pspnet"])),
        "gpu_mfu_bf16_compiled": _share(mfu(card, case, compiled, flops["pspnet"])),
        "gpu_inference_bf16": _rounded(rows["pspnet, bf16"].ratios(rows["reference, bf16"])),
    }


def _rounded(ratios: Sequence[float]) -> float | None:
    return round(median(ratios), 2) if ratios else None


def _share(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
