/* tests/unit/test_text.c: what the library says, reads and guesses: printable messages, sizes and
 * counts, near names, and the errors that had none of it. */
#include "../../graph/base.h"
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- printable text ---- */

Test(text, escapes_what_a_terminal_would_obey) {
  static const char *const both[][2] = {
      {"", ""},
      {"plain é … 漢 🙂 \\n", "plain é … 漢 🙂 \\n"},
      {"a\nb\tc\rd", "a\\nb\\tc\\rd"},
      {"\x1b[31m\x07\x7f\x01", "\\x1b[31m\\x07\\x7f\\x01"},
      {"\xc2\x9b"
       "2J",
       "\\xc2\\x9b2J"},           /* CSI as one C1 character */
      {"\xc2\xa0", "\xc2\xa0"},   /* the first after C1 */
      {"\xff\xc3", "\\xff\\xc3"}, /* no UTF-8; cut off */
      {"\xc0\xaf", "\\xc0\\xaf"}, /* overlong */
      {"\xe0\x80\xaf", "\\xe0\\x80\\xaf"},
      {"\xed\xa0\x80", "\\xed\\xa0\\x80"}, /* a surrogate */
      {"\xf4\x90\x80\x80", "\\xf4\\x90\\x80\\x80"},
  };
  for (size_t i = 0; i < sizeof both / sizeof *both; i++) {
    char once[128], twice[128];
    cr_assert_str_eq(rg_printable(both[i][0], once, sizeof once), both[i][1]);
    cr_assert_str_eq(rg_printable(once, twice, sizeof twice), once, "escaped again");
  }
  char small[6];
  cr_assert_str_eq(rg_printable("abc\x1b", small, sizeof small), "abc", "no half escapes");
  cr_assert_str_eq(rg_printable("abc漢漢", small, 6), "abc", "no half characters");
  cr_assert_str_eq(rg_printable(NULL, small, sizeof small), "");
  small[0] = 'x';
  rg_printable("abc", small, 0);
  cr_assert_eq(small[0], 'x');
}

Test(text, errors_are_one_line) {
  rg_error e = {.status = RG_E_IO, .file = "a\nb", .pointer = "/x\x1b[0m", .message = "\x07"};
  char line[256];
  cr_assert_eq(rg_error_format(&e, line, sizeof line), (int)strlen(line));
  cr_assert_str_eq(line, "a\\nb:/x\\x1b[0m: RG_E_IO: \\x07");
  cr_assert_eq(rg_error_format(&e, line, 3), (int)strlen("a\\nb:/x\\x1b[0m: RG_E_IO: \\x07"));
  cr_assert_str_eq(line, "a\\");

  rg_error made = {0};
  rgi_fail(&made, RG_E_VALUE, NULL, NULL, "'%s' is bad", "x\ny");
  cr_assert_str_eq(made.message, "'x\\ny' is bad");

  memset(e.message, '\n', sizeof e.message - 1); /* the longest there is, all of it to be escaped */
  static char longest[8192];
  cr_assert_lt(rg_error_format(&e, longest, sizeof longest), (int)sizeof longest);
  cr_assert_null(strchr(longest, '\n'));
}

Test(text, no_error_at_all) {
  char line[64];
  cr_assert_eq(rg_error_format(NULL, line, sizeof line), (int)strlen(line));
  cr_assert_str_eq(line, "RG_OK: no error");
  cr_assert_eq(rg_error_format(NULL, NULL, 0), (int)strlen("RG_OK: no error"));
}

Test(text, no_memory_has_a_remedy) {
  rg_error e = {0};
  cr_assert_eq(rgi_nomem(&e), RG_E_NOMEM);
  cr_assert(strstr(e.message, "smaller"), "%s", e.message);
}

/* ---- sizes and counts ---- */

