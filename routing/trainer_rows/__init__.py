"""The tables of the trainers, one file each."""
