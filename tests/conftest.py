"""Fixtures that several files share."""

import gc
import os
from pathlib import Path

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan

from pushforward import _runner

MAPS = 25_000
"""Regions of memory above which compiled programs are dropped: each has some, and Linux allows a process 65,530."""


def pin() -> None:
    """Gives each worker of pytest-xdist a core of its own where cores are few.

    XLA makes as many threads as a process may use cores; on cores that are all busy they wait for each other.
    """
    worker, count = os.environ.get("PYTEST_XDIST_WORKER"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0"))
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if worker and 0 < len(cores) <= count:
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


pin()  # before the first array, which starts the threads


@pytest.fixture
def float64():
    """Runs a test in float64."""
    with jax.enable_x64(True):
        yield


def line(x, y=None):
    """A regression with two parameters, linear in the noise."""
    slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
    offset = numpyro.sample("offset", dist.Normal(0.0, 2.0))
    numpyro.sample("y", dist.Normal(slope * x + offset, 0.5), obs=y)


def walk(y=None, steps=None):
    """A state-space model: a parameter and the initial state before the scan, latent and observed sites in it."""
    rho = numpyro.sample("rho", dist.Uniform(0.0, 1.0))
    x0 = numpyro.sample("x0", dist.Normal(0.0, 2.0))

    def step(x, y):
        x = numpyro.sample("x", dist.Normal(rho * x, 0.5))
        numpyro.sample("y", dist.Normal(x, 0.3), obs=y)
        return x, x

    scan(step, x0, y, length=steps)


@pytest.fixture
def regression():
    """The model `line` with fresh copies of its arguments."""
    x = np.linspace(-1.0, 1.0, 6)
    return line, {"x": x, "y": 0.7 * x + 0.3 + np.array([0.2, -0.4, 0.1, 0.5, -0.3, 0.0])}


@pytest.fixture
def series():
    """The model `walk` with five data."""
    return walk, {"y": np.array([0.5, 1.0, 0.2, -0.4, 0.1])}


def pytest_collection_modifyitems(config, items):
    """Marks as slow what `thorough.txt` lists, as broad what `broad.txt` does: others like them are in the suite."""
    for mark, name in (("slow", "thorough.txt"), ("broad", "broad.txt")):
        listed = (config.rootpath / "tests" / name).read_text().splitlines()
        listed = tuple(line for line in listed if line and not line.startswith("#"))
        for item in items:
            if item.nodeid.removeprefix("tests/").startswith(listed):
                item.add_marker(getattr(pytest.mark, mark))


def pytest_runtest_teardown():
    """Drops compiled programs when there are so many that the next compilation may crash the process."""
    regions = Path("/proc/self/maps")
    if regions.exists() and regions.read_bytes().count(b"\n") > MAPS:
        _runner._compiled.clear()
        jax.clear_caches()
        gc.collect()
