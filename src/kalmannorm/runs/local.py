from kalmannorm.runs.pool import Local  # noqa: F401, for scripts, as ../config.py
