"""What `benchmark_efficiency.py` writes: one record of all its runs, tables, pictures."""

import csv
import json
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

Row = dict[str, Any]
Groups = Iterator[tuple[tuple[Any, ...], list[Row]]]

# What tells the rows of one kind apart.
KEYS = {
    "heads": ("heap", "dtype", "form", "mode", "size", "head"),
    "growth": ("heap", "dtype", "kind", "size", "window"),
    "networks": ("heap", "dtype", "mode", "size", "network"),
}
PLAIN, PEER, DENSE = "ISA, plain formulation", "ISA, mmsegmentation", "dense attention"
FORMS = {PLAIN: "direct", PEER: "reduced", DENSE: "direct"}
"""The form in which a yardstick tells most of ISA itself, not of the conv before it."""


def keep(path: Path, new: dict[str, Any]) -> dict[str, Any]:
    """Returns new rows with those of an earlier record that they do not replace.

    Args:
        path: The earlier record, if there is one.
        new: `machine`, `torch`, and rows for each of `KEYS`.

    Raises:
        SystemExit: The record is of another machine or release of PyTorch.
    """
    if not path.is_file():
        return new
    old = json.loads(path.read_text("utf-8"))
    for fact in ("machine", "torch"):
        if old[fact] != new[fact]:
            sys.exit(
                f"{path} was measured with another {fact}, {old[fact]}, not {new[fact]}; give "
                "another --output, or delete it"
            )
    merged = {**new}
    for name, keys in KEYS.items():
        rows = {tuple(row[key] for key in keys): row for row in [*old[name], *new[name]]}
        merged[name] = sorted(
            rows.values(), key=lambda row: [_edges(row[key]) for key in keys[:-1]]
        )
    return merged


def _edges(value: Any) -> Any:
    """Returns what sorts sizes such as 97x97 as numbers."""
    text = str(value)
    return ("", *map(int, text.split("x"))) if text.replace("x", "").isdigit() else (text,)


def grouped(
    rows: Sequence[Row], keys: Sequence[str]
) -> Iterator[tuple[tuple[Any, ...], list[Row]]]:
    """Yields the rows that agree in `keys`, together."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    yield from groups.items()


def ratio_table(rows: Sequence[Row], forms: Mapping[str, str] | None = None) -> str:
    """Returns Markdown: how many times as fast as its yardsticks ISA is, by size.

    Args:
        rows: Of heads.
        forms: The one form that is shown for each yardstick; None: all.
    """
    sizes = sorted({row["size"] for row in rows}, key=_edges)
    lines = [
        f"| ISA against | form | memory by | dtype | mode | {' | '.join(sizes)} "
        "| geometric mean | of what it keeps |",
        "|" + "---|" * (7 + len(sizes)),
    ]
    for other in (PLAIN, PEER, DENSE):
        shown_rows = [row for row in rows if forms is None or row["form"] == forms[other]]
        for key, group in grouped(shown_rows, ("form", "heap", "dtype", "mode")):
            cells = {(row["head"], row["size"]): row for row in group}
            pairs = {
                size: (cells["ISA", size], cells[other, size])
                for size in sizes
                if ("ISA", size) in cells and (other, size) in cells
            }
            if not pairs:
                continue
            ratios = {size: b["median"] / a["median"] for size, (a, b) in pairs.items()}
            kept = [a["saved_mib"] / b["saved_mib"] for a, b in pairs.values() if a["saved_mib"]]
            shown = [f"{ratios[size]:.2f}x" if size in ratios else "" for size in sizes]
            lines.append(
                f"| {other} | {' | '.join(key)} | {' | '.join(shown)} "
                f"| {statistics.geometric_mean(ratios.values()):.2f}x "
                f"| {f'{max(kept):.2f}' if kept else ''} |"
            )
    return "\n".join(lines)


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
        for row in group:
            kept = "" if row["saved_mib"] is None else f"{row['saved_mib']:.0f}"
            ratio = "" if reference is None else f"{reference / row['median']:.2f}x"
            lines.append(
                f"| {row['head']} | {row['parameters'] / 1e6:.2f} | {row['gmacs']:.1f} "
                f"| {row['peak_mib']:.0f} | {kept} "
                f"| {row['median']:.0f} ({row['min']:.0f} to {row['max']:.0f}) | {ratio} "
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


def exponents(rows: Sequence[Row]) -> str:
    """Returns a sentence: how time and memory of the attention grow with the positions N."""
    parts = []
    for kind in ("ISA", DENSE):
        found = [row for row in rows if row["kind"] == kind][-2:]
        if len(found) == 2:
            small, large = found
            steps = 2 * math.log(large["size"] / small["size"])
            time = math.log(large["median"] / small["median"]) / steps
            memory = math.log(large["peak_mib"] / small["peak_mib"]) / steps
            parts.append(
                f"{kind} with N^{time:.2f} in time and N^{memory:.2f} in memory (from "
                f"{small['size']} to {large['size']})"
            )
    return f"With the number of positions N grow: {'; '.join(parts)}." if parts else ""


def draw_growth(rows: Sequence[Row], path: Path) -> None:
    """Draws how time and memory grow with the map, and which window is the cheapest."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    time_axis, memory_axis, window_axis = figure.subplots(1, 3)
    ticks = sorted({row["size"] for row in rows if row["kind"] != "window"})
    for name in ("ISA", DENSE):
        kind = [row for row in rows if row["kind"] == name]
        edges = [row["size"] for row in kind]
        time_axis.plot(edges, [row["median"] for row in kind], "o-", label=name)
        memory_axis.plot(edges, [row["peak_mib"] for row in kind], "o-", label=name)
    for axis, label in ((time_axis, "ms"), (memory_axis, "peak MiB")):
        axis.set(xscale="log", yscale="log", xlabel="edge of the map, positions", ylabel=label)
        axis.set_xticks(ticks, [str(edge) for edge in ticks])
        axis.minorticks_off()
        axis.legend()
    windows = [row for row in rows if row["kind"] == "window"]
    edges = [row["window"] for row in windows]
    window_axis.plot(edges, [row["median"] for row in windows], "o-", color="C2")
    window_axis.set(
        xscale="log",
        yscale="log",
        xlabel=f"window at {windows[0]['size']}x{windows[0]['size']}",
        ylabel="ms",
    )
    window_axis.set_xticks(edges, [str(edge) for edge in edges])
    window_axis.minorticks_off()
    figure.suptitle(f"Inference of the attention on 512 channels, {rows[0]['dtype']}")
    figure.savefig(path, dpi=110)


