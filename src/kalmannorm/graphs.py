"""From a module to its torch.fx graphs, and from a graph to code that runs and can be pickled."""

import itertools
import linecache
import operator
import sys
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import fx, nn

_serial = itertools.count()


class _InPlaceProxy(fx.Proxy):
    """fx traces `x += y` as x = x + y, a new tensor, which other names of x do not see: here it stays in place."""

    def _operate(self, name: str, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self._operate("iadd", other)

    def __isub__(self, other: Any) -> fx.Proxy:
        return self._operate("isub", other)

    def __imul__(self, other: Any) -> fx.Proxy:
        return self._operate("imul", other)

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self._operate("itruediv", other)


class _Tracer(fx.Tracer):
    """Leaves are torch's own modules and the normalizers."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _InPlaceProxy(node, self)

    def __init__(self, normalizers: set[str]) -> None:
        super().__init__()
        self.normalizers = normalizers

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.normalizers or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module, normalizers: set[str]) -> dict[str, fx.Graph]:
    """One graph for training and one for evaluation: tracing freezes `self.training`. Modes are left as they were."""
    modes = {module: module.training for module in model.modules()}
    graphs = {}
    try:
        for mode in ("eval", "train"):
            model.train(mode == "train")
            graphs[mode] = _Tracer(normalizers).trace(model)
    except Exception as error:
        raise ValueError(
            f"torch.fx cannot trace {type(model).__name__}: {error} ({_user_line(error)}); convert a submodule that it "
            "can trace, or put that part into a function marked by torch.fx.wrap"
        ) from error
    finally:
        for module, training in modes.items():
            module.training = training
    return graphs


def _user_line(error: Exception) -> str:
    """The last line of the traceback that is neither torch's nor ours."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "/torch/" not in frame.filename and frame.filename != __file__
    ]
    return f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else "no line of the model's own"


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
