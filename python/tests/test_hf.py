"""regraph.hf on the CPU: tiny models of transformers with random weights, beside their own eager
attention, and NSA beside a dense reference."""

import copy
import json
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.17")
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
import reference  # noqa: E402
from regraph import RegraphError, hf  # noqa: E402

transformers.logging.set_verbosity_error()
TINY = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": None}
CONFIGS = {  # experts: all of them, since a choice between near-equal ones differs with rounding
    "gpt_oss": lambda: transformers.GptOssConfig(
        **TINY, num_local_experts=2, num_experts_per_tok=2, sliding_window=12,
        layer_types=["sliding_attention", "full_attention"]),
    "llama": lambda: transformers.LlamaConfig(**TINY),
    "qwen3": lambda: transformers.Qwen3Config(**TINY, use_sliding_window=True, sliding_window=9,
                                              max_window_layers=1),
    "gemma2": lambda: transformers.Gemma2Config(
        **TINY, sliding_window=9, attn_logit_softcapping=2.0, query_pre_attn_scalar=16)}
THREE = ["gpt_oss", "llama", "qwen3"]
NSA = {"kernel": 8, "stride": 4, "block": 8, "top_n": 4, "window": 10}
LENGTHS = 40, 33, 15


def filled(model, seed=0):
    """Weights that make attention matter, and differ from head to head."""
    torch.manual_seed(seed)
    for value in model.parameters():
        torch.nn.init.normal_(value, std=0.2, mean=float(value.dim() == 1))
    return model


def pair(name, **config):
    """A model with eager attention, and the same with ours."""
    made = CONFIGS[name]()
    for key, value in config.items():
        setattr(made, key, value)
    eager = filled(transformers.AutoModelForCausalLM.from_config(made, attn_implementation="eager"))
    ours = copy.deepcopy(eager)
    ours.set_attn_implementation("regraph")
    return eager, ours


