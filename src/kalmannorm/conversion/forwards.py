"""The source code of generated forwards: of layers, of containers (with the conditions under which their traces hold),
and around a whole model."""

import inspect
import math
from types import ModuleType

import torch.nn.functional as F
from torch import Tensor, fx, nn

from kalmannorm.conversion import runtime
from kalmannorm.conversion.flow import as_original, follow, followed, is_followed, stand_ins
from kalmannorm.conversion.names import Scope, class_of, lending
from kalmannorm.conversion.reading import expression_of
from kalmannorm.conversion.trace import Trace
from kalmannorm.conversion.write import Summary, Writer, summary_of_class
from kalmannorm.norm import contract
from kalmannorm.norm.belief import Belief, Carried, Estimated, Returned, pick
from kalmannorm.norm.moments import Predictor, channel_belief

HELD = "_held"  # key in the names of generated code: lists the attributes that must not be set (Trace.held)

# The functions and classes that generated code may use.
HELPERS: Scope = {
    one.__name__: one
    for one in (
        *(runtime.call, runtime.belief_of, runtime.changed, runtime.lost, runtime.checkpointed, runtime.in_segments),
        *(runtime.normalized, runtime.of_convolution, runtime.of_linear, runtime.of_transition, runtime.of_sample),
        *(runtime.of_transposed, runtime.transposed, runtime.has_parts, runtime.refuse_torch_sync, runtime.known_input),
        *(as_original, follow, followed, is_followed, lending, stand_ins),
        *(pick, channel_belief, class_of, contract.unless_idle),
        *(Belief, Carried, Estimated, Returned, Tensor, fx.Proxy, Predictor),
    )
} | {"linear": F.linear}

NO_FORWARD = nn.Module.forward, nn.ModuleList.forward  # of modules that only hold others


def _layer_code(y: str, predictor: str, arguments: str = "input") -> str:
    """Return the code of a layer's forward, from the code that computes y and the name of what predicts its belief."""
    plainly = arguments.replace("=None", "")
    return f"""\
def forward(self, {arguments}, beliefs=None):
    if beliefs is None:
        return _base.forward(self, {plainly})
    if _base.forward is not _forward:
        return follow(_base.forward, self, ({plainly},), {{}}, beliefs)
    weight, bias = self.weight, self.bias
    y = {y}
    return Returned(y, {predictor}(self, input, y, weight, bias, pick(beliefs, 0, "input")))
"""


# The weight is read once: a computed one may change with every reading (a spectral norm).
_CONVOLUTION = "self._conv_forward(input, weight, bias)"
CONVOLUTION = _layer_code(_CONVOLUTION, "of_convolution")
SAMPLED = _layer_code(_CONVOLUTION, "of_sample")
LEARNED = _layer_code(_CONVOLUTION, "of_transition")
LINEAR = _layer_code("linear(input, weight, bias)", "of_linear")
TRANSPOSED = _layer_code(
    "transposed(self, input, weight, bias, output_size)", "of_transposed", "input, output_size=None"
)
# For a convolution with more code in its forward (timm's Conv2dSame computes its padding there).
OTHER_CONVOLUTION = _layer_code("_base.forward(self, input)", "of_convolution")

# All Sequentials share one loop over their parts, so that slicing and appending keep working.
SEQUENTIAL = """\
def forward(self, input, beliefs=None):
    if beliefs is None and is_followed():
        return followed(forward, self, (input,), {})
    if _base.forward is not _forward:
        return follow(_base.forward, self, (input,), {}, beliefs)
    given, belief, changed = input, pick(beliefs, 0, "input"), None
    for module in self:
        if isinstance(module, Predictor):
            continue
        input, belief, *_ = call(module, (input,), {}, (belief,), {})
        if input is given:
            changed = {0: belief}
    return input if beliefs is None else Returned(input, belief, changed)
"""

# For a container in a model without beliefs.
REFUSING = """\
def forward(self, *args, **kwargs):
    refuse_torch_sync(self)
    return _base.forward(self, *args, **kwargs)
"""

# For such a container whose forward asks for the classes of layers.
ASKING = """\
def forward(self, *args, **kwargs):
    refuse_torch_sync(self)
    with lending(stand_ins(class_of(self))):
        return _base.forward(self, *args, **kwargs)
"""

# For a model that is to return a belief (convert's returns_belief), and has none.
WITHOUT_BELIEF = """\
def forward(self, *args, **kwargs):
    return Estimated(_base.forward(self, *args, **kwargs), None)
"""

# For a forward that cannot be traced.
AS_IT_IS = """\
def forward(self, *args, beliefs=None, **kwargs):
    if beliefs is None and is_followed():
        return followed(forward, self, args, kwargs)
    return follow(_base.forward, self, args, kwargs, beliefs)
"""


# For the normalizer in place of a BatchNorm subclass that adds methods but has no forward of its own.
AS_ITS_BASE = """\
def forward(self, *args, **kwargs):
    return _base.forward(self, *args, **kwargs)
"""

