/* tests/stress/cases.c: the cases: every family of kernels, direction, width, type and size of
 * group, on packs of short sequences and on long ones. gpu_stress --list says which kernels each
 * takes.
 */
#include "stress.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const int shorts[] = {100, 300, 64, 129, 200, 31, 500, 176, -1},
                 edges[] = {0, 1, 31, 64, 100, 129, 0, 176, 300, 2, 63, 65, 127, 128, 33, 0, -1},
                 mixed[] = {1100, 1, 31, 700, 64, 0, 129, 100, -1}, one[] = {4096, -1},
                 two[] = {1900, 900, -1};

/* 300 of 5 and 2000 of 1: more sequences than one would write down. */
static const int fives[] = {300, 5, -2}, ones[] = {2000, 1, -2};

#define NSA(name, KH, G, D, DV, dtype, pack, dead, pattern, set) \
  { name, "nsa", KH, G, D, DV, dtype, pack, dead, pattern, 0, set }

const stress_case stress_cases[] = {
    NSA("nsa-64/4-128", 4, 16, 128, 128, "bf16", shorts, 0, SCATTERED, NULL),
    NSA("nsa-32/8-128", 8, 4, 128, 128, "bf16", shorts, 3, SCATTERED, NULL),
    NSA("nsa-16/1-192", 1, 16, 192, 128, "bf16", shorts, 0, CORRELATED, "block=32 top_n=4"),
    NSA("nsa-8/2-192-f16", 2, 4, 192, 128, "f16", edges, 5, SCATTERED, NULL),
    NSA("nsa-16/1-64", 1, 16, 64, 64, "bf16", edges, 0, SHARED, "block=32 top_n=4"),
    NSA("nsa-16/2-64-f16", 2, 8, 64, 64, "f16", shorts, 1, SCATTERED, NULL),
    NSA("nsa-16/1-96", 1, 16, 96, 96, "bf16", shorts, 0, SCATTERED, "block=32 top_n=3"),
    NSA("nsa-8/1-96-f16", 1, 8, 96, 96, "f16", edges, 2, CORRELATED,
        "kernel=16 stride=8 block=32 top_n=4"),
    NSA("nsa-16/2-256", 2, 8, 256, 256, "bf16", shorts, 0, SCATTERED, NULL),
    NSA("nsa-16/1-256-f16", 1, 16, 256, 256, "f16", edges, 0, SHARED, "block=32 top_n=4"),
    NSA("nsa-4/4-128", 4, 1, 128, 128, "bf16", edges, 7, CORRELATED, "block=32 top_n=4"),
    NSA("nsa-64/1-128-f16", 1, 64, 128, 128, "f16", shorts, 0, SHARED, NULL),
    NSA("nsa-16/1-128-long", 1, 16, 128, 128, "bf16", two, 0, CORRELATED, "top_n=8"),
    NSA("nsa-64/4-128-long", 4, 16, 128, 128, "bf16", one, 0, SCATTERED, NULL),
    NSA("nsa-8/2-128-long-f16", 2, 4, 128, 128, "f16", mixed, 0, SHARED, "block=128 top_n=4"),
    NSA("nsa-32/8-64-long", 8, 4, 64, 64, "bf16", mixed, 9, SCATTERED, "window=63"),
    NSA("nsa-64/4-128-fives", 4, 16, 128, 128, "bf16", fives, 0, SCATTERED, NULL),
    NSA("nsa-16/1-128-ones", 1, 16, 128, 128, "f16", ones, 4, SCATTERED, "window=15"),
    NSA("nsa-12/4-80/48-f16", 4, 3, 80, 48, "f16", shorts, 0, SCATTERED, NULL),
    NSA("nsa-4/2-36/20", 2, 2, 36, 20, "bf16", edges, 3, CORRELATED, "block=32 top_n=4"),
    NSA("nsa-4/2-40/24-f32", 2, 2, 40, 24, "f32", edges, 0, SCATTERED, "block=32 top_n=4"),
    {"layer-16/1-128", "nsa_layer", 1, 16, 128, 128, "bf16", shorts, 4, SCATTERED, 2048, NULL},
    {"layer-8/2-64-f16", "nsa_layer", 2, 4, 64, 64, "f16", edges, 0, CORRELATED, 520,
     "block=32 top_n=4"},
    {"layer-6/2-40-f32", "nsa_layer", 2, 3, 40, 40, "f32", edges, 1, SCATTERED, 72,
     "block=32 top_n=4"},
    {"linear-16/1-128", "nsa_linear", 1, 16, 128, 128, "bf16", shorts, 4, SCATTERED, 0, NULL},
    {"linear-8/2-64-f16", "nsa_linear", 2, 4, 64, 64, "f16", edges, 0, SHARED, 0,
     "block=32 top_n=4"},
    {"moba-16-128", "moba", 0, 16, 128, 128, "bf16", shorts, 4, SCATTERED, 0, "block=64"},
    {"moba-8-64-long-f16", "moba", 0, 8, 64, 64, "f16", two, 0, CORRELATED, 0, NULL},
    {"window-32/8-128", "sliding_window", 8, 4, 128, 128, "bf16", shorts, 4, SCATTERED, 0, NULL},
    {"window-64/4-64-f16", "sliding_window", 4, 16, 64, 64, "f16", edges, 0, SCATTERED, 0,
     "window=31"},
    {"window-16/16-96", "sliding_window", 16, 1, 96, 96, "bf16", fives, 0, SCATTERED, 0, NULL},
    {"dense-32/8-128", "dense_causal", 8, 4, 128, 128, "bf16", shorts, 4, SCATTERED, 0, NULL},
    {"dense-16/2-256", "dense_causal", 2, 8, 256, 256, "bf16", edges, 0, SCATTERED, 0, NULL},
    {"dense-16/1-192-f16", "dense_causal", 1, 16, 192, 128, "f16", shorts, 0, SCATTERED, 0, NULL},
    {"dense-8/4-64/128-f16", "dense_causal", 4, 2, 64, 128, "f16", mixed, 0, SCATTERED, 0, NULL},
    {"dense-64/1-128", "dense_causal", 1, 64, 128, 128, "bf16", edges, 6, SCATTERED, 0, NULL},
    {"dsa-64", "variants/dsa", 0, 64, 0, 0, "bf16", shorts, 4, SCATTERED, 256,
     "top_n=100 C=64 HI=64"},
    {"dsa-16-long", "variants/dsa", 0, 16, 0, 0, "bf16", two, 0, SCATTERED, 128,
     "top_n=512 C=64 HI=8"},
    {"two_branch-16/4-128", "two_branch", 4, 4, 128, 128, "bf16", shorts, 0, SCATTERED, 0, NULL},
};
const int stress_ncases = (int)(sizeof stress_cases / sizeof *stress_cases);

