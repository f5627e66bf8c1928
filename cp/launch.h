/* cp/launch.h: which rank of how many this process is, as launchers say in the environment. */
#ifndef RGI_CP_LAUNCH_H
#define RGI_CP_LAUNCH_H

#include "../graph/base.h"

typedef struct rgi_launch {
  const char *by; /* "torchrun", "mpirun", …; NULL: no launcher */
  int rank, ranks, local;
  const char *address; /* where rank 0 is; borrowed from the environment, or "127.0.0.1" */
  int port;
  uint64_t nonce; /* of the job */
} rgi_launch;

/* getter: getenv, or a test's. RG_E_USAGE naming the variable that makes no sense. */
rg_status rgi_launch_find(const char *(*getter)(const char *name), rgi_launch *out, rg_error *e);
const char *rgi_getenv(const char *name);

#endif
