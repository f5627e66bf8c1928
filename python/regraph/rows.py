"""Rows of a batch that ranks share: which are whose, taken out, put together, brought over from
another layout. For context parallelism from PyTorch (docs/cp.md); regraph.torch has the names."""

import functools
from typing import Sequence

import numpy as np
import torch

from . import core
from .errors import RegraphError
from .programs import room


def cp_capacity(tokens: int, cp, multiple: int = 64) -> int:
    """The rows that a batch of so many tokens is given where ranks share them: at most an eighth
    more, then as many as make each rank's two chunks multiples of `multiple`, which the spec's
    stride divides."""
    if tokens < 0 or multiple < 1:
        raise RegraphError("RG_E_VALUE", f"cp_capacity: {tokens} tokens, multiples of {multiple}; "
                                         "expected 0 or more, and 1 or more")
    unit = 2 * _group_of(cp).size() * multiple
    return -(-room(tokens) // unit) * unit


def _group_of(cp):
    from . import ranks  # imports torch.distributed

    return ranks.group_of(cp)


def _listed(cu_seqlens):
    starts = cu_seqlens.tolist() if isinstance(cu_seqlens, torch.Tensor) else list(cu_seqlens)
    if not starts:
        raise RegraphError("RG_E_SHAPE", "cu_seqlens is empty; expected where each sequence starts "
                                         "and where the last one ends")
    return starts


def cp_shard(tensors, cu_seqlens: torch.Tensor | Sequence[int], cp, *, mode: str | int = "auto",
             capacity: int | None = None):
    """This rank's rows of tensors [T, …] that all ranks have: a tensor, or a list of them. Rows
    past T, up to the capacity (`cp_capacity`), are zeros. `mode` is the policy's; "auto" looks at
    cu_seqlens, which is best on the host then. Gradients go back to the rows they came from."""
    group, single = _group_of(cp), isinstance(tensors, torch.Tensor)
    whole, starts = [tensors] if single else list(tensors), _listed(cu_seqlens)
    counts = sorted({len(tensor) for tensor in whole})
    if len(counts) > 1:
        raise RegraphError("RG_E_SHAPE", f"cp_shard: tensors of {counts[0]} and of {counts[-1]} "
                                         "tokens; expected as many in each")
    tokens = counts[0] if counts else 0
    if starts[-1] > tokens and whole:
        raise RegraphError("RG_E_DATA", f"cp_shard: the last sequence ends at {starts[-1]}; "
                                        f"expected at most {tokens}, the tokens there are")
    capacity = capacity or cp_capacity(tokens, cp)
    if tokens > capacity:
        raise RegraphError("RG_E_SHAPE", f"cp_shard: {tokens} tokens; expected at most {capacity}, "
                                         "the capacity")
    own = core.cp_rows(starts, capacity, group.size(), group.rank(), mode)
    parts = []
    for tensor in whole:
        pieces = []
        for rows in own:
            piece = tensor[rows]
            rest = capacity // (2 * group.size()) - len(piece)
            pieces += [piece, tensor.new_zeros(rest, *tensor.shape[1:])] if rest else [piece]
        parts.append(torch.cat(pieces))
    return parts[0] if single else parts


@torch.no_grad()
def cp_unshard(tensors, cu_seqlens: torch.Tensor | Sequence[int], cp, *, mode: str | int = "auto",
               tokens: int | None = None):
    """The reverse of `cp_shard`, on every rank: the whole batch's rows, of which the first `tokens`
    (without it, all of the capacity). To look at: a loss is taken of each rank's own rows."""
    group, single = _group_of(cp), isinstance(tensors, torch.Tensor)
    starts, whole = _listed(cu_seqlens), []
    for tensor in [tensors] if single else tensors:
        capacity = group.size() * len(tensor)
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format)
                 for _ in range(group.size())]
        torch.distributed.all_gather(parts, tensor.contiguous(), group=group)
        made = tensor.new_empty(capacity, *tensor.shape[1:])
        for rank, part in enumerate(parts):
            own = core.cp_rows(starts, capacity, group.size(), rank, mode)
            for rows, piece in zip(own, part.chunk(2)):
                made[rows] = piece
        whole.append(made[:tokens])
    return whole[0] if single else whole


