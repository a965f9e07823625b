"""Losses together with the classifier's matrix: the logits are made a chunk of rows at a time and never all at once."""
