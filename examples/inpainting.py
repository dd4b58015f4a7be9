"""In-painting: the centre of a handwritten digit, given the rest of its image.

Nobody can write down a likelihood of images, but there are images. They stand for draws from the joint law of centre
and rest, so that `pf.AmortizedFlow` learns the law of the centre given the rest from them, for all images at once. The
model below names the two sites and bounds the pixels; it simulates nothing.

    python examples/inpainting.py              scikit-learn's 1797 digits of 8 x 8 pixels, half a minute
    python examples/inpainting.py --mnist      MNIST from openml.org at half its resolution, if a network is there

1500 images are few. What counts are images that were neither trained on nor used to end the training: the negative log
density of their true centre, and the energy score (Gneiting and Raftery 2007), beside those of two simple rivals.
"""

import argparse
import os
import socket
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd
from scipy.stats import norm
from sklearn.datasets import fetch_openml, load_digits
from sklearn.linear_model import LogisticRegression

import pushforward as pf

OUT = Path(__file__).resolve().parents[1] / "out"
REDUCED = os.environ.get("PUSHFORWARD_REDUCED") == "1"
COPIES, EPOCHS, DRAWS = (1, 3, 50) if REDUCED else (10, 60, 200)


def digit(inside, outside, rest=None):
    """Centre and rest of an image, pixels in (0, 1); `inside` and `outside` are their numbers of pixels."""
    numpyro.sample("centre", dist.Uniform(0.0, 1.0).expand([inside]).to_event(1))
    # No law is stated for the rest: a deterministic site tells the library so.
    numpyro.deterministic("rest", jnp.zeros(outside) if rest is None else rest)


