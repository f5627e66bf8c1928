/* cli/rows.h: the nodes of a table, a row each, or one for many that are alike. */
#ifndef CLI_ROWS_H
#define CLI_ROWS_H

#include "cli.h"

typedef struct node_row {
  const char *name, *op; /* the session's, or the row's pattern */
  bool backward;
  double ms;           /* where the row stands for many, their mean */
  double flops, bytes; /* what each has to do */
  double roofline_ms;
  int alike;     /* so many nodes */
  char *pattern; /* owned by rows_free */
} node_row;

/* Nodes of one pattern (rg_name_pattern), op and direction that have the same to do, more than
 * RG_MOST_APART of them, become the first one's row; *n is how many rows are left. */
rg_status rows_fold(cli *c, node_row *row, int *n);
void rows_free(node_row *row, int n);
/* cli_fit for these rows, in a table with `others` more characters a line. */
cli_widths rows_fit(const node_row *row, int n, int others);
/* Ends a row: colour off, and for how many it stands. */
void rows_end(const node_row *row);

#endif
