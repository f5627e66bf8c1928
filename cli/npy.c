/* cli/npy.c: reads and writes .npy files. Layout of one (version 1; in version 2 the length has 4
   bytes):

       0        6    8       10                                    10 + length
       | \x93NUMPY | 1 0 | length | {'descr': '<f4', … }   \n | elements, last axis fastest
 */
#include "npy.h"
#include "cli.h"
#include "save.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define NPY_MAX_HEADER   (1 << 20)
#define NPY_MAX_ELEMENTS (INT64_C(1) << 40)
#define NPY_CHUNK        16384 /* elements converted at a time */

/* ---- the header: a Python dictionary of three known keys ---- */

typedef struct cursor {
  const char *at, *end;
} cursor;

static void skip_space(cursor *c) {
  while (c->at < c->end && (*c->at == ' ' || *c->at == '\t' || *c->at == '\n' || *c->at == '\r'))
    c->at++;
}

static bool accept(cursor *c, char ch) {
  skip_space(c);
  if (c->at >= c->end || *c->at != ch) return false;
  c->at++;
  return true;
}

/* A quoted word without escapes. */
static bool take_string(cursor *c, char *out, size_t size) {
  skip_space(c);
  if (c->at >= c->end || (*c->at != '\'' && *c->at != '"')) return false;
  char quote = *c->at++;
  size_t n = 0;
  while (c->at < c->end && *c->at != quote) {
    if (*c->at == '\\' || *c->at == '\n' || n + 1 >= size) return false;
    out[n++] = *c->at++;
  }
  out[n] = 0;
  return accept(c, quote);
}

static bool take_word(cursor *c, const char *word) {
  skip_space(c);
  size_t n = strlen(word);
  if ((size_t)(c->end - c->at) < n || memcmp(c->at, word, n) != 0) return false;
  c->at += n;
  return true;
}

static rg_status take_shape(npy_reader *r, cursor *c, rg_error *e) {
  if (!accept(c, '('))
    return cli_fail(e, RG_E_SYNTAX, r->path, "the header's shape is not a tuple");
  r->rank = 0;
  while (!accept(c, ')')) {
    skip_space(c);
    int64_t x = 0;
    const char *start = c->at;
    for (; c->at < c->end && *c->at >= '0' && *c->at <= '9'; c->at++)
      if (__builtin_mul_overflow(x, 10, &x) || __builtin_add_overflow(x, *c->at - '0', &x))
        return cli_fail(e, RG_E_LIMIT, r->path,
                        "an extent in the header's shape does not fit 64 bits");
    if (c->at == start)
      return cli_fail(e, RG_E_SYNTAX, r->path,
                      "the header's shape holds something else than extents");
    if (r->rank == NPY_MAX_RANK)
      return cli_fail(e, RG_E_RANK, r->path, "the array has more than %d axes", NPY_MAX_RANK);
    r->dim[r->rank++] = x;
    bool comma = accept(c, ',');
    skip_space(c);
    bool closes = c->at < c->end && *c->at == ')';
    if (comma ? false : !closes || r->rank == 1) /* "(3)" is a number in Python, not a tuple */
      return cli_fail(e, RG_E_SYNTAX, r->path, "the header's shape is not a tuple of extents");
  }
  return RG_OK;
}

static rg_status take_descr(npy_reader *r, cursor *c, rg_error *e) {
  char descr[32];
  if (!take_string(c, descr, sizeof descr))
    return cli_fail(e, RG_E_DTYPE, r->path,
                    "the array's elements have no simple type; expected float32 or int32");
  if (strcmp(descr, "<f4") == 0) {
    r->dtype = RG_F32;
  } else if (strcmp(descr, "<i4") == 0) {
    r->dtype = RG_I32;
  } else {
    return cli_fail(e, RG_E_DTYPE, r->path,
                    "elements are '%s'; expected little-endian float32 ('<f4') or int32 ('<i4')",
                    descr);
  }
  return RG_OK;
}

