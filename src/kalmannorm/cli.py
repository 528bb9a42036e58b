"""`kalmannorm`: train, evaluate, export, sweep, report, records, data. A command imports what it needs."""

import argparse
import codecs
import io
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import chdir, nullcontext, suppress
from pathlib import Path

from kalmannorm.errors import LOST_PROCESS, OUT_OF_MEMORY, TOO_MANY_FILES, WORKER_ERROR, Stopped, UserError
from kalmannorm.runs.placement import HELP
from kalmannorm.stopping import listening

EPILOG = """overrides are Hydra's: group=name (dataset arch norm batch schedule budget) or key=value, for example
  kalmannorm train dataset=cifar10 arch=resnet32 norm=bkn batch=g128_s2 budget=lite seed=2
  kalmannorm sweep table7 dataset=cifar10 budget=paper seeds=3
  kalmannorm report table7 dataset=cifar10 budget=paper
  kalmannorm report                                       every table and figure, the claims, results/report.html
  torchrun --nproc-per-node 8 -m kalmannorm train dataset=cifar10 norm=bkn       the same run on 8 devices
exit codes: 0 all well; 1 a run failed; 2 wrong input; 129, 130, 138, 143 stopped by a signal (repeat to go on)"""


# Replacements for characters beyond ASCII in tables and titles, for terminals and pipes that cannot encode them.
ASCII = {
    "−": "-",
    "–": "-",
    "±": "+-",
    "×": "x",
    "≤": "<=",
    "≥": ">=",
    "…": "...",
    "’": "'",
    "σ": "sigma",
    "μ": "mu",
}


def main(arguments: Sequence[str] | None = None) -> int:
    _prepare_environment()
    try:
        options = _parse(_parser(), arguments)
        _check_folder()
        with listening():
            code: int = options.command(options)
        sys.stdout.flush()
        return code
    except UserError as error:
        return _say(str(error), 2)
    except Stopped as stopped:
        return _say(str(stopped), stopped.exit_code)
    except KeyboardInterrupt:
        return _say("interrupted; the same command goes on from the last checkpoint", 130)
    except BrokenPipeError:  # the reader of a pipe, such as head, has closed it
        _drop_output()
        return 0
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("kalmannorm"):
            raise
        return _say(f"{error.name} is not installed: pip install 'kalmannorm[detection]' has all that commands need", 2)
    except (MemoryError, RuntimeError) as error:
        if any(words in str(error) for words in LOST_PROCESS):
            return _say("another process of this run has ended, and says why; the same command goes on", 1)
        if TOO_MANY_FILES in str(error):
            return _say("too many open files: pass fewer workers= (0: none), or raise what is allowed (ulimit -n)", 2)
        if WORKER_ERROR in str(error):
            said = [line for line in str(error).splitlines() if line.strip()]
            remedy = (
                "pass fewer workers= (0: none), or more shared memory where this is a container (docker: --shm-size)"
            )
            return _say(f"a process that reads images failed ({said[-1]}): {remedy}", 2)
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        return _say("out of memory: pass a smaller batch.grad_batch, or accumulate=2 for half as much at once", 2)
    except OSError as error:
        if error.errno is None:
            raise
        try:
            sys.stdout.flush()
        except OSError:
            _drop_output()
        return _say(f"{error.filename or 'input or output'}: {error.strerror}", 2)


def _drop_output() -> None:
    """Redirect stdout to nowhere: Python flushes the rest of the output when it exits, and would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _say(text: str, code: int) -> int:
    print("kalmannorm:", text.replace("\n", "\\n"), file=sys.stderr)  # a path may contain newlines
    return code


def _check_folder() -> None:
    """Raise UserError if the current folder was removed: libraries would fail there with obscure messages."""
    try:
        os.getcwd()  # noqa: PTH109, no path is wanted
    except FileNotFoundError:
        raise UserError("the current folder was removed: go to another one (cd) and call again") from None


def _prepare_environment() -> None:
    """Guard against settings of the user's terminal, shell and matplotlib that would make a command fail or slow."""
    # With threads that wait busily, two processes on the same cores slow each other down many times over.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ |= {"MATPLOTLIBRC": os.devnull, "MPLBACKEND": "agg"}  # errors in the user's break its import
    with suppress(OSError):  # the current folder was removed
        if str(Path.cwd()) not in sys.path:  # an installed command: nor may workers import a user's queue.py
            os.environ["PYTHONSAFEPATH"] = "1"
    codecs.register_error("transliterate", _transliterate)
    if sys.stdout is None or sys.stderr is None:  # closed by the shell
        nowhere = Path(os.devnull).open("w")  # noqa: SIM115, as long as the process
        sys.stdout, sys.stderr = sys.stdout or nowhere, sys.stderr or nowhere
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="transliterate")


