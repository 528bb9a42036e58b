"""Rules of operations that move or drop pixels, axes and channels; the shapes show where the channels went."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from kalmannorm.conversion.rules import Found, Operation, Rule, on_channels, shortened, unchanged
from kalmannorm.norm import moments
from kalmannorm.norm.belief import Belief, Carried

_UNKNOWN = "channels may not be where they were"

# --- pooling, resizing, padding ---------------------------------------------------------------------------------------


def pooling(o: Operation) -> Found:
    """Hand the belief on: the pixels of an image resemble each other, so that their mean varies nearly as they do.

    This also holds for the mean of a whole map in squeeze-and-excitation: dividing the variance by the number of
    pixels, as if they were independent, predicts the variance behind the gate no better.
    """
    if not isinstance(o.y, Tensor) or (isinstance(o.belief, Carried) and o.belief.axes):
        return "of something that is not a map"
    return unchanged(o)


def adaptive_maximum(o: Operation) -> Found:
    if isinstance(o.y, Tensor) and o.y.shape[2:].numel() == 1:
        return "the maximum of a whole map"
    return pooling(o)


def mean(o: Operation) -> Found:
    """Hand the belief on, as `pooling` does, if the mean is taken over axes of pixels only."""
    dims, carried = o.argument(1, "dim"), o.belief_with_axes()
    if carried is None or dims is None:
        return "not over the pixels of a map"
    dims = [dim % o.x.dim() for dim in (dims if isinstance(dims, list | tuple) else [dims])]
    if any(carried.axes[dim] != "p" for dim in dims):
        return "not over the pixels of a map"
    kept = o.y.dim() == o.x.dim()
    return shortened(carried._replace(axes="".join(a for i, a in enumerate(carried.axes) if kept or i not in dims)))


def interpolation(o: Operation) -> Found:
    mode = o.argument(3, "mode", "nearest")
    if mode not in ("nearest", "nearest-exact") and o.x.shape[2:].numel() > 1:
        return f"{mode}, which blends pixels"
    return pooling(o)


def padding(o: Operation) -> Found:
    """Overlook pixels added around the map, as a convolution's own zero padding is; add zeros for channels of zeros."""
    sides, mode, value = o.argument(1, "pad"), o.argument(2, "mode", "constant"), o.argument(3, "value")
    if mode == "constant" and value:
        return "not with zeros"
    pixels = 2 * (o.x.dim() - 2)
    if isinstance(sides, int):
        sides = (sides,) * pixels
    around, beside = sides[:pixels], sides[pixels:]
    if any(beside[2:]) or (any(beside) and any(around)):
        return "neither of pixels nor of channels"
    if any(beside):
        return on_channels(moments.pad_channels, o.belief, *beside[:2])
    return pooling(o)


# --- axes -------------------------------------------------------------------------------------------------------------


def reshape(o: Operation) -> Found:
    """Follow the axes through view, reshape, flatten, squeeze and unsqueeze by comparing the two shapes."""
    carried = o.belief_with_axes()
    if carried is None:
        return ""
    if not isinstance(o.y, Tensor) or o.y.dim() < 2 or o.x.dim() < 2 or carried.belief.mean.shape[1] == 1:
        return _UNKNOWN
    axes = _axes_after(list(o.x.shape), carried.axes, list(o.y.shape))
    return _UNKNOWN if axes is None else shortened(carried._replace(axes=axes))


def _axes_after(before: list[int], axes: str, after: list[int]) -> str | None:
    """Return the letters of the new axes; None if one mixes old axes of several kinds, or images do not stay one axis.

    `before`, `after`: the shapes; `axes`: the letters of the old axes.
    """
    old = [(size, axes[i]) for i, size in enumerate(before) if size != 1]
    new = [(size, i) for i, size in enumerate(after) if size != 1]
    letters = ["p"] * len(after)  # axes of size one count as pixels
    if before[0] == 1 and after[0] == 1:
        letters[0] = "n"
    i = j = 0
    while i < len(old) and j < len(new):
        joins, parts, have, want = old[i][1], [new[j][1]], old[i][0], new[j][0]
        i, j = i + 1, j + 1
        while have != want:
            if have < want:
                if i >= len(old):
                    return None
                have, joins, i = have * old[i][0], joins + old[i][1], i + 1
            else:
                if j >= len(new):
                    return None
                want, j = want * new[j][0], j + 1
                parts.append(new[j - 1][1])
        if len(set(joins)) > 1 or (joins[0] == "n" and len(parts) > 1):
            return None
        for part in parts:
            letters[part] = joins[0]
    return "".join(letters) if letters.count("n") == 1 else None


def permute(o: Operation) -> Found:
    given = o.argument(1, "dims")
    return _permuted(o, list(o.args[1:]) if isinstance(given, int) else given)


def transpose(o: Operation) -> Found:
    dims = list(range(o.x.dim()))
    first, second = (o.argument(i, f"dim{i - 1}", o.kwargs.get(f"axis{i - 1}")) for i in (1, 2))
    dims[first], dims[second] = dims[second], dims[first]
    return _permuted(o, dims)


