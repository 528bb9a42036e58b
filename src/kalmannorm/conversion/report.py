"""Which normalizers had a prior in a forward, and where the belief was lost for the others."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kalmannorm.conversion import runtime
from kalmannorm.conversion.layers import copied, replace
from kalmannorm.conversion.rules import Operation, fields_of, has_belief
from kalmannorm.norm import Estimator
from kalmannorm.norm.belief import Args, Carried, Kwargs, pick
from kalmannorm.norm.contract import running
from kalmannorm.norm.moments import channel_belief

NOTHING = "nothing: no normalizer before it, and the input's distribution is not given"
CHECKPOINTED = "a checkpoint of several modules that are called in turn: nothing is known in it of what it is given"


def observe(model: nn.Module, args: Args, kwargs: Kwargs) -> dict[str, str | None]:
    """Run a copy of the model in training mode. Return None for each normalizer that had a prior, else what lost the
    belief, in the order in which the normalizers ran."""
    twin = copied(model).train()
    for name, part in list(twin.named_modules()):
        if "_orig_mod" in part._modules:  # of torch.compile: the observer watches an eager forward
            replace(twin, name, part._modules["_orig_mod"])  # type: ignore[arg-type]
    found: dict[str, str | None] = {}
    names = {module: name for name, module in twin.named_modules()}
    reasons: dict[int, str] = {}
    kept: list[Any] = []  # keeps tensors alive: reasons are stored by id, which a freed tensor would pass on

    def see(operation: Operation, what: Any, belief: Any) -> None:
        """Keep by tensor why the operation's result has no belief: its own doing, or the reason of an argument's."""
        y = operation.y
        if belief == "in place":
            kept.append(y)
            reasons.setdefault(id(y), str(what))
            return
        if belief is not None and not isinstance(belief, str):
            for tensor in _tensors(y):
                reasons.pop(id(tensor), None)
            return
        before = [reasons[id(t)] for t in _tensors((operation.args, operation.kwargs)) if id(t) in reasons]
        if isinstance(what, nn.Module):
            name, kind = names.get(what, ""), type(what).__name__
        else:
            name = kind = str(what).rpartition(".")[2]
        own = f"{name} ({kind}{f': {belief}' if belief else ''})"
        had = has_belief((operation.beliefs, operation.keyword_beliefs))
        for tensor in _tensors(y):
            kept.append(tensor)
            if had and (belief or not before):
                reasons[id(tensor)] = own
            elif before:
                reasons[id(tensor)] = before[0]

    def normalizing(layer: Any, args: Args, kwargs: Kwargs) -> None:
        """Note why a normalizer that is about to run has no prior."""
        name = names[layer]
        x = args[0] if args else next(iter(kwargs.values()))
        prior = pick(kwargs.get("beliefs"), 0, "input")
        inside = running.flow is not None and not running.flow.is_here()
        why = None if prior is not None else reasons.get(id(x), CHECKPOINTED if inside else NOTHING)
        if isinstance(prior, Carried) and prior.axes:
            why = "its axis 1 is not that of the channels"
        elif (known := channel_belief(prior)) is not None and len(known.mean) not in (1, layer.rows(len(x))):
            why = f"a belief of {len(known.mean)} groups of images, where there are {layer.rows(len(x))}"
        found[name] = found.get(name) or why

    handles = [
        nn.Module.register_forward_pre_hook(layer, normalizing, with_kwargs=True)
        for layer in twin.modules()
        if isinstance(layer, Estimator)
    ]
    with _observing(see):
        twin(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return found


@contextmanager
def _observing(see: Any) -> Iterator[None]:
    outer, runtime.observer = runtime.observer, see
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        runtime.observer = outer


def _tensors(structure: Any) -> list[Tensor]:
    if isinstance(structure, Tensor):
        return [structure]
    if (items := fields_of(structure)) is not None:
        structure = list(items.values())
    if isinstance(structure, list | tuple):
        return [tensor for item in structure for tensor in _tensors(item)]
    return []
