"""What a model is called with: by name, in lists, tokens, films, no argument at all, tensors of other classes."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import error, net
from torch import Tensor, nn

from kalmannorm import belief_report, convert
from kalmannorm.conversion import untraced


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Holding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()


class ByName(Holding):
    def forward(self, **batch: Tensor) -> Tensor:
        return self.net(batch["image"])


class Several(Holding):
    def forward(self, *images: Tensor) -> Tensor:
        return self.net(images[0])


class KeywordOnly(Holding):
    def forward(self, *, image: Tensor) -> Tensor:
        return self.net(image)


class Itself(Holding):
    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Parameter(torch.randn(4, 3, 8, 8))

    def forward(self) -> Tensor:
        return self.net(self.image)


class Listed(Holding):
    def forward(self, images: list[Tensor]) -> Any:
        return [self.net(image) for image in images]


class InADict(Holding):
    def forward(self, batch: dict[str, Tensor]) -> Any:
        return {"logits": self.net(batch["image"])}


class Second(Holding):
    def forward(self, given: Tensor | None = None, image: Tensor | None = None) -> Tensor:
        return self.net(image if given is None else given)


class Film(Holding):
    def forward(self, film: Tensor) -> Tensor:
        return self.net(film.flatten(0, 1)).unflatten(0, film.shape[:2])


class ChannelsLast(Holding):
    def forward(self, image: Tensor) -> Tensor:
        return self.net(image.permute(0, 3, 1, 2))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.net = nn.Embedding(10, 6), nn.Sequential(nn.Conv1d(6, 4, 3), nn.BatchNorm1d(4))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(self.embed(tokens).transpose(1, 2))


class WithAFunction(Holding):
    def forward(self, image: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
        return head(self.net(image))


class NamedLikeBuiltins(Holding):
    """Its generated forward would compare the method and the list, and call the arguments to do so."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = [2, 3]

    def whole(self, image: Tensor) -> Tensor:
        return self.net(image)

    def forward(self, image: Tensor, type: str | None = None, len: int = 3) -> Tensor:
        return self.whole(image) * self.scales[0]


IMAGE = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
GIVEN: dict[type[nn.Module], tuple[tuple[Any, ...], dict[str, Tensor], bool]] = {  # and whether its belief is known
    ByName: ((), {"image": IMAGE}, True),
    Several: ((IMAGE,), {}, True),
    KeywordOnly: ((), {"image": IMAGE}, True),
    Itself: ((), {}, False),
    Listed: (([IMAGE, IMAGE],), {}, False),
    InADict: (({"image": IMAGE},), {}, False),
    Second: ((None, IMAGE), {}, False),
    Film: ((IMAGE.view(2, 2, 3, 8, 8),), {}, False),
    ChannelsLast: ((IMAGE.permute(0, 2, 3, 1),), {}, False),
    Tokens: ((torch.arange(48).view(4, 12) % 10,), {}, False),
    NamedLikeBuiltins: ((IMAGE,), {}, True),
    WithAFunction: ((IMAGE, torch.neg), {}, True),
}


def values(y: Any) -> list[Tensor]:
    return [y] if isinstance(y, Tensor) else list(y.values() if isinstance(y, dict) else y)


@pytest.mark.parametrize(
    "options",
    [{"input_belief": "data"}, {"input_belief": (torch.zeros(3), torch.ones(3))}, {"returns_belief": True}],
    ids=["data", "given", "returned"],
)
@pytest.mark.parametrize("kind", GIVEN, ids=lambda kind: kind.__name__)
def test_a_model_is_called_as_it_was(kind: type[nn.Module], options: dict[str, Any]) -> None:
    """What is no batch of images of so many channels has no belief."""
    original = kind().eval()
    args, kwargs, known = GIVEN[kind]
    model = convert(original, "bkn", stat_batch=2, **options)
    y = model(*args, **kwargs)
    found = values(y.y if "returns_belief" in options else y)
    for a, b in zip(found, values(original(*args, **kwargs)), strict=True):
        assert error(a.detach(), b.detach()) < 1e-5
    model.train()(*args, **kwargs)
    first = next(iter(belief_report(model, *args, **kwargs).values()))
    assert (first is None) == (known and "returns_belief" not in options)


