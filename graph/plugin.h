/* graph/plugin.h: ops from shared libraries. rg_plugin_load (public) opens a file and hands its
 * table to rgi_plugin_add, which can be called on its own for a table already in memory. */
#ifndef RGI_PLUGIN_H
#define RGI_PLUGIN_H

#include "base.h"

/* Checks every op of the plugin and merges them into ctx->op; all or none. Borrows the plugin,
 * which must stay while ctx does. RG_E_PLUGIN, RG_E_NOMEM. */
rg_status rgi_plugin_add(rg_context *ctx, const rg_plugin *plugin, rg_error *e);
/* Closes the libraries. Part of destroying a context: ctx->op may point into them
 * and is not to be used any more. */
void rgi_plugins_unload(rg_context *ctx);

#endif
