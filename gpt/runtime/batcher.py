"""The decoding loop over a paged cache: sequences join and leave from step to step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from gpt.comm import WAITING
from gpt.errors import ConfigError
from gpt.runtime.batching_config import BatchingConfig
from gpt.runtime.blocks import BlockManager
from gpt.runtime.generate import Generation
from gpt.runtime.logprobs import TokenLogprob
from gpt.runtime.paged_rows import Rows
from gpt.runtime.paged_steps import StepRunner
from gpt.runtime.pool_size import pool_blocks
from gpt.runtime.request import Request
from gpt.runtime.scheduler import Part, RunningSequence, Scheduler
from gpt.runtime.session import PagedSession

# Steps between two looks at what ended and what may join.  A sequence that ends runs on for half as many in the middle,
# a hundredth of a usual text; planning, which the device waits for, costs as much of a step.
STEPS_AHEAD = 8
# Steps that prompts wait for others on a GPU: about half a second, of which nothing is lost but their first tokens'.
_PATIENCE = 32


def generate_paged(
    session: PagedSession,
    request: Request,
    *,
    on_token: Callable[[int, int], None] | None = None,
    on_end: Callable[[int], None] | None = None,
    on_logprobs: Callable[[int, list[TokenLogprob]], None] | None = None,
    batching: BatchingConfig | None = None,
) -> Generation:
    """Continues any number of prompts, as `gpt.runtime.generate.generate` would each of them alone.

    Among several ranks the first one schedules and chooses; the others compute what it tells them and return nothing.

    on_token: called with (row, new token) as tokens come.  on_end, on_logprobs: as there.  Steps in which prompts took
    part count as context_ms.

    Raises ConfigError for prompts the engine cannot take, GptError where the logits are no numbers.
    """
    session.comm.stage = WAITING
    batching = batching or BatchingConfig()
    virtual = request.virtual
    num_blocks, table = 0, None
    if session.comm.rank == 0:
        request.check(session.model, session.build)
        held = session.num_pool_blocks
        num_blocks = pool_blocks(session.model, session.build, session.device, batching, request.longest, held)
        table = None if virtual is None else virtual.table
        if session.batch_invariant and batching.max_draft_len:
            raise ConfigError(
                "drafts are checked by steps of several tokens, which round otherwise than single ones",
                found=f"--batch_invariant with --max_draft_len {batching.max_draft_len}",
                allowed="one of the two",
            )
    num_blocks, table = session.comm.broadcast_object((num_blocks, table))
    session.start_paged(num_blocks, session.build.tokens_per_block)
    steps = StepRunner(session, table)
    if session.comm.rank > 0:
        steps.follow()
        return Generation()
    rows = Rows(
        session,
        request,
        max_draft_len=batching.max_draft_len,
        on_token=on_token,
        on_end=on_end,
        on_logprobs=on_logprobs,
    )
    scheduler = Scheduler(
        BlockManager(num_blocks, session.build.tokens_per_block, sharing=not session.batch_invariant),
        rows.waiting(),
        max_running=session.build.max_batch_size,
        max_num_tokens=session.build.max_num_tokens,
        continuous=session.build.use_inflight_batching,
        draft=rows.draft if batching.max_draft_len else None,
        independent=session.batch_invariant,
        patience=_PATIENCE if steps.runs_ahead else 0,
    )
    run = _run_ahead if steps.runs_ahead and rows.takes_likeliest else _run
    run(scheduler, steps, rows)
    steps.end()
    return rows.result


def _run(scheduler: Scheduler, steps: StepRunner, rows: Rows) -> None:
    """Steps one by one, the same for all sequences."""
    begin = time.perf_counter()
    while parts := scheduler.plan():
        ended = rows.advance(parts, steps.run(parts))
        _account(scheduler, parts, ended)
        begin = rows.count_time(begin, context=any(part.num_new > 1 for part in parts))


def _run_ahead(scheduler: Scheduler, steps: StepRunner, rows: Rows) -> None:
    """Where the device can choose tokens itself: sequences that are generating run several steps that the host only
    reads, or one beside a step of prompts, which the host prepares meanwhile."""
    begin = time.perf_counter()
    while True:
        running = scheduler.plan_running()
        ahead = [part for part in running if part.is_one_step]
        others = [part for part in running if not part.is_one_step]
        joins = scheduler.lets_join()
        results: Iterator[tuple[list[int], list[float]]] = iter(())
        if ahead:
            num_steps = 1 if joins or others else scheduler.look_ahead(ahead, STEPS_AHEAD)
            results = steps.run_ahead(ahead, num_steps)
        if joins:
            others += scheduler.join()
        if not ahead and not others:
            return
        logits = steps.run(others) if others else None
        ended: list[RunningSequence] = []
        for tokens, largest in results:
            ended += rows.take(ahead, tokens, largest)
            if logits is None:
                begin = rows.count_time(begin, context=False)
        if logits is not None:
            ended += rows.advance(others, logits)
            begin = rows.count_time(begin, context=True)
        _account(scheduler, ahead + others, ended)


def _account(scheduler: Scheduler, parts: Sequence[Part], ended: Sequence[RunningSequence]) -> None:
    """What a step has left in the blocks, and who leaves."""
    for part in parts:
        sequence = part.sequence
        filled = len(sequence.tokens) - 1 if part.reaches_end else sequence.table.num_filled + part.num_new
        scheduler.blocks.fill(sequence.table, sequence.tokens, filled)
    for sequence in ended:
        scheduler.finish(sequence)
