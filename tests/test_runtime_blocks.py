"""Which block belongs to whom, and which sequences are in a step: without a model."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

import pytest

from gpt.runtime.blocks import BlockManager, Table
from gpt.runtime.scheduler import Part, RunningSequence, Scheduler, worth_joining


def filled(blocks: BlockManager, tokens: list[int]) -> Table:
    table = blocks.open(tokens)
    assert table is not None
    assert blocks.grow(table, len(tokens))
    blocks.fill(table, tokens, len(tokens))
    return table


def test_equal_beginnings_share_full_blocks() -> None:
    blocks = BlockManager(10, 4)
    first = filled(blocks, list(range(10)))
    second = filled(blocks, [*range(8), 99, 98, 97])
    assert second.blocks[:2] == first.blocks[:2]
    assert second.blocks[2] != first.blocks[2]
    assert blocks.num_free == 10 - 4
    blocks.close(first)
    assert blocks.num_free == 10 - 3


def test_the_last_token_is_always_computed() -> None:
    blocks = BlockManager(10, 4)
    filled(blocks, list(range(8)))
    again = blocks.open(list(range(8)))
    assert again is not None
    assert again.num_filled == 4


def test_equal_tokens_behind_different_beginnings_are_not_the_same() -> None:
    blocks = BlockManager(10, 2)
    first = filled(blocks, [1, 2, 7, 8, 5])
    second = filled(blocks, [3, 4, 7, 8, 5])
    assert not set(first.blocks) & set(second.blocks)
    other_task = blocks.open([1, 2, 7, 8, 5], salt=1)
    assert other_task is not None
    assert other_task.blocks == []


def test_what_nobody_uses_is_found_again_until_it_is_needed() -> None:
    blocks = BlockManager(6, 2)
    blocks.close(filled(blocks, [1, 2, 3, 4, 5]))  # two full blocks and one that begins
    assert blocks.num_free == 6
    other = filled(blocks, [11, 12, 13, 14, 15, 16, 17, 18])  # four blocks: the rest, no more
    again = blocks.open([1, 2, 3, 4, 5])
    assert again is not None
    assert again.num_filled == 4
    blocks.close(again)
    assert blocks.grow(other, 10)
    shorter = blocks.open([1, 2, 3, 4, 5])  # the end of the sequence was given up first
    assert shorter is not None
    assert shorter.num_filled == 2


def test_too_few_blocks_change_nothing() -> None:
    blocks = BlockManager(3, 2)
    table = filled(blocks, [1, 2, 3])
    assert not blocks.grow(table, 7)
    assert len(table.blocks) == 2
    assert blocks.grow(table, 6)


def test_whoever_would_compute_the_same_waits() -> None:
    blocks = BlockManager(10, 2)
    first = blocks.open([1, 2, 3])
    assert first is not None
    blocks.announce(first, [1, 2, 3], 3)
    assert blocks.open([1, 2, 9]) is None
    assert blocks.open([1, 3, 9]) is not None
    blocks.begin_plan()
    assert blocks.open([1, 2, 9]) is not None


def simulate(scheduler: Scheduler, lengths: dict[int, int], check: Callable[[list[Part]], None]) -> list[int]:
    """Runs until all sequences have as many tokens as `lengths` says; the order in which they ended."""
    order = []
    while parts := scheduler.plan():
        check(parts)
        for part in parts:
            sequence, fed = part.sequence, part.sequence.table.num_filled + part.num_new
            if part.reaches_end:
                sequence.tokens.append(1000 * sequence.index + len(sequence.tokens))
            scheduler.blocks.fill(sequence.table, sequence.tokens, fed)
            if len(sequence.tokens) == lengths[sequence.index]:
                scheduler.finish(sequence)
                order.append(sequence.index)
    return order


def sequences(prompts: Iterable[int], num_new: Iterable[int]) -> tuple[list[RunningSequence], dict[int, int]]:
    made = [
        RunningSequence(index, [1000 * index + t for t in range(prompt)], prompt + 40)
        for index, prompt in enumerate(prompts)
    ]
    return made, {index: len(made[index].tokens) + new for index, new in enumerate(num_new)}


@pytest.mark.parametrize("num_blocks", [30, 400])
def test_all_sequences_end_whatever_the_pool(num_blocks: int) -> None:
    generator = random.Random(0)
    prompts = [generator.randint(1, 70) for _ in range(60)]
    waiting, lengths = sequences(prompts, [generator.randint(1, 40) for _ in prompts])
    scheduler = Scheduler(BlockManager(num_blocks, 4), waiting, max_running=8, max_num_tokens=32)

    def check(parts: list[Part]) -> None:
        assert len(parts) <= 8
        assert sum(part.num_new for part in parts) <= 32
        used = [block for part in parts for block in part.sequence.table.blocks]
        assert len(used) == len(set(used))
        for part in parts:
            table = part.sequence.table
            assert len(table.blocks) * 4 >= table.num_filled + part.num_new

    order = simulate(scheduler, lengths, check)
    assert sorted(order) == list(range(60))
    assert (scheduler.num_preempted > 0) == (num_blocks == 30)
    assert scheduler.blocks.num_free == num_blocks
    assert scheduler.running == []


def test_a_sequence_joins_as_soon_as_another_one_ends() -> None:
    waiting, lengths = sequences([5, 5, 5], [3, 20, 4])
    together: list[set[int]] = []
    scheduler = Scheduler(BlockManager(100, 4), waiting, max_running=2, max_num_tokens=64)
    simulate(scheduler, lengths, lambda parts: together.append({part.sequence.index for part in parts}))
    assert together[:3] == [{0, 1}] * 3
    assert together[3] == {1, 2}
    waiting, lengths = sequences([5, 5, 5], [3, 20, 4])
    scheduler = Scheduler(BlockManager(100, 4), waiting, max_running=2, max_num_tokens=64, continuous=False)
    order: list[set[int]] = []
    simulate(scheduler, lengths, lambda parts: order.append({part.sequence.index for part in parts}))
    assert order[3:20] == [{1}] * 17
    assert order[20:] == [{2}] * 4


def test_long_prompts_come_in_parts_beside_running_ones() -> None:
    waiting, lengths = sequences([2, 50], [30, 1])
    steps: list[list[int]] = []
    scheduler = Scheduler(BlockManager(100, 4), waiting, max_running=2, max_num_tokens=16)
    simulate(scheduler, lengths, lambda parts: steps.append([part.num_new for part in parts]))
    assert steps[:5] == [[2, 14], [1, 15], [1, 15], [1, 6], [1]]


def test_steps_ahead_take_the_blocks_that_they_need() -> None:
    waiting, _ = sequences([5, 6], [])
    waiting[1].max_len = 9
    scheduler = Scheduler(BlockManager(5, 4), [*waiting, *sequences([3], [])[0]], max_running=3, max_num_tokens=64)
    for part in scheduler.plan():
        part.sequence.tokens.append(7)
        scheduler.blocks.fill(part.sequence.table, part.sequence.tokens, part.num_new)
    scheduler.finish(scheduler.running[2])
    parts = scheduler.plan()
    assert [part.is_one_step for part in parts] == [True, True]
    assert scheduler.look_ahead(parts, 1) == 1
    assert scheduler.blocks.num_free == 1
    # Eight steps would need four blocks, of which the second sequence, near its end, takes none.
    assert scheduler.look_ahead(parts, 8) == 4
    assert [len(part.sequence.table.blocks) for part in parts] == [3, 2]
    assert scheduler.look_ahead(parts[1:], 8) == 2


def worth(waiting: list[int], num_places: int, num_waited: int = 0) -> bool:
    limits = {"max_running": 16, "max_num_tokens": 1000, "patience": 8}
    return worth_joining(waiting, num_places, num_waited=num_waited, **limits)


def test_when_sequences_join_on_a_gpu() -> None:
    assert not worth([100, 100, 100], 2)
    assert worth([250, 250, 100], 2)  # half a step
    assert not worth([250, 100, 250], 2)  # the last one has no place
    assert worth([1, 1], 2)  # all have a place
    assert not worth([], 2)
    assert not worth([1000], 0, num_waited=9)
    assert not worth([1] * 4, 3)
    assert worth([1] * 5, 4)  # a quarter of the places is empty
    assert not worth([100] * 3, 2, num_waited=7)
    assert worth([100] * 3, 2, num_waited=8)
    assert worth_joining([4096, 1], 1, max_running=16, max_num_tokens=10**6, num_waited=0, patience=8)


def test_patient_sequences_join_in_fewer_steps() -> None:
    """All of them, none later than it may, and nobody waits where everybody has a place."""
    patience = 6
    steps: dict[int, list[list[int]]] = {}
    for bound in (0, patience):
        waiting, lengths = sequences([5] * 60, [3 + index * 7 % 13 for index in range(60)])
        blocks = BlockManager(400, 4)
        scheduler = Scheduler(blocks, waiting, max_running=16, max_num_tokens=96, patience=bound)
        plans: list[list[Part]] = []
        simulate(scheduler, lengths, plans.append)
        steps[bound] = [[part.num_new for part in parts] for parts in plans]
        assert sum(count == 5 for step in steps[bound] for count in step) == 60
    with_prompts = {bound: sum(max(step) > 1 for step in seen) for bound, seen in steps.items()}
    assert with_prompts[patience] < with_prompts[0] * 2 / 3
    assert len(steps[patience]) < len(steps[0]) * 1.2
    first = [max(step) > 1 for step in steps[patience]].index(False)
    assert len(steps[patience][first]) == 16  # nobody waited before the places were taken


def test_patience_ends_also_over_steps_ahead() -> None:
    waiting, _ = sequences([1] * 10, [])
    scheduler = Scheduler(BlockManager(400, 4), waiting, max_running=8, max_num_tokens=64, patience=10)
    for part in scheduler.plan():
        part.sequence.tokens.append(7)
        scheduler.blocks.fill(part.sequence.table, part.sequence.tokens, 1)
    scheduler.finish(scheduler.running[0])
    parts = scheduler.plan()  # two wait for one place
    assert len(parts) == 7
    assert scheduler.look_ahead(parts, 8) == 8
    assert len(scheduler.plan()) == 7
    assert scheduler.look_ahead(parts, 2) == 2
    assert len(scheduler.plan()) == 8


def test_a_common_prompt_is_computed_once() -> None:
    prompt = list(range(20))
    waiting = [RunningSequence(index, [*prompt, 100 + index], 40) for index in range(5)]
    computed: list[int] = []
    scheduler = Scheduler(BlockManager(100, 4), waiting, max_running=8, max_num_tokens=64)
    simulate(scheduler, dict.fromkeys(range(5), 22), lambda parts: computed.extend(part.num_new for part in parts))
    assert computed == [21, 1, 1, 1, 1]
