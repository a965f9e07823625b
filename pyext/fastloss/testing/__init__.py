"""What the losses are, apart from how they are computed: one :class:`LossSpec` per loss, read by the tests.

:data:`SPECS` maps a loss's name to its spec: a float64 reference composed of torch operations, sample inputs, dtypes
and the fewest bytes that an implementation must move. :func:`check_gradients`, :func:`assert_close` and
:func:`assert_sound` are for users' tests too. Nothing here needs pytest.
"""

from . import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    dice_loss,
    divergences,
    elementwise,
    linear_cross_entropy,
    margins,
    pointwise,
    row_losses,
    row_maps,
    torch_elementwise,
    vectors,
)
from ._checks import assert_close, check_gradients
from ._sound import assert_sound
from ._spec import LossSpec, Sample

SPECS: dict[str, LossSpec] = {
    cross_entropy.SPEC.name: cross_entropy.SPEC,
    linear_cross_entropy.SPEC.name: linear_cross_entropy.SPEC,
    **row_maps.SPECS,
    **margins.SPECS,
    **row_losses.SPECS,
    **dice_loss.SPECS,
    **divergences.SPECS,
    **pointwise.SPECS,
    **torch_elementwise.SPECS,
    binary_cross_entropy_with_logits.SPEC.name: binary_cross_entropy_with_logits.SPEC,
    **vectors.SPECS,
    **elementwise.SPECS,
}

__all__ = ["SPECS", "LossSpec", "Sample", "assert_close", "assert_sound", "check_gradients"]
