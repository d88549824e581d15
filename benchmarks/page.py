"""One page of HTML with the plots and tables of a folder's files; it loads nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from benchmarks.documents import MEANS
from benchmarks.inputs import MEANINGS
from benchmarks.results import Record, newest, read_folder, slug
from benchmarks.tables import METRICS
from benchmarks.workloads import OURS, YARDSTICKS

_HEAD = (
    "<meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>Benchmarks of fastlogits</title>"
)
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; font-size: 13px }
td, th { padding: .15rem .6rem; border-bottom: 1px solid #ddd; text-align: right }
td:first-child, th:first-child { text-align: left }
.ours td { font-weight: 600 } .yardstick td { color: #777 } .remark { color: #a40000 }
img, svg { max-width: 100%; height: auto } table { display: block; overflow-x: auto }
.contents { font-size: 13px } small { color: #666 } svg { background: #fff; display: block; margin: 1rem 0 }
@media (prefers-color-scheme: dark) {
  body { background: #14181d; color: #dde3ea } a { color: #7db8ff } td, th { border-color: #39424d }
  small, .yardstick td { color: #9aa6b2 } .remark { color: #ff9a8b }
}
"""


def write(folder: Path) -> Path:
    """Write ``report.html`` into the folder, from its results files and plots."""
    records = newest(read_folder(folder))
    devices = _in_order(records)
    body = ["<h1>Benchmarks of fastlogits</h1>", "<p>Medians in microseconds: lower is better.</p>"]
    kinds = (f"<li>{escape(name)}: {escape(meaning)}</li>" for name, meaning in MEANINGS.items())
    body.append(f"<p>Kinds of logits:</p><ul>{''.join(kinds)}</ul>")
    body.append(f"<p>Tables:</p>{_contents(records, devices)}")
    for device in devices:
        body += _device(folder, device, [record for record in records if record.device == device])
    path = folder / "report.html"
    start = f"<!doctype html><html lang='en'>{_HEAD}<style>{_STYLE}</style>"
    path.write_text(f"{start}{''.join(body)}</html>\n")
    return path


def _in_order(records: Sequence[Record]) -> list[str]:
    """The devices: GPUs first, the one that was measured last before the others."""
    last: dict[str, tuple[bool, str]] = {}
    for record in records:
        last[record.device] = max(last.get(record.device, (False, "")), (record.metric == "gpu_us", record.timestamp))
    return sorted(last, key=lambda device: last[device], reverse=True)


def _contents(records: Sequence[Record], devices: Sequence[str]) -> str:
    """Links to all tables, by device."""
    parts = []
    for device in devices:
        workloads = dict.fromkeys(record.workload for record in records if record.device == device)
        links = "; ".join(
            f"<a href='#{_anchor(device, name)}'>{escape(MEANS.get(name, name))}</a>" for name in workloads
        )
        parts.append(f"<li><a href='#{slug(device)}'>{escape(device)}</a>: {links}</li>")
    return f"<ul class='contents'>{''.join(parts)}</ul>"


def _anchor(device: str, workload: str) -> str:
    return f"{slug(device)}-{slug(workload)}"


def _device(folder: Path, device: str, records: Sequence[Record]) -> list[str]:
    made_with = dict.fromkeys(
        f"commit {r.commit}, {r.timestamp[:10]}: Python {r.python}, torch {r.torch}, Triton {r.triton or 'none'}, "
        f"transformers {r.transformers or 'not noted'}, {r.threads or 'unknown'} threads"
        for r in records
    )
    parts = [
        f"<h2 id='{slug(device)}'>{escape(device)}</h2>",
        "<p><small>",
        "<br>".join(map(escape, made_with)),
        "</small></p>",
    ]
    images = folder.glob(f"{slug(device)}-*.svg")
    for image in sorted(images, key=lambda image: ("-headline-" not in image.name, image.name)):  # the headline first
        drawn = image.read_text()
        parts.append(drawn[drawn.index("<svg") :])
    tables: dict[tuple[object, ...], list[Record]] = {}
    for record in records:
        key = (record.workload, record.metric, record.ids, record.logits, record.dtype, record.cache)
        tables.setdefault(key, []).append(record)
    linked: set[str] = set()
    for (workload, metric, ids, logits, dtype, cache), group in tables.items():
        what = f"{MEANS.get(str(workload), str(workload))}{f', {ids} ids' if ids else ''}: {METRICS[str(metric)]}"
        at = "" if str(workload) in linked else f" id='{_anchor(device, str(workload))}'"
        linked.add(str(workload))
        parts.append(f"<h3{at}>{escape(what)}</h3><small>{logits} {dtype}, {cache}</small>{_table(group)}")
    return parts


def _table(records: Sequence[Record]) -> str:
    sizes = sorted({(record.vocab, record.batch) for record in records})
    head = "".join(f"<th>{batch} x {vocab}</th>" for vocab, batch in sizes)
    rows = [f"<tr><th></th>{head}</tr>"]
    for contender in dict.fromkeys(record.contender for record in records):
        by_size = {(r.vocab, r.batch): r for r in records if r.contender == contender}
        kind = "ours" if contender in OURS else "yardstick" if contender in YARDSTICKS else ""
        cells = "".join(f"<td>{_cell(by_size[size]) if size in by_size else ''}</td>" for size in sizes)
        rows.append(f"<tr class='{kind}'><td>{escape(contender)}</td>{cells}</tr>")
    limits = {(r.vocab, r.batch): r.limit_us for r in records if r.limit_us and r.metric != "host_us"}
    if limits:
        cells = "".join(f"<td>{f'{limits[size]:,.1f}' if size in limits else ''}</td>" for size in sizes)
        rows.append(f"<tr class='yardstick'><td>memory-bandwidth limit</td>{cells}</tr>")
    return f"<table>{''.join(rows)}</table>"


def _cell(record: Record) -> str:
    if record.median is None:
        return f"<span class='remark' title='{escape(record.remark)}'>{escape(record.remark.partition(':')[0])}</span>"
    spread = "" if record.p10 is None else f"10 % {record.p10:,.2f}, 90 % {record.p90:,.2f}"
    peak = "" if record.peak_bytes is None else f"; peak memory {record.peak_bytes / 2**20:,.1f} MiB"
    return f"<span title='{spread}{peak}'>{record.median:,.1f}</span>"
