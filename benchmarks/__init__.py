"""Benchmarks of fastlogits: what its processors cost, beside what people use today and the memory-bandwidth limit.

    python -m benchmarks                       everything that this machine has: tables, and rows in a CSV file
    python -m benchmarks --quick               one small size, in seconds
    python -m benchmarks --main                the main workloads at four sizes: minutes on a GPU
    python -m benchmarks --workload 'chain 9'  that workload only
    python -m benchmarks --device cuda --cold  also out of place on inputs that are not in the L2
    python -m benchmarks --peers compiled      beside other packages: the installed ones are measured by default
    python -m benchmarks --base HEAD~1         fastlogits of another commit beside this one's, in turns
    python -m benchmarks plots                 plot the newest run; report: a page of HTML
    python -m benchmarks publish RUN           what documents show is that run's; then readme: fill the documents

Two scripts of their own check on GPUs before they time, and exit with status 1 where something is wrong:

    python -m benchmarks.training                        log-probabilities in training, their gradients and memory
    torchrun --nproc-per-node 4 -m benchmarks.parallel   logits that are split over GPUs

A contender whose result differs from plain torch's gets no time: not by a bit, or by no more than rounding if
transformers' processors are the reference. Times are medians over rounds. In each round all contenders run in shuffled
order, so that drift hits all alike:

- ``gpu_us``: replays of a CUDA graph that holds one call, back-to-back between two events. A bare replay is not
  free: the row of the empty kernel shows its cost.
- ``host_us``: how long an eager call keeps the host busy, on a queue that never fills.
- ``cpu_us``: wall time of a call on the CPU, with torch's threads.

A run is kept in ``build/benchmarks/<run>/<device>.csv``, which git ignores. It has the median, the 10 % and the 90 %
quantile, the most memory that a call allocates, and the memory-bandwidth limit: the time to move the workload's bytes
at the bandwidth of the same run.

To add a workload, add an entry to ``workloads.WORKLOADS``; to add another package, one to ``peers.PEERS``.
``bench_host.py`` is a suite for pytest-benchmark, to compare the host time of two commits.
"""
