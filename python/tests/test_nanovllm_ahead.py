"""Steps one ahead of the host, on the CPU: an engine with nano-vllm's parts, whose next token hangs
on all tokens that its cache holds under the sequence's table, gives the same sequences step by
step and one ahead: ends found late, pages that run out, pages found again, prompts in pieces. And
draw(), on the CPU or where REGRAPH_TEST_DEVICE says: its distribution is softmax's."""

import os
import sys
import types
from collections import deque
from enum import Enum
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from regraph import nanovllm_ahead  # noqa: E402
from regraph.draw import draw  # noqa: E402

V, PAGE, END = 29, 4, 5
DEVICE = os.environ.get("REGRAPH_TEST_DEVICE", "cpu")


class Status(Enum):
    WAITING, RUNNING, FINISHED = range(3)


class Sequence:
    def __init__(self, number, tokens, most, ignore_eos):
        self.seq_id, self.token_ids, self.last_token = number, list(tokens), tokens[-1]
        self.prompt = self.num_tokens = len(tokens)
        self.max_tokens, self.ignore_eos, self.temperature = most, ignore_eos, 1e-9
        self.num_cached_tokens = self.num_scheduled_tokens = 0
        self.block_table, self.status = [], Status.WAITING

    is_finished = property(lambda self: self.status == Status.FINISHED)
    completion_token_ids = property(lambda self: self.token_ids[self.prompt:])


