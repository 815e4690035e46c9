"""What `benchmark_efficiency.py` writes: one record of all its runs, tables, pictures."""

import csv
import json
import sys
from pathlib import Path
from typing import Any

from benchmarking.figures import draw_growth, draw_heads
from benchmarking.tables import (
    edges,
    exponents,
    find_ratios,
    grouped,
    head_tables,
    headline_table,
    network_grid,
    network_table,
    ratio_summary,
    ratio_table,
    representative,
)

# What tells the rows of one kind apart.
KEYS = {
    "heads": ("heap", "dtype", "form", "mode", "size", "head"),
    "growth": ("heap", "dtype", "kind", "size", "window"),
    "networks": ("heap", "dtype", "mode", "size", "network"),
}


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
        merged[name] = sorted(rows.values(), key=lambda row: [edges(row[key]) for key in keys[:-1]])
    return merged


def _measured_on(record: dict[str, Any]) -> str:
    return f"Measured on {record['machine']}, torch {record['torch']}."


def headline(record: dict[str, Any]) -> str:
    """Returns Markdown for the README: how much faster ISA is, in a few lines."""
    return f"{headline_table(record['heads'])}\n\n{_measured_on(record)}"


def short_markdown(record: dict[str, Any]) -> str:
    """Returns Markdown: ratios, the direct form on the largest maps, networks."""
    parts = [_measured_on(record)]
    if find_ratios(record["heads"]):
        several = len({row["heap"] for row in record["heads"]}) > 1
        how = ", with PyTorch's own allocator and with jemalloc" if several else ""
        parts += [
            f"How many times as fast as each other head ISA is{how}: geometric mean over the sizes "
            "measured (least to most). Kept: what ISA holds for the backward pass, as a share of "
            "what the other head holds, at the size where that is most.",
            ratio_summary(record["heads"]),
        ]
    for _, group in grouped(representative(record["heads"]), ("mode",)):
        largest = max((row["size"] for row in group), key=edges)
        shown = largest, group[0]["dtype"]
        parts.append(head_tables([r for r in group if (r["size"], r["dtype"]) == shown]))
    if record["growth"]:
        parts.append(exponents(record["growth"]))
    if record["networks"]:
        parts.append(network_grid(record["networks"]))
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
    parts = [_measured_on(record)]
    if find_ratios(record["heads"]):
        parts.append(ratio_table(record["heads"]))
    parts.append(head_tables(record["heads"]))
    if representative(record["heads"]):
        draw_heads(record["heads"], output / "heads.png")
    if record["growth"]:
        draw_growth(record["growth"], output / "growth.png")
        parts.append(exponents(record["growth"]))
    if record["networks"]:
        parts.append(network_table(record["networks"]))
    (output / "efficiency.md").write_text("\n\n".join(parts) + "\n", "utf-8")
    (output / "efficiency.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
