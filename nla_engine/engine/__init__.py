"""Batched generation: slots, a shared prefix, attention over both, sampling and stopping.

Both stages use it: capture taps a block of the base model while it generates, the verbalizer generates from vectors,
and the reconstructor only prefills.
"""
