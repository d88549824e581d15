"""Benchmarks of fastlogits: what its processors cost, beside what people use today and beside the memory roof.

    python -m benchmarks                       everything that this machine has: table, CSV, plot, targets
    python -m benchmarks --quick               one small size, in seconds
    python -m benchmarks --workload 'chain 9'  that workload only
    python -m benchmarks --device cuda --cold  also out of place on inputs that are not in the L2

No time is reported for a contender whose result differs from plain torch's by a bit (by more than rounding where
transformers' processors are the reference). Times are medians over rounds, in
each of which all contenders run in shuffled order, so that drift hits all alike:

- ``gpu_us``: replays of a CUDA graph that holds one call, back-to-back between two events. A bare replay is not
  free: the row of the empty kernel says what it costs.
- ``host_us``: what an eager call keeps the host busy for, on a queue that never fills.
- ``cpu_us``: wall time of a call on the CPU.

``results/<device>.csv`` is only ever appended to. Beside median, 10 % and 90 % quantile it has the median's ratio to
that of the loop, of ``copy_`` (the memory roof) and of ``add_`` (the cheapest call there is), as measured in the
same run. ``benchmarks/bench_first_step.py`` and ``benchmarks/bench_processors.py`` are suites for pytest-benchmark, to
compare two commits.
"""