# For the normalizer in place of a BatchNorm subclass that cannot be traced: that class's forward runs as it is, but
# F.batch_norm in it is the normalizer.
AS_ITS_ORIGINAL = """\
def forward(self, *args, beliefs=None, **kwargs):
    return as_original(_base, self, args, kwargs, beliefs)
"""


def container_code(
    module: nn.Module, traces: dict[str, Trace], summaries: dict[nn.Module, Summary]
) -> tuple[str, Scope, Summary]:
    """Return the code of a traced module's forward, the names that the code uses, and the module's summary.

    `traces`: one for both modes, or one each for `train` and `eval`. `summaries`: of the modules that it calls.
    """
    parts: dict[str, str] = {}
    names: Scope = {}
    summary, kinds, held, was = Summary(), dict[type, str](), set[str](), dict[str, str]()
    guards: dict[str, None] = {"_base.forward is _forward": None}
    for mode, traced in traces.items():
        writer = Writer(module, traced.graph, summaries)
        for node in traced.graph.nodes:  # without annotations, not all of which fx can write as code
            node.type = None
        code = traced.graph.python_code("self")
        source = code.src.replace("def forward(", "def _run(", 1).lstrip()
        used = {k: ("module", v.__name__) if isinstance(v, ModuleType) else v for k, v in code.globals.items()}
        taken = {str(node.target if node.op == "placeholder" else node.name) for node in traced.graph.nodes}
        for name, function in code.globals.items():
            known = getattr(function, "__name__", "")
            if HELPERS.get(known) is function and known not in taken:
                source = source.replace(name, known)
                del used[name]
        parts[mode] = source.replace("normalized('self', ", "normalized(_base, self, ")
        names |= used
        summary = Summary(
            writer.summary.curve,
            summary.mutates | writer.summary.mutates,
            summary.aliases | writer.summary.aliases,
        )
        names |= traced.names
        held |= traced.held
        for function in traced.functions:
            was.setdefault(function, f"_was_{len(was)}")
            now = function if function.startswith("_base.__mro__") else function.replace("_base.", "type(self).", 1)
            guards[f"{now} is {was[function]}"] = None
        guards |= dict.fromkeys(_structure(module, traced.graph, summaries))
        for layer, kind in traced.kinds.items():
            kinds.setdefault(kind, f"_class_{len(kinds)}")
            guards[f"class_of({layer}) is {kinds[kind]}"] = None
        for method, kind in traced.methods.items():
            kinds.setdefault(kind, f"_class_{len(kinds)}")
            part, _, name = method.rpartition(".")
            known = was.setdefault(f"{kinds[kind]}.{name}", f"_was_{len(was)}")
            guards[f'getattr(type({part}), "{name}", None) is {known} and "{name}" not in {part}.__dict__'] = None
        guards |= dict.fromkeys(_guards(traced))
    names |= {name: kind for kind, name in kinds.items()}
    names |= {HELD: " ".join(sorted(held))} if held else {}
    head, arguments = head_of(type(module), names)
    frozen = next(iter(traces.values())).frozen
    same = len(set(parts.values())) == 1
    sources = [parts["train"]] if same else [parts[mode].replace("def _run(", f"def _{mode}(", 1) for mode in parts]
    run = "_run" if same else "(_train if self.training else _eval)"
    packed = "(" + "".join(f"{a}, " for n, a in arguments.items() if "=" not in a and not a.startswith("**")) + ")"
    named = "".join(f'"{n}": {n}, ' for n, a in arguments.items() if "=" in a)
    rest = "".join(a for a in arguments.values() if a.startswith("**"))
    lines = [*(f"{name} = {function}" for function, name in was.items()), f"def forward({head}):"]
    given = f"self, {packed}, {{{named}{rest}}}"
    lines += ["    if beliefs is None and is_followed():", f"        return followed(forward, {given})"]
    lines += [f"    if not ({' and '.join(guards)}):", f"        return follow(_base.forward, {given}, beliefs)"]
    handed = [a.partition("=")[0] for n, a in arguments.items() if n not in frozen]
    handed.sort(key=lambda a: a.startswith("*"))  # fx puts starred arguments last, behind those by keyword
    starred = [a for a in handed if a.startswith("**")]
    given = ", ".join(["self", *(a for a in handed if a not in starred), "beliefs=beliefs", *starred])
    lines += [f"    y, belief, changed = {run}({given})"]
    lines += ["    return y if beliefs is None else Returned(y, belief, changed)"]
    return "\n".join([*sources, *lines]) + "\n", names, summary


def sequential_summary(module: nn.Sequential, summaries: dict[nn.Module, Summary]) -> Summary:
    """Return the summary of a Sequential: its parts' formulas nested in each other, empty if one has none."""
    curve, whole, aliases, mutates = "{}", True, True, False
    for child in module:
        one = summaries.get(child) or summary_of_class(child)
        mutates |= aliases and 0 in one.mutates
        aliases &= 0 in one.aliases
        whole &= bool(one.curve)
        curve = one.curve.replace("{}", curve) if whole else ""
    return Summary(curve, frozenset({0} if mutates else ()), frozenset({0} if aliases else ()))


