"""Several processes for one run: one per GPU, or several on a CPU. Knows nothing of what they compute."""
