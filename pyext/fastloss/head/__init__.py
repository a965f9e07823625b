"""Losses that begin at hidden states and the classifier's matrix, without the logits in memory."""
