"""The code of generated forwards: of layers, of containers with the conditions under which it is theirs, and around a
model as a whole."""

import inspect
import math
from types import ModuleType

import torch.nn.functional as F
from torch import Tensor, fx, nn

from kalmannorm.conversion import runtime
from kalmannorm.conversion.flow import as_original, follow, stand_ins
from kalmannorm.conversion.names import Scope, class_of, lending
from kalmannorm.conversion.trace import Trace, expression_of
from kalmannorm.conversion.write import Summary, Writer, summary_of_class
from kalmannorm.norm import contract
from kalmannorm.norm.belief import Belief, Carried, Estimated, Returned, pick
from kalmannorm.norm.moments import Predictor, plain

HELD = "_held"  # among the names of generated code: those of attributes that it takes for what they were

# What generated code may call.
HELPERS: Scope = {
    one.__name__: one
    for one in (
        *(runtime.call, runtime.belief_of, runtime.changed, runtime.lost, runtime.checkpointed, runtime.in_segments),
        *(runtime.normalized, runtime.of_convolution, runtime.of_linear, runtime.of_transition, runtime.of_sample),
        *(runtime.of_transposed, runtime.transposed, runtime.has_parts, runtime.refuse_torch_sync, runtime.known_input),
        *(as_original, follow, pick, plain, class_of, lending, stand_ins, contract.used),
        *(Belief, Carried, Estimated, Returned, Tensor, fx.Proxy, Predictor),
    )
} | {"linear": F.linear}

NO_FORWARD = nn.Module.forward, nn.ModuleList.forward  # of what holds modules alone


def _layer_code(y: str, predictor: str, arguments: str = "input") -> str:
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


# The weight is read once: it may be computed, and change with every reading (a spectral norm).
_CONVOLUTION = "self._conv_forward(input, weight, bias)"
CONVOLUTION = _layer_code(_CONVOLUTION, "of_convolution")
SAMPLED = _layer_code(_CONVOLUTION, "of_sample")
LEARNED = _layer_code(_CONVOLUTION, "of_transition")
LINEAR = _layer_code("linear(input, weight, bias)", "of_linear")
TRANSPOSED = _layer_code(
    "transposed(self, input, weight, bias, output_size)", "of_transposed", "input, output_size=None"
)
# With code of its own (timm's Conv2dSame pads as it goes).
OTHER_CONVOLUTION = _layer_code("_base.forward(self, input)", "of_convolution")

# One loop for all of them: slices and appended modules go on working.
SEQUENTIAL = """\
def forward(self, input, beliefs=None):
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

# Where there are no beliefs.
REFUSING = """\
def forward(self, *args, **kwargs):
    refuse_torch_sync(self)
    return _base.forward(self, *args, **kwargs)
"""

# One that asks for classes.
ASKING = """\
def forward(self, *args, **kwargs):
    refuse_torch_sync(self)
    with lending(stand_ins(class_of(self))):
        return _base.forward(self, *args, **kwargs)
"""

# A part that is to return a belief, and has none.
WITHOUT_BELIEF = """\
def forward(self, *args, **kwargs):
    return Estimated(_base.forward(self, *args, **kwargs), None)
"""

# A forward that cannot be traced.
AS_IT_IS = """\
def forward(self, *args, beliefs=None, **kwargs):
    return follow(_base.forward, self, args, kwargs, beliefs)
"""


# Of one whose class has methods of its own alone.
AS_ITS_BASE = """\
def forward(self, *args, **kwargs):
    return _base.forward(self, *args, **kwargs)
"""

# Of a BatchNorm layer that cannot be traced: its class's, in which F.batch_norm is the normalizer's.
AS_ITS_ORIGINAL = """\
def forward(self, *args, beliefs=None, **kwargs):
    return as_original(_base, self, args, kwargs, beliefs)
