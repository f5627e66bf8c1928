/* cli/peak.h: what this machine's cores and memory can do, measured in a second by small loops. */
#ifndef CLI_PEAK_H
#define CLI_PEAK_H

typedef struct peak_rates {
  double matrix_gflops; /* fp32 multiply-adds in registers, two a piece */
  double special_gops;  /* exponentials */
  double bandwidth_gbs; /* bytes read plus bytes written of a long copy */
} peak_rates;

/* On `threads` threads at once. Rates are 0 where memory is short. */
void peak_measure(int threads, peak_rates *out);

#endif
