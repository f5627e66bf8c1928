/* tests/unit/test_pack_csv.c: packing files of lines "id,lower,upper,size": what is kept, what is
 * added, and what every kind of broken file is told. */
#include <criterion/criterion.h>
#include <regraph/regraph.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct outcome {
  rg_status status;
  rg_error e;
  rg_text text;
  rg_pack_result r;
  char path[64];
} outcome;

static rg_context *ctx;

static void open_context(void) {
  cr_assert_eq(rg_context_create(NULL, &ctx, NULL), RG_OK);
}
static void close_context(void) {
  rg_context_destroy(ctx);
}
TestSuite(pack_csv, .init = open_context, .fini = close_context);

static outcome pack_bytes(const char *bytes, size_t n, const rg_pack_options *o) {
  outcome x = {.path = "/tmp/rg_pack_csv_XXXXXX"};
  int fd = mkstemp(x.path);
  cr_assert_geq(fd, 0);
  FILE *f = fdopen(fd, "wb");
  cr_assert_eq(fwrite(bytes, 1, n, f), n);
  fclose(f);
  x.status = rg_pack_csv(ctx, x.path, o, &x.text, &x.r, &x.e);
  unlink(x.path);
  cr_assert_eq(x.status, x.e.status);
  cr_assert_eq(x.status == RG_OK, x.text.data != NULL);
  return x;
}

static void packs(const char *in, const char *out) {
  outcome x = pack_bytes(in, strlen(in), NULL);
  cr_assert_eq(x.status, RG_OK, "%s: %s", in, x.e.message);
  cr_assert_str_eq(x.text.data, out);
  cr_assert_eq(x.text.size, strlen(out));
  cr_assert(x.r.optimal);
  cr_assert_eq(x.r.peak, x.r.lower_bound);
  rg_text_destroy(&x.text);
}

/* Fails with this status, at this place, saying this (and naming the file). */
static void fails(const char *in, rg_status status, int line, int column, const char *says) {
  outcome x = pack_bytes(in, strlen(in), NULL);
  cr_assert_eq(x.status, status, "%s: %s instead of %s: %s", in, rg_status_name(x.status),
               rg_status_name(status), x.e.message);
  cr_assert_str_eq(x.e.file, x.path);
  cr_assert_eq(x.e.line, line, "%s: line %d instead of %d", in, x.e.line, line);
  cr_assert_eq(x.e.column, column, "%s: column %d instead of %d", in, x.e.column, column);
  cr_assert(strstr(x.e.message, says), "%s: \"%s\" does not say \"%s\"", in, x.e.message, says);
}

/* ---- what is accepted ---- */

Test(pack_csv, appends_offsets) {
  packs("id,lower,upper,size\na,0,2,4\nb,2,4,4\n",
        "id,lower,upper,size,offset\na,0,2,4,0\nb,2,4,4,0\n");
  packs("id,lower,upper,size\n", "id,lower,upper,size,offset\n");
}

Test(pack_csv, columns_in_any_order_and_others_kept) {
  packs("size,note,upper,id,lower\n8, two words ,3,x,1\n",
        "size,note,upper,id,lower,offset\n8, two words ,3,x,1,0\n");
  packs(" id , lower,upper ,size\na , 0 ,1, +7\n",
        " id , lower,upper ,size,offset\na , 0 ,1, +7,0\n");
  packs("id,lower,upper,size,,\na,-5,-1,2,,\n", "id,lower,upper,size,,,offset\na,-5,-1,2,,,0\n");
}

