"""nano-vllm's attention by regraph: over its pages, in place of flash attention.

    import regraph.nanovllm
    regraph.nanovllm.install()                        # before nanovllm is imported
    regraph.nanovllm.install(nsa={"window": 512})     # layers that call self.attn(q, k, v, gate)

Each layer runs one step of a graph over nano-vllm's own caches and tables: new keys and values go
into their pages, then queries attend. With `nsa` that is examples/nsa_serve.json; what it
compresses stands in pages of its own, under the same table, a stride-th of the memory of keys and
values, which nano-vllm knows nothing of: leave that room (gpu_memory_utilization).

Prompts, prompts that begin as others did, and single tokens, captured in graphs too, take one way.

The engine goes one step ahead of the host, and its tokens stay on the device (nanovllm_ahead.py);
install(ahead=False) leaves it as it is.
"""

import json
import struct
import sys
import types
from pathlib import Path

import torch

from . import _lib
from .core import Plan, Session, Spec, example
from .errors import RegraphError
from .graph import Graph
from .programs import NAMES, room

_specs: dict = {}  # what it is made of → Spec
_sessions: dict = {}  # (Spec, device, capacities) → Session
_step: list = [None] * 3  # a context, the layer that met it first, what it comes to for all layers
PAGE = 256  # tokens, where there are no caches yet
NSA = ("kernel", "stride", "block", "top_n", "init", "local", "window")


def _full(**params):
    """Attention to all that is there, over pages."""
    g = Graph("paged", page=1, dtype="f32", **params)
    q = g.input("q", ["T", "H", "D"])
    k, v = (g.input(name, ["T", "KH", "D"]) for name in "kv")
    rows = {name: g.input(name, shape, "i32") for name, shape in
            (("lengths", ["B"]), ("context", ["B"]), ("pages", ["B", "M"]))}
    caches = [g.state(name, ["P", "page", "KH", "D"]) for name in ("k_cache", "v_cache")]
    starts, _, context, table, _ = g.paged_batch(rows=q, cache=caches[0], **rows)
    where = {"cu_seqlens": starts, "context": context, "pages": table}
    now = g.kv_append(k=k, v=v, k_cache=caches[0], v_cache=caches[1], **where)
    for cache, new in zip(caches, now):
        g.next(cache, new)
    g.output("o", g.paged_swa_attn(q=q, k_cache=now[0], v_cache=now[1], window_left=-1,
                                   scale="$scale", **where)[0])
    return g.document


def _nsa():
    """The example's step without the list of copies: nano-vllm never writes to a page of two."""
    document = json.loads(Path(example("nsa_serve.json")).read_text())
    fork = next(node for node in document["nodes"] if node["op"] == "page_copy")
    document["nodes"].remove(fork)
    del document["inputs"][fork["in"]["pages"]]
    found = dict(zip(fork["out"]["cache"], fork["in"]["cache"]))
    for node in document["nodes"]:
        node["in"] = {port: [found.get(name, name) for name in names] if isinstance(names, list)
                      else found.get(names, names) for port, names in node["in"].items()}
    return document


def _packed(document, width, columns):
    """The same with some inputs as columns of one, `packed`."""
    views = []
    for name, first, last in columns:
        row = document["inputs"].pop(name)["shape"][1:]
        row = [f"${n}" if isinstance(n, str) else n for n in row]
        views += [{"name": f"{name}_columns", "op": "slice", "in": {"x": "packed"},
                   "out": {"y": f"{name}_columns"},
                   "attrs": {"axis": 1, "start": first, "stop": last}},
                  {"name": f"{name}_rows", "op": "reshape", "in": {"x": f"{name}_columns"},
                   "out": {"y": name}, "attrs": {"shape": [0, *row]}}]
    document["inputs"]["packed"] = {"shape": ["T", width], "dtype": "$dtype"}
    document["nodes"] = views + document["nodes"]
    return document


