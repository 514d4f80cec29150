"""Jinja for templates by strangers: a sandbox that sees plain data only, and that bounds what a template costs.

Loops, calls, filters, operators and output count their work, about one unit a character or item, before it is done, and
no list or text may hold more than some times what the conversation holds. So `{{ 10**10**10 }}`, a loop of loops, or a
list of lists of lists that is written out end with an error, not with the machine's memory. Jinja computes constants
while it compiles; here it does not, for nothing counts there.
"""

import json
import re
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.parser
import jinja2.utils
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.tests import test_iterable, test_sequence

__all__ = ["NoText", "compile_template", "render", "variable_names"]

# Work that a template may do, and more for each character of the conversation; real ones take some tens of these.
MOST_WORK, MOST_WORK_PER_CHARACTER = 10_000_000, 200
# Characters and items that one value may hold, and more for each character of the conversation.
MOST_HELD, MOST_HELD_PER_CHARACTER = 2_000_000, 16
# For what the count does not see, such as comparisons of long texts.
MOST_SECONDS = 20.0
# Work of a turn of a loop or a call.
TURN = 100
MOST_BITS, MOST_NUMBER = 10_000, 1_000_000
# A number in a format, such as the width of "%1000d", and one of a million characters.
NUMBER = re.compile(r"\d+")
MOST_DIGITS = 5
# What `wordwrap` cuts a text into, and the width of its lines where it is given none.
WORD = re.compile(r"\s+|\S+")
LINE = 79
# Filters and methods that write all that a value holds, or add it up; the others cost the length of their value.
WRITING = frozenset({
    "batch", "capitalize", "center", "e", "escape", "expandtabs", "forceescape", "indent", "join", "ljust", "lower",
    "lstrip", "pprint", "replace", "rjust", "rstrip", "safe", "slice", "string", "strip", "striptags", "sum", "title",
    "tojson", "translate", "trim", "truncate", "upper", "urlencode", "urlize", "wordcount", "wordwrap", "xmlattr",
    "zfill",
})  # fmt: skip
# Those whose result can be as long as the product of their value and arguments.
MULTIPLYING = frozenset({"batch", "expandtabs", "indent", "slice", "tojson", "translate"})


