/* device/fault.cuh: how a kernel says what is wrong with contents (see rgk_fault in kernels.h).
 *
 * The words are the host's memory, which has no atomics that hold for both sides, nor are any
 * needed: a kernel writes words that it saw empty, the host empties words that it saw full. Kernels
 * among themselves take turns, and those of one session are on one GPU, so a word of its memory
 * (rgk_turn, whose address stands at RGK_FAULT_TAKEN) and atomics within it do. That word is there
 * once for all sessions, and holds the address of the words that are being written. */
#pragma once
#include "../kernels.h"

namespace rgk {

/* The first to come is heard. */
__device__ __forceinline__ void report(const rgk_fault &f, int32_t a, int32_t b, int32_t c = 0,
                                       int32_t d = 0) {
  volatile int32_t *word = f.word;
  if (!word || word[0] != 0) return;
  const uint64_t at =
      (uint32_t)word[RGK_FAULT_TAKEN] | (uint64_t)(uint32_t)word[RGK_FAULT_TAKEN + 1] << 32;
  unsigned long long *turn = (unsigned long long *)at, mine = (unsigned long long)f.word, holder;
  while ((holder = atomicCAS(turn, 0ull, mine)) != 0) {
    if (holder == mine) return;
    __nanosleep(100); /* another session's kernel, which waits for nothing */
  }
  __threadfence(); /* what who had the turn before has written */
  if (word[0] == 0) {
    word[1] = a, word[2] = b, word[3] = c, word[4] = d;
    __threadfence_system();
    word[0] = f.what; /* last: the host looks at this one */
  }
  __threadfence();
  atomicExch(turn, 0ull);
}

} // namespace rgk
