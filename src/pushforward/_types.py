"""Array aliases and the one glossary of dimension names.

Dimension names, the same in every docstring and shape annotation:

=============  ==========================================================
``d``          length of the flat noise vector ``z`` of a model
``m``          number of observed scalars
``chain``      independent runs of a method
``draw``       draws of one chain
``members``    ensemble members or particles
``time``       steps of a trajectory, always the leading axis of a site
=============  ==========================================================
"""

from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Array, Bool, Float, Int, Key

Noise = Float[Array, "d"]
"""A point in noise space: the flat vector whose prior is N(0, I)."""

NoiseDraws = Float[Array, "chain draw d"]
SiteValues = Mapping[str, Array]
"""Values of named sites of a model."""

Model = Callable[..., Any]
"""A NumPyro model: any callable that contains NumPyro statements."""

__all__ = ["Array", "Bool", "Float", "Int", "Key", "Model", "Noise", "NoiseDraws", "SiteValues"]
