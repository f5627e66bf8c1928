/* exec/overlap.c: before a run, whether what it writes has bytes of its own.

   Tensors that are only read may share bytes (tied weights; an output that is its own gradient). A
   tensor that is written may share them with nothing that the run touches: the saved and scratch
   blocks, and in a forward every input, since a backward may still read there what the forward has
   overwritten.

   Spans are sorted by their first byte, in place; one sweep then keeps the span that reaches
   furthest of all so far, and of those that are written. Nothing is allocated.
 */
#include "session.h"

#include <stdio.h>
#include <string.h>

static void add(rg_session *s, int32_t *n, const void *data, int64_t bytes, int32_t bind,
                bool written) {
  if (!data || bytes <= 0) return;
  s->span[(*n)++] = (rgi_span){(uintptr_t)data, (uintptr_t)data + (uintptr_t)bytes, bind, written};
}

static int32_t list_spans(rg_session *s, bool backward) {
  int32_t n = 0;
  for (int32_t i = 0; i < s->plan->nbindable; i++) {
    const rgi_bindable *b = &s->plan->bindable[i];
    const bool forward_only = rgi_role_forward(b->info.role);
    const void *data = backward && forward_only ? s->current->at[i] : s->bound[i];
    if (b->read[backward] || b->written[backward] ||
        (!backward && b->info.role == RG_INPUT && b->read[1]))
      add(s, &n, data, b->info.bytes, i, b->written[backward]);
  }
  add(s, &n, s->current->data, s->plan->sizes.saved, RGI_AT_SAVED, true);
  add(s, &n, s->scratch, s->plan->sizes.scratch, RGI_AT_SCRATCH, true);
  add(s, &n, s->current->host, s->plan->sizes.host, RGI_AT_HOST, true);
  return n;
}

/* Shell's sort with Sedgewick's gaps: small, and allocates nothing. */
static void sort_spans(rgi_span *a, int32_t n) {
  static const int32_t gaps[] = {65921, 16577, 4193, 1073, 281, 77, 23, 8, 1};
  for (int g = 0; g < RGI_COUNT(gaps); g++)
    for (int32_t i = gaps[g]; i < n; i++) {
      const rgi_span x = a[i];
      int32_t k = i;
      for (; k >= gaps[g] && a[k - gaps[g]].begin > x.begin; k -= gaps[g]) a[k] = a[k - gaps[g]];
      a[k] = x;
    }
}

static const char *span_name(const rg_session *s, const rgi_span *x, char *text, size_t room) {
  if (x->bind < 0)
    return x->bind == RGI_AT_SAVED  ? "the saved block"
           : x->bind == RGI_AT_HOST ? "the host block"
                                    : "the scratch block";
  const rg_tensor_info *t = &s->plan->bindable[x->bind].info;
  snprintf(text, room, "the %s \"%s\"", rgi_role_name(t->role), t->name);
  return text;
}

rg_status rgi_session_overlap(rg_session *s, bool backward, rg_error *e) {
  const int32_t n = list_spans(s, backward);
  const rgi_span *any = NULL, *written = NULL; /* that reach furthest */
  sort_spans(s->span, n);
  for (int32_t i = 0; i < n; i++) {
    const rgi_span *x = &s->span[i], *y = x->written ? any : written;
    if (y && x->begin < y->end) {
      char a[128], b[128];
      if (!x->written) {
        const rgi_span *swap = x; /* name what is written first */
        x = y;
        y = swap;
      }
      return rgi_fail(
          e, RG_E_USAGE, NULL, NULL,
          "%s would be written over %s in the %s: they share memory at %p; bind them apart",
          span_name(s, x, a, sizeof a), span_name(s, y, b, sizeof b),
          backward ? "backward" : "forward", (void *)(x->begin > y->begin ? x->begin : y->begin));
    }
    if (!any || x->end > any->end) any = x;
    if (x->written && (!written || x->end > written->end)) written = x;
  }
  return RG_OK;
}
