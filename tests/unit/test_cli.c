/* The command's own parts: .npy files, drawn arrays, the argument table and what is printed from
 * it. Linked with the files of cli/ but main.c. */
#include "../../cli/cli.h"
#include "../../cli/data.h"
#include "../../cli/npy.h"
#include "scratch.h"
#include <criterion/criterion.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- .npy headers ---- */

static rg_status parse_header(const char *text, npy_reader *r) {
  rg_error e = {0};
  *r = (npy_reader){.path = "a.npy"};
  rg_status s = npy_parse_header(r, text, strlen(text), &e);
  cr_assert_eq(s, e.status, "status and error differ for %s", text);
  cr_assert(s == RG_OK || (strcmp(e.file, "a.npy") == 0 && e.message[0]), "a bare error for %s",
            text);
  return s;
}

Test(npy, accepts_what_numpy_writes) {
  static const struct {
    const char *text;
    rg_dtype dtype;
    int rank;
    int64_t dim[4], elements;
  } good[] = {
      {"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3, 4), }   \n",
       RG_F32,
       3,
       {2, 3, 4},
       24},
      {"{'descr': '<i4', 'fortran_order': False, 'shape': (5,), }\n", RG_I32, 1, {5}, 5},
      {"{'descr': '<f4', 'fortran_order': False, 'shape': (), }\n", RG_F32, 0, {0}, 1},
      {"{'descr': '<f4', 'fortran_order': False, 'shape': (0, 7), }\n", RG_F32, 2, {0, 7}, 0},
      {"{'descr': '<f4', 'fortran_order': False, 'shape': (9223372036854775807, 0), }\n",
       RG_F32,
       2,
       {INT64_MAX, 0},
       0},
      {"{\"shape\":(2,2,),\"descr\":\"<f4\",\"fortran_order\":False}", RG_F32, 2, {2, 2}, 4},
      {"{'descr': '<f4', 'fortran_order': True, 'shape': (6,), }\n", RG_F32, 1, {6}, 6},
  };
  for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
    npy_reader r;
    cr_assert_eq(parse_header(good[i].text, &r), RG_OK, "%s", good[i].text);
    cr_assert_eq(r.dtype, good[i].dtype);
    cr_assert_eq(r.rank, good[i].rank);
    cr_assert_eq(r.elements, good[i].elements);
    for (int j = 0; j < r.rank; j++) cr_assert_eq(r.dim[j], good[i].dim[j]);
  }
}

