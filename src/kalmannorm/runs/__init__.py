"""Sweeps: find the missing runs of an experiment, and execute them. torch is only imported to train or measure."""
