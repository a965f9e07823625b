"""Losses that take the classifier's matrix too, so that its logits need not be made."""
