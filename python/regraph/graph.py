"""Specs by calls: a method for each op, typed from the op table, that add nodes to a JSON document.

    g = regraph.Graph("window", H=8, KH=2, D=64)
    q = g.input("q", ["T", "H", "D"], "bf16", grad=True)       # ... k, v
    cu = g.input("cu_seqlens", ["B+1"], "i32")
    o, lse = g.swa_attn(q, k, v, cu_seqlens=cu, window_left=511)
    g.output("o", o)
    spec = g.spec()                                            # or g.document, g.json()

Inputs of an op come by position, in the order of its ports, or by name; the rest are attributes.
Where the graph has one input of sequence starts, it is filled in. `help(g.swa_attn)` says what an
op takes.
"""

import difflib
import inspect
import itertools
import json

from . import core
from .errors import RegraphError

_TYPES = {"int": int, "real": float, "float": float, "bool": bool, "enum": str}


class Value:
    """A tensor of a graph: an input, or a node's output."""

    def __init__(self, graph, name):
        self.graph, self.name = graph, name

    def __repr__(self):
        return f"Value({self.name})"


class Graph:
    """A spec in the making; `params` are its parameters."""

    def __init__(self, name=None, context=None, **params):
        self.context = context or core.default_context()
        self.document = {"regraph": 1, **({"name": name} if name else {}), "params": params,
                         "inputs": {}, "nodes": [], "outputs": {}}
        table = json.loads(self.context.describe("ops-json"))["ops"]
        self._ops = {op["name"]: op for op in table if not op["internal"]}

    def __dir__(self):
        return [*super().__dir__(), *self._ops]

    def __getattr__(self, name):
        if name.startswith("_") or name not in self._ops:
            near = difflib.get_close_matches(name, self._ops, 1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise AttributeError(f"there is no op '{name}'{hint} (`regraph ops` lists them)")
        return self._method(self._ops[name])

    def _method(self, op):
        ports, attrs = op["in"], {a["name"]: a for a in op["attrs"]}

        def add(*args, name=None, **named):
            return self._add(op, ports, attrs, args, name, named)

        keyword = inspect.Parameter.KEYWORD_ONLY
        either = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [
            inspect.Parameter(p["name"], either if not p["optional"] else keyword,
                              annotation=list if p["list"] else Value,
                              default=None if p["optional"] else inspect.Parameter.empty)
            for p in sorted(ports, key=lambda p: p["optional"])]
        taken = {p["name"] for p in ports}
        parameters += [inspect.Parameter(a["name"], keyword, default=a.get("default"),
                                         annotation=_TYPES.get(a["type"], object))
                       for a in attrs.values() if a["name"] not in taken]
        add.__name__ = op["name"]
        add.__signature__ = inspect.Signature(parameters, return_annotation=Value)
        lines = [f"{kind} {x['name']}: {x['doc']}" for kind, group in
                 (("in", ports), ("attribute", op["attrs"]), ("out", op["out"])) for x in group]
        add.__doc__ = op["doc"] + "\n\n" + "\n".join(lines)
        return add

    def _tensor(self, value, where):
        values = value if isinstance(value, (list, tuple)) else [value]
        for one in values:
            if not isinstance(one, Value) or one.graph is not self:
                raise RegraphError("RG_E_USAGE", f"{where} is {one!r}; expected a tensor of this "
                                                 "graph: what `input` or an op returned")
        names = [one.name for one in values]
        return names if isinstance(value, (list, tuple)) else names[0]

    def _add(self, op, ports, attrs, args, name, named):
        title = op["name"]
        if len(args) > len(ports):
            raise RegraphError("RG_E_USAGE", f"{title}: {len(args)} tensors; expected "
                                             f"{', '.join(p['name'] for p in ports)}")
        values = {}
        for port, value in zip(ports, args):
            if port["name"] in named:
                raise RegraphError("RG_E_USAGE", f"{title}: '{port['name']}' is given twice")
            values[port["name"]] = value
        names = {p["name"] for p in ports}
        for key in [k for k in named if k in names]:
            values[key] = named.pop(key)
        unknown = [key for key in named if key not in attrs]
        if unknown:
            near = difflib.get_close_matches(unknown[0], [*names, *attrs], 1)
            raise RegraphError("RG_E_KEY", f"{title}: there is no port or attribute '{unknown[0]}'"
                               + (f"; did you mean '{near[0]}'?" if near else ""))
        starts = [key for key, entry in self.document["inputs"].items()
                  if entry["dtype"] == "i32" and entry["shape"] == ["B+1"]]
        if "cu_seqlens" in names and "cu_seqlens" not in values and len(starts) == 1:
            values["cu_seqlens"] = Value(self, starts[0])
        connected = {key: self._tensor(value, f"{title}: '{key}'")
                     for key, value in values.items() if value is not None}
        if name is None:
            taken = {node["name"] for node in self.document["nodes"]}
            count = sum(node["op"] == title for node in self.document["nodes"])
            name = next(one for i in itertools.count(count + 1)
                        if (one := f"{title}_{i}" if i > 1 else title) not in taken)
        out = {port["name"]: f"{name}.{port['name']}" for port in op["out"]}
        node = {"name": name, "op": title, "in": connected}
        if named:
            node["attrs"] = named
        self.document["nodes"].append(node)
        made = [Value(self, tensor) for tensor in out.values()]
        return made[0] if len(made) == 1 else tuple(made)

    def _declare(self, section, name, entry):
        there = self.document.setdefault(section, {})
        if name in there:
            raise RegraphError("RG_E_NAME", f"'{name}' stands in {section} already; give each a "
                                            "name of its own")
        there[name] = entry
        return Value(self, name)

    def input(self, name: str, shape: list, dtype: str = "$dtype",
              grad: bool | str = False) -> Value:
        """An input [extents: integers, names, expressions]; grad: True, or "accumulate"."""
        entry = {"shape": list(shape), "dtype": dtype, **({"grad": grad} if grad else {})}
        return self._declare("inputs", name, entry)

    def state(self, name: str, shape: list, dtype: str = "$dtype") -> Value:
        """Memory that a forward reads and leaves in a new version, which `next` names."""
        return self._declare("state", name, {"shape": list(shape), "dtype": dtype})

    def next(self, state: Value, value: Value) -> None:
        """The last version of a state: what the op gave that wrote it."""
        name = self._tensor(state, "the state")
        if name not in self.document.get("state", {}):
            raise RegraphError("RG_E_USAGE", f"'{name}' is no state; `state` makes one")
        self.document["state"][name]["next"] = self._tensor(value, f"the next '{name}'")

    def output(self, name: str, value: Value) -> None:
        """Declares an output."""
        self._declare("outputs", name, self._tensor(value, f"the output '{name}'"))

    def json(self) -> str:
        """The document as JSON text."""
        return json.dumps(self.document, indent=1)

    def spec(self, **params) -> core.Spec:
        """The checked spec; mistakes are raised with their place in the document."""
        name = self.document.get("name")
        return core.Spec(self.document, self.context, name=name, **params)

    def __repr__(self):
        return (f"Graph({self.document.get('name')!r}: {len(self.document['inputs'])} inputs, "
                f"{len(self.document['nodes'])} nodes)")
