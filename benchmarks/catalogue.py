"""The table of all processors: what each does, and what it costs on a GPU, asked of its own plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import fastlogits as fl
from benchmarks.inputs import HISTORY
from benchmarks.processors import CLASSES
from fastlogits.inspect.members import fresh_members
from fastlogits.plan.masks import is_plain_mask
from fastlogits.plan.observation import Observation
from fastlogits.plan.part import Part
from fastlogits.plan.pointwise import Pointwise
from fastlogits.plan.rows import RowsPart
from fastlogits.plan.selection import Selection
from fastlogits.plan.stages import Rows, stages_of

_V = 1000
_WAITS = ("WatermarkLogitsProcessor", "PrefixConstrainedLogitsProcessor")
"""Those whose answer is on the host, so that each call waits for it."""
_READS_THE_CLOCK = ("MaxTimeLogitsProcessor",)
"""Those that can't be captured."""


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"</s>": 0, "yes": 1, "no": 2, ".": 3}))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")


_EXTRAS: dict[str, Callable[[Any], Any]] = {
    "AllowedTokensLogitsProcessor": lambda t: fl.AllowedTokensLogitsProcessor([1]),
    "CiteFromPromptLogitsProcessor": lambda t: fl.CiteFromPromptLogitsProcessor(t, 2.0),
    "DRYLogitsProcessor": lambda t: fl.DRYLogitsProcessor(1.0),
    "ForceLastPhraseLogitsProcessor": lambda t: fl.ForceLastPhraseLogitsProcessor("no", t),
    "FrequencyPenaltyLogitsProcessor": lambda t: fl.FrequencyPenaltyLogitsProcessor(0.5),
    "GenLengthLogitsProcessor": lambda t: fl.GenLengthLogitsProcessor(t, 1.0),
    "LogitBiasLogitsProcessor": lambda t: fl.LogitBiasLogitsProcessor({1: 2.0}),
    "MaxTimeLogitsProcessor": lambda t: fl.MaxTimeLogitsProcessor(t, 60.0),
    "MinTokensLogitsProcessor": lambda t: fl.MinTokensLogitsProcessor(2, [0, 1]),
    "MultipleChoiceLogitsProcessor": lambda t: fl.MultipleChoiceLogitsProcessor(t, ["yes", "no"]),
    "OnlyTokensFrom": lambda t: fl.OnlyTokensFrom([3, 1], eos_token_id=0),
    "PresencePenaltyLogitsProcessor": lambda t: fl.PresencePenaltyLogitsProcessor(0.5),
    "PreventHallucinationLogitsProcessor": lambda t: fl.PreventHallucinationLogitsProcessor(t, phrase="no"),
    "SuppressFirstTokens": lambda t: fl.SuppressFirstTokens([1]),
    "SuppressSpecificBOSTokenLogitsProcessor": lambda t: fl.SuppressSpecificBOSTokenLogitsProcessor([1]),
    "TopALogitsWarper": lambda t: fl.TopALogitsWarper(0.2),
    "TopNSigmaLogitsWarper": lambda t: fl.TopNSigmaLogitsWarper(1.0),
    "TriggerPhraseLogitsProcessor": lambda t: fl.TriggerPhraseLogitsProcessor(
        t, phrase="no", trigger_token_phrase="yes"
    ),
    "XTCLogitsProcessor": lambda t: fl.XTCLogitsProcessor(0.1, 1.0),
}
"""One of each processor that transformers lacks."""


def catalogue() -> str:
    """The table, in Markdown."""
    tokenizer, ids = _tokenizer(), torch.zeros(2, HISTORY, dtype=torch.int64)
    rows = ["| processor | kind | what it does | cost on a GPU, in a list |", "|---|---|---|---|"]
    for name in fl.__all__:
        if name in CLASSES:
            rows.append(_row(CLASSES[name](fl, ids, _V)[0]))
        elif name in _EXTRAS:
            rows.append(_row(_EXTRAS[name](tokenizer)))
    return "\n".join(rows)


def uncatalogued() -> set[str]:
    """Public processors that the table forgets."""
    known = {
        *CLASSES,
        *_EXTRAS,
        "LogitsProcessor",
        "LogitsProcessorList",
        "StagedProcessor",
        "HammingDiversityLogitsProcessor",
    }
    return {
        name
        for name in fl.__all__
        if isinstance(getattr(fl, name), type)
        and issubclass(getattr(fl, name), fl.LogitsProcessor)
        and name not in known
    }


def _row(processor: Any) -> str:
    name = type(processor).__name__
    (member,) = fresh_members([processor])
    kinds = [stage.acts_as if isinstance(stage, Rows) else stage.kind for stage in stages_of(member.stage)]
    kind = ", ".join(dict.fromkeys(kinds))
    does = " ".join((type(processor).__doc__ or "").partition("\n\n")[0].split()).replace("|", "\\|").replace("``", "`")
    costs = list(dict.fromkeys(_cost(part) for part in processor.plan.parts))
    cost = "torch; asks the host at each call" if name in _WAITS else "; ".join(costs)
    cost += "; reads the host's clock at each call" if name in _READS_THE_CLOCK else ""
    return f"| `{name}` | {kind} | {does} | {cost} |"


def _cost(part: Part) -> str:
    if isinstance(part, Pointwise):
        if all(map(is_plain_mask, (member.stage for member in part.members))):
            return "none of its own: the shared pass"
        values = ", values of each row in torch" if part.cost().row_values else ""
        return "the shared pass" + (", the shared search before it" if part.searches else "") + values
    if isinstance(part, Selection):
        more = ", where it comes first a read more" if part.cost().reads > 1 else ""
        return f"the shared selection{more}"
    if isinstance(part, Observation):
        return "nothing, but in the one call that it looks at"
    if isinstance(part, RowsPart) and part.is_normalisation:
        return "nothing after truncations, else torch"
    return "torch, on whole rows"