/* As pandas and spreadsheets write them. */
Test(pack_csv, quotes) {
  packs("\"id\",\"lower\",\"upper\",\"size\"\n\"a\",0,1,4\n",
        "\"id\",\"lower\",\"upper\",\"size\",offset\n\"a\",0,1,4,0\n");
  packs("id,lower,upper,size\n\"a, the \"\"first\"\", of two\",\"0\",\"1\",\" 4 \"\nb,1,2,4\n",
        "id,lower,upper,size,offset\n\"a, the \"\"first\"\", of two\",\"0\",\"1\",\" 4 "
        "\",0\nb,1,2,4,0\n");
  packs("id, \"lower\" ,upper,size,\"offset\"\r\na,0,1,4,\"9\"\r\n",
        "id, \"lower\" ,upper,size,\"offset\"\r\na,0,1,4,0\r\n");
  packs("id,lower,upper,size\n5\" pipe,0,1,4\n", "id,lower,upper,size,offset\n5\" pipe,0,1,4,0\n");
  fails("id,lower,upper,size\n\"a,0,1,4\n", RG_E_SYNTAX, 2, 1, "does not close on its line");
  fails("id,\"lower,upper,size\n", RG_E_SYNTAX, 1, 4, "does not close on its line");
  fails("\"id\",\"lowr\",\"upper\",\"size\"\n", RG_E_KEY, 1, 1,
        "no column \"lower\" (\"lowr\" is near)");
  fails("id,lower,upper,size\na,0,1,\"x\"\n", RG_E_SYNTAX, 2, 7, "expected an integer");
}

static void nul_is_refused(const char *in, size_t size, int line, int column) {
  outcome x = pack_bytes(in, size, NULL);
  cr_assert_eq(x.status, RG_E_SYNTAX);
  cr_assert_eq(x.e.line, line);
  cr_assert_eq(x.e.column, column);
  cr_assert(strstr(x.e.message, "NUL byte"), "%s", x.e.message);
}

Test(pack_csv, nul_bytes) {
  static const char in_number[] = "id,lower,upper,size\na,0,1,4\0 2\n",
                    in_id[] = "id,lower,upper,size\na\0b,0,1,4\n", utf16[] = "i\0d\0,\0";
  nul_is_refused(in_number, sizeof in_number - 1, 2, 8);
  nul_is_refused(in_id, sizeof in_id - 1, 2, 2);
  nul_is_refused(utf16, sizeof utf16 - 1, 1, 2);
}

Test(pack_csv, control_characters_are_shown_escaped) {
  fails("id,lower,upper,size\na,0\x1b[2J,1,4\n", RG_E_SYNTAX, 2, 3, "lower is \"0\\x1b[2J\"");
  fails("id,lo\x07wer,upper,size\n", RG_E_KEY, 1, 1, "lo\\x07wer");
}

Test(pack_csv, never_alive_and_never_together) {
  const char in[] = "id,lower,upper,size\na,3,3,100\nb,0,9,5\n";
  outcome x = pack_bytes(in, sizeof in - 1, NULL);
  cr_assert_eq(x.status, RG_OK);
  cr_assert_eq(x.r.peak, 100);
  rg_text_destroy(&x.text);
  packs("id,lower,upper,size\na,0,1,9223372036854775807\nb,1,2,9223372036854775807\n",
        "id,lower,upper,size,offset\na,0,1,9223372036854775807,0\nb,1,2,9223372036854775807,0\n");
}

Test(pack_csv, an_old_offset_is_replaced) {
  packs("offset,id,lower,upper,size\n999,a,0,1,4\nnonsense,b,1,2,4\n",
        "offset,id,lower,upper,size\n0,a,0,1,4\n0,b,1,2,4\n");
}

Test(pack_csv, line_ends_blank_lines_and_mark) {
  packs("id,lower,upper,size\r\na,0,1,4\r\n\r\nb,1,2,4\r\n",
        "id,lower,upper,size,offset\r\na,0,1,4,0\r\nb,1,2,4,0\r\n");
  packs("\n  \nid,lower,upper,size\n\n \t \na,0,1,4", "id,lower,upper,size,offset\na,0,1,4,0\n");
  packs("\xEF\xBB\xBFid,lower,upper,size\na,0,1,4\n", "id,lower,upper,size,offset\na,0,1,4,0\n");
}

Test(pack_csv, what_it_writes_it_reads) {
  const char in[] = "id,lower,upper,size\na,0,9,3\nb,0,4,5\nc,4,9,2\n";
  outcome x = pack_bytes(in, sizeof in - 1, NULL), y;
  cr_assert_eq(x.status, RG_OK);
  y = pack_bytes(x.text.data, x.text.size, NULL);
  cr_assert_eq(y.status, RG_OK);
  cr_assert_str_eq(x.text.data, y.text.data);
  rg_text_destroy(&x.text);
  rg_text_destroy(&y.text);
}

