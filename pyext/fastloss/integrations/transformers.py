"""For ``transformers.Trainer``: the loss of a causal language model, read from the logits in the dtype they have."""

from typing import Any

import torch
from torch import Tensor

from ..losses.cross_entropy import cross_entropy

__all__ = ["compute_loss_func"]


def compute_loss_func(
    outputs: Any,
    labels: Tensor | None,
    num_items_in_batch: Tensor | int | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Next-token cross entropy, for the argument ``compute_loss_func`` of ``transformers.Trainer``.

    Without it a model of transformers computes its loss itself and makes a float32 copy of its logits first. Trainer
    takes the labels out of the batch where it is given this function, so that the model makes logits alone; they are
    read in their own dtype and accumulated in float32.

    Args:
        outputs: what the model returned: an object with ``logits``, a dict with ``"logits"``, or a tuple that begins
            with them. Logits of shape (batch, tokens, vocabulary); float32, float64, float16 or bfloat16.
        labels: token ids, shape (batch, tokens), any integer dtype. They are shifted here: the logits at token i are
            compared with label i + 1.
        num_items_in_batch: number of targets of the whole step, over all micro-batches, by which the sum is divided; a
            number or a tensor of one element. None: the number of targets in ``labels``, after the shift.
        ignore_index: label that marks tokens to leave out. Trainer counts those that are not -100.
        label_smoothing: share of the target that is spread over the whole vocabulary, in [0, 1] (Szegedy et al., 2016).
            Trainer leaves its own ``label_smoothing_factor`` out where it is given a loss.

    Returns:
        The loss, shape (); float32, float64 for float64 logits.

    Raises:
        ValueError: ``labels`` is None, or the shapes do not belong together.
        IndexError: a label outside the vocabulary that is not ignore_index, as in :func:`fastloss.cross_entropy`.

    Example::

        >>> from functools import partial
        >>> from fastloss.integrations.transformers import compute_loss_func
        >>> Trainer(model, arguments, train_dataset=data, compute_loss_func=compute_loss_func).train()
        >>> smoothed = partial(compute_loss_func, label_smoothing=0.1)
        >>> Trainer(model, arguments, train_dataset=data, compute_loss_func=smoothed).train()
    """
    if labels is None:
        raise ValueError("compute_loss_func: labels is None; give the examples of the data set a key 'labels'")
    if hasattr(outputs, "logits"):
        logits = outputs.logits
    else:
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    if logits.dim() != 3 or logits.shape[:2] != labels.shape:
        raise ValueError(
            f"compute_loss_func: logits have shape {tuple(logits.shape)} and labels {tuple(labels.shape)}; "
            "needed are (batch, tokens, vocabulary) and (batch, tokens)"
        )
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(logits.device)
    # The labels move, not the logits: the gradient of logits[:, :-1] would be copied into one of the whole size.
    shifted = torch.nn.functional.pad(labels.to(logits.device)[:, 1:], (0, 1), value=ignore_index)
    loss: Tensor = cross_entropy(
        logits,
        shifted,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        normalizer=num_items_in_batch,
        class_dim=-1,
        loss_dtype=torch.float32 if logits.dtype in (torch.float16, torch.bfloat16) else None,
    )
    return loss
