from kalmannorm.experiments.config import Config, compose  # noqa: F401, for scripts that know them by this place
