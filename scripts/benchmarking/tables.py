"""Tables of what `benchmark_efficiency.py` measured."""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]

PLAIN, PEER, DENSE = "ISA, plain formulation", "ISA, mmsegmentation", "dense attention"
YARDSTICKS = {PLAIN: "direct", PEER: "reduced", DENSE: "direct"}
"""What ISA is held against, and the form in which that tells most of ISA, not of other convs."""


def edges(value: Any) -> Any:
    """Returns a key that sorts sizes such as 97x97 as numbers."""
    text = str(value)
    return ("", *map(int, text.split("x"))) if text.replace("x", "").isdigit() else (text,)


def ms(value: float) -> str:
    """Returns milliseconds as text; a GPU may take less than one."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def grouped(
    rows: Sequence[Row], keys: Sequence[str]
) -> Iterator[tuple[tuple[Any, ...], list[Row]]]:
    """Yields the rows that agree in `keys`, together."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    yield from groups.items()


def representative(rows: Sequence[Row]) -> list[Row]:
    """Returns the heads in the direct form, with jemalloc if they were so measured."""
    rows = [row for row in rows if row["heap"] != "default"] or list(rows)
    return [row for row in rows if row["form"] == "direct"]


def representative_growth(rows: Sequence[Row]) -> list[Row]:
    """Returns the growth sweep in one dtype, with jemalloc if it was so measured."""
    groups = grouped(rows, ("heap", "dtype"))
    return max(groups, key=lambda group: (group[0][0] != "default", group[0][1] == "float32"))[1]


@dataclass(frozen=True)
class Ratios:
    """How many times as fast as a yardstick ISA is.

    Args:
        other: The yardstick.
        form: Of both heads.
        heap: Who serves their memory.
        dtype: Of their arithmetic.
        mode: inference or training.
        by_size: The ratio at each size that both were measured at.
        kept: What ISA holds for the backward pass as a share of what the yardstick holds, at the
            size where that is most; None in inference.
    """

    other: str
    form: str
    heap: str
    dtype: str
    mode: str
    by_size: dict[str, float]
    kept: float | None

    @property
    def mean(self) -> float:
        """Returns the geometric mean over the sizes."""
        return statistics.geometric_mean(self.by_size.values())


def find_ratios(rows: Sequence[Row]) -> list[Ratios]:
    """Returns ISA against each yardstick, in each form, heap, dtype and mode that has both."""
    found = []
    for other in YARDSTICKS:
        for (form, heap, dtype, mode), group in grouped(rows, ("form", "heap", "dtype", "mode")):
            cells = {(row["head"], row["size"]): row for row in group}
            pairs = {
                size: (cells["ISA", size], cells[other, size])
                for head, size in cells
                if head == other and ("ISA", size) in cells
            }
            if pairs:
                ratios = {size: b["median"] / a["median"] for size, (a, b) in pairs.items()}
                kept = [
                    a["saved_mib"] / b["saved_mib"] for a, b in pairs.values() if a["saved_mib"]
                ]
                found.append(
                    Ratios(other, form, heap, dtype, mode, ratios, max(kept) if kept else None)
                )
    return found


def ratio_table(rows: Sequence[Row]) -> str:
    """Returns Markdown: how many times as fast as its yardsticks ISA is, by size."""
    sizes = sorted({row["size"] for row in rows}, key=edges)
    lines = [
        f"| ISA against | form | memory by | dtype | mode | {' | '.join(sizes)} "
        "| geometric mean | of what it keeps |",
        "|" + "---|" * (7 + len(sizes)),
    ]
    for ratios in find_ratios(rows):
        by_size = ratios.by_size
        shown = [f"{by_size[size]:.2f}x" if size in by_size else "" for size in sizes]
        lines.append(
            f"| {ratios.other} | {ratios.form} | {ratios.heap} | {ratios.dtype} | {ratios.mode} "
            f"| {' | '.join(shown)} | {ratios.mean:.2f}x "
            f"| {'' if ratios.kept is None else f'{ratios.kept:.2f}'} |"
        )
    return "\n".join(lines)


def headline_table(rows: Sequence[Row]) -> str:
    """Returns Markdown: how many times as fast ISA is, a line for each yardstick and dtype."""
    found = [r for r in find_ratios(rows) if r.form == YARDSTICKS[r.other]]
    found = [r for r in found if r.heap != "default"] or found
    lines = ["| ISA against | inference | training | kept for backward |", "|---|---:|---:|---:|"]
    cells: dict[tuple[str, str], dict[str, Ratios]] = {}
    for ratios in found:
        cells.setdefault((ratios.other, ratios.dtype), {})[ratios.mode] = ratios
    for (other, dtype), by_mode in cells.items():
        speeds = [
            f"{by_mode[mode].mean:.2f}x" if mode in by_mode else "-"
            for mode in ("inference", "training")
        ]
        kept = next((ratios.kept for ratios in by_mode.values() if ratios.kept), None)
        share = "-" if kept is None else f"{100 * kept:.0f} %"
        lines.append(f"| {other}, {dtype} | {' | '.join(speeds)} | {share} |")
    return "\n".join(lines)