class Wrapped(torch.Tensor):
    pass


@pytest.mark.parametrize("norm", ["bn", "bkn", "gkn", "sn"])
def test_a_tensor_of_another_class(norm: str) -> None:
    model = convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)), norm, stat_batch=2)
    y = model(IMAGE.as_subclass(Wrapped))
    y.sum().backward()
    assert type(y) is Wrapped and error(y.detach().as_subclass(Tensor), model(IMAGE).detach()) < 1e-5


class ToParameters(Holding):
    """As Hugging Face's models do."""

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.to(self.dtype).to(next(self.parameters()).device))


class ByType(Holding):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x if x.dtype is torch.float32 else 2 * x)


class ByTable(Holding):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * {torch.float32: 1}.get(x.dtype, 2)


class ByDevice(Holding):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x if "cpu" in str(x.device) else 2 * x)


class Catching(Holding):
    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.net(x)
        except RuntimeError:
            return self.net(x.mT)


@pytest.mark.parametrize("kind", [ToParameters, ByType, ByTable, ByDevice, Catching])
def test_types_devices_and_errors_are_those_of_the_run(kind: type[nn.Module]) -> None:
    """Not those of the conversion."""
    original = kind().eval()
    model = convert(original, "bkn", stat_batch=2)
    assert list(untraced(model)) == [""] and belief_report(model, IMAGE)["net.4"] is None
    for each in (model, original):
        each.double()
    x = IMAGE if kind is ToParameters else IMAGE.double()
    torch.testing.assert_close(model(x), original(x))
    if kind is Catching:
        model.net[0].register_forward_pre_hook(fails_once := _FailsOnce())
        assert model(x).shape == (4, 4) and fails_once.calls == 2
    if kind is ToParameters:
        assert model.to("meta")(x).device.type == "meta"


class _FailsOnce:
    calls = 0

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.calls += 1
        if self.calls == 1:
            raise RuntimeError("out of memory")


@pytest.mark.parametrize("kind", [list, torch.tensor])
def test_a_belief_of_the_input_that_is_given_comes_back_from_the_device_meta(kind: Any) -> None:
    """No state dict has its numbers."""
    belief, x = (kind([0.1] * 3), kind([2.0] * 3)), torch.randn(4, 3, 8, 8)
    model = convert(net(), "bkn", stat_batch=2, input_belief=belief)
    with torch.device("meta"):
        empty = convert(net(), "bkn", stat_batch=2, input_belief=belief)
    filled = copy.deepcopy(empty).to_empty(device="cpu")
    filled.load_state_dict(model.state_dict())
    torch.testing.assert_close(filled(x), model(x), rtol=0, atol=0)


def test_a_slice_of_a_model_with_a_belief_of_the_input_changes_its_type() -> None:
    model, x = convert(net(), "bkn", input_belief=([0.0] * 3, [1.0] * 3)), torch.randn(4, 3, 8, 8).double()
    torch.testing.assert_close(model[:3].double()(x), copy.deepcopy(model).double()[:3](x))


def test_a_belief_of_the_input_on_the_device_meta_is_refused() -> None:
    with pytest.raises(ValueError, match="on the device meta, which have no values"):
        convert(net(), "bkn", input_belief=(torch.zeros(3, device="meta"), torch.ones(3, device="meta")))


def test_an_argument_called_beliefs_is_refused() -> None:
    class Own(nn.Module):
        def forward(self, x: Tensor, beliefs: Tensor) -> Tensor:
            return x + beliefs

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Own())
    with pytest.raises(ValueError, match=r"2 \(Own\): its forward has an argument called beliefs"):
        convert(model, "bkn")
    convert(model, "bn")
