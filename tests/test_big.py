"""More than 2**31 elements: offsets in 32 bits would wrap around. Runs with --big."""

import fastloss
import pytest
import torch
import torch.nn.functional as F

pytestmark = pytest.mark.big


def rows_to_look_at(rows, per_row):
    """The first and last rows, and those around element 2**31."""
    edge = 2**31 // per_row
    return sorted({0, 1, rows // 2, edge - 1, edge, edge + 1, rows - 1} & set(range(rows)))


def big(rows, classes, device, dtype=torch.bfloat16):
    """Random rows, repeated, the last one its own."""
    block = torch.randn(64, classes, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    x = block.repeat((rows + 63) // 64, 1)[:rows].contiguous()
    x[-1] += 1
    return x


@pytest.mark.parametrize(("rows", "classes"), ((2**31 // 65537 + 3, 65537), (2**31 // 64 + 99, 64)), ids=str)
def test_rows(rows, classes, device):
    x = big(rows, classes, device).requires_grad_()
    assert x.numel() > 2**31
    t = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(1)).to(device)
    loss = fastloss.cross_entropy(x, t, reduction="none")
    fastloss.cross_entropy(x, t, reduction="sum").backward()
    for row in rows_to_look_at(rows, classes):
        exact = x.detach()[row : row + 1].double().requires_grad_()
        want = F.cross_entropy(exact, t[row : row + 1], reduction="sum")
        (want_grad,) = torch.autograd.grad(want, exact)
        torch.testing.assert_close(loss[row].double(), want, rtol=2**-8, atol=1e-3)
        torch.testing.assert_close(x.grad[row].double(), want_grad[0], rtol=2**-7, atol=1e-6)


def test_spatial(device):
    """One image whose class planes lie more than 2**31 elements apart."""
    classes, pixels = 5, 2**31 // 4 + 7
    x = torch.empty(1, classes, pixels, dtype=torch.bfloat16, device=device)
    for c in range(classes):
        x[0, c] = (
            torch.randn(1 << 16, generator=torch.Generator().manual_seed(c))
            .to(device)
            .repeat(pixels // 65536 + 1)[:pixels]
        )
    t = torch.zeros(1, pixels, dtype=torch.uint8, device=device)
    t[0, 1::2] = 4
    loss = fastloss.cross_entropy(x, t, reduction="none")
    for i in (0, 1, pixels // 2, pixels - 2, pixels - 1):
        want = F.cross_entropy(x[0, :, i].double(), t[0, i].long())
        torch.testing.assert_close(loss[0, i].double(), want, rtol=2**-8, atol=1e-3)


def test_a_bad_target_beyond(device, immediate_errors):
    rows, classes = 2**31 // 64 + 99, 64
    t = torch.zeros(rows, dtype=torch.uint8, device=device)
    t[-2] = 64
    with pytest.raises(IndexError, match="Target 64 is out of bounds"):
        fastloss.cross_entropy(torch.zeros(1, classes, dtype=torch.bfloat16, device=device).expand(rows, classes), t)