Test(npy, rejects_everything_else) {
#define SHAPE(s) "{'descr': '<f4', 'fortran_order': False, 'shape': " s ", }\n"
#define DESCR(s) "{'descr': " s ", 'fortran_order': False, 'shape': (2,), }\n"
  static const struct {
    const char *text;
    rg_status status;
  } bad[] = {
      {"", RG_E_SYNTAX},
      {"{", RG_E_SYNTAX},
      {"[]", RG_E_SYNTAX},
      {"{}", RG_E_SYNTAX},
      {"{'descr': '<f4', 'shape': (2,), }", RG_E_SYNTAX},
      {"{'descr': '<f4', 'fortran_order': False, }", RG_E_SYNTAX},
      {"{'fortran_order': False, 'shape': (2,), }", RG_E_SYNTAX},
      {"{'descr': '<f4', 'descr': '<f4', 'fortran_order': False, 'shape': (2,), }", RG_E_SYNTAX},
      {"{'descr': '<f4', 'fortran_order': False, 'shape': (2,), 'more': 1}", RG_E_SYNTAX},
      {"{'descr': '<f4', 'fortran_order': Maybe, 'shape': (2,), }", RG_E_SYNTAX},
      {"{'descr': '<f4' 'fortran_order': False, 'shape': (2,), }", RG_E_SYNTAX},
      {"{'descr': '<f4', 'fortran_order': False, 'shape': (2,), } x", RG_E_SYNTAX},
      {"{'descr': '<f4', 'fortran_order': False, 'shape': (2,)", RG_E_SYNTAX},
      {"{'descr': '<f4', 'fortran_order': True, 'shape': (2, 2), }", RG_E_SHAPE},
      {DESCR("'<f8'"), RG_E_DTYPE},
      {DESCR("'>f4'"), RG_E_DTYPE},
      {DESCR("'<i8'"), RG_E_DTYPE},
      {DESCR("'|O'"), RG_E_DTYPE},
      {DESCR("[('a', '<f4')]"), RG_E_DTYPE},
      {DESCR("'<f4"), RG_E_DTYPE},
      {SHAPE("(3)"), RG_E_SYNTAX},
      {SHAPE("3"), RG_E_SYNTAX},
      {SHAPE("(-3,)"), RG_E_SYNTAX},
      {SHAPE("(3.0,)"), RG_E_SYNTAX},
      {SHAPE("(3 4)"), RG_E_SYNTAX},
      {SHAPE("(,)"), RG_E_SYNTAX},
      {SHAPE("(3,"), RG_E_SYNTAX},
      {SHAPE("(99999999999999999999,)"), RG_E_LIMIT},
      {SHAPE("(4294967296, 4294967296)"), RG_E_LIMIT},
      {SHAPE("(1099511627777,)"), RG_E_LIMIT},
      {SHAPE("(1, 1, 1, 1, 1, 1, 1, 1, 1)"), RG_E_RANK},
  };
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
    npy_reader r;
    cr_assert_eq(parse_header(bad[i].text, &r), bad[i].status, "%s", bad[i].text);
  }
}

/* A prefix of a good header is never good, and never read past its end (sanitizers watch the
 * copy). */
Test(npy, every_prefix_fails) {
  const char *whole = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }";
  for (size_t n = 0; n < strlen(whole); n++) {
    char *copy = malloc(n + 1);
    memcpy(copy, whole, n);
    npy_reader r = {.path = "a.npy"};
    rg_error e = {0};
    char *exact = realloc(copy, n ? n : 1);
    cr_assert_neq(npy_parse_header(&r, exact, n, &e), RG_OK, "the first %zu bytes pass", n);
    free(exact);
  }
}

/* ---- .npy files ---- */

Test(npy, bytes_are_numpys) {
  scratch s = begin();
  const float x[3] = {1, -2, 0.5f};
  const int64_t dim[1] = {3};
  rg_error e = {0};
  cr_assert_eq(npy_write(s.path, RG_F32, 1, dim, x, &e), RG_OK, "%s", e.message);
  unsigned char want[140], have[141];
  memset(want, ' ', sizeof want);
  memcpy(want, "\x93NUMPY\x01\x00\x76\x00", 10); /* as numpy.save of [1, -2, .5] */
  memcpy(want + 10, "{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }", 57);
  want[127] = '\n';
  memcpy(want + 128, "\x00\x00\x80\x3f\x00\x00\x00\xc0\x00\x00\x00\x3f", 12);
  FILE *f = fopen(s.path, "rb");
  cr_assert_eq(fread(have, 1, sizeof have, f), sizeof want);
  fclose(f);
  cr_assert_arr_eq(have, want, sizeof want);
  end(&s);
}