def ratio_summary(rows: Sequence[Row]) -> str:
    """Returns Markdown: `ratio_table` over all sizes, each yardstick in its own form."""
    ratios = [found for found in find_ratios(rows) if found.form == YARDSTICKS[found.other]]
    heaps = sorted({found.heap for found in ratios})
    lines = [
        f"| ISA against | form | mode | dtype | {' | '.join(f'memory by {h}' for h in heaps)} "
        "| kept |",
        "|---|---|---|---|" + "---:|" * (len(heaps) + 1),
    ]
    cells: dict[tuple[str, str, str, str], dict[str, Ratios]] = {}
    for found in ratios:
        key = (found.other, found.form, found.mode, found.dtype)
        cells.setdefault(key, {})[found.heap] = found
    for key, by_heap in sorted(cells.items(), key=lambda item: list(YARDSTICKS).index(item[0][0])):
        speeds = [_spread(by_heap[heap]) if heap in by_heap else "-" for heap in heaps]
        kept = next((found.kept for found in by_heap.values() if found.kept), None)
        lines.append(
            f"| {' | '.join(key)} | {' | '.join(speeds)} | {f'{kept:.2f}' if kept else ''} |"
        )
    return "\n".join(lines)


def _spread(ratios: Ratios) -> str:
    values = ratios.by_size.values()
    return f"{ratios.mean:.2f}x ({min(values):.2f} to {max(values):.2f})"


def head_tables(rows: Sequence[Row]) -> str:
    """Returns Markdown, one table for each form, size, mode, dtype and heap."""
    lines: list[str] = []
    for key, group in grouped(rows, ("heap", "form", "mode", "size", "dtype", "batch")):
        heap, form, mode, size, dtype, batch = key
        reference = {row["head"]: row["median"] for row in group}.get(PLAIN)
        lines += [
            "",
            f"{form} form, {mode}, [{batch}, 2048, {size.replace('x', ', ')}], {dtype}, "
            f"memory by {heap}:",
            "",
            "| head | M parameters | GMACs | peak MiB | kept MiB | ms (least to most) "
            "| against plain ISA | of the conv ceiling |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in sorted(group, key=lambda row: row["median"]):
            kept = "" if row["saved_mib"] is None else f"{row['saved_mib']:.0f}"
            ratio = "" if reference is None else f"{reference / row['median']:.2f}x"
            lines.append(
                f"| {row['head']} | {row['parameters'] / 1e6:.2f} | {row['gmacs']:.1f} "
                f"| {row['peak_mib']:.0f} | {kept} "
                f"| {ms(row['median'])} ({ms(row['min'])} to {ms(row['max'])}) | {ratio} "
                f"| {100 * row['ceiling_share']:.0f} % |"
            )
    return "\n".join(lines[1:])


def network_table(rows: Sequence[Row]) -> str:
    """Returns Markdown of the whole networks."""
    head = "| network (reduced form) | size | mode | dtype | memory by | images/s | peak MiB |"
    lines = [head, "|" + "---|" * 7]
    lines += [
        f"| {row['network']} | {row['size']} | {row['mode']}, batch {row['batch']} "
        f"| {row['dtype']} | {row['heap']} | {row['images_per_s']:.2f} | {row['peak_mib']:.0f} |"
        for row in rows
    ]
    return "\n".join(lines)


def network_grid(rows: Sequence[Row]) -> str:
    """Returns Markdown of the whole networks, a column for each size of images."""
    parts = []
    for key, group in grouped(rows, ("heap", "dtype", "mode", "batch")):
        heap, dtype, mode, batch = key
        sizes = sorted({row["size"] for row in group}, key=edges)
        lines = [
            f"Images/s (peak memory) in {mode}, batch {batch}, {dtype}, memory by {heap}:",
            "",
            f"| network (reduced form) | {' | '.join(sizes)} |",
            "|---|" + "---:|" * len(sizes),
        ]
        for (network,), own in grouped(group, ("network",)):
            cells = {r["size"]: f"{r['images_per_s']:.2f} ({r['peak_mib']:.0f} MiB)" for r in own}
            lines.append(f"| {network} | {' | '.join(cells.get(size, '-') for size in sizes)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def exponents(rows: Sequence[Row]) -> str:
    """Returns a sentence: how time and memory of the attention grow with the positions N."""
    rows = representative_growth(rows)
    parts = []
    for kind in ("ISA", DENSE):
        found = [row for row in rows if row["kind"] == kind][-2:]
        if len(found) == 2:
            small, large = found
            steps = 2 * math.log(large["size"] / small["size"])
            time = math.log(large["median"] / small["median"]) / steps
            memory = math.log(large["peak_mib"] / small["peak_mib"]) / steps
            parts.append(
                f"those of {kind} with N^{time:.2f} and N^{memory:.2f} (edges {small['size']} to "
                f"{large['size']})"
            )
    if not parts:
        return ""
    return (
        "Time and memory of the attention alone grow with the number N of positions "
        f"({rows[0]['dtype']}, memory by {rows[0]['heap']}, ISA with windows of 8x8): "
        f"{', '.join(parts)}."
    )
