"""How a model multiplies, and what its explanations say of it."""