def _columns(tensors):
    """(matrix, ((name, first column, the one behind the last), …)) where some are views of columns
    of one matrix, as q, k and v of one product are; else None."""
    views = {name: x for name, x in tensors.items() if not x.is_contiguous()}
    if not views:
        return None
    one = next(iter(views.values()))
    count, width = one.shape[0], one.stride(0)
    begin = one.storage_offset() // width * width
    columns = [(name, x.storage_offset() - begin, x.storage_offset() - begin + x[0].numel())
               for name, x in views.items()]
    if begin + count * width > one.untyped_storage().nbytes() // one.element_size():
        return None
    for x, (_, first, last) in zip(views.values(), columns):
        if x.stride(0) != width or not x[0].is_contiguous() or first < 0 or last > width or \
                x.dtype != one.dtype or x.untyped_storage().data_ptr() != \
                one.untyped_storage().data_ptr():
            return None
    return one.as_strided((count, width), (width, 1), begin), tuple(columns)


def _session(made_of, device, dims):
    if made_of not in _specs:
        settings = dict(made_of)
        nsa, packed = settings.pop("nsa"), settings.pop("packed")
        types_of = {name: settings.pop(name) for name in ("page", "dtype")}
        if nsa is None:
            document, params = _full(**settings), {}
        else:
            scale = settings.pop("scale")
            if abs(scale * settings["D"] ** 0.5 - 1) > 1e-6:
                raise RegraphError("RG_E_VALUE", f"nsa: scale {scale}; expected 1/√{settings['D']}")
            document = _nsa()
            params = {**settings, "DV": settings["D"], "kv": types_of["dtype"], **dict(nsa)}
        if packed:
            document = _packed(document, *packed)
        _specs[made_of] = Spec(document, **types_of, **params)
    key = made_of, device, tuple(dims.items())
    if key not in _sessions:
        plan = Plan(_specs[made_of], device=device, no_grad=True,
                    threads=torch.get_num_threads() if device == "cpu" else 0, **dims)
        _sessions[key] = Session(plan)
    return _sessions[key]


def _rows(tensor, count, value=0):
    """With so many rows, dense."""
    more = count - tensor.shape[0]
    if more:
        tensor = torch.nn.functional.pad(tensor, [0, 0] * (tensor.dim() - 1) + [0, more],
                                         value=value)
    return tensor.contiguous()


def _table(context, page):
    """Tables of a batch whose prompts have none: nano-vllm tells where each row goes."""
    starts = context.cu_seqlens_q[:-1, None].long()
    lengths = context.cu_seqlens_q.diff()[:, None]
    at = torch.arange(0, max(context.max_seqlen_q, 1), page, device=starts.device)[None, :]
    rows = (starts + at).clamp(max=len(context.slot_mapping) - 1)
    pages = torch.div(context.slot_mapping[rows], page, rounding_mode="floor")
    return torch.where(at < lengths, pages, -1)


