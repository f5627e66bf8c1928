"""Tokens drawn from logits where they are: on the device, reading them once.

    tokens = regraph.draw.draw(logits, temperatures)       # [B, V], [B] → [B] int64

A token falls with the probability that softmax(logits / temperature) gives it. The words are cut
into parts of 128. Each part's largest logit and its sum of weights come from one pass over the
logits; a first random number of a row chooses a part by these sums, a second one of its words. No
number per word is drawn, and none is written. As the temperature goes to 0 it is the likeliest.
"""

import functools

import torch

PART = 128  # words: one pass over them stays in registers
COLDEST = 1e-10  # a lower temperature is taken for this one


def _weights(logits, most, temperatures):
    """exp((logits − most) / temperature) along the last axis; 0 where there is no logit above
    −inf."""
    most = most.clamp(min=torch.finfo(torch.float32).min)
    return ((logits - most.unsqueeze(-1)) / temperatures).exp()


def _parts(logits, temperatures):
    """(largest logit, sum of weights beside it) [B, parts] of each part."""
    more = -logits.shape[1] % PART
    if more:
        logits = torch.nn.functional.pad(logits, (0, more), value=-torch.inf)
    logits = logits.unflatten(1, (-1, PART)).float()
    most = logits.amax(-1)
    return most, _weights(logits, most, temperatures[:, None, None]).sum(-1)


def _first(weights, chance):
    """[B, 1] of each row: an index with the probability of its weight, by a number in [0, 1). Sums
    of weights need not grow where they run side by side: one of no weight never is it."""
    sums = weights.cumsum(-1).masked_fill(weights <= 0, -1)
    return (sums > chance * sums.amax(-1, keepdim=True)).int().argmax(-1, keepdim=True)


def _word(logits, temperatures, most, sums, chances):
    temperatures = temperatures[:, None]
    part = _first(sums * _weights(most, most.amax(-1), temperatures), chances[:, :1])
    word = part * PART + torch.arange(PART, device=logits.device)
    there = word < logits.shape[1]
    row = logits.gather(1, word.clamp(max=logits.shape[1] - 1)).float()
    row = row.masked_fill(~there, -torch.inf)
    weights = _weights(row, most.gather(1, part)[:, 0], temperatures)
    return (part * PART + _first(weights, chances[:, 1:])).clamp(max=logits.shape[1] - 1)[:, 0]


_compiled = functools.cache(torch.compile)


def draw(logits: torch.Tensor, temperatures: torch.Tensor,
         generator: torch.Generator | None = None) -> torch.Tensor:
    """A token of each row: [B] int64. On a GPU by what torch.compile makes of it."""
    parts, word = (_compiled(f) if logits.is_cuda else f for f in (_parts, _word))
    temperatures = temperatures.clamp(min=COLDEST)
    chances = torch.rand(len(logits), 2, device=logits.device, dtype=torch.float32,
                         generator=generator)
    return word(logits, temperatures, *parts(logits, temperatures), chances)
