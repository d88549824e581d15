"""The command line: ``python -m fastlogits demo``, ``explain``, ``check`` and ``doctor``."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from inspect import isroutine
from pathlib import Path
from typing import Any, NoReturn

_PROCESSORS = """\
a Python expression with the names of fastlogits, such as 'TemperatureLogitsWarper(0.7), TopKLogitsWarper(50)', or
module:name, a list of processors or a function that returns one"""


class _Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Leave with status 2."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: the command and its options; by default those of the process.

    Returns:
        The exit status: 1 where a check or the self-test finds something wrong.

    Raises:
        SystemExit: with status 2, and a line on stderr, where an argument is wrong or nothing could be compared.
    """
    parser = _Parser(prog="python -m fastlogits", description="Logits processors at the speed of memory.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="a chat model that answers with a list, and the processor that stops it")
    demo.add_argument("--model", help="path or hub id of a causal LM with a chat template; default: one trained here")
    demo.add_argument("--device", default="cpu", help="where the model runs: cpu (default), cuda, cuda:1, ...")
    explain = commands.add_parser("explain", help="the plan of a list: steps, merges and their laws, bytes")
    explain.add_argument("processors", help=_PROCESSORS)
    explain.add_argument("--bandwidth", type=_speed, help="GB/s of the GPU's memory, to tell the least time")
    explain.add_argument("--html", metavar="FILE", help="write it as HTML")
    check = commands.add_parser("check", help="run a list through transformers and as a plan, and compare")
    check.add_argument("processors", help=_PROCESSORS)
    check.add_argument("--inputs", metavar="FILE", help="(input_ids, scores) as torch.save wrote them; default: random")
    check.add_argument("--prompt-length", type=_whole(0), help="tokens of the prompt, for first-step processors")
    check.add_argument(
        "--history", type=_whole(0), default=64, help="tokens so far of random inputs; default: %(default)s"
    )
    check.add_argument("--seed", type=_whole(0, 2**63 - 1), default=0, help="of the random inputs")
    check.add_argument("--device", default=None, help="default: cuda where there is one, else cpu")
    for command, batch in ((explain, 64), (check, 4)):
        command.add_argument("--batch", type=_whole(1), default=batch, help="rows of logits; default: %(default)s")
        command.add_argument(
            "--vocab", type=_whole(1), default=128256, help="tokens of the vocabulary; default: %(default)s"
        )
        command.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    doctor = commands.add_parser("doctor", help="versions, devices, the path that will run, and a self-test")
    doctor.add_argument("--device", default=None, help="default: cuda where there is one, else cpu")
    options = parser.parse_args(arguments)
    # What a command needs is imported for it alone.
    run = {"demo": _demo, "explain": _explain, "check": _check, "doctor": _doctor}[options.command]
    return run(parser, options)


def _whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """What reads an integer of an option."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low or (high is not None and value > high):
            most = "" if high is None else f" and at most {high}"
            raise argparse.ArgumentTypeError(f"must be an integer of at least {low}{most}, got {text!r}")
        return value

    return read


def _speed(text: str) -> float:
    """A speed in GB/s."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be GB/s, a finite number above 0, got {text!r}")
    return value


def _demo(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    device = _device(parser, options.device)
    from fastlogits.demo.chat import load, show

    if options.model is None:
        show(None, str(device))
        return 0
    try:
        loaded = load(options.model)
    except (OSError, ValueError) as error:  # transformers knows no such model, or what is there is none
        parser.error(f"--model must be a path or hub id of a causal LM, got {options.model!r}: {error}")
    show(loaded, str(device))
    return 0


def _explain(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    import torch

    from fastlogits.plan import Plan
    from fastlogits.processors.base import member_of

    plan = Plan.compile(map(member_of, _processors(parser, options.processors)))
    bandwidth = None if options.bandwidth is None else options.bandwidth * 1e9
    explanation = plan.explain((options.batch, options.vocab), getattr(torch, options.dtype), bandwidth)
    if options.html is not None:
        page = f"<!doctype html><meta charset='utf-8'><title>plan</title>{explanation.html}\n"
        try:
            Path(options.html).write_text(page)
        except OSError as error:
            parser.error(f"--html must be a file that can be written, got {options.html!r}: {error.strerror}")
    print(explanation)
    return 0


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    import torch

    from fastlogits.inside.checking import check
    from fastlogits.run import UnknownRunStartError

    device = _device(parser, options.device)
    if options.inputs is not None:
        input_ids, scores = _inputs(parser, options.inputs, device)
    else:
        generator = torch.Generator().manual_seed(options.seed)
        scores = (torch.randn(options.batch, options.vocab, generator=generator) * 3).to(device)
        scores = scores.to(getattr(torch, options.dtype))
        most = min(options.vocab, 200)  # so that tokens and n-grams come again
        input_ids = torch.randint(0, most, (options.batch, options.history), generator=generator).to(device)
    processors = _processors(parser, options.processors)
    try:
        outcome = check(processors, input_ids, scores, prompt_length=options.prompt_length)
    except UnknownRunStartError as error:
        parser.error(f"--prompt-length must say where the run starts, got none: {str(error).partition(':')[0]}")
    except ValueError as error:  # scores that are none, a position that can't be
        parser.error(str(error))
    if outcome.compared_nothing:
        parser.error("; ".join(str(outcome).splitlines()))
    print(outcome)
    return 0 if outcome else 1


def _inputs(parser: argparse.ArgumentParser, path: str, device: Any) -> tuple[Any, Any]:
    """The tensors in a file."""
    import torch

    wanted = "--inputs must be a file with (input_ids, scores), two tensors as torch.save wrote them"
    try:
        found = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # no such file, or anything in it: torch raises half a dozen types
        parser.error(f"{wanted}, got {path!r}: {(str(error) or type(error).__name__).splitlines()[0]}")
    is_pair = isinstance(found, (tuple, list)) and len(found) == 2
    if not (is_pair and all(isinstance(each, torch.Tensor) for each in found)):
        parser.error(f"{wanted}, got {path!r} with {type(found).__name__}")
    return found[0], found[1]


def _doctor(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    from fastlogits.inside.doctor import findings

    good = True
    for finding in findings(_device(parser, options.device)):
        print(f"{'' if finding.good else 'WRONG  '}{finding.subject}: {finding.found}", flush=True)
        good = good and finding.good
    return 0 if good else 1


def _device(parser: argparse.ArgumentParser, name: str | None) -> Any:
    """The device that an option names, if torch can use it."""
    import torch

    from fastlogits.checks import device_of

    try:
        return device_of("--device", name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except ValueError as error:
        parser.error(str(error))


def _processors(parser: argparse.ArgumentParser, text: str) -> list[Any]:
    """The processors that an argument names."""
    import fastlogits
    from fastlogits.causes import checked_processors

    module, colon, name = text.partition(":")
    try:
        if colon and module.replace(".", "").isidentifier() and name.isidentifier():
            found = getattr(import_module(module), name)
            found = found() if isroutine(found) else found
        else:
            names = {public: getattr(fastlogits, public) for public in dir(fastlogits) if public in text}
            found = eval(text, names)
    except Exception as error:
        parser.error(
            f"processors must be an expression or module:name, got {text!r}: {type(error).__name__}: {error}; an "
            "expression is such as 'TopKLogitsWarper(50), TopPLogitsWarper(0.9)'"
        )
    try:
        return list(checked_processors(found if isinstance(found, Iterable) else [found]))
    except (ValueError, AttributeError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
