"""Which cache block belongs to whom: reference counts, sharing of equal beginnings, reuse of the longest unused.

A full block is found again by its own tokens and the block before it, compared exactly and not by a hash alone.  Blocks
that nobody uses keep their contents until they are needed, the longest unused first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import count

_Key = tuple[Hashable, tuple[int, ...]]


@dataclass
class Table:
    """The blocks of one sequence, in its order.

    num_filled: slots with K and V.  chain: names the contents of the full blocks found or registered so far.
    num_chained: how many blocks that are.
    """

    blocks: list[int] = field(default_factory=list)
    num_filled: int = 0
    chain: Hashable = None
    num_chained: int = 0


class BlockManager:
    """Hands out the blocks of a pool; never touches the cache itself."""

    def __init__(self, num_blocks: int, tokens_per_block: int, *, sharing: bool = True):
        """sharing: whether full blocks are found again."""
        self.num_blocks = num_blocks
        self.tokens_per_block = tokens_per_block
        self._sharing = sharing
        self._users = [0] * num_blocks
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._unused: OrderedDict[int, None] = OrderedDict()  # nobody's blocks that can be found again, oldest first
        self._found: dict[_Key, tuple[int, int]] = {}  # contents -> block, name of the contents
        self._key_of: dict[int, _Key] = {}
        self._names = count(1)
        self._coming: set[_Key] = set()

    @property
    def num_free(self) -> int:
        return len(self._empty) + len(self._unused)

    def num_missing(self, table: Table, num_slots: int) -> int:
        """Blocks that `grow` would take."""
        return max(0, -(-num_slots // self.tokens_per_block) - len(table.blocks))

    def open(self, tokens: Sequence[int], salt: Hashable = None) -> Table | None:
        """A table for a sequence, with the full blocks of its beginning that are in the pool; at least one token is
        left to compute.  None where the next block is just being computed by another sequence: it pays to wait.

        salt: what the contents depend on besides the tokens.
        """
        table = Table(chain=("start", salt))
        if not self._sharing:
            return table
        size = self.tokens_per_block
        matched: list[int] = []
        for start in range(0, len(tokens) - size, size):
            key = (table.chain, tuple(tokens[start : start + size]))
            known = self._found.get(key)
            if known is None:
                if key in self._coming:
                    return None
                break
            block, table.chain = known
            matched.append(block)
        for block in matched:
            self._use(block)
        table.blocks = matched
        table.num_chained = len(matched)
        table.num_filled = len(matched) * size
        return table

    def begin_plan(self) -> None:
        """Forgets what was announced: by now it is in the pool or did not happen."""
        self._coming.clear()

    def announce(self, table: Table, tokens: Sequence[int], num_slots: int) -> None:
        """Says that the step that is being planned fills `num_slots` slots with the first of `tokens`."""
        start = table.num_chained * self.tokens_per_block
        if self._sharing and num_slots >= start + self.tokens_per_block:
            self._coming.add((table.chain, tuple(tokens[start : start + self.tokens_per_block])))

    def grow(self, table: Table, num_slots: int) -> bool:
        """Makes room for `num_slots` slots in all; False, with nothing changed, where there are too few blocks."""
        missing = self.num_missing(table, num_slots)
        if missing > self.num_free:
            return False
        table.blocks += [self._take() for _ in range(missing)]
        return True

    def fill(self, table: Table, tokens: Sequence[int], num_slots: int) -> None:
        """Says that the K and V of the first `num_slots` of `tokens` are in the table's slots."""
        table.num_filled = num_slots
        size = self.tokens_per_block
        while self._sharing and (table.num_chained + 1) * size <= num_slots:
            index = table.num_chained
            key = (table.chain, tuple(tokens[index * size : (index + 1) * size]))
            known = self._found.get(key)
            if known is None:
                known = self._found[key] = table.blocks[index], next(self._names)
                self._key_of[table.blocks[index]] = key
            table.chain = known[1]
            table.num_chained += 1

    def close(self, table: Table) -> None:
        """Gives the blocks back, the end of the sequence first: beginnings are worth more."""
        for block in reversed(table.blocks):
            self._users[block] -= 1
            if self._users[block] == 0:
                if block in self._key_of:
                    self._unused[block] = None
                else:
                    self._empty.append(block)
        table.blocks = []

    def _use(self, block: int) -> None:
        if self._users[block] == 0:
            del self._unused[block]
        self._users[block] += 1

    def _take(self) -> int:
        if self._empty:
            block = self._empty.pop()
        else:
            block, _ = self._unused.popitem(last=False)
            del self._found[self._key_of.pop(block)]
        self._users[block] = 1
        return block
