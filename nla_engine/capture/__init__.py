"""Stage 1: prompts -> batched generation -> rows of the residual stream -> store."""
