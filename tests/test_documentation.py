"""The Python of README, documentation and docstrings runs, at reduced cost; links and names in the pages exist."""

import doctest
import importlib
import json
import pkgutil
import re
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

import pushforward as pf

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [page for page in PAGES if page.name != "changelog.md"]
FENCE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
WITH_CODE = [page for page in PAGES if FENCE.search(page.read_text())]
# Pages whose code takes long even when reduced (several compilations).
SLOW = {
    "state_space.md", "particles.md", "coming_from_numpyro.md", "results.md", "parallel_and_checkpoints.md",
    "transport.md", "learned_priors.md", "calibration.md", "ensemble_inversion.md", "darcy.md",
    "surrogates.md", "score_trajectories.md", "variational.md", "learning.md",
}  # fmt: skip
MODULES = [m.name for m in pkgutil.walk_packages(pf.__path__, "pushforward.")]


def reduced(code: str) -> str:
    """The same program with short chains and few samples."""
    code = re.sub(r"\bdraws=[\d_]+", "draws=100", code)
    code = re.sub(r"\bsimulations=[\d_]+", "simulations=300", code)
    code = re.sub(r"\b(num_warmup|num_samples)=\d+", r"\1=100", code)
    code = re.sub(r"\bScoreTraining\(steps=[\d_]+", "ScoreTraining(steps=100", code)
    code = re.sub(r"\bNUTS\(\)", "NUTS(warmup=100)", code)
    return re.sub(r"\bNUTS\((?=chains|target)", "NUTS(warmup=100, ", code).replace(
        "warmup=100, chains=4, warmup=1000", "warmup=100"
    )


def parameters():
    return [pytest.param(p, marks=pytest.mark.slow if p.name in SLOW else (), id=p.name) for p in WITH_CODE]


@pytest.mark.parametrize("page", parameters())
def test_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plt.switch_backend("Agg")
    namespace = {"__name__": page.stem}
    for i, block in enumerate(FENCE.findall(page.read_text())):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # short chains warn of themselves
            exec(compile(reduced(block), f"{page.name}, block {i}", "exec"), namespace)
    plt.close("all")


def test_readme_program_is_short():
    blocks = FENCE.findall((ROOT / "README.md").read_text())
    assert len(blocks) == 3
    assert all(len([line for line in block.splitlines() if line.strip()]) <= 16 for block in blocks)


@pytest.mark.parametrize("module", MODULES)
def test_examples_of_docstrings(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        failures, _ = doctest.testmod(importlib.import_module(module), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failures == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = [t.partition("#")[0] for t in re.findall(r"\]\(([^)]+)\)", page.read_text()) if "://" not in t]
    made = {"changelog.md"}
    assert [t for t in targets if t and t not in made and not (page.parent / t).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_of_the_library_exist(page):
    assert [n for n in re.findall(r"\bpf\.([A-Za-z_]+)\b", page.read_text()) if not hasattr(pf, n)] == []


def test_every_public_name_has_a_reference_page():
    pages = "".join(p.read_text() for p in (ROOT / "docs/api").glob("*.md"))
    assert [n for n in pf.__all__ if f"::: pushforward.{n}\n" not in pages + "\n"] == []


def test_every_public_function_and_method_has_an_example():
    assert [n for n in pf.__all__ if n in {"infer", "compare", "prior"} and ">>>" not in getattr(pf, n).__doc__] == []


@pytest.mark.parametrize("notebook", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.name)
def test_notebooks_are_stored_with_outputs_and_without_errors(notebook):
    cells = [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in cells)
    assert [o for cell in cells for o in cell["outputs"] if o["output_type"] == "error"] == []
    assert notebook.stat().st_size < 1_000_000


def test_the_repository_names_no_registry_and_no_path_of_a_machine():
    files = [ROOT / name for name in ("Makefile", "pyproject.toml", "constraints.txt", ".ci/run", ".ci/find-python")]
    words = (
        "pypi" + ".org",
        "files.python" + "hosted",
        "/ro" + "ot/",
        "--index" + "-url",
        "--ha" + "sh",
        "/wo" + "rk/",
    )
    assert [(f.name, w) for f in [*files, *PAGES] for w in words if w in f.read_text()] == []
