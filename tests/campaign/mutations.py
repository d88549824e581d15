"""Do the tests see it when a kernel or a rewrite rule is wrong? One fault at a time, on purpose, in a copy of the tree.

    python -m tests.campaign.mutations               # all of them, some twenty minutes on one core
    python -m tests.campaign.mutations --list
    python -m tests.campaign.mutations --only NAME ...

Each mutation replaces a text that stands exactly once in its file, and names the tests that ought to fail. Those run on
the unchanged copy first, in one go, so that a failure afterwards is the mutation's. Kernels run in Triton's
interpreter. The exit status is 1 where one survives.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.results import read_rows, write_rows
from tests.campaign.record import RESULTS, ROOT, dated

CSV = RESULTS / "mutations.csv"
KERNELS, PACKAGE = "kernels/fastlogits_kernels", "fastlogits"
SELECTION = f"{KERNELS}/selection"
_COPIED = (PACKAGE, "kernels", "tests", "benchmarks", "pyproject.toml")
_FAILED = 1  # pytest's status where tests ran and failed; a process killed by a signal has a negative one
_LIMIT_S = 300


class Mutation(NamedTuple):
    """One mistake.

    Args:
        name: what is wrong, in a few words.
        file: where, from the root of the repository.
        old: a text that stands exactly once in the file.
        new: what stands there instead.
        tests: the tests that ought to fail, as pytest takes them, from ``tests/``.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTATIONS = [
    # -- masks --
    Mutation(
        "a window one step too long", f"{KERNELS}/pointwise/mask.py",
        "is_open = length - start < tl.load(window_ptr)", "is_open = length - start <= tl.load(window_ptr)",
        ("kernels/pointwise/test_mask.py::test_mask_tokens",),
    ),
    Mutation(
        "the step counts from -1", f"{KERNELS}/pointwise/mask.py",
        "length = index_at(cache_position_ptr, cache_position) + 1",
        "length = index_at(cache_position_ptr, cache_position)",
        ("kernels/pointwise/test_mask.py::test_mask_tokens",),
    ),
    Mutation(
        "a gate dropped", f"{KERNELS}/pointwise/mask.py",
        "mask_word = tl.where(is_open, mask_word, 0)", "mask_word = tl.where(is_open, mask_word, mask_word)",
        ("kernels/pointwise/test_mask.py::test_mask_tokens",),
    ),
    Mutation(
        "a column stride of 1 taken for granted", f"{KERNELS}/pointwise/mask.py",
        "here = row_ptr + token.to(tl.int64) * stride_token", "here = row_ptr + token.to(tl.int64)",
        ("kernels/pointwise/test_mask.py::test_mask_tokens",),
    ),
    Mutation(
        "a word banned in part banned whole", f"{KERNELS}/pointwise/mask.py",
        "mask=inside & (banned != -1), other", "mask=inside & (banned == -1), other",
        ("kernels/pointwise/test_mask.py::test_mask_tokens",),
    ),
    Mutation(
        "blank tokens close the gate (torch)", f"{KERNELS}/pointwise/mask.py",
        "is_open = is_open | (blank | ~generated).all(-1).T", "is_open = is_open & (blank | ~generated).all(-1).T",
        ("processors/test_first_tokens.py::test_blank_tokens_keep_the_ban",),
    ),
    Mutation(
        "a packed id beyond the vocabulary", f"{KERNELS}/pointwise/pack_ids.py",
        "known = (token >= 0) & (token < V)", "known = (token >= 0) & (token <= V)",
        ("kernels/pointwise/test_mask.py::test_pack_ids",),
    ),
    Mutation(
        "words that a bitmask lacks allow", f"{KERNELS}/pointwise/bitmask.py",
        "word, mask=word < W, other=0)", "word, mask=word < W, other=-1)",
        ("kernels/pointwise/test_bitmask.py",),
    ),
    Mutation(
        "the mask row is that of the logits (torch)", f"{KERNELS}/pointwise/bitmask.py",
        "ban_unset_(chosen, bitmask[mask_rows])", "ban_unset_(chosen, bitmask[rows])",
        ("kernels/pointwise/test_bitmask.py",),
    ),
    Mutation(
        "masks merged with and", f"{PACKAGE}/token_mask.py",
        "_combined(other, torch.logical_or)", "_combined(other, torch.logical_and)",
        ("test_token_mask.py",),
    ),
    Mutation(
        "bans behind one gate merged with and", f"{PACKAGE}/plan/pointwise.py",
        "self._static[key] | mask if", "self._static[key] & mask if",
        ("plan/test_pointwise.py::test_bans_behind_one_gate_add_up",),
    ),
    Mutation(
        "rows of a source dealt round", f"{PACKAGE}/plan/allowed.py",
        "rows.repeat_interleave(copies, 0)", "rows.repeat(copies, 1)",
        ("processors/test_nvidia_zoo.py::test_zoo_whatever_becomes_of_the_rows", "processors/test_only_tokens_from.py"),
    ),
    # -- the fold and its search --
    Mutation(
        "a penalty that rewards", f"{KERNELS}/pointwise/fold.py",
        "tl.where(x < 0, x * penalty, x *", "tl.where(x > 0, x * penalty, x *",
        ("plan/test_pointwise.py::test_kernels_equal_torch",),
    ),
    Mutation(
        "decay grows infinities", f"{KERNELS}/pointwise/fold.py",
        'tl.where(found & (tl.abs(x) < float("inf")), x + growth', "tl.where(found, x + growth",
        ("plan/test_pointwise.py::test_growth_leaves_what_is_not_finite",),
    ),
    Mutation(
        "no rounding between maps", f"{KERNELS}/pointwise/fold.py",
        "        x = x.to(dtype).to(tl.float32)\n    return x", "    return x",
        ("plan/test_pointwise.py::test_each_map_rounds_as_a_kernel_of_its_own",),
    ),
    Mutation(
        "row offsets of 32 bits", f"{KERNELS}/pointwise/fold.py",
        "row = (program // row_blocks).to(tl.int64)", "row = program // row_blocks",
        ("plan/test_pointwise.py::test_rows_far_apart",),
    ),
    Mutation(
        "a range one token too long", f"{KERNELS}/pointwise/search.py",
        "_first_bits(stop - word * 32) &", "_first_bits(stop + 1 - word * 32) &",
        ("plan/test_pointwise.py::test_positions_on_the_device_differ_by_row",),
    ),
    Mutation(
        "a prompt that goes on before anything is generated", f"{KERNELS}/pointwise/search.py",
        "tl.where(here.step >= a - 1, tl", "tl.where(here.step >= 0, tl",
        ("processors/test_row_values.py::test_in_a_list_with_neighbours[kernels-False-cite less]",),
    ),
    Mutation(
        "a value of another row", f"{KERNELS}/pointwise/search.py",
        "values_ptr + row * VALUES", "values_ptr + 0 * VALUES",
        ("plan/test_pointwise.py::test_positions_on_the_device_differ_by_row",),
    ),
    Mutation(
        "a token in two places gets a bias twice (torch)", f"{KERNELS}/pointwise/fold.py",
        "x = found.put(x, values)", "x = found.put(x, _MAPS_OF_TOKENS[op.kind](x, found, op, chain, value))",
        ("processors/test_row_values.py::test_in_a_list_with_neighbours[torch-False-cite]",),
    ),
    Mutation(
        "a look at every call", f"{PACKAGE}/plan/observation.py",
        "input_ids.shape[1] == self._stage.length", "input_ids.shape[1] >= self._stage.length",
        ("processors/test_observation.py",),
    ),
    Mutation(
        "a look before the stages that stand before it", f"{PACKAGE}/plan/observation.py",
        "seen = part(input_ids, seen, run, kwargs)", "part(input_ids, seen, run, kwargs)",
        ("processors/test_observation.py",),
    ),
    Mutation(
        "the prompt counts as generated", f"{KERNELS}/pointwise/search.py",
        "start = tl.maximum(here.prompt_length, 0)", "start = 0",
        ("plan/test_pointwise.py::test_kernels_equal_torch",),
    ),
    Mutation(
        "an n-gram needs one token more", f"{KERNELS}/history.py",
        "(text.length >= size - 1)", "(text.length >= size)",
        ("plan/test_pointwise.py::test_a_history_as_long_as_the_prefix_of_an_ngram",),
    ),
    Mutation(
        "the phase of a gate ignored", f"{KERNELS}/pointwise/search.py",
        "((index - tl.load(gate_ptr + _PHASE)) % tl.load(gate_ptr + _PERIOD) == 0)",
        "(index % tl.load(gate_ptr + _PERIOD) == 0)",
        ("plan/test_pointwise.py::test_a_period_counts_from_its_phase",),
    ),
    Mutation(
        "a history read beyond its position", f"{KERNELS}/pointwise/search.py",
        "seen = tl.minimum(length, L)", "seen = tl.maximum(length, L)",
        ("plan/test_pointwise.py::test_positions_on_the_device_differ_by_row",),
    ),
    Mutation(
        "an n-gram's prefix off by one (torch)", f"{KERNELS}/pointwise/places.py",
        "prefix = input_ids[:, length - size + 1 : length]",
        "prefix = input_ids[:, max(0, length - size) : length - 1]",
        ("plan/test_pointwise.py::test_a_history_as_long_as_the_prefix_of_an_ngram",),
    ),
    Mutation(
        "the shortest repetition counts", f"{KERNELS}/pointwise/search.py",
        "tl.atomic_max(bits_ptr", "tl.atomic_min(bits_ptr",
        ("processors/test_dry.py::test_dry",),
    ),
    Mutation(
        "a penalty of a repetition left from before", f"{KERNELS}/pointwise/search.py",
        "mask=matches & is_mine(token, words))", "mask=matches & (token < 0))",
        ("plan/test_pointwise.py::test_penalties_of_repetitions_do_not_add_up",),
    ),
    Mutation(
        "a breaker within a match", f"{KERNELS}/history.py",
        "tl.where(holds(breakers_ptr, wanted, limit), at < 0, at >= n)", "at >= n",
        ("processors/test_dry.py::test_dry",),
    ),
    Mutation(
        "a breaker penalised (torch)", f"{KERNELS}/pointwise/places.py",
        "(penalty > 0) & ~_holds(is_breaker, token)", "(penalty > 0)",
        ("processors/test_dry.py",),
    ),
    Mutation(
        "a match that begins before the range (torch)", f"{KERNELS}/pointwise/places.py",
        "before = at - begin[row, 0]", "before = at",
        ("processors/test_dry.py::test_dry",),
    ),
    Mutation(
        "a penalty of a repetition rounded first (torch)", f"{KERNELS}/pointwise/fold.py",
        "(found.take(x) - found.values).to(x.dtype)", "found.take(x) - found.values.to(x.dtype)",
        ("processors/test_dry.py::test_dry",),
    ),
    Mutation(
        "two temperatures folded into one", f"{PACKAGE}/plan/pointwise.py",
        "            at = self._divisor(stage.divisor)\n",
        "            if self.ops and self.ops[-1].kind == ops.SCALE.value:\n"
        "                self.numbers[self.ops[-1].a] *= stage.divisor\n"
        "                return\n"
        "            at = self._divisor(stage.divisor)\n",
        ("plan/test_pointwise.py::test_two_divisions_round_twice",),
    ),
    Mutation(
        "a chain made for another batch", f"{PACKAGE}/plan/pointwise.py",
        "and (last[2] == B or not self._by_row):", "and last[2]:",
        ("plan/test_pointwise.py::test_a_batch_of_another_size_has_its_own_texts",),
    ),
    # -- rewrite rules --
    Mutation(
        "allowed rows fused across what brings scores back", f"{PACKAGE}/plan/fusion.py",
        "return not (parted and isinstance(stage, AllowFrom)", "return not (False and isinstance(stage, AllowFrom)",
        ("plan/test_pointwise.py::test_allowed_rows_on_both_sides_of_what_brings_scores_back",),
    ),
    Mutation(
        "gradients lost in a plan", f"{PACKAGE}/plan/plan.py",
        "if in_place and has_gradient(scores):", "if False:",
        ("plan/test_gradients.py",),
    ),
    Mutation(
        "gradients lost in a fold", f"{KERNELS}/pointwise/fold.py",
        "    recorded = has_gradient(scores)", "    recorded = False",
        ("plan/test_gradients.py",),
    ),
    Mutation(
        "a ban moved before a map that lifts it", f"{PACKAGE}/plan/stages.py",
        "return 0 < factor < math.inf", "return factor < math.inf",
        ("plan/test_pointwise.py::test_bans_are_one_set_wherever_they_may_be",),
    ),
    Mutation(
        "a ban moved before a cleaning", f"{PACKAGE}/plan/stages.py",
        'kind = "clean"\n\n    @property\n    def keeps_bans(self) -> bool:\n        return False',
        'kind = "clean"\n\n    @property\n    def keeps_bans(self) -> bool:\n        return True',
        ("plan/test_pointwise.py::test_bans_are_one_set_wherever_they_may_be",),
    ),
    Mutation(
        "the step forgets the newest token", f"{PACKAGE}/plan/position.py",
        "return self.cache_position + 1 - self.prompt_length", "return self.cache_position - self.prompt_length",
        ("plan/test_position.py",),
    ),
    Mutation(
        "a prompt one token too long", f"{PACKAGE}/plan/position.py",
        "column >= prompt_length.reshape(-1, 1), -1", "column > prompt_length.reshape(-1, 1), -1",
        (
            "processors/test_only_tokens_from.py",
            "processors/test_nvidia_zoo.py::test_zoo_a_row_alone_and_rows_at_steps_of_their_own",
        ),
    ),
    Mutation(
        "a step that writes its input", f"{PACKAGE}/plan/part.py",
        "if not in_place or processed is scores:", "if processed is scores:",
        ("plan/test_plan.py",),
    ),
    # -- truncations --
    Mutation(
        "a tie at the cut lost", f"{SELECTION}/row.py",
        "((key == kept.cutoff) & (rank >= kept.rank))", "((key == kept.cutoff) & (rank > kept.rank))",
        (
            "kernels/selection/test_selection.py::test_small_vocabularies",
            "kernels/selection/test_selection.py::test_keeps_what_the_oracle_keeps",
        ),
    ),
    Mutation(
        "a search that stops at either goal", f"{SELECTION}/goals.py",
        "reached = (number >= goal.number) & (more >= goal.amount)",
        "reached = (number >= goal.number) | (more >= goal.amount)",
        (
            "kernels/selection/test_selection.py::test_small_vocabularies",
            "kernels/selection/test_selection.py::test_keeps_what_the_oracle_keeps",
        ),
    ),
    Mutation(
        "a search of whole rows that stops at either goal", f"{SELECTION}/refine_rows.py",
        "reached = inside & (number >= goal.number) & (amount >= goal.amount)",
        "reached = inside & ((number >= goal.number) | (amount >= goal.amount))",
        ("kernels/selection/test_selection.py::test_many_candidates_are_refined_block_by_block[p]",),
    ),
    Mutation(
        "a bound never verified", f"{SELECTION}/refine.py",
        "at = Progress(kept, top_key, complete == 0, tl.full",
        "at = Progress(kept, top_key, complete & (complete == 0), tl.full",
        ("kernels/selection/test_selection.py::test_a_sample_that_misleads",),
    ),
    Mutation(
        "a goal that is not reached never doubted", f"{SELECTION}/refine.py",
        "wrong = wrong | open_below", "wrong = wrong & open_below",
        ("kernels/selection/test_selection.py::test_a_goal_that_a_later_rule_leaves_no_room_for[typical min]",),
    ),
    Mutation(
        "a cut-off lowered by a rule that keeps more", f"{SELECTION}/goals.py",
        "return Kept(tl.maximum(key, kept.cutoff), rank, kept.centre, kept.farthest)\n\n\n@triton.jit\ndef cut_below",
        "return Kept(key, rank, kept.centre, kept.farthest)\n\n\n@triton.jit\ndef cut_below",
        ("kernels/selection/test_selection.py::test_a_goal_that_a_later_rule_leaves_no_room_for[k min of 9]",),
    ),
    Mutation(
        "what is kept for certain never doubted", f"{SELECTION}/goals.py",
        "exceeds = exceeds & (kind_goal != NO_GOAL)", "exceeds = exceeds & False",
        ("kernels/selection/test_selection.py::test_a_sample_that_misleads",),
    ),
    Mutation(
        "what is kept for certain never taken back", f"{SELECTION}/refine_rows.py",
        "tl.where((row_state == BRACKET) & (base.source.kind == ROW), 1, 0)",
        "tl.where((row_state == BRACKET) & (base.source.kind == ROW), 0, 0)",
        ("kernels/selection/test_selection.py::test_a_sample_that_misleads",),
    ),
    Mutation(
        "a list that leaves a question open", f"{SELECTION}/refine_rows.py",
        "if state.failed & (base.source.kind == LIST):", "if state.failed & (base.source.kind == ROW):",
        ("kernels/selection/test_selection.py::test_a_sample_that_misleads",),
    ),
    Mutation(
        "a pass that forgets what is kept for certain", f"{SELECTION}/refine_rows.py",
        "beyond = Goal(certain.number, tl.where(by_mass, certain.mass, 0))",
        "beyond = Goal(none, tl.where(by_mass, 0, 0).to(tl.int64))",
        ("kernels/selection/test_selection.py::test_many_candidates_are_refined_block_by_block[p]",),
    ),
    Mutation(
        "a deviation from the wrong mean", f"{SELECTION}/goals.py",
        "squares = second - first * first / tl.maximum(finite, 1.0)", "squares = second",
        ("kernels/selection/test_rules.py::test_kernels_keep_what_the_oracle_keeps[row-top_n_sigma]",),
    ),
    Mutation(
        "many tokens never kept for certain", f"{SELECTION}/bounds.py",
        "(bounds.high > bounds.low)", "(bounds.high < bounds.low)",
        ("kernels/selection/test_selection.py::test_flat_rows_keep_most_unseen",),
    ),
    Mutation(
        "masses of tiles as if all had one largest logit", f"{SELECTION}/row_sums.py",
        "amounts, _below = joined(Tile(tops, masses, masses), raw_top, inverse)",
        "amounts = (masses.to(tl.float64) * ONE).to(tl.int64)",
        ("kernels/selection/test_selection.py::test_flat_rows_keep_most_unseen",),
    ),
    Mutation(
        "a draw takes the highest of equals", f"{SELECTION}/noise.py",
        "return best, tl.min(tl.where(valid & (key == best), token, HIGHEST))",
        "return best, tl.max(tl.where(valid & (key == best), token, -1))",
        ("kernels/selection/test_selection.py::test_rows_without_a_distribution_have_a_token",),
    ),
    Mutation(
        "candidates at the bound dropped", f"{SELECTION}/row.py",
        "return (test < least) == 0", "return test > least",
        ("kernels/selection/test_selection.py::test_rows_without_a_distribution",),
    ),
    Mutation(
        "a search that collects over its own list", f"{SELECTION}/refine_rows.py",
        "collected_at = shape.pairs_at + 2 * tl.where(shape.slots > ROOM, shape.slots, 0)",
        "collected_at = shape.pairs_at",
        ("kernels/selection/test_selection.py::test_many_candidates_are_refined_block_by_block[p]",),
    ),
    Mutation(
        "the raw range of candidates as if nothing divided them", f"{SELECTION}/bounds.py",
        "tl.clamp(x * divisor, -FLOAT32_MAX, FLOAT32_MAX)", "tl.clamp(x, -FLOAT32_MAX, FLOAT32_MAX)",
        ("serving/test_batch.py::test_edited_tokens_among_the_candidates",),
    ),
    Mutation(
        "no candidates among the edited tokens", f"{SELECTION}/filter.py",
        "tl.where(asks, count, 0)", "tl.where(asks, 0, 0)",
        ("serving/test_batch.py::test_edited_tokens_among_the_candidates",),
    ),
    Mutation(
        "edited tokens collected as they were", f"{SELECTION}/collect.py",
        "bits = tl.load(excluded.edited_ptr + (token >> 5), mask=candidate, other=0)",
        "bits = tl.load(excluded.banned_ptr + (token >> 5), mask=candidate, other=0)",
        ("serving/test_batch.py::test_edited_tokens_among_the_candidates",),
    ),
    Mutation(
        "the first bits of a pair exchanged", f"{SELECTION}/noise.py",
        "(word >> (16 * (token & 1)).to(tl.uint32))", "(word >> (16 - 16 * (token & 1)).to(tl.uint32))",
        ("kernels/selection/test_selection.py::test_tokens_are_the_reference_draw",),
    ),
    Mutation(
        "the second call of the generator is the first", f"{SELECTION}/noise.py",
        "_random_words(token >> 2, seed, position, _FINE)", "_random_words(token >> 2, seed, position, _COARSE)",
        ("kernels/selection/test_selection.py::test_the_noise_of_the_kernels_is_that_of_the_definition",),
    ),
    Mutation(
        "the noise of a sample taken for less than it may be", f"{SELECTION}/noise.py",
        "(coarse.to(tl.float32) + 1) * (2.0**-16)", "(coarse.to(tl.float32) * 0.1) * (2.0**-16)",
        ("kernels/selection/test_selection.py::test_rows_that_nothing_is_dropped_of",),
    ),
    Mutation(
        "a part where many may win left out", f"{SELECTION}/sample_rows.py",
        "tl.where(found > _ROOM, BLOCK, 0)", "tl.where(found > BLOCK, BLOCK, 0)",
        ("kernels/selection/test_selection.py::test_rows_that_nothing_is_dropped_of",),
    ),
    Mutation(
        "a row drawn from as it is takes another's noise", f"{SELECTION}/filter.py",
        "words = coarse_words(octet, seed, position)", "words = coarse_words(octet + 1, seed, position)",
        ("kernels/selection/test_selection.py::test_rows_that_nothing_is_dropped_of",),
    ),
    Mutation(
        "the best of a sample that the bounds know is too good", f"{SELECTION}/noise.py",
        "offset = 16.001 - best * LOG2_E", "offset = 8.0 - best * LOG2_E",
        ("kernels/selection/test_selection.py::test_rows_that_nothing_is_dropped_of",),
    ),
    Mutation(
        "a band told apart on one side only", f"{SELECTION}/bounds.py",
        "tl.where(banded, number_of(most), float(\"inf\")), found", "float(\"inf\"), found",
        ("kernels/selection/test_selection.py::test_of_a_band_only_the_edges_are_collected",),
    ),
    Mutation(
        "what is kept for certain counted as a candidate too", f"{SELECTION}/refine.py",
        "beside = valid & is_certain(raw, work)", "beside = valid & False",
        ("kernels/selection/test_selection.py::test_flat_rows_keep_most_unseen",),
    ),
    Mutation(
        "a division that the range kept for certain forgets", f"{SELECTION}/bounds.py",
        "from_here = tl.where(banded, centre - distance, number_of(high)) * divisor",
        "from_here = tl.where(banded, centre - distance, number_of(high))",
        ("kernels/selection/test_selection.py::test_of_a_band_only_the_edges_are_collected",),
    ),
    Mutation(
        "the upper half of the noise cut off", f"{KERNELS}/draw.py",
        "torch.where(u < 0.5, torch.log1p(-u), rest.log())", "torch.log1p(-u.clamp(max=1 - 2**-24))",
        ("test_sampling.py::test_the_noise_has_all_its_digits_at_both_ends",),
    ),
    Mutation(
        "the CPU rules tokens out that may win", f"{KERNELS}/draw.py",
        "_MARGIN = 16.001", "_MARGIN = 12.0",
        ("test_sampling.py::test_the_token_is_the_argmax_of_the_definition",),
    ),
    Mutation(
        "the high half of a position ignored", f"{SELECTION}/noise.py",
        "low, high = position.to(tl.uint32), (position >> 32).to(tl.uint32)",
        "low, high = position.to(tl.uint32), (position * 0).to(tl.uint32)",
        ("kernels/selection/test_selection.py::test_tokens_are_the_reference_draw",),
    ),
    Mutation(
        "top-k taken for off below V", f"{SELECTION}/row.py",
        "active = (value >= _LOW[KIND]) & (value < V)", "active = (value >= _LOW[KIND]) & (value < V - 1)",
        (
            "kernels/selection/test_selection.py::test_small_vocabularies",
            "kernels/selection/test_selection.py::test_values_by_row",
        ),
    ),
    Mutation(
        "a row of the table with too few sums", f"{KERNELS}/rules.py",
        "limit=reference.limit_eta, sums=2", "limit=reference.limit_eta, sums=1",
        ("kernels/selection/test_selection.py::test_flat_rows_keep_most_unseen[eta-12000]",),
    ),
    Mutation(
        "a rule that acts with its off-value", f"{KERNELS}/rules.py",
        '_ABOVE_0 = Range(0, 1, "neither", 1,', '_ABOVE_0 = Range(0, 1, "high", 1,',
        ("kernels/selection/test_rules.py::test_the_off_value_turns_it_off",),
    ),
    Mutation(
        "the next rule sees no fill value", f"{KERNELS}/truncate/cpu.py",
        "and rules[together].filter_value == _MINUS_INFINITY:", ":",
        ("processors/test_truncation.py::test_a_chain_is_the_warpers_one_by_one",),
    ),
    Mutation(
        "a nucleus one token short", f"{KERNELS}/truncate/cpu.py",
        "drop = _spare((p.cumsum(1) - p >= value).flip(1), rule)",
        "drop = _spare((p.cumsum(1) >= value).flip(1), rule)",
        ("processors/test_truncation.py::test_a_nucleus_holds_its_mass_and_no_token_too_many",),
    ),
    Mutation(
        "the fused normalisation forgotten", f"{PACKAGE}/plan/selection.py",
        "normalise = self._after is not None", "normalise = False",
        ("kernels/selection/test_selection.py::test_steps_that_share_a_pass_are_the_steps_one_by_one",),
    ),
    Mutation(
        "as much room in registers whatever the vocabulary", f"{SELECTION}/layout.py",
        "if fewest <= slots and _most_candidates(fewest, V, deviations, margin) <= slots:", "if fewest <= slots // 6:",
        ("kernels/selection/test_selection.py::test_what_bounds_let_through_has_room_in_registers",),
    ),
    # -- draws and reports --
    Mutation(
        "a Philox constant", f"{KERNELS}/draw.py",
        "_WEYL = (0x9E3779B9,", "_WEYL = (0x9E3779B1,",
        ("test_sampling.py::test_philox_gives_the_published_answers",),
    ),
    Mutation(
        "a rank that leaves out its equals", f"{KERNELS}/selection/logprobs.py",
        "tl.where(inside & (x >= own), 1, 0)", "tl.where(inside & (x > own), 1, 0)",
        (
            "kernels/selection/test_logprobs.py::test_hard_rows",
            "kernels/selection/test_logprobs.py::test_tokens_that_tie_come_by_their_ids",
        ),
    ),
    Mutation(
        "a tournament without its losers", f"{KERNELS}/synthid.py",
        "p *= 1 + g - mass\n", "p *= 1 + g\n",
        ("processors/test_watermark.py::TestSynthIDKernel::test_is_the_reference",),
    ),
    Mutation(
        "temperature after the truncations", f"{PACKAGE}/sampling.py",
        "return self._truncated(plain / divisor), None", "return self._truncated(plain) / divisor, None",
        ("test_sampling.py",),
    ),
    Mutation(
        "a finite fill value never drawn", f"{PACKAGE}/plan/fusion.py",
        "and all(rule.filter_value == -math.inf for rule in rules)", "and bool(rules)",
        ("kernels/selection/test_selection.py::test_a_fill_value_that_can_be_drawn",),
    ),
    Mutation(
        "a draw used by others before it is made", f"{PACKAGE}/sampling.py",
        "            joined = self._joined = self._join(plan)\n",
        "            self._joined = joined._replace(plan=plan)\n            joined = self._joined = self._join(plan)\n",
        ("plan/test_concurrency.py::test_a_draw_called_while_another_thread_prepares_it",),
    ),
    Mutation(
        "a tied token kept by its last ids", f"{KERNELS}/selection/keep.py",
        "rank_of(token, LOWEST_TIES)", "rank_of(token, False)",
        ("serving/test_batch.py::test_ties_of_the_lowest_ids_in_place",),
    ),
    # -- engines --
    Mutation(
        "a scale that multiplies all logits", f"{KERNELS}/pointwise/dense.py",
        "tl.where(x < 0, x * scale, tl.div_rn(x, scale))", "x * scale",
        ("kernels/pointwise/test_dense.py::test_all_and_any_of_them",),
    ),
    Mutation(
        "draft rows with the numbers of other requests", f"{KERNELS}/pointwise/dense.py",
        "request = row // repeat", "request = row % repeat",
        ("kernels/pointwise/test_dense.py::test_all_and_any_of_them",),
    ),
    Mutation(
        "one token too few of a request with drafts", f"{PACKAGE}/integrations/vllm_step.py",
        "return Taken(tokens[places], kept + 1)", "return Taken(tokens[places], kept)",
        ("integrations/test_vllm_step.py::test_drafts_that_are_accepted",),
    ),
    Mutation(
        "an end banned where a grammar allows nothing else", f"{PACKAGE}/integrations/vllm_step.py",
        "(early & others & (rows.slots >= 0))", "(early & (rows.slots >= 0))",
        ("integrations/test_vllm_step.py::test_ends_unless_nothing_else_is_left",),
    ),
    Mutation(
        "a slot's new request drawn as the old one beside others", f"{PACKAGE}/integrations/vllm_step.py",
        "            for batch in (self._whole, self._edits, self._draws):", "            for batch in (self._whole,):",
        ("integrations/test_vllm_step.py::test_slots_that_change_hands",),
    ),
    Mutation(
        "an unknown field that is ignored", f"{PACKAGE}/integrations/vllm_sampler.py",
        "        if unknown:\n", "        if unknown and False:\n",
        ("integrations/test_vllm_sampler.py::test_requests_that_are_served_by_vllm",),
    ),
    Mutation(
        "a sampler put into a vLLM that it doesn't fit", f"{PACKAGE}/integrations/vllm_hooks.py",
        "            if trees[path].get(wanted.name) != wanted.arguments:",
        "            if wanted.name not in trees[path]:",
        ("integrations/test_vllm_hooks.py::test_another_vllm_keeps_its_own_sampler",),
    ),
    Mutation(
        "a seed of which only 32 bits count", f"{PACKAGE}/transformers/continuous_draw.py",
        "return (high << 32) | (low & _LOW)", "return low & _LOW",
        ("transformers/test_continuous.py::test_seeds_that_requests_are_given",),
    ),
    # -- serving --
    Mutation(
        "the first piece of a list left out", f"{SELECTION}/filter.py",
        "range(piece * _LISTED, tl.where(asks, count, 0)", "range((piece + 1) * _LISTED, tl.where(asks, count, 0)",
        ("serving/test_batch.py::test_edited_tokens_among_the_candidates",),
    ),
    Mutation(
        "pieces of a list that overlap", f"{SELECTION}/filter.py",
        "tl.where(asks, count, 0), listed.pieces * _LISTED)", "tl.where(asks, count, 0), _LISTED)",
        ("serving/test_batch.py::test_edited_tokens_among_the_candidates",),
    ),
    Mutation(
        "the end of a span left out", f"{KERNELS}/serving/search.py",
        "next_spans = tl.where(in_span & ends, spans & (spans - 1), spans)",
        "next_spans = tl.where(in_span, spans & (spans - 1), spans)",
        ("serving/test_history_index.py::test_an_index_of_the_sizes_of_real_batches",),
    ),
    Mutation(
        "a removed request acts on", f"{PACKAGE}/serving/batch.py",
        "        self._flags[slot].zero_()\n", "",
        ("serving/test_batch.py::test_a_slot_holds_nothing_of_the_request_before",),
    ),
    Mutation(
        "allowed tokens lift the bans", f"{PACKAGE}/serving/packing.py",
        "mask if kept is None else mask | kept", "mask if kept is None else mask & kept",
        (
            "serving/test_batch.py::test_a_request_gets_what_the_processors_of_its_parameters_give"
            "[torch-allowed and many banned]",
        ),
    ),
    Mutation(
        "the shortest repetition goes free", f"{PACKAGE}/serving/packing.py",
        "if n >= least else 0.0", "if n > least else 0.0",
        ("serving/test_batch.py::test_a_request_gets_what_the_processors_of_its_parameters_give",),
    ),
    Mutation(
        "draft tokens unseen", f"{KERNELS}/serving/search.py",
        "seen = place.stored + place.local", "seen = place.stored",
        ("serving/test_batch.py::test_draft_rows_see_the_history_and_their_own_prefix",),
    ),
    Mutation(
        "draft tokens one row too early (torch)", f"{KERNELS}/serving/reference.py",
        "rows.draft_ids[row - local + 1 : row + 1]", "rows.draft_ids[row - local : row]",
        ("serving/test_batch.py::test_draft_rows_see_the_history_and_their_own_prefix",),
    ),
    Mutation(
        "a stale tally", f"{KERNELS}/serving/search.py",
        "tl.store(edits.tallies_ptr + here, 0, mask=place < total)",
        "tl.store(edits.tallies_ptr + here, 0, mask=place < 0)",
        ("serving/test_batch.py::test_a_step_repeated_until_the_places_of_its_edits_come_round",),
    ),
    Mutation(
        "a token written behind a full history", f"{KERNELS}/serving/history.py",
        "mask=found & (place < growing.L))", "mask=found & (place <= growing.L))",
        ("serving/test_batch.py::test_append_keeps_the_order_of_tokens_and_ignores_what_names_no_request",),
    ),
    Mutation(
        "a first window one step too long (torch)", f"{KERNELS}/serving/reference.py",
        "if request.step < record.number(FIRST_WINDOW):", "if request.step <= record.number(FIRST_WINDOW):",
        ("serving/test_batch.py::test_a_request_gets_what_the_processors_of_its_parameters_give",),
    ),
    Mutation(
        "a wrong draft that is kept", f"{KERNELS}/serving/history.py",
        "((entry == first) | (draft == drawn))", "((entry <= first + 1) | (draft == drawn))",
        ("serving/test_accept.py::test_drafts_are_kept_up_to_the_first_wrong_one",),
    ),
    Mutation(
        "drafts kept behind a wrong one", f"{KERNELS}/serving/reference.py",
        "(kept[row - 1] >= 0 and kept[row - 1] == drafts[row])", "tokens[row - 1] == drafts[row]",
        ("serving/test_accept.py::test_drafts_are_kept_up_to_the_first_wrong_one",),
    ),
    Mutation(
        "an index that a row has not seen yet", f"{KERNELS}/serving/index.py",
        "asks & (indexed <= stored)", "asks",
        ("serving/test_history_index.py::test_a_row_that_sees_less_than_the_index_reads_what_it_sees",),
    ),
    Mutation(
        "carried counts left out", f"{KERNELS}/serving/search.py",
        "mark_text(edits.edited_ptr, carries, 0, carries.length, words, BLOCK)", "pass",
        ("serving/test_history_index.py::test_a_token_whose_count_was_carried_whole_is_penalised",),
    ),
    Mutation(
        "an empty batch launched as the one before", f"{KERNELS}/runtime/launcher.py",
        "        if not programs:\n            return\n", "",
        ("kernels/runtime/test_driver.py::test_nothing_is_launched_for_no_rows",),
    ),
    Mutation(
        "Triton's launchers imported at once", f"{KERNELS}/runtime/launcher.py",
        "    with _importing:\n        return compiled.run\n", "    return compiled.run\n",
        ("kernels/runtime/test_driver.py::test_threads_ask_for_triton_s_launchers_one_by_one",),
    ),
    Mutation(
        "a profiler's launch imports a launcher by itself", f"{KERNELS}/runtime/launcher.py",
        "                _triton_s_launcher(loaded.compiled)\n", "",
        ("kernels/runtime/test_driver.py::test_threads_ask_for_triton_s_launchers_one_by_one",),
    ),
    Mutation(
        "Triton's launcher imported for what the driver launches", f"{KERNELS}/runtime/launcher.py",
        "                if entry is None:\n                    _triton",
        "                if compiled is not None:\n                    _triton",
        ("kernels/runtime/test_driver.py::test_with_the_driver_nobody_asks_for_triton_s_launcher",),
    ),
    Mutation(
        "one GPU's function launched on another", f"{KERNELS}/runtime/launcher.py",
        "loaded = self._loaded.get((device, compiled))",
        "loaded = next((each for (_, its), each in self._loaded.items() if its is compiled), None)",
        ("kernels/runtime/test_driver.py::test_a_kernel_is_loaded_once_on_each_device",),
    ),
    Mutation(
        "parameters in tuples counted as arguments", f"{KERNELS}/runtime/driver.py",
        "flat = all(len(place) == 1 for place in entry.places)", "flat = True",
        ("kernels/runtime/test_driver.py::test_a_relaunch_takes_what_stands_in_tuples",),
    ),
    Mutation(
        "the token behind the index unread", f"{KERNELS}/serving/search.py",
        "rest = tl.where(every, -1, covered.tokens)", "rest = tl.where(every, -1, covered.tokens + 1)",
        ("serving/test_history_index.py",),
    ),
    Mutation(
        "the first token may come twice", f"{KERNELS}/serving/search.py",
        "rest = tl.where(every, -1, covered.tokens)", "rest = tl.where(every, 0, covered.tokens)",
        ("serving/test_batch.py::test_no_token_twice",),
    ),
    Mutation(
        "biases before repetitions", f"{KERNELS}/serving/reference.py",
        "(_count, _penalize, _lower_repetitions, _bias)", "(_count, _penalize, _bias, _lower_repetitions)",
        ("serving/test_batch.py::test_biases_come_last_where_the_engine_adds_them_last",),
    ),
    Mutation(
        "repetitions in spans alone", f"{KERNELS}/serving/search.py",
        "rest = tl.where(rest_lowers, covered.tokens, tl.maximum(covered.tokens, stop))",
        "rest = tl.maximum(covered.tokens, stop)",
        ("serving/test_history_index.py", "serving/test_batch.py"),
    ),
    Mutation(
        "repetitions in the last span alone", f"{KERNELS}/serving/search.py",
        "lowering |= tl.where(any_lowered > 0, span, span * 0)", "lowering = tl.where(any_lowered > 0, span, span * 0)",
        ("serving/test_history_index.py",),
    ),
    Mutation(
        "the token before the last one unread", f"{KERNELS}/serving/search.py",
        "(previous == end.before)", "(previous == previous)",
        ("serving/test_history_index.py", "serving/test_batch.py"),
    ),
    Mutation(
        "known tokens of a match counted twice", f"{KERNELS}/history.py",
        "tl.full([], 0, tl.int32) + known", "tl.full([], 0, tl.int32)",
        ("serving/test_history_index.py", "serving/test_batch.py"),
    ),
    Mutation(
        "a word of two programs", f"{KERNELS}/history.py",
        "* words.splits + words.split) * 8", "* words.splits + words.split // 2 * 2) * 8",
        ("serving/test_batch.py", "plan/test_pointwise.py", "serving/test_history_index.py"),
    ),
    Mutation(
        "a step's addresses in another order", f"{KERNELS}/serving/prepared.py",
        "out, work, tokens = stand_in(given.out), stand_in(given.work), stand_in(given.tokens)",
        "work, out, tokens = stand_in(given.work), stand_in(given.out), stand_in(given.tokens)",
        ("kernels/runtime/test_driver.py::test_the_driver_is_asked_for_what_triton_s_launcher_asks_for",),
    ),
    # -- inside generate --
    Mutation(
        "an end forced one token late", f"{PACKAGE}/transformers/continuous.py",
        'When("length", start=-1, stop=0)', 'When("length", start=0, stop=1)',
        ("transformers/test_continuous.py::test_each_request_is_processed_as_itself",),
    ),
    Mutation(
        "a token of the history never sent",
        f"{PACKAGE}/transformers/continuous.py",
        "lacking.append((row, count, state.position_offset - 1, state))",
        "lacking.append((row, count, state.position_offset - 2, state))",
        ("transformers/test_continuous.py::test_each_request_is_processed_as_itself",),
    ),
    Mutation(
        "a candidate's own prefix ignored", f"{PACKAGE}/transformers/accelerate.py",
        "part(tokens[:, : seen + i], rows[i : i + 1], run)", "part(tokens[:, :seen], rows[i : i + 1], run)",
        ("transformers/test_accelerate.py::test_candidates_with_processors_that_need_each_position",),
    ),
    Mutation(
        "every step of a run draws alike", f"{PACKAGE}/transformers/decode.py",
        "positions = self._starts + (input_ids.shape[1] - self._start)", "positions = self._starts + 0",
        ("transformers/test_decode.py::test_each_step_draws_anew",),
    ),
    Mutation(
        "the sequences of a prompt draw alike", f"{PACKAGE}/transformers/decode.py",
        "row % num_return_sequences * _PART", "row % num_return_sequences",
        ("transformers/test_decode.py::test_sequences_of_a_request_share_no_noise",),
    ),
    # -- the captured step of decode, run uncaptured on the CPU --
    Mutation(
        "a step whose noise stays", f"{PACKAGE}/transformers/step.py", "self._noise.add_(1)", "self._noise.add_(0)",
        ("transformers/test_loop.py::test_the_same_tokens_and_scores",),
    ),
    Mutation(
        "a token appended one place late", f"{PACKAGE}/transformers/step.py",
        "self.history.index_copy_(1, self._position.reshape(1), tokens",
        "self.history.index_copy_(1, self._position.reshape(1) + 1, tokens",
        ("transformers/test_loop.py::test_the_same_tokens_and_scores",),
    ),
    Mutation(
        "a row that goes on after its end", f"{PACKAGE}/transformers/step.py",
        "self.finished & self._pads", "self.finished & ~self._pads",
        ("transformers/test_loop.py::test_the_end_of_each_text",),
    ),
    Mutation(
        "a text cut off one token early", f"{PACKAGE}/transformers/loop.py",
        "self._prompt_length + count].clone()", "self._prompt_length + count - 1].clone()",
        ("transformers/test_loop.py::test_the_same_tokens_and_scores",),
    ),
    Mutation(
        "a later call that keeps the numbers of the first", f"{PACKAGE}/transformers/values.py",
        "theirs.copy_(mine)", "mine.copy_(theirs)",
        ("transformers/test_values.py::test_numbers_that_are_put_in",),
    ),
    Mutation(
        "a cache given back without its last token", f"{PACKAGE}/transformers/loop.py",
        "cached, cached + count - 1)", "cached, cached + count - 2)",
        ("transformers/test_loop.py::test_a_cache_that_is_returned",),
    ),
    Mutation(
        "drafts accepted up to one that was wrong", f"{PACKAGE}/transformers/drafts.py",
        "if self._done or i == len(drafts) or token != drafts[i]:", "if self._done or i == len(drafts):",
        ("transformers/test_decode_drafts.py::test_the_same_tokens_and_scores",),
    ),
    Mutation(
        "a verification that counts a wrong draft as cached", f"{PACKAGE}/transformers/drafts.py",
        "            cached += count\n", "            cached += count + (count <= len(drafts))\n",
        ("transformers/test_decode_drafts.py::test_the_same_tokens_and_scores",),
    ),
    Mutation(
        "rows of a verification that draw alike", f"{PACKAGE}/transformers/step.py",
        "noise = self._noise + (self._position + 1 - self._prompt_length)",
        "noise = self._noise + (self._position[0] + 1 - self._prompt_length).expand(W)",
        ("transformers/test_decode_drafts.py::test_the_same_tokens_and_scores",),
    ),
    Mutation(
        "a draft model that keeps what was taken back", f"{PACKAGE}/transformers/drafters.py",
        "            self._seen = self._seen[:same]\n", "            pass\n",
        ("transformers/test_decode_drafts.py::test_the_draft_model_is_believed",
         "transformers/test_decode_drafts.py::test_the_steps_of_the_draft_model_are_captured_too"),
    ),
    Mutation(
        "queries grouped by the wrong head", f"{PACKAGE}/transformers/attention.py",
        "query.reshape(B, H // groups, groups * L, D)", "query.transpose(1, 2).reshape(B, H // groups, groups * L, D)",
        ("transformers/test_attention.py::test_the_same_attention",),
    ),
    Mutation(
        "a candidate's result that is a slice of what it is stored into", f"{PACKAGE}/transformers/accelerate.py",
        "return self._processed[i : i + 1] if self._changed else scores", "return self._processed[i : i + 1]",
        ("transformers/test_drafts.py::test_a_step_that_changes_nothing",),
    ),
    Mutation(
        "candidates that are remembered while others are drafted", f"{PACKAGE}/transformers/accelerate.py",
        "processors.expect_nothing()", "pass",
        ("transformers/test_drafts.py::test_candidates_of_before_are_forgotten",),
    ),
    Mutation(
        "a block that ends all blocks of its model", f"{PACKAGE}/transformers/accelerate.py",
        "if not hold.count and hold is", "if hold is",
        ("transformers/test_accelerate_models.py::test_a_block_ends_what_it_has_begun",),
    ),
    Mutation(
        "an old block that ends a later one", f"{PACKAGE}/transformers/accelerate.py",
        "if not hold.count and hold is", "if not hold.count or hold is not",
        ("transformers/test_accelerate_models.py::test_restore_ends_all_blocks_and_they_end_nothing_else",),
    ),
    Mutation(
        "scores of a manager that a processor writes", f"{PACKAGE}/transformers/continuous.py",
        "scores = given.clone()  # which it may write", "scores = given",
        ("transformers/test_continuous.py::test_the_scores_of_a_manager_are_not_written",),
    ),
    Mutation(
        "a tokenizer that generate keeps", f"{PACKAGE}/transformers/hooks.py",
        'rest["tokenizer"] = taken["tokenizer"]', "pass",
        ("transformers/test_decode.py::test_stop_strings",),
    ),
    # -- training --
    Mutation(
        "a target outside that joins nothing", f"{KERNELS}/training/rows.py",
        "joins = own.known & (found == 0) & (whole == 0)", "joins = own.known & (found < 0) & (whole == 0)",
        ("training/test_logprobs.py::test_kept_sets_in_each_form",),
    ),
    Mutation(
        "a gradient that isn't divided by the temperature", f"{KERNELS}/training/gradient.py",
        "- p * share) * softmax.inverse", "- p * share)",
        ("training/test_logprobs.py::test_is_what_it_is_defined_to_be",),
    ),
    Mutation(
        "the cut-off in raw logits one number too high", f"{KERNELS}/training/rows.py",
        "number_of(high.to(tl.int32))", "number_of(high.to(tl.int32) + 1)",
        ("training/test_logprobs.py::test_is_what_it_is_defined_to_be",),
    ),
    Mutation(
        "tokens kept for certain that weigh nothing", f"{SELECTION}/masses.py",
        "mass += load_certain(source.work, shape, tl.full([], BRACKET, tl.int32), PARTS).mass", "mass += 0",
        ("training/test_logprobs.py::test_long_rows_whose_candidates_are_a_part_of_them",),
    ),
    Mutation(
        "a tile that isn't brought to the largest logit of its row", f"{SELECTION}/tiles.py",
        "share = tl.where(there, tl.exp2(-apart * LOG2_E), 0.0)", "share = tl.where(there, 1.0, 0.0)",
        ("kernels/selection/test_logprobs.py::test_is_what_log_softmax_says",),
    ),
    Mutation(
        "a position that sees one token more", f"{PACKAGE}/training/history.py",
        "self.input_ids.shape[1] - self.T + t + 1]", "self.input_ids.shape[1] - self.T + t + 2]",
        ("training/test_history.py::test_each_position_is_as_it_was_sampled",),
    ),
    Mutation(
        "ids of bits that begin a word later", f"{KERNELS}/training/kept.py",
        "place = total + tl.cumsum(number, 0) - number", "place = total + tl.cumsum(number, 0)",
        ("test_kept_tokens.py::test_ids_of_bits",),
    ),
    Mutation(
        "a shared tile beside the largest logit of one of its ranks", f"{KERNELS}/training/shards.py",
        "return tl.maximum(first, last)", "return first",
        ("training/test_shards.py::test_kernels_have_what_the_whole_has",),
    ),
    Mutation(
        "a shared tile that is added up twice", f"{KERNELS}/training/shards.py",
        "there = there & ((tile > 0) | (part.first_slot < 0)) &", "there = there &",
        ("training/test_shards.py::test_kernels_have_what_the_whole_has",),
    ),
    Mutation(
        "a target that a set on another rank doesn't have", f"{KERNELS}/training/shards.py",
        "mass += tl.where(joins & reads, weight_of(own.x, top), 0)", "mass += 0",
        ("training/test_shards.py::test_kernels_have_what_the_whole_has",),
    ),
    Mutation(
        "a record that stays with all that it stands for", f"{KERNELS}/training/ruled_shards.py",
        "mine = (within > 1) &", "mine = (within < 0) &",
        ("training/test_shards.py::test_some_of_many_tokens_that_tie",),
    ),
    # -- logits split over ranks --
    Mutation(
        "tiles that the token's logit is the largest of aren't counted", f"{KERNELS}/parallel/report.py",
        "* TILE_WORDS) < own", "* TILE_WORDS) <= own",
        ("parallel/test_report.py::test_the_ranks_report_what_one_process_reports",),
    ),
    Mutation(
        "the likeliest tokens by their place in the part", f"{KERNELS}/parallel/report.py",
        "(0x7FFFFFFF - token - first)", "(0x7FFFFFFF - token)",
        ("parallel/test_report.py::test_the_ranks_report_what_one_process_reports",),
    ),
    Mutation(
        "two processors of a sampler that take the same random number", f"{PACKAGE}/plan/chance.py",
        "        taken += 1\n", "        taken += 0\n",
        ("test_chance.py::test_numbers_by_seeds_are_even_and_of_their_own",),
    ),
    Mutation(
        "a sampler whose processors ask torch's generator", f"{PACKAGE}/sampling.py",
        "with chance.by_seeds(seeds, positions) if self._processors.plan.may_draw else nullcontext():", "if True:",
        ("test_chance.py::test_a_sampler_draws_by_seed_and_position_alone",),
    ),
    Mutation(
        "a backward pass that draws anew", f"{PACKAGE}/training/history.py",
        "return nullcontext() if drawn is None else chance.again(drawn)", "return nullcontext()",
        ("test_chance.py::test_the_gradient_is_that_of_what_was_drawn",),
    ),
    Mutation(
        "a DTensor that binds its sampler", f"{PACKAGE}/sampling.py",
        "split = self._splits[group] = self._splits.get(group) or self._splitting(group)",
        "split = self._split = self._splitting(group)",
        ("parallel/test_sampling.py::test_a_dtensor_binds_no_later_call",),
    ),
    Mutation(
        "token ids that are read once for all", f"{PACKAGE}/processors/base.py",
        "return bool(read) and any(", "return False and any(",
        ("plan/test_written_tensors.py::test_what_is_written_counts_from_the_next_call_on",),
    ),
    Mutation(
        "ids of another vocabulary that nobody finds", f"{PACKAGE}/kept_tokens.py",
        "wrong = (ids < 0) | (ids >= self.vocab_size)", "wrong = (ids < 0) | (ids > self.vocab_size)",
        ("test_kept_tokens.py::test_what_another_vocabulary_has_is_found",),
    ),
    Mutation(
        "a record that is weighed with what is before it", f"{KERNELS}/parallel/front.py",
        "tl.where(rank > its_rank, its_x, above)", "tl.where(rank >= its_rank, its_x, above)",
        ("parallel/test_front.py::test_each_rank_finds_what_one_process_samples",),
    ),
    Mutation(
        "tokens of another tile that tie with a record, on the wrong side", f"{KERNELS}/parallel/front.py",
        "tl.where(first_rank > its_rank, its_x, above)", "tl.where(first_rank > its_rank, above, its_x)",
        ("parallel/test_front.py::test_each_rank_finds_what_one_process_samples",),
    ),
    Mutation(
        "what follows the last record is sent as it stood in memory", f"{KERNELS}/parallel/front.py",
        "mask=word >= 2 * count)", "mask=word > 2 * count)", ("parallel/test_sent.py",),
    ),
    Mutation(
        "what follows the last entry is sent as it stood in memory", f"{KERNELS}/parallel/pack.py",
        "mask=place >= count + records)", "mask=place > count + records)", ("parallel/test_sent.py",),
    ),
    Mutation(
        "tokens that tie with a pivot and come before it are ruled out", f"{KERNELS}/parallel/front.py",
        "((x == its_x) & (rank < (at & _LOW_WORD).to(tl.int32)))", "(x == its_x)",
        ("parallel/test_front.py::test_rows_that_are_cut_anywhere_among_tokens_that_tie",),
    ),
    Mutation(
        "of many survivors only the first ones", f"{KERNELS}/parallel/front.py",
        "if found <= _FEW:", "if found >= 0:",
        ("parallel/test_front.py::test_more_survivors_than_are_few",),
    ),
    Mutation(
        "rules that act beside NaN, on parts", f"{KERNELS}/parallel/front.py",
        "if request.greedy | (mass != mass):", "if request.greedy:",
        ("parallel/test_front.py::test_each_rank_finds_what_one_process_samples",),
    ),
    Mutation(
        "sums of what an earlier rule has left, from parts", f"{KERNELS}/parallel/launch.py",
        "        and not any(rule.spec.sums for rule in acting[1:])\n", "",
        ("parallel/test_front.py::test_which_rules_keep_the_first",),
    ),
    Mutation(
        "a record that stands for itself alone", f"{KERNELS}/parallel/union.py",
        "many = tl.where(ties, following - bits, 1)", "many = tl.where(ties, 1, 1)",
        ("parallel/test_parts.py::test_more_ties_than_a_block_holds_and_rows_without_a_distribution",),
    ),
    Mutation(
        "a greedy row that sends no record", f"{KERNELS}/parallel/pack.py",
        "if many & plain:", "if many & (plain == 7):",
        ("parallel/test_parts.py::test_more_ties_than_a_block_holds_and_rows_without_a_distribution",),
    ),
    Mutation(
        "NaN that is sent with all others", f"{KERNELS}/parallel/pack.py",
        "if has_nan:", "if has_nan & (V == 7):",
        ("parallel/test_parts.py::test_more_ties_than_a_block_holds_and_rows_without_a_distribution",),
    ),
    Mutation(
        "a part with the noise of the first one", f"{SELECTION}/sample_rows.py",
        "coarse_words(octet + first // OCTET,", "coarse_words(octet,",
        ("parallel/test_parts.py::test_the_ranks_sample_from_their_parts",),
    ),
    Mutation(
        "dealt rows with the seeds of the first ones", f"{PACKAGE}/parallel/sampling.py",
        "self.seeds[rows]", "self.seeds[: rows.stop - rows.start]",
        ("parallel/test_sampling.py::test_all_ranks_sample_what_one_process_samples",),
    ),
    Mutation(
        "a mask that isn't cut to its part", f"{PACKAGE}/parallel/stages.py",
        "stage.mask(piece.V).row()[piece.start : piece.stop]", "stage.mask(piece.V).row()[: piece.stop - piece.start]",
        ("parallel/test_process.py::test_what_maps_each_logit_needs_no_other_part",),
    ),
    Mutation(
        "ranks that don't compare their arguments", f"{PACKAGE}/parallel/group.py",
        "if form.get(name) != forms[0].get(name):", "if False:",
        ("parallel/test_sampling.py::test_the_error_says_which_rank_differs",),
    ),
]  # fmt: skip


