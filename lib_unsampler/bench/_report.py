"""What every bench returns, and how it is printed: the machine on top, one table, or one JSON object."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm


@dataclass(frozen=True)
class Report:
    """One bench's result.

    Attributes:
        title: What was measured, in one line.
        columns: The table's header.
        rows: The table's cells, a list for each row.
        records: The same figures as plain data, for JSON.
        notes: Lines under the table.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    records: list[dict[str, Any]]
    notes: list[str]


Case = TypeVar("Case")


def progress(cases: Iterable[Case], total: int) -> Iterator[Case]:
    """The cases of a bench, one after the other, with a bar on standard error."""
    return iter(tqdm(cases, "measuring", total, unit="case"))


def machine() -> dict[str, str]:
    """Processor, GPU and the versions that decide speed."""
    found = {"processor": f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"}
    if torch.cuda.is_available():
        found["gpu"] = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    found["python"] = f"{platform.python_version()} on {platform.system()}"
    for package in ("torch", "triton", "numpy", "Pillow", "av"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def peak_memory() -> int:
    """The most bytes this process has had resident so far (Linux; elsewhere 0).

    getrusage would answer with the parent's peak, which a process inherits.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def as_text(report: Report) -> str:
    """The report as Markdown: machine, table, notes."""
    where = [f"- {key}: {value}" for key, value in machine().items()]
    widths = [max(map(len, column)) for column in zip(report.columns, *report.rows)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |"
        for row in (report.columns, ["-" * width for width in widths], *report.rows)
    ]
    return "\n".join([report.title, "", *where, "", *lines, "", *report.notes])


def as_json(report: Report) -> str:
    """The report as one JSON object."""
    return json.dumps({"title": report.title, "machine": machine(), "records": report.records, "notes": report.notes})
