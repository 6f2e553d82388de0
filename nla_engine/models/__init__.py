"""Models before they run: checkpoints and their sidecars, weights, prompts and tokens."""
