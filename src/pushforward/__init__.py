"""pushforward: Bayesian inverse problems and data assimilation for plain NumPyro models."""

# Names are loaded on first use: a call of one method does not wait for the import of all others (SPEC 1). The list is
# `__init__.pyi`.
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
# Modules that `import *` need not bring.
__all__ = [name for name in __all__ if name not in {"metrics", "parallel", "problems"}]  # pyright: ignore[reportUnsupportedDunderAll]