"""


def container_code(
    module: nn.Module, traces: dict[str, Trace], summaries: dict[nn.Module, Summary]
) -> tuple[str, Scope, Summary]:
    """Code, the names that it uses, and the summary of a module with these traces."""
    parts: dict[str, str] = {}
    names: Scope = {}
    summary, kinds, held, was = Summary(), dict[type, str](), set[str](), dict[str, str]()
    guards: dict[str, None] = {"_base.forward is _forward": None}
    for mode, traced in traces.items():
        writer = Writer(module, traced.graph, summaries)
        for node in traced.graph.nodes:  # annotations, not all of which fx can write
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
    lines += [f"    if not ({' and '.join(guards)}):"]
    lines += [f"        return follow(_base.forward, self, {packed}, {{{named}{rest}}}, beliefs)"]
    handed = [a.partition("=")[0] for n, a in arguments.items() if n not in frozen]
    handed.sort(key=lambda a: a.startswith("*"))  # fx has what is starred last, keyword arguments before it
    starred = [a for a in handed if a.startswith("**")]
    given = ", ".join(["self", *(a for a in handed if a not in starred), "beliefs=beliefs", *starred])
    lines += [f"    y, belief, changed = {run}({given})"]
    lines += ["    return y if beliefs is None else Returned(y, belief, changed)"]
    return "\n".join([*sources, *lines]) + "\n", names, summary


def sequential_summary(module: nn.Sequential, summaries: dict[nn.Module, Summary]) -> Summary:
    """Of a loop over modules: the formulas in each other, as far as each has one."""
    curve, whole, aliases, mutates = "{}", True, True, False
    for child in module:
        one = summaries.get(child) or summary_of_class(child)
        mutates |= aliases and 0 in one.mutates
        aliases &= 0 in one.aliases
        whole &= bool(one.curve)
        curve = one.curve.replace("{}", curve) if whole else ""
    return Summary(curve, frozenset({0} if mutates else ()), frozenset({0} if aliases else ()))


def _structure(module: nn.Module, graph: fx.Graph, summaries: dict[nn.Module, Summary]) -> list[str]:
    """That a module has the parts that it had, and those in which parts are called, and those whose summary counts."""
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
    """The parameters of a forward, `beliefs` among them, and how each is handed on, by name."""
    head, arguments = ["self"], {}
    for name, parameter in list(inspect.signature(cls.forward).parameters.items())[1:]:
        if name == "beliefs":  # a normalizer's own
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


# Around the forward of a model as a whole: what is known of its input, and what it returns.
def root_code(cls: type[nn.Module], input_belief: str | None, relu: str, returns_belief: bool) -> tuple[str, Scope]:
    """`input_belief`: `buffers`, `argument`, `data`, or None: nothing is known."""
    names: Scope = {"_RELU": relu}
    head, arguments = head_of(cls, names)
    first = next(iter(arguments), "")  # of `*images`, `**batch`: the first of them
    image, by_name, handed = first, f"{{{first!r}: given}}", arguments.get(first, "")
    if handed.startswith("*"):
        image = f"next(iter({first}{'.values()' if handed.startswith('**') else ''}), None)"
        by_name = f"dict.fromkeys(list({first})[:1], given)"
    known = f"{first}_belief" if input_belief == "argument" else f"known_input(self, {image})"
    if input_belief == "argument":
        head = head.replace(first, f"{first}, {first}_belief=None", 1)
    lines = [f"    given = pick(beliefs, 0, {first!r})"]
    if input_belief is not None and first:
        lines += [f"    given = used({known} if given is None else given)"]
    lines += ["    if isinstance(given, Belief) and _RELU != 'closed':", "        given = Carried(given, '', _RELU)"]
    positional = "=" not in handed and not handed.startswith("**")
    others = "".join(f"{a}, " for a in arguments.values())
    lines += [
        f"    out = _base.forward(self, {others}beliefs={'((given,), {})' if positional else f'((), {by_name})'})"
    ]
    plain = "Estimated(out[0], plain(out[1]))" if returns_belief else "out[0]"
    lines += [f"    return {plain} if beliefs is None else out"]
    return "\n".join([f"def forward({head}):", *lines]) + "\n", names
