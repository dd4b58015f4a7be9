"""`SMC2`: evidence and posterior against exact answers over repeated keys, and what is refused."""

import numpy as np
import pytest

import pushforward as pf
from parameters import TIMES, infer, model_impossible
from pushforward import _errors
from pushforward.methods.smc2 import SMC2
from pushforward.problems import local_linear


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"particles": 5}, r"particles=...\) takes an integer of at least 10; got 5"),
        ({"moves": 0}, r"moves=...\) takes an integer of at least 1; got 0"),
        ({"threshold": 1.5}, r"threshold=...\) takes a number between 0 and 1; got 1.5"),
    ],
)
def test_options_are_checked(options, match):
    with pytest.raises(_errors.MethodError, match=match):
        SMC2(**options)


@pytest.mark.parametrize(
    ("states", "match"),
    [
        (None, r"SMC2 needs states=pf.ParticleFilter\(...\)"),
        (pf.Kalman(), "weighs parameters step by step with filters"),
        (pf.ParticleFilter(10, regularization=pf.Jitter()), "filter without regularization"),
    ],
)
def test_what_does_not_fit_is_refused(states, match):
    with pytest.raises(_errors.MethodError, match=match):
        pf.infer(local_linear.model, method=SMC2(), states=states, y=np.array([0.1, 0.4]), progress=False)


# ------------------------------------------------------------------------------------------------------------ full run


@pytest.mark.slow
def test_evidence_and_joint_law():
    """Means over 24 keys within 4 standard errors from their spread: a false alarm in 6e-4 for each of 10 means."""
    runs = [infer(SMC2(particles=400), pf.ParticleFilter(100), 400, key=k) for k in range(24)]
    ratio = np.exp([pf.attributes(t)["log_evidence"] - local_linear.LOG_EVIDENCE for t in runs])
    rows = {"evidence": ratio - 1}
    u = np.array([t["posterior"]["u"].to_numpy()[0] for t in runs], float)
    rows |= {"u": u.mean(1) - local_linear.MEAN_U}
    rows |= {"variance": ((u - local_linear.MEAN_U) ** 2).mean(1) - local_linear.SD_U**2}
    grid = np.linspace(u.min(), u.max(), 60)
    laws = [local_linear.joint(v, np.array(local_linear.DATA)).smoothing() for v in grid]
    for t in TIMES[1:]:
        x = np.array([r["posterior"]["x"].to_numpy()[0, :, t - 1] for r in runs], float)
        mean = np.interp(u, grid, [law.mean[t, 0] for law in laws])
        sd = np.interp(u, grid, [law.covariance[t, 0, 0] ** 0.5 for law in laws])
        rows |= {f"x{t}": ((x - mean) / sd).mean(1), f"square of x{t}": (((x - mean) / sd) ** 2).mean(1) - 1}
    found = {n: v.mean() / (v.std(ddof=1) / len(v) ** 0.5) for n, v in rows.items()}
    assert max(map(abs, found.values())) < 4, found
    assert ratio.std() < 0.5, ratio.std()
    assert u.mean(1).std() < 0.03


@pytest.mark.slow
def test_chunks_do_not_change_the_draws(tmp_path):
    method, states = SMC2(particles=30, moves=2), pf.ParticleFilter(20)
    whole = infer(method, states, 30)
    chunked = infer(method, states, 30, checkpoint=tmp_path / "run")
    np.testing.assert_array_equal(whole["posterior"]["x"], chunked["posterior"]["x"])
    assert pf.attributes(whole)["log_evidence"] == pf.attributes(chunked)["log_evidence"]


@pytest.mark.slow
def test_fewer_draws_are_evenly_spaced():
    tree = infer(SMC2(particles=30, moves=2), pf.ParticleFilter(20), 30)
    few = infer(SMC2(particles=30, moves=2), pf.ParticleFilter(20), 10)
    np.testing.assert_array_equal(few["posterior"]["u"][0], tree["posterior"]["u"][0, ::3])


@pytest.mark.slow
def test_impossible_data_are_said():
    with pytest.raises(_errors.InferenceError, match="No starting point with a finite log density"):
        pf.infer(
            model_impossible,
            method=SMC2(particles=20),
            states=pf.ParticleFilter(5),
            y=np.array([0.0, 0.1]),
            draws=10,
            progress=False,
        )


@pytest.mark.slow
def test_float64(float64):
    tree = infer(SMC2(particles=30, moves=2), pf.ParticleFilter(20), 20)
    assert tree["posterior"]["u"].dtype == np.float64
