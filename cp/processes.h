/* cp/processes.h: what an engine beside the sockets is given of ranks that are processes. */
#ifndef RGI_CP_PROCESSES_H
#define RGI_CP_PROCESSES_H

#include "../graph/base.h"

/* This rank has waited for the others in `collective` for as long as the deadline allows: whoever
 * says nothing of the kind soon did not come. */
void rgi_process_stuck(rg_comm *c, const char *collective);

#endif
