# Writes the shipped device profiles into a C file, so that planning needs no files at run time.
#   cmake -DOUT=profiles_embedded.c -DCPU=cpu.json -DCUDA=h200.json -P embed.cmake
foreach(variable OUT CPU CUDA)
  if(NOT DEFINED ${variable})
    message(FATAL_ERROR "embed.cmake needs -D${variable}=FILE")
  endif()
endforeach()

function(c_string file result)
  file(READ "${file}" text)
  string(REPLACE "\\" "\\\\" text "${text}")
  string(REPLACE "\"" "\\\"" text "${text}")
  string(REPLACE "\n" "\\n\"\n    \"" text "${text}")
  set(${result} "    \"${text}\"" PARENT_SCOPE)
endfunction()

c_string("${CPU}" cpu)
c_string("${CUDA}" cuda)
file(WRITE "${OUT}" "/* Made by cmake/embed.cmake from recompute/profiles. */
extern const char *const rgi_profile_text_cpu, *const rgi_profile_text_cuda;
const char *const rgi_profile_text_cpu =
${cpu};
const char *const rgi_profile_text_cuda =
${cuda};
")
