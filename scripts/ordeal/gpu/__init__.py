"""Faults on GPUs: hosts and learners that meet them in the middle of an update, and the judgement on what is left.

The same cells run between CPUs, with gloo for NCCL and shared files for CUDA's handles, so that CI knows the code.
"""