Test(npy, round_trip) {
  scratch s = begin();
  enum { N = 20000 }; /* more than one chunk */
  static const int64_t dims[][3] = {{N, 1, 1}, {100, 200, 1}, {10, 20, 100}, {1, 1, 1}, {0, 5, 2}};
  static const rg_dtype types[] = {RG_F32, RG_F16, RG_BF16, RG_I32};
  for (size_t i = 0; i < 5; i++) {
    for (int t = 0; t < 4; t++) {
      for (int rank = i == 0 ? 1 : 3; rank <= 3; rank++) {
        const int64_t n = dims[i][0] * dims[i][1] * dims[i][2];
        const size_t size = rg_dtype_size(types[t]);
        char *x = malloc((size_t)n * size + 1), *y = malloc((size_t)n * size + 1);
        if (types[t] == RG_I32)
          for (int64_t j = 0; j < n; j++) ((int32_t *)x)[j] = (int32_t)(j * 7919 - 5);
        else
          data_draw(1, "x", types[t], x, n, 1);
        rg_error e = {0};
        npy_reader r;
        cr_assert_eq(npy_write(s.path, types[t], rank, dims[i], x, &e), RG_OK, "%s", e.message);
        cr_assert_eq(npy_open(&r, s.path, &e), RG_OK, "%s", e.message);
        cr_assert_eq(r.dtype, types[t] == RG_I32 ? RG_I32 : RG_F32);
        cr_assert_eq(r.rank, rank);
        cr_assert_eq(r.elements, n);
        cr_assert_eq(npy_read(&r, types[t], y, &e), RG_OK, "%s", e.message);
        cr_assert(r.file == NULL);
        cr_assert_eq(memcmp(x, y, (size_t)n * size), 0);
        free(x);
        free(y);
      }
    }
  }
  end(&s);
}

static rg_status open_bytes(const scratch *s, const void *data, size_t n) {
  rg_error e = {0};
  npy_reader r;
  put(s, data, n);
  rg_status status = npy_open(&r, s->path, &e);
  if (status == RG_OK) npy_close(&r);
  cr_assert_eq(r.file, NULL);
  return status;
}

Test(npy, damaged_files) {
  scratch s = begin();
  const float x[6] = {0};
  const int64_t dim[2] = {2, 3};
  unsigned char good[256];
  rg_error e = {0};
  npy_reader r;
  cr_assert_eq(npy_write(s.path, RG_F32, 2, dim, x, &e), RG_OK);
  FILE *f = fopen(s.path, "rb");
  size_t n = fread(good, 1, sizeof good, f);
  fclose(f);
  cr_assert_eq(n, 128 + 24);
  for (size_t k = 0; k < n; k++)
    cr_assert_eq(open_bytes(&s, good, k), RG_E_SYNTAX, "%zu bytes of %zu pass", k, n);
  cr_assert_eq(open_bytes(&s, good, n), RG_OK);
  good[n] = 0;
  cr_assert_eq(open_bytes(&s, good, n + 1), RG_E_SYNTAX);
  good[6] = 3; /* version 3.0 */
  cr_assert_eq(open_bytes(&s, good, n), RG_E_SYNTAX);
  /* version 2.0 has a length of four bytes: those of version 1.0 and two of the text */
  good[6] = 2;
  cr_assert_eq(open_bytes(&s, good, n), RG_E_LIMIT);
  unsigned char two[256] = "\x93NUMPY\x02";
  const uint32_t length = 118;
  memcpy(two + 8, &length, 4);
  memcpy(two + 12, good + 10, n - 10);
  cr_assert_eq(open_bytes(&s, two, n + 2), RG_OK);
  end(&s);
  cr_assert_eq(npy_open(&r, "/nowhere/a.npy", &e), RG_E_IO);
}

/* Of a pipe nobody knows the length beforehand. */
Test(npy, pipes) {
  unsigned char bytes[152] = "\x93NUMPY\x01";
  bytes[8] = 118;
  memset(bytes + 10, ' ', 118);
  memcpy(bytes + 10, "{'descr': '<f4', 'fortran_order': False, 'shape': (6,)}", 55);
  for (int extra = -1; extra <= 1; extra++) {
    int ends[2];
    char path[64];
    cr_assert_eq(pipe(ends), 0);
    cr_assert_eq(write(ends[1], bytes, extra < 0 ? 151 : 152), extra < 0 ? 151 : 152);
    if (extra > 0) cr_assert_eq(write(ends[1], bytes, 1), 1);
    close(ends[1]);
    snprintf(path, sizeof path, "/dev/fd/%d", ends[0]);
    rg_error e = {0};
    npy_reader r;
    float x[6];
    cr_assert_eq(npy_open(&r, path, &e), RG_OK, "%s", e.message);
    cr_assert_eq(npy_read(&r, RG_F32, x, &e), extra ? RG_E_SYNTAX : RG_OK);
    npy_close(&r);
    close(ends[0]);
  }
}

