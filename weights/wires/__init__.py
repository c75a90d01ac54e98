"""What carries a broadcast: NCCL between GPUs, gloo between CPUs; and how its ranks meet."""
