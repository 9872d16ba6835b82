"""The flags of how an engine is executed, which scripts share, and the record they become."""

from __future__ import annotations

from argparse import Namespace, _ActionsContainer

from gpt.runtime.execution import Execution


def add_execution_flags(parser: _ActionsContainer) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--no_cuda_graphs", action="store_true", help="launch a GPU's kernels one by one")
    parser.add_argument(
        "--batch_invariant", action="store_true", help="no bit of a result depends on the batch; slower"
    )


def read_execution(args: Namespace) -> Execution:
    return Execution(cuda_graphs=not args.no_cuda_graphs, batch_invariant=args.batch_invariant)
