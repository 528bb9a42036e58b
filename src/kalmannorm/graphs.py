"""From a torch.fx graph to code that runs and can be pickled."""

import itertools
import linecache
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import fx

_serial = itertools.count()


Source = tuple[str, dict[str, Any]]


def source_code(graph: fx.Graph) -> Source:
    """The graph as code and the names it uses, both of which can be pickled (modules by name)."""
    code = graph.python_code("self")
    return code.src, {k: ("module", v.__name__) if isinstance(v, ModuleType) else v for k, v in code.globals.items()}


def compile_code(code: str, names: dict[str, Any]) -> Callable[..., Any]:
    scope: dict[str, Any] = {k: sys.modules[v[1]] if isinstance(v, tuple) else v for k, v in names.items()}
    filename = f"<converted {next(_serial)}>"
    linecache.cache[filename] = (len(code), None, code.splitlines(keepends=True), filename)  # for tracebacks
    exec(compile(code, filename, "exec"), scope)
    return scope["forward"]
