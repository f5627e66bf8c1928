"""nano-vllm one step ahead: the GPU has the next step while the host takes the tokens of the last.

`regraph.nanovllm.install()` puts this in the place of LLMEngine.step. The order of things:

    schedule k         nano-vllm's scheduler, as if every sequence went on
    launch k           its tokens are those that step k−1 draws; they are on the device, and stay
    tokens of k−1      waited for, told to their sequences; whose end they are has ended
    account k          nano-vllm's postprocess for those that go on, UNKNOWN in place of k's tokens

so that step k+1 can be scheduled. Why sequences get the tokens they would get:

- A sequence that ends by its length ends when its last step is accounted, before the token is
  known, and is in no later step. What it said is told when the token comes.
- One whose token of k−1 is the end is in step k already. That row is dropped. What it writes goes
  behind the sequence's tokens, to pages that later steps, behind it on the stream, may be given.
- nano-vllm knows pages again by the tokens that ran: they are known when a step is accounted.
- Where pages may not last for the next step, tokens are waited for first. So nothing waits, or is
  refused, for the sake of a sequence that has ended.

Engines of several processes take nano-vllm's own way.
"""

import numpy as np
import torch

from .draw import draw

UNKNOWN = -2  # a token that is to come: no word, and no end


class _Step:
    """A step that was launched, and its tokens."""

    def __init__(self, sequences, prefill, count, tokens):
        self.sequences, self.prefill, self.count, self.tokens = sequences, prefill, count, tokens
        self.coming = []  # (row, sequence, where its token goes)
        self.host, self.event = tokens, None
        if tokens.is_cuda:
            self.host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self.host.copy_(tokens, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def wait(self):
        if self.event:
            self.event.synchronize()
        return self.host.tolist()


class _Tables:
    """What steps of single tokens are told, kept from step to step: the rows of sequences that go
    on, their pages and temperatures. Whoever gives up its pages is not in the step that wants them,
    and so has no row when it comes back."""

    def __init__(self, page, device):
        self.page, self.device = page, device
        self.order = []  # sequences by row
        self.table = np.empty((0, 0), np.int32)
        self.pages = np.empty(0, np.int64)  # of each row, those that the table has
        self.sent = None  # the table, and temperatures, on the device

    def _seat(self, sequences):
        """The rows of another batch: those that were there take their pages along."""
        row = {sequence: row for row, sequence in enumerate(self.order)}
        before = np.array([row.get(sequence, -1) for sequence in sequences])
        table = np.full((len(sequences), self.table.shape[1]), -1, np.int32)
        pages = np.zeros(len(sequences), np.int64)
        old = before >= 0
        table[old], pages[old] = self.table[before[old]], self.pages[before[old]]
        self.table, self.pages, self.order, self.sent = table, pages, sequences, None

    def send(self, values):
        values = torch.from_numpy(values)
        if self.device.type != "cuda":
            return values.clone()
        return values.pin_memory().to(self.device, non_blocking=True)

    def __call__(self, sequences):
        """(positions, slots, lengths, table, temperatures) on the device."""
        if self.order != sequences:
            self._seat(sequences)
        now = np.array([len(sequence.block_table) for sequence in sequences])
        grown = np.flatnonzero(now != self.pages)
        if len(grown):
            wide = now.max()
            if wide > self.table.shape[1]:
                more = np.full((len(now), wide - self.table.shape[1]), -1, np.int32)
                self.table = np.concatenate([self.table, more], 1)
            for row in grown.tolist():
                begin, end = self.pages[row], now[row]
                self.table[row, begin:end] = sequences[row].block_table[begin:]
            self.pages, self.sent = now, None
        if self.sent is None:
            warm = np.array([sequence.temperature for sequence in sequences], np.float32)
            self.sent = self.send(self.table), self.send(warm)
        length = np.array([sequence.num_tokens for sequence in sequences])
        last = self.table[np.arange(len(now)), now - 1]
        slots = last * self.page + (length - 1) % self.page
        return *self.send(np.stack([length - 1, slots, length])), *self.sent


class Ahead:
    """An engine's steps. `flying` is the one whose tokens have not been taken."""

    def __init__(self, engine):
        self.engine = engine
        device = next(self.runner.model.parameters()).device
        self.tables = _Tables(self.runner.block_size, device)
        self.flying = None

    @property
    def runner(self):  # the engine's, until it exits
        return self.engine.model_runner

    def _inputs(self, sequences, before):
        """The tokens that a step of single tokens runs, those on their way among them."""
        coming = {sequence: row for row, sequence, _ in before.coming} if before else {}
        rows = [coming.get(sequence, -1) for sequence in sequences]
        if before and rows == list(range(len(before.tokens))):
            return before.tokens
        known = self.tables.send(np.array([max(s.last_token, 0) for s in sequences]))
        if not coming:
            return known
        rows = self.tables.send(np.array(rows))
        return torch.where(rows < 0, known, before.tokens[rows.clamp(min=0)])

    @torch.inference_mode()
    def _launch(self, before):
        """The next step, `before` it one whose tokens are on their way, perhaps."""
        from nanovllm.utils.context import reset_context, set_context

        sequences, prefill = self.engine.scheduler.schedule()
        if prefill:
            count = sum(sequence.num_scheduled_tokens for sequence in sequences)
            inputs, positions = self.runner.prepare_prefill(sequences)
            temperatures = self.runner.prepare_sample(sequences)
        else:
            count = -len(sequences)
            positions, slots, lengths, table, temperatures = self.tables(sequences)
            inputs = self._inputs(sequences, before)
            set_context(False, slot_mapping=slots, context_lens=lengths, block_tables=table)
        logits = self.runner.run_model(inputs, positions, prefill)
        reset_context()
        return _Step(sequences, prefill, count, draw(logits, temperatures))

    def _account(self, step):
        rows = [row for row, sequence in enumerate(step.sequences) if not sequence.is_finished]
        live = [step.sequences[row] for row in rows]
        at = [sequence.num_tokens for sequence in live]
        self.engine.scheduler.postprocess(live, [UNKNOWN] * len(live), step.prefill)
        step.coming = [(row, sequence, n) for row, sequence, n in zip(rows, live, at)
                       if sequence.num_tokens > n]

    def _take(self, step):
        """What has ended: [(number, tokens)]."""
        tokens, ended = step.wait(), []
        scheduler = self.engine.scheduler
        for row, sequence, at in step.coming:
            sequence.token_ids[at] = sequence.last_token = token = tokens[row]
            if token == scheduler.eos and not sequence.ignore_eos and not sequence.is_finished:
                sequence.status = type(sequence.status).FINISHED
                scheduler.block_manager.deallocate(sequence)
                scheduler.running.remove(sequence)
            if sequence.is_finished:
                ended.append((sequence.seq_id, sequence.completion_token_ids))
        return ended

    def _may_go_on(self):
        """Is there a step to launch, and are there pages for it whoever has ended?"""
        scheduler = self.engine.scheduler
        if scheduler.is_finished():
            return False
        free = len(scheduler.block_manager.free_block_ids)
        return free >= len(scheduler.running) or free >= sum(
            sequence.num_tokens % self.runner.block_size == 1 for sequence in scheduler.running)

    def step(self):
        """As LLMEngine.step: ([(number, tokens)] of what has ended, tokens of prompts or minus the
        single ones), of the oldest step that was not told."""
        if not self.flying:
            self.flying = self._launch(None)
            self._account(self.flying)
        step = self.flying
        following = self._launch(step) if self._may_go_on() else None
        ended = self._take(step)
        if following:
            self._account(following)
            if not following.coming and self.engine.scheduler.is_finished():
                following = None
        self.flying = following
        return ended, step.count


def install() -> None:
    """Every engine of nano-vllm's goes so, from now on."""
    from nanovllm.engine.llm_engine import LLMEngine

    step, is_finished = LLMEngine.step, LLMEngine.is_finished

    def ahead(engine):
        if "_ahead" not in vars(engine):
            engine._ahead = Ahead(engine) if engine.model_runner.world_size == 1 else None
        return engine._ahead

    LLMEngine.step = lambda self: (ahead(self).step if ahead(self) else lambda: step(self))()
    LLMEngine.is_finished = lambda self: is_finished(self) and not (
        ahead(self) and ahead(self).flying)
