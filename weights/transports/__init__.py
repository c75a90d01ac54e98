"""How control messages and payload travel between a publisher and its hosts: one seam (`seam.py`) and its fills."""
