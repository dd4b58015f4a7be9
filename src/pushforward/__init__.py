"""pushforward: Bayesian inverse problems and data assimilation for plain NumPyro models."""