# A failure that hypothesis has found says enough; to look for the smallest one takes minutes.
_NO_SHRINKING = """
from hypothesis import Phase

settings.register_profile("no shrinking", derandomize=True, phases=[Phase.explicit, Phase.generate])
settings.load_profile("no shrinking")
"""


def copy_tree(folder: Path) -> None:
    """What the tests need of the repository."""
    for name in _COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
        else:
            shutil.copy2(source, folder / name)
    with (folder / "tests" / "conftest.py").open("a") as conftest:
        conftest.write(_NO_SHRINKING)


def mutated(mutation: Mutation, text: str) -> str:
    """The text of the file, wrong.

    Raises:
        ValueError: the text to replace does not stand there exactly once.
    """
    found = text.count(mutation.old)
    if found != 1:
        raise ValueError(f"{mutation.name}: {mutation.file} holds {found} times, not once: {mutation.old!r}")
    return text.replace(mutation.old, mutation.new)


def run_tests(folder: Path, tests: Sequence[str], limit_s: float | None = _LIMIT_S) -> tuple[int, str]:
    """The status and the output of pytest in a copy; a run that takes too long has failed.

    Bytecode is not written: a file that changes back within a second, at its old size, would be taken for the same.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (folder, folder / "kernels"))),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        *(f"tests/{test}" for test in tests),
    ]
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=limit_s
        )
    except subprocess.TimeoutExpired:
        return _FAILED, f"more than {limit_s} s"
    return done.returncode, done.stdout + done.stderr


def verdict(status: int, output: str) -> str:
    """Whether a mutation was caught, by the status of its tests.

    Raises:
        RuntimeError: the tests did not run, which says nothing.
    """
    if status == 0:
        return "survived"
    if status == _FAILED or status < 0:
        return "caught"
    raise RuntimeError(f"pytest ended with status {status}:\n{output[-3000:]}")


def run(mutations: Sequence[Mutation], console: Console) -> Iterator[dict[str, object]]:
    """Try mutations one by one; a row for each, as soon as it is known."""
    with (
        tempfile.TemporaryDirectory(prefix="fastlogits-") as made,
        Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
        ) as progress,
    ):
        folder = Path(made)
        copy_tree(folder)
        texts = [mutated(each, (folder / each.file).read_text()) for each in mutations]
        task = progress.add_task("unchanged", total=len(mutations))
        status, output = run_tests(folder, list(dict.fromkeys(test for each in mutations for test in each.tests)), None)
        if status:
            raise RuntimeError(f"the tests fail without a mutation:\n{output[-3000:]}")
        for mutation, text in zip(mutations, texts, strict=True):
            progress.update(task, description=mutation.name)
            path = folder / mutation.file
            before = path.read_text()
            path.write_text(text)
            start = time.perf_counter()
            outcome = verdict(*run_tests(folder, mutation.tests))
            path.write_text(before)
            yield dated(
                {
                    "name": mutation.name, "file": mutation.file, "tests": " ".join(mutation.tests),
                    "outcome": outcome, "seconds": f"{time.perf_counter() - start:.1f}",
                }
            )  # fmt: skip
            if outcome == "survived":
                progress.console.print(f"survived: {mutation.name}", style="bold red")
            progress.advance(task)


def _table(rows: Sequence[dict[str, object]]) -> Table:
    caught = sum(row["outcome"] == "caught" for row in rows)
    table = Table("mutation", "file", "outcome", "s", title=f"{caught} of {len(rows)} caught", title_justify="left")
    for row in rows:
        style = "" if row["outcome"] == "caught" else "bold red"
        table.add_row(*(str(row[column]) for column in ("name", "file", "outcome", "seconds")), style=style)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign.mutations", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these mutations")
    parser.add_argument("--list", action="store_true", help="say which there are")
    given = parser.parse_args(arguments)
    console = Console()
    if given.list:
        for each in MUTATIONS:
            console.print(f"{each.name}: {each.file}, {' '.join(each.tests)}", markup=False)
        return 0
    names = {each.name for each in MUTATIONS}
    if given.only and not set(given.only) <= names:
        parser.error(f"no such mutation: {', '.join(sorted(set(given.only) - names))}")
    chosen = [each for each in MUTATIONS if not given.only or each.name in given.only]
    rows = []
    known: dict[object, Mapping[str, object]] = {row["name"]: row for row in read_rows(CSV)}
    for row in run(chosen, console):
        rows.append(row)
        # One row of each mutation, the last that was found.
        known[row["name"]] = row
        write_rows(CSV, [known[each.name] for each in MUTATIONS if each.name in known])
    console.print(_table(rows))
    return int(any(row["outcome"] == "survived" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