class Attention(torch.nn.Module):
    """What nano-vllm's layers call: q [T, H, D], k and v [T, KH, D], with NSA a gate [T, H, 3]."""

    nsa: dict | None = None

    def __init__(self, num_heads, head_dim, scale, num_kv_heads, nsa=None):
        super().__init__()
        self.num_heads, self.head_dim, self.num_kv_heads = num_heads, head_dim, num_kv_heads
        self.scale = scale
        if isinstance(nsa, dict):
            self.nsa = nsa
        self.k_cache = self.v_cache = torch.tensor([])
        self._compressed = ()

    def _caches(self, k, pages):
        """(keys, values) of this step. Before nano-vllm has caches, it tries how much memory a step
        takes: over caches that are forgotten."""
        if self.k_cache.numel():
            return self.k_cache, self.v_cache
        return tuple(k.new_empty(pages, PAGE, *k.shape[1:]) for _ in range(2))

    def _numbers(self, context, rows):
        """({dimension: capacity}, {input: tensor}) of nano-vllm's context for a step of so many
        rows. All layers read the same: the first that a step comes to makes them. It comes to that
        layer anew where a context is run again, its numbers changed or a graph being captured."""
        if _step[0] is context and _step[1] is not self:
            return _step[2]
        if context.is_prefill:
            lengths, lived = context.cu_seqlens_q.diff(), context.cu_seqlens_k.diff()
        else:  # slots of a captured graph that are nobody's have no context
            lived = context.context_lens
            lengths = lived > 0
        table, pages = context.block_tables, len(self.k_cache)
        if not self.k_cache.numel():
            most = -(-max(context.max_seqlen_k, 1) // PAGE)
            table = torch.arange(len(lengths) * most, device=lengths.device).view(-1, most)
            pages = table.numel()
        elif table is None:
            table = _table(context, self.k_cache.shape[1])
        count, most = table.shape
        if context.is_prefill:
            rows, count, most = room(rows), room(count, 0), room(most, 0)
        more = most - table.shape[1]
        if more:
            table = torch.nn.functional.pad(table, (0, more), value=-1)
        given = {"lengths": _rows(lengths.to(torch.int32), count),
                 "context": _rows(lived.to(torch.int32), count),
                 "pages": _rows(table.to(torch.int32), count, -1)}
        _step[:] = context, self, ({"T": rows, "B": count, "M": most, "P": pages}, given)
        return _step[2]

    def _compressed_of(self, caches):
        stride = self.nsa.get("stride", 16)
        shape = (caches.shape[0], caches.shape[1] // stride, *caches.shape[2:])
        if not self._compressed or self._compressed[0].shape != shape:
            self._compressed = tuple(caches.new_zeros(shape) for _ in range(2))
        return self._compressed

    def forward(self, q, k, v, gate=None):
        """The layer's attention for the step that nano-vllm's context describes."""
        from nanovllm.utils.context import get_context

        context = get_context()
        q, k, v = (x.reshape(len(x), -1, self.head_dim) for x in (q, k, v))
        if (gate is None) != (self.nsa is None):
            raise RegraphError("RG_E_USAGE", "regraph.nanovllm: a gate [T, H, 3] goes with nsa, "
                                             "and with nothing else")
        dims, numbers = self._numbers(context, len(q))
        keys, values = self._caches(k, dims["P"])
        rows = dims["T"]
        o = q.new_empty(rows, *q.shape[1:])
        given = {"q": q, "k": k, "v": v}
        if self.nsa is not None:
            given["gate"] = gate.reshape(len(q), -1, 3)
        packed = _columns(given) if rows == len(q) else None
        if packed:
            given["packed"], packed = packed
        made_of = (("H", q.shape[1]), ("KH", k.shape[1]), ("D", self.head_dim),
                   ("page", keys.shape[1]), ("scale", float(self.scale)), ("dtype", NAMES[q.dtype]),
                   ("nsa", None if self.nsa is None else tuple(sorted(self.nsa.items()))),
                   ("packed", packed and (given["packed"].shape[1], packed)))
        session = _session(made_of, q.device.type, dims)
        views = {name for name, *_ in packed or ()}
        given = {name: x if name in views else _rows(x, rows) for name, x in given.items()}
        given.update(numbers, k_cache=keys, v_cache=values, o=o)
        if self.nsa is not None:
            given["k_cmp"], given["v_cmp"] = self._compressed_of(keys)
        sizes = session.plan.sizes
        block = torch.empty(sizes.saved + sizes.scratch + 512, dtype=torch.uint8, device=q.device)
        saved = -(-block.data_ptr() // 256) * 256
        pointers = [given[tensor.name].data_ptr() for tensor in session.plan.tensors]
        stream = torch.cuda.current_stream(q.device).cuda_stream if q.is_cuda else None
        session.run_on(False, struct.pack(f"={len(pointers)}Q", *pointers), saved,
                       saved + -(-sizes.saved // 256) * 256, stream)
        return o[:len(q)]


def install(nsa: dict | None = None, ahead: bool = True) -> None:
    """Makes nano-vllm's layers attend so; `nsa` sets some of kernel, stride, block, top_n, init,
    local, window. With `ahead` the engine's steps go one ahead of the host (nanovllm_ahead.py). To
    be called before nanovllm's models are imported."""
    if any(name.startswith("nanovllm.models") for name in sys.modules):
        raise RegraphError("RG_E_USAGE", "regraph.nanovllm.install comes before nanovllm's models "
                                         "are imported")
    for name in nsa or {}:
        if name not in NSA:
            raise RegraphError("RG_E_KEY", f"nsa: there is no '{name}'; expected some of "
                                           f"{', '.join(NSA)}")
    module = types.ModuleType("nanovllm.layers.attention", __doc__)
    module.Attention = type("Attention", (Attention,), {"nsa": nsa})
    sys.modules["nanovllm.layers.attention"] = module
    if ahead:
        from . import nanovllm_ahead

        nanovllm_ahead.install()
