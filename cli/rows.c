/* cli/rows.c: see rows.h. */
#include "rows.h"
#include <stdlib.h>
#include <string.h>

static int order(double a, double b) {
  return (a > b) - (a < b);
}

/* 0: two that are alike. */
static int differ(const node_row *a, const node_row *b) {
  int d = strcmp(a->pattern, b->pattern);
  if (d == 0) d = strcmp(a->op, b->op);
  if (d == 0) d = (int)a->backward - (int)b->backward;
  if (d == 0) d = order(a->flops, b->flops);
  return d == 0 ? order(a->bytes, b->bytes) : d;
}

/* Those that are alike side by side, in the order in which they run. */
static int compare(const void *x, const void *y) {
  const node_row *a = *(node_row *const *)x, *b = *(node_row *const *)y;
  const int d = differ(a, b);
  return d == 0 ? (a > b) - (a < b) : d;
}

rg_status rows_fold(cli *c, node_row *row, int *n) {
  const int all = *n;
  node_row **sorted = calloc((size_t)all + 1, sizeof *sorted);
  bool whole = sorted != NULL;
  for (int i = 0; whole && i < all; i++) {
    const size_t size = strlen(row[i].name) + 1;
    row[i].alike = 1;
    sorted[i] = &row[i];
    if (!row[i].pattern) row[i].pattern = malloc(size);
    whole = row[i].pattern != NULL;
    if (whole) rg_name_pattern(row[i].name, row[i].pattern, size);
  }
  if (!whole) {
    free(sorted);
    return cli_nomem(&c->error);
  }
  qsort(sorted, (size_t)all, sizeof *sorted, compare);
  for (int i = 0, k; i < all; i = k) {
    double sum = 0;
    for (k = i; k < all && differ(sorted[i], sorted[k]) == 0; k++) sum += sorted[k]->ms;
    if (k - i <= RG_MOST_APART) continue;
    for (int j = i; j < k; j++) sorted[j]->alike = 0;
    sorted[i]->alike = k - i;
    sorted[i]->ms = sum / (k - i);
    sorted[i]->name = sorted[i]->pattern;
  }
  free(sorted);
  *n = 0;
  for (int i = 0; i < all; i++) {
    if (row[i].alike == 0) {
      free(row[i].pattern);
      row[i].pattern = NULL;
      continue;
    }
    const node_row kept = row[i];
    row[i].pattern = NULL;
    row[(*n)++] = kept;
  }
  return RG_OK;
}

void rows_free(node_row *row, int n) {
  for (int i = 0; row && i < n; i++) free(row[i].pattern);
  free(row);
}

cli_widths rows_fit(const node_row *row, int n, int others) {
  int node = 0, op = 0, behind = 0;
  char text[32];
  for (int i = 0; i < n; i++) {
    const int count =
        row[i].alike > 1 ? snprintf(text, sizeof text, "  each of %d", row[i].alike) : 0;
    node = (int)strlen(row[i].name) > node ? (int)strlen(row[i].name) : node;
    op = (int)strlen(row[i].op) > op ? (int)strlen(row[i].op) : op;
    behind = count > behind ? count : behind;
  }
  return cli_fit(node, op, others + behind);
}

void rows_end(const node_row *row) {
  fputs(cli_ink(stdout, CLI_PLAIN), stdout);
  if (row->alike > 1) printf("  each of %d", row->alike);
  putchar('\n');
}
