# Which folder may include what of ours, in the order of the pipeline. "FOLDER: WHAT…", where WHAT is a
# folder, a header, or headers by a pattern. Files of the folder itself and the public headers are always
# allowed; tests/ and bench/ may reach anywhere and are not listed. includes.cmake holds every build to it.
set(rgi_folders
    "graph:"
    "passes: graph"
    "kernels: graph/base.h"
    "ops: graph kernels/*.h cp/tables.h"
    "memplan: graph"
    "recompute: graph memplan"
    "cp: graph passes kernels/cp.h"
    "exec: graph passes kernels/*.h ops memplan recompute cp"
    "report: graph passes ops memplan recompute cp exec"
    "cli:"
    "examples: tests/ref/ref.h")

# Only the loader knows what JSON is made of.
set(rgi_jansson "graph")
