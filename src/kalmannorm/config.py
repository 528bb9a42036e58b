"""The composition of a run's configuration, by the name under which scripts outside of the package know it."""

from kalmannorm.experiments.config import Config, compose

__all__ = ["Config", "compose"]
