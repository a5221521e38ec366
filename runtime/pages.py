"""A pool of pages in which keys and values wait; forks of a cache share pages until one of them writes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

Tensor = torch.Tensor


class Pool:
    """Pages of so many tokens, the same ones in every tensor [pages page heads width]; grows as it is used."""

    def __init__(self, page: int, tensors: Sequence[Tensor]) -> None:
        self.page, self.tensors = page, list(tensors)
        self.users = [0] * len(tensors[0])  # rows that have each page
        self.free = list(range(len(tensors[0])))[::-1]

    def take(self) -> int:
        """A page that nobody has."""
        if not self.free:
            self._grow(len(self.users))
        page = self.free.pop()
        self.users[page] = 1
        return page

    def share(self, pages: Sequence[int]) -> None:
        for page in pages:
            self.users[page] += 1

    def drop(self, pages: Sequence[int]) -> None:
        for page in pages:
            self.users[page] -= 1
            if not self.users[page]:
                self.free.append(page)

    def own(self, page: int) -> int:
        """The page itself where one row alone has it, else a copy for the row that is about to write."""
        if self.users[page] == 1:
            return page
        made = self.take()
        for tensor in self.tensors:
            tensor[made].copy_(tensor[page])
        self.drop([page])
        return made

    def _grow(self, more: int) -> None:
        self.free += range(len(self.users) + more - 1, len(self.users) - 1, -1)
        self.users += [0] * more
        self.tensors = [torch.cat([x, x.new_zeros(more, *x.shape[1:])]) for x in self.tensors]


class Held:
    """The pages of each row, and what a program is told of them."""

    def __init__(self, pool: Pool, rows: int, width: int = 0) -> None:
        self.pool, self.rows = pool, [list[int]() for _ in range(rows)]
        # At least two pages a row: a size of one is another program to torch.compile.
        self.table = torch.full((rows, max(2, width)), -1)

    def fork(self) -> Held:
        made = Held(self.pool, len(self.rows), self.table.shape[1])
        made.rows, made.table = [list(row) for row in self.rows], self.table.clone()
        for row in made.rows:
            self.pool.share(row)
        return made

    def reserve(self, lengths: Sequence[int], counts: Sequence[int]) -> None:
        """Pages of its own for what each row is about to write."""
        size, changed = self.pool.page, False
        for row, start, count in zip(self.rows, lengths, counts, strict=True):
            for i in range(start // size, -(-(start + count) // size) if count else 0):
                page = self.pool.own(row[i]) if i < len(row) else self.pool.take()
                changed |= row[i : i + 1] != [page]
                row[i : i + 1] = [page]
        if changed:
            self._tell()

    def _tell(self) -> None:
        # What room was asked for is there from the start; beyond it the table doubles, so that its size is seldom a new one.
        longest, width = max(map(len, self.rows)), self.table.shape[1]
        while width < longest:
            width *= 2
        table = torch.full((len(self.rows), width), -1)
        for row, pages in zip(table, self.rows, strict=True):
            row[: len(pages)] = torch.tensor(pages, dtype=torch.int64)
        self.table = table

    def slots(self, lengths: Sequence[int], counts: Sequence[int]) -> Tensor:
        """The slot of each token that is about to be written, row by row."""
        count, start = torch.tensor(counts), torch.tensor(lengths)
        row = torch.arange(len(self.rows)).repeat_interleave(count)
        place = torch.arange(len(row)) - (count.cumsum(0) - count)[row] + start[row]
        return self.table[row, place // self.pool.page] * self.pool.page + place % self.pool.page

    def close(self) -> None:
        """Give every page back."""
        for row in self.rows:
            self.pool.drop(row)
            row.clear()
