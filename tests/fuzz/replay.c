/* tests/fuzz/replay.c: runs a fuzz target over every file of a corpus folder, without libFuzzer. */
#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static int replay(const char *path) {
  FILE *f = fopen(path, "rb");
  if (!f) {
    fprintf(stderr, "replay: cannot open %s\n", path);
    return 1;
  }
  static uint8_t data[1 << 20];
  size_t size = fread(data, 1, sizeof data, f);
  fclose(f);
  uint8_t *exact = malloc(size ? size : 1); /* so that a sanitizer sees reads past the end */
  if (!exact) return 1;
  for (size_t i = 0; i < size; i++) exact[i] = data[i];
  LLVMFuzzerTestOneInput(exact, size);
  free(exact);
  return 0;
}

int main(int argc, char **argv) {
  int files = 0, failed = 0;
  for (int i = 1; i < argc; i++) {
    DIR *folder = opendir(argv[i]);
    if (!folder) {
      fprintf(stderr, "replay: no folder %s\n", argv[i]);
      return 1;
    }
    for (struct dirent *entry; (entry = readdir(folder));) {
      char path[4096];
      if (entry->d_name[0] == '.') continue;
      snprintf(path, sizeof path, "%s/%s", argv[i], entry->d_name);
      failed += replay(path);
      files++;
    }
    closedir(folder);
  }
  printf("%d inputs replayed\n", files);
  return failed || files == 0;
}