Test(npy, types_do_not_mix) {
  scratch s = begin();
  const int32_t x[2] = {1, 2};
  const int64_t dim[1] = {2};
  float y[2];
  rg_error e = {0};
  npy_reader r;
  cr_assert_eq(npy_write(s.path, RG_I32, 1, dim, x, &e), RG_OK);
  cr_assert_eq(npy_open(&r, s.path, &e), RG_OK);
  cr_assert_eq(npy_read(&r, RG_F32, y, &e), RG_E_DTYPE);
  npy_close(&r);
  end(&s);
}

Test(npy, a_failed_write_leaves_nothing) {
  const float x[1] = {0};
  const int64_t dim[1] = {1};
  rg_error e = {0};
  cr_assert_eq(npy_write("/nowhere/a.npy", RG_F32, 1, dim, x, &e), RG_E_IO);
  if (access("/dev/full", W_OK) != 0) cr_skip_test("no /dev/full here");
  rg_error full = {0};
  cr_assert_eq(npy_write("/dev/full", RG_F32, 1, dim, x, &full), RG_E_IO);
  cr_assert_eq(access("/dev/full", F_OK), 0);
}

/* ---- drawing ---- */

/* The formula in data.c, read from its comment. */
static uint64_t oracle_z(uint64_t key, uint64_t n) {
  uint64_t x = key;
  for (uint64_t i = 0; i <= n; i++) x += UINT64_C(0x9e3779b97f4a7c15);
  x ^= x >> 30;
  x *= UINT64_C(0xbf58476d1ce4e5b9);
  x ^= x >> 27;
  x *= UINT64_C(0x94d049bb133111eb);
  return x ^ x >> 31;
}

Test(draw, follows_the_formula) {
  /* FNV-1a of "a" and splitmix64's first output from 0, as published */
  const uint64_t fnv_a = UINT64_C(0xaf63dc4c8601ec8c);
  cr_assert_eq(oracle_z(0, 0), UINT64_C(0xe220a8397b1dcdaf));
  float x[10];
  data_normal(7, "a", 0, x, 10);
  for (uint64_t i = 0; i < 10; i++) {
    uint64_t key = 7 ^ fnv_a, a = oracle_z(key, i / 2 * 2), b = oracle_z(key, i / 2 * 2 + 1);
    double u1 = ldexp((double)(a >> 11) + 0.5, -53), u2 = ldexp((double)(b >> 11), -53);
    double r = sqrt(-2 * log(u1)), angle = 2 * acos(-1) * u2;
    cr_assert_float_eq(x[i], r * (i % 2 ? sin(angle) : cos(angle)), 1e-6, "element %d", (int)i);
  }
}

Test(draw, depends_on_index_alone) {
  enum { N = 200001 };
  float *whole = malloc(N * sizeof *whole), *part = malloc(N * sizeof *part);
  uint16_t *half = malloc(N * sizeof *half);
  data_normal(3, "q", 0, whole, N);
  for (int64_t first = 1; first < 40; first++) {
    data_normal(3, "q", first, part, 17);
    cr_assert_arr_eq(part, whole + first, 17 * sizeof *part);
  }
  for (int threads = 1; threads <= 9; threads += 4) {
    data_draw(3, "q", RG_F32, part, N, threads);
    cr_assert_eq(memcmp(part, whole, N * sizeof *part), 0, "%d threads", threads);
  }
  data_draw(3, "q", RG_BF16, half, N, 2);
  for (int64_t i = 0; i < N; i++) {
    uint16_t want;
    rg_convert(RG_BF16, &want, RG_F32, &whole[i], 1);
    cr_assert_eq(half[i], want);
  }
  free(whole);
  free(part);
  free(half);
}

