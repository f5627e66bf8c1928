/* tests/unit/scratch.h: a folder of its own for a test that writes files, and one file in it. */
#ifndef SCRATCH_H
#define SCRATCH_H

#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

typedef struct scratch {
  char dir[64], path[96];
} scratch;

static inline scratch begin(void) {
  scratch s = {.dir = "/tmp/regraph-cli-XXXXXX"};
  cr_assert(mkdtemp(s.dir));
  snprintf(s.path, sizeof s.path, "%s/a.npy", s.dir);
  return s;
}
static inline void end(const scratch *s) {
  unlink(s->path);
  rmdir(s->dir);
}
static inline void put(const scratch *s, const void *data, size_t n) {
  FILE *f = fopen(s->path, "wb");
  cr_assert(f && fwrite(data, 1, n, f) == n && fclose(f) == 0);
}

#endif