# ---- documents in TransformerEngine's layout ----


class _Exchange(torch.autograd.Function):
    """Rows `gives` of a tensor to other ranks, as many to each as `sent` says; what comes becomes
    rows `takes` of `count`, the others zeros. A gradient goes the other way."""

    @staticmethod
    def forward(ctx, tensor, table, group):
        ctx.table, ctx.group, ctx.count = table, group, len(tensor)
        return _exchange(tensor, *table, group)

    @staticmethod
    def backward(ctx, grad):
        gives, takes, _, sent, received = ctx.table
        return _exchange(grad, takes, gives, ctx.count, received, sent, ctx.group), None, None


def _exchange(tensor, gives, takes, count, sent, received, group):
    gives, takes = (torch.from_numpy(rows).to(tensor.device) for rows in (gives, takes))
    mine = tensor.index_select(0, gives)
    theirs = tensor.new_empty(sum(received), *tensor.shape[1:])
    torch.distributed.all_to_all_single(theirs, mine, received, sent, group=group)
    return tensor.new_zeros(count, *tensor.shape[1:]).index_copy_(0, takes, theirs)


@functools.lru_cache(64)
def _table(starts, capacity, ranks, rank, mode):
    """How rows of documents become ours: gives, takes, count, sent, received, as above."""
    owner, place = np.empty(capacity, np.int64), np.empty(capacity, np.int64)
    for other in range(ranks):
        at = 0
        for rows in core.cp_rows(starts, capacity, ranks, other, mode):
            n = rows.stop - rows.start
            owner[rows], place[rows] = other, np.arange(at, at + n)
            at += n
    theirs = [core.cp_document_rows(starts, ranks, other) for other in range(ranks)]
    mine = owner[theirs[rank]]
    takes = [place[rows[owner[rows] == rank]] for rows in theirs]
    return (np.argsort(mine, kind="stable"), np.concatenate(takes), capacity // ranks,
            np.bincount(mine, minlength=ranks).tolist(), [len(rows) for rows in takes])


def _over(tensors, cu_seqlens, cp, mode, capacity, back):
    group, single = _group_of(cp), isinstance(tensors, torch.Tensor)
    starts = tuple(_listed(cu_seqlens))
    capacity = capacity or cp_capacity(starts[-1], cp)
    table = gives, takes, count, sent, received = _table(starts, capacity, group.size(),
                                                         group.rank(), mode)
    expected, made = len(gives), []
    if back:
        table, expected = (takes, gives, len(gives), received, sent), count
    for tensor in [tensors] if single else tensors:
        if len(tensor) != expected:
            raise RegraphError("RG_E_SHAPE", f"{len(tensor)} rows on rank {group.rank()}; expected "
                                             f"{expected}, this rank's of {starts[-1]}")
        made.append(_Exchange.apply(tensor, table, group))
    return made[0] if single else made


def cp_from_documents(tensors, cu_seqlens: torch.Tensor | Sequence[int], cp, *,
                      mode: str | int = "auto", capacity: int | None = None):
    """This rank's rows of tensors, a tensor or a list of them, that hold its rows in the layout of
    TransformerEngine and Megatron (`regraph.cp_document_rows`): rows move between ranks, by the
    group's all-to-all, and gradients back. cu_seqlens counts the documents with their padding, to a
    multiple of 2·ranks; it is read on the host. Of the other arguments `cp_shard` tells."""
    return _over(tensors, cu_seqlens, cp, mode, capacity, back=False)


def cp_to_documents(tensors, cu_seqlens: torch.Tensor | Sequence[int], cp, *,
                    mode: str | int = "auto", capacity: int | None = None):
    """The reverse of `cp_from_documents`, for results; differentiable, too."""
    return _over(tensors, cu_seqlens, cp, mode, capacity, back=True)
