"""What bench_reload.py measures with: a learner, a host that generates, and tables."""
