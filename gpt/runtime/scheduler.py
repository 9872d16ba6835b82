"""Which sequences take part in the next step, and with how many tokens.

Continuous ("in-flight") batching (Yu et al. 2022, Orca): a sequence joins as soon as there is room and leaves at its
end.  One rule serves prompts, parts of prompts and single tokens alike: a sequence feeds the tokens that it has and the
cache lacks.  Running sequences go first, oldest first; what is left of `max_num_tokens` goes to new ones.  Where blocks
run out, the youngest sequence gives its own back and is computed again later.

On a GPU a step with prompts has costs of its own however few they are: there, sequences may wait a little for others
to join with them (`worth_joining`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from gpt.runtime.blocks import BlockManager, Table

# How far behind a sequence that waits for blocks of another one others are looked at.
_MAX_LOOKAHEAD = 64
# Prompts' tokens from which on a GPU computes so much longer than the host prepares that more make a step no cheaper.
_FULL_STEP = 4096


@dataclass(eq=False)
class RunningSequence:
    """One sequence from its prompt on.

    index: in the caller's order.  tokens: prompt and what was generated.  max_len: of both together.  task: of prompt
    tuning, which the cache's contents depend on.  running: has blocks and a place in the steps.
    """

    index: int
    tokens: list[int]
    max_len: int
    task: int | None = None
    table: Table = field(default_factory=Table)
    running: bool = False

    @property
    def num_missing(self) -> int:
        """Tokens whose K and V are not in the cache; one where the sequence is generating."""
        return len(self.tokens) - self.table.num_filled

    def slots_after(self, num_steps: int) -> int:
        """Slots with K and V after so many steps of one token; the last token's are never needed."""
        return min(len(self.tokens) - 1 + num_steps, self.max_len - 1)


@dataclass(frozen=True)
class Part:
    """What one sequence feeds in a step: `num_new` of its tokens from table.num_filled on, then `draft`.

    reaches_end: whether these are all that it has, so that the step's logits continue it.
    """

    sequence: RunningSequence
    num_new: int
    reaches_end: bool
    draft: tuple[int, ...] = ()

    @property
    def is_one_step(self) -> bool:
        """Whether it is the last token of a sequence that is generating, and nothing else."""
        return self.reaches_end and self.num_new == 1 and not self.draft and self.sequence.table.num_filled > 0


