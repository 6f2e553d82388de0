"""Training of a pair: an AV that puts vectors into words, an AR that reads them back."""
