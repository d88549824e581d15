"""The command line: ``python -m fastlogits demo``, ``explain``, ``check`` and ``doctor``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from importlib import import_module
from typing import Any

_PROCESSORS = """\
a Python expression with the names of fastlogits, such as 'TemperatureLogitsWarper(0.7), TopKLogitsWarper(50)', or
module:name, a list of processors or a function that returns one"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: the command and its options; by default those of the process.

    Returns:
        The exit status: 1 where a check or the self-test finds something wrong.
    """
    parser = argparse.ArgumentParser(
        prog="python -m fastlogits", description="Logits processors at the speed of memory."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="a chat model that answers with a list, and the processor that stops it")
    demo.add_argument("--model", help="path or hub id of a causal LM with a chat template; default: one trained here")
    demo.add_argument("--device", default="cpu", help="where the model runs: cpu (default), cuda, cuda:1, ...")
    explain = commands.add_parser("explain", help="the plan of a list: steps, merges and their laws, bytes")
    explain.add_argument("processors", help=_PROCESSORS)
    explain.add_argument("--bandwidth", type=float, help="GB/s of the GPU's memory, to tell the least time")
    explain.add_argument("--html", metavar="FILE", help="write it as HTML")
    check = commands.add_parser("check", help="run a list through transformers and as a plan, and compare")
    check.add_argument("processors", help=_PROCESSORS)
    check.add_argument("--inputs", metavar="FILE", help="(input_ids, scores) as torch.save wrote them; default: random")
    check.add_argument("--prompt-length", type=int, help="tokens of the prompt, for first-step processors")
    check.add_argument("--history", type=int, default=64, help="tokens so far of random inputs; default: %(default)s")
    check.add_argument("--seed", type=int, default=0, help="of the random inputs")
    check.add_argument("--device", default=None, help="default: cuda where there is one, else cpu")
    for command, batch in ((explain, 64), (check, 4)):
        command.add_argument("--batch", type=int, default=batch, help="rows of logits; default: %(default)s")
        command.add_argument("--vocab", type=int, default=128256, help="tokens of the vocabulary; default: %(default)s")
        command.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    doctor = commands.add_parser("doctor", help="versions, devices, the path that will run, and a self-test")
    doctor.add_argument("--device", default=None, help="default: cuda where there is one, else cpu")
    options = parser.parse_args(arguments)
    # What a command needs is imported for it alone.
    run = {"demo": _demo, "explain": _explain, "check": _check, "doctor": _doctor}[options.command]
    return run(parser, options)


def _demo(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    from fastlogits.demo.chat import show

    show(options.model, options.device)
    return 0


def _explain(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    import torch

    from fastlogits.inside.members import fresh_members
    from fastlogits.plan import Plan

    plan = Plan.compile(fresh_members(_processors(parser, options.processors)))
    bandwidth = None if options.bandwidth is None else options.bandwidth * 1e9
    explanation = plan.explain((options.batch, options.vocab), getattr(torch, options.dtype), bandwidth)
    print(explanation)
    if options.html is not None:
        from pathlib import Path

        Path(options.html).write_text(f"<!doctype html><meta charset='utf-8'><title>plan</title>{explanation.html}\n")
    return 0


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    import torch

    from fastlogits.inside.checking import check

    device = _device(options.device)
    if options.inputs is not None:
        input_ids, scores = torch.load(options.inputs, map_location=device, weights_only=True)
    else:
        generator = torch.Generator().manual_seed(options.seed)
        scores = (torch.randn(options.batch, options.vocab, generator=generator) * 3).to(device)
        scores = scores.to(getattr(torch, options.dtype))
        most = min(options.vocab, 200)  # so that tokens and n-grams come again
        input_ids = torch.randint(0, most, (options.batch, options.history), generator=generator).to(device)
    processors = _processors(parser, options.processors)
    outcome = check(processors, input_ids, scores, prompt_length=options.prompt_length)
    print(outcome)
    return 0 if outcome else 1


def _doctor(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    from fastlogits.inside.doctor import findings

    good = True
    for finding in findings(_device(options.device)):
        print(f"{'' if finding.good else 'WRONG  '}{finding.subject}: {finding.found}", flush=True)
        good = good and finding.good
    return 0 if good else 1


def _device(name: str | None) -> Any:
    import torch

    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _processors(parser: argparse.ArgumentParser, text: str) -> list[Any]:
    """The processors that an argument names."""
    import fastlogits

    module, colon, name = text.partition(":")
    try:
        if colon and module.replace(".", "").isidentifier() and name.isidentifier():
            found = getattr(import_module(module), name)
            found = found() if callable(found) and not hasattr(found, "apply_") else found
        else:
            names = {public: getattr(fastlogits, public) for public in dir(fastlogits) if public in text}
            found = eval(text, names)
    except Exception as error:
        parser.error(f"processors: {text!r} is neither an expression nor module:name: {type(error).__name__}: {error}")
    return list(found) if isinstance(found, Iterable) else [found]


if __name__ == "__main__":
    sys.exit(main())
