"""diffjax: score-based diffusion models in JAX and Flax."""