def _permuted(o: Operation, dims: list[int]) -> Found:
    """Return the belief of a value whose axes were brought into the order `dims`."""
    carried = o.belief_with_axes()
    if carried is None:
        return ""
    dims = [dim % o.x.dim() for dim in dims]
    order = [dim for dim in dims if carried.axes[dim] == "c"]
    if order != sorted(order):  # the axes that hold the channels change places, as in a channel shuffle
        now = sorted(order)
        sizes, places = [o.x.shape[dim] for dim in now], [0, *(1 + now.index(dim) for dim in order)]
        mean, var = (t.unflatten(1, sizes).permute(places).flatten(1) for t in carried.belief)
        carried = carried._replace(belief=Belief(mean, var))
    return shortened(carried._replace(axes="".join(carried.axes[dim] for dim in dims)))


def expansion(o: Operation) -> Found:
    """Repeat axes of size one: a pixel over a whole map, a single channel for several."""
    if not isinstance(o.y, Tensor) or o.y.dim() != o.x.dim():
        return "not of one map to another"
    return on_channels(moments.expand, o.belief, o.y)


# --- channels ---------------------------------------------------------------------------------------------------------


def concatenation(o: Operation) -> Found:
    beliefs, dim = o.belief, o.argument(1, "dim", 0)
    if not isinstance(beliefs, list | tuple) or isinstance(beliefs, Belief | Carried):
        return ""
    if any(belief is None for belief in beliefs):
        return ""
    if dim % o.y.dim() != 1 or any(isinstance(belief, Carried) and belief.axes for belief in beliefs):
        return "not of channels"
    carried = [moments.relu_applied(b) if isinstance(b, Carried) else Carried(b) for b in beliefs]
    return shortened(carried[0]._replace(belief=moments.concat([c.belief for c in carried]), axes="nc"))


def partition(function: Callable[..., list[Belief]], name: str) -> Rule:
    """Make the rule of chunk or split, which return several values with some of the channels each.

    `name`: the keyword of the operation's second argument, which becomes `function`'s.
    """

    def rule(o: Operation) -> Found:
        if o.belief is None:
            return ""
        if o.argument(2, "dim", 0) % o.x.dim() != 1 or (isinstance(o.belief, Carried) and o.belief.axes):
            return "not of channels"
        carried = moments.relu_applied(o.belief) if isinstance(o.belief, Carried) else Carried(o.belief)
        return tuple(
            shortened(carried._replace(belief=part, axes="nc"))
            for part in function(carried.belief, o.argument(1, name))
        )

    return rule


def item(o: Operation) -> Found:
    """Return the belief of x[index], x being a tensor or a structure of tensors."""
    x, index, belief = o.args[0], o.args[1], o.belief
    if not isinstance(x, Tensor):
        return _part(x, index, belief)
    if belief is None:
        return ""
    found = _indexed(o, list(index) if isinstance(index, tuple) else [index])
    return "neither of channels nor of pixels" if found is None else found


def _part(x: Any, index: Any, belief: Any) -> Found:
    if isinstance(belief, Belief | Carried) or belief is None:
        return ""
    try:
        if isinstance(belief, dict) and not isinstance(index, str):  # an output that can also be read as a tuple
            return [belief[key] for key in belief if x.get(key) is not None][index]
        found = belief[index]
    except (KeyError, IndexError, TypeError):
        return ""
    return "" if found is None else found


def _indexed(o: Operation, index: list[Any]) -> Found:
    """Return the belief of a tensor's x[index], None if unknown: slices of channels or pixels, the only pixel of an
    axis, new axes of size one."""
    carried = o.belief_with_axes()
    if carried is None or not isinstance(o.y, Tensor):
        return None
    used = sum(one is not None and one is not ... for one in index)
    at = next((i for i, one in enumerate(index) if one is ...), len(index))
    index = [*index[:at], *[slice(None)] * (o.x.dim() - used), *index[at + 1 :]]
    axes, belief, dim = "", carried.belief, 0
    for one in index:
        if one is None:
            axes += "p"
            continue
        letter, size, dim = carried.axes[dim], o.x.shape[dim], dim + 1
        if isinstance(one, slice):
            axes += letter
            if one == slice(None):
                continue
            if letter == "n" or (letter == "c" and carried.axes.count("c") > 1):
                return None
            if letter == "c":
                belief = moments.channels(belief, one)
        elif not (isinstance(one, int) and letter == "p" and size == 1):
            return None
    return shortened(carried._replace(belief=belief, axes=axes)) if "n" in axes else None


def attribute(o: Operation) -> Found:
    """Return the belief of a named field of an output: a dict, a dataclass or a NamedTuple."""
    x, name, belief = o.args[0], o.args[1], o.belief
    if name in getattr(x, "_fields", ()):
        return _part(x, x._fields.index(name), belief)
    found = belief.get(name) if isinstance(belief, dict) else None
    return "" if found is None else found


def narrow(o: Operation) -> Found:
    dim, start, length = (o.argument(i, name) for i, name in enumerate(("dim", "start", "length"), 1))
    if dim % o.x.dim() != 1 or not isinstance(start, int) or start < 0:
        return "not a known part of the channels"
    return on_channels(moments.channels, o.belief, slice(start, start + length))


def pixel_shuffle(o: Operation) -> Found:
    """Turn channels into pixels: each new channel is a mixture of the old ones."""
    return on_channels(moments.pixel_shuffle, o.belief, o.argument(1, "upscale_factor") ** 2)


def pixel_unshuffle(o: Operation) -> Found:
    """Turn pixels into channels: each new channel is like the old one that it comes from."""
    return on_channels(moments.pixel_unshuffle, o.belief, o.argument(1, "downscale_factor") ** 2)


def channel_shuffle(o: Operation) -> Found:
    return on_channels(moments.shuffle, o.belief, o.argument(1, "groups"), -1)
