/* cli/ranks.h: --cp N: ranks that are threads of this process, or, under a launcher, one that is
 * this process. The command's own thread is rank 0 (or that one); its session is the cli's, so
 * reports look there. Arrays are those of the whole batch: they are shared out to the ranks and put
 * together again, and rank 0 writes them.
 */
#ifndef CLI_RANKS_H
#define CLI_RANKS_H

#include "data.h"

/* Ranks of the cli's plan, 1 without context parallelism. */
int cli_ranks(const cli *c);
/* Under a launcher: this process's GPU. Before anything else. */
rg_status cli_ranks_place(cli *c);
/* RG_E_USAGE if a launcher started another number of ranks than the plan is for. */
rg_status cli_ranks_check(cli *c);
/* RG_E_USAGE if a launcher started this process as one of several: how often bench repeats its runs
 * is each process's own. */
rg_status cli_ranks_alone(cli *c);
/* Is it this process that writes files and reports? */
bool cli_ranks_writes(const cli *c);
/* Starts the other ranks, makes every rank's session and binds its share of the arrays. Waits for
 * all. Ended by cli_ranks_close, also after a failure. */
rg_status cli_ranks_open(cli *c, const data_set *d);
/* Results into the whole arrays. */
rg_status cli_ranks_gather(cli *c, data_set *d);
void cli_ranks_close(cli *c);

/* A direction and its end, on as many ranks as there are. */
rg_status cli_direction(cli *c, bool backward);

#endif