def batch(side, seed=0):
    """Ids, mask and labels. The first token of a sequence is no label: what stands before it, if
    anything, is padding, whose logits mean nothing."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 97, (3, 40), generator=g)
    if side is None:
        return {"input_ids": ids, "labels": ids}
    there = torch.zeros(3, 40, dtype=torch.long)
    for row, length in zip(there, LENGTHS):
        row[:length] = 1
    if side == "left":
        there = there.flip(1)
    first = there.cumsum(1) == 1
    return {"input_ids": ids, "attention_mask": there,
            "position_ids": (there.cumsum(1) - 1).clamp(min=0),
            "labels": ids.masked_fill((there == 0) | first, -100)}


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def close(ours, theirs, gate_o, gate_g, there=None):
    """Logits (of two outputs, where tokens are there) and gradients (of two models)."""
    (a, ours), (b, theirs) = ours, theirs
    there = slice(None) if there is None else there.bool()
    assert reference.rel_rms(a.logits[there], b.logits[there]) < gate_o
    got, expected = gradients(ours), gradients(theirs)
    assert got.keys() == expected.keys() and len(got) > 10
    for name in got:
        assert reference.rel_rms(got[name], expected[name]) < gate_g, name


def step(model, **inputs):
    out = model(**inputs)
    out.loss.backward()
    return out, model


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", CONFIGS)
def test_like_eager(name, side):
    eager, ours = pair(name)
    inputs = batch(side)
    close(step(ours, **inputs), step(eager, **inputs), 2e-6, 1e-5, inputs.get("attention_mask"))


@pytest.mark.parametrize("name", THREE)
def test_bf16(name):
    """Against eager in fp32: logits hardly further from it than eager in bf16 is, gradients within
    three times (vectors of a few elements may be lucky: those of a typical tensor count, too)."""
    models = pair(name)
    inputs, low = batch("left"), [model.bfloat16() for model in models]
    exact = copy.deepcopy(low[0]).float()
    runs = [step(model, **inputs) for model in (exact, *low)]
    there = inputs["attention_mask"].bool()
    errors = [[reference.rel_rms(out.logits[there], runs[0][0].logits[there]),
               *(reference.rel_rms(grad, gradients(exact)[name])
                 for name, grad in gradients(model).items())] for out, model in runs[1:]]
    (eager_o, *eager), (own_o, *own) = errors
    typical = sorted(eager)[len(eager) // 2]
    assert len(eager) == len(own) > 10 and typical < 0.05 and own_o < 1.2 * eager_o
    assert all(g < 3 * max(theirs, typical) for theirs, g in zip(eager, own)), errors
    assert sorted(own)[len(own) // 2] < 1.2 * typical


@pytest.mark.parametrize("sinks", [False, True])
def test_attention_bf16(sinks):
    """The function that is registered, alone, within the gates of bf16."""
    torch.manual_seed(0)
    layer = torch.nn.Module()
    layer.num_key_value_groups, layer.sinks = 2, torch.nn.Parameter(torch.randn(4))
    x = [torch.randn(2, heads, 50, 32).bfloat16() for heads in (4, 2, 2)]
    wide = [t.float().requires_grad_() for t in x]
    x = [t.requires_grad_() for t in x]
    i = torch.arange(50)
    seen = (i[:, None] >= i) & (i[:, None] - i < 17)
    blind = torch.zeros(50, 50).masked_fill(~seen, -torch.inf)[None, None]
    eager = (transformers.models.gpt_oss if sinks else transformers.models.llama)
    eager = (eager.modeling_gpt_oss if sinks else eager.modeling_llama).eager_attention_forward
    o, _ = hf.attention(layer, *x, None, scaling=0.2, sliding_window=17,
                        s_aux=layer.sinks if sinks else None)
    expected, _ = eager(layer, *wide, blind, scaling=0.2)
    d_o = torch.randn(expected.shape).bfloat16()
    assert reference.rel_rms(o, expected) < 4e-3
    own, theirs = [*x], [*wide]
    if sinks:
        own.append(layer.sinks)
        theirs.append(layer.sinks)
    for got, want in zip(torch.autograd.grad(o, own, d_o),
                         torch.autograd.grad(expected, theirs, d_o.float())):
        assert reference.rel_rms(got, want) < 6e-3


@pytest.mark.parametrize("said", ["cu_seq_lens", "copies", "position_ids"])
@pytest.mark.parametrize("name", THREE)
def test_packed(name, said):
    """Sequences in one row, each as if alone: lengths as the collator for flash attention says them
    (which on their way may become two tensors), or positions that start anew."""
    eager, ours = pair(name)
    ids, lengths = batch(None)["input_ids"][:1], [17, 1, 22]
    starts = torch.tensor([0, 17, 18, 40], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = {"position_ids": positions}
    if said != "position_ids":
        packed.update(cu_seq_lens_q=starts, max_length_q=22, max_length_k=22,
                      cu_seq_lens_k=starts.clone() if said == "copies" else starts)
    out = ours(input_ids=ids, **packed)
    out.logits.square().sum().backward()
    parts = [eager(input_ids=part).logits for part in ids.split(lengths, 1)]
    expected = transformers.modeling_outputs.CausalLMOutput(logits=torch.cat(parts, 1))
    expected.logits.square().sum().backward()
    close((out, ours), (expected, eager), 2e-6, 1e-5)


@pytest.mark.parametrize("name", THREE)
def test_training(name):
    """Fifty steps, losses side by side."""
    losses = []
    for model in pair(name):
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        losses.append([])
        for i in range(50):
            out, _ = step(model, **batch(("left", "right", None)[i % 3], seed=i % 6))
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(out.loss.item())
    eager, ours = losses
    assert max(abs(a - b) for a, b in zip(eager, ours)) < 1e-3
    assert ours[-1] < 0.8 * ours[0]


def same_tokens(ours, theirs, **generate):
    """Do two models say the same, token by token, up to where the other's two best are as good?"""
    said = [model.generate(**generate, max_new_tokens=30, do_sample=False, output_logits=True,
                           return_dict_in_generate=True, disable_compile=True)
            for model in (ours, theirs)]
    new = [out.sequences[:, -30:] for out in said]
    best = torch.stack(said[1].logits, 1).topk(2).values
    clear = (best[..., 0] - best[..., 1] > 1e-4).cumprod(1).bool()
    assert clear.float().mean() > 0.75
    assert torch.equal(new[0][clear], new[1][clear])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", CONFIGS)
def test_generation(name, cache):
    """Prompts of several lengths, padded left, and longer answers than the windows."""
    eager, ours = pair(name)
    ids = batch(None)["input_ids"][:, :14]
    there = torch.ones_like(ids)
    there[1, :4] = there[2, :13] = 0
    same_tokens(ours, eager, input_ids=ids, attention_mask=there, cache_implementation=cache)