Test(text, sizes) {
  static const struct {
    const char *text;
    int64_t bytes;
  } good[] = {
      {"0", 0},
      {"17", 17},
      {"17B", 17},
      {"17 B", 17},
      {"64KB", 64000},
      {"64kB", 64000},
      {"64KiB", 65536},
      {"64kiB", 65536},
      {"64K", 65536},
      {"64k", 65536},
      {"2MB", 2000000},
      {"6G", INT64_C(6) << 30},
      {"6 GiB", INT64_C(6) << 30},
      {"1.5GiB", INT64_C(3) << 29},
      {"1.5G", INT64_C(3) << 29},
      {"1.5GB", 1500000000},
      {"1T", INT64_C(1) << 40},
      {"3TB", INT64_C(3000000000000)},
      {"1.999999KiB", 2047},
      {"9223372036854775807", INT64_MAX},
      {"9223372036854775807B", INT64_MAX},
      {"8388607.999999TiB", INT64_MAX - 1099511 /* the last millionth of a TiB, rounded down */},
      {"9223372TB", INT64_C(9223372000000000000)},
  };
  for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
    rg_error e = {0};
    int64_t bytes = -1;
    cr_assert_eq(rg_parse_size(good[i].text, &bytes, &e), RG_OK, "%s: %s", good[i].text, e.message);
    cr_assert_eq(bytes, good[i].bytes, "%s: %lld", good[i].text, (long long)bytes);
  }
  static const struct {
    const char *text;
    rg_status status;
  } bad[] = {
      {"", RG_E_VALUE},
      {" 1", RG_E_VALUE},
      {"1  GiB", RG_E_VALUE},
      {"-1", RG_E_VALUE},
      {"+1", RG_E_VALUE},
      {"1.", RG_E_VALUE},
      {".5GiB", RG_E_VALUE},
      {"1.2.3", RG_E_VALUE},
      {"1.1234567GiB", RG_E_VALUE},
      {"1gib", RG_E_VALUE},
      {"1GiB ", RG_E_VALUE},
      {"1e3", RG_E_VALUE},
      {"0x10", RG_E_VALUE},
      {"GiB", RG_E_VALUE},
      {"6GiBi", RG_E_VALUE},
      {"6Gi", RG_E_VALUE},
      {"6PB", RG_E_VALUE},
      {"6BB", RG_E_VALUE},
      {"6\xc2\xa0GiB", RG_E_VALUE},
      {"8388608TiB", RG_E_OVERFLOW},
      {"9223373TB", RG_E_OVERFLOW},
      {"9223372036854775808", RG_E_OVERFLOW},
      {"99999999999999999999999999", RG_E_OVERFLOW},
  };
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
    rg_error e = {0};
    int64_t bytes = -7;
    cr_assert_eq(rg_parse_size(bad[i].text, &bytes, &e), bad[i].status, "%s", bad[i].text);
    cr_assert_eq(e.status, bad[i].status);
    cr_assert_eq(bytes, -7, "%s", bad[i].text);
  }
  rg_error e = {0};
  rg_parse_size("6\n\x1b", &(int64_t){0}, &e);
  cr_assert(strstr(e.message, "'6\\n\\x1b' is no size"), "%s", e.message);
  cr_assert_eq(rg_parse_size(NULL, &(int64_t){0}, NULL), RG_E_USAGE);
  cr_assert_eq(rg_parse_size("1", NULL, NULL), RG_E_USAGE);
}

Test(text, counts) {
  static const struct {
    const char *text;
    int64_t n;
  } good[] = {{"0", 0},
              {"4096", 4096},
              {"64K", 65536},
              {"64k", 65536},
              {"1M", 1 << 20},
              {"2G", INT64_C(2) << 30},
              {"-3", -3},
              {"-1K", -1024},
              {"1T", INT64_C(1) << 40},
              {"9223372036854775807", INT64_MAX},
              {"8388607T", INT64_C(8388607) << 40}};
  for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
    int64_t n = -99;
    cr_assert(rgi_parse_count(good[i].text, &n), "%s", good[i].text);
    cr_assert_eq(n, good[i].n, "%s", good[i].text);
  }
  static const char *const bad[] = {"",     "-",   "K",    "64KB",     "64KiB",
                                    "64 K", " 64", "64K ", "1.5K",     "+4",
                                    "0x10", "4e3", "--4",  "8388608T", "9223372036854775808"};
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
    int64_t n = -99;
    cr_assert(!rgi_parse_count(bad[i], &n), "%s", bad[i]);
    cr_assert_eq(n, -99);
  }
}

/* ---- near names ---- */

Test(text, nearest) {
  static const char *const names[] = {"check", "plan", "--json", "pareto"};
  cr_assert_str_eq(rg_nearest("chekc", names, 4), "check", "two letters swapped are one slip");
  cr_assert_str_eq(rg_nearest("--jsno", names, 4), "--json");
  cr_assert_str_eq(rg_nearest("PLAN", names, 4), "plan");
  cr_assert_null(rg_nearest("frobnicate", names, 4));
  cr_assert_null(rg_nearest("plan", names, 0));
  cr_assert_null(rg_nearest("some", (const char *const[]){"none"}, 1), "two slips of four letters");
  char longest[300];
  memset(longest, 'x', 299);
  longest[299] = 0;
  cr_assert_null(rg_nearest(longest, names, 4));
}

