/* cli/bench_serve.h: `bench --serve`: what a serving spec's step takes. */
#ifndef CLI_BENCH_SERVE_H
#define CLI_BENCH_SERVE_H

#include "cli.h"

/* The tables, by the arguments; the spec is loaded. */
rg_status bench_serve(cli *c);

#endif
