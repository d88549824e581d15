"""Logits that are split over the ranks of a process group, each with a part of the vocabulary."""

from fastlogits.parallel.group import Group as Group
from fastlogits.parallel.group import Shards as Shards
