"""The command line: ``python -m fastlogits demo``."""

from __future__ import annotations

import argparse


def main(arguments: list[str] | None = None) -> None:
    """Run a command.

    Args:
        arguments: the command and its options; by default those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m fastlogits", description="Logits processors at the speed of memory."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="a chat model that answers with a list, and the processor that stops it")
    demo.add_argument("--model", help="path or hub id of a causal LM with a chat template; default: one trained here")
    demo.add_argument("--device", default="cpu", help="where the model runs: cpu (default), cuda, cuda:1, ...")
    options = parser.parse_args(arguments)

    from fastlogits.demo.chat import show  # rich, transformers and the model load for the demo only

    show(options.model, options.device)


if __name__ == "__main__":
    main()
