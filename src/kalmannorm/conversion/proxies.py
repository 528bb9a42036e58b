"""What stands for values while torch.fx traces a forward."""

import functools
import operator
from typing import Any

from torch import Tensor, fx

# Augmented assignments such as x += y, by their names in `operator`: tensors execute them in place.
IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ipow", "ifloordiv", "imod")


def is_in_place(name: str) -> bool:
    """Say whether a function or method of this name changes its first argument."""
    return name.strip("_") in (*IN_PLACE, "setitem") or (name.endswith("_") and not name.endswith("__"))


class Untraceable(ValueError):
    """A forward cannot become a graph as it is written."""


class Computed(fx.Proxy):
    """A value that the forward computed. `x += y` is recorded as an in-place operation: fx would make it x = x + y, a
    new tensor that other names of x do not see."""

    def _operate(self, name: str, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    def __getattr__(self, name: str) -> "fx.proxy.Attribute":
        return _Attribute(self, name)

    def __hash__(self) -> int:
        raise Untraceable("it looks something up by a value that is not known yet")


class _Attribute(Computed, fx.proxy.Attribute):
    def __repr__(self) -> str:  # for instance by "cuda" in str(x.device)
        raise Untraceable("it writes down a value that is not known yet")


for _name in IN_PLACE:
    setattr(Computed, f"__{_name}__", functools.partialmethod(Computed._operate, _name))


class TensorArgument(Computed):
    """An argument that claims to be a tensor when it is asked for its class, and records that it was asked."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        self.tracer.asked[str(self.node.target)] = "tensor"  # type: ignore[attr-defined]
        return Tensor

    def __getattr__(self, name: str) -> Any:
        # A proxy has every attribute: one that the forward may look for by hasattr() becomes a condition.
        if not (hasattr(Tensor, name) or name.startswith("__") or "*" in str(self.node.target)):
            self.tracer.read[f'hasattr({self.node.target}, "{name}")'] = True  # type: ignore[attr-defined]
        return super().__getattr__(name)


class ListArgument(Computed):
    """An argument that claims to be a list."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        self.tracer.asked[str(self.node.target)] = "list"  # type: ignore[attr-defined]
        return list
