"""`mesh=` gives the draws of one device: eight forced host devices against one, in float32.

Sums over a split axis are taken in another order, so results agree up to rounding. Runs of chains are short, because
leapfrog trajectories amplify rounding from step to step.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from pushforward import parallel
from pushforward._errors import ArgumentError
from pushforward.methods import NAMES

# Axes of five and three chains are no multiple of eight: they are padded.
SHORT = {
    "nuts": "pf.NUTS(chains=5, warmup=8, max_tree_depth=3)",
    "pcn": "pf.PreconditionedCrankNicolson(chains=3, warmup=20, thinning=2)",
    "tempered_smc": "pf.TemperedSMC(particles=100, islands=4)",
    "laplace": "pf.Laplace()",
    "gaussian_vi": "pf.GaussianVI(samples=64)",
    "pathfinder": "pf.Pathfinder()",
    "flow_vi": "pf.FlowVI(pf.Flow('coupling', layers=2, width=8), samples=64, steps=50, learning_rate=1e-5)",
    "amortized_flow": "pf.AmortizedFlow(pf.PointEstimate(8, 1), simulations=200, training=pf.Training(epochs=2))",
    "eki": "pf.EKI(20)",
    "eks": "pf.EKS(20, time=0.5)",
    "aldi": "pf.ALDI(20, time=0.5)",
    "uki": "pf.UKI(5)",
    "neural_likelihood": "pf.NeuralLikelihood('coupling', simulations=200, training=pf.Training(epochs=1), "
    "sampler=pf.Laplace())",
}

SCRIPT = """
import json, sys, warnings
import jax, numpy as np
import pushforward as pf
from conftest import line
warnings.simplefilter("ignore")
x = np.linspace(-1.0, 1.0, 6)
options = {"draws": 10, "progress": False, "predictive": True, "x": x, "y": 0.7 * x + 0.3}
one, many = (pf.infer(line, method=eval(sys.argv[1]), mesh=mesh, **options) for mesh in (None, jax.devices()))
gap = 0.0
for group in ("posterior", "log_likelihood", "log_prior", "posterior_predictive"):
    for variable in one[group].data_vars:
        a, b = one[group][variable].to_numpy(), many[group][variable].to_numpy()
        gap = max(gap, float(np.max(np.abs(a - b) / (1 + np.abs(a)))))
found = pf.attributes(many)
print(json.dumps({"gap": gap, "devices": [len(jax.devices()), found["devices"]], "warnings": found["warnings"]}))
"""


def test_every_method_is_compared():
    # Methods of state space need a scan; theirs are in the files of their methods.
    of_states = {"kalman", "enkf", "particle_filter", "discrete_hmm", "pmmh", "particle_gibbs", "smc2", "three_dvar"}
    of_states.add("four_dvar")
    of_states.add("transport_filter")
    assert set(SHORT) == set(NAMES) - of_states - {"score_trajectory"}


@pytest.mark.parametrize("name", SHORT)
def test_a_mesh_gives_the_same_draws(name):
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, SHORT[name]], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["gap"] < 1e-5
    assert found["devices"] == [8, 8]
    # A method that does not split its run says so.
    said = any("mesh= splits only the evaluation" in text for text in found["warnings"])
    assert said == (NAMES[name].shards == "draws")


def test_mesh_of_one_device():
    mesh = Mesh(np.array(jax.devices()[:1]), ("members",))
    assert parallel.check_mesh(jax.devices()[:1]).size == parallel.check_mesh(mesh).size == 1
    assert parallel.check_mesh(None) is None
    assert (parallel.device_count(None), parallel.device_count(mesh)) == (1, 1)
    square = parallel.vmap(lambda x: x**2, mesh)
    np.testing.assert_array_equal(square(np.arange(5.0)), np.arange(5.0) ** 2)


@pytest.mark.parametrize("mesh", [8, "cpu", [], [1, 2]])
def test_what_is_no_mesh_is_refused(mesh):
    with pytest.raises(
        ArgumentError, match=r"mesh= takes a jax.sharding.Mesh or a list of devices such as jax.devices\(\)"
    ):
        parallel.check_mesh(mesh)
