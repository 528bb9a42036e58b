"""Where runs execute, by the name under which scripts outside of the package know it."""

from kalmannorm.runs.placement import Options, split

__all__ = ["Options", "split"]
