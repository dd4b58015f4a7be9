"""Checkpoints resume to the identical result; methods written by `pf.save` are read back equal."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

import pushforward as pf
from pushforward import _files
from pushforward._errors import ArgumentError, CheckpointError
from pushforward._runner import Runner
from pushforward.methods import NAMES

# Methods that run in chunks, with settings that make them short.
LONG = {
    "nuts": pf.NUTS(chains=2, warmup=20, max_tree_depth=4),
    "pcn": pf.PreconditionedCrankNicolson(chains=2, warmup=20, thinning=2),
    "tempered_smc": pf.TemperedSMC(particles=40, islands=2),
}


def run(problem, method, **options):
    model, inputs = problem
    options = {"draws": 20, "progress": False, "method": method} | options
    with pytest.warns(UserWarning, match=r"effective sample size|R-hat|islands|Acceptance"):
        return pf.infer(model, **options, **inputs)


@pytest.mark.parametrize("name", LONG)
def test_an_interrupted_run_resumes_to_identical_draws(name, regression, tmp_path, monkeypatch):
    method, path = LONG[name], tmp_path / "folder" / "run.npz"
    whole = run(regression, method)
    written, write = [], _files.write_checkpoint

    def interrupted(*args):
        write(*args)
        written.append(args)
        if len(written) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(_files, "write_checkpoint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pf.infer(regression[0], method=method, draws=20, progress=False, checkpoint=path, **regression[1])
    assert list(path.parent.iterdir()) == [path]
    resumed = run(regression, method, checkpoint=str(path))
    assert len(written) > 3
    for group in ("posterior", "sample_stats"):
        assert resumed[group].dataset.equals(whole[group].dataset)
    finished = len(written)
    again = run(regression, method, checkpoint=path)
    assert len(written) == finished, "a finished run is read, not run"
    assert again["posterior"].dataset.equals(whole["posterior"].dataset)


def test_a_checkpoint_of_another_run_is_refused(regression, tmp_path):
    model, inputs = regression
    path = tmp_path / "run.npz"
    method = LONG["pcn"]
    run(regression, method, checkpoint=path)
    others = [
        {"key": 1},
        {"draws": 21},
        {"method": pf.PreconditionedCrankNicolson(chains=2, warmup=21, thinning=2)},
        {"y": inputs["y"] + 1},
    ]
    for other in others:
        options = {"method": method, "draws": 20, "progress": False, "checkpoint": path} | inputs | other
        with pytest.raises(CheckpointError, match=r"belongs to another run.*Delete it to start anew"):
            pf.infer(model, **options)


def test_a_damaged_checkpoint_is_refused(regression, tmp_path):
    model, inputs = regression
    path = tmp_path / "run.npz"
    run(regression, LONG["pcn"], checkpoint=path)
    whole = path.read_bytes()
    for damaged in (b"not a file", whole[: len(whole) // 2], b""):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="is not a file of pushforward, or is damaged"):
            pf.infer(model, method=LONG["pcn"], draws=20, progress=False, checkpoint=path, **inputs)


def test_a_method_in_one_piece_says_that_it_used_no_checkpoint(regression, tmp_path):
    model, inputs = regression
    with pytest.warns(UserWarning, match="runs in one piece, so checkpoint= was not used"):
        pf.infer(model, method="laplace", draws=5, progress=False, checkpoint=tmp_path / "c.npz", **inputs)


def test_chunks_do_not_change_the_result(regression, capfd):
    quiet = run(regression, LONG["nuts"])
    assert capfd.readouterr().err == ""
    shown = run(regression, LONG["nuts"], progress=True)
    assert "NUTS" in capfd.readouterr().err
    assert shown["posterior"].dataset.equals(quiet["posterior"].dataset)


def test_a_loop_counts_every_step_once():
    steps = []

    def advance(state, start, stop):
        jax.debug.callback(lambda a, b: steps.append((int(a), int(b))), start, stop)
        return state + (stop - start)

    for progress, chunks in ((False, 1), (True, 4)):
        steps.clear()
        assert Runner(progress=progress).loop(advance, jax.numpy.zeros((), int), 7) == 7
        jax.effects_barrier()
        assert sum(b - a for a, b in steps) == 7
        assert len(steps) >= chunks


def test_fingerprints_are_the_same_in_every_process():
    """A checkpoint is found again after a restart: no address and no order of a set is in the name of a run."""
    code = (
        "import numpyro, numpyro.distributions as dist\n"
        "from pushforward.model._fingerprint import fingerprint, stable_text\n"
        "NAMES = {'a', 'b', 'c', 'd'}\n"
        "def model(y, kind='a'):\n"
        "    m = numpyro.sample('m', dist.Normal(0, 1))\n"
        "    if kind in {'a', 'b', 'c', 'e'} or kind in NAMES:\n"
        "        numpyro.sample('y', dist.Normal(m, 1), obs=y)\n"
        "print(stable_text(fingerprint(model)))\n"
    )
    texts = {
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True,
            check=True, timeout=120,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(texts) == 1


# ----------------------------------------------------------------------------------------------------- pf.save, pf.load

CHANGED = {
    "nuts": pf.NUTS(chains=2, coordinates="z"),
    "pcn": pf.PreconditionedCrankNicolson(thinning=3),
    "tempered_smc": pf.TemperedSMC(particles=400),
    "laplace": pf.Laplace(curvature="gauss_newton", tolerance=1e-3),
    "gaussian_vi": pf.GaussianVI(covariance=pf.LowRank(3)),
    "pathfinder": pf.Pathfinder(),
    "flow_vi": pf.FlowVI(pf.Flow("autoregressive", layers=2), correct="psis"),
    "amortized_flow": pf.AmortizedFlow("energy", embedding=pf.Sets(varying=True), sites=("a",)),
    "neural_likelihood": pf.NeuralLikelihood(pf.Flow("coupling", layers=2), sampler=pf.TemperedSMC(particles=50)),
    "eki": pf.EKI(20, update="perturbed", schedule=(2.0, 2.0), inflation=pf.RTPS(0.2)),
    "eks": pf.EKS(50, step=0.1),
    "aldi": pf.ALDI(50, time=4.0),
    "uki": pf.UKI(5, step=0.3),
    "kalman": pf.Kalman(pf.Unscented(alpha=0.5), inflation=1.1),
    "enkf": pf.EnKF(20, pf.LETKF(3.0), inflation=pf.RTPS(0.4), rotate=True, smoother=pf.EnKS(lag=None)),
    "particle_filter": pf.ParticleFilter(
        50, proposal=pf.Auxiliary(pf.Optimal()), resampling="stratified", regularization=pf.Jitter(0.5)
    ),
    "pmmh": pf.PMMH(chains=2, correlation=0.9),
    "particle_gibbs": pf.ParticleGibbs(chains=2),
    "smc2": pf.SMC2(particles=40),
    "discrete_hmm": pf.DiscreteHMM(store="last"),
    "three_dvar": pf.ThreeDVar(gain=pf.NetworkGain(width=2, sees="both"), training=pf.GainTraining("online")),
    "transport_filter": pf.TransportFilter(50, pf.TriangularMap(4, 6)),
    "four_dvar": pf.FourDVar("strong", pf.Window(4, shift=1, covariance=np.eye(2)), sampler="laplace"),
    "score_trajectory": pf.ScoreTrajectory(
        pf.WindowMLP(width=16, depth=1),
        window=5,
        guidance="gamma",
        sampler=pf.Heun(steps=20, corrections=1),
        correction=pf.TransitionHMC(moves=10),
        training=pf.ScoreTraining(steps=10, levels=(-2.0, 1.5)),
    ),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("changed", [False, True])
def test_a_method_is_read_as_it_was_written(name, changed, tmp_path):
    method = CHANGED[name] if changed else NAMES[name]()
    pf.save(tmp_path / "folder" / "method.pf", method)
    back = pf.load(str(tmp_path / "folder" / "method.pf"))
    assert back == method
    assert repr(back) == repr(method)
    assert hash(jax.tree.structure(back)) == hash(jax.tree.structure(method))


def test_a_loaded_method_gives_the_same_draws(regression, tmp_path):
    model, inputs = regression
    method = pf.Laplace(tolerance=1e-4)
    pf.save(tmp_path / "method.pf", method)
    trees = [pf.infer(model, method=m, draws=5, **inputs) for m in (method, pf.load(tmp_path / "method.pf"))]
    assert trees[0]["posterior"].dataset.equals(trees[1]["posterior"].dataset)
    assert pf.attributes(trees[1])["compile_seconds"] == 0


def test_save_refuses_what_is_no_method(regression, tmp_path):
    model, inputs = regression
    tree = pf.infer(model, method="laplace", draws=5, **inputs)
    for value in (tree, pf.NUTS, {"chains": 4}, jax.numpy.zeros(3)):
        with pytest.raises(
            ArgumentError, match=r"pf.save writes methods and streams of pushforward; got .*tree.to_netcdf"
        ):
            pf.save(tmp_path / "method.pf", value)
    assert not (tmp_path / "method.pf").exists()


def test_load_refuses_other_files(regression, tmp_path):
    path = tmp_path / "file"
    with pytest.raises(CheckpointError, match="is not a file of pushforward, or is damaged"):
        pf.load(path)
    np.savez(path.with_suffix(".npz"), a=np.zeros(3))
    with pytest.raises(CheckpointError, match="is not a file of pushforward, or is damaged"):
        pf.load(path.with_suffix(".npz"))
    run(regression, LONG["pcn"], checkpoint=path)
    with pytest.raises(CheckpointError, match=r"holds a checkpoint, not a method. Pass it to infer\(checkpoint="):
        pf.load(path)


def test_files_of_other_formats_and_classes_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "method.pf"
    monkeypatch.setattr(_files, "FORMAT", 99)
    pf.save(path, pf.NUTS())
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="has format 99; this version reads format 1"):
        pf.load(path)
    for module, name in (("os", "system"), ("pushforward.methods.nuts", "Nothing"), ("pushforward.gone", "NUTS")):
        _files._write(path, {"kind": "method", "value": {"class": [module, name], "fields": {}}}, [])
        with pytest.raises(CheckpointError, match=rf"names {module}.{name}, which this version"):
            pf.load(path)