def representative(rows: Sequence[Row]) -> list[Row]:
    """Returns the heads in the direct form, with retained memory if it was so measured."""
    rows = [row for row in rows if row["heap"] != "default"] or list(rows)
    return [row for row in rows if row["form"] == "direct"]


def draw_heads(rows: Sequence[Row], path: Path) -> None:
    """Draws time and memory of each head on the largest map, in inference, as bars."""
    rows = [row for row in representative(rows) if row["mode"] == "inference"]
    rows = [row for row in rows if row["dtype"] == rows[-1]["dtype"]]
    largest = max((row["size"] for row in rows), key=_edges)
    rows = sorted((row for row in rows if row["size"] == largest), key=lambda row: -row["median"])
    figure = Figure(figsize=(11, 0.8 + 0.28 * len(rows)), layout="constrained")
    time_axis, memory_axis = figure.subplots(1, 2, sharey=True)
    colours = ["C3" if row["head"] == "ISA" else "C0" for row in rows]
    for axis, key, label in (
        (time_axis, "median", "ms"),
        (memory_axis, "peak_mib", "peak MiB beside the input"),
    ):
        bars = axis.barh([row["head"] for row in rows], [row[key] for row in rows], color=colours)
        axis.bar_label(bars, fmt="%.0f", padding=3)
        axis.margins(x=0.12)
        axis.set_xlabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Inference, [1, 2048, {largest.replace('x', ', ')}], {rows[0]['dtype']}")
    figure.savefig(path, dpi=110)


def _parts(record: dict[str, Any], forms: Mapping[str, str] | None = None) -> list[str]:
    parts = [f"Measured on {record['machine']}, torch {record['torch']}."]
    if any(row["head"] != "ISA" for row in record["heads"]):
        parts.append(ratio_table(record["heads"], forms))
    return parts


def short_markdown(record: dict[str, Any]) -> str:
    """Returns Markdown for the README: ratios, the direct form on the largest maps, networks."""
    parts = _parts(record, FORMS)
    for _, group in grouped(representative(record["heads"]), ("mode",)):
        largest = max((row["size"] for row in group), key=_edges)
        parts.append(head_tables([row for row in group if row["size"] == largest]))
    if record["growth"]:
        parts.append(exponents(record["growth"]))
    if record["networks"]:
        parts.append(network_table(record["networks"]))
    return "\n\n".join(parts)


def write(output: Path, record: dict[str, Any]) -> None:
    """Writes the record, its tables as CSV and Markdown, and the picture."""
    output.mkdir(parents=True, exist_ok=True)
    for name in KEYS:
        if rows := record[name]:
            with (output / f"{name}.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0].keys())
                writer.writeheader()
                writer.writerows(rows)
    parts = [*_parts(record), head_tables(record["heads"])]
    if representative(record["heads"]):
        draw_heads(record["heads"], output / "heads.png")
    if record["growth"]:
        draw_growth(record["growth"], output / "growth.png")
        parts.append(exponents(record["growth"]))
    if record["networks"]:
        parts.append(network_table(record["networks"]))
    (output / "efficiency.md").write_text("\n\n".join(parts) + "\n", "utf-8")
    (output / "efficiency.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
