/* cp/launch.c: see launch.h. First come RANK and WORLD_SIZE (torchrun), then what OpenMPI, PMI
 * (MPICH, Intel MPI) and Slurm set; Slurm's inside a step only, since a batch script has its
 * variables, too.
 *
 * The meeting point: MASTER_ADDR, and REGRAPH_MASTER_PORT or the port after MASTER_PORT, which is
 * torchrun's own. Without them ranks meet on this host, at a port that follows from the job's
 * name. */
#include "launch.h"
#include "comm.h"
#include <limits.h>
#include <stdlib.h>
#include <string.h>

static const struct launcher {
  const char *name, *rank, *ranks, *local, *only;
} launcher[] = {
    {"torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", NULL},
    {"mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", NULL},
    {"mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", NULL},
    {"srun", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_ID"},
};
static const char *const jobs[] = {
    "TORCHELASTIC_RUN_ID", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid",
    "PMI_JOBID",           "SLURM_JOB_ID",   "SLURM_STEP_ID"};

enum { FIRST_PORT = 20000, PORTS = 12000 };

const char *rgi_getenv(const char *name) {
  const char *text = getenv(name);
  return text && text[0] ? text : NULL;
}

static rg_status number(const char *(*getter)(const char *), const char *name, int least, int most,
                        int *out, rg_error *e) {
  const char *text = getter(name);
  char *end = NULL;
  const long x = text ? strtol(text, &end, 10) : 0;
  if (!text) return RG_OK;
  if (*end || end == text || x < least || x > most)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL, "%s is \"%.40s\"; expected %d to %d", name, text,
                    least, most);
  *out = (int)x;
  return RG_OK;
}

rg_status rgi_launch_find(const char *(*getter)(const char *), rgi_launch *out, rg_error *e) {
  const struct launcher *by = NULL;
  *out = (rgi_launch){.ranks = 1, .address = "127.0.0.1", .nonce = RGI_HASH};
  for (int i = 0; i < RGI_COUNT(launcher) && !by; i++)
    if (getter(launcher[i].rank) && getter(launcher[i].ranks) &&
        (!launcher[i].only || getter(launcher[i].only)))
      by = &launcher[i];
  for (int i = 0; i < RGI_COUNT(jobs); i++)
    if (getter(jobs[i])) out->nonce = rgi_hash_text(out->nonce, getter(jobs[i]));
  out->port = FIRST_PORT + (int)(out->nonce % PORTS);
  if (getter("MASTER_ADDR")) out->address = getter("MASTER_ADDR");
  int master = 0;
  RGI_TRY(number(getter, "MASTER_PORT", 1, 65534, &master, e));
  if (master) out->port = master + 1;
  RGI_TRY(number(getter, "REGRAPH_MASTER_PORT", 1, 65535, &out->port, e));
  if (!by) return RG_OK;
  out->by = by->name;
  RGI_TRY(number(getter, by->ranks, 1, 1024, &out->ranks, e));
  RGI_TRY(number(getter, by->rank, 0, out->ranks - 1, &out->rank, e));
  out->local = out->rank;
  return number(getter, by->local, 0, INT_MAX, &out->local, e);
}
