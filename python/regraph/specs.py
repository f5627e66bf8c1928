"""Specs that adapters of model libraries run, and their programs, each made once:
`program("window", …)` and `program("nsa", …)`. The functions of these names make the specs."""

import json

import torch

from .core import read_policy
from .errors import RegraphError
from .graph import Graph
from .torch import attention

# What adapters let models say of Native Sparse Attention, with defaults.
NSA = {"kernel": 32, "stride": 16, "block": 64, "top_n": 16, "init": 1, "local": 2, "window": 512,
       "k_method": "mean", "v_method": "mean", "policy": None}

_made: dict = {}  # (function, its arguments) → program


@torch.compiler.assume_constant_result
def _make(function, settings, options):
    """Sees to it that the program is made: in the midst of a trace, too, which goes on with it."""
    if (function, settings, options) not in _made:
        document = globals()[function](**dict(settings))
        _made[function, settings, options] = attention(document, **dict(options))
    return True


def program(function, options=(), **settings):
    """What attention makes, once, of a spec by these settings; `options` are pairs."""
    settings = tuple(settings.items())
    _make(function, settings, options)
    return _made[function, settings, options]


def nsa_settings(given):
    """NSA, changed as `given` says."""
    for name in given or {}:
        if name not in NSA:
            raise RegraphError("RG_E_KEY", f"nsa: there is no '{name}'; expected some of "
                                           f"{', '.join(NSA)}")
    return {**NSA, **(given or {})}


def nsa_program(settings, crossed=False, options=(), **shapes):
    """The program of `nsa` by these settings, their policy among them unless `options` say one."""
    settings = dict(settings)
    policy = settings.pop("policy")
    options = tuple((name, json.dumps(value) if isinstance(value, dict) else value)
                    for name, value in options or (("policy", policy),))
    return program("nsa", options, crossed=crossed, **settings, **shapes)


def policy_document(policy):
    """Of a policy as adapters take it, the document, without its version where it is a word."""
    if policy is None:
        return {}
    text = read_policy(policy)[0]
    if text.lstrip().startswith("{"):
        return json.loads(text)
    return {"preset" if text in ("none", "all") else "budget": text}


def _inputs(crossed, **params):
    """A graph with queries, keys, values and lengths; `crossed`: keys are others than the queries'
    own. Returns it, the tensors, and what attention's ports beside them are bound to."""
    g = Graph("attention_of_caches" if crossed else "attention", **params)
    q = g.input("q", ["T", "H", "D"], grad=True)
    rows = "S" if crossed else "T"
    k = g.input("k", [rows, "KH", "D"], grad=True)
    v = g.input("v", [rows, "KH", "DV"], grad=True)
    lengths = {"cu_seqlens": g.input("cu_seqlens", ["B+1"], "i32")}
    if crossed:
        lengths["cu_seqlens_k"] = g.input("cu_seqlens_k", ["B+1"], "i32")
        lengths["q_offset"] = g.input("q_offset", ["B"], "i32")
    return g, (q, k, v), lengths


def window(crossed, sinks, lse=False, **params):
    """Attention over a window, or over everything before (-1); parameters H, KH, D, DV, window,
    scale, softcap. `lse`: with the logarithms of the sums for an output, which has a gradient."""
    g, tensors, ports = _inputs(crossed, **params)
    if sinks:
        ports["sinks"] = g.input("sinks", ["H"], "$sinks_dtype", grad=True)
        g.document["params"]["sinks_dtype"] = "f32"
    o, sums = g.swa_attn(*tensors, window_left="$window", scale="$scale", softcap="$softcap",
                         **ports)
    g.output("o", o)
    if lse:
        g.output("lse", sums)
    g.document["params"]["dtype"] = "f32"
    return g.document


def nsa(crossed, k_method, v_method, **params):
    """Native Sparse Attention: examples/nsa.json, with weights of compression, and for caches;
    parameters H, KH, D, DV, scale and those of the example."""
    g, (q, k, v), ports = _inputs(crossed, **params)
    g.document["params"]["dtype"] = "f32"
    gate = g.input("gate", ["T", "H", 3], grad=True)
    weights = {}
    for name, method, width in (("k_weight", k_method, "D"), ("v_weight", v_method, "DV")):
        if method != "mean":
            rows = width if method == "linear" else f"2*{width}"
            weights[name] = g.input(name, [rows, f"kernel*{width}"], grad=True)
    blocks = {"kernel": "$kernel", "stride": "$stride"}
    logits = {"scale": "$scale", **ports}
    ck, cv = g.compress_kv(k, v, cu_seqlens=ports.get("cu_seqlens_k", ports["cu_seqlens"]),
                           k_method=k_method, v_method=v_method, **weights, **blocks)
    cmp, lse = g.cmp_attn(q, ck, cv, name="cmp_o", **blocks, **logits)
    idx = g.topk(q, ck, lse=lse, block="$block", top_n="$top_n", init="$init", local="$local",
                 **blocks, **logits)
    slc, _ = g.slc_attn(q, k, v, idx, name="slc_o", block="$block", **logits)
    swa, _ = g.swa_attn(q, k, v, name="swa_o", window_left="$window", **logits)
    g.output("o", g.combine([cmp, slc, swa], gate, cu_seqlens=ports["cu_seqlens"]))
    return g.document