def _structure(module: nn.Module, graph: fx.Graph, summaries: dict[nn.Module, Summary]) -> list[str]:
    """Return conditions that parts are still those that were traced: the module's own, those of modules in it through
    which the forward reaches a part, and those of Sequentials on whose summary the code relies."""
    owners = {""}
    for node in graph.nodes:
        path = str(node.target).split(".") if node.op in ("call_module", "get_attr") else ()
        owners |= {".".join(path[:i]) for i in range(len(path))}
    parts = dict(module.named_modules())
    for name in {str(node.target) for node in graph.nodes if node.op == "get_attr"} & parts.keys():
        if any(summaries.get(parts[name], ())):
            inner = parts[name].named_modules(prefix=name)
            owners |= {path for path, part in inner if isinstance(part, nn.Sequential)}
    lists = {name for name, part in parts.items() if type(part).forward in NO_FORWARD}
    listed = {name for name in lists if name.rpartition(".")[0] in owners | lists}
    return [
        f"has_parts({expression_of(name)}, {runtime.parts_of(owner)!r})"
        for name in sorted(owners | listed)
        if isinstance(owner := module.get_submodule(name), nn.Module)
    ]


def _guards(traced: Trace) -> list[str]:
    """Return the conditions, as code, on arguments and plain values under which a trace holds."""
    asked = {"tensor": "(Tensor, Proxy)", "list": "(list, tuple)"}
    return [
        *(f"isinstance({name}, {asked[kind]})" for name, kind in traced.asked.items()),
        *(f"{name} is not None" for name in traced.given),
        *(_equals(name, value) for name, value in traced.read.items()),
        *(_equals(name, value) for name, value in traced.frozen.items()),
    ]


def _equals(expression: str, value: object) -> str:
    if value is None or isinstance(value, bool):
        return f"{expression} is {value}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{expression} == float({str(value)!r})"
    return f"{expression} == {value!r}"


def head_of(cls: type[nn.Module], names: Scope) -> tuple[str, dict[str, str]]:
    """Return the parameters of a class's forward as code, with `beliefs` added, and by name how to pass each one on.

    Default values are added to `names`.
    """
    head, arguments = ["self"], {}
    for name, parameter in list(inspect.signature(cls.forward).parameters.items())[1:]:
        if name == "beliefs":  # a normalizer's forward has it already
            continue
        star = "*" * (parameter.kind is parameter.VAR_POSITIONAL) + "**" * (parameter.kind is parameter.VAR_KEYWORD)
        if parameter.kind is parameter.VAR_KEYWORD:
            head.append("beliefs=None")
        if parameter.kind is parameter.KEYWORD_ONLY and not any(one.startswith("*") for one in head):
            head.append("*")
        default = ""
        if parameter.default is not parameter.empty:
            names[f"_default_{name}"], default = parameter.default, f"=_default_{name}"
        head.append(f"{star}{name}{default}")
        arguments[name] = f"{name}={name}" if parameter.kind is parameter.KEYWORD_ONLY else f"{star}{name}"
    if "beliefs=None" not in head:
        head.append("beliefs=None")
    return ", ".join(head), arguments


def root_code(cls: type[nn.Module], input_belief: str | None, relu: str, returns_belief: bool) -> tuple[str, Scope]:
    """Return the code around a whole model's forward, and its names: it adds the belief of the input, and returns y
    alone or, with `returns_belief`, (y, belief of y).

    `input_belief`: where the input's belief is known from: `buffers`, `argument`, `data`, or None if it is not known.
    `relu`: Carried.relu of that belief.
    """
    names: Scope = {"_RELU": relu}
    head, arguments = head_of(cls, names)
    first = next(iter(arguments), "")  # the input; of `*images` or `**batch` the first entry
    image, by_name, handed = first, f"{{{first!r}: given}}", arguments.get(first, "")
    if handed.startswith("*"):
        image = f"next(iter({first}{'.values()' if handed.startswith('**') else ''}), None)"
        by_name = f"dict.fromkeys(list({first})[:1], given)"
    known = f"{first}_belief" if input_belief == "argument" else f"known_input(self, {image})"
    if input_belief == "argument":
        head = head.replace(first, f"{first}, {first}_belief=None", 1)
    lines = [f"    given = pick(beliefs, 0, {first!r})"]
    if input_belief is not None and first:
        lines += [f"    given = unless_idle({known} if given is None else given)"]
    lines += ["    if isinstance(given, Belief) and _RELU != 'closed':", "        given = Carried(given, '', _RELU)"]
    positional = "=" not in handed and not handed.startswith("**")
    others = "".join(f"{a}, " for a in arguments.values())
    lines += [
        f"    out = _base.forward(self, {others}beliefs={'((given,), {})' if positional else f'((), {by_name})'})"
    ]
    result = "Estimated(out[0], channel_belief(out[1]))" if returns_belief else "out[0]"
    lines += [f"    return {result} if beliefs is None else out"]
    return "\n".join([f"def forward({head}):", *lines]) + "\n", names