def test_modes():
    """torch.inference_mode, whose tensors count no changes, and autocast, as near as bf16 is."""
    eager, ours = pair("gpt_oss")
    with torch.inference_mode():
        inputs = {name: tensor.clone() for name, tensor in batch("left").items()}
        there = inputs["attention_mask"].bool()
        assert reference.rel_rms(ours(**inputs).logits[there], eager(**inputs).logits[there]) < 2e-6
    with torch.autocast("cpu", torch.bfloat16):
        close(step(ours, **batch(None)), step(eager, **batch(None)), 0.02, 0.1)


def test_checkpointing():
    """Activation checkpointing runs attention again."""
    eager, ours = pair("gpt_oss")
    ours.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = batch("right")
    close(step(ours.train(), **inputs), step(eager.train(), **inputs), 2e-6, 1e-5,
          inputs["attention_mask"])


def test_compiled():
    """With lengths given, one graph; it makes the program if it is the first to want it."""
    def run(q, k, v, starts):
        return hf.attention(torch.nn.Module(), q, k, v, None, scaling=0.21, sliding_window=5,
                            cu_seq_lens_q=starts, cu_seq_lens_k=starts)[0]

    x = [torch.randn(1, heads, 40, 16, requires_grad=True) for heads in (4, 2, 2)]
    starts = torch.tensor([0, 23, 40], dtype=torch.int32)
    o = torch.compile(run, fullgraph=True, backend="aot_eager")(*x, starts)
    expected, d_o = run(*x, starts), torch.randn(o.shape)
    assert torch.equal(o, expected)
    for got, want in zip(torch.autograd.grad(o, x, d_o), torch.autograd.grad(expected, x, d_o)):
        assert torch.equal(got, want)


# ---- continuous batching ----


def batched(model, prompts, **options):
    """What each prompt is told: two times, by a fork, in steps of 32 rows and pages of 16."""
    size = "page_size" if hasattr(transformers.ContinuousBatchingConfig, "page_size") \
        else "block_size"
    config = transformers.ContinuousBatchingConfig(
        **{size: 16}, num_blocks=60, max_batch_tokens=32, max_requests_per_batch=4, **options)
    drawn = transformers.GenerationConfig(max_new_tokens=9, do_sample=True, top_k=1,
                                          num_return_sequences=2, eos_token_id=-1, pad_token_id=0)
    out = model.generate_batch(inputs=prompts, generation_config=drawn,
                               continuous_batching_config=config, progress_bar=False)
    assert len(out) in (len(prompts), 2 * len(prompts))  # 5.17 does not return the forks
    return [(list(one.prompt_ids), list(one.generated_tokens)) for one in out.values()]


