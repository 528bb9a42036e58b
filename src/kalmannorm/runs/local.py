"""The pool of this machine's workers, by the name under which scripts outside of the package know it."""

from kalmannorm.runs.pool import Local

__all__ = ["Local"]
