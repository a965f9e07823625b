"""fastai's Learners under patch(): every loss served, the curve that of torch."""

import fastloss
import pytest
import torch
import torch.nn.functional as F

learner = pytest.importorskip("fastai.learner")
losses = pytest.importorskip("fastai.losses")
data = pytest.importorskip("fastai.data.core")
core = pytest.importorskip("fastai.torch_core")

LOSSES = {
    "cross_entropy": (losses.CrossEntropyLossFlat, lambda y: core.TensorCategory(y.argmax(1))),
    "mse_loss": (losses.MSELossFlat, core.TensorBase),
    "l1_loss": (losses.L1LossFlat, core.TensorBase),
    "binary_cross_entropy_with_logits": (losses.BCEWithLogitsLossFlat, lambda y: core.TensorMultiCategory(y.sigmoid())),
}


class Pairs(torch.utils.data.Dataset):
    def __init__(self, target):
        self.x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        self.y = target(self.x @ torch.linspace(-1, 1, 12).view(4, 3))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return core.TensorBase(self.x[i]), self.y[i]


@pytest.mark.parametrize("name", LOSSES)
def test_learners(name):
    loss, target = LOSSES[name]
    curves, weights = [], []
    for patched in (False, True):
        torch.manual_seed(0)
        loaders = data.DataLoaders(*(learner.DataLoader(Pairs(target), bs=16) for _ in range(2)))
        trained = learner.Learner(loaders, torch.nn.Linear(4, 3), loss_func=loss(), lr=0.05)
        with fastloss.patch() if patched else torch.enable_grad(), trained.no_logging():
            trained.fit(2)
        curves.append(torch.stack([torch.as_tensor(v) for v in trained.recorder.losses]))
        weights.append(trained.model.weight.detach())
    report = fastloss.patch_report()
    assert report.served[name] >= 2 * 4 and not report.declined
    torch.testing.assert_close(*curves)
    torch.testing.assert_close(*weights)
    assert curves[0][-1] < curves[0][0] and F.cross_entropy.__module__ == "torch.nn.functional"