def said_by(model, prompt, tokens):
    """All of it at once: the tokens are the likeliest, wherever the next is not as likely."""
    ids = torch.tensor([prompt + tokens])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(prompt) - 1:-1]
    best = logits.topk(2)
    sure = best.values[:, 0] - best.values[:, 1] > 1e-4
    return sure.sum() > len(tokens) / 2 and \
        torch.equal(best.indices[sure, 0], torch.tensor(tokens)[sure])


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt_oss", "nsa"])
def test_continuous_batching(name, share, monkeypatch):
    """Prompts in pieces, shared beginnings, forks: each token is that of a full recomputation."""
    from transformers.generation.continuous_batching.cache import PagedAttentionCache as Cache
    found, copied = [], []
    name_of = "perform_cache_copy" if hasattr(Cache, "perform_cache_copy") else "copy_cache"
    search, copy_pages = Cache.search_prefix_match, getattr(Cache, name_of)

    def searched(self, *args, **kwargs):
        found.append(search(self, *args, **kwargs))
        return found[-1]

    def copies(self, *args, **kwargs):
        copied.append(args)
        return copy_pages(self, *args, **kwargs)

    monkeypatch.setattr(Cache, "search_prefix_match", searched)
    monkeypatch.setattr(Cache, name_of, copies)
    theirs, ours = (nsa_model("Llama"),) * 2 if name == "nsa" else pair(name)
    g = torch.Generator().manual_seed(4)
    prompts = [torch.randint(3, 97, (n,), generator=g).tolist() for n in (3, 70, 17, 41)]
    prompts += [prompts[1][:40] + [5, 6, 7], prompts[1][:66]]
    for prompt, tokens in batched(ours, prompts, allow_block_sharing=share):
        assert prompt in prompts and said_by(theirs, prompt, tokens)
    assert copied
    assert any(found) == (share and name != "gpt_oss"), found  # which has windows


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", ["llama", "nsa"])
def test_continuous_batching_to_the_bit(name, share, monkeypatch):
    """With products whose bits don't hang on the number of rows (and relu, since torch's exp has
    other bits at the end of a block) every token is the likeliest of a full recomputation, even of
    words in pairs that differ in last bits."""
    def linear(x, weight, bias=None):
        y = (x.unsqueeze(-2) * weight).sum(-1)
        return y if bias is None else y + bias

    model = nsa_model("Llama") if name == "nsa" else pair(name)[1]
    with torch.no_grad():
        words = model.lm_head.weight
        words[1::2] = words[:-1:2]
        words[1::2, ::2] = torch.nextafter(words[1::2, ::2], torch.tensor(9.0))
        words[1::2, 1::2] = torch.nextafter(words[1::2, 1::2], torch.tensor(-9.0))
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.ReLU()
    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    g = torch.Generator().manual_seed(4)
    prompts = [torch.randint(3, 97, (n,), generator=g).tolist() for n in (3, 70, 17, 41)]
    prompts.append(prompts[1][:66])
    close = 0
    for prompt, tokens in batched(copy.deepcopy(model), prompts, allow_block_sharing=share):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1:-1]
        best = logits.topk(2).values
        assert torch.equal(logits[range(len(tokens)), tokens], best[:, 0])
        close += int(((best[:, 0] > best[:, 1]) & (best[:, 0] - best[:, 1] < 1e-5)).sum())
    assert close > 30


def test_refused():
    eager, ours = pair("llama")
    ids = batch(None)["input_ids"]
    with pytest.raises(RegraphError, match="a mask of 4 axes"):
        ours(input_ids=ids, attention_mask=torch.zeros(3, 1, 40, 40))
    with pytest.raises(RegraphError, match="max_blocks_per_request"):
        ours(input_ids=ids, block_table=ids)
    with pytest.raises(RegraphError, match="is for continuous batching"):
        hf.paged_attention(None, None, None, None, None)
    _, noisy = pair("llama", attention_dropout=0.5)
    with pytest.raises(RegraphError, match="no dropout"):
        noisy.train()(input_ids=ids)
    _, both_ways = pair("llama", is_causal=False)
    with pytest.raises(RegraphError, match="bidirectional_mask_function are not served"):
        both_ways(input_ids=ids)
    chunked = transformers.masking_utils.create_chunked_causal_mask
    ours.config.attention_chunk_size = 8
    with pytest.raises(RegraphError, match="chunked_overlay are not served"):
        chunked(ours.config, torch.zeros(1, 20, 4), None, None)


# ---- NSA ----


def nsa_model(base="Qwen3", **settings):
    config = getattr(hf, f"Nsa{base}Config")(**TINY, nsa={**NSA, **settings})
    return filled(transformers.AutoModelForCausalLM.from_config(config))


def dense_nsa(model, idx_of):
    """The model's attention in plain torch, with the blocks that `idx_of` says."""
    p = {**NSA, "window": NSA["window"]}

    def compressed(linear):
        def run(x, kernel, stride, storage):
            if x.shape[0] < kernel:
                return x[:0]
            blocks = x.unfold(0, kernel, stride)  # [n, KH, d, kernel]
            return linear(blocks.transpose(2, 3).flatten(2)) if linear else blocks.mean(-1)
        return run

    def attend(layer, query, key, value, mask, regraph_gate=None, **_):
        o = []
        for b in range(query.shape[0]):
            q, k, v = (t[b].transpose(0, 1) for t in (query, key, value))
            weights = iter((getattr(layer, "nsa_k_compress", None),
                            getattr(layer, "nsa_v_compress", None)))
            reference.compress = lambda *args: compressed(next(weights))(*args)
            o.append(reference.sequence(q, k, v, regraph_gate[b], idx_of(layer, b), p, None))
        return torch.stack(o), None

    return attend


@pytest.mark.parametrize("base, k_method, v_method",
                         [("Llama", "mean", "mean"), ("Qwen3", "linear", "linear")])
