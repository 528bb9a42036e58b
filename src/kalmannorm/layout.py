"""Which axes of a traced value hold its channels: a belief passes a reshape only where that can be told.

fx knows no shapes, so they are followed through the operations: a convolution makes a map, a mean over the pixels takes
two axes away, a reshape whose sizes were read from the map itself may divide the channels in two. The functions below
give the layout of the result, or None where it is not certain.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import fx


class Layout(NamedTuple):
    """The axes of a value, a letter each: n images, c channels, h w pixels, 1 an axis of size one.

    Channels divided into two axes are g k, of the sizes `parts` (numbers, nodes, or one -1); a belief's channels stand
    in the order of the axes. `like` is a node with the same h and w.
    """

    axes: str
    like: fx.Node
    parts: tuple[Any, Any] = (1, -1)

    @property
    def is_map(self) -> bool:
        """[N, C, H, W]."""
        return self.axes in ("nchw", "nc11")

    def axis(self, dim: Any) -> str:
        """The letter of an axis, by its number from either end; nothing if it has none."""
        inside = isinstance(dim, int) and -len(self.axes) <= dim < len(self.axes)
        return self.axes[dim] if inside else ""


def permuted(layout: Layout, dims: Sequence[Any]) -> tuple[Layout, bool] | None:
    """x.permute(dims), and whether that changes the order of channels: columns of the two parts come first then."""
    axes = "".join(layout.axis(dim) for dim in dims)
    if sorted(axes) != sorted(layout.axes):
        return None
    if axes.find("g") <= axes.find("k"):
        return layout._replace(axes=axes), False
    first, second = layout.parts
    return layout._replace(axes=axes.translate(str.maketrans("gk", "kg")), parts=(second, first)), True


def transposed(layout: Layout, a: Any, b: Any) -> tuple[Layout, bool] | None:
    """x.transpose(a, b)."""
    dims = list(range(len(layout.axes)))
    if not (layout.axis(a) and layout.axis(b)):
        return None
    dims[a], dims[b] = dims[b], dims[a]
    return permuted(layout, dims)


def reshaped(layout: Layout, sizes: Sequence[Any], layouts: Mapping[fx.Node, Layout | None]) -> Layout | None:
    """x.view(sizes): channels divided in two, put together again, axes of size one dropped or added; nothing else.

    Where the images and the pixels keep their axes, what stands between them is the channels, whatever the numbers.
    """
    letters = [_letter(size, layout, layouts) for size in sizes]
    before = layout.axes.replace("gk", "c")
    if not letters or letters[0] != "n" or before not in ("nc", "nchw", "nc11"):
        return None
    if before == "nchw":
        channels, pixels = letters[1:-2], "".join(letters[-2:])
        if pixels != "hw":
            return None
    else:
        pixels = "11" if len(letters) > 3 and letters[-2:] == ["1", "1"] else ""
        channels = letters[1 : len(letters) - len(pixels)]
    if len(channels) == 1:
        return layout._replace(axes=f"nc{pixels}")
    if len(channels) == 2 and "gk" not in layout.axes:
        return layout._replace(axes=f"ngk{pixels}", parts=(sizes[1], sizes[2]))
    return None


def _letter(size: Any, layout: Layout, layouts: Mapping[fx.Node, Layout | None]) -> str:
    """Which axis' size a number is: as read from a value with the same pixels, or a plain one."""
    if not isinstance(size, fx.Node):
        return "1" if size == 1 else "?"
    if size.op == "call_method" and size.target == "size" and len(size.args) == 2:
        source, dim = size.args
    elif size.op == "call_function" and getattr(size.target, "__name__", "") == "getitem":
        shape, dim = size.args
        if not isinstance(shape, fx.Node) or not _is_shape(shape):
            return "?"
        source = shape.args[0]
    else:
        return "?"
    known = layouts.get(source) if isinstance(source, fx.Node) else None
    letter = known.axis(dim) if known else ""
    same_pixels = known is not None and known.like is layout.like
    return letter if letter in ("n", "1") or (letter in ("h", "w") and same_pixels) else "?"


def _is_shape(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target == "size" and len(node.args) == 1
    return node.target is getattr and bool(node.args[1] == "shape")


def flattened(layout: Layout, start: Any, end: Any) -> Layout | None:
    """x.flatten(start, end): the channels with axes of size one, or their two parts."""
    if not (layout.axis(start) and layout.axis(end)):
        return None
    start, end = start % len(layout.axes), end % len(layout.axes)
    joined = layout.axes[start : end + 1]
    kept = joined.replace("1", "").replace("gk", "c")
    if len(kept) > 1:
        return None
    return layout._replace(axes=layout.axes[:start] + (kept or "1") + layout.axes[end + 1 :])


def squeezed(layout: Layout, dims: Iterable[Any] | None) -> Layout | None:
    """x.squeeze(dims); None is all of size one, where it is certain which those are."""
    if dims is None:
        return None if {"h", "w"} & set(layout.axes) else layout._replace(axes=layout.axes.replace("1", ""))
    dims = list(dims)
    gone = {dim % len(layout.axes) for dim in dims if layout.axis(dim) == "1"}
    if len(gone) < len(dims):
        return None
    return layout._replace(axes="".join(letter for i, letter in enumerate(layout.axes) if i not in gone))


def unsqueezed(layout: Layout, dim: Any) -> Layout | None:
    """x.unsqueeze(dim)."""
    if not isinstance(dim, int):
        return None
    at = dim if dim >= 0 else dim + len(layout.axes) + 1
    return layout._replace(axes=f"{layout.axes[:at]}1{layout.axes[at:]}")


def averaged(layout: Layout, dims: Iterable[Any], keepdim: bool) -> Layout | None:
    """x.mean(dims, keepdim) over pixels."""
    dims = list(dims)
    if any(layout.axis(dim) not in ("h", "w", "1") for dim in dims):
        return None
    gone = {dim % len(layout.axes) for dim in dims}
    kept = "1" if keepdim else ""
    return layout._replace(axes="".join(kept if i in gone else letter for i, letter in enumerate(layout.axes)))


def indexed(layout: Layout, index: Any, node: fx.Node) -> tuple[Layout, slice] | None:
    """x[index] at `node`, and which of the channels are left: slices of channels and pixels, new axes of size one."""
    items = list(index) if isinstance(index, tuple) else [index]
    used = sum(item is not None and item is not ... for item in items)
    if ... in items:
        at = items.index(...)
        items[at : at + 1] = [slice(None)] * (len(layout.axes) - used)
    else:
        items += [slice(None)] * (len(layout.axes) - used)
    axes, channels, like, letters = "", slice(None), layout.like, iter(layout.axes)
    for item in items:
        if item is None:
            axes += "1"
            continue
        letter = next(letters, "")
        if item == slice(None) or (isinstance(item, slice) and letter in ("c", "h", "w")):
            axes += letter
            if item != slice(None):
                channels, like = (item, like) if letter == "c" else (channels, node)
        elif not (letter == "1" and isinstance(item, int)):
            return None
    return layout._replace(axes=axes, like=like), channels
