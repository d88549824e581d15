"""The figures in the documents, written from the results files.

A document marks where they go, and ``python -m benchmarks readme`` fills what stands between the marks:

    <!-- benchmarks: gpu -->
    <!-- /benchmarks -->
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from fastlogits_kernels.rules import ORDERS, RULES, argument_of

from benchmarks.catalogue import catalogue
from benchmarks.folders import PUBLISHED
from benchmarks.inputs import MANY_IDS, MEANINGS
from benchmarks.long_histories import LENGTHS
from benchmarks.matrix import markdown
from benchmarks.results import Record, newest, read_folder, read_rows, slug
from benchmarks.tables import METRICS
from benchmarks.workloads import COPY, FAST, FAST_, FAST_COPIED_, LOOP, OURS, THEIRS, WORKLOADS, YARDSTICKS
from fastlogits import BatchProcessor

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", *(f"docs/{name}.md" for name in ("benchmarks", "processors", "rules", "serving", "testing")))
_RAW = "https://raw.githubusercontent.com/fastlogits/fastlogits/main/"
"""Where a package index finds pictures."""
_REGION = re.compile(r"(<!-- benchmarks: (\S+) -->\n).*?(<!-- /benchmarks -->)", re.DOTALL)

_SIZES = ((1, 128256), (8, 128256), (64, 128256), (256, 151936))
_CPU_SIZES = ((1, 32000), (8, 32000), (1, 128256), (8, 128256), (64, 128256))
_LOGITS = ("gauss", "zipf", "mixture", "flat")
MEANS: dict[str, str] = {
    "first step": "tokens forbidden at the first step",
    "later step": "tokens forbidden at the first step, at a later one",
    "chain 1": "temperature",
    "chain 3": "repetition penalty, first tokens, temperature",
    "chain 5": "repetition penalty, first tokens, temperature, top-k 50, top-p 0.9",
    "chain 6": "repetition, 3-grams, bad words, lengths, first tokens, temperature",
    "chain 9": "repetition, 3-grams, bad words, lengths, first tokens, temperature, top-k 50, top-p 0.9, min-p 0.05",
    "T k p": "temperature, top-k 50, top-p 0.9",
    "T p": "temperature, top-p 0.9",
    "T min-p": "temperature, min-p 0.05",
    "T typical": "temperature, typical 0.9",
    "T large k": "temperature, top-k 2000",
    "draw T k p": "temperature, top-k 50, top-p 0.9, sampling included",
    "draw T p": "temperature, top-p 0.9, sampling included",
    "draw T": "temperature, sampling included",
    "serving": "a serving batch, each request with its own parameters",
    "serving tokens": "a serving batch, each request with its own parameters, sampling included",
    "bitmask": "a grammar's bitmask, half of its bits, in place",
}
MEANS |= {
    f"serving {kind} logprobs, top {most}": f"a serving batch, {kind} log-probabilities, the {most} likeliest" if most
    else f"a serving batch, {kind} log-probabilities"
    for kind in ("raw", "processed") for most in (0, 5, 20)
}  # fmt: skip
for _length in LENGTHS:
    MEANS[f"serving, {_length} tokens"] = f"a serving batch, histories of {_length:,} tokens"
    MEANS[f"list, {_length} tokens"] = f"a list of processors, histories of {_length:,} tokens"


def fill(results: Path, write: bool = True, root: Path = ROOT) -> list[Path]:
    """Fill the marked regions of all documents.

    Args:
        results: the folder of the results files.
        write: whether to write what is new; else it is only told.
        root: the folder of the documents.

    Returns:
        The documents whose figures were not up to date.

    Raises:
        ValueError: a document asks for a region that there is none of.
    """
    records = [record for record in newest(read_folder(results)) if record.cache == "warm"]
    stale = []
    for name in DOCUMENTS:
        path = root / name
        before = path.read_text()
        after = _filled(path, before, records)
        if after != before:
            stale.append(path)
            if write:
                path.write_text(after)
    return stale


def _filled(document: Path, text: str, records: Sequence[Record]) -> str:
    def region(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        if name not in REGIONS:
            raise ValueError(f"{document}: there is no region {name!r}; there are {', '.join(REGIONS)}")
        return f"{begin}{REGIONS[name](records)}\n{end}"

    return _REGION.sub(region, text)


def _of_newest_device(records: Sequence[Record], metric: str) -> list[Record]:
    """The records of a metric on the device that was measured last."""
    chosen = [record for record in records if record.metric == metric and record.median is not None]
    if not chosen:
        return []
    device = max(chosen, key=lambda record: record.timestamp).device
    return [record for record in chosen if record.device == device]


def _us(us: float | None) -> str:
    if us is None:
        return ""
    return f"{us:.1f}" if us < 10 else f"{us:,.0f}"


def _figure(logits: str, us: float | None) -> str:
    """A figure, with the name of its logits unless most rows have these."""
    return _us(us) if logits in _LOGITS[:2] else f"{logits} {_us(us)}"


def _plot(records: Sequence[Record]) -> str:
    """The speed-ups of the newest GPU, else of the newest processor."""
    for metric in ("gpu_us", "cpu_us"):
        found = _of_newest_device(records, metric)
        if found:
            name = f"{slug(found[0].device)}-headline-{metric.removesuffix('_us')}.png"
            text = (
                f"Time of a step with transformers, other packages and fastlogits on {found[0].device}, lower is better"
            )
            return f"![{text}]({_RAW}benchmarks/results/{name})"
    return ""


def _table(
    metric: str, sizes: Sequence[tuple[int, int]], workloads: Sequence[str]
) -> Callable[[Sequence[Record]], str]:
    """A table of a metric: a row for each workload and contender, a column for each size."""

    def table(records: Sequence[Record]) -> str:
        found = _of_newest_device(records, metric)
        found = [r for r in found if (r.batch, r.vocab) in sizes and r.ids < MANY_IDS]
        shown = [name for name in workloads if any(r.workload == name and r.contender in OURS for r in found)]
        if not shown:
            return "Not measured yet."
        head = "".join(f" {batch} x {vocab} |" for batch, vocab in sizes)
        lines = [_caption(found, metric, shown), "", f"| work | by |{head}", f"|---|---|{'---:|' * len(sizes)}"]
        for name in shown:
            of_workload = [r for r in found if r.workload == name]
            for ids, dtype in sorted(
                {(r.ids, r.dtype) for r in of_workload}, key=lambda key: (key[0], key[1] != "float32")
            ):
                group = [r for r in of_workload if (r.ids, r.dtype) == (ids, dtype)]
                lines += _rows(name, ids, dtype, group, sizes)
        return "\n".join(lines)

    return table


def _rows(name: str, ids: int, dtype: str, records: Sequence[Record], sizes: Sequence[tuple[int, int]]) -> list[str]:
    work = MEANS.get(name, name) + (f", {ids:,} ids" if ids else "") + ("" if dtype == "float32" else f", {dtype}")
    rows = []
    for contender in _in_order({r.contender for r in records}):
        cells = []
        for size in sizes:
            by_logits = {r.logits: r.median for r in records if r.contender == contender and (r.batch, r.vocab) == size}
            if contender in YARDSTICKS:  # which don't look at the logits
                by_logits = dict(list(by_logits.items())[:1])
            cells.append(" / ".join(_figure(logits, by_logits[logits]) for logits in _LOGITS if logits in by_logits))
        if any(cells):
            bold = "**" if contender in OURS else ""
            rows.append(f"| {work} | {bold}{contender}{bold} |{''.join(f' {cell} |' for cell in cells)}")
            work = ""
    return rows


def _in_order(contenders: set[str]) -> list[str]:
    """The published loop and transformers, others, ours, a copy; other yardsticks are left out."""
    first = [name for name in (LOOP, THEIRS) if name in contenders]
    ours = [name for name in (FAST, FAST_, FAST_COPIED_) if name in contenders]
    copy = [COPY] if COPY in contenders else []
    return first + sorted(contenders - {*first, *OURS, *YARDSTICKS} - _parts(contenders)) + ours + copy


def _parts(contenders: set[str]) -> set[str]:
    return {name for name in contenders if name.endswith(" alone")}


def _caption(records: Sequence[Record], metric: str, workloads: Sequence[str]) -> str:
    chosen = [r for r in records if r.workload in workloads]
    last = max(chosen, key=lambda r: r.timestamp)
    threads = f", {last.threads} threads" if metric == "cpu_us" else ""
    kinds = [kind for kind in _LOGITS if any(r.logits == kind for r in chosen)]
    meanings = "; ".join(f"{kind}: {MEANINGS[kind]}" for kind in kinds)
    several = f"; a cell has {' / '.join(_LOGITS[:2])}, and other kinds of logits by name" if len(kinds) > 1 else ""
    commits = " and ".join(dict.fromkeys(r.commit for r in sorted(chosen, key=lambda r: r.timestamp)))
    versions = f"torch {last.torch}" + (f", Triton {last.triton}" if last.triton and metric != "cpu_us" else "")
    return (
        f"{last.device}{threads}, {METRICS[metric]}, medians in microseconds{several} "
        f"({meanings}; {versions}, transformers {last.transformers or 'not noted'}; commit {commits}):"
    )


def _slots(records: Sequence[Record]) -> str:
    """The bytes of a slot, for batches of two sizes."""
    sizes = ((128256, 4096), (151936, 32768))
    batches = [BatchProcessor(1, vocab, "cpu", max_length=length) for vocab, length in sizes]
    head = "".join(f" {vocab} tokens, `max_length` {length} |" for vocab, length in sizes)
    parts = {part: [batch.bytes_per_slot[part] for batch in batches] for part in batches[0].bytes_per_slot}
    parts["workspace, for each row of a step"] = [batch.bytes_per_row for batch in batches]
    rows = (f"| {part} |{''.join(f' {count:,} |' for count in counts)}" for part, counts in parts.items())
    return "\n".join([f"| bytes of a slot |{head}", f"|---|{'---:|' * len(sizes)}", *rows])


_DROPS = {
    "top_n_sigma": "less than the largest logit minus n standard deviations of the row",
    "top_h": "all but the likeliest tokens, up to a share of the entropy",
    "top_k": "all but the k likeliest tokens",
    "top_p": "all but the fewest likeliest tokens whose probabilities add up to at least p",
    "min_p": "less than p times the largest probability",
    "top_a": "less than a times the square of the largest probability",
    "typical": "all but the tokens nearest to the entropy, up to a mass",
    "epsilon": "less than epsilon",
    "eta": "less than eta, or than its square root times exp(-entropy), whichever is less",
}


def _rules(records: Sequence[Record]) -> str:
    """The table of rules, and their orders."""
    needs = ("nothing", "the mass", "the mass, the entropy", "the mass, the entropy, the deviation")
    lines = ["| rule | argument | drops | allowed | needs of the row first |", "|---|---|---|---|---|"]
    for kind, spec in RULES.items():
        name, allowed = kind.replace("_", "-"), spec.range.words
        lines.append(f"| {name} | `{argument_of(kind)}` | {_DROPS[kind]} | {allowed} | {needs[spec.sums]} |")
    lines += ["", "| stack | order |", "|---|---|"]
    lines += [f"| {stack} | {', '.join(kind.replace('_', '-') for kind in order)} |" for stack, order in ORDERS.items()]
    return "\n".join(lines)


_WAYS = {
    "transformers": "transformers",
    "fl.accelerate": "`fl.accelerate`",
    "transformers, static cache, compiled forward": "transformers, static cache, compiled forward pass",
    "fl.accelerate, static cache, compiled forward": "the same under `fl.accelerate`",
    "custom_generate=fl.decode": "**`custom_generate=fl.decode`**",
    "custom_generate=fl.decode, compile=True": "**`custom_generate=fl.decode`, `compile=True`**",
    "greedy, no processors": "transformers, greedy, no processors",
    "custom_generate=fl.decode, greedy, no processors": "`fl.decode`, greedy, no processors",
    "fl.decode, text that repeats itself": "`fl.decode`, a text that repeats itself",
    "fl.decode, the same with prompt_lookup_num_tokens=8": "the same with `prompt_lookup_num_tokens=8`",
}
"""The ways to generate that are shown, in order."""


_MAIN_WAYS = (
    "transformers", "transformers, static cache, compiled forward", "custom_generate=fl.decode",
    "custom_generate=fl.decode, compile=True",
)  # fmt: skip
"""Those of the README."""


def _generate(ways: Iterable[str]) -> str:
    """Microseconds of a decoding step, a column for each batch, of the run that was published last."""
    rows = [row for path in sorted((PUBLISHED / "generate").glob("*-phases.csv")) for row in read_rows(path)]
    if not rows:
        return "Not measured yet."
    last = max(row["timestamp"] for row in rows)
    rows = [row for row in rows if row["timestamp"] == last]
    batches = sorted({int(row["batch"]) for row in rows})
    steps = {(row["contender"], int(row["batch"])): float(row["decode_step_us"]) for row in rows}
    one = rows[0]
    lines = [
        f"{one['device']}, torch {one['torch']}, transformers {one['transformers']}, commit {one['commit']}; in "
        "brackets: times as fast as plain transformers:",
        "",
        "| by |" + "".join(f" batch {batch} |" for batch in batches),
        "|---|" + "---:|" * len(batches),
    ]
    for contender in ways:
        if any((contender, batch) in steps for batch in batches):
            cells = [_step(steps, contender, batch) for batch in batches]
            lines.append(f"| {_WAYS[contender]} |{''.join(f' {cell} |' for cell in cells)}")
    return "\n".join(lines)


def _step(steps: Mapping[tuple[str, int], float], contender: str, batch: int) -> str:
    if (contender, batch) not in steps:
        return "not measured"
    time = steps[contender, batch]
    return f"{time:,.0f} ({steps[THEIRS, batch] / time:.1f} x)" if (THEIRS, batch) in steps else f"{time:,.0f}"


_ALL = tuple(name for name, workload in WORKLOADS.items() if workload.main)
REGIONS: dict[str, Callable[[Sequence[Record]], str]] = {
    "plot": _plot,
    "short": _table("gpu_us", _SIZES, ("chain 5", "T k p", "draw T k p")),
    "gpu-all": _table("gpu_us", _SIZES, _ALL),
    "host-all": _table("host_us", _SIZES, _ALL),
    "cpu-all": _table("cpu_us", _CPU_SIZES, _ALL),
    "processors": lambda records: catalogue(),
    "generate": lambda records: _generate(_WAYS),
    "generate-short": lambda records: _generate(_MAIN_WAYS),
    "rules": _rules,
    "slots": _slots,
    "matrix": lambda records: markdown(),
    "cpu-classes": _table(
        "cpu_us", _CPU_SIZES, tuple(name for name, workload in WORKLOADS.items() if not workload.main)
    ),
}
"""What a document can ask for."""
