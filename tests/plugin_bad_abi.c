/* tests/plugin_bad_abi.c: a plugin as if built for another version of regraph. Loading it must fail
 * before its ops are looked at: in that version they may look quite different, so here the pointer
 * leads nowhere. */
#include <regraph/op.h>

RG_API const rg_plugin regraph_plugin;
const rg_plugin regraph_plugin = {.abi = RG_OP_ABI + 1,
                                  .name = "from_the_future",
                                  .ops = (const rg_op *const *)(uintptr_t)16,
                                  .nop = 3};
