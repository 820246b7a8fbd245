"""The two reports, as they are at any time: what was found, what is under way, what is still to come."""

import json
from pathlib import Path
from typing import Any

from fps_kernels.storage.atomic import replaced_at_once

Report = dict[str, Any]
NOT_RUN, RUNNING, PASSED = "not run", "running", "passed"
JSON, MARKDOWN = "gpu_check.json", "gpu_check.md"


def write(report: Report, folder: Path) -> None:
    """Both files, each replaced at once."""
    for name, text in ((JSON, json.dumps(report, indent=1, ensure_ascii=False) + "\n"), (MARKDOWN, markdown(report))):
        with replaced_at_once(folder / name) as path:
            path.write_text(text)


def markdown(report: Report) -> str:
    """The report for people: what failed and what did not run first."""
    checks = report["checks"]
    lines = [f"# GPU check: {report['hardware'].get('gpu', 'no GPU')}", "", f"`{report['command']}`", ""]
    lines += [f"* {key}: {value}" for key, value in report["hardware"].items()]
    lines += ["", "| check | | seconds |", "|---|---|---|"]
    lines += [f"| {name} | {_status(check)} | {check['seconds']:.1f} |" for name, check in checks.items()]
    for name, check in checks.items():
        if check["status"] == NOT_RUN:
            continue
        lines += ["", f"## {name}", "", f"{_status(check)}, {check['seconds']:.1f} s", ""]
        if check["error"]:
            lines += ["```", check["error"].rstrip(), "```", ""]
        rows = check["rows"]
        if rows:
            head = list(dict.fromkeys(key for row in rows for key in row))
            lines += [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
            lines += [f"| {' | '.join(_cell(row.get(key, '')) for key in head)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _status(check: dict[str, Any]) -> str:
    why = f": {check['why']}" if check["why"] else ""
    status = check["status"]
    return (status if status in (PASSED, RUNNING, NOT_RUN) else f"**{status}**") + _cell(why)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|").replace("\n", " ")