def _transliterate(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    if character in ASCII:
        return ASCII[character], error.start + 1
    one = UnicodeEncodeError(error.encoding, error.object, error.start, error.start + 1, error.reason)
    return codecs.backslashreplace_errors(one)


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse as parse_args does, but also allow overrides after options (`sweep table1 --dry-run budget=paper`), which
    argparse reports as unknown arguments."""
    options, rest = parser.parse_known_args(arguments)
    odd = [one for one in rest if one.startswith("-") or not ("=" in one or one.startswith("~"))]
    if odd or (rest and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kalmannorm",
        description="Kalman Normalization: reruns the papers' tables and figures, and says what holds.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"kalmannorm {sys.modules[__package__].__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, function: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=function)
        return sub

    def overrides(sub: argparse.ArgumentParser, text: str | None = None, name: str = "OVERRIDE") -> None:
        # With a default, since argparse would call them required where another argument is missing.
        sub.add_argument("overrides", nargs="*", default=[], metavar=name, help=text)

    train = add("train", _train, "train and evaluate one run")
    overrides(train)
    train.add_argument("-m", "--multirun", action="store_true", help="several runs: norm=bn,bkn seed=range(1,4)")
    evaluate = add("evaluate", _evaluate, "evaluate a run's weights with moving, online and precise statistics")
    evaluate.add_argument("run", metavar="RUN", help="a run's id, or the beginning of it")
    overrides(evaluate, "data=, runs=, results=, device=")
    export = add("export", _export, "write a run's weights as safetensors, with its configuration")
    export.add_argument("run", metavar="RUN", help="a run's id, or the beginning of it")
    export.add_argument("file", metavar="FILE", help="for example weights.safetensors")
    overrides(export, "runs=, results=")
    sweep = add("sweep", _sweep, "run what is missing of an experiment")
    sweep.add_argument("experiment", metavar="EXPERIMENT")
    overrides(sweep, "seeds=N, rows=paper, overrides, see below", "ARGUMENT")
    sweep.epilog, sweep.formatter_class = HELP, argparse.RawDescriptionHelpFormatter
    sweep.add_argument("--dry-run", action="store_true", help="list the runs and the predicted time, run nothing")
    report = add("report", _report, "make an experiment's table or figure from the records; without one, everything")
    report.add_argument("experiment", nargs="?", metavar="EXPERIMENT", help="none: all, claims.md and report.html")
    overrides(report, "as for sweep; without EXPERIMENT results=")
    report.add_argument("--compare", nargs=2, metavar="RUN", help="two runs' configurations, results and curves' ends")
    records = add("records", _records, "what runs are recorded; bring records together; remove stale ones")
    actions = records.add_subparsers(required=True, metavar="ACTION", dest="action")
    listed = actions.add_parser("list", help="a table of the records, tab-separated where it is not a terminal")
    overrides(listed, "only those: norm=bkn seed=1 status=failed")
    merge = actions.add_parser("merge", help="take in the records of other folders; nothing is overwritten")
    merge.add_argument("folders", nargs="+", metavar="FOLDER", help="a results folder of another machine")
    prune = actions.add_parser("prune", help="list stale and unreadable records; with --yes, delete them")
    prune.add_argument("--failed", action="store_true", help="those of failed runs too")
    prune.add_argument("--yes", action="store_true", help="delete what is listed")
    for action in (listed, merge, prune):
        action.add_argument("--results", default="results", metavar="FOLDER", help="(default: results)")
    data = add("data", _data, "bring a data set into the form that the harness reads")
    data.add_argument("action", choices=["prepare", "ffcv"], help="ffcv: an image folder as FFCV's .beton files")
    data.add_argument("dataset")
    data.add_argument("--root", help="the data root, where to and where from (default: $KALMANNORM_DATA, else ./data)")
    data.add_argument("--archive", help="prepare: an official archive that is already here")
    data.add_argument("--no-download", action="store_true", help="prepare: never use the network")
    data.add_argument("--out", help="ffcv: another folder for the files, for example on a faster disk (then data=OUT)")
    data.add_argument("--mode", default="jpg", help="ffcv: jpg or raw (default jpg)")
    data.add_argument("--quality", type=int, default=90, help="ffcv: of the JPEGs (default 90)")
    data.add_argument("--max-resolution", type=int, default=500, help="ffcv: longest side in pixels (default 500)")
    data.add_argument("--workers", type=_workers, default="auto", help="ffcv: processes (default: one a core)")
    data.add_argument("--skip-unreadable", action="store_true", help="ffcv: leave out images that cannot be read")
    data.add_argument("--timeout", type=_seconds, default=600, help="ffcv: seconds without an image (default 600)")
    return parser


def _seconds(text: str) -> float:
    with suppress(ValueError):
        if 0 < (seconds := float(text)) <= 10**6:
            return seconds
    raise argparse.ArgumentTypeError(f"{text}: expected seconds above 0, at most a million")


def _workers(text: str) -> int | str:
    if text != "auto" and not (text.isascii() and text.isdecimal() and int(text) <= 1024):
        raise argparse.ArgumentTypeError(f"{text}: expected auto or a number of processes up to 1024")
    return text if text == "auto" else int(text)


def _train(options: argparse.Namespace) -> int:
    if options.multirun:
        from kalmannorm.experiments.cards import multirun
        from kalmannorm.runs.placement import split
        from kalmannorm.runs.sweep import run

        where, overrides = split(options.overrides)
        return run(multirun(overrides), where)
    from kalmannorm.experiments.config import compose
    from kalmannorm.experiments.record import is_done, path, run_id
    from kalmannorm.files import check_writable
    from kalmannorm.machine import launch
    from kalmannorm.runs.lock import hold

    process = launch()
    config = compose(options.overrides)
    identity = run_id(config)
    if is_done(config.results, identity):
        print(f"{identity}: done already, {path(config.results, identity)}")
        return 0
    check_writable(path(config.results, identity).parent)
    # The first process of a distributed run holds the lock for all of them.
    with hold(config.runs, identity) if process.rank == 0 else nullcontext():
        from kalmannorm.train.run import execute

        code = 0 if execute(config)["status"] == "done" else 1
    if process.world > 1:
        from kalmannorm.train.ranks import end_process

        end_process(code)
    return code


def _evaluate(options: argparse.Namespace) -> int:
    from kalmannorm.train.run import evaluate

    evaluate(options.run, options.overrides)
    return 0


def _export(options: argparse.Namespace) -> int:
    from kalmannorm.train.run import export

    export(options.run, options.file, options.overrides)
    return 0


def _sweep(options: argparse.Namespace) -> int:
    from kalmannorm.runs.sweep import sweep

    return sweep(options.experiment, options.overrides, dry_run=options.dry_run)


def _report(options: argparse.Namespace) -> int:
    with chdir(os.sep):  # else matplotlib would read a matplotlibrc in the current folder
        import matplotlib  # noqa: F401

    from kalmannorm.report import command
    from kalmannorm.runs.placement import split

    name: str | None = options.experiment
    if name is None or "=" in name or options.compare:
        overrides = [*([name] if name else []), *options.overrides]
        return command.compare(options.compare, overrides) if options.compare else command.report_all(overrides)
    return command.report(name, split(options.overrides)[1])  # without the options of where runs execute


def _records(options: argparse.Namespace) -> int:
    from kalmannorm.experiments import records_command

    if options.action == "list":
        from kalmannorm.experiments.composition import refuse_repeated, split_paths

        refuse_repeated(options.overrides)
        paths, rest = split_paths(options.overrides)
        for key in paths.keys() - {"results"}:
            raise UserError(f"{key}= means nothing here: expected results=, and settings of the records to list")
        return records_command.show(paths.get("results") or options.results, rest)
    if options.action == "merge":
        return records_command.merge(options.results, options.folders)
    return records_command.prune(options.results, failed=options.failed, yes=options.yes)


def _data(options: argparse.Namespace) -> int:
    from kalmannorm import data

    root = data.root(options.root)
    if options.action == "ffcv":
        return _ffcv(options, root)
    archive = Path(options.archive) if options.archive else None
    folder = data.prepare(options.dataset, root, archive, not options.no_download)
    print(f"{options.dataset}: {folder}")
    return 0


def _ffcv(options: argparse.Namespace, root: Path) -> int:
    from kalmannorm import data
    from kalmannorm.data.beton_write import Form, write
    from kalmannorm.experiments.config import compose
    from kalmannorm.experiments.settings import ArrayDataset, FolderDataset

    dataset = compose([f"dataset={options.dataset}", f"data={root}"]).dataset
    if not isinstance(dataset, FolderDataset):
        why = "fits into memory" if isinstance(dataset, ArrayDataset) else "is no folder with images of each class"
        raise UserError(f"dataset {options.dataset!r} {why}: FFCV's files are for image folders")
    form = Form(options.mode, options.quality, options.max_resolution)
    workers = data.workers_of(options.workers, 1)
    out = Path(options.out) if options.out else None
    folder = write(
        dataset.values(), root, out, form=form, workers=workers, skip=options.skip_unreadable, timeout=options.timeout
    )
    print(f"{options.dataset}: {folder}; train on it with dataset={options.dataset} dataset.loader=ffcv data={folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
