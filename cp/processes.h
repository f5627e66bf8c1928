/* cp/processes.h: what an engine beside the sockets asks of ranks that are processes. */
#ifndef RGI_CP_PROCESSES_H
#define RGI_CP_PROCESSES_H

#include "../graph/base.h"

/* RG_E_COMM, in the words of the first failure, if there was one. */
rg_status rgi_process_check(rg_comm *c, rg_error *e);
/* This rank has waited for the others in `collective` for as long as the deadline allows: whoever
 * says nothing of the kind soon did not come. */
void rgi_process_stuck(rg_comm *c, const char *collective);

#endif
