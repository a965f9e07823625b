"""Those of torch's losses that are torch's own objects in ``fastloss`` too, as they are before anything is patched."""

from torch.nn import CTCLoss, MultiLabelMarginLoss, TripletMarginWithDistanceLoss
from torch.nn.functional import ctc_loss, multilabel_margin_loss, triplet_margin_with_distance_loss

__all__ = [
    "CTCLoss",
    "MultiLabelMarginLoss",
    "TripletMarginWithDistanceLoss",
    "ctc_loss",
    "multilabel_margin_loss",
    "triplet_margin_with_distance_loss",
]
