/* cli/npy.h: arrays in NumPy's .npy format, as `run` exchanges them: float32 or int32, little
   endian, C order.

   Reading is strict and streamed: npy_open checks magic, version, header and (for a regular file)
   the size, without touching the data; npy_read converts block by block, so memory never depends on
   what a header claims.
 */
#ifndef CLI_NPY_H
#define CLI_NPY_H

#include <regraph/regraph.h>
#include <stdio.h>

#define NPY_MAX_RANK 8

typedef struct npy_reader {
  FILE *file;
  char path[256]; /* for messages */
  rg_dtype dtype; /* RG_F32 or RG_I32 */
  int rank;
  int64_t dim[NPY_MAX_RANK];
  int64_t elements;
} npy_reader;

/* Parses the text of a header (size bytes, borrowed) into *r; path must be set. */
rg_status npy_parse_header(npy_reader *r, const char *text, size_t size, rg_error *e);
/* Opens and checks; on failure nothing stays open. */
rg_status npy_open(npy_reader *r, const char *path, rg_error *e);
/* Reads all elements into dst, rounded to `dtype` (i32 arrays only to RG_I32). The file must end
 * there. */
rg_status npy_read(npy_reader *r, rg_dtype dtype, void *dst, rg_error *e);
void npy_close(npy_reader *r); /* fine on a zeroed or closed one */

/* Writes src (dense, borrowed) as float32, or int32 for RG_I32; on failure what was there stays
 * (save.h). */
rg_status npy_write(const char *path, rg_dtype dtype, int rank, const int64_t *dim, const void *src,
                    rg_error *e);

#endif
