"""Rules of what moves or drops pixels, axes and channels."""

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import fx

from kalmannorm import layout
from kalmannorm.layout import Layout
from kalmannorm.norm import moments as predict
from kalmannorm.rules import Carry, Operation, Rule, as_it_is

if TYPE_CHECKING:
    from kalmannorm.thread import Threader

# --- pooling, resizing, padding ---------------------------------------------------------------------------------------


def pooling(t: "Threader", node: fx.Node, x: fx.Node) -> Rule:
    """Unchanged: the pixels of an image resemble each other, so that their mean varies nearly as they do.

    Over a whole map too, for the gate of squeeze-and-excitation: dividing the variance by the number of pixels, as
    their independence would have it, predicts the variance behind the gate no better.
    """
    return _same_channels(t, node, x)


def _same_channels(t: "Threader", node: fx.Node, x: fx.Node) -> Rule:
    if t.map_layout(x) is None:
        return t.reason(node, "of something that is not a map")
    return Carry([x], as_it_is, Layout("nchw", node))


def adaptive_average(t: "Threader", node: fx.Node, x: fx.Node) -> Rule:
    if not _is_single(t.argument(node, 1, "output_size", None)):
        return pooling(t, node, x)
    passed = _same_channels(t, node, x)
    return passed if isinstance(passed, str) else passed._replace(layout=Layout("nc11", node))


def adaptive_maximum(t: "Threader", node: fx.Node, x: fx.Node) -> Rule:
    if _is_single(t.argument(node, 1, "output_size", None)):
        return t.reason(node, "the maximum of a whole map")
    return pooling(t, node, x)


def _is_single(size: Any) -> bool:
    return size == 1 or (isinstance(size, tuple | list) and all(side == 1 for side in size))


def mean(t: "Threader", node: fx.Node, x: fx.Node) -> Rule:
    dims = t.argument(node, 1, "dim", None)
    known = t.layouts[x]
    keepdim = t.argument(node, 2, "keepdim", False) is True
    after = layout.averaged(known, _tuple(dims), keepdim) if known and dims is not None else None
    return t.reason(node, "not over the pixels of a map") if after is None else Carry([x], as_it_is, after)


def interpolation(t: "Threader", node: fx.Node, x: fx.Node) -> Rule:
    mode = t.argument(node, 3, "mode", "nearest")
    known = t.layouts[x]
    if mode not in ("nearest", "nearest-exact") and (known is None or known.axes != "nc11"):
        return t.reason(node, f"{mode}, which blends pixels")
    return _same_channels(t, node, x)


def padding(t: "Threader", node: fx.Node, x: fx.Node) -> Rule:
    """Pixels around the map, overlooked as a convolution's own zero padding is; or channels of zeros."""
    sides = t.argument(node, 1, "padding" if node.op == "call_module" else "pad", None)
    mode, value = t.argument(node, 2, "mode", "constant"), t.argument(node, 3, "value", None)
    if mode == "constant" and value:
        return t.reason(node, "not with zeros")
    before, after = sides[4:] if isinstance(sides, tuple | list) and len(sides) == 6 else (0, 0)
    if not isinstance(sides, tuple | list) or len(sides) not in (2, 4, 6) or ((before or after) and any(sides[:4])):
        return t.reason(node, "neither of pixels nor of channels")
    passed = _same_channels(t, node, x)
    if isinstance(passed, str) or not (before or after):
        return passed
    return passed._replace(write=lambda beliefs: t.call(predict.pad_channels, beliefs[0], before, after))


# --- axes -------------------------------------------------------------------------------------------------------------


def reshaping(result: Callable[["Threader", fx.Node, Layout], Layout | None]) -> Operation:
    def rule(t: "Threader", node: fx.Node, x: fx.Node) -> Rule:
        known = t.layouts[x]
        after = result(t, node, known) if known else None
        return t.reason(node, "channels may not be where they were") if after is None else Carry([x], as_it_is, after)

    return rule


def view(t: "Threader", node: fx.Node, known: Layout) -> Layout | None:
    return layout.reshaped(known, _sizes(node), t.layouts)


def flatten(t: "Threader", node: fx.Node, known: Layout) -> Layout | None:
    start = t.argument(node, 1, "start_dim", 1 if node.op == "call_module" else 0)
    return layout.flattened(known, start, t.argument(node, 2, "end_dim", -1))


def squeeze(t: "Threader", node: fx.Node, known: Layout) -> Layout | None:
    dims = t.argument(node, 1, "dim", None)
    return layout.squeezed(known, None if dims is None else _tuple(dims))


def unsqueeze(t: "Threader", node: fx.Node, known: Layout) -> Layout | None:
    return layout.unsqueezed(known, t.argument(node, 1, "dim", None))