class NoText(str):
    """What a message without a text says: `is none` to a template's tests, "" wherever it is written or added."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return other is None or str.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def _is_none(value: Any) -> bool:
    return value is None or isinstance(value, NoText)


def _is_string(value: Any) -> bool:
    return isinstance(value, str) and not isinstance(value, NoText)


def _is_sequence(value: Any) -> bool:
    return bool(test_sequence(value)) and not isinstance(value, NoText)


def _is_iterable(value: Any) -> bool:
    return bool(test_iterable(value)) and not isinstance(value, NoText)


def _refuse(reason: str) -> jinja2.exceptions.SecurityError:
    return jinja2.exceptions.SecurityError(reason)


class _Budget:
    """What a rendering may still do."""

    def __init__(self, *conversation: Any) -> None:
        """conversation: all that the template is given."""
        self._weights: dict[int, tuple[Any, int]] = {}  # by id; it is kept, so that no other value gets its id
        size = self.weigh(conversation)
        self._left = MOST_WORK + MOST_WORK_PER_CHARACTER * size
        self._held = MOST_HELD + MOST_HELD_PER_CHARACTER * size
        self._end = time.monotonic() + MOST_SECONDS

    def spend(self, work: int) -> None:
        """Count work that is about to be done."""
        self._left -= work
        if self._left < 0:
            raise _refuse("it does more work than a chat template needs, or never ends")

    def turn(self) -> None:
        """Count a turn of a loop, or a call."""
        self.spend(TURN)
        if time.monotonic() > self._end:
            raise _refuse(f"it takes more than {MOST_SECONDS:g} s")

    def hold(self, value: Any) -> Any:
        """Return a value that was made, if it is not too large."""
        self.hold_all((value,))
        return value

    def hold_all(self, values: Iterable[Any]) -> None:
        """As `hold`, of several values together."""
        if sum(map(self.weigh, values)) > self._held:
            raise _refuse("it makes a list or text much larger than the conversation")

    def weigh(self, value: Any) -> int:
        """Characters and items of a value, with what it holds as often as it is held.

        Each list is looked at once, for templates cannot change one: so the weight of lists of lists of one list is
        known at once, however large it is.
        """
        if isinstance(value, str | bytes):
            return 1 + len(value)
        if isinstance(value, range):
            return 1 + len(value)
        if isinstance(value, jinja2.utils.Namespace):
            return 1 + sum(map(self.weigh, object.__getattribute__(value, "_Namespace__attrs").values()))
        if not isinstance(value, Collection):
            return 1
        if (found := self._weights.get(id(value))) is not None:
            return found[1]
        weight = 1 + sum(map(self.weigh, value))
        if isinstance(value, Mapping):
            weight += sum(map(self.weigh, value.values()))
        self._weights[id(value)] = value, weight
        return weight


class _Formatter(SandboxedFormatter):
    """`str.format` that counts."""

    def __init__(self, environment: "_Environment") -> None:
        super().__init__(environment)
        self._budget = environment.budget

    def format_field(self, value: Any, format_spec: str) -> Any:
        self._budget.spend(TURN + self._budget.weigh(value) + _widths(format_spec))
        return super().format_field(value, format_spec)


class _Environment(ImmutableSandboxedEnvironment):
    """Counts the work of a rendering; each thread has one at a time."""

    intercepted_binops = frozenset({"+", "*", "**", "%", "-", "/", "//"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._of_thread = threading.local()

    @property
    def budget(self) -> _Budget:
        """Of the rendering that this thread is at."""
        budget: _Budget = self._of_thread.budget
        return budget

    def begin(self, *conversation: Any) -> None:
        """Start to count."""
        self._of_thread.budget = _Budget(*conversation)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Have what the sandbox does not see call it: turns of loops, `~`, and the making of lists."""
        tree = super()._parse(source, name, filename)
        for node in [*tree.find_all(nodes.Node)]:
            for field, value in node.iter_fields():
                if isinstance(value, nodes.Node):
                    setattr(node, field, self._watched(value))
                elif isinstance(value, list):
                    value[:] = [self._watched(each) if isinstance(each, nodes.Node) else each for each in value]
        turning: list[nodes.For | nodes.Macro | nodes.CallBlock] = [
            *tree.find_all(nodes.For),
            *tree.find_all(nodes.Macro),
            *tree.find_all(nodes.CallBlock),
        ]
        for found in turning:
            text = sum(len(data.data) for each in found.body for data in each.find_all(nodes.TemplateData))
            turn = self._call("count_turn", [nodes.Const(text, lineno=found.lineno)], found.lineno)
            found.body.insert(0, nodes.ExprStmt(turn, lineno=found.lineno))
        tree.set_environment(self)
        return tree

    def _watched(self, node: nodes.Node) -> nodes.Node:
        if isinstance(node, nodes.Concat):
            return self._call("concatenate", node.nodes, node.lineno)
        if isinstance(node, nodes.List | nodes.Dict) or (isinstance(node, nodes.Tuple) and node.ctx == "load"):
            return self._call("hold", [node], node.lineno)
        return node

    @staticmethod
    def _call(name: str, arguments: list[nodes.Expr], line: int) -> nodes.Call:
        return nodes.Call(nodes.EnvironmentAttribute(name, lineno=line), arguments, [], None, None, lineno=line)

    def count_turn(self, characters: int) -> None:
        """A turn of a loop or macro, which writes so many characters of the template."""
        self.budget.spend(characters)

    def hold(self, value: Any) -> Any:
        """A list, tuple or mapping that the template has made."""
        return self.budget.hold(value)

    def concatenate(self, *values: Any) -> str:
        """`~`."""
        self.budget.spend(sum(map(self.budget.weigh, values)))
        text: str = self.budget.hold("".join(map(str, values)))
        return text

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An operator, once it is known what it costs."""
        budget = self.budget
        budget.spend(1)
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * max(1, right) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MOST_BITS:
                raise _refuse("it makes a number of thousands of digits")
        elif operator == "*":
            for items, times in ((left, right), (right, left)):
                if isinstance(items, Collection) and isinstance(times, int):
                    budget.spend(len(items) * max(0, times))
        elif operator == "%" and isinstance(left, str):
            self._count_format(left, right)
        elif isinstance(left, Collection):
            budget.spend(len(left) + (len(right) if isinstance(right, Collection) else 0))
        return budget.hold(super().call_binop(context, operator, left, right))

    def _count_format(self, text: str, values: Any) -> None:
        """Count `text % values`."""
        given = values if "*" in text and isinstance(values, tuple) else ()
        _check_numbers(given)
        widths = _widths(text) + sum(abs(each) for each in given if isinstance(each, int))
        self.budget.spend(len(text) + widths + (text.count("%") + 1) * self.budget.weigh(values))

    def getitem(self, obj: Any, argument: Any) -> Any:
        """An item, or a slice, which is a copy."""
        if isinstance(argument, slice) and isinstance(obj, Collection):
            self.budget.spend(len(obj))
        return super().getitem(obj, argument)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`format` and `format_map` of a text, counted; None for any other value."""
        text, name = getattr(value, "__self__", None), getattr(value, "__name__", "")
        if not isinstance(text, str) or name not in ("format", "format_map"):
            return None

        def formatted(*args: Any, **kwargs: Any) -> str:
            if name == "format_map":
                args, kwargs = (), *args
            self.budget.spend(len(text))
            made: str = self.budget.hold(_Formatter(self).vformat(text, args, kwargs))
            return made

        return formatted

    # The names are such that a template's function may have any.
    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """A function or method, once it is known what it costs."""
        budget = __self.budget
        budget.turn()
        budget.hold_all((*args, *kwargs.values()))
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str | bytes | Collection | int | float):
            if (counted := __self.wrap_str_format(__obj)) is not None:
                __obj = counted
            else:
                args = _listed(args)
                __self.count(name, owner, *args, **kwargs)
        elif __obj is not __self.globals["range"]:  # has a limit of its own
            _check_numbers([*args, *kwargs.values()])
        return budget.hold(super().call(__context, __obj, *args, **kwargs))

    def count(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Count the work of a filter, or of a method of a text or list."""
        budget, given = self.budget, [*args, *kwargs.values()]
        _check_numbers(given)
        if name == "format":
            self._count_format(str(value), tuple(given))
        elif name not in WRITING:
            budget.spend(len(value) if isinstance(value, Collection) else 1)
        else:
            size, rest = budget.weigh(value), sum(map(budget.weigh, given))
            numbers = [abs(each) for each in given if isinstance(each, int)]
            budget.spend(size)
            if name == "replace" and len(given) > 1:
                text, old, new = str(value), str(given[0]), str(given[1])
                budget.spend((text.count(old) if old else size) * len(new))
            elif name == "join":
                budget.spend(size * rest)
            elif name == "wordwrap":  # what is left of a word is copied for each line of it
                longest = max((len(found.group()) for found in WORD.finditer(str(value))), default=0)
                budget.spend(size * (1 + longest // max(1, min(numbers, default=LINE))))
            elif name in MULTIPLYING:
                lists = TURN * sum(numbers) if name == "slice" else 0
                budget.spend(lists + size * max([1, *numbers, *(budget.weigh(each) for each in given)]))
            else:
                budget.spend(rest + sum(numbers))


def _widths(text: str) -> int:
    """Characters that the widths in a format ask for, all of them together."""
    numbers = NUMBER.findall(text)
    if any(len(number) > MOST_DIGITS for number in numbers):
        raise _refuse("it has a format of a million characters")
    return sum(map(int, numbers))


def _check_numbers(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > MOST_NUMBER:
            raise _refuse("it gives a number above a million to a function")


def _counted(environment: _Environment, name: str, function: Any) -> Any:
    """A filter that counts before it works; the argument that Jinja passes of its own comes first."""
    own = 1 if hasattr(function, "jinja_pass_arg") else 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        values = _listed(args[own:])
        environment.budget.turn()
        environment.budget.hold_all(values)
        environment.count(name, *values, **kwargs)
        return environment.budget.hold(function(*args[:own], *values, **kwargs))

    if own:
        counted.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
    return counted


def _listed(values: Sequence[Any]) -> tuple[Any, ...]:
    """Values, with what is made item by item as lists: its items are counted as they are made."""
    lazy = [isinstance(each, Iterator) and not isinstance(each, LoopContext) for each in values]
    return tuple(list(each) if late else each for each, late in zip(values, lazy, strict=True))


class _Generation(Extension):
    """{% generation %} … {% endgeneration %} marks assistant text for training; here it is its content."""

    tags = {"generation"}  # noqa: RUF012 (the type that Jinja declares)

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Namespace(jinja2.utils.Namespace):
    """`namespace()` without names that reach into Python."""

    def __init__(*args: Any, **attributes: Any) -> None:  # so that an attribute may be called "self"
        self, *rest = args
        attributes = dict(*rest, **attributes)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    value = _without_text(value)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _without_text(value: Any) -> Any:
    """A value with None where nothing is said."""
    if isinstance(value, Mapping):
        return {key: _without_text(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_text(item) for item in value]
    return None if isinstance(value, NoText) else value


def _strftime_now(layout: str) -> str:
    _widths(layout)
    return datetime.now().strftime(layout)


def _make_dict(*args: Any, **items: Any) -> dict[Any, Any]:
    return dict(*args, **items)


@jinja2.pass_context
def _write(context: Context, value: Any) -> Any:
    """Every value that is written. That it takes the context keeps Jinja from writing constants while it compiles."""
    budget = context.environment.budget  # type: ignore[attr-defined]
    budget.spend(budget.weigh(value))
    return value


def compile_template(source: str) -> jinja2.Template:
    """A template in an environment of its own, with the extras that chat templates of the Hugging Face hub rely on.

    Raises whatever Jinja and Python's compiler raise: they are not made for strangers.
    """
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,
        finalize=_write,
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _to_json  # Jinja's own escapes HTML
    environment.filters = {name: _counted(environment, name, each) for name, each in environment.filters.items()}
    environment.tests |= {"none": _is_none, "string": _is_string, "sequence": _is_sequence, "iterable": _is_iterable}
    del environment.globals["lipsum"]  # writes as much as a number says
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_make_dict, namespace=_Namespace
    )
    return environment.from_string(source)


def variable_names(source: str) -> frozenset[str]:
    """The names of all variables that a template looks at or sets. Raises as `compile_template`."""
    tree = jinja2.Environment(extensions=[_Generation, "jinja2.ext.loopcontrols"]).parse(source)  # noqa: S701 (parsed)
    return frozenset(node.name for node in tree.find_all(nodes.Name))


def render(template: jinja2.Template, messages: Sequence[Any], variables: Mapping[str, Any]) -> str:
    """The text of a template.

    Raises whatever the expressions of a template can raise, and SecurityError when it does too much.
    """
    environment: Any = template.environment
    environment.begin(messages, variables)
    return template.render(messages=messages, **variables)
