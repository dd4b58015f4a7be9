"""Where figures go: tables in docs/benchmarks.md, between markers, with date, machine and commit."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"


def stamp() -> str:
    """Date, commit and machine of a run, one line."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run(["git", "status", "--porcelain", "src"], capture_output=True, text=True, check=False)
    state = commit.stdout.strip() + (" with changes" if changed.stdout.strip() else "")
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    return f"{date}, commit {state}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"


def table(rows: list[dict[str, str]]) -> str:
    """A Markdown table; columns are the keys of the first row."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(row.get(c, "")) for c in columns) + " |" for row in rows]
    return "\n".join(lines)


def write(marker: str, text: str) -> None:
    """Replace what stands between `<!-- marker -->` and `<!-- /marker -->` in the page."""
    page = PAGE.read_text()
    start, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    if start not in page or end not in page:
        raise SystemExit(f"{PAGE} lacks the markers {start} and {end}")
    before, rest = page.split(start, 1)
    after = rest.split(end, 1)[1]
    PAGE.write_text(f"{before}{start}\n\n{stamp()}\n\n{text}\n\n{end}{after}")
