"""Losses that begin at hidden states and the classifier's matrix: the logits are made a chunk of rows at a time."""
