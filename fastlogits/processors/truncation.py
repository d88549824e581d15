"""Processors that keep only likely tokens: transformers' warpers and some of our own.

The main parameter of a warper is a number, or a tensor ``(B,)`` on the device of the scores with a value for each row:
float32, or int32 or int64 for ``top_k``. The tensor is read at each call, so new contents take effect at once. Each
docstring says which value turns the warper off in a row. A value out of range, or NaN, is refused if the tensor is on
the CPU; on a GPU it leaves its row unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial

import torch
from fastlogits_kernels.rules import RULES, Rule, RuleKind, argument_of, check_row_values
from transformers.generation import logits_process as theirs

from fastlogits.checks import finite_number, is_number, whole_number
from fastlogits.plan.stages import Rows, Truncate
from fastlogits.processors.base import StagedProcessor
from fastlogits.token_mask import checked_ids, ids_on


class TopKLogitsWarper(StagedProcessor, theirs.TopKLogitsWarper):
    """Keep the ``top_k`` most likely tokens, and all that tie with the last of them.

    Args:
        top_k: an integer of at least 1, or integers ``(B,)``; V or more turns it off in a row.
        filter_value: written over the scores of all other tokens.
        min_tokens_to_keep: replaces a smaller ``top_k``; a tensor is then copied, and not read again.

    Raises:
        ValueError: ``top_k`` is not an integer or is below 1.

    Example:
        >>> TopKLogitsWarper(2)(None, torch.tensor([[3.0, 1.0, 2.0, 2.0, 0.0]]))
        tensor([[3., -inf, 2., 2., -inf]])
    """

    def __init__(
        self, top_k: int | torch.Tensor, filter_value: float = -float("inf"), min_tokens_to_keep: int = 1
    ) -> None:
        rows = _per_row("top_k", top_k)
        super().__init__(top_k if rows is None else 1, filter_value, min_tokens_to_keep)
        if rows is not None:
            # A value out of range stays what it is.
            least = rows.clamp(min=min_tokens_to_keep) if min_tokens_to_keep > 1 else rows
            self.top_k = rows if least is rows else torch.where(rows < 1, rows, least)

    def stage(self) -> Truncate:
        """A truncation."""
        return Truncate((_rule("top_k", self.top_k, 1, self.filter_value),))


class TopPLogitsWarper(StagedProcessor, theirs.TopPLogitsWarper):
    """Keep the nucleus: the fewest most likely tokens whose probabilities add up to ``top_p`` (arXiv 1904.09751).

    If tokens tie at the cut-off, only as many are kept as are needed, those with the largest ids.

    Args:
        top_p: a probability, 0 to 1, or float32 ``(B,)``; there 1 turns it off in a row.
        filter_value: written over the scores of all other tokens.
        min_tokens_to_keep: how many tokens are kept at least.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> TopPLogitsWarper(0.7)(None, torch.tensor([[0.5, 0.1, 0.25, 0.15]]).log()).exp()
        tensor([[0.5000, 0.0000, 0.2500, 0.0000]])
    """

    def __init__(
        self, top_p: float | torch.Tensor, filter_value: float = -float("inf"), min_tokens_to_keep: int = 1
    ) -> None:
        rows = _per_row("top_p", top_p)
        super().__init__(top_p if rows is None else 0.5, filter_value, min_tokens_to_keep)
        if rows is not None:
            self.top_p = rows

    def stage(self) -> Truncate:
        """A truncation."""
        return Truncate((_rule("top_p", self.top_p, self.min_tokens_to_keep, self.filter_value),))


if hasattr(theirs, "TopHLogitsWarper"):  # from transformers 5 on

    class TopHLogitsWarper(StagedProcessor, theirs.TopHLogitsWarper):
        """Keep the most likely tokens that make up a share of the entropy of the first 100 (arXiv 2509.02510).

        Args:
            top_h: the share, above 0 and at most 1, or float32 ``(B,)``; there 1 turns it off in a row. The number 1
                still drops all but the first 100.
            filter_value: written over the scores of all other tokens.

        Raises:
            ValueError: ``top_h`` out of range.

        Example:
            >>> TopHLogitsWarper(0.7)(None, torch.tensor([[0.5, 0.1, 0.25, 0.15]]).log()).exp()
            tensor([[0.5000, 0.0000, 0.2500, 0.0000]])
        """

        def __init__(self, top_h: float | torch.Tensor, filter_value: float = -float("inf")) -> None:
            rows = _per_row("top_h", top_h)
            super().__init__(top_h if rows is None else 0.5, filter_value)
            if rows is not None:
                self.top_h = rows

        def stage(self) -> Truncate:
            """A truncation."""
            if self.top_n != 100:
                raise ValueError(f"top_n must be 100, the number that transformers sets, got {self.top_n}")
            return Truncate((_rule("top_h", self.top_h, 1, self.filter_value),))


class MinPLogitsWarper(StagedProcessor, theirs.MinPLogitsWarper):
    """Keep tokens that are at least ``min_p`` times as likely as the most likely one (arXiv 2407.01082).

    Args:
        min_p: the ratio, 0 to 1, or float32 ``(B,)``; there 0 turns it off in a row.
        filter_value: written over the scores of all other tokens.
        min_tokens_to_keep: how many tokens are kept at least.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> MinPLogitsWarper(0.4)(None, torch.tensor([[0.5, 0.1, 0.25, 0.15]]).log()).exp()
        tensor([[0.5000, 0.0000, 0.2500, 0.0000]])
    """

    def __init__(
        self, min_p: float | torch.Tensor, filter_value: float = -float("inf"), min_tokens_to_keep: int = 1
    ) -> None:
        rows = _per_row("min_p", min_p)
        super().__init__(min_p if rows is None else 0.5, filter_value, min_tokens_to_keep)
        if rows is not None:
            self.min_p = rows

    def stage(self) -> Truncate:
        """A truncation."""
        return Truncate((_rule("min_p", self.min_p, self.min_tokens_to_keep, self.filter_value),))


class TypicalLogitsWarper(StagedProcessor, theirs.TypicalLogitsWarper):
    """Keep the tokens whose surprise is nearest to the entropy, up to a mass (arXiv 2202.00666).

    Args:
        mass: a probability, between 0 and 1, or float32 ``(B,)``; there 1 turns it off in a row.
        filter_value: written over the scores of all other tokens.
        min_tokens_to_keep: how many tokens are kept at least.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> TypicalLogitsWarper(0.3)(None, torch.tensor([[0.5, 0.1, 0.25, 0.15]]).log()).exp()
        tensor([[0.5000, 0.0000, 0.2500, 0.0000]])
    """

    def __init__(
        self, mass: float | torch.Tensor = 0.9, filter_value: float = -float("inf"), min_tokens_to_keep: int = 1
    ) -> None:
        rows = _per_row("typical", mass)
        super().__init__(mass if rows is None else 0.5, filter_value, min_tokens_to_keep)
        if rows is not None:
            self.mass = rows

    def stage(self) -> Truncate:
        """A truncation."""
        return Truncate((_rule("typical", self.mass, self.min_tokens_to_keep, self.filter_value),))


class EpsilonLogitsWarper(StagedProcessor, theirs.EpsilonLogitsWarper):
    """Keep tokens whose probability is at least ``epsilon`` (arXiv 2210.15191).

    Args:
        epsilon: the probability, between 0 and 1, or float32 ``(B,)``; there 0 turns it off in a row.
        filter_value: written over the scores of all other tokens.
        min_tokens_to_keep: how many tokens are kept at least, with all that tie with the last of them.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> EpsilonLogitsWarper(0.2)(None, torch.tensor([[0.5, 0.1, 0.25, 0.15]]).log()).exp()
        tensor([[0.5000, 0.0000, 0.2500, 0.0000]])
    """

    def __init__(
        self, epsilon: float | torch.Tensor, filter_value: float = -float("inf"), min_tokens_to_keep: int = 1
    ) -> None:
        rows = _per_row("epsilon", epsilon)
        super().__init__(epsilon if rows is None else 0.5, filter_value, min_tokens_to_keep)
        if rows is not None:
            self.epsilon = rows

    def stage(self) -> Truncate:
        """A truncation."""
        return Truncate((_rule("epsilon", self.epsilon, self.min_tokens_to_keep, self.filter_value),))


class EtaLogitsWarper(StagedProcessor, theirs.EtaLogitsWarper):
    """Keep tokens whose probability is at least a cut-off, which is lower in rows of high entropy (arXiv 2210.15191).

    Args:
        epsilon: a probability, between 0 and 1, or float32 ``(B,)``; there 0 turns it off in a row. The cut-off is the
            smaller one of ``epsilon`` and ``sqrt(epsilon) * exp(-entropy)``.
        filter_value: written over the scores of all other tokens.
        min_tokens_to_keep: how many tokens are kept at least, with all that tie with the last of them.
        device: device of transformers' attribute ``epsilon``, if that is a number.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> EtaLogitsWarper(0.2)(None, torch.tensor([[0.5, 0.1, 0.25, 0.15]]).log()).exp()
        tensor([[0.5000, 0.0000, 0.2500, 0.1500]])
    """

    def __init__(
        self,
        epsilon: float | torch.Tensor,
        filter_value: float = -float("inf"),
        min_tokens_to_keep: int = 1,
        device: str = "cpu",
    ) -> None:
        rows = _per_row("eta", epsilon)
        super().__init__(epsilon if rows is None else 0.5, filter_value, min_tokens_to_keep, device)
        if rows is not None:
            self.epsilon = rows

    def stage(self) -> Truncate:
        """A truncation."""
        # A number is kept as a tensor, perhaps on a device: read here, where a plan is made, and not when it runs.
        value = self.epsilon if self.epsilon.ndim else float(self.epsilon)
        return Truncate((_rule("eta", value, self.min_tokens_to_keep, self.filter_value),))


class TopNSigmaLogitsWarper(StagedProcessor):
    """Keep tokens whose logits are at most ``top_n_sigma`` standard deviations below the largest (arXiv 2411.07641).

    The standard deviation is that of the row's finite logits, divided by N - 1 as in the paper's code. A temperature
    that is applied before doesn't change which tokens are kept.

    Args:
        top_n_sigma: a finite number above 0, or float32 ``(B,)``; there inf turns it off in a row. The paper takes 1.
        filter_value: written over the scores of all other tokens.
        min_tokens_to_keep: how many tokens are kept at least, with all that tie with the last of them.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> TopNSigmaLogitsWarper(1.0)(None, torch.tensor([[9.0, 1.0, 0.0, 8.0, 2.0]]))
        tensor([[9., -inf, -inf, 8., -inf]])
    """

    def __init__(
        self, top_n_sigma: float | torch.Tensor, filter_value: float = -float("inf"), min_tokens_to_keep: int = 1
    ) -> None:
        rows = _per_row("top_n_sigma", top_n_sigma)
        if rows is None and not (is_number(top_n_sigma) and 0 < top_n_sigma < math.inf):
            raise ValueError(f"top_n_sigma must be a finite number above 0, got {top_n_sigma!r}")
        self.top_n_sigma = float(top_n_sigma) if rows is None else rows
        self.filter_value = _filled("filter_value", filter_value)
        self.min_tokens_to_keep = whole_number("min_tokens_to_keep", min_tokens_to_keep, 1)

    def stage(self) -> Truncate:
        """A truncation."""
        return Truncate((_rule("top_n_sigma", self.top_n_sigma, self.min_tokens_to_keep, self.filter_value),))


class TopALogitsWarper(StagedProcessor):
    """Keep tokens of at least ``top_a`` times the square of the largest probability.

    Few tokens are kept where the model is sure, many where it is not. Source: BlinkDL, RWKV-LM, 2022, as in
    text-generation-webui and KoboldAI.

    Args:
        top_a: the factor, above 0 and at most 1, or float32 ``(B,)``; there 0 turns it off in a row.
        filter_value: written over the scores of all other tokens.
        min_tokens_to_keep: how many tokens are kept at least, with all that tie with the last of them.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> TopALogitsWarper(0.5)(None, torch.tensor([[0.5, 0.1, 0.25, 0.15]]).log()).exp()
        tensor([[0.5000, 0.0000, 0.2500, 0.1500]])
    """

    def __init__(
        self, top_a: float | torch.Tensor, filter_value: float = -float("inf"), min_tokens_to_keep: int = 1
    ) -> None:
        rows = _per_row("top_a", top_a)
        if rows is None and not (is_number(top_a) and 0 < top_a <= 1):
            raise ValueError(f"top_a must be a number above 0 and at most 1, got {top_a!r}")
        self.top_a = float(top_a) if rows is None else rows
        self.filter_value = _filled("filter_value", filter_value)
        self.min_tokens_to_keep = whole_number("min_tokens_to_keep", min_tokens_to_keep, 1)

    def stage(self) -> Truncate:
        """A truncation."""
        return Truncate((_rule("top_a", self.top_a, self.min_tokens_to_keep, self.filter_value),))


class XTCLogitsProcessor(StagedProcessor):
    """Exclude top choices: at random steps, remove the likely tokens except the least likely of them.

    A token is likely if its probability is at least ``threshold``. A random number decides for each row and step.
    Nothing is removed if fewer than two tokens are likely, or if one of those to be removed is a special token: the
    text can still end. Source: text-generation-webui, pull request 6335.

    Args:
        threshold: a probability, above 0 and at most 1; above 0.5 nothing is ever removed.
        probability: in which share of the steps tokens are removed, 0 to 1.
        special_token_ids: ids of tokens that must not be removed, such as the end of the text and a new line.
        generator: source of the random numbers, on the device of the scores; None for torch's own. A ``Sampler``, and
            sampling by ``fastlogits.decode``, ask neither: there a row's number depends on its seed and position.
        filter_value: written over the scores of removed tokens.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> scores = torch.tensor([[0.5, 0.05, 0.25, 0.2]]).log()
        >>> XTCLogitsProcessor(0.1, 1.0)(None, scores).exp()
        tensor([[0.0000, 0.0500, 0.0000, 0.2000]])
        >>> XTCLogitsProcessor(0.1, 1.0, special_token_ids=[2])(None, scores).exp()
        tensor([[0.5000, 0.0500, 0.2500, 0.2000]])
    """

    def __init__(
        self,
        threshold: float,
        probability: float,
        special_token_ids: Iterable[int] | torch.Tensor = (),
        generator: torch.Generator | None = None,
        filter_value: float = -float("inf"),
    ) -> None:
        if not (is_number(threshold) and 0 < threshold <= 1):
            raise ValueError(f"threshold must be a number above 0 and at most 1, got {threshold!r}")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ValueError(f"generator must be a torch.Generator or None, got {generator!r}")
        self.threshold = float(threshold)
        self.probability = float(finite_number("probability", probability, 0, 1))
        self.special_token_ids = checked_ids("special_token_ids", special_token_ids)
        self.generator = generator
        self.filter_value = _filled("filter_value", filter_value)

    def stage(self) -> Rows:
        """A truncation from above."""
        function = partial(
            _exclude_top_choices, self.threshold, self.probability, self.special_token_ids, self.filter_value
        )
        description = f"exclude top choices of at least {self.threshold:g}, {self.probability:.0%} of the time"
        return Rows("truncate", function, description, reads_history=False, draws=True, generator=self.generator)


def _exclude_top_choices(
    threshold: float,
    probability: float,
    special: tuple[int, ...],
    filter_value: float,
    input_ids: torch.Tensor,
    scores: torch.Tensor,
    numbers: torch.Tensor,
) -> torch.Tensor:
    V = scores.shape[1]
    # No more tokens than that can be so likely; one more, for the rounding of their probabilities.
    top, tokens = scores.topk(min(V, int(1 / threshold) + 1))  # [B, T], the likeliest first
    likely = scores.softmax(-1).gather(1, tokens) >= threshold
    drop = torch.zeros_like(likely)
    drop[:, :-1] = likely[:, 1:]  # one that is less likely is likely enough
    drop &= numbers < probability
    if special:
        barred = (tokens.unsqueeze(2) == ids_on(scores.device, special)).any(2) & drop
        drop &= ~barred.any(1, keepdim=True)
    return scores.scatter(1, tokens, top.masked_fill(drop, filter_value))


def _per_row(kind: RuleKind, value: object) -> torch.Tensor | None:
    """A parameter that is a tensor with a value for each row; None for a number, a tensor ``()`` of one included."""
    if not isinstance(value, torch.Tensor) or not value.ndim:
        return None
    check_row_values(kind, value)
    return value


def _filled(argument: str, value: object) -> float:
    """A value that is written over scores, as a Python number; infinities too."""
    if not is_number(value):
        raise ValueError(f"{argument} must be a number, got {value!r}")
    return float(value)  # type: ignore[arg-type]


def _rule(kind: RuleKind, value: float | torch.Tensor, keep: int, fill: float) -> Rule:
    """A rule whose numbers are Python's, whatever transformers' constructor has let pass.

    Raises:
        ValueError: a number that the processor's attribute was set to later is out of range.
    """
    if not isinstance(value, torch.Tensor):
        bounds = RULES[kind].range
        if RULES[kind].integer:
            value = whole_number(argument_of(kind), value, 1)
        if not is_number(value) or not (bounds.has(value) or value == bounds.off):
            raise ValueError(f"{argument_of(kind)} must be {bounds.words}, got {value!r}")
        value = int(value) if RULES[kind].integer else float(value)
    return Rule(kind, value, int(keep), float(fill))
