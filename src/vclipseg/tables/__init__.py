"""Tables and figures of a record: what is made of `results/<grid>/` and nothing else."""
