"""Pictures of what a loss does: :func:`curves` of losses, the :func:`landscape` around a model.

They need matplotlib, ``pip install 'fastloss[plot]'``, and import it when they are called. With ``save="….html"`` they
make pages that answer to the mouse, which need plotly, ``pip install 'fastloss[interactive]'``, instead.
"""

from ._curves import curves
from ._landscape import Landscape, landscape, measure_landscape

__all__ = ["Landscape", "curves", "landscape", "measure_landscape"]
