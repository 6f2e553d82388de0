"""Ways to look at a store: row selection, tensors, torch datasets, xarray."""
