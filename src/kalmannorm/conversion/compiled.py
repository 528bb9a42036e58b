"""Compilation by block: equal blocks are compiled once. torch's compiler is imported where it is asked for."""

from collections import Counter
from collections.abc import Container, Iterator
from typing import Any

import torch
from torch import fx, nn

from kalmannorm.conversion.names import class_of


def compile_blocks(model: nn.Module, **options: Any) -> nn.Module:
    """Compile a network's blocks, each on its own, in place: the outermost modules of classes that come twice.

    Blocks of equal code and shapes are compiled once, which takes about half of the time that the network as a whole
    does; a step is slower by the calls of compiled code, half a millisecond each.

    Args:
        model: a network, converted or not. It is returned.
        options: of torch.compile. Shapes are static unless `dynamic` says otherwise.

    ValueError: no two modules are of one class.
    """
    import torch._dynamo.config as config

    blocks = list(_blocks(model, _repeated(model)))
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no two blocks of one class: take torch.compile(model)")
    prepare_compiler()
    config.recompile_limit = max(config.recompile_limit, len(blocks))  # for as many shapes each code may be compiled
    if not options.keys() & {"backend", "mode", "options"}:
        options = {**options, "options": {"joint_custom_post_pass": _without_masks()}}
    for block in blocks:
        block.compile(**{"dynamic": False, **options})
    return model


def prepare_compiler() -> None:
    """Let later processes find compiled code again, and keep to code that compilers on CPUs get right.

    Of code with autograd functions of one's own, as beliefs have them, torch keeps the half unless it is told to. Of
    its transposition of bfloat16 blocks by vectors of 512 bits, g++ 12.2 makes one that leaves memory as it was, on a
    processor that it has no tuning for (-O3; right with -fno-tree-slp-vectorize). Ones of 256 bits are as fast.
    """
    import torch._functorch.config as functorch
    from torch._inductor.config import cpp

    functorch.autograd_cache_allow_custom_autograd_functions = True
    if cpp.simdlen is None and torch.backends.cpu.get_cpu_capability() == "AVX512":
        cpp.simdlen = 256


def _blocks(module: nn.Module, kinds: Container[type]) -> Iterator[nn.Module]:
    for child in module.children():
        if class_of(child) in kinds and any(True for _ in child.parameters()):
            yield child
        else:
            yield from _blocks(child, kinds)


def _repeated(model: nn.Module) -> set[type]:
    """Classes of which two modules have the same forward."""
    counts = Counter(map(type, model.modules()))
    repeated = {class_of(module) for module in model.modules() if counts[type(module)] > 1}
    return repeated - {nn.Sequential, nn.ModuleList}


def _without_masks() -> Any:
    """A pass of inductor's by which comparisons are made again in backward: a ReLU at a block's end would be kept as a
    mask of bool, which takes a CPU 20 times as long to write as the ReLU's result."""
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
