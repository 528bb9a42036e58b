"""Tables, figures, verdicts and one page, made from the records of a results folder and nothing else.

    load    one frame: a row for each run and kind of statistics       frame.py
    cells   the frame, grouped as the rows of cards say                cells.py
    effects differences between rows under one model, with intervals   effects.py
    claims  the papers' claims, tested by one rule                     claims.py, claims.yaml, paper_values.yaml
    tables, figures (drawn by plots), page                             the files that are written

`load`, `curves` and `arrays` are for notebooks too.
"""

from kalmannorm.experiments.record import arrays
from kalmannorm.report.frame import check, curves, load

__all__ = ["arrays", "check", "curves", "load"]
