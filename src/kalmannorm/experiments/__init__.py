"""Describe runs and experiments as data: configuration, record, card. Imports no torch."""