Test(draw, is_normal_and_independent) {
  enum { N = 1 << 18 };
  float *x = malloc(N * sizeof *x), *y = malloc(N * sizeof *y);
  static const struct {
    uint64_t seed;
    const char *name;
  } other[] = {{1, "q"}, {0, "k"}, {0, "grad.q"}, {UINT64_MAX, "q"}};
  data_normal(0, "q", 0, x, N);
  double moment[5] = {0}, lag = 0;
  for (int i = 0; i < N; i++)
    for (int p = 1; p <= 4; p++) moment[p] += pow(x[i], p) / N;
  for (int i = 1; i < N; i++) lag += x[i] * x[i - 1] / N;
  /* bounds: five standard errors */
  cr_assert_float_eq(moment[1], 0, 5 / sqrt(N));
  cr_assert_float_eq(moment[2], 1, 5 * sqrt(2.0 / N));
  cr_assert_float_eq(moment[3], 0, 5 * sqrt(15.0 / N));
  cr_assert_float_eq(moment[4], 3, 5 * sqrt(96.0 / N));
  cr_assert_float_eq(lag, 0, 5 / sqrt(N));
  for (size_t k = 0; k < sizeof other / sizeof *other; k++) {
    double dot = 0;
    data_normal(other[k].seed, other[k].name, 0, y, N);
    for (int i = 0; i < N; i++) dot += (double)x[i] * y[i] / N;
    cr_assert_float_eq(dot, 0, 5 / sqrt(N), "seed %llu, name %s", (unsigned long long)other[k].seed,
                       other[k].name);
  }
  free(x);
  free(y);
}

Test(draw, near_equal_sequences) {
  int32_t cu[9];
  for (int64_t tokens = 0; tokens < 40; tokens++) {
    for (int64_t n = 1; n <= 8; n++) {
      data_sequences(tokens, n, cu);
      cr_assert_eq(cu[0], 0);
      cr_assert_eq(cu[n], tokens);
      for (int64_t b = 0; b < n; b++) {
        int32_t length = cu[b + 1] - cu[b];
        cr_assert(length == tokens / n || length == tokens / n + 1);
      }
    }
  }
  cu[1] = 99;
  data_sequences(5, 0, cu);
  cr_assert_eq(cu[0], 0);
  cr_assert_eq(cu[1], 99);
}

Test(draw, summary) {
  const float x[6] = {1, -3, NAN, 2, INFINITY, 4};
  const int32_t n[3] = {-1, 5, 2};
  data_summary y;
  data_summarise(RG_F32, x, 6, &y);
  cr_assert_eq(y.nonfinite, 2);
  cr_assert_float_eq(y.mean, 1, 1e-12);
  cr_assert_float_eq(y.rms, sqrt(7.5), 1e-12);
  cr_assert_eq(y.min, -3);
  cr_assert_eq(y.max, 4);
  data_summarise(RG_I32, n, 3, &y);
  cr_assert_float_eq(y.mean, 2, 1e-12);
  cr_assert_eq(y.min, -1);
  data_summarise(RG_F32, x, 0, &y);
  cr_assert(isnan(y.mean) && isnan(y.max), "nothing has no mean");
}

/* ---- arguments ---- */

static rg_status parse(const char *line, cli_args *a, rg_error *e, char *copy, size_t size) {
  char *argv[32] = {"regraph"};
  int argc = 1;
  snprintf(copy, size, "%s", line);
  for (char *word = strtok(copy, " "); word; word = strtok(NULL, " ")) argv[argc++] = word;
  *e = (rg_error){0};
  return cli_parse(argc, argv, a, e);
}