class Pages:
    """Whole pages are known by all tokens up to their end, while they are free too."""

    def __init__(self, count):
        self.free_block_ids, self.holders, self.known = deque(range(count)), [0] * count, {}

    def take(self):
        page = self.free_block_ids.popleft()
        self.known = {tokens: at for tokens, at in self.known.items() if at != page}
        self.holders[page] = 1
        return page

    def deallocate(self, sequence):
        for page in sequence.block_table:
            self.holders[page] -= 1
            if not self.holders[page]:
                self.free_block_ids.append(page)
        sequence.block_table.clear()
        sequence.num_cached_tokens = 0

    def allocate(self, sequence):
        """Shares what is known, or does nothing and says False."""
        assert nanovllm_ahead.UNKNOWN not in sequence.token_ids
        found = []
        while (len(found) + 1) * PAGE < sequence.num_tokens:
            page = self.known.get(tuple(sequence.token_ids[:(len(found) + 1) * PAGE]))
            if page is None:
                break
            found.append(page)
        more = -(-sequence.num_tokens // PAGE) - len(found)
        if more + sum(not self.holders[page] for page in found) > len(self.free_block_ids):
            return False
        for page in found:
            if not self.holders[page]:
                self.free_block_ids.remove(page)
            self.holders[page] += 1
        sequence.block_table = found + [self.take() for _ in range(more)]
        sequence.num_cached_tokens = len(found) * PAGE
        return True

    def learn(self, sequence, ran):
        for page in range(sequence.num_cached_tokens // PAGE, ran // PAGE):
            tokens = tuple(sequence.token_ids[:(page + 1) * PAGE])
            assert nanovllm_ahead.UNKNOWN not in tokens
            self.known[tokens] = sequence.block_table[page]


class Scheduler:
    eos = END

    def __init__(self, pages, rows, piece):
        self.block_manager, self.rows, self.piece = Pages(pages), rows, piece
        self.waiting, self.running, self.preempted = deque(), deque(), 0

    def is_finished(self):
        return not self.waiting and not self.running

    def schedule(self):
        made = []
        if self.waiting:
            sequence = self.waiting[0]
            if sequence.block_table or self.block_manager.allocate(sequence):
                left = sequence.num_tokens - sequence.num_cached_tokens
                sequence.num_scheduled_tokens = min(left, self.piece)
                if left <= self.piece:
                    self.running.append(self.waiting.popleft())
                return [sequence], True
        while self.running and len(made) < self.rows:
            sequence = self.running.popleft()
            if sequence.num_tokens % PAGE == 1:
                while sequence and not self.block_manager.free_block_ids:
                    last, sequence = (self.running.pop(), sequence) if self.running else \
                        (sequence, None)
                    self.block_manager.deallocate(last)
                    self.waiting.appendleft(last)
                    self.preempted += 1
                if not sequence:
                    break
                sequence.block_table.append(self.block_manager.take())
            sequence.num_scheduled_tokens = 1
            made.append(sequence)
        assert made
        self.running.extendleft(reversed(made))
        return made, False

    def postprocess(self, sequences, tokens, prefill):
        for sequence, token in zip(sequences, tokens):
            ran = sequence.num_cached_tokens + sequence.num_scheduled_tokens
            self.block_manager.learn(sequence, ran)
            sequence.num_cached_tokens = ran
            if prefill and ran < sequence.num_tokens:
                continue
            sequence.token_ids.append(token)
            sequence.last_token = token
            sequence.num_tokens += 1
            if (token == self.eos and not sequence.ignore_eos) or \
                    sequence.num_tokens - sequence.prompt == sequence.max_tokens:
                sequence.status = Status.FINISHED
                self.block_manager.deallocate(sequence)
                self.running.remove(sequence)


class Runner:
    """Its cache holds the tokens themselves."""

    block_size, world_size = PAGE, 1

    def __init__(self, pages, said):
        self.model, self.said = torch.nn.Linear(1, 1), said
        self.cache = torch.full((pages * PAGE,), -1)

    def prepare_prefill(self, sequences):
        sequence, = sequences
        begin = sequence.num_cached_tokens
        at = torch.arange(begin, begin + sequence.num_scheduled_tokens)
        table = torch.tensor([sequence.block_table])
        self.said.set_context(slot_mapping=table[0][at // PAGE] * PAGE + at % PAGE,
                              context_lens=at[-1:] + 1, block_tables=table)
        return torch.tensor(sequence.token_ids)[at], at

    def prepare_sample(self, sequences):
        return torch.tensor([sequence.temperature for sequence in sequences])

    def run_model(self, inputs, positions, prefill):
        now = self.said.context
        assert inputs.min() >= 0 and positions[-1] + 1 == now["context_lens"][-1]
        self.cache[now["slot_mapping"].long()] = inputs
        logits = torch.zeros(len(now["context_lens"]), V)
        for row, length in enumerate(now["context_lens"].tolist()):
            at = torch.arange(length)
            tokens = self.cache[now["block_tables"][row][at // PAGE].long() * PAGE + at % PAGE]
            logits[row, ((tokens * (3 + at)).sum() + 7 * length) % V] = 1
        return logits


class Engine:
    def __init__(self, said, pages, rows, piece):
        self.scheduler, self.model_runner = Scheduler(pages, rows, piece), Runner(pages, said)

    def is_finished(self):
        return self.scheduler.is_finished()

    def step(self):
        sequences, prefill = self.scheduler.schedule()
        count = sequences[0].num_scheduled_tokens if prefill else -len(sequences)
        if prefill:
            inputs, positions = self.model_runner.prepare_prefill(sequences)
        else:
            positions = torch.tensor([s.num_tokens - 1 for s in sequences])
            inputs = torch.tensor([s.last_token for s in sequences])
            last = torch.tensor([s.block_table[-1] for s in sequences])
            most = max(len(s.block_table) for s in sequences)
            self.model_runner.said.set_context(
                slot_mapping=last * PAGE + positions % PAGE, context_lens=positions + 1,
                block_tables=torch.tensor(
                    [s.block_table + [-1] * (most - len(s.block_table))
                     for s in sequences]))
        logits = self.model_runner.run_model(inputs, positions, prefill)
        self.scheduler.postprocess(sequences, logits.argmax(-1).tolist(), prefill)
        return [(s.seq_id, s.completion_token_ids) for s in sequences if s.is_finished], count


@pytest.fixture
def said(monkeypatch):
    now = types.ModuleType("nanovllm.utils.context")
    now.set_context = lambda prefill=False, **numbers: setattr(now, "context", numbers)
    now.reset_context = lambda: setattr(now, "context", None)
    engine = types.ModuleType("nanovllm.engine.llm_engine")
    parts = {"step": Engine.step, "is_finished": Engine.is_finished}
    engine.LLMEngine = type("LLMEngine", (Engine,), parts)
    for name in ("nanovllm", "nanovllm.utils", "nanovllm.engine"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, now.__name__, now)
    monkeypatch.setitem(sys.modules, engine.__name__, engine)
    return types.SimpleNamespace(context=now, engine=engine.LLMEngine)


def serve(engine, requests):
    """{number: tokens}, single tokens that were run. Requests come when so many steps are done."""
    told, waiting, steps, single = {}, deque(requests), 0, 0
    while waiting or not engine.is_finished():
        while waiting and (waiting[0][0] <= steps or engine.is_finished()):
            _, number, tokens, most, ignore = waiting.popleft()
            engine.scheduler.waiting.append(Sequence(number, tokens, most, ignore))
        ended, count = engine.step()
        for number, tokens in ended:
            assert number not in told and nanovllm_ahead.UNKNOWN not in tokens
            told[number] = list(tokens)
        steps, single = steps + 1, single + max(-count, 0)
    return told, single


@pytest.mark.parametrize("pages, rows, piece", [(200, 64, 100), (22, 8, 5), (14, 3, 100)])
def test_says_what_step_by_step_says(pages, rows, piece, said):
    rng = np.random.default_rng(pages)
    start = rng.integers(V, size=12).tolist()
    requests = []
    for number in range(40):
        tokens = rng.integers(V, size=rng.integers(1, 16)).tolist()
        tokens = start[:rng.integers(13)] + tokens if number % 3 else tokens
        requests.append((int(rng.integers(100)), number, tokens, int(rng.integers(1, 20)),
                         number % 4 == 0))
    requests.sort()
    plain = Engine(said.context, pages, rows, piece)
    want, single = serve(plain, requests)
    nanovllm_ahead.install()
    engine = said.engine(said.context, pages, rows, piece)
    got, more = serve(engine, requests)
    assert got == want and len(want) == 40
    ends = [tokens[-1] == END for tokens in want.values()]
    assert any(ends) and not all(ends)
    assert single < more <= single + 40  # a row more where a token ended a sequence, no other
    for scheduler in (plain.scheduler, engine.scheduler):
        assert len(scheduler.block_manager.free_block_ids) == pages
        assert (scheduler.preempted > 0) == (pages < 200)


def test_one_ahead(said):
    """A step is launched before the tokens of the one before are asked for; where pages may run
    out, or all ends by length, none is; several processes go nano-vllm's way."""
    nanovllm_ahead.install()
    events = []
    launch, take = nanovllm_ahead.Ahead._launch, nanovllm_ahead.Ahead._take
    engine = said.engine(said.context, 6, 4, 100)
    engine.scheduler.waiting.extend(Sequence(n, [n, 1], 4, True) for n in range(2))
    engine.step()
    one = engine._ahead
    one._launch = lambda *given: events.append("launch") or launch(one, *given)
    one._take = lambda *given: events.append("take") or take(one, *given)
    for _ in range(3):
        engine.step()
    assert events == ["launch", "take"] * 3
    while not engine.is_finished():
        engine.step()
    assert events[6:] == ["take"]  # the fifth step's, launched with all others
    engine.model_runner.world_size = 2
    del engine._ahead
    engine.scheduler.waiting.append(Sequence(2, [2, 1], 1, True))
    assert engine.step() == ([(2, [(2 * 3 + 4 + 14) % V])], 2) and engine._ahead is None


def generator(seed):
    return torch.Generator(DEVICE).manual_seed(seed)


@pytest.mark.parametrize("words", [7, 128, 300])
def test_draws_as_softmax_says(words):
    """Each word as often as its probability says, within five standard deviations of 10,000."""
    g = generator(words)
    logits = 2 * torch.randn(1, words, generator=g, device=DEVICE)
    logits[0, words // 2:words // 2 + 3] = -torch.inf
    for temperature in (0.5, 1.0, 3.0):
        p = (logits[0].double() / temperature).softmax(0)
        tokens = draw(logits.repeat(10000, 1), torch.full((10000,), temperature, device=DEVICE), g)
        seen = tokens.bincount(minlength=words).double()
        spread = (10000 * p * (1 - p)).sqrt()
        assert ((seen - 10000 * p).abs() <= 5 * spread + 1).all()
        assert (seen[p == 0] == 0).all() and tokens.dtype == torch.int64
    both = [draw(logits.repeat(100, 1), torch.ones(100, device=DEVICE), generator(1))
            for _ in range(2)]
    assert torch.equal(*both)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cold_draws_the_likeliest(dtype):
    logits = torch.randn(100, 1000, generator=generator(0), device=DEVICE).to(dtype)
    logits[:, 700] = 9 + torch.rand(100, generator=generator(1), device=DEVICE).to(dtype)
    logits[::2, 333] = 20
    for cold in (0.0, 1e-10, 1e-6):
        tokens = draw(logits, torch.full((100,), cold, device=DEVICE))
        assert torch.equal(tokens, logits.argmax(-1))