/* ---- who asks through the public calls ---- */

static rg_context *ctx;
static void open_context(void) {
  cr_assert_eq(rg_context_create(NULL, &ctx, NULL), RG_OK);
}
static void close_context(void) {
  rg_context_destroy(ctx);
}
/* ---- folding ---- */

Test(text, name_pattern) {
  static const char *const both[][2] = {{"layer12_q", "layer*_q"},
                                        {"layer0_combine.bwd.2", "layer*_combine.bwd.*"},
                                        {"q", "q"},
                                        {"007", "*"},
                                        {"", ""},
                                        {"a1b22", "a*b*"}};
  char pattern[32];
  for (size_t i = 0; i < sizeof both / sizeof *both; i++) {
    rg_name_pattern(both[i][0], pattern, sizeof pattern);
    cr_assert_str_eq(pattern, both[i][1]);
  }
  rg_name_pattern("layer12_q", pattern, 7);
  cr_assert_str_eq(pattern, "layer*", "cut to what there is room for");
  rg_name_pattern("layer12_q", pattern, 1);
  cr_assert_str_eq(pattern, "");
  rg_name_pattern(NULL, pattern, 7);
  cr_assert_str_eq(pattern, "");
  pattern[0] = 'x';
  rg_name_pattern("q", pattern, 0);
  cr_assert_eq(pattern[0], 'x');
  cr_assert(rgi_alike("layer1_q", "layer22_q"));
  cr_assert_not(rgi_alike("layer_q", "layer1_q"), "one pattern is not the other's");
  cr_assert_not(rgi_alike("q", "q1"));
  cr_assert_not(rgi_alike("q1", "q1_"));
}

Test(text, lines_alike_stand_once) {
  static const char *const both[][2] = {
      {"t\n  l0_a  1\n  l0_b  2\n  l1_a  1\n  l2_a  1\n  l10_a 1\n  l3_b  2\nu\n",
       "t\n  l*_a  1  each of 4\n  l0_b  2\n  l3_b  2\nu\n"},
      /* three stay; what differs elsewhere; below another title; copies of one line */
      {"t\n  a1 x\n  a2 x\n  a3 x\n", "t\n  a1 x\n  a2 x\n  a3 x\n"},
      {"t\n  a1 x\n  a2 x\n  a3 y\n  a4 x\n", "t\n  a1 x\n  a2 x\n  a3 y\n  a4 x\n"},
      {"t\n  a1 x\n  a2 x\nt\n  a3 x\n  a4 x\n", "t\n  a1 x\n  a2 x\nt\n  a3 x\n  a4 x\n"},
      {"t\n  f16\n  f16\n  f16\n  f16\n", "t\n  f16\n  f16\n  f16\n  f16\n"},
      /* numbers that are no names; words before a name; no newline at the end */
      {"t\n  10 a\n  20 a\n  30 a\n  40 a\n", "t\n  10 a\n  20 a\n  30 a\n  40 a\n"},
      {"t\n  in a1 x\n  in a22 x\n  in a3 x\n  in a4 x", "t\n  in a* x  each of 4\n"},
      {"", ""},
  };
  rg_context *c;
  cr_assert_eq(rg_context_create(NULL, &c, NULL), RG_OK);
  for (size_t i = 0; i < sizeof both / sizeof *both; i++) {
    rgi_buf b;
    rg_text out;
    rg_error e;
    rgi_buf_init(&b, c);
    rgi_buf_add(&b, both[i][0], strlen(both[i][0]));
    rgi_fold_lines(&b);
    cr_assert_eq(rgi_buf_finish(&b, &out, &e), RG_OK);
    cr_assert_str_eq(out.data, both[i][1]);
    rg_text_destroy(&out);
  }
  rg_context_destroy(c);
}

TestSuite(said, .init = open_context, .fini = close_context);

#define SPEC(shape, input, node)                                                                  \
  "{\"regraph\": 1, \"inputs\": {\"x\": {\"shape\": [" shape "], \"dtype\": \"f32\"" input "}}, " \
  "\"nodes\": [{\"name\": \"a\", \"op\": \"silu\", \"in\": {\"x\": \"x\"}, \"out\": {\"y\": "     \
  "\"y\"}" node "}], \"outputs\": {\"y\": \"y\"}}"

static rg_status load_spec(const char *text, const rg_binding *set, size_t n, rg_error *e) {
  rg_spec *spec;
  *e = (rg_error){0};
  rg_status s = rg_spec_load_text(ctx, text, strlen(text), "s.json", set, n, &spec, e);
  rg_spec_destroy(spec);
  return s;
}

