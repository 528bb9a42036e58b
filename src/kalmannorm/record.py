from kalmannorm.experiments.record import Record, find, read, run_id  # noqa: F401, for scripts, as config.py
