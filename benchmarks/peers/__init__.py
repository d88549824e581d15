"""Other packages that do the same work, one a file: used by their public names only, measured where installed.

A peer is one entry of ``PEERS``. Its result is checked as ours is; where the package is missing, tables say so.
"""

from __future__ import annotations

from benchmarks.peers.compiled import COMPILED
from benchmarks.peers.flashinfer import FLASHINFER
from benchmarks.peers.handwritten import HANDWRITTEN
from benchmarks.peers.peer import Peer
from benchmarks.peers.vllm import VLLM
from benchmarks.peers.xgrammar import XGRAMMAR

__all__ = ["PEERS", "Peer"]

PEERS: dict[str, Peer] = {peer.name: peer for peer in (COMPILED, FLASHINFER, HANDWRITTEN, VLLM, XGRAMMAR)}
"""All peers by name."""
