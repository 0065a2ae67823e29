"""Run a spec on a cluster: one SLURM array over variants and seeds, checks before, a table after."""
