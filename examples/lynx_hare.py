"""Lynx and hare: the Lotka-Volterra equations fitted to the pelts of the Hudson's Bay Company, 1900-1920.

Run with `make demo`. Three methods and a reference on one model; a table, plots and netCDF files under `out/`.

What is to be learnt: the posterior has a minor mode, in which methods that climb from a single point may end. Their own
diagnostics do not show it (Pareto k-hat looks at the neighbourhood of the approximation); the evidence and the
reference do.
"""

import time
import warnings
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws to files, so that no screen is needed
import matplotlib.pyplot as plt
import numpy as np

import pushforward as pf
from pushforward.problems import lynx_hare

OUT = Path(__file__).resolve().parents[1] / "out"
METHODS = {"pathfinder": pf.Pathfinder(), "gaussian_vi": pf.GaussianVI(), "laplace": pf.Laplace()}
UNITS = {
    "alpha": "per year",
    "beta": "per year and 1000 lynx",
    "gamma": "per year",
    "delta": "per year and 1000 hares",
}
COLORS = {"hare": "C0", "lynx": "C1"}


def main() -> None:
    """Describe the model, infer with each method, compare, and write everything down."""
    OUT.mkdir(exist_ok=True)
    data = {"t": lynx_hare.TIMES, "y": lynx_hare.DATA}
    labels = {"coords": {"species": ["hare", "lynx"], "year": list(lynx_hare.YEARS)}}

    print("Pelts of hares and lynxes, 1900-1920, in thousands. The model is a plain NumPyro function")
    print("(pushforward/problems/lynx_hare.py). What was read of it:\n")
    print(pf.describe(lynx_hare.model, **data))

    print("\nReference: NUTS, 4 chains of 1000 draws (a minute or so).")
    reference = run(pf.NUTS(coordinates="z", warmup=500), data, labels, predictive=True)
    quality = pf.attributes(reference)
    print(f"  R-hat at most {quality['rhat_max']:.3f} (good below 1.01), effective draws at least", end=" ")
    print(f"{quality['ess_min']:.0f}, divergences {int(reference['sample_stats']['diverging'].sum())}.")

    print("\nApproximations:")
    trees = {name: run(method, data, labels) for name, method in METHODS.items()}

    table = pf.compare(trees, reference=reference)
    print("\nHow far each is from the reference:\n")
    columns = ["mean_error", "sd_error", "c2st", "c2st_floor", "log_evidence", "evaluations", "run_seconds"]
    print(table[columns].rename_axis(None).to_string(float_format="{:.4g}".format))
    print("\nmean_error, sd_error: the worst parameter, in posterior standard deviations and as a log ratio.")
    print(
        "c2st: how often a classifier tells the draws from those of the reference; an exact method scores c2st_floor."
    )
    print("evaluations: solutions of the differential equations, without those of the reference.")
    print_modes(table["log_evidence"])

    print_published(reference)
    write(reference, trees)


def run(method, data, labels, **options):
    """Infer with one method; say how long it took and what it warned of."""
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # printed below from the attributes
        tree = pf.infer(lynx_hare.model, method=method, progress=False, **options, **labels, **data)
    print(f"  {type(method).__name__}: {time.perf_counter() - start:.0f} s, compiling included")
    for warning in pf.attributes(tree)["warnings"]:
        print(f"    warning: {warning}")
    return tree


def print_modes(log_evidence) -> None:
    """Point out methods that ended in a minor mode: their evidence falls far short of the best."""
    best = log_evidence.idxmax()
    for name, value in log_evidence.items():
        if value < log_evidence[best] - 5:
            print(f"\n{name} ended in a minor mode: its log evidence is {log_evidence[best] - value:.0f} below that of")
            print(f"{best}. It climbs from one point; nothing near a minor mode tells of a better one elsewhere.")


def print_published(reference) -> None:
    """Posterior means beside those published by posteriordb."""
    print("\nPosterior means of the reference, and those published by posteriordb (Stan):\n")
    print(f"  {'':8}{'here':>8}{'published':>11}{'posterior sd':>14}")
    for name in UNITS:
        draws = reference["posterior"][name]
        print(f"  {name:8}{float(draws.mean()):8.4f}{lynx_hare.MEAN[name]:11.4f}{float(draws.std()):14.4f}")


def write(reference, trees) -> None:
    """netCDF files and plots."""
    paths = [OUT / f"lynx_hare_{name}.nc" for name in ("reference", *trees)]
    for path, tree in zip(paths, (reference, *trees.values()), strict=True):
        tree.to_netcdf(path)
    figures = {
        "lynx_hare_compare.png": plot_parameters(reference, trees),
        "lynx_hare_predictive.png": plot_predictive(reference),
    }
    for name, figure in figures.items():
        figure.savefig(OUT / name, dpi=150)
        plt.close(figure)
        paths.append(OUT / name)
    print("\nWritten:")
    for path in paths:
        print(f"  {path.relative_to(OUT.parent)}")


def plot_parameters(reference, trees) -> plt.Figure:
    """Marginals and pairs of the parameters, with their units."""
    figure = pf.plot_compare(trees, reference=reference, var_names=list(UNITS), panel_inches=2.2)
    for panel in figure.axes:
        for axis in (panel.xaxis, panel.yaxis):
            name = axis.get_label_text()
            if name in UNITS:
                axis.set_label_text(f"{name}\n({UNITS[name]})", fontsize=9)
    return figure


def plot_predictive(tree) -> plt.Figure:
    """Data over the posterior predictive distribution, one panel per species."""
    drawn = tree["posterior_predictive"]["y"].transpose("chain", "draw", "year", "species")
    figure, panels = plt.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    for panel, species in zip(panels, ("hare", "lynx"), strict=True):
        values = drawn.sel(species=species).values.reshape(-1, len(lynx_hare.YEARS))
        low, first, middle, third, high = np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95], axis=0)
        color = COLORS[species]
        panel.fill_between(lynx_hare.YEARS, low, high, color=color, alpha=0.2, lw=0, label="90 % of predictions")
        panel.fill_between(lynx_hare.YEARS, first, third, color=color, alpha=0.35, lw=0, label="50 % of predictions")
        panel.plot(lynx_hare.YEARS, middle, color=color, label="median prediction")
        observed = tree["observed_data"]["y"].sel(species=species)
        panel.plot(lynx_hare.YEARS, observed, "o", color="black", ms=4, label="observed")
        panel.set_ylabel(f"{species} pelts (thousands)")
        panel.set_ylim(0, 1.3 * high.max())  # room for the legend
        panel.legend(frameon=False, fontsize=8, ncols=2, loc="upper right")
    panels[0].set_title("Posterior predictive distribution (NUTS) and pelts of the Hudson's Bay Company")
    panels[1].set_xlabel("year")
    panels[1].set_xticks(range(1900, 1921, 2))
    return figure


if __name__ == "__main__":
    main()
