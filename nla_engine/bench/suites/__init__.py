"""One module per suite, each with `run(session)`."""
