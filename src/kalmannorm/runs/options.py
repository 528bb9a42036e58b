from kalmannorm.runs.placement import Options, split  # noqa: F401, for scripts, as ../config.py