rg_status npy_parse_header(npy_reader *r, const char *text, size_t size, rg_error *e) {
  cursor c = {text, text + size};
  bool descr = false, order = false, shape = false, fortran = false;
  if (!accept(&c, '{')) return cli_fail(e, RG_E_SYNTAX, r->path, "the header is not a dictionary");
  while (!accept(&c, '}')) {
    char key[32];
    if (!take_string(&c, key, sizeof key) || !accept(&c, ':'))
      return cli_fail(e, RG_E_SYNTAX, r->path, "the header is not a dictionary of named entries");
    bool *seen = strcmp(key, "descr") == 0           ? &descr
                 : strcmp(key, "fortran_order") == 0 ? &order
                 : strcmp(key, "shape") == 0         ? &shape
                                                     : NULL;
    if (!seen)
      return cli_fail(e, RG_E_SYNTAX, r->path, "the header has an unknown entry '%s'", key);
    if (*seen) return cli_fail(e, RG_E_SYNTAX, r->path, "the header gives '%s' twice", key);
    *seen = true;
    rg_status s = RG_OK;
    if (seen == &descr) {
      s = take_descr(r, &c, e);
    } else if (seen == &shape) {
      s = take_shape(r, &c, e);
    } else {
      fortran = take_word(&c, "True");
      if (!fortran && !take_word(&c, "False"))
        s = cli_fail(e, RG_E_SYNTAX, r->path,
                     "the header's fortran_order is neither True nor False");
    }
    if (s != RG_OK) return s;
    if (!accept(&c, ',')) {
      if (!accept(&c, '}'))
        return cli_fail(e, RG_E_SYNTAX, r->path, "the header's dictionary does not end");
      break;
    }
  }
  skip_space(&c);
  if (c.at != c.end)
    return cli_fail(e, RG_E_SYNTAX, r->path, "the header goes on after its dictionary");
  if (!descr || !order || !shape)
    return cli_fail(e, RG_E_SYNTAX, r->path, "the header lacks '%s'",
                    !descr   ? "descr"
                    : !order ? "fortran_order"
                             : "shape");
  if (fortran && r->rank > 1)
    return cli_fail(e, RG_E_SHAPE, r->path,
                    "the array is in Fortran order; save numpy.ascontiguousarray(a)");
  r->elements = 1;
  for (int i = 0; i < r->rank; i++)
    if (r->dim[i] == 0) r->elements = 0;
  for (int i = 0; i < r->rank && r->elements; i++)
    if (__builtin_mul_overflow(r->elements, r->dim[i], &r->elements) ||
        r->elements > NPY_MAX_ELEMENTS)
      return cli_fail(e, RG_E_LIMIT, r->path, "the header claims more than 2^40 elements");
  return RG_OK;
}

/* ---- reading ---- */

static rg_status open_checked(npy_reader *r, rg_error *e) {
  unsigned char head[12];
  const size_t got = fread(head, 1, 8, r->file);
  if (ferror(r->file)) return cli_fail(e, RG_E_IO, r->path, "can't be read: %s", strerror(errno));
  if (got != 8 || memcmp(head, "\x93NUMPY", 6) != 0)
    return cli_fail(e, RG_E_SYNTAX, r->path,
                    "not a .npy file, which begins with \\x93NUMPY; expected what numpy.save(FILE, "
                    "array) writes");
  if ((head[6] != 1 && head[6] != 2) || head[7] != 0)
    return cli_fail(e, RG_E_SYNTAX, r->path, ".npy format version %d.%d; expected 1.0 or 2.0",
                    head[6], head[7]);
  size_t wide = head[6] == 1 ? 2 : 4;
  if (fread(head + 8, 1, wide, r->file) != wide)
    return cli_fail(e, RG_E_SYNTAX, r->path, "truncated in the header");
  size_t size = (size_t)head[8] | (size_t)head[9] << 8;
  if (wide == 4) size |= (size_t)head[10] << 16 | (size_t)head[11] << 24;
  if (size > NPY_MAX_HEADER)
    return cli_fail(e, RG_E_LIMIT, r->path, "a header of %zu bytes; the limit is 1 MiB", size);
  char *text = malloc(size + 1);
  if (!text) return cli_nomem(e);
  rg_status s = RG_OK;
  if (fread(text, 1, size, r->file) != size)
    s = cli_fail(e, RG_E_SYNTAX, r->path, "truncated in the header");
  else
    s = npy_parse_header(r, text, size, e);
  free(text);
  if (s != RG_OK) return s;

  struct stat st;
  int64_t start = (int64_t)(8 + wide + size), need = r->elements * 4;
  if (fstat(fileno(r->file), &st) == 0 && S_ISREG(st.st_mode) &&
      (int64_t)st.st_size - start != need)
    return cli_fail(e, RG_E_SYNTAX, r->path, "%s: %lld bytes of data, %lld expected",
                    (int64_t)st.st_size - start < need ? "truncated" : "too long",
                    (long long)((int64_t)st.st_size - start), (long long)need);
  return RG_OK;
}