Test(said, a_newline_in_a_shape_makes_no_second_line) {
  rg_error e;
  cr_assert_neq(load_spec(SPEC("\"T +\\n\\u001b[2J $\"", "", ""), NULL, 0, &e), RG_OK);
  cr_assert_null(strpbrk(e.message, "\n\x1b"), "%s", e.message);
  cr_assert(strstr(e.message, "T +\\n\\x1b[2J"), "%s", e.message);
}

Test(said, doc_is_text) {
  rg_error e;
  cr_assert_eq(load_spec(SPEC("\"T\"", ", \"doc\": \"fine\"", ", \"doc\": \"fine\""), NULL, 0, &e),
               RG_OK, "%s", e.message);
  cr_assert_eq(load_spec(SPEC("\"T\"", ", \"doc\": 7", ""), NULL, 0, &e), RG_E_TYPE);
  cr_assert_str_eq(e.pointer, "/inputs/x/doc");
  cr_assert_eq(load_spec(SPEC("\"T\"", "", ", \"doc\": [\"a\"]"), NULL, 0, &e), RG_E_TYPE);
  cr_assert_str_eq(e.pointer, "/nodes/0/doc");
}

Test(said, counts_bind_dimensions) {
  rg_error e;
  rg_spec *spec;
  rg_tensor_info info;
  const char *text = SPEC("\"T\"", "", "");
  cr_assert_eq(rg_spec_load_text(ctx, text, strlen(text), "s.json",
                                 &(rg_binding){.name = "T", .text = "64K"}, 1, &spec, NULL),
               RG_OK);
  cr_assert_eq(rg_spec_tensor(spec, 0, &info), RG_OK);
  cr_assert_eq(info.dim[0], 65536);
  rg_spec_destroy(spec);
  cr_assert_eq(load_spec(text, &(rg_binding){.name = "T", .text = "64KB"}, 1, &e), RG_E_USAGE);
  cr_assert_eq(load_spec(text, &(rg_binding){.name = "T", .text = "2T"}, 1, &e), RG_E_USAGE,
               "past 2^40");
}

Test(said, an_empty_path_is_named) {
  rg_error e = {0};
  rg_spec *spec;
  rg_policy *policy;
  rg_text text;
  rg_pack_result r;
  cr_assert_eq(rg_spec_load_file(ctx, "", NULL, 0, &spec, &e), RG_E_IO);
  cr_assert(strstr(e.message, "''"), "%s", e.message);
  e = (rg_error){0};
  cr_assert_eq(rg_policy_load_file(ctx, "", &policy, &e), RG_E_IO);
  cr_assert(strstr(e.message, "''"), "%s", e.message);
  e = (rg_error){0};
  cr_assert_eq(rg_pack_csv(ctx, "", NULL, &text, &r, &e), RG_E_IO);
  cr_assert(strstr(e.message, "''"), "%s", e.message);
}

Test(said, a_profile_has_a_printable_name) {
  static const char profile[] =
      "{\"regraph_profile\": 1, \"name\": \"box\\u001b[31m\\n\", \"device\": \"cpu\", "
      "\"matrix_gflops\": "
      "{\"f32\": 1, "
      "\"f16\": 1, \"bf16\": 1}, \"special_gops\": 1, \"bandwidth_gbs\": 1, \"memory\": \"1G\"}";
  char path[] = "/tmp/rg_profile_XXXXXX";
  int fd = mkstemp(path);
  FILE *f = fdopen(fd, "w");
  cr_assert(f && fputs(profile, f) >= 0 && fclose(f) == 0);
  rg_spec *spec;
  rg_plan *plan;
  rg_text text;
  rg_error e = {0};
  const char *s = SPEC("\"T\"", "", "");
  rg_binding set = {.name = "T", .value = 8};
  rg_plan_options o = {.set = &set, .nset = 1, .profile_path = path};
  cr_assert_eq(rg_spec_load_text(ctx, s, strlen(s), "s.json", NULL, 0, &spec, &e), RG_OK, "%s",
               e.message);
  cr_assert_eq(rg_plan_create(spec, NULL, &o, &plan, &e), RG_OK, "%s", e.message);
  cr_assert_eq(rg_plan_write(plan, "text", &text, &e), RG_OK);
  cr_assert_null(strchr(text.data, '\x1b'));
  cr_assert(strstr(text.data, "box\\x1b[31m\\n"));
  rg_text_destroy(&text);
  rg_plan_destroy(plan);
  rg_spec_destroy(spec);
  remove(path);
}
