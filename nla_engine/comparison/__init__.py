"""Pairs side by side over the same rows, and one pair summed up as a card. Reads tables; runs no model but an AR."""
