"""What bench_routing.py is made of: routers of public models, rows to route, comparisons, clocks."""