Test(arguments, land_in_their_fields) {
  cli_args a;
  rg_error e;
  char copy[512];
  cr_assert_eq(parse("run s.json --set T=4 --set=B=2 --in q=q.npy --seed 0xff --policy p.json "
                     "--threads 3 --json "
                     "--grad-out q=dq.npy",
                     &a, &e, copy, sizeof copy),
               RG_OK, "%s", e.message);
  cr_assert_str_eq(a.command->name, "run");
  cr_assert_str_eq(a.positional[0], "s.json");
  cr_assert_eq(a.set.n, 2);
  cr_assert_str_eq(a.set.item[1], "B=2");
  cr_assert_str_eq(a.in.item[0], "q=q.npy");
  cr_assert_str_eq(a.grad_out.item[0], "q=dq.npy");
  cr_assert_eq(a.seed, 255);
  cr_assert_eq(a.threads, 3);
  cr_assert(a.json && !a.backward);
  cr_assert_str_eq(a.device, "cpu");
  cli_args_free(&a);
  cr_assert_eq(
      parse("pack f.csv --capacity 3MiB --limit 0.5 --out=o.csv", &a, &e, copy, sizeof copy),
      RG_OK);
  cr_assert_eq(a.capacity, 3 << 20);
  static const struct {
    const char *line;
    int64_t bytes;
  } sizes[] = {{"pack f.csv --capacity 64KB", 64000},
               {"pack f.csv --capacity 64kB", 64000},
               {"pack f.csv --capacity 64KiB", 65536},
               {"pack f.csv --capacity 64K", 65536},
               {"pack f.csv --capacity 1.5GiB", INT64_C(3) << 29}};
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
    cli_args z;
    char text[64];
    cr_assert_eq(parse(sizes[i].line, &z, &e, text, sizeof text), RG_OK, "%s: %s", sizes[i].line,
                 e.message);
    cr_assert_eq(z.capacity, sizes[i].bytes, "%s", sizes[i].line);
    cli_args_free(&z);
  }
  cr_assert_float_eq(a.limit, 0.5, 0);
  cr_assert_str_eq(a.out.item[0], "o.csv");
  cli_args_free(&a);
  cr_assert_eq(parse("check -- --odd.json", &a, &e, copy, sizeof copy), RG_OK);
  cr_assert_str_eq(a.positional[0], "--odd.json");
  cli_args_free(&a);
}

Test(arguments, mistakes_are_explained) {
  static const struct {
    const char *line, *says;
  } bad[] = {
      {"pln s.json", "did you mean 'plan'"},
      {"chekc s.json", "did you mean 'check'"},
      {"plan s.json --jsno", "did you mean '--json'"},
      {"plan s.json --x", "see 'regraph plan --help'"},
      {"xyzzy", "see 'regraph help'"},
      {"--hlp", "unknown flag '--hlp'"},
      {"run s.json --seedd 4", "did you mean '--seed'"},
      {"run s.json --polcy=x", "unknown flag '--polcy'; did you mean '--policy'"},
      {"plan s.json --in q=q.npy", "unknown flag '--in'"},
      {"plan", "missing argument"},
      {"plan a.json b.json", "unexpected argument 'b.json'"},
      {"plan s.json --policy", "--policy needs a value"},
      {"plan s.json --json=yes", "--json takes no value"},
      {"plan s.json --device gpu", "expected cpu|cuda"},
      {"plan s.json --device cp", "expected cpu|cuda"},
      {"plan s.json --threads 0", "expected an integer of at least 1"},
      {"plan s.json --threads 99999999999999999999", "expected an integer"},
      {"plan s.json --threads 2x", "expected an integer"},
      {"plan s.json --limit nan", "positive number of seconds"},
      {"plan s.json --limit -1", "positive number of seconds"},
      {"run s.json --seed -1", "unsigned 64-bit integer"},
      {"run s.json --seed 18446744073709551616", "unsigned 64-bit integer"},
      {"pack f.csv --capacity 9999999TiB", "expected bytes"},
      {"pack f.csv --capacity 3XB", "expected bytes"},
      {"bench s.json --repeat 0", "expected an integer of at least 1"},
  };
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
    cli_args a;
    rg_error e;
    char copy[256];
    cr_assert_eq(parse(bad[i].line, &a, &e, copy, sizeof copy), RG_E_USAGE, "%s", bad[i].line);
    cr_assert(strstr(e.message, bad[i].says), "'%s' says: %s", bad[i].line, e.message);
    cli_args_free(&a);
  }
}

