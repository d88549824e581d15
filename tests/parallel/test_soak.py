"""A short run of what takes long: see ``tests.campaign.soak``."""

import torch

from tests.campaign.soak import SIZES, Soak


def of_soak(process_group):
    found = Soak(torch.device("cpu"), SIZES["cpu"]._replace(stretches=2), group=process_group).run(150)
    return found.steps, found.requests, found.looks


def test_a_short_soak_of_two_ranks(ranks):
    steps, requests, looks = ranks.alike(of_soak, 2)
    assert steps >= 150
    assert requests > 4
    assert looks > 1
