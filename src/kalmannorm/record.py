"""Records of runs, by the name under which scripts outside of the package know them."""

from kalmannorm.experiments.record import Record, find, read, run_id

__all__ = ["Record", "find", "read", "run_id"]
