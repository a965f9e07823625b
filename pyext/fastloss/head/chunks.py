"""How many rows of logits are made at once: a pure function of shapes, dtype, device and a budget of memory."""

from .._autograd import Chunks

LEAST_BUDGET = 64 << 20  # bytes, where the input's own gradient takes less
FED_ROWS = 1024  # of a chunk on a GPU: with them the weight's products take longer than its traffic (docs/tuning.md)
SUM = 4  # bytes of a sum in float32


def _tile(device: str) -> int:
    """Rows that a matrix product takes at once: a chunk is a multiple of it where the budget allows."""
    return 128 if device == "cuda" else 16


def default_budget(rows: int, features: int, columns: int, itemsize: int, bytes_of_a_row: int, device: str) -> int:
    """What a step has room for anyway: the input's gradient, or 64 MiB if that is more.

    On a GPU also 1024 rows, if they take no more than the weight's gradient, which is summed up in float32: each chunk
    reads and writes these sums, which fewer rows give too little arithmetic to hide.

    >>> default_budget(8192, 4096, 128256, 2, 2 * 128256, "cpu") >> 20
    64
    >>> default_budget(8192, 4096, 128256, 2, 2 * 128256, "cuda") >> 20
    250
    """
    fed = min(FED_ROWS * bytes_of_a_row, columns * features * SUM) if device == "cuda" else 0
    return max(rows * features * itemsize, LEAST_BUDGET, fed)


def rows_within(budget: int, rows: int, bytes_of_a_row: int, device: str) -> int:
    """Rows of a chunk: as many as the budget holds, but at least one, in whole tiles, and chunks of equal size, for a
    short last one feeds its products badly.

    >>> rows_within(1 << 26, 100, 1 << 20, "cpu")
    64
    """
    most = max(1, budget // max(1, bytes_of_a_row))
    if most >= rows:
        return max(rows, 1)
    tile = min(_tile(device), most)
    most -= most % tile
    chunks = -(-rows // most)
    equal = -(-rows // chunks)
    return min(most, -(-equal // tile) * tile)


def rows_per_chunk(
    rows: int, features: int, columns: int, *, itemsize: int, device: str, budget: int | None = None, sums: int = 0
) -> int:
    """Rows of a chunk of logits.

    Every chunk reads the whole weight for its products, so that few large chunks are fast: see :func:`rows_within`.

    Args:
        rows, features: of the input.
        columns: of the logits.
        itemsize: bytes of a logit.
        device: ``"cpu"`` or ``"cuda"``.
        budget: bytes that the logits of a chunk may take; None: :func:`default_budget`. One row is made whatever the
            budget.
        sums: bytes that several chunks take beside their logits and one chunk of all rows does not, which may take as
            much more than the default budget; see ``chunked.sums_in_product``.

    >>> rows_per_chunk(8192, 4096, 128256, itemsize=2, device="cuda", budget=1 << 30)
    4096
    """
    of_a_row = columns * itemsize
    if budget is None:
        budget = default_budget(rows, features, columns, itemsize, of_a_row, device)
        if rows * of_a_row <= budget + sums:
            return max(rows, 1)
    return rows_within(budget, rows, of_a_row, device)


def cut(rows: int, at_a_time: int, bytes_of_a_row: int) -> Chunks:
    """The chunks of so many rows, of which there is one at least.

    >>> cut(5, 2, 8)
    Chunks(times=3, rows=2, nbytes=16)
    """
    most = min(at_a_time, rows)
    return Chunks(max(1, -(-rows // at_a_time)), most, max(most, 1) * bytes_of_a_row)


__all__ = ["FED_ROWS", "LEAST_BUDGET", "cut", "default_budget", "rows_per_chunk", "rows_within"]
