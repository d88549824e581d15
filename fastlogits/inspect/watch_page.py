"""The page of a watched generation: data as JSON, and a template that draws it without anything from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import fastlogits
from fastlogits.inspect.trace import short_name
from fastlogits.token_text import UNREADABLE, token_names, token_texts

if TYPE_CHECKING:
    from fastlogits.inspect.candidates import Change
    from fastlogits.inspect.watch import Call, Processor, Step

_PARTS = 1_000_000
"""Probabilities stand in the page as integers, in millionths."""
_PROMPT_CHARACTERS = 6000
"""More of a prompt is left out in the middle."""


def page(calls: Sequence[Call], tokenizer: Any = None) -> str:
    """The page of some calls.

    Args:
        calls: the calls.
        tokenizer: to show tokens as text; None to show ids.
    """
    template = files("fastlogits.inspect").joinpath("watch.html").read_text(encoding="utf-8")
    text = json.dumps(_Data(tokenizer).of(calls), separators=(",", ":"), ensure_ascii=False)
    # Nothing in the data can end the element that it stands in.
    return template.replace("__DATA__", text.replace("<", "\\u003c"))


class _Data:
    """What the page draws, compactly: texts and processors once, and by their places after that.

    Args:
        tokenizer: to show tokens as text; None to show ids.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._texts: list[str | None] = [] if tokenizer is None else token_texts(tokenizer)
        self._names: dict[int, str] = {} if tokenizer is None else token_names(tokenizer)
        self._tokens: dict[int, int] = {}
        self._processors: dict[Processor, int] = {}

    def of(self, calls: Sequence[Call]) -> dict[str, Any]:
        """All of it. The template says what each place of a list means."""
        sequences = [
            self._sequence(call, row, len(calls) > 1, len(call.rows) > 1)
            for call in calls
            for row in range(len(call.rows))
        ]
        return {
            "version": fastlogits.__version__,
            "parts": _PARTS,
            "sequences": sequences,
            "tokens": [self._token(token) for token in self._tokens],
            "processors": [[short_name(each.name), each.does] for each in self._processors],
        }

    def _sequence(self, call: Call, row: int, several_calls: bool, several_rows: bool) -> dict[str, Any]:
        steps = call.rows[row]
        named = [f"call {call.number + 1}"] * several_calls + [f"row {row + 1}"] * several_rows
        return {
            "name": ", ".join(named),
            "model": call.model,
            "method": call.method.replace("_", " "),
            "beams": "beam" in call.method,
            "prompt": self._prompt(call.prompts[row]),
            "promptLength": len(call.prompts[row]),
            "steps": [self._step(step) for step in steps],
            "pieces": list(self._pieces(steps)),
        }

    def _step(self, step: Step) -> list[Any]:
        return [
            -1 if step.token is None else self._place(step.token),
            step.rank or 0,
            step.rank_before or 0,
            step.candidates,
            [self._place(token) for token in step.tokens],
            _parts(step.probabilities[0]),
            [self._change(step, number, change) for number, change in enumerate(step.changes)],
        ]

    def _change(self, step: Step, number: int, change: Change) -> list[Any]:
        processor = self._processors.setdefault(step.processors[number], len(self._processors))
        before, after = _parts(step.probabilities[number]), _parts(step.probabilities[number + 1])
        moves = "".join("-0+"[move + 1] for move in step.moves[number]) if change.raised or change.lowered else 0
        counts = [change.removed, change.added, change.raised, change.lowered, change.left]
        kept = _parts((change.kept_mass, change.kept_of_start))
        return [processor, *counts, *kept, [] if after == before else after, moves]

    def _place(self, token: int) -> int:
        return self._tokens.setdefault(token, len(self._tokens))

    def _token(self, token: int) -> list[Any]:
        """The id of a token, its text, and whether that is a name rather than text."""
        text = self._texts[token] if token < len(self._texts) else None
        if text is not None and UNREADABLE not in text:
            return [token, text, 0]
        return [token, self._names.get(token, f"#{token}"), 1]

    def _pieces(self, steps: Sequence[Step]) -> Iterator[str | int]:
        """What each step adds to the text: 0 where that is the token's own text, else the text."""
        run: list[int] = []
        for step in steps:
            token = step.token
            text = None if token is None or token >= len(self._texts) else self._texts[token]
            if token is None or text is None or UNREADABLE not in text:
                run = []
                yield 0
                continue
            run.append(token)
            together = str(self._tokenizer.decode(run, skip_special_tokens=True))
            if UNREADABLE in together:
                yield ""  # the token that completes the character shows it
            else:
                run = []
                yield together

    def _prompt(self, tokens: Sequence[int]) -> str:
        text = " ".join(map(str, tokens)) if self._tokenizer is None else str(self._tokenizer.decode(list(tokens)))
        if len(text) <= _PROMPT_CHARACTERS:
            return text
        half = _PROMPT_CHARACTERS // 2
        return f"{text[:half]} \u2026 {text[-half:]}"


def _parts(probabilities: Sequence[float]) -> list[int]:
    """Probabilities in millionths; one that is above 0 is at least one of them."""
    return [max(round(each * _PARTS), 1) if each > 0 else 0 for each in probabilities]
