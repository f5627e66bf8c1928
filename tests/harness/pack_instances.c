/* pack_instances.c: see pack_instances.h. Integer arithmetic only, so that every
 * machine draws the same instances. */
#include "pack_instances.h"

typedef struct draw {
  uint64_t state;
} draw;

/* splitmix64 */
static uint64_t next(draw *d) {
  uint64_t z = (d->state += UINT64_C(0x9e3779b97f4a7c15));
  z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
  z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
  return z ^ (z >> 31);
}

/* Uniform in [low, high]. */
static int64_t between(draw *d, int64_t low, int64_t high) {
  return low + (int64_t)(next(d) % (uint64_t)(high - low + 1));
}

/* Sizes over several orders of magnitude, as tensors have. */
static int64_t tensor_size(draw *d) {
  return between(d, 1, 64) << between(d, 0, 10);
}

static void random_intervals(draw *d, size_t n, rg_buffer *b) {
  int64_t horizon = (int64_t)n * 2;
  for (size_t i = 0; i < n; i++) {
    int64_t most = horizon >> between(d, 1, 6), length = between(d, 1, most < 1 ? 1 : most);
    b[i].lower = between(d, 0, horizon - length);
    b[i].upper = b[i].lower + length;
    b[i].size = between(d, 1, 1000) * 16;
  }
}

static void nested(draw *d, size_t n, rg_buffer *b) {
  int64_t half = (int64_t)n * 2;
  for (size_t i = 0; i < n; i++) {
    int64_t reach = between(d, 1, half), shift = between(d, -half / 16, half / 16);
    b[i].lower = half - reach + shift;
    b[i].upper = half + reach + between(d, 0, half / 16) + shift;
    b[i].size = tensor_size(d) * 16;
  }
}

static void training(draw *d, size_t n, rg_buffer *b) {
  int64_t turn = (int64_t)n;
  for (size_t i = 0; i < n; i++) {
    int64_t at = between(d, 0, turn - 1), kind = between(d, 0, 3);
    b[i].size = tensor_size(d) * 64;
    if (kind == 0) { /* activation: from its forward step to its backward step */
      b[i].lower = at;
      b[i].upper = 2 * turn - at;
    } else if (kind == 1) { /* gradient: from backward of the next layers to its own */
      b[i].upper = 2 * turn - at;
      b[i].lower = b[i].upper - between(d, 1, turn < 12 ? turn : 12);
      if (b[i].lower < turn) b[i].lower = turn - 1;
    } else { /* temporary, in either direction */
      b[i].lower = between(d, 0, 2 * turn - 5);
      b[i].upper = b[i].lower + between(d, 1, 4);
    }
  }
}

static void mixed(draw *d, size_t n, rg_buffer *b) {
  int64_t horizon = (int64_t)n;
  for (size_t i = 0; i < n; i++) {
    bool large = between(d, 0, 9) == 0;
    int64_t length = large ? between(d, horizon / 8, horizon / 2) : between(d, 1, horizon / 10 + 1);
    b[i].lower = between(d, 0, horizon - length);
    b[i].upper = b[i].lower + length;
    b[i].size = large ? between(d, 4000, 40000) : between(d, 1, 2000);
  }
}

static size_t max_size(size_t a, size_t b) {
  return a > b ? a : b;
}

/* A piece worth cutting: the largest (relative to the sheet) of a few drawn ones. */
static size_t pick(draw *d, const rg_buffer *b, size_t count, int64_t width, int64_t height) {
  size_t best = 0;
  int64_t best_area = -1;
  for (size_t t = 0; t < max_size(3, count / 8); t++) {
    size_t i = (size_t)between(d, 0, (int64_t)count - 1);
    int64_t area = (b[i].upper - b[i].lower) * 4096 / width * (b[i].size * 4096 / height);
    if (area > best_area) best = i, best_area = area;
  }
  return best;
}