rg_status npy_open(npy_reader *r, const char *path, rg_error *e) {
  *r = (npy_reader){0};
  snprintf(r->path, sizeof r->path, "%s", path);
  r->file = fopen(path, "rb");
  if (!r->file) return cli_fail(e, RG_E_IO, path, "can't be opened: %s", strerror(errno));
  rg_status s = open_checked(r, e);
  if (s != RG_OK) npy_close(r);
  return s;
}

void npy_close(npy_reader *r) {
  if (r->file) fclose(r->file);
  r->file = NULL;
}

/* Elements on disk are little endian whatever the host is. */
static void swap_if_big(uint32_t *x, size_t n) {
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  for (size_t i = 0; i < n; i++) x[i] = __builtin_bswap32(x[i]);
#else
  (void)x, (void)n;
#endif
}

rg_status npy_read(npy_reader *r, rg_dtype dtype, void *dst, rg_error *e) {
  if (!r->file) return cli_fail(e, RG_E_USAGE, r->path, "read twice");
  if ((r->dtype == RG_I32) != (dtype == RG_I32))
    return cli_fail(e, RG_E_DTYPE, r->path, "elements are %s, which %s can't hold",
                    rg_dtype_name(r->dtype), rg_dtype_name(dtype));
  uint32_t chunk[NPY_CHUNK];
  for (int64_t done = 0; done < r->elements;) {
    size_t n = r->elements - done < NPY_CHUNK ? (size_t)(r->elements - done) : NPY_CHUNK;
    if (fread(chunk, 4, n, r->file) != n) {
      return ferror(r->file)
                 ? cli_fail(e, RG_E_IO, r->path, "can't be read: %s", strerror(errno))
                 : cli_fail(e, RG_E_SYNTAX, r->path, "truncated: %lld elements expected",
                            (long long)r->elements);
    }
    swap_if_big(chunk, n);
    rg_convert(dtype, (char *)dst + (size_t)done * rg_dtype_size(dtype), r->dtype, chunk, n);
    done += (int64_t)n;
  }
  if (fgetc(r->file) != EOF)
    return cli_fail(e, RG_E_SYNTAX, r->path, "too long: the data goes on after the last element");
  npy_close(r);
  return RG_OK;
}

/* ---- writing ---- */

static bool put_array(FILE *f, rg_dtype dtype, int rank, const int64_t *dim, const void *src) {
  char header[512];
  int n = snprintf(header, sizeof header, "{'descr': '%s', 'fortran_order': False, 'shape': (",
                   dtype == RG_I32 ? "<i4" : "<f4");
  int64_t elements = 1;
  for (int i = 0; i < rank; i++) {
    n += snprintf(header + n, sizeof header - (size_t)n,
                  rank == 1 ? "%lld,"
                  : i       ? ", %lld"
                            : "%lld",
                  (long long)dim[i]);
    elements *= dim[i];
  }
  n += snprintf(header + n, sizeof header - (size_t)n, "), }");
  int length = (10 + n + 1 + 63) / 64 * 64 - 10; /* the data starts on a multiple of 64 */
  memset(header + n, ' ', (size_t)(length - n - 1));
  header[length - 1] = '\n';
  unsigned char head[10] = "\x93NUMPY\x01";
  head[7] = 0;
  head[8] = (unsigned char)(length & 255);
  head[9] = (unsigned char)(length >> 8);
  if (fwrite(head, 1, 10, f) != 10 || fwrite(header, 1, (size_t)length, f) != (size_t)length)
    return false;

  rg_dtype disk = dtype == RG_I32 ? RG_I32 : RG_F32;
  uint32_t chunk[NPY_CHUNK];
  for (int64_t done = 0; done < elements;) {
    size_t k = elements - done < NPY_CHUNK ? (size_t)(elements - done) : NPY_CHUNK;
    rg_convert(disk, chunk, dtype, (const char *)src + (size_t)done * rg_dtype_size(dtype), k);
    swap_if_big(chunk, k);
    if (fwrite(chunk, 4, k, f) != k) return false;
    done += (int64_t)k;
  }
  return true;
}

rg_status npy_write(const char *path, rg_dtype dtype, int rank, const int64_t *dim, const void *src,
                    rg_error *e) {
  FILE *f = cli_save_begin(path, e);
  return f ? cli_save_end(f, put_array(f, dtype, rank, dim, src), path, e) : RG_E_IO;
}
