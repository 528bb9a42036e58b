"""Compilation by block, where equal blocks are compiled once. torch's compiler is only imported when it is needed."""

from collections import Counter
from collections.abc import Container, Iterator
from typing import Any

import torch
from torch import fx, nn

from kalmannorm.conversion.names import class_of
from kalmannorm.norm import groups, moments


def compile_blocks(model: nn.Module, **options: Any) -> nn.Module:
    """Compile a network's blocks one by one, in place: the outermost modules whose class occurs more than once.

    Blocks of equal code and shapes are compiled once, which takes about half of the time of compiling the whole
    network; each call of compiled code adds half a millisecond to a step.

    Args:
        model: a network, converted or not.
        options: of torch.compile. Shapes are static unless `dynamic` says otherwise.

    Return `model`. ValueError: no two modules are of one class.
    """
    import torch._dynamo.config as config

    blocks = list(_blocks(model, _repeated(model)))
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no two blocks of one class: take torch.compile(model)")
    prepare_compiler()
    config.recompile_limit = max(config.recompile_limit, len(blocks))  # every block may have other shapes
    if not options.keys() & {"backend", "mode", "options"}:
        options = {**options, "options": {"joint_custom_post_pass": _without_masks()}}
    for block in blocks:
        block.compile(**{"dynamic": False, **options})
    return model


def prepare_compiler() -> None:
    """Make torch.compile start a converted network in half of the time, and avoid code that g++ miscompiles.

    Call it before `torch.compile`; `compile_blocks` and the harness do. It sets options of torch's compiler for the
    whole process.

    The moments of groups and the rules of beliefs go into the graph as they are (`torch.compiler.allow_in_graph`), and
    torch may cache such graphs, and custom autograd functions, for later processes. torch's transposition of bfloat16
    blocks by 512-bit vectors is miscompiled by g++ 12.2 on a processor that it has no tuning for: memory stays as it
    was (with -O3; right with -fno-tree-slp-vectorize). 256-bit vectors are as fast.
    """
    import torch._functorch.config as functorch
    from torch._inductor.config import cpp, unsafe_marked_cacheable_functions
    from torch._inductor.custom_graph_pass import get_hash_for_files

    for function in groups.IN_GRAPH:
        torch.compiler.allow_in_graph(function)
        files = (function.__code__.co_filename, moments.__file__, groups.__file__)
        unsafe_marked_cacheable_functions[f"{function.__module__}.{function.__name__}"] = str(get_hash_for_files(files))
    functorch.autograd_cache_allow_custom_autograd_functions = True
    if cpp.simdlen is None and torch.backends.cpu.get_cpu_capability() == "AVX512":
        cpp.simdlen = 256


def _blocks(module: nn.Module, kinds: Container[type]) -> Iterator[nn.Module]:
    """Yield the outermost modules of these classes that have parameters."""
    for child in module.children():
        if class_of(child) in kinds and any(True for _ in child.parameters()):
            yield child
        else:
            yield from _blocks(child, kinds)


def _repeated(model: nn.Module) -> set[type]:
    """Return the original classes of which two modules share a forward."""
    counts = Counter(map(type, model.modules()))
    repeated = {class_of(module) for module in model.modules() if counts[type(module)] > 1}
    return repeated - {nn.Sequential, nn.ModuleList}


def _without_masks() -> Any:
    """Return an inductor pass that recomputes comparisons in the backward: else a ReLU at the end of a block is saved
    as a bool mask, which takes a CPU 20 times as long to write as the ReLU's result."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
    from torch.utils.checkpoint import CheckpointPolicy

    class WithoutMasks(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            for node in graph.nodes:
                value = node.meta.get("val")
                if node.op == "call_function" and isinstance(value, torch.Tensor) and value.dtype == torch.bool:
                    node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE

        def uuid(self) -> Any:
            return get_hash_for_files((__file__,))

    return WithoutMasks()