/* The offsets written are those of rg_pack, and they are a packing. */
Test(pack_csv, offsets_hold) {
  enum { N = 60 };
  static char in[N * 64];
  rg_buffer b[N];
  unsigned state = 9;
  int at = sprintf(in, "id,lower,upper,size\n");
  for (int i = 0; i < N; i++) {
    unsigned draw[3];
    for (int k = 0; k < 3; k++) draw[k] = (state = state * 1103515245u + 12345u) >> 16;
    b[i] = (rg_buffer){draw[0] % 30, draw[0] % 30 + draw[1] % 12, draw[2] % 900, 0};
    at += sprintf(in + at, "b%d,%d,%d,%d\n", i, (int)b[i].lower, (int)b[i].upper, (int)b[i].size);
  }
  rg_pack_options o = {.seconds = 0.2, .align = 16};
  outcome x = pack_bytes(in, (size_t)at, &o);
  cr_assert_eq(x.status, RG_OK, "%s", x.e.message);
  char *line = strchr(x.text.data, '\n') + 1;
  int64_t peak = 0;
  for (int i = 0; i < N; i++, line = strchr(line, '\n') + 1) {
    long long lower, upper, size, offset;
    int id;
    cr_assert_eq(sscanf(line, "b%d,%lld,%lld,%lld,%lld\n", &id, &lower, &upper, &size, &offset), 5);
    cr_assert(id == i && lower == b[i].lower && upper == b[i].upper && size == b[i].size);
    cr_assert_eq(offset % 16, 0);
    b[i].offset = offset;
    if (offset + size > peak) peak = offset + size;
    for (int j = 0; j < i; j++) {
      bool together = false;
      for (int64_t t = 0; t < 50; t++)
        together =
            together || (b[i].lower <= t && t < b[i].upper && b[j].lower <= t && t < b[j].upper);
      bool apart = b[i].offset >= b[j].offset + b[j].size || b[j].offset >= b[i].offset + b[i].size;
      cr_assert(!together || apart, "b%d and b%d overlap", i, j);
    }
  }
  cr_assert_eq(peak, x.r.peak);
  cr_assert_leq(x.r.lower_bound, x.r.peak);
  rg_text_destroy(&x.text);
}

/* ---- what is refused ---- */

Test(pack_csv, headers) {
  fails("", RG_E_KEY, 1, 1, "no header; expected a first line id,lower,upper,size");
  fails("\n\n", RG_E_KEY, 1, 1, "no header");
  fails("id,lowr,upper,size\n", RG_E_KEY, 1, 1, "no column \"lower\" (\"lowr\" is near)");
  fails("id,lower,upper\n", RG_E_KEY, 1, 1, "no column \"size\"; expected id,lower,upper,size");
  fails("a,0,1,4\n", RG_E_KEY, 1, 1, "no column \"id\"");
  fails("\nid,lower,upper,size,upper\n", RG_E_KEY, 2, 21, "\"upper\" appears twice");
  fails("id,offset,lower,upper,size,offset\n", RG_E_KEY, 1, 28, "\"offset\" appears twice");
}

Test(pack_csv, numbers) {
  fails("id,lower,upper,size\na,zero,1,4\n", RG_E_SYNTAX, 2, 3,
        "lower is \"zero\"; expected an integer");
  fails("id,lower,upper,size\na,0,1,4\nb,0,,4\n", RG_E_SYNTAX, 3, 5, "upper is \"\"");
  fails("id,lower,upper,size\n\n\na,0,1,4.5\n", RG_E_SYNTAX, 4, 7, "size is \"4.5\"");
  fails("id,lower,upper,size\na,0,1,-\n", RG_E_SYNTAX, 2, 7, "size is \"-\"");
  fails("id,lower,upper,size\na,0,1,0x10\n", RG_E_SYNTAX, 2, 7, "expected an integer");
  fails("id,lower,upper,size\na,0,1,9223372036854775808\n", RG_E_OVERFLOW, 2, 7, "leaves 64 bits");
  packs("id,lower,upper,size\na,-9223372036854775808,0,1\n",
        "id,lower,upper,size,offset\na,-9223372036854775808,0,1,0\n");
}