def test_nsa_like_reference(base, k_method, v_method, monkeypatch):
    """Logits and gradients of NSA models, against attention with dense masks in plain torch: all
    blocks are selected, which leaves the choice out of it."""
    model = nsa_model(base, k_method=k_method, v_method=v_method, top_n=5)
    twin = copy.deepcopy(model)
    inputs = batch(None)
    everything = torch.arange(5)[None, None].expand(40, 2, 5)
    here = step(model, **inputs)
    monkeypatch.setattr(reference, "compress", reference.compress)
    own = dense_nsa(twin, lambda layer, b: everything)
    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "regraph", own)
    close(here, step(twin, **inputs), 2e-6, 2e-5)


@pytest.mark.parametrize("method", ["mean", "linear", "swiglu", "sigmoid_mul"])
def test_nsa_padded(method):
    """A batch padded left or right is its sequences, each alone; under any policy. (Keys that are
    compressed are rotated, so with learned compression positions must be those of the sequence.)"""
    model = nsa_model(k_method=method, v_method=method)
    again = nsa_model(k_method=method, v_method=method, policy="all")
    inputs = batch("left")
    close(step(model, **inputs), step(again, **inputs), 1e-12, 1e-12)
    right = model(**batch("right")).logits
    left = model(**inputs).logits
    for b, length in enumerate(LENGTHS):
        ids = inputs["input_ids"][b: b + 1]
        ends = model(input_ids=ids[:, -length:]).logits[0]
        begins = model(input_ids=ids[:, :length]).logits[0]
        assert reference.rel_rms(left[b, -length:], ends) < 2e-6
        assert reference.rel_rms(right[b, :length], begins) < 2e-6


@pytest.mark.parametrize("base", ["Llama", "Qwen3"])
def test_nsa_generation(base):
    """With a cache as without one."""
    model = nsa_model(base, v_method="sigmoid_mul")
    ids = batch(None)["input_ids"][:, :30]
    there = torch.ones_like(ids)
    there[1, :11] = 0
    uncached = copy.deepcopy(model)
    uncached.generation_config.use_cache = False
    same_tokens(model, uncached, input_ids=ids, attention_mask=there)


def test_nsa_training():
    model = nsa_model(k_method="linear")
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for i in range(30):
        out, _ = step(model, **batch("left", seed=i % 2))
        assert all(grad.norm() > 0 for name, grad in gradients(model).items() if "nsa_" in name)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("base", ["Llama", "Qwen3"])
def test_nsa_checkpoints(base, tmp_path):
    """Saved and loaded: the same bits. A dense checkpoint lacks what NSA adds, and no more."""
    inputs = batch(None)
    model = nsa_model(base, k_method="linear", policy={"regraph_policy": 1, "preset": "all"})
    model.save_pretrained(tmp_path / "nsa")
    assert json.loads((tmp_path / "nsa/config.json").read_text())["nsa"]["k_method"] == "linear"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "nsa")
    assert type(loaded) is type(model) and loaded.config.nsa == model.config.nsa
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert torch.isfinite(transformers.AutoModel.from_pretrained(tmp_path / "nsa")(
        input_ids=inputs["input_ids"]).last_hidden_state).all()
    dense = filled(transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, f"{base}Config")(**TINY)))
    dense.save_pretrained(tmp_path / "dense")
    config = type(model.config).from_pretrained(tmp_path / "dense", nsa={"k_method": "linear"})
    assert config.nsa == {**hf.NSA, "k_method": "linear"}
    grown, said = type(model).from_pretrained(tmp_path / "dense", output_loading_info=True,
                                              config=config)
    assert all(".nsa_" in name for name in said["missing_keys"]) and said["missing_keys"]
    assert not said["unexpected_keys"]
    assert torch.equal(grown.lm_head.weight, dense.lm_head.weight)
    assert torch.isfinite(grown(**inputs).loss)


def test_nsa_mistakes():
    with pytest.raises(RegraphError, match="there is no 'kernal'; expected some of kernel"):
        nsa_model(kernal=8)
    with pytest.raises(RegraphError, match="there is no 'kernal'"):
        hf.NsaLlamaConfig(**TINY, nsa=NSA).nsa = {"kernal": 8}
    with pytest.raises(RegraphError, match="attends by NSA alone"):
        transformers.AutoModelForCausalLM.from_config(hf.NsaLlamaConfig(**TINY, nsa=NSA),
                                                      attn_implementation="eager")
