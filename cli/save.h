/* cli/save.h: files written whole or not at all.

   A regular or new file is written beside its target and renamed over it, so that the earlier file
   stays as it was until the new one is complete: through a full disk, a limit on sizes, an
   interrupt. The new file has the old one's permissions and, where allowed, its owner; where the
   target is a symbolic link, what it leads to is replaced. Devices, pipes and descriptors
   (/dev/stdout) are written as they are. Nothing is forced to disk: what a power failure leaves is
   the file system's affair.

   One file at a time. Errors are RG_E_IO and name the path as given.
 */
#ifndef CLI_SAVE_H
#define CLI_SAVE_H

#include <regraph/regraph.h>
#include <stdio.h>

/* NULL, or what keeps the file from being written, as far as can be seen before a long run. */
const char *cli_save_obstacle(const char *path);
/* Are both the same regular or new file? */
bool cli_save_same(const char *a, const char *b);

/* Opens `path` to be written; NULL with an error. What is written counts from cli_save_end on. */
FILE *cli_save_begin(const char *path, rg_error *e);
/* Closes; puts the file in place if `written`, which is errno's business otherwise. */
rg_status cli_save_end(FILE *f, bool written, const char *path, rg_error *e);

#endif
