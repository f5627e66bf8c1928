"""docs/migrate.md: its module takes flash_nsa's config, inputs and weights; beside dense masks."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "python"), str(Path(__file__).resolve().parent)]
import reference  # noqa: E402

PAGE = ROOT / "docs" / "migrate.md"
CONFIG = dict(num_heads=4, num_kv_heads=2, head_dim=16, qk_head_dim=None, v_head_dim=None,
              kernel_size=16, stride=8, cmp_k_method="mean", cmp_v_method="mean", block_size=16,
              top_n=5, num_init_blocks=1, num_local_blocks=2, window_size=20, recompute_swa_o=False,
              recompute_slc_o=False, recompute_cmp_kv=False, recompute_cmp_o=False, cp_mode=1,
              kv_head_stride=1, use_overlap_swa=False)
P = {"kernel": 16, "stride": 8, "block": 16, "window": 20}
LEARNED = {"linear": lambda x: x,
           "swiglu": lambda x: torch.nn.functional.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
           "sigmoid-mul": lambda x: x.chunk(2, -1)[0].sigmoid() * x.chunk(2, -1)[1]}


def core(**config):
    """The page's module."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names = {}
    exec(blocks[0], names)
    return names["NSACore"](SimpleNamespace(**{**CONFIG, **config}))


def compressed(weights):
    """reference.compress by methods and weights, of keys and values in turns."""
    turns = iter(weights * 99)

    def compress(x, kernel, stride, storage):
        method, weight = next(turns)
        if method == "mean":
            return x.unfold(0, kernel, stride).mean(-1) if len(x) >= kernel else x[:0]
        blocks = x.unfold(0, kernel, stride).transpose(2, 3).flatten(2)
        return LEARNED[method](blocks @ weight.double().t())
    return compress


@pytest.mark.parametrize("k_method, v_method", [("mean", "mean"), ("linear", "sigmoid-mul"),
                                                ("swiglu", "mean")])
def test_like_reference(k_method, v_method, monkeypatch):
    torch.manual_seed(0)
    nsa = core(cmp_k_method=k_method, cmp_v_method=v_method)
    weights = dict(nsa.named_parameters())
    assert set(weights) == {f"module.cmp_{name}_weight" for name, method in
                            (("k", k_method), ("v", v_method)) if method != "mean"}
    x = [torch.randn(131, *shape).requires_grad_() for shape in ((4, 16), (2, 16), (2, 16), (4, 3))]
    cu_seqlens = torch.tensor([0, 75, 131], dtype=torch.int32)  # no more blocks than are kept
    o = nsa(*x, cu_seqlens)
    own = [weights.get(f"module.cmp_{name}_weight") for name in "kv"]
    monkeypatch.setattr(reference, "compress", compressed([*zip((k_method, v_method), own)]))
    wide = [t.detach().double().requires_grad_() for t in x]
    every = torch.arange(5).expand(131, 2, 5)
    expected = reference.nsa(*wide, every, cu_seqlens, P, None)
    assert reference.rel_rms(o, expected) < 2e-6
    d_o = torch.randn(o.shape)
    learned = [weight for weight in own if weight is not None]
    for got, want in zip(torch.autograd.grad(o, [*x, *learned], d_o),
                         torch.autograd.grad(expected, [*wide, *learned], d_o.double())):
        assert reference.rel_rms(got, want) < 5e-6


def test_recompute():
    """What the config says is computed again is not kept, and changes no bit."""
    torch.manual_seed(0)
    x = [torch.randn(64, *shape).requires_grad_() for shape in ((4, 16), (2, 16), (2, 16), (4, 3))]
    cu_seqlens = torch.tensor([0, 64], dtype=torch.int32)
    kept, again = core(), core(recompute_cmp_kv=True, recompute_cmp_o=True, recompute_slc_o=True,
                               recompute_swa_o=True)
    o = kept(*x, cu_seqlens)
    assert torch.equal(o, again(*x, cu_seqlens, cp_mode=1))
    with pytest.raises(ValueError, match="another cp_mode"):
        again(*x, cu_seqlens, cp_mode=2)
    for a, b in zip(torch.autograd.grad(o.sum(), x),
                    torch.autograd.grad(again(*x, cu_seqlens).sum(), x)):
        assert torch.equal(a, b)
    saved = [nsa.module.attention.plan(*x, cu_seqlens).sizes.saved for nsa in (again, kept)]
    assert saved[0] < saved[1] / 2
