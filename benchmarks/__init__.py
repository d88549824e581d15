"""Benchmarks of fastlogits: what its processors cost, beside what people use today and beside the memory roof.

    python -m benchmarks                       everything that this machine has: tables, and rows in a CSV file
    python -m benchmarks --quick               one small size, in seconds
    python -m benchmarks --main                the main workloads at four sizes: minutes on a GPU
    python -m benchmarks --workload 'chain 9'  that workload only
    python -m benchmarks --device cuda --cold  also out of place on inputs that are not in the L2
    python -m benchmarks --peers compiled      beside other packages: the installed ones are measured by default
    python -m benchmarks --base HEAD~1         fastlogits of another commit beside this one's, in turns
    python -m benchmarks plots                 draw what lies in results/; report: as one page; readme: into documents

No time is reported for a contender whose result differs from plain torch's by a bit (by more than rounding where
transformers' processors are the reference). Times are medians over rounds, in each of which all contenders run in
shuffled order, so that drift hits all alike:

- ``gpu_us``: replays of a CUDA graph that holds one call, back-to-back between two events. A bare replay is not
  free: the row of the empty kernel says what it costs.
- ``host_us``: what an eager call keeps the host busy for, on a queue that never fills.
- ``cpu_us``: wall time of a call on the CPU, with torch's threads.

``results/<device>.csv`` is only ever appended to. Beside median, 10 % and 90 % quantile it has the most memory that a
call allocates, and the time that moving the workload's bytes takes at the bandwidth measured in the same run.

To add a workload, add an entry to ``workloads.WORKLOADS``; to add another package, one to ``peers.PEERS``.
``bench_host.py`` is a suite for pytest-benchmark, to compare the host time of two commits.
"""