def permutation(result: Callable[["Threader", fx.Node, Layout], tuple[Layout, bool] | None]) -> Operation:
    def rule(t: "Threader", node: fx.Node, x: fx.Node) -> Rule:
        known = t.layouts[x]
        after = result(t, node, known) if known else None
        if known is None or after is None:
            return t.reason(node, "channels may not be where they were")
        new, reordered = after
        if not reordered:
            return Carry([x], as_it_is, new)
        return Carry([x], lambda beliefs: t.call(predict.shuffle, beliefs[0], *known.parts), new)

    return rule


def permute(t: "Threader", node: fx.Node, known: Layout) -> tuple[Layout, bool] | None:
    return layout.permuted(known, _sizes(node, "dims"))


def transpose(t: "Threader", node: fx.Node, known: Layout) -> tuple[Layout, bool] | None:
    a, b = (t.argument(node, i, f"dim{i - 1}", t.argument(node, i, f"axis{i - 1}", None)) for i in (1, 2))
    return layout.transposed(known, a, b)


def _sizes(node: fx.Node, name: str = "shape") -> tuple[Any, ...]:
    """The sizes or axes of view(2, 3), view((2, 3)), reshape(x, (2, 3))."""
    given = node.args[1:] or (node.kwargs.get(name, node.kwargs.get("size", ())),)
    return _tuple(given[0]) if len(given) == 1 else tuple(given)


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def expansion(t: "Threader", node: fx.Node, x: fx.Node) -> Rule:
    """One pixel for a whole map."""
    other, known = _sizes(node), t.layouts[x]
    after = t.layouts.get(other[0]) if node.target == "expand_as" else None
    to_map = len(other) == 4 or (after is not None and after.is_map)
    if known is None or not known.is_map or not to_map:
        return t.reason(node, "not of one map to another")
    return Carry([x], lambda beliefs: t.call(predict.expand, beliefs[0], node), Layout("nchw", node))


# --- channels ---------------------------------------------------------------------------------------------------------


def concatenation(t: "Threader", node: fx.Node, _: fx.Node) -> Rule:
    parts, dim = t.inputs[node], t.argument(node, 1, "dim", 0)
    layouts = [t.layouts[part] for part in parts]
    axes = {one and one.axes for one in layouts}
    at_channels = dim == 1 if axes == {None} else all(one is not None and one.axis(dim) == "c" for one in layouts)
    if not isinstance(t.argument(node, 0, "tensors", None), tuple | list) or not at_channels:
        return next(filter(None, (t.lost[part] for part in parts)), t.reason(node, "not of channels"))
    largest = next((one for one in layouts if one and one.axes != "nc11"), layouts[0])
    return Carry(parts, lambda beliefs: t.call(predict.concat, beliefs), largest)


def division(moments: Callable[..., Any], name: str) -> Operation:
    """A tuple of values, each with some of the channels."""

    def rule(t: "Threader", node: fx.Node, x: fx.Node) -> Rule:
        known, dim, how = t.layouts[x], t.argument(node, 2, "dim", 0), t.argument(node, 1, name, None)
        if known is None or known.axis(dim) != "c" or how is None:
            return t.reason(node, "not of channels")
        t.pieces.add(node)
        return Carry([x], lambda beliefs: t.call(moments, beliefs[0], how), known)

    return rule


def item(t: "Threader", node: fx.Node, x: fx.Node) -> Rule:
    known, index = t.layouts[x], node.args[1]
    if x in t.pieces:
        return Carry([x], lambda beliefs: t.call(operator.getitem, beliefs[0], index), known)
    found = layout.indexed(known, index, node) if known else None
    if found is None:
        return t.reason(node, "neither of channels nor of pixels")
    after, chosen = found
    if chosen == slice(None):
        return Carry([x], as_it_is, after)
    return Carry([x], lambda beliefs: t.call(predict.channels, beliefs[0], chosen), after)


def narrow(t: "Threader", node: fx.Node, x: fx.Node) -> Rule:
    known = t.layouts[x]
    dim, start, length = (t.argument(node, i, name, None) for i, name in enumerate(("dim", "start", "length"), 1))
    if (
        known is None
        or known.axis(dim) != "c"
        or not (isinstance(start, int) and isinstance(length, int) and start >= 0)
    ):
        return t.reason(node, "not a known part of the channels")
    chosen = slice(start, start + length)
    return Carry([x], lambda beliefs: t.call(predict.channels, beliefs[0], chosen), known)


def channel_shuffle(t: "Threader", node: fx.Node, x: fx.Node) -> Rule:
    known, groups = t.layouts[x], t.argument(node, 1, "groups", None)
    if known is None or not known.is_map:
        return t.reason(node, "of something that is not a map")
    return Carry([x], lambda beliefs: t.call(predict.shuffle, beliefs[0], groups, -1), known)
