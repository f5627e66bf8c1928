# The oracle, the demo and examples, plugins, benchmarks, tests and fuzz targets.

# ---- fp64 oracle: shares nothing with the library ----
file(GLOB ref_sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/tests/ref/*.c)
add_library(rgi_ref STATIC ${ref_sources})
target_link_libraries(rgi_ref PUBLIC rgi_flags m)

# ---- examples: public header and library only ----
add_executable(regraph-demo ${CMAKE_SOURCE_DIR}/examples/demo.c)
target_link_libraries(regraph-demo PRIVATE regraph rgi_ref rgi_flags m)
foreach(name train_step build_spec serve)
  add_executable(${name} ${CMAKE_SOURCE_DIR}/examples/${name}.c)
  target_link_libraries(${name} PRIVATE regraph rgi_flags m)
endforeach()
if(EXISTS ${CMAKE_SOURCE_DIR}/examples/plugin/CMakeLists.txt)
  add_subdirectory(${CMAKE_SOURCE_DIR}/examples/plugin ${CMAKE_BINARY_DIR}/plugin)
endif()

if(NOT REGRAPH_TESTS) # OFF
  return()
endif()
pkg_check_modules(CRITERION IMPORTED_TARGET criterion)
if(NOT CRITERION_FOUND AND NOT REGRAPH_SANITIZE MATCHES "thread")
  if(REGRAPH_TESTS STREQUAL "AUTO")
    message(STATUS "No Criterion found (Debian: libcriterion-dev): building without the tests")
    return()
  endif()
  message(FATAL_ERROR
          "Criterion is missing (Debian: libcriterion-dev). "
          "Install it, or configure with -DREGRAPH_TESTS=OFF.")
endif()

# What tune may have measured on this machine is no business of the tests. Called where all are
# added.
function(shipped_profiles)
  get_property(tests DIRECTORY PROPERTY TESTS)
  set_property(TEST ${tests} APPEND PROPERTY ENVIRONMENT REGRAPH_PROFILE=shipped)
endfunction()

# ---- unit tests: may reach inside ----
if(REGRAPH_SANITIZE OR REGRAPH_COVERAGE)
  target_compile_definitions(regraph_all INTERFACE RG_TEST_SLOW) # tests/harness/round.h
endif()
if(REGRAPH_SANITIZE MATCHES "thread")
  # Criterion does not start under ThreadSanitizer: the threaded tests run on tests/plain instead.
  foreach(name test_pool test_threads test_session test_session_calls test_cp_comm test_cp_ops
          test_cp_equal test_cp_processes test_cp_seed test_beside)
    add_executable(${name} ${CMAKE_SOURCE_DIR}/tests/unit/${name}.c
                   ${CMAKE_SOURCE_DIR}/tests/plain/plain.c)
    target_include_directories(${name} BEFORE PRIVATE ${CMAKE_SOURCE_DIR}/tests/plain)
    target_compile_options(${name} PRIVATE -Wno-format-zero-length)
    target_link_libraries(${name} PRIVATE regraph_all)
    target_compile_definitions(${name} PRIVATE RG_SOURCE_DIR="${CMAKE_SOURCE_DIR}"
                               RG_BINARY_DIR="${CMAKE_BINARY_DIR}")
    add_test(NAME ${name} COMMAND ${name} WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
  endforeach()
  target_sources(test_beside PRIVATE ${CMAKE_SOURCE_DIR}/tests/harness/random_spec.c)
  shipped_profiles()
  return()
endif()
file(GLOB harness_sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/tests/harness/*.c)
add_library(rgi_harness STATIC ${harness_sources})
target_link_libraries(rgi_harness PUBLIC regraph_all rgi_ref)

add_library(plugin_bad_abi MODULE ${CMAKE_SOURCE_DIR}/tests/plugin_bad_abi.c)
target_include_directories(plugin_bad_abi PRIVATE ${CMAKE_SOURCE_DIR}/include)

# Where lines are counted, what runs lines that others run too, on other numbers, is left out: two
# thirds of the time for 0.4 % of the lines. The builds for release and with sanitizers run it.
set(same_lines "")
if(REGRAPH_COVERAGE)
  set(same_lines
      test_bitequal test_cp_random test_fuse test_graph test_num_attn test_num_attn_exact
      test_num_cut test_num_delta test_num_index test_num_rowwise test_num_topk test_num_wide
      stress serve cp_launch demo)
endif()
file(GLOB test_sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/tests/unit/test_*.c)
foreach(source ${test_sources})
  get_filename_component(name ${source} NAME_WE)
  if(name IN_LIST same_lines)
    continue()
  endif()
  add_executable(${name} ${source})
  set_target_properties(${name} PROPERTIES ENABLE_EXPORTS ON RUNTIME_OUTPUT_DIRECTORY
                        ${CMAKE_BINARY_DIR}/tests)
  target_link_libraries(${name} PRIVATE rgi_harness regraph_all PkgConfig::CRITERION)
  target_compile_definitions(
    ${name} PRIVATE RG_SOURCE_DIR="${CMAKE_SOURCE_DIR}" RG_BINARY_DIR="${CMAKE_BINARY_DIR}"
                    RG_TEST_PLUGIN="$<TARGET_FILE:hard_sigmoid>"
                    RG_TEST_PLUGIN_BAD_ABI="$<TARGET_FILE:plugin_bad_abi>")
  if(REGRAPH_SANITIZE)
    # Compiling it would take as long again; what is watched is the library's code as it was.
    target_compile_options(${name} PRIVATE -O0)
  endif()
  add_dependencies(${name} regraph_cli hard_sigmoid plugin_bad_abi)
  add_test(NAME ${name} COMMAND ${name} WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
endforeach()

# ---- the op tests on a GPU, in one program: tests/gpu.sh runs it, or says why not ----
file(GLOB gpu_sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/tests/unit/test_num_*.c
     ${CMAKE_SOURCE_DIR}/tests/gpu/*.c)
list(APPEND gpu_sources ${CMAKE_SOURCE_DIR}/tests/unit/test_graph.c
     ${CMAKE_SOURCE_DIR}/tests/unit/test_bitequal.c
     ${CMAKE_SOURCE_DIR}/tests/unit/test_fuse.c ${CMAKE_SOURCE_DIR}/tests/unit/test_lengths.c
     ${CMAKE_SOURCE_DIR}/tests/unit/test_serve.c ${CMAKE_SOURCE_DIR}/tests/unit/test_paged.c
     ${CMAKE_SOURCE_DIR}/tests/unit/test_kv_compress.c ${CMAKE_SOURCE_DIR}/tests/unit/test_take.c)
list(FILTER gpu_sources EXCLUDE REGEX "test_num_harness")
if(rgi_cuda OR NOT (REGRAPH_SANITIZE OR REGRAPH_COVERAGE)) # what can't run has to build once
  foreach(source ${gpu_sources}) # tests of the CPU, too, are compiled by then
    get_filename_component(name ${source} NAME_WE)
    if(TARGET ${name})
      set(source $<TARGET_OBJECTS:${name}>)
    endif()
    list(APPEND gpu_objects ${source})
  endforeach()
  add_executable(gpu_tests ${gpu_objects})
  target_link_libraries(gpu_tests PRIVATE rgi_harness regraph_all PkgConfig::CRITERION)
  target_compile_definitions(gpu_tests PRIVATE RG_SOURCE_DIR="${CMAKE_SOURCE_DIR}"
                             RG_BINARY_DIR="${CMAKE_BINARY_DIR}")
  add_test(NAME gpu COMMAND ${CMAKE_SOURCE_DIR}/tests/gpu.sh $<TARGET_FILE:gpu_tests>)
  set_tests_properties(gpu PROPERTIES SKIP_RETURN_CODE 77)
endif()
add_test(NAME gpu_cli COMMAND ${CMAKE_SOURCE_DIR}/tests/gpu_cli.sh $<TARGET_FILE:regraph_cli>
         ${CMAKE_SOURCE_DIR})
add_test(NAME gpu_tune COMMAND ${CMAKE_SOURCE_DIR}/tests/tune.sh cuda $<TARGET_FILE:regraph_cli>
         ${CMAKE_SOURCE_DIR})
set_tests_properties(gpu_cli gpu_tune PROPERTIES SKIP_RETURN_CODE 77)

# The same without Criterion, for compute-sanitizer: gpu_tests_plain [PART-OF-A-NAME …].
add_executable(gpu_tests_plain EXCLUDE_FROM_ALL ${gpu_sources}
               ${CMAKE_SOURCE_DIR}/tests/plain/plain.c)
target_include_directories(gpu_tests_plain BEFORE PRIVATE ${CMAKE_SOURCE_DIR}/tests/plain)
target_compile_options(gpu_tests_plain PRIVATE -Wno-format-zero-length)
target_link_libraries(gpu_tests_plain PRIVATE rgi_harness regraph_all)
target_compile_definitions(gpu_tests_plain PRIVATE RG_SOURCE_DIR="${CMAKE_SOURCE_DIR}"
                           RG_BINARY_DIR="${CMAKE_BINARY_DIR}")

# ---- the stress run: bits of many processes at once on one GPU; a sample of it on the CPU ----
file(GLOB stress_sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/tests/stress/*.c)
add_executable(gpu_stress ${stress_sources})
target_link_libraries(gpu_stress PRIVATE regraph_all)
target_compile_definitions(gpu_stress PRIVATE RG_SOURCE_DIR="${CMAKE_SOURCE_DIR}")
add_test(NAME stress COMMAND ${CMAKE_SOURCE_DIR}/tests/stress/check.sh $<TARGET_FILE:gpu_stress>)

target_sources(test_cli PRIVATE $<TARGET_OBJECTS:rgi_cli>)
target_sources(test_save PRIVATE $<TARGET_OBJECTS:rgi_cli>)

# ---- the command and the examples, as a user runs them ----
add_test(NAME cli COMMAND ${CMAKE_SOURCE_DIR}/tests/cli/cli.sh $<TARGET_FILE:regraph_cli>
         ${CMAKE_SOURCE_DIR})
add_test(NAME cli_profiles COMMAND ${CMAKE_SOURCE_DIR}/tests/cli/profiles.sh
         $<TARGET_FILE:regraph_cli> ${CMAKE_SOURCE_DIR})
add_test(NAME cli_golden COMMAND ${CMAKE_SOURCE_DIR}/tests/cli/golden.sh $<TARGET_FILE:regraph_cli>)
add_test(NAME cli_schemas COMMAND ${CMAKE_SOURCE_DIR}/tests/cli/schemas.py
         $<TARGET_FILE:regraph_cli> ${CMAKE_SOURCE_DIR})
add_test(NAME cli_mistakes COMMAND ${CMAKE_SOURCE_DIR}/tests/cli/mistakes.sh
         $<TARGET_FILE:regraph_cli> ${CMAKE_SOURCE_DIR})
add_test(NAME cli_tune COMMAND ${CMAKE_SOURCE_DIR}/tests/tune.sh cpu $<TARGET_FILE:regraph_cli>
         ${CMAKE_SOURCE_DIR})
add_test(NAME cli_terminal COMMAND ${CMAKE_SOURCE_DIR}/tests/cli/terminal.py
         $<TARGET_FILE:regraph_cli> ${CMAKE_SOURCE_DIR})
set_tests_properties(cli_schemas PROPERTIES SKIP_RETURN_CODE 77)
add_test(NAME train_step COMMAND train_step WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
add_test(NAME build_spec COMMAND build_spec)
add_test(NAME serve COMMAND ${CMAKE_SOURCE_DIR}/tests/serve.sh $<TARGET_FILE:serve>
         ${CMAKE_SOURCE_DIR}/examples)
add_test(NAME cp_launch COMMAND ${CMAKE_SOURCE_DIR}/tests/cp_launch.sh $<TARGET_FILE:regraph_cli>
         ${CMAKE_SOURCE_DIR})
add_test(NAME cp_mpi COMMAND ${CMAKE_SOURCE_DIR}/tests/cp_mpi.sh $<TARGET_FILE_DIR:regraph>
         ${CMAKE_SOURCE_DIR}
                             $<TARGET_FILE:regraph_cli>)
set_tests_properties(cp_mpi PROPERTIES SKIP_RETURN_CODE 77)
add_test(NAME example_cp COMMAND ${CMAKE_SOURCE_DIR}/examples/cp.sh $<TARGET_FILE:regraph_cli>)
add_test(NAME demo COMMAND regraph-demo examples/nsa.json examples/policies/partial.json
         WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})

# ---- the page in a browser; skipped where there is none ----
# What it tests is not compiled: one build.
if(NOT REGRAPH_SANITIZE AND NOT REGRAPH_COVERAGE)
  add_test(NAME page COMMAND ${CMAKE_SOURCE_DIR}/tests/page/page.py $<TARGET_FILE:regraph_cli>
           ${CMAKE_SOURCE_DIR})
  # ---- what the documentation says: links, commands as printed, the notebook ----
  add_test(NAME docs_links COMMAND ${CMAKE_SOURCE_DIR}/tests/docs.py links)
  add_test(NAME docs_commands COMMAND ${CMAKE_SOURCE_DIR}/tests/docs.py commands
           ${CMAKE_BINARY_DIR})
  add_test(NAME notebook COMMAND ${CMAKE_SOURCE_DIR}/tests/notebook.py ${CMAKE_BINARY_DIR}
           ${CMAKE_SOURCE_DIR}/examples/nsa.ipynb)
  set_tests_properties(page notebook PROPERTIES SKIP_RETURN_CODE 77)
endif()

# ---- the order of the folders: looks at sources only, so one build is enough ----
if(NOT REGRAPH_SANITIZE AND NOT REGRAPH_COVERAGE)
  add_test(NAME includes COMMAND ${CMAKE_SOURCE_DIR}/tests/includes.sh)
endif()

# ---- fuzz targets: with libFuzzer where asked, always as replay of the committed corpus ----
file(GLOB fuzz_sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/tests/fuzz/fuzz_*.c)
foreach(source ${fuzz_sources})
  get_filename_component(name ${source} NAME_WE)
  string(REPLACE "fuzz_" "" corpus ${name})
  add_executable(replay_${corpus} ${source} ${CMAKE_SOURCE_DIR}/tests/fuzz/replay.c)
  target_link_libraries(replay_${corpus} PRIVATE rgi_harness regraph_all)
  add_test(NAME replay_${corpus} COMMAND replay_${corpus}
           ${CMAKE_SOURCE_DIR}/tests/fuzz/corpus/${corpus})
  if(REGRAPH_FUZZ)
    add_executable(${name} ${source})
    target_link_options(${name} PRIVATE -fsanitize=fuzzer)
    target_link_libraries(${name} PRIVATE rgi_harness regraph_all)
  endif()
endforeach()

shipped_profiles()
foreach(name ${same_lines})
  if(TEST ${name})
    set_tests_properties(${name} PROPERTIES DISABLED ON)
  endif()
endforeach()

# ---- benchmarks: not tests ----
pkg_check_modules(OPENBLAS IMPORTED_TARGET openblas)
file(GLOB bench_sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/bench/*_bench.c)
if(NOT rgi_cuda)
  list(FILTER bench_sources EXCLUDE REGEX "_gpu_bench")
endif()
foreach(source ${bench_sources})
  get_filename_component(name ${source} NAME_WE)
  add_executable(${name} EXCLUDE_FROM_ALL ${source})
  target_link_libraries(${name} PRIVATE rgi_harness regraph_all)
  target_compile_definitions(${name} PRIVATE RG_SOURCE_DIR="${CMAKE_SOURCE_DIR}")
  if(OPENBLAS_FOUND)
    target_link_libraries(${name} PRIVATE PkgConfig::OPENBLAS)
    target_compile_definitions(${name} PRIVATE HAVE_OPENBLAS)
  endif()
endforeach()
if(rgi_cuda)
  target_link_libraries(gemm_bench PRIVATE CUDA::cublasLt)
endif()
