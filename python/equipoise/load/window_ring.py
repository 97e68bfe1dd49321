"""WindowRing: the last steps' load as a few windows, in memory that does not grow with steps.

Steps are added up into windows as they come. While there are few, a window is one step; when all rows are in use,
neighbours are merged in pairs and windows are twice as long from then on, up to a limit; at the limit the oldest window
makes room. So a plan right after the start sees every step by itself, and one after a day the last period in windows of
equal length. (The exponential histogram of Datar et al., SODA 2002, with one bucket size at a time.)
"""

from __future__ import annotations

import torch


class WindowRing:
    """Load windows of this rank, oldest first.

    Args:
        num_layers, num_logical_experts: ``L``, ``E``.
        num_rows: windows kept, even; memory on the device is ``8 * num_rows * L * E`` bytes.
        period: steps that the ring must be able to look back on.
    """

    def __init__(
        self, num_layers: int, num_logical_experts: int, *, num_rows: int, period: int, device: torch.device | str
    ) -> None:
        assert num_rows >= 2
        assert num_rows % 2 == 0
        self._sums = torch.zeros(num_rows, num_layers, num_logical_experts, dtype=torch.int64, device=device)
        self._row_views = self._sums.unbind()  # made once: a view takes the host as long as the addition to it
        self._rows: list[int] = []  # in use, oldest window first
        self._steps: list[int] = []  # steps in each of them
        self._length = 1  # steps of a full window, now
        self._max_length = 1
        while self._max_length * (num_rows // 2) < period:
            self._max_length *= 2

    @property
    def num_steps(self) -> int:
        """Steps in all windows."""
        return sum(self._steps)

    def open_row(self) -> torch.Tensor:
        """(L, E) int64: where the caller adds the load of one more step, which counts as added."""
        if not self._steps or self._steps[-1] == self._length:
            self._begin_window()
        self._steps[-1] += 1
        return self._row_views[self._rows[-1]]

    def covered_steps(self, last: int) -> int:
        """Steps of the newest whole windows that hold at least ``last`` steps, or of all."""
        return sum(self._steps[self._first_window(last) :])

    def windows(self, num_windows: int, last: int) -> torch.Tensor:
        """The newest whole windows that hold at least ``last`` steps, or all, in at most ``num_windows`` groups.

        Returns:
            (W, L, E) int64 on the device, oldest first; W = 0 if no step was added.
        """
        first = self._first_window(last)
        rows, steps = self._rows[first:], self._steps[first:]
        if not rows:
            return self._sums[:0]
        groups = [self._sums[part].sum(0) for part in _even_groups(rows, steps, num_windows)]
        return torch.stack(groups)

    def _first_window(self, last: int) -> int:
        first = len(self._steps)
        held = 0
        while first > 0 and held < last:
            first -= 1
            held += self._steps[first]
        return first

    def _begin_window(self) -> None:
        num_rows = len(self._sums)
        if len(self._rows) == num_rows and self._length < self._max_length:
            self._merge_pairs()
        if len(self._rows) == num_rows:
            row = self._rows.pop(0)
            self._steps.pop(0)
        else:
            row = next(row for row in range(num_rows) if row not in self._rows)
        self._sums[row].zero_()
        self._rows.append(row)
        self._steps.append(0)

    def _merge_pairs(self) -> None:
        older, newer = self._rows[0::2], self._rows[1::2]
        for row, other in zip(older, newer, strict=True):
            self._sums[row] += self._sums[other]
        self._rows = older
        self._steps = [sum(pair) for pair in zip(self._steps[0::2], self._steps[1::2], strict=True)]
        self._length *= 2


def _even_groups(rows: list[int], steps: list[int], num_groups: int) -> list[list[int]]:
    """Consecutive ``rows`` in at most ``num_groups`` groups of about as many ``steps`` each."""
    total, done = sum(steps), 0
    groups: dict[int, list[int]] = {}
    for row, count in zip(rows, steps, strict=True):
        groups.setdefault(min(done * num_groups // total, num_groups - 1), []).append(row)
        done += count
    return list(groups.values())