/* ---- shapes ---- */

enum { SMALL_SEQUENCES = 5, SMALL_LENGTH = 80 };

static int least(int a, int b) {
  return a < b ? a : b;
}

static int sequences(const int *pack, int *length) {
  int n = 0, i = 0;
  while (pack[i] >= 0) i++;
  if (pack[i] == -2) { /* so many of one length */
    for (; n < pack[0]; n++) length[n] = pack[1];
    return n;
  }
  for (; n < i; n++) length[n] = pack[n];
  return n;
}

static void bind(stress_shape *s, const char *name, int64_t value, const char *text) {
  if (s->nset == STRESS_SETTINGS) abort();
  s->set[s->nset++] = (rg_binding){name, value, text};
}

void stress_shape_of(const stress_case *c, bool small, stress_shape *out) {
  *out = (stress_shape){.T = c->dead};
  out->B = sequences(c->pack, out->length);
  if (small) out->B = least((int)out->B, SMALL_SEQUENCES);
  for (int64_t b = 0; b < out->B; b++) {
    if (small) out->length[b] = least(out->length[b], SMALL_LENGTH);
    out->T += out->length[b];
  }
  const int KH = small ? least(c->KH, 2) : c->KH, G = small ? least(c->G, 2) : c->G;
  bind(out, "H", KH ? KH * G : G, NULL);
  if (KH) bind(out, "KH", KH, NULL);
  if (c->D) bind(out, "D", c->D, NULL);
  if (c->DV) bind(out, "DV", c->DV, NULL);
  bind(out, "dtype", 0, c->dtype);
  if (c->M) bind(out, "M", small ? least(c->M, 64) : c->M, NULL);
  snprintf(out->text, sizeof out->text, "%s", c->set ? c->set : "");
  for (char *p = strtok(out->text, " "); p; p = strtok(NULL, " ")) {
    char *value = strchr(p, '=');
    *value = '\0';
    bind(out, p, 0, value + 1);
  }
}