@dataclass(frozen=True)
class Images:
    """Pixels (n, side, side), integers from 0 to `levels`, and labels (n,)."""

    pixels: np.ndarray
    labels: np.ndarray
    levels: int

    @property
    def hole(self) -> np.ndarray:
        """Which pixels are the centre, (side, side)."""
        side = self.pixels.shape[1]
        mask = np.zeros((side, side), bool)
        mask[side // 4 : side - side // 4, side // 4 : side - side // 4] = True
        return mask

    def some(self, rows: slice) -> "Images":
        """Some of the images."""
        return Images(self.pixels[rows], self.labels[rows], self.levels)

    def parts(self, copies: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Centre and rest of `copies` of each image, side by side, as real numbers in (0, 1).

        Uniform noise spreads each integer over the interval that it stands for, so that densities exist, and no copy
        is like another.
        """
        repeated = np.repeat(self.pixels, copies, axis=0)
        values = (repeated + rng.uniform(size=repeated.shape)) / (self.levels + 1)
        return values[:, self.hole], values[:, ~self.hole]

    def whole(self, centre: np.ndarray, rest: np.ndarray) -> np.ndarray:
        """Images (..., side, side) from their parts."""
        values = np.empty((*centre.shape[:-1], *self.hole.shape))
        values[..., self.hole], values[..., ~self.hole] = centre, rest
        return values


def load(mnist: bool = False, seconds: float = 30.0) -> tuple[Images, Images]:
    """Images to train on and others to judge by, in random order; MNIST only if asked for and reachable."""
    found = None
    if mnist:
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(seconds)
        try:
            data, labels = fetch_openml("mnist_784", version=1, as_frame=False, return_X_y=True, n_retries=1)
            blocks = data.astype(int).reshape(-1, 14, 2, 14, 2).sum((2, 4))
            found = Images(blocks, labels.astype(int), 4 * 255)
        except OSError as error:
            print(f"MNIST is out of reach ({error}); using scikit-learn's digits.")
        finally:
            socket.setdefaulttimeout(before)
    if found is None:
        digits = load_digits()
        found = Images(digits.images.astype(int), digits.target, 16)
    order = np.random.default_rng(0).permutation(len(found.pixels))
    shuffled = Images(found.pixels[order], found.labels[order], found.levels)
    size = len(order) * 1500 // 1797
    return shuffled.some(slice(size)), shuffled.some(slice(size, size + 1000))


def train(images: Images, rng: np.random.Generator) -> pf.AmortizedFlow:
    """Learn the centre given the rest.

    The first tenth of the simulations judges the training. Copies of one image lie side by side, so that no image both
    trains and judges. Flow matching was chosen among six kinds of estimators by the scores of `study` on the 8 x 8
    digits; its own sizes, of which four were tried, differ by little more than a standard error.
    """
    centre, rest = images.parts(COPIES, rng)
    method = pf.AmortizedFlow(
        pf.FlowMatching(width=128, depth=3, steps=10),
        embedding=pf.Vector(outputs=0 if rest.shape[1] <= 64 else 128, width=256),
        training=pf.Training(learning_rate=1e-3, held_out=0.1, patience=3, epochs=EPOCHS),
    )
    return method.fit(
        digit, **sizes(images), observed="rest", simulations={"centre": centre, "rest": rest}, progress=False
    )


def sizes(images: Images) -> dict[str, int]:
    """The arguments of the model that are not data."""
    return {"inside": int(images.hole.sum()), "outside": int((~images.hole).sum())}


def complete(method: pf.AmortizedFlow, images: Images, rest: np.ndarray) -> np.ndarray:
    """Draws of the centre for many images in one call, (image, draw, pixel)."""
    tree = pf.infer(digit, method=method, draws=DRAWS, rest=rest, progress=False, **sizes(images))
    return tree["posterior"]["centre"].isel(chain=0).transpose("dataset", "draw", ...).values


def surprise(method: pf.AmortizedFlow, centre: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """-log density of the true centre of each image, in nats; a uniform law has 0.

    The network knows log q(u given rest) in u = Phi^-1(pixel); a pixel's law is that over the density of N(0, 1).
    """
    u, conditional = norm.ppf(centre), method.trained.conditional
    log_q = jax.lax.map(
        lambda pair: conditional.log_density(pair[0][None], pair[1])[0],
        (jnp.asarray(u, float), jnp.asarray(rest, float)),
        batch_size=100,
    )
    return norm.logpdf(u).sum(1) - np.asarray(log_q)


class LinearGaussian:
    """First rival: linear regression of Phi^-1(centre) on the rest, with a full covariance of what is left."""

    def __init__(self, images: Images, rng: np.random.Generator):
        centre, rest = images.parts(COPIES, rng)
        u, inputs = norm.ppf(centre), np.c_[np.ones(len(rest)), rest]
        self.slopes = np.linalg.lstsq(inputs, u, rcond=None)[0]
        left = u - inputs @ self.slopes
        self.root = np.linalg.cholesky(left.T @ left / (len(left) - inputs.shape[1]))

    def _mean(self, rest: np.ndarray) -> np.ndarray:
        return np.c_[np.ones(len(rest)), rest] @ self.slopes

    def draws(self, rest: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(image, draw, pixel)."""
        mean = self._mean(rest)[:, None]
        return norm.cdf(mean + rng.normal(size=(len(rest), DRAWS, len(self.root))) @ self.root.T)

    def surprise(self, centre: np.ndarray, rest: np.ndarray) -> np.ndarray:
        """-log density of the true centre of each image, in nats."""
        u = norm.ppf(centre)
        white = np.linalg.solve(self.root, (u - self._mean(rest)).T).T
        return -norm.logpdf(white).sum(1) + np.log(np.diag(self.root)).sum() + norm.logpdf(u).sum(1)


def resembling(images: Images, rest: np.ndarray, rng: np.random.Generator, width: float = 0.3) -> np.ndarray:
    """Second rival: centres of training images, drawn by how much their rest resembles; (image, draw, pixel).

    `width` is the best for the 8 x 8 digits, chosen on the very images that judge: a rival deserves the advantage.
    """
    centres, others = images.parts(1, rng)
    square = (rest**2).sum(1)[:, None] - 2 * rest @ others.T + (others**2).sum(1)
    weights = np.exp(-(square - square.min(1, keepdims=True)) / (2 * width**2))
    weights /= weights.sum(1, keepdims=True)
    return np.stack([centres[rng.choice(len(centres), DRAWS, p=row)] for row in weights])


def energy_score(draws: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """E|X - y| - E|X - X'| / 2 of each image; smaller is better."""
    half = draws.shape[1] // 2
    apart = np.linalg.norm(draws[:, :half] - draws[:, half : 2 * half], axis=-1).mean(1)
    return np.linalg.norm(draws - truth[:, None], axis=-1).mean(1) - apart / 2


def class_probabilities(classifier, images: Images, draws: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """Probability of each class, averaged over the completed images; (image, class)."""
    whole = images.whole(draws, np.broadcast_to(rest[:, None], (*draws.shape[:2], rest.shape[1])))
    found = classifier.predict_proba(whole.reshape(-1, images.hole.size))
    return found.reshape(*draws.shape[:2], -1).mean(1)


@dataclass(frozen=True)
class Study:
    """What was found: the images that judged, their rest, completions, class probabilities, and the table."""

    images: Images
    rest: np.ndarray
    draws: np.ndarray
    probabilities: np.ndarray
    table: pd.DataFrame


def study(mnist: bool = False) -> Study:
    """Train, complete the images that were kept apart, and judge beside the rivals."""
    rng = np.random.default_rng(1)
    known, new = load(mnist)
    centre, rest = new.parts(1, rng)
    classifier = LogisticRegression(max_iter=100 if REDUCED else 2000)
    classifier.fit(known.whole(*known.parts(1, rng)).reshape(len(known.pixels), -1), known.labels)
    method, linear = train(known, rng), LinearGaussian(known, rng)
    found = {
        "flow matching": (complete(method, known, rest), surprise(method, centre, rest)),
        "linear Gaussian": (linear.draws(rest, rng), linear.surprise(centre, rest)),
        "resembling images": (resembling(known, rest, rng), np.full(len(rest), np.nan)),
        "true centre": (centre[:, None], np.full(len(rest), np.nan)),
    }
    rows, at = {}, (np.arange(len(rest)), new.labels)
    for name, (draws, nats) in found.items():
        scores = energy_score(draws, centre) if draws.shape[1] > 1 else np.full(len(rest), np.nan)
        probabilities = class_probabilities(classifier, known, draws, rest)
        rows[name] = {
            "nll": nats.mean(),
            "se of nll": nats.std() / len(nats) ** 0.5,
            "energy score": scores.mean(),
            "se of score": scores.std() / len(scores) ** 0.5,
            "class right": (probabilities.argmax(1) == new.labels).mean(),
            "class log loss": -np.log(probabilities[at]).mean(),
        }
    draws = found["flow matching"][0]
    probabilities = class_probabilities(classifier, known, draws, rest)
    return Study(new, rest, draws, probabilities, pd.DataFrame(rows).T)


def picture(found: Study, rows: int = 5, shown: int = 5):
    """Some images, the last the most doubtful: what is seen, truth, mean, sd, draws, and class probabilities."""
    import matplotlib.pyplot as plt

    p = found.probabilities
    entropy = -(p * np.log(p)).sum(1)
    doubtful = np.geomspace(0.5 * len(entropy), 1, rows).astype(int)  # from the middle to the most doubtful
    chosen = np.argsort(entropy)[-doubtful]
    titles = ["seen", "truth", "mean", "sd", *["draw"] * shown]
    figure, axes = plt.subplots(
        rows, len(titles) + 1, figsize=(1.02 * len(titles) + 2.2, 1.12 * rows), layout="constrained",
        width_ratios=[1] * len(titles) + [2],
    )  # fmt: skip
    truth = found.images.pixels / found.images.levels
    for row, i in zip(axes, chosen, strict=True):
        seen, centre = found.rest[i], found.draws[i]
        completed = found.images.whole(centre, np.broadcast_to(seen, (len(centre), len(seen))))
        spread = found.images.whole(centre.std(0), np.zeros(len(seen)))
        hidden = np.where(found.images.hole, np.nan, truth[i])
        for axis, image in zip(row, [hidden, truth[i], completed.mean(0), spread, *completed[:shown]], strict=False):
            axis.imshow(image, cmap="gray_r", vmin=0, vmax=0.5 if image is spread else 1)
            axis.set(xticks=[], yticks=[], facecolor="tab:orange")
        bars = row[-1]
        colors = ["tab:orange" if k == found.images.labels[i] else "0.6" for k in range(p.shape[1])]
        bars.bar(range(p.shape[1]), p[i], color=colors)
        bars.set(xticks=range(p.shape[1]), yticks=[0, 1], ylim=(0, 1))
        bars.tick_params(labelsize=7, length=2)
        bars.spines[["top", "right"]].set_visible(False)
    for axis, title in zip(axes[0], [*titles, "class of the completed image"], strict=True):
        axis.set_title(title, fontsize=9)
    return figure


def main() -> None:
    """Study, table, picture."""
    import matplotlib

    matplotlib.use("Agg")  # draws to files, so that no screen is needed
    parser = argparse.ArgumentParser(description="In-painting of handwritten digits.")
    parser.add_argument("--mnist", action="store_true", help="fetch MNIST from openml.org")
    found = study(parser.parse_args().mnist)
    print(found.table.round(3).to_string())
    OUT.mkdir(exist_ok=True)
    picture(found).savefig(OUT / "inpainting.png", dpi=150)
    print("\nWritten: out/inpainting.png. Orange: what is hidden, and the true class.")


if __name__ == "__main__":
    main()
