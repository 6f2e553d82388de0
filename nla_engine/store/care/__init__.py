"""Is a store sound, and what is to be done if it is not."""