Test(arguments, name_and_rest) {
  char name[8];
  const char *rest;
  cr_assert(cli_split("T=4=5", name, sizeof name, &rest));
  cr_assert_str_eq(name, "T");
  cr_assert_str_eq(rest, "4=5");
  static const char *const bad[] = {"", "T", "=4", "T=", " T=4", "T =4", "longname=4"};
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
    cr_assert(!cli_split(bad[i], name, sizeof name, &rest));
}

Test(arguments, median) {
  double odd[] = {5, 1, 3}, even[] = {4, 1, 3, 2};
  cr_assert_eq(cli_median(odd, 3), 3);
  cr_assert_eq(cli_median(even, 4), 2.5);
  cr_assert_eq(cli_median(NULL, 0), 0);
}

/* ---- what is printed from the table ---- */

static char *printed(void (*print)(FILE *)) {
  char *text;
  size_t size;
  FILE *f = open_memstream(&text, &size);
  print(f);
  fclose(f);
  return text;
}
static void every_help(FILE *f) {
  for (int i = 0; i < cli_ncommand; i++) cli_print_help(f, &cli_commands[i]);
}

Test(table, is_sound) {
  for (int i = 0; i < cli_nflag; i++) {
    const cli_flag *f = &cli_flags[i];
    cr_assert(strncmp(f->name, "--", 2) == 0 && f->doc[0] && f->commands);
    cr_assert_eq(f->arg == NULL, f->kind == CLI_SWITCH, "%s", f->name);
    cr_assert_eq(f->commands >> cli_ncommand, 0, "%s belongs to no such command", f->name);
    for (int j = 0; j < i; j++)
      cr_assert(strcmp(f->name, cli_flags[j].name) != 0 ||
                    (f->commands & cli_flags[j].commands) == 0,
                "%s stands twice", f->name);
  }
  for (int i = 0; i < cli_ncommand; i++) {
    cr_assert(cli_commands[i].run && cli_commands[i].doc[0] && cli_commands[i].detail[0]);
    cr_assert_eq(cli_find_command(cli_commands[i].name), &cli_commands[i]);
    cr_assert_leq(cli_commands[i].max, CLI_MOST_POSITIONAL);
  }
}

Test(table, reaches_help_man_and_completion) {
  char *help = printed(every_help), *man = printed(cli_print_man), *bash = printed(cli_print_bash);
  for (int i = 0; i < cli_nflag; i++) {
    char dashed[64] = "\\fB";
    size_t n = 3;
    for (const char *p = cli_flags[i].name; *p; p++) {
      if (*p == '-') dashed[n++] = '\\';
      dashed[n++] = *p;
    }
    dashed[n] = 0;
    cr_assert(strstr(help, cli_flags[i].name), "help lacks %s", cli_flags[i].name);
    cr_assert(strstr(man, dashed), "the man page lacks %s", cli_flags[i].name);
    cr_assert(strstr(bash, cli_flags[i].name), "the completion lacks %s", cli_flags[i].name);
  }
  for (int i = 0; i < cli_ncommand; i++) {
    char entry[64];
    snprintf(entry, sizeof entry, "usage: regraph %s ", cli_commands[i].name);
    cr_assert(strstr(help, entry));
    snprintf(entry, sizeof entry, ".SS \"%s ", cli_commands[i].name);
    cr_assert(strstr(man, entry));
    snprintf(entry, sizeof entry, "    %s) flags=", cli_commands[i].name);
    cr_assert(strstr(bash, entry));
  }
  for (const char *line = help; *line; line += strcspn(line, "\n") + 1)
    cr_assert(strcspn(line, "\n") <= 80, "a line of the help is too long: %.*s",
              (int)strcspn(line, "\n"), line);
  free(help);
  free(man);
  free(bash);
}

