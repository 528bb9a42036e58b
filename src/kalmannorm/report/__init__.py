"""Tables, figures, verdicts and one page, from the records of a results folder and from nothing else.

    load    one frame: a row for each run and kind of statistics       frame.py
    cells   the frame grouped by what cards' rows name                 effects.py
    effects differences of rows under one model, with intervals        effects.py
    claims  the papers' sentences, by one rule                         claims.py, claims.yaml, paper_values.yaml
    tables, figures (drawn by plots), page                             what is written

`load`, `curves` and `arrays` are for notebooks too.
"""

from kalmannorm.experiments.record import arrays
from kalmannorm.report.frame import check, curves, load

__all__ = ["arrays", "check", "curves", "load"]
