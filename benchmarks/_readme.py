"""The recorded tables, written into the README between two markers: text and record cannot disagree."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from _common import text_table

_VERDICTS = {True: "pass", False: "**miss**", None: "not measured"}
_CHECK_COLUMNS = {"what": "what", "value": "measured|.4g", "bound": "bound", "verdict": "verdict", "note": "note"}


def update_readme(readme: Path, record: Path) -> None:
    """Replace what is between ``<!-- NAME -->`` and ``<!-- /NAME -->`` by the tables of ``results/NAME.json``."""
    start, stop = f"<!-- {record.stem} -->", f"<!-- /{record.stem} -->"
    before, _, rest = readme.read_text().partition(start)
    _, _, after = rest.partition(stop)
    sections = json.loads(record.read_text())
    readme.write_text("\n\n".join([before + start, *map(_render, sections.values()), stop + after]))


def _render(section: Mapping[str, Any]) -> str:
    checks = []
    for check in section["checks"]:
        bound = "?" if check["bound"] is None else f"{check['bound']:.4g}"
        checks.append({**check, "bound": f"{check['relation']} {bound}", "verdict": _VERDICTS[check["passed"]]})
    machine = section["environment"]
    ran = (
        f"{machine['threads']} of {machine['cpu_count']} CPUs, load average {machine['load_average_at_start']} before "
        f"and {machine['load_average_at_end']} after."
    )
    parts = [f"### {section['title']}", _table(section["rows"], section["columns"]), _table(checks, _CHECK_COLUMNS)]
    return "\n\n".join([*parts, *section["notes"], ran])


def _table(rows: list[dict[str, Any]], columns: Mapping[str, str]) -> str:
    headings, lines = text_table(rows, columns)
    rules = ["---:" if is_number else "---" for is_number in headings.values()]
    return "\n".join("| " + " | ".join(line) + " |" for line in [list(headings), rules, *lines])