Test(pack_csv, column_counts) {
  fails("id,lower,upper,size\na,0,1\n", RG_E_SYNTAX, 2, 6, "has 3 columns; the header has 4");
  fails("id,lower,upper,size\na,0,1,4,5\n", RG_E_SYNTAX, 2, 9, "more than the header's 4 columns");
  fails("id,lower,upper,size\nword\n", RG_E_SYNTAX, 2, 5, "has 1 columns");
}

Test(pack_csv, contents) {
  fails("id,lower,upper,size\na,0,1,4\nb,5,2,4\n", RG_E_DATA, 3, 5,
        "upper is 2, below lower, which is 5");
  fails("id,lower,upper,size\na,0,1,-4\n", RG_E_DATA, 2, 7, "size is -4; expected 0 or more");
  const char in[] = "id,lower,upper,size\na,0,1,9223372036854775807\nb,0,1,9223372036854775807\n";
  outcome x = pack_bytes(in, sizeof in - 1, NULL);
  cr_assert_eq(x.status, RG_E_OVERFLOW);
  cr_assert_str_eq(x.e.file, x.path);
}

Test(pack_csv, files) {
  rg_text text;
  rg_pack_result r;
  rg_error e = {0};
  cr_assert_eq(rg_pack_csv(ctx, "/nowhere/at/all.csv", NULL, &text, &r, &e), RG_E_IO);
  cr_assert_str_eq(e.file, "/nowhere/at/all.csv");
  cr_assert(strstr(e.message, "No such file"));
  cr_assert_null(text.data);
  e = (rg_error){0};
  cr_assert_eq(rg_pack_csv(ctx, "/tmp", NULL, &text, &r, &e), RG_E_IO);
  cr_assert_eq(rg_pack_csv(NULL, "/tmp", NULL, &text, &r, NULL), RG_E_USAGE);
  cr_assert_eq(rg_pack_csv(ctx, NULL, NULL, &text, &r, NULL), RG_E_USAGE);
  cr_assert_eq(rg_pack_csv(ctx, "/tmp", NULL, NULL, &r, NULL), RG_E_USAGE);
}

Test(pack_csv, the_largest_file) {
  const size_t limit = 16u << 20;
  const char head[] = "id,lower,upper,size\n";
  char *bytes = malloc(limit + 1);
  cr_assert(bytes);
  memset(bytes, '\n', limit + 1);
  memcpy(bytes, head, sizeof head - 1);
  outcome x = pack_bytes(bytes, limit, NULL);
  cr_assert_eq(x.status, RG_OK, "%s", x.e.message);
  rg_text_destroy(&x.text);
  x = pack_bytes(bytes, limit + 1, NULL);
  cr_assert_eq(x.status, RG_E_LIMIT);
  cr_assert(strstr(x.e.message, "larger than 16 MiB"));
  free(bytes);
}

/* ---- host memory runs out at any place ---- */

typedef struct rationed {
  int left;
} rationed;
static void *ration(void *user, size_t size) {
  rationed *r = user;
  return r->left-- > 0 ? malloc(size) : NULL;
}
static void give_back(void *user, void *p) {
  (void)user;
  free(p);
}

Test(pack_csv, no_memory) {
  const char in[] = "id,lower,upper,size\na,0,9,3\nb,0,4,5\nc,4,9,2\nd,2,6,4\n";
  rationed ration_of = {1 << 30};
  rg_allocator host = {ration, give_back, &ration_of};
  rg_context *real = ctx;
  cr_assert_eq(rg_context_create(&host, &ctx, NULL), RG_OK);
  int failures = 0;
  for (int n = 0;; n++) {
    ration_of.left = n;
    outcome x = pack_bytes(in, sizeof in - 1, NULL);
    ration_of.left = 1 << 30;
    rg_text_destroy(&x.text);
    if (x.status == RG_OK) break;
    cr_assert_eq(x.status, RG_E_NOMEM);
    failures++;
    cr_assert_lt(failures, 1000);
  }
  cr_assert_gt(failures, 4);
  rg_context_destroy(ctx);
  ctx = real;
}
