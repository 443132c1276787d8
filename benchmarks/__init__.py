"""Benchmarks of proctree beside its peers: `make bench`, or `python -m benchmarks --help`.

Every benchmark is a module with a function `measure(effort)` that yields rows of a table. Wherever
two things are compared, they are measured in turns (ours, a peer, the next peer, ours again, ...)
in one process and by their medians, so that a machine which is busy for a while is busy for all of
them. processkit gets turns of its own with ours: what it leaves to be done after its return (the
removal of a cgroup, threads) would be paid for by whoever has the next turn.
"""
