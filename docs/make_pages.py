"""Makes the pages of the site that are not written by hand: notebooks and changelog.

Notebooks are shown with the outputs that they are stored with; nothing is executed here.
"""

import shutil
from pathlib import Path

from nbconvert import MarkdownExporter

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent


def main() -> None:
    """Write docs/notebooks/ and docs/changelog.md."""
    folder = DOCS / "notebooks"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        body, resources = MarkdownExporter().from_filename(str(notebook))
        outputs = resources.get("outputs", {})
        for name, content in outputs.items():
            page_name = f"{notebook.stem}_{name}"
            body = body.replace(f"]({name})", f"]({page_name})")
            (folder / page_name).write_bytes(content)
        (folder / f"{notebook.stem}.md").write_text(body)
    shutil.copyfile(ROOT / "CHANGELOG.md", DOCS / "changelog.md")


if __name__ == "__main__":
    main()