/* Offsets hold the cut pieces' places while cutting; they are cleared at the end. */
static void cut(draw *d, size_t n, rg_buffer *b, int64_t width, int64_t height, int64_t grain,
                bool pinwheels) {
  size_t count = 1;
  b[0] = (rg_buffer){0, width, height, 0};
  while (count < n) {
    size_t i = pick(d, b, count, width, height);
    rg_buffer p = b[i];
    int64_t w = p.upper - p.lower, h = p.size / grain;
    if (pinwheels && count + 4 <= n && w >= 3 && h >= 3 && between(d, 0, 2) > 0) {
      int64_t x1 = between(d, 1, w - 2), x2 = between(d, x1 + 1, w - 1);
      int64_t y1 = between(d, 1, h - 2), y2 = between(d, y1 + 1, h - 1);
      bool left = between(d, 0, 1) == 1; /* the wheel's sense */
      for (int k = 0; k < 5; k++) {
        static const int8_t box[5][4] = {
            /* which of 0, 1, 2, 3 = edge, first, second, edge: x from, to; y from, to */
            {0, 2, 0, 1},
            {2, 3, 0, 2},
            {1, 3, 2, 3},
            {0, 1, 1, 3},
            {1, 2, 1, 2}};
        int64_t x[4] = {0, x1, x2, w}, y[4] = {0, y1, y2, h};
        int64_t x0 = x[box[k][0]], x3 = x[box[k][1]], y0 = y[box[k][2]], y3 = y[box[k][3]];
        if (left) {
          int64_t swap = w - x3;
          x3 = w - x0;
          x0 = swap;
        }
        /* Mirrored wheels keep the same cuts: only the sheet is seen from behind. */
        rg_buffer piece = {p.lower + x0, p.lower + x3, (y3 - y0) * grain, p.offset + y0 * grain};
        if (k == 0)
          b[i] = piece;
        else
          b[count++] = piece;
      }
      continue;
    }
    bool across = w * height > h * grain * width ? between(d, 0, 3) > 0 : between(d, 0, 3) == 0;
    if (w < 2) across = false;
    if (h < 2) {
      if (w < 2) continue;
      across = true;
    }
    b[count] = p;
    if (across) {
      int64_t x = between(d, (w + 3) / 4, w - (w + 3) / 4);
      b[i].upper = b[count].lower = p.lower + x;
    } else {
      int64_t y = between(d, (h + 3) / 4, h - (h + 3) / 4);
      b[i].size = y * grain;
      b[count].size -= y * grain;
      b[count].offset += y * grain;
    }
    count++;
  }
}

const char *pack_family_name(pack_family family) {
  static const char *const name[] = {"random", "nested",      "training", "many small, few large",
                                     "cuts",   "coarse cuts", "pinwheels"};
  return name[family];
}

bool pack_family_perfect(pack_family family) {
  return family == PACK_CUTS || family == PACK_COARSE_CUTS || family == PACK_PINWHEELS;
}

void pack_instance(pack_family family, uint64_t seed, size_t n, rg_buffer *b) {
  draw d = {seed * UINT64_C(1000003) + n * 31 + (uint64_t)family};
  switch (family) {
  case PACK_RANDOM: random_intervals(&d, n, b); break;
  case PACK_NESTED: nested(&d, n, b); break;
  case PACK_TRAINING: training(&d, n, b); break;
  case PACK_MIXED: mixed(&d, n, b); break;
  case PACK_CUTS: cut(&d, n, b, 100000, 1 << 20, 1, false); break;
  case PACK_COARSE_CUTS: cut(&d, n, b, 48, 1 << 20, 1 << 12, false); break;
  case PACK_PINWHEELS: cut(&d, n, b, 100000, 1 << 20, 1, true); break;
  case PACK_FAMILIES: break;
  }
  /* The order in which pieces were cut would give the packing away. */
  for (size_t i = n; i > 1; i--) {
    size_t j = (size_t)between(&d, 0, (int64_t)i - 1);
    rg_buffer t = b[i - 1];
    b[i - 1] = b[j];
    b[j] = t;
  }
  for (size_t i = 0; i < n; i++) b[i].offset = 0;
}

bool pack_valid(const rg_buffer *b, size_t n, int64_t align, int64_t *peak) {
  *peak = 0;
  for (size_t i = 0; i < n; i++) {
    /* also of what is never alive */
    if (b[i].offset + b[i].size > *peak) *peak = b[i].offset + b[i].size;
    if (b[i].size == 0 || b[i].lower == b[i].upper) continue;
    if (b[i].offset < 0 || b[i].offset % align != 0) return false;
    for (size_t j = 0; j < i; j++) {
      if (b[j].size == 0 || b[j].lower == b[j].upper) continue;
      bool together = b[i].lower < b[j].upper && b[j].lower < b[i].upper;
      bool apart = b[i].offset + b[i].size <= b[j].offset || b[j].offset + b[j].size <= b[i].offset;
      if (together && !apart) return false;
    }
  }
  return true;
}

int64_t pack_most_alive(const rg_buffer *b, size_t n) {
  int64_t most = 0;
  for (size_t i = 0; i < n; i++) { /* the maximum is reached where some buffer begins */
    int64_t sum = 0;
    for (size_t j = 0; j < n; j++)
      if (b[j].lower <= b[i].lower && b[i].lower < b[j].upper) sum += b[j].size;
    if (sum > most) most = sum;
  }
  return most;
}