def worth_joining(
    waiting: Sequence[int], num_places: int, *, max_running: int, max_num_tokens: int, num_waited: int, patience: int
) -> bool:
    """Whether sequences join those that run now, or leave their places empty for more to come.

    waiting: tokens of the first ones that wait, up to one more than there are places.  num_waited: steps that somebody
    has waited for with a place free.  They join where they fill half a step or what a GPU works on for long; where all
    have a place, so that nobody is to come; where a quarter of the places is empty, which costs more than the steps
    that it saves; and after `patience` steps.
    """
    if not waiting or num_places == 0:
        return False
    return (
        sum(waiting[:num_places]) >= min(_FULL_STEP, max_num_tokens // 2)
        or len(waiting) <= num_places
        or 4 * num_places >= max_running
        or num_waited >= patience
    )


class Scheduler:
    """Plans step after step.

    waiting: sequences in the order in which they shall start; read as there is room.  max_running: sequences at a time.
    max_num_tokens: of a step.  continuous: whether sequences join before all running ones have ended.  draft: proposes
    up to so many tokens that may come next.  independent: how a sequence is divided into steps does not depend on
    others: prompts take as much of a step as if they were alone, and room for all of a sequence is kept from the start,
    so that none is sent away and computed again.  patience: steps that sequences wait for others to join with them.
    """

    def __init__(
        self,
        blocks: BlockManager,
        waiting: Iterable[RunningSequence],
        *,
        max_running: int,
        max_num_tokens: int,
        continuous: bool = True,
        draft: Callable[[RunningSequence, int], tuple[int, ...]] | None = None,
        independent: bool = False,
        patience: int = 0,
    ):
        self.blocks = blocks
        self.running: list[RunningSequence] = []
        self.num_preempted = 0
        self._source: Iterator[RunningSequence] = iter(waiting)
        self._waiting: deque[RunningSequence] = deque()
        self._max_running = max_running
        self._max_num_tokens = max_num_tokens
        self._continuous = continuous
        self._draft = draft
        self._independent = independent
        self._patience = patience
        self._num_waited = 0
        self._budget = 0  # tokens that the step being planned can still take
        self._lacks_blocks = False

    def plan(self) -> list[Part]:
        """The next step's parts; none where all sequences have ended."""
        parts = self.plan_running()
        return parts + self.join() if self.lets_join() else parts

    def plan_running(self) -> list[Part]:
        """The parts of those that run; `join` adds to the same step."""
        self.blocks.begin_plan()
        self._budget = self._max_num_tokens
        parts: list[Part] = []
        for sequence in sorted(self.running, key=lambda sequence: sequence.num_missing > 1):  # tokens before prompts
            if self._budget > 0 and sequence.running:
                self._schedule(sequence, parts)
        return [part for part in parts if part.sequence.running]

    def lets_join(self) -> bool:
        """Whether sequences may join those that run.  A step that goes on with a prompt is open to others."""
        if not self.running:
            return True
        if not self._continuous or self._patience == 0:
            return self._continuous
        if self._lacks_blocks:
            return False
        if any(sequence.num_missing > 1 for sequence in self.running):
            return True
        num_places = self._max_running - len(self.running)
        while len(self._waiting) <= num_places and (sequence := next(self._source, None)) is not None:
            self._waiting.append(sequence)
        joins = worth_joining(
            [len(sequence.tokens) for sequence in islice(self._waiting, num_places + 1)],
            num_places,
            max_running=self._max_running,
            max_num_tokens=self._max_num_tokens,
            num_waited=self._num_waited,
            patience=self._patience,
        )
        self._num_waited = self._num_waited + 1 if self._waiting and num_places > 0 and not joins else 0
        return joins

    def join(self) -> list[Part]:
        """Lets waiting sequences join; those that would compute what another one is computing stay for a step more."""
        parts: list[Part] = []
        passed: list[RunningSequence] = []
        while self._budget > 0 and len(self.running) < self._max_running and len(passed) < _MAX_LOOKAHEAD:
            sequence = self._next_waiting()
            if sequence is None:
                break
            table = self.blocks.open(sequence.tokens, sequence.task)
            if table is None:
                passed.append(sequence)
                continue
            # Room for one more token, so that a sequence does not come only to be sent away in the next step.
            wanted = sequence.max_len if self._independent else min(len(sequence.tokens) + 1, sequence.max_len)
            if self.blocks.num_missing(table, wanted) > self.blocks.num_free:
                self.blocks.close(table)
                passed.append(sequence)
                self._lacks_blocks = True
                break
            if self._independent:
                self.blocks.grow(table, wanted)
            sequence.table, sequence.running = table, True
            self.running.append(sequence)
            self._schedule(sequence, parts)
        self._waiting.extendleft(reversed(passed))
        return parts

    def look_ahead(self, parts: Sequence[Part], num_steps: int) -> int:
        """For how many steps, at most `num_steps`, these sequences can go on by themselves, token by token: as long as
        one of them has room and the pool has blocks, which they get."""
        num_steps = min(num_steps, max(part.sequence.max_len - len(part.sequence.tokens) for part in parts))
        while num_steps > 1:
            needed = [(part.sequence.table, part.sequence.slots_after(num_steps)) for part in parts]
            if sum(self.blocks.num_missing(*each) for each in needed) <= self.blocks.num_free:
                for table, num_slots in needed:
                    self.blocks.grow(table, num_slots)
                break
            num_steps //= 2
        if self._num_waited > 0:
            self._num_waited += num_steps - 1
        return num_steps

    def finish(self, sequence: RunningSequence) -> None:
        """Called for a sequence that has ended."""
        sequence.running = False
        self.running.remove(sequence)
        self.blocks.close(sequence.table)
        self._lacks_blocks = False

    def _schedule(self, sequence: RunningSequence, parts: list[Part]) -> None:
        """Adds a running sequence's part; gives up the youngest for it if need be."""
        budget = self._budget
        num_missing = sequence.num_missing
        num_new = min(num_missing, self._max_num_tokens if self._independent else budget)
        num_slots = sequence.table.num_filled + num_new
        draft: tuple[int, ...] = ()
        if self._draft is not None and num_new == num_missing:
            room = min(budget - num_new, sequence.max_len - len(sequence.tokens) - 1)
            draft = self._draft(sequence, room) if room > 0 else ()
            if not self.blocks.grow(sequence.table, num_slots + len(draft)):
                draft = ()
        while not self.blocks.grow(sequence.table, num_slots):
            self._preempt(self.running[-1])
            if not sequence.running:
                return
        self.blocks.announce(sequence.table, sequence.tokens, num_slots)
        parts.append(Part(sequence, num_new, num_new == num_missing, draft))
        self._budget -= num_new + len(draft)

    def _preempt(self, sequence: RunningSequence) -> None:
        self.finish(sequence)
        self._waiting.appendleft(sequence)
        self.num_preempted += 1

    def _next_waiting(self) -> RunningSequence | None:
        return self._waiting.popleft() if self._waiting else next(self._source, None)