Test(text, json_and_bytes) {
  char *text, buffer[32];
  size_t size;
  FILE *f = open_memstream(&text, &size);
  cli_json_string(f, "a\"b\\c\n");
  cli_json_number(f, 0.5);
  cli_json_number(f, NAN);
  fclose(f);
  cr_assert_str_eq(text, "\"a\\\"b\\\\c\\u000a\"0.5null");
  free(text);
  cr_assert_str_eq(rg_human_bytes(1000, buffer), "1000 B");
  cr_assert_str_eq(rg_human_bytes(INT64_C(3) << 29, buffer), "1.50 GiB");
  cr_assert_str_eq(rg_human_bytes(97475000, buffer), "93.0 MiB");
}

Test(text, files) {
  scratch s = begin();
  cli c = {0};
  cr_assert_eq(cli_write_file(&c, s.path, "hello", 5), RG_OK);
  cr_assert(!c.write_failed);
  struct stat st;
  cr_assert(stat(s.path, &st) == 0 && st.st_size == 5);
  cr_assert_eq(cli_write_file(&c, "/nowhere/x", "hello", 5), RG_E_IO);
  cr_assert(c.write_failed);
  end(&s);
}

/* ---- what is waited for ---- */

Test(progress, text) {
  static const struct {
    cli_wait wait;
    const char *text;
  } want[] = {
      {{.stage = "packing"}, "packing ..."},
      {{.stage = "packing", .passed = 1.9, .expected = 60, .most = true}, "packing ..."},
      {{.stage = "packing", .passed = 3.2, .expected = 60, .most = true},
       "packing 3 s of at most 60 s"},
      {{.stage = "running", .passed = 12}, "running 12 s"},
      {{.stage = "running", .passed = 12, .expected = 40}, "running, about 28 s left"},
      {{.stage = "running", .passed = 52, .expected = 40},
       "running 52 s, longer than the 40 s expected"},
      {{.stage = "timing", .passed = 1, .said = 1, .done = 1, .total = 4}, "timing  25 %"},
      {{.stage = "timing", .passed = 10, .said = 10, .done = 1, .total = 4},
       "timing  25 %, 30 s left"},
      /* time goes on while nothing is said */
      {{.stage = "timing", .passed = 16, .said = 10, .done = 1, .total = 4},
       "timing  25 %, 24 s left"},
      {{.stage = "timing", .passed = 90, .said = 10, .done = 1, .total = 4}, "timing  25 % 90 s"},
      {{.stage = "timing", .passed = 3000, .said = 3000, .done = 3, .total = 9},
       "timing  33 %, 100 min 00 s left"},
      {{.stage = "timing", .passed = 9000, .said = 9000, .done = 1, .total = 2},
       "timing  50 %, 2 h 30 min left"},
      {{.stage = "timing", .passed = 9, .said = 9, .done = 2, .total = 2}, "timing 100 % 9 s"},
  };
  for (size_t i = 0; i < sizeof want / sizeof *want; i++) {
    char text[128], small[12];
    cli_progress_text(&want[i].wait, text, sizeof text);
    cr_assert_str_eq(text, want[i].text);
    cli_progress_text(&want[i].wait, small, sizeof small);
    cr_assert(strlen(small) < sizeof small && strncmp(text, small, strlen(small)) == 0);
  }
}
